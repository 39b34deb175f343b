"""Dense layers at any shape: exact sums of small integers, float64 within rounding, one row as in many.

csrc/tests/test_ops.cpp compares them with the order of sums that ops.h defines, bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine._C import ops
from tests.ops.arrays import DTYPES, ISAS, context, narrow, stored, widen

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 450))  # rows, K, N


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 3))
def test_sums_of_small_integers_are_exact(
    isa: str, dtype: str, layout: str, shape: tuple[int, int, int], seed: int, threads: int
) -> None:
    rows, k, n = shape
    rng = np.random.default_rng(seed)
    x, w, bias = (rng.integers(-8, 9, size).astype(np.float32) for size in ((rows, k), (k, n), (n,)))
    matrix = w if layout == "in_out" else w.T
    ctx = context(isa, threads)
    y = ops.linear(ctx, stored(x, dtype), stored(matrix, dtype), bias, layout=layout)
    np.testing.assert_array_equal(y, x @ w + bias)
    residual = rng.integers(-99, 99, (rows, n)).astype(np.float32)
    total = ops.linear_residual(ctx, stored(x, dtype), stored(matrix, dtype), bias, residual, layout=layout)
    np.testing.assert_array_equal(total, residual + (x @ w + bias))


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_rows_do_not_depend_on_their_company(
    isa: str, dtype: str, layout: str, shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    rows, k, n = shape
    rng = np.random.default_rng(seed)
    x = stored(rng.standard_normal((rows, k)), dtype)
    matrix = rng.standard_normal((k, n) if layout == "in_out" else (n, k))
    w, bias = stored(matrix, dtype), rng.standard_normal(n).astype(np.float32)
    whole = ops.linear(context(isa, 2), x, w, bias, "gelu_tanh", layout)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    for threads in (1, 3):
        part = ops.linear(context(isa, threads), x[begin:end].copy(), w, bias, "gelu_tanh", layout)
        np.testing.assert_array_equal(part.view(np.uint32), whole[begin:end].view(np.uint32))


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 600), st.integers(1, 450)),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_packed_weights_give_the_same_bits(
    isa: str, dtype: str, layout: str, shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    rows, k, n = shape
    rng = np.random.default_rng(seed)
    x = stored(rng.standard_normal((rows, k)), dtype)
    matrix = rng.standard_normal((k, n) if layout == "in_out" else (n, k)).astype(np.float32)
    w, bias = stored(matrix, dtype), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((rows, n)).astype(np.float32)
    packed = ops.pack(context(isa, 2), w, layout)
    np.testing.assert_array_equal(ops.pack(context(isa, 1), matrix, layout, dtype).words, packed.words)
    plain = ops.linear(context(isa, 2), x, w, bias, "gelu_tanh", layout)
    total = ops.linear_residual(context(isa, 2), x, w, bias, residual, layout)
    begin = data.draw(st.integers(0, rows - 1))
    part = slice(begin, data.draw(st.integers(begin + 1, rows)))
    for threads in (1, 3):
        ctx = context(isa, threads)
        y = ops.linear(ctx, x[part].copy(), packed, bias, "gelu_tanh")
        np.testing.assert_array_equal(y.view(np.uint32), plain[part].view(np.uint32))
        y = ops.linear_residual(ctx, x[part].copy(), packed, bias, residual[part].copy())
        np.testing.assert_array_equal(y.view(np.uint32), total[part].view(np.uint32))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (5, 16), (33, 50)])
def test_packed_layout(k: int, n: int) -> None:
    """Tiles of 16 columns, k next, the columns of a tile last; bfloat16 in pairs of k; zeros behind both."""
    w = np.arange(1, k * n + 1, dtype=np.uint16).reshape(k, n)
    padded = np.zeros((k + k % 2, -(-n // 16) * 16), np.uint16)
    padded[:k, :n] = w
    pairs = padded.reshape(-1, 2, padded.shape[1] // 16, 16).transpose(2, 0, 3, 1)
    for isa in ISAS:
        words = ops.pack(context(isa), w).words
        np.testing.assert_array_equal(words.view(np.uint16).reshape(pairs.shape), pairs)
        floats = ops.pack(context(isa), widen(w)).words.view(np.float32)
        np.testing.assert_array_equal(floats, widen(padded)[:k].reshape(k, -1, 16).transpose(1, 0, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [64, 768, 3072])
def test_error_of_sums(isa: str, dtype: str, k: int) -> None:
    rng = np.random.default_rng(k)
    x, w = stored(rng.standard_normal((9, k)), dtype), stored(rng.standard_normal((k, 200)), dtype)
    exact = widen(x).astype(np.float64) @ widen(w).astype(np.float64)
    error = np.abs(ops.linear(context(isa), x, w) - exact)
    assert np.sqrt((error**2).mean()) <= 6e-7 * np.sqrt(k)
    half = ops.linear(context(isa), x, w, out_dtype="bfloat16")
    np.testing.assert_array_equal(half, narrow(ops.linear(context(isa), x, w)))


@pytest.mark.skipif(len(ISAS) < 2, reason="one instruction set only")
def test_bfloat16_is_the_same_everywhere() -> None:
    """Products of bfloat16 are exact in float32, so FMA, dot product and plain sums agree.

    AMX adds in an order of its own.
    """
    rng = np.random.default_rng(5)
    x, w = narrow(rng.standard_normal((11, 513))), narrow(rng.standard_normal((513, 131)))
    results = [ops.linear(context(isa), x, w) for isa in ISAS if isa != "amx"]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("isa", ISAS)
def test_infinity_and_nan_stay_in_their_row(isa: str) -> None:
    for dtype in DTYPES:
        x = np.ones((6, 300), np.float32)
        x[1, 7], x[4, 299] = np.inf, np.nan
        w = stored(np.full((300, 70), 0.5), dtype)
        y = ops.linear(context(isa), stored(x, dtype), w)
        assert np.isposinf(y[1]).all() and np.isnan(y[4]).all()
        assert (y[[0, 2, 3, 5]] == 150).all()


def test_unknown_isa_names_the_choices() -> None:
    with pytest.raises(Exception, match=r'"mmx" does not exist .* baseline'):
        _C.ExecContext(1, "mmx")
