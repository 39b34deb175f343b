"""Attention over the paged cache against float64, and equality at any chunking, company and thread count.

The cache is full of NaN before anything is written to it.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine._C import ops
from tests.forward import block_tables, make_batch
from tests.ops.arrays import ISAS, Array, Floats, context, narrow, stored, widen

KV_DTYPES = ["float32", "bfloat16", "int8"]


def run(
    isa: str,
    kv_dtype: str,
    n_head: int,
    xs: list[Array],
    w: Array,
    bias: Floats,
    chunk: int,
    threads: int = 1,
    alone: bool = False,
) -> list[Floats]:
    """Attention output (T_i, C) of each sequence with inputs ``xs``, in chunks of ``chunk`` tokens."""
    channels = w.shape[0]
    lengths = [len(x) for x in xs]
    tables = block_tables(lengths, seed=len(xs))
    kv = _C.KVCache(1, n_head, channels // n_head, sum(map(len, tables)) + 1, kv_dtype)
    for block in range(kv.num_blocks):
        ops.write_block(kv, 0, block, np.full(kv.block_bytes, 0xFF, np.uint8))  # NaN in every dtype
    scale = (channels // n_head) ** -0.5
    out = [np.zeros((n, channels), np.float32) for n in lengths]
    for begin in range(0, max(lengths), chunk):
        chunks = [(i, begin, min(begin + chunk, n)) for i, n in enumerate(lengths) if begin < n]
        for step in [[c] for c in chunks] if alone else [chunks]:
            batch = make_batch([[0] * n for n in lengths], tables, step)
            x = np.concatenate([xs[i][b:e] for i, b, e in step])
            ctx = context(isa, threads)
            q = ops.qkv(ctx, x, w, bias, batch, kv, 0)
            y = ops.attention(ctx, q, batch, kv, 0, scale)
            row = 0
            for i, b, e in step:
                out[i][b:e] = y[row : row + e - b]
                row += e - b
    return out


def rounded(x: Array, kv_dtype: str) -> Array:
    """Keys or values (H, T, D) as the cache keeps them."""
    if kv_dtype == "bfloat16":
        return widen(narrow(x)).astype(np.float64)
    if kv_dtype == "int8":
        scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 127
        return np.asarray(np.rint(x / scale) * scale)
    return x


def reference(x: Array, w: Array, bias: Floats, n_head: int, kv_dtype: str) -> Array:
    """Causal attention in float64 of keys and values rounded as the cache rounds them."""
    projected = widen(x).astype(np.float64) @ widen(w).astype(np.float64) + bias
    q, k, v = (part.reshape(len(x), n_head, -1).swapaxes(0, 1) for part in np.split(projected, 3, axis=1))
    k, v = rounded(k, kv_dtype), rounded(v, kv_dtype)
    scores = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = p / p.sum(-1, keepdims=True) @ v
    return np.asarray(out.swapaxes(0, 1).reshape(len(x), -1))


def inputs(rng: np.random.Generator, lengths: list[int], channels: int) -> tuple[list[Array], Array, Floats]:
    xs = [stored(rng.standard_normal((n, channels)), "float32") for n in lengths]
    w = stored(rng.standard_normal((channels, 3 * channels)) * channels**-0.5, "float32")
    return xs, w, stored(rng.standard_normal(3 * channels) * 0.3, "float32")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n_head", "head_dim"), [(2, 8), (3, 20), (2, 64), (1, 80), (1, 128), (1, 256), (4, 1), (2, 5)]
)
def test_against_float64(isa: str, kv_dtype: str, n_head: int, head_dim: int) -> None:
    xs, w, bias = inputs(np.random.default_rng(head_dim), [1, 17, 270], n_head * head_dim)
    out = run(isa, kv_dtype, n_head, xs, w, bias, chunk=1000)
    for x, y in zip(xs, out, strict=True):
        error = np.abs(y - reference(x, w, bias, n_head, kv_dtype))
        # keys and values on a rounding edge may fall on the other side in float64; AMX rounds queries and
        # probabilities too
        rms = 1e-6 if kv_dtype == "float32" else 3e-3 if isa == "amx" else 4e-4
        assert error.max() < (3e-6 if kv_dtype == "float32" else 1.5e-2)
        assert np.sqrt((error**2).mean()) < rms


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([(2, 20), (2, 64), (1, 7), (3, 16)]),
    lengths=st.lists(st.one_of(st.integers(1, 100), st.integers(250, 530)), min_size=1, max_size=3),
    chunk=st.one_of(st.integers(1, 80), st.integers(200, 300)),
    threads=st.integers(1, 3),
    alone=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_do_not_depend_on_chunks_company_and_threads(
    isa: str,
    kv_dtype: str,
    heads: tuple[int, int],
    lengths: list[int],
    chunk: int,
    threads: int,
    alone: bool,
    seed: int,
) -> None:
    n_head, head_dim = heads
    xs, w, bias = inputs(np.random.default_rng(seed), lengths, n_head * head_dim)
    whole = run(isa, kv_dtype, n_head, xs, w, bias, chunk=1000)
    parts = run(isa, kv_dtype, n_head, xs, w, bias, chunk, threads, alone)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_later_tokens_cannot_spoil_earlier_ones(isa: str, kv_dtype: str) -> None:
    """Infinite inputs from token 70 on, in the same tiles of rows and keys as finite ones before."""
    rng = np.random.default_rng(3)
    xs, w, bias = inputs(rng, [100], 32)
    clean = run(isa, kv_dtype, 2, xs, w, bias, chunk=1000)[0]
    xs[0][70:] = np.inf
    spoilt = run(isa, kv_dtype, 2, xs, w, bias, chunk=1000)[0]
    np.testing.assert_array_equal(clean[:70], spoilt[:70])
    assert np.isnan(spoilt[70:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_peaked_attention_takes_one_value(isa: str) -> None:
    """Scores of hundreds neither overflow nor lose the best key."""
    channels = 64
    x = stored(np.eye(channels), "float32")
    w = np.zeros((channels, 3 * channels), np.float32)
    w[:, :channels] = w[:, channels : 2 * channels] = np.eye(channels) * 100  # each token's own key fits best
    w[:, 2 * channels :] = np.random.default_rng(1).standard_normal((channels, channels))
    out = run(isa, "float32", 1, [x], w, np.zeros(3 * channels, np.float32), chunk=1000)[0]
    np.testing.assert_array_equal(out, w[:, 2 * channels :])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n_head", "head_dim"), [(2, 64), (3, 20), (1, 7)])
def test_queries_apart_from_keys_and_values(isa: str, kv_dtype: str, n_head: int, head_dim: int) -> None:
    """The last layer's way: keys and values of all rows, queries of some; the same bits."""
    channels = n_head * head_dim
    rng = np.random.default_rng(5)
    (x,), w, bias = inputs(rng, [45], channels)
    batch = make_batch([[0] * 45], [[2, 0, 3]], [(0, 0, 45)])
    caches = [_C.KVCache(1, n_head, head_dim, 4, kv_dtype) for _ in range(2)]
    ctx = context(isa, 2)
    q = ops.qkv(ctx, x, w, bias, batch, caches[0], 0)
    assert ops.qkv(ctx, x, w, bias, batch, caches[1], 0, with_query=False).shape == (0, channels)
    for block in (2, 0, 3):
        assert np.array_equal(ops.read_block(caches[0], 0, block), ops.read_block(caches[1], 0, block))
    rows = [0, 17, 18, 44]
    np.testing.assert_array_equal(ops.query(ctx, x[rows], w, bias), q[rows])
