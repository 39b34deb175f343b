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
    """Products of bfloat16 are exact in float32, so FMA, dot product and plain sums agree."""
    rng = np.random.default_rng(5)
    x, w = narrow(rng.standard_normal((11, 513))), narrow(rng.standard_normal((513, 131)))
    results = [ops.linear(context(isa), x, w) for isa in ISAS]
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
