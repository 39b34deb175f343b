"""Layer norm, activations, embedding, conversion and scoring against float64."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine._C import ops
from tests.forward import make_batch
from tests.ops.arrays import DTYPES, ISAS, context, narrow, stored, widen

ERF = np.frompyfunc(math.erf, 1, 1)
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + ERF(x / np.sqrt(2)).astype(np.float64)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_activation(isa: str, name: str) -> None:
    x = np.concatenate([np.linspace(-40, 40, 20001), np.linspace(-1, 1, 20002)]).astype(np.float32)
    y = ops.linear(context(isa), np.ones((1, 1), np.float32), x[None], activation=name)[0]
    exact = ACTIVATIONS[name](x.astype(np.float64))
    assert (np.abs(y - exact) <= 2e-7 * np.maximum(1, np.abs(x))).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 900),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    shift=st.sampled_from([0.0, -7.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_norm(isa: str, rows: int, channels: int, scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((rows, channels)) + shift) * scale).astype(np.float32)
    gain, bias = rng.standard_normal((2, channels)).astype(np.float32)
    order = rng.integers(0, rows, 2 * rows).astype(np.int32)
    y = ops.layer_norm(context(isa, 2), x, gain, bias, 1e-5, order)
    wide = x[order].astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    error = np.abs(y - (normal * gain + bias))
    # rounding of x - mean: relative to what cancels, at most |shift| standard deviations here
    spread = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    allowed = 1e-6 * (1 + np.abs(wide).max(1, keepdims=True) / spread) * (1 + np.abs(gain) * 3)
    assert (error <= allowed).all()
    half = ops.layer_norm(context(isa), x, gain, bias, 1e-5, order, "bfloat16")
    np.testing.assert_array_equal(half, narrow(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 30), k=st.integers(1, 80), vocab=st.integers(1, 1300), seed=st.integers(0, 2**32 - 1)
)
def test_score_rows(isa: str, dtype: str, rows: int, k: int, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = stored(rng.standard_normal((rows, k)), dtype)
    head = rng.standard_normal((vocab, k)).astype(np.float32)
    head[vocab // 2] = head[-1]  # a tie
    weights = stored(head, dtype)
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    top_n = int(rng.integers(0, min(vocab, 64) + 1))
    logprobs, ids, best = ops.score_rows(context(isa, 1), x, weights, targets, top_n)
    again = ops.score_rows(context(isa, 3), x, weights, targets, top_n)
    for a, b in zip((logprobs, ids, best), again, strict=True):
        np.testing.assert_array_equal(a, b)

    logits = ops.linear(context(isa), x, weights, layout="out_in").astype(np.float64)
    highest = logits.max(1, keepdims=True)
    exact = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
    allowed = 3e-6 + 2e-7 * np.abs(logits).max()
    assert np.abs(logprobs - exact[np.arange(rows), targets]).max() <= allowed
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_n]
    np.testing.assert_array_equal(ids, order)
    if top_n:
        assert np.abs(best - np.take_along_axis(exact, order, 1)).max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_embed(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    wte, wpe = stored(rng.standard_normal((50, 37)), dtype), stored(rng.standard_normal((30, 37)), dtype)
    ids = rng.integers(0, 50, 30).tolist()
    batch = make_batch([ids], [[0, 1]], [(0, 0, 30)])
    ctx = context(isa, 2)
    for table in (wte, ops.pack(ctx, wte, layout="out_in")):
        x = ops.embed(ctx, batch, table, wpe)
        np.testing.assert_array_equal(x, widen(wte)[ids] + widen(wpe))


@pytest.mark.parametrize("isa", ISAS)
def test_convert(isa: str) -> None:
    ctx = context(isa)
    rng = np.random.default_rng(4)
    x = rng.integers(0, 2**32, 100_003, dtype=np.uint32).view(np.float32)  # every kind of number
    finite = ~np.isnan(x)
    np.testing.assert_array_equal(ops.convert(ctx, x, "float32", "bfloat16")[finite], narrow(x)[finite])
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    mine = ops.convert(ctx, x, "float32", "float16")
    np.testing.assert_array_equal(mine[finite], half.view(np.uint16)[finite])
    assert np.isnan(mine.view(np.float16)[~finite]).all()
    np.testing.assert_array_equal(
        ops.convert(ctx, half.view(np.uint16), "float16", "float32")[finite], half.astype(np.float32)[finite]
    )
    both = ops.convert(ctx, half.view(np.uint16), "float16", "bfloat16")
    np.testing.assert_array_equal(both[finite], narrow(half.astype(np.float32))[finite])


def test_select_rows_accepts_array() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    all_rows = ops.layer_norm(context(ISAS[0]), x, ones, zeros)
    np.testing.assert_array_equal(
        ops.layer_norm(context(ISAS[0]), x, ones, zeros, rows=array("i", [2])), all_rows[2:]
    )
