"""Every operation of ``csrc/ops/ops.h``, singly: NumPy arrays in, new NumPy arrays out. For tests and study.

Letters: T tokens, C channels, K and N input and output features, V vocabulary, R rows. Arrays are
C-contiguous, float32 or bfloat16 as uint16 (``x`` and the weights of one call alike); gains, biases, q and
the residual are float32. ``out_dtype`` is "float32" or "bfloat16". ``RequestError`` if shapes do not fit.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import Batch, ExecContext, KVCache, _Int32Buffer

_Floats: TypeAlias = npt.NDArray[np.float32]
_FloatsOrBfloat16: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

def embed(
    ctx: ExecContext, batch: Batch, wte: _FloatsOrBfloat16 | PackedWeight, wpe: _FloatsOrBfloat16
) -> _Floats:
    """``wte[token_ids] + wpe[positions]`` (T, C); wte (V, C) or packed from that, wpe (n_positions, C)."""

def layer_norm(
    ctx: ExecContext,
    x: _Floats,
    gain: _Floats,
    bias: _Floats,
    eps: float = 1e-5,
    rows: _Int32Buffer | None = None,
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Layer norm (R, C) of the rows ``rows`` (int32) of x, or of all."""

class PackedWeight:
    """Dense weights in the layout that the kernels stream: what ``pack`` returns."""

    @property
    def words(self) -> npt.NDArray[np.uint32]:
        """A copy (ceil(N / 16), words of k, 16): a word is a float32, or the bfloat16 of k and k + 1."""

def pack(
    ctx: ExecContext,
    w: _FloatsOrBfloat16,
    layout: str = "in_out",
    dtype: str | None = None,
) -> PackedWeight:
    """The weights w (K, N) or, with layout "out_in", (N, K), packed; converted to ``dtype`` if it is given.
    """

def linear(
    ctx: ExecContext,
    x: _FloatsOrBfloat16,
    w: _FloatsOrBfloat16 | PackedWeight,
    bias: _Floats | None = None,
    activation: str = "none",
    layout: str = "in_out",
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """``activation(x w + bias)`` (R, N); x (R, K), w (K, N) or, with layout "out_in", (N, K).

    Activations: "none", "gelu_tanh", "gelu_erf", "relu", "silu".
    """

def quantized_linear(
    ctx: ExecContext,
    x: _Floats,
    weight: npt.NDArray[np.uint8],
    scale: _Floats,
    group: npt.NDArray[np.uint8] | None = None,
    bias: _Floats | None = None,
    activation: str = "none",
) -> _Floats:
    """``activation(x w + bias)`` (R, N); x (R, K), w as ``_C.quantize`` returns it, scale (N,)."""

def linear_residual(
    ctx: ExecContext,
    x: _FloatsOrBfloat16,
    w: _FloatsOrBfloat16 | PackedWeight,
    bias: _Floats | None,
    residual: _Floats,
    layout: str = "in_out",
) -> _Floats:
    """``residual + x w + bias`` (R, N); the residual given is left as it is."""

def qkv(
    ctx: ExecContext,
    x: _FloatsOrBfloat16,
    w: _FloatsOrBfloat16 | PackedWeight,
    bias: _Floats,
    batch: Batch,
    kv: KVCache,
    layer: int,
    with_query: bool = True,
) -> _Floats:
    """q (T, C) of ``x w + bias``, w (C, 3C), or (0, C) without query; keys and values go to the cache."""

def query(
    ctx: ExecContext, x: _FloatsOrBfloat16, w: _FloatsOrBfloat16 | PackedWeight, bias: _Floats
) -> _Floats:
    """The q (R, C) that ``qkv`` gives for these rows."""

def attention(
    ctx: ExecContext,
    q: _Floats,
    batch: Batch,
    kv: KVCache,
    layer: int,
    scale: float,
    out_dtype: str = "float32",
) -> npt.NDArray[Any]:
    """Causal attention (T, C) of q over the keys and values in the cache."""

def score_rows(
    ctx: ExecContext,
    x: _FloatsOrBfloat16,
    head: _FloatsOrBfloat16 | PackedWeight,
    targets: _Int32Buffer,
    top_n: int = 0,
) -> tuple[_Floats, npt.NDArray[np.int32], _Floats]:
    """Log-probabilities (R,) of ``targets`` (int32), and the top_n (0 to 64) ids and log-probabilities
    (R, top_n), best first; head (V, C)."""

def copy_blocks(ctx: ExecContext, kv: KVCache, layer: int, pairs: _Int32Buffer) -> None:
    """Copy blocks of one layer; pairs (2n,) int32: source, destination, source, ...

    No block is copied to twice, or both from and to."""

def convert(ctx: ExecContext, src: npt.NDArray[Any], src_dtype: str, dst_dtype: str) -> npt.NDArray[Any]:
    """Element-wise conversion between "float32", "bfloat16" and "float16" (the last two as uint16)."""

def read_block(kv: KVCache, layer: int, block: int) -> npt.NDArray[np.uint8]:
    """The bytes of one block of one layer as they are stored (csrc/kv/layout.h)."""

def write_block(kv: KVCache, layer: int, block: int, data: npt.NDArray[np.uint8]) -> None:
    """Overwrite one block of one layer with as many bytes."""
