"""Quantised weights: the packed bytes and the products, against NumPy, and equal on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine._C import ops
from pyengine.errors import CheckpointError, RequestError
from tests.ops.arrays import ISAS, Array, Floats, context, stored, widen

BITS = [8, 4]
INPUT_GROUP = 256
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 700), st.integers(1, 200))  # rows, K, N


def quantize(w: Array, bits: int, layout: str = "in_out", dtype: str = "float32", **options: Any) -> Any:
    """weight, scale and group (None for 8 bits) as arrays."""
    ctx = context(options.pop("isa", ISAS[-1]), options.pop("threads", 1))
    tensors = _C.quantize(ctx, (np.ascontiguousarray(w), dtype, w.shape), layout, bits, **options)
    arrays = {
        name: np.frombuffer(memoryview(buffer), {"uint8": np.uint8, "float32": np.float32}[kind]).reshape(
            shape
        )
        for name, (buffer, kind, shape) in tensors.items()
    }
    return arrays["weight"], arrays["scale"], arrays.get("group")


def integers(weight: Array, group: Array | None, k: int, n: int) -> npt.NDArray[np.int64]:
    """The weights' integers (K, N) from the packed bytes: what docs/quantization.md describes."""
    tiles = weight.shape[0]
    if group is None:
        padded = weight.transpose(1, 3, 0, 2).reshape(-1, tiles * 16).astype(np.int64) - 128
        return padded[:k, :n]
    nibbles = np.stack([weight & 15, weight >> 4], axis=2)  # (tiles, K / 8, 2, 16, 4)
    q = nibbles.transpose(1, 2, 4, 0, 3).reshape(-1, tiles * 16).astype(np.int64)
    fit = group.transpose(1, 0, 2).reshape(-1, tiles * 16).astype(np.int64).repeat(32, axis=0)
    return ((fit & 15) * (q - (fit >> 4)))[:k, :n]


