"""What the devices differ in: the dtypes that they compute in, how much memory keys and values may take, and
the class of ``_C`` that runs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pyengine import cuda
from pyengine.engine.memory import available_memory
from pyengine.errors import ConfigError
from pyengine.model.checkpoint import Checkpoint
from pyengine.model.config import DTYPE_BYTES
from pyengine.model.quantization import check_method

_CPU_SHARE = 4  # the KV cache takes one part in four of the memory available


class BackEnd(Protocol):
    device: str

    def check(self, dtype: str, quantization: str | None, kv_cache_dtype: str) -> None:
        """ConfigError for arguments of ``LLM`` that no checkpoint makes right."""

    def dtypes(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, kv_cache_dtype: str
    ) -> tuple[str, str]:
        """What "auto" means for a checkpoint: the dtype, and that of the KV cache."""

    def block_bytes(self, checkpoint: Checkpoint, kv_cache_dtype: str) -> int:
        """Of one block of the KV cache, over all layers."""

    def kv_budget(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, max_seqs: int, max_tokens: int
    ) -> int | None:
        """Bytes that a KV cache of the default size takes at most; None if unknown."""

    def model(
        self,
        context: Any,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        quantization: str | None,
        kv_cache_dtype: str,
        num_blocks: int,
    ) -> tuple[Any, Any]:
        """The model, and the KV cache that its ``step`` takes."""


def back_end(device: str) -> BackEnd:
    """That of "cpu", "cuda", or "auto": CUDA where it can be used, else the CPU."""
    if device == "cpu":
        return Cpu()
    if device == "cuda":
        return Cuda(cuda.find_device())
    if device != "auto":
        raise ConfigError(f'device={device!r}: must be "cpu", "cuda" or "auto"')
    try:
        return Cuda(cuda.find_device())
    except ConfigError:
        return Cpu()


def cuda_refuses(checkpoint: Checkpoint) -> str | None:
    """Why no GPU can run a checkpoint as it is, or None."""
    config = checkpoint.config
    for name, value in (("n_embd / n_head", config.head_dim), ("n_inner", config.n_inner)):
        if value % 8 != 0:
            return f"{name} is {value}, but must be a multiple of 8"
    return None


def cuda_dtype(checkpoint: Checkpoint, quantization: str | None) -> str:
    """What dtype="auto" computes in; for quantised weights more than float16 would be wasted."""
    if quantization is not None:
        return "float16"
    return checkpoint.dtype if checkpoint.dtype in DTYPE_BYTES else "float32"


def _check_choices(device: str, dtype: str, kv_cache_dtype: str, known: Sequence[str]) -> None:
    def text(names: Sequence[str]) -> str:
        *some, last = (f'"{name}"' for name in ("auto", *names))
        return f"{', '.join(some)} or {last}"

    if dtype not in ("auto", *known):
        raise ConfigError(f"dtype={dtype!r}: must be {text(known)} on {device}")
    if kv_cache_dtype not in ("auto", *known, "int8"):
        raise ConfigError(f"kv_cache_dtype={kv_cache_dtype!r}: must be {text([*known, 'int8'])} on {device}")


def _weights(
    context: Any, checkpoint: Checkpoint, quantization: str | None
) -> Mapping[str, tuple[Any, str, Sequence[int]]]:
    """Those of the checkpoint, quantised if it does not hold them so."""
    if quantization == checkpoint.quantization:
        return checkpoint.weights()
    from pyengine.model.quantize import quantize_weights

    assert quantization is not None  # a checkpoint that is quantised stays so
    return quantize_weights(context, checkpoint, quantization)


class Cpu:
    device = "cpu"

    def check(self, dtype: str, quantization: str | None, kv_cache_dtype: str) -> None:
        if dtype == "float16":
            raise ConfigError(
                'dtype="float16": the CPU computes in float32 or bfloat16; with dtype="auto", '
                "float16 files run in float32"
            )
        _check_choices("the CPU", dtype, kv_cache_dtype, ("float32", "bfloat16"))
        if quantization is not None:
            check_method(quantization)

    def dtypes(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, kv_cache_dtype: str
    ) -> tuple[str, str]:
        if quantization is not None and dtype == "bfloat16":
            raise ConfigError(
                f'dtype="bfloat16": {quantization} weights are computed with in float32 on the CPU; leave '
                'the dtype at "auto"'
            )
        if dtype == "auto":
            dtype = "float32" if quantization else checkpoint.auto_dtype
        if kv_cache_dtype == "auto":
            kv_cache_dtype = "bfloat16" if quantization else dtype
        return dtype, kv_cache_dtype

    def block_bytes(self, checkpoint: Checkpoint, kv_cache_dtype: str) -> int:
        from pyengine import _C

        config = checkpoint.config
        return _C.KVCache.bytes_per_block(config.n_layer, config.n_head, config.head_dim, kv_cache_dtype)

    def kv_budget(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, max_seqs: int, max_tokens: int
    ) -> int | None:
        memory = available_memory()
        return None if memory is None else memory // _CPU_SHARE

    def model(
        self,
        context: Any,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        quantization: str | None,
        kv_cache_dtype: str,
        num_blocks: int,
    ) -> tuple[Any, Any]:
        from pyengine import _C

        config = checkpoint.config
        weights = _weights(context, checkpoint, quantization)
        model = _C.Model(context, config.kernel_config(), weights, dtype)
        kv = _C.KVCache(config.n_layer, config.n_head, config.head_dim, num_blocks, kv_cache_dtype)
        return model, kv


class Cuda:
    device = "cuda"

    def __init__(self, gpu: cuda.Device) -> None:
        self._gpu = gpu

    @property
    def _has_bfloat16(self) -> bool:
        return self._gpu.capability >= (8, 0)

    def check(self, dtype: str, quantization: str | None, kv_cache_dtype: str) -> None:
        _check_choices("CUDA", dtype, kv_cache_dtype, ("float32", "bfloat16", "float16"))
        if dtype == "bfloat16" and not self._has_bfloat16:
            major, minor = self._gpu.capability
            raise ConfigError(
                f'dtype="bfloat16": {self._gpu.name} has compute capability {major}.{minor} and no bfloat16 '
                'arithmetic (8.0 and later have); use "float16" or "float32"'
            )
        if quantization is not None:
            check_method(quantization)

    def dtypes(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, kv_cache_dtype: str
    ) -> tuple[str, str]:
        refused = cuda_refuses(checkpoint)
        if refused is not None:
            raise ConfigError(f'{checkpoint.path}: CUDA cannot run it: {refused}; use device="cpu"')
        if dtype == "auto":
            dtype = cuda_dtype(checkpoint, quantization)
            if dtype == "bfloat16" and not self._has_bfloat16:
                dtype = "float32"  # float16 has not the range
        if kv_cache_dtype == "auto":
            kv_cache_dtype = dtype
        elif kv_cache_dtype not in (dtype, "int8"):
            raise ConfigError(
                f"kv_cache_dtype={kv_cache_dtype!r}: on CUDA it must be that of the model, {dtype}, or int8"
            )
        return dtype, kv_cache_dtype

    def block_bytes(self, checkpoint: Checkpoint, kv_cache_dtype: str) -> int:
        from pyengine import _C

        config = checkpoint.config
        same_size = "bfloat16" if kv_cache_dtype == "float16" else kv_cache_dtype
        return _C.KVCache.bytes_per_block(config.n_layer, config.n_head, config.head_dim, same_size)

    def kv_budget(
        self, checkpoint: Checkpoint, dtype: str, quantization: str | None, max_seqs: int, max_tokens: int
    ) -> int | None:
        config, size = checkpoint.config, DTYPE_BYTES[dtype]
        weights = config.weight_bytes(quantization or dtype)
        # Buffers of csrc/cuda/model.cu: the residual, what layers read, queries with keys and values, what
        # attention gives, the inner layer; logits of 64 rows and drafts, before and after their edits, or a
        # tensor on its way while loading.
        step = max_tokens * ((4 + 5 * size) * config.n_embd + size * config.n_inner)
        loading = config.n_embd * (4 if quantization is None else 1)
        logits = config.vocab_size * max(4 * 2 * 80, loading)
        left = self._gpu.free_memory - weights - step - logits
        return max(0, left) // 10 * 9

    def model(
        self,
        context: Any,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        quantization: str | None,
        kv_cache_dtype: str,
        num_blocks: int,
    ) -> tuple[Any, Any]:
        from pyengine import _C

        library, config = str(cuda.require_library()), checkpoint.config.kernel_config()
        weights = _weights(context, checkpoint, quantization)
        return _C.DeviceModel(context, config, weights, dtype, kv_cache_dtype, num_blocks, library), None
