"""What one block of the cache holds after keys and values were written to it (csrc/kv/layout.h)."""

from __future__ import annotations

import numpy as np
import pytest

from pyengine import _C
from pyengine._C import ops
from pyengine.errors import ConfigError
from tests.forward import make_batch
from tests.ops.arrays import ISAS, Array, Floats, context, narrow

N_HEAD, HEAD_DIM, PADDED = 3, 5, 16
TOKENS = 11  # the other five slots of the block keep what they held


def written(kv_dtype: str, isa: str) -> tuple[Floats, Floats, Array, _C.KVCache]:
    """Keys and values (T, H, D) as they were computed, and the block's bytes after they were written."""
    channels = N_HEAD * HEAD_DIM
    x = np.random.default_rng(1).standard_normal((TOKENS, channels)).astype(np.float32)
    w = np.concatenate([np.eye(channels), 2 * np.eye(channels), -3 * np.eye(channels)], 1).astype(np.float32)
    kv = _C.KVCache(2, N_HEAD, HEAD_DIM, 4, kv_dtype)
    ops.write_block(kv, 1, 2, np.full(kv.block_bytes // 2, 0xAA, np.uint8))
    batch = make_batch([[0] * TOKENS], [[2]], [(0, 0, TOKENS)])
    q = ops.qkv(context(isa), x, w, np.zeros(3 * channels, np.float32), batch, kv, 1)
    assert np.array_equal(q, x)
    shape = (TOKENS, N_HEAD, HEAD_DIM)
    return 2 * x.reshape(shape), -3 * x.reshape(shape), ops.read_block(kv, 1, 2), kv


@pytest.mark.parametrize("isa", ISAS)
def test_float32(isa: str) -> None:
    k, v, block, _ = written("float32", isa)
    floats = block.view(np.float32)
    keys = floats[: N_HEAD * HEAD_DIM * 16].reshape(N_HEAD, HEAD_DIM, 16)
    values = floats[keys.size :].reshape(N_HEAD, 16, PADDED)
    assert np.array_equal(keys.transpose(2, 0, 1)[:TOKENS], k)
    assert np.array_equal(values.transpose(1, 0, 2)[:TOKENS, :, :HEAD_DIM], v)
    assert (keys[..., TOKENS:].copy().view(np.uint8) == 0xAA).all()
    assert (values[:, TOKENS:].copy().view(np.uint8) == 0xAA).all()


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16(isa: str) -> None:
    k, v, block, _ = written("bfloat16", isa)
    halves = block.view(np.uint16)
    pairs = (HEAD_DIM + 1) // 2
    keys = halves[: N_HEAD * pairs * 32].reshape(N_HEAD, pairs, 16, 2)
    values = halves[keys.size :].reshape(N_HEAD, 8, PADDED, 2)
    by_token = keys.transpose(2, 0, 1, 3).reshape(16, N_HEAD, 2 * pairs)
    assert np.array_equal(by_token[:TOKENS, :, :HEAD_DIM], narrow(k))
    assert (by_token[:TOKENS, :, HEAD_DIM:] == 0).all(), "the channel without a partner is paired with zero"
    assert (by_token[TOKENS:] == 0xAAAA).all()
    by_token = values.transpose(1, 3, 0, 2).reshape(16, N_HEAD, PADDED)
    assert np.array_equal(by_token[:TOKENS, :, :HEAD_DIM], narrow(v))
    assert (by_token[TOKENS:] == 0xAAAA).all()


@pytest.mark.parametrize("isa", ISAS)
def test_int8(isa: str) -> None:
    """Integers and scales alike on every instruction set."""
    k, v, block, _ = written("int8", isa)
    fours = (HEAD_DIM + 3) // 4
    key_bytes, value_bytes = 64 + fours * 64, 64 + 16 * PADDED
    keys = block[: N_HEAD * key_bytes].reshape(N_HEAD, key_bytes)
    values = block[N_HEAD * key_bytes :].reshape(N_HEAD, value_bytes)
    for head in range(N_HEAD):
        for x, data, shape in ((k, keys[head], (fours, 16, 4)), (v, values[head], (4, PADDED, 4))):
            scales = data[:64].view(np.float32)
            integers = (data[64:] ^ 0x80).view(np.int8).reshape(shape)
            by_token = integers.transpose((1, 0, 2) if x is k else (0, 2, 1)).reshape(16, -1)
            assert (by_token[TOKENS:] == np.int8(0xAA - 128)).all()
            by_token = by_token[:TOKENS, :HEAD_DIM]
            peak = np.abs(x[:, head]).max(-1)
            assert np.array_equal(scales[:TOKENS], peak * np.float32(1 / 127))
            inverse = np.float32(127) / peak
            assert np.array_equal(by_token, np.rint(x[:, head] * inverse[:, None]).astype(np.int8))
            assert (np.abs(by_token).max(-1) == 127).all()
            assert (scales[TOKENS:].copy().view(np.uint8) == 0xAA).all()


def test_sizes() -> None:
    sizes = {
        dtype: _C.KVCache.bytes_per_block(12, 12, 64, dtype) for dtype in ("float32", "bfloat16", "int8")
    }
    assert sizes["float32"] == 12 * 16 * 2 * 768 * 4
    assert sizes["bfloat16"] == sizes["float32"] // 2
    assert sizes["int8"] == sizes["float32"] // 4 + 12 * 16 * 2 * 12 * 4, "a float32 per token and head"
    assert written("int8", ISAS[0])[3].block_bytes == _C.KVCache.bytes_per_block(2, N_HEAD, HEAD_DIM, "int8")


@pytest.mark.parametrize("value", [0.0, 1e-40, 3e38])
def test_int8_extremes(value: float) -> None:
    """Zeros, subnormal numbers and the largest ones come back as finite numbers near themselves."""
    w = np.concatenate([np.eye(4)] * 3, 1).astype(np.float32)
    kv = _C.KVCache(1, 1, 4, 1, "int8")
    x = np.array([[value, -value, value / 2, 0]], np.float32)
    batch = make_batch([[0]], [[0]], [(0, 0, 1)])
    ctx = context(ISAS[-1])
    q = ops.qkv(ctx, x, w, np.zeros(12, np.float32), batch, kv, 0)
    out = ops.attention(ctx, q, batch, kv, 0, 1e-40)
    assert np.abs(out - x).max() <= max(value / 250, 1e-38)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'float16', but must be float32, bfloat16 or int8"):
        _C.KVCache(1, 1, 4, 1, "float16")