def quantize_rows(x: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """The 8-bit inputs (R, K) and their scales (R, groups)."""
    q = np.zeros(x.shape, np.int64)
    scales = np.zeros((len(x), -(-x.shape[1] // INPUT_GROUP)), np.float32)
    for g in range(scales.shape[1]):
        part = x[:, g * INPUT_GROUP : (g + 1) * INPUT_GROUP]
        most = np.abs(part).max(1, keepdims=True)
        scales[:, g] = (most / np.float32(127))[:, 0]
        with np.errstate(divide="ignore"):
            inverse = np.where(most > 0, np.float32(127) / most, np.float32(0))
        q[:, g * INPUT_GROUP : (g + 1) * INPUT_GROUP] = np.rint(part * inverse)
    return q, scales


def product(x: Floats, weight: Array, scale: Floats, group: Array | None) -> npt.NDArray[np.float64]:
    """x w in float64, with the integers of both."""
    w = integers(weight, group, x.shape[1], len(scale))
    q, input_scales = quantize_rows(x)
    y = np.zeros((len(x), len(scale)))
    for g in range(input_scales.shape[1]):
        part = slice(g * INPUT_GROUP, (g + 1) * INPUT_GROUP)
        y += input_scales[:, g : g + 1].astype(np.float64) * (q[:, part] @ w[part])
    return y * scale


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_bytes_are_the_same_everywhere(bits: int, shape: tuple[int, int, int], seed: int, dtype: str) -> None:
    _, k, n = shape
    rng = np.random.default_rng(seed)
    w = stored(rng.standard_normal((k, n)) * rng.uniform(0, 3, n), dtype)
    factor = rng.uniform(0.1, 3, k).astype(np.float32)
    options: dict[str, Any] = {"dtype": dtype, "factor": (factor, "float32", (k,))}
    expected = quantize(w, bits, **options)
    scaled = widen(w) * factor[:, None]
    for isa in ISAS:
        for threads in (1, 3):
            for got, want in zip(
                quantize(w, bits, isa=isa, threads=threads, **options), expected, strict=True
            ):
                np.testing.assert_array_equal(got, want)
        for got, want in zip(quantize(scaled.T, bits, "out_in", isa=isa), expected, strict=True):
            np.testing.assert_array_equal(got, want)


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_int8_is_the_nearest_of_255_steps(shape: tuple[int, int, int], seed: int) -> None:
    _, k, n = shape
    w = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    weight, scale, _ = quantize(w, 8)
    np.testing.assert_array_equal(scale, np.abs(w).max(0) / np.float32(127))
    q = integers(weight, None, k, n)
    assert np.abs(q).max() <= 127
    assert (np.abs(q * scale.astype(np.float64) - w) <= 0.5001 * scale).all()


def test_int4_error_is_that_of_16_steps_in_a_group() -> None:
    w = np.random.default_rng(0).standard_normal((768, 320)).astype(np.float32)
    weight, scale, group = quantize(w, 4)
    q = integers(weight, group, 768, 320)
    assert np.abs(q).max() <= 127
    error = q * scale.astype(np.float64) - w
    # Round to nearest over the whole range of each group of 32 leaves about 0.085.
    step = (w.reshape(24, 32, 320).max(1) - w.reshape(24, 32, 320).min(1)) / 15
    assert np.sqrt((error**2).mean()) < np.sqrt((step**2).mean() / 12) < 0.1
    assert weight.nbytes * 8 + group.nbytes * 8 == 4.25 * w.size


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_extremes(bits: int) -> None:
    w = np.zeros((100, 5), np.float32)
    w[:, 1], w[40, 2], w[:, 3], w[7, 4] = 1e-38, -5, 3e38, 1e-45
    weight, scale, group = quantize(w, bits)
    back = integers(weight, group, 100, 5) * scale.astype(np.float64)
    np.testing.assert_allclose(back[:, :4], w[:, :4], rtol=0.01, atol=1e-37)
    for value in (np.nan, np.inf, -np.inf):
        bad = w.copy()
        bad[99, 4] = value
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            quantize(bad, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 3))
def test_products(isa: str, bits: int, shape: tuple[int, int, int], seed: int, threads: int) -> None:
    rows, k, n = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[:, rng.integers(k)] *= 100
    bias = rng.standard_normal(n).astype(np.float32)
    weight, scale, group = quantize(rng.standard_normal((k, n)).astype(np.float32), bits)
    y = ops.quantized_linear(context(isa, threads), x, weight, scale, group, bias)
    expected = product(x, weight, scale, group)
    np.testing.assert_allclose(y, expected + bias, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_same_bits_on_every_instruction_set_and_in_any_company(
    bits: int, shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    """Sums of integers are exact and what follows is one chain, so only a missing FMA shows."""
    rows, k, n = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight, scale, group = quantize(rng.standard_normal((k, n)).astype(np.float32), bits)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    fused: Floats | None = None
    for isa in ISAS:
        whole = ops.quantized_linear(context(isa, 2), x, weight, scale, group)
        part = ops.quantized_linear(context(isa, 1), x[begin:end].copy(), weight, scale, group)
        np.testing.assert_array_equal(part.view(np.uint32), whole[begin:end].view(np.uint32))
        if isa != "baseline":
            fused = whole if fused is None else fused
            np.testing.assert_array_equal(whole.view(np.uint32), fused.view(np.uint32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_largest_sums_do_not_saturate(isa: str, bits: int) -> None:
    """Neighbouring products of 127 * 255, which 16 bits cannot hold."""
    for sign in (1, -1):
        x = np.full((40, 512), sign, np.float32)
        w = np.ones((512, 33), np.float32)
        weight, scale, group = quantize(w, bits)
        y = ops.quantized_linear(context(isa), x, weight, scale, group)
        np.testing.assert_allclose(y, sign * 512, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_infinity_and_nan_stay_in_their_row(isa: str, bits: int) -> None:
    x = np.ones((40, 300), np.float32)
    x[1, 7], x[38, 299] = np.inf, np.nan
    weight, scale, group = quantize(np.full((300, 70), 0.5, np.float32), bits)
    y = ops.quantized_linear(context(isa), x, weight, scale, group)
    assert np.isnan(y[[1, 38]]).all()
    np.testing.assert_allclose(np.delete(y, [1, 38], 0), 150, rtol=1e-6)


def test_equalize_undoes_scaled_channels() -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((96, 200)).astype(np.float32)
    gain, bias = (rng.standard_normal(96).astype(np.float32) for _ in range(2))

    def equalized(w: Floats, gain: Floats, bias: Floats) -> list[Floats]:
        entries = ((a, "float32", a.shape) for a in (w, gain, bias))
        return [
            np.frombuffer(memoryview(b), np.float32) for b, _, _ in _C.equalize(context(ISAS[-1]), *entries)
        ]

    factor, new_gain, new_bias = equalized(w, gain, bias)
    np.testing.assert_allclose(new_gain * factor, gain, rtol=1e-6)
    np.testing.assert_allclose(new_bias * factor, bias, rtol=1e-6)
    scale = np.where(np.arange(96) % 7 == 0, np.float32(32), np.float32(1))
    other = equalized((w / scale[:, None]).astype(np.float32), gain * scale, bias * scale)
    np.testing.assert_array_equal(other[0], factor * scale)  # so the rows end up the same
    np.testing.assert_array_equal(other[1], new_gain)
    np.testing.assert_array_equal(other[2], new_bias)
    gain[5] = bias[5] = 0
    w[9] = 0
    factor, new_gain, _ = equalized(w, gain, bias)
    assert factor[5] == factor[9] == 1 and new_gain[9] == gain[9]


def test_refusals() -> None:
    w = np.ones((64, 16), np.float32)
    with pytest.raises(RequestError, match="bits must be 4 or 8"):
        quantize(w, 3)
    with pytest.raises(RequestError, match="in_out or out_in"):
        quantize(w, 8, "packed")
    with pytest.raises(RequestError, match="one for each input"):
        quantize(w, 8, factor=(np.ones(3, np.float32), "float32", (3,)))
    with pytest.raises(RequestError, match="as large as its shape"):
        _C.quantize(context(ISAS[-1]), (w, "float32", (64, 17)), "in_out", 8)
    weight, scale, group = quantize(w, 4)
    x = np.ones((1, 64), np.float32)
    with pytest.raises(RequestError, match="weight must have the bytes"):
        ops.quantized_linear(context(ISAS[-1]), x, weight, scale)
    with pytest.raises(RequestError, match="group must fit"):
        ops.quantized_linear(context(ISAS[-1]), x, weight, scale, group[:, :1].copy())
