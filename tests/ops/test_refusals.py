"""Operands that do not fit are refused with a RequestError before a kernel sees them."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from pyengine import _C
from pyengine._C import ops
from pyengine.errors import RequestError

CTX = _C.ExecContext(1)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def int32(*values: int) -> array[int]:
    return array("i", values)


def two_tokens(block: int = 0) -> _C.Batch:
    return _C.Batch(int32(1, 2), int32(0, 1), int32(0, 2), int32(2), int32(block))


def test_dense_operands() -> None:
    x, w = zeros(2, 8), zeros(8, 3)
    with pytest.raises(RequestError, match="one dtype"):
        ops.linear(CTX, x, zeros(8, 3, dtype=np.uint16))
    with pytest.raises(RequestError, match="8 columns, but w takes 3"):
        ops.linear(CTX, x, w, layout="out_in")
    with pytest.raises(RequestError, match="layout"):
        ops.linear(CTX, x, w, layout="in")
    with pytest.raises(RequestError, match="bias must have 3"):
        ops.linear(CTX, x, w, zeros(4))
    with pytest.raises(RequestError, match="w must be C-contiguous"):
        ops.linear(CTX, x, zeros(3, 8).T)
    with pytest.raises(RequestError, match="x must be float32"):
        ops.linear(CTX, zeros(2, 8, dtype=np.float64), w)
    for empty in (zeros(8, 0), zeros(0, 8)):
        with pytest.raises(RequestError, match="w must not be empty"):
            ops.linear(CTX, zeros(2, empty.shape[0]), empty)
    with pytest.raises(RequestError, match=r"residual must be \(R, N\)"):
        ops.linear_residual(CTX, x, w, None, zeros(2, 4))


def test_misaligned_operands() -> None:
    """Vector instructions may assume that numbers lie at multiples of their size."""
    x = np.frombuffer(bytes(1 + 4 * 16), np.float32, 16, offset=1).reshape(2, 8)
    rows = np.frombuffer(bytes(5), np.int32, 1, offset=1)
    with pytest.raises(RequestError, match="x must be aligned"):
        ops.linear(CTX, x, zeros(8, 3))
    with pytest.raises(TypeError, match="rows must lie at a multiple of 4 bytes"):
        ops.layer_norm(CTX, zeros(2, 8), zeros(8), zeros(8), 1e-5, rows)
    assert not ops.layer_norm(CTX, x, zeros(8), zeros(8)).any()  # copied


def test_rows_tokens_and_targets() -> None:
    with pytest.raises(RequestError, match="row"):
        ops.layer_norm(CTX, zeros(2, 8), zeros(8), zeros(8), 1e-5, int32(2))
    with pytest.raises(RequestError, match="token id 2"):
        ops.embed(CTX, two_tokens(), zeros(2, 8), zeros(4, 8))
    with pytest.raises(RequestError, match="1 positions"):
        ops.embed(CTX, two_tokens(), zeros(3, 8), zeros(1, 8))
    with pytest.raises(RequestError, match="vocabulary"):
        ops.score_rows(CTX, zeros(1, 8), zeros(5, 8), int32(5))
    with pytest.raises(RequestError, match="top_n"):
        ops.score_rows(CTX, zeros(1, 8), zeros(5, 8), int32(4), 6)


def test_caches_and_blocks() -> None:
    kv = _C.KVCache(1, 2, 4, 3, "float32")
    w, bias = zeros(8, 24), zeros(24)
    with pytest.raises(RequestError, match="block 3"):
        ops.qkv(CTX, zeros(2, 8), w, bias, two_tokens(3), kv, 0)
    with pytest.raises(RequestError, match="one row per token"):
        ops.qkv(CTX, zeros(3, 8), w, bias, two_tokens(), kv, 0)
    with pytest.raises(RequestError, match="n_head"):
        ops.attention(CTX, zeros(2, 9), two_tokens(), kv, 0, 1.0)
    with pytest.raises(RequestError, match="layer"):
        ops.attention(CTX, zeros(2, 8), two_tokens(), kv, 1, 1.0)
    with pytest.raises(RequestError, match="block"):
        ops.copy_blocks(CTX, kv, 0, int32(0, 3))
    with pytest.raises(RequestError, match="sources and destinations"):
        ops.copy_blocks(CTX, kv, 0, int32(0))
    for pairs in (int32(1, 1), int32(0, 1, 1, 2), int32(1, 2, 0, 1)):
        with pytest.raises(RequestError, match="block 1 is copied both from and to"):
            ops.copy_blocks(CTX, kv, 0, pairs)
    with pytest.raises(RequestError, match="block 2 is copied to twice"):
        ops.copy_blocks(CTX, kv, 0, int32(0, 2, 1, 2))
    ops.copy_blocks(CTX, kv, 0, int32(0, 1, 0, 2))  # one source may have several copies
    with pytest.raises(RequestError, match="src_dtype"):
        ops.convert(CTX, zeros(4), "bfloat16", "float32")


def test_results_are_float32_or_bfloat16() -> None:
    """float16 has no kernels: what was float32 would be written past the end of an array of halves."""
    kv = _C.KVCache(1, 2, 4, 3, "float32")
    with pytest.raises(RequestError, match="out_dtype"):
        ops.linear(CTX, zeros(2, 8), zeros(8, 3), out_dtype="float16")
    with pytest.raises(RequestError, match="out_dtype"):
        ops.layer_norm(CTX, zeros(2, 8), zeros(8), zeros(8), out_dtype="float16")
    with pytest.raises(RequestError, match="out_dtype"):
        ops.attention(CTX, zeros(2, 8), two_tokens(), kv, 0, 1.0, out_dtype="float16")
