"""Sampling against transformers' processors, NumPy, and the distributions it must produce."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyengine._C import ExecContext, Sampler, StepResult
from pyengine.errors import RequestError

Logits = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]

CTX = ExecContext(2)


def sample(logits: Logits, positions: range = range(1), **params: Any) -> StepResult:
    """One slot, one row of logits (V,), one sample per position."""
    sampler = Sampler(1)
    sampler.set(0, **params)
    rows = np.broadcast_to(logits, (len(positions), logits.size)).copy()
    slots = np.zeros(len(positions), np.int32)
    return sampler.sample(CTX, rows, slots, np.array(positions, np.int32))


def random_logits(seed: int, vocab_size: int, deviation: float = 2.0) -> Logits:
    return np.random.default_rng(seed).normal(0, deviation, vocab_size).astype(np.float32)


def transformers_distribution(logits: Logits, **params: float) -> Probabilities:
    """Probabilities (V,) after the processors that ``generate`` applies, in its order."""
    torch = pytest.importorskip("torch", reason="transformers' processors take torch tensors")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    generation = transformers.generation
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
        "epsilon_cutoff": generation.EpsilonLogitsWarper,
        "eta_cutoff": generation.EtaLogitsWarper,
    }
    scores = torch.from_numpy(logits.copy())[None]
    for name, warper in warpers.items():
        if name in params:
            scores = warper(params[name])(None, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


def chi_square_is_plausible(counts: npt.NDArray[np.int64], expected: Probabilities) -> bool:
    """Whether p > 0.001; cells that expect fewer than 10 are joined."""
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    cut = int(np.searchsorted(np.cumsum(expected), 10.0)) + 1
    counts = np.append(counts[cut:], counts[:cut].sum())
    expected = np.append(expected[cut:], expected[:cut].sum())
    cells = expected > 0
    statistic = float((((counts - expected) ** 2)[cells] / expected[cells]).sum())
    freedom = max(1, int(cells.sum()) - 1)
    # Wilson and Hilferty: (chi2 / k)^(1/3) is nearly normal; 3.0902 is the normal's 99.9th percentile.
    spread = 2 / (9 * freedom)
    return statistic <= freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def frequencies(logits: Logits, draws: int, **params: Any) -> npt.NDArray[np.int64]:
    tokens: list[int] = []
    for first in range(0, draws, 10_000):
        tokens += sample(logits, range(first, min(first + 10_000, draws)), **params).token_ids
    return np.bincount(tokens, minlength=logits.size)


@pytest.mark.parametrize("vocab_size", [7, 64, 1000])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.9},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.5},
        {"temperature": 2.0, "min_p": 0.1},
        {"typical_p": 0.6},
        {"temperature": 1.4, "epsilon_cutoff": 0.002},
        {"temperature": 1.4, "eta_cutoff": 0.02},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "eta_cutoff": 0.001},
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers(vocab_size: int, params: dict[str, Any]) -> None:
    logits = random_logits(vocab_size, vocab_size)
    draws = 100_000
    expected = transformers_distribution(logits, **params)
    for seed in (11, 2**40) if vocab_size < 1000 else (11,):
        counts = frequencies(logits, draws, seed=seed, **params)
        assert not counts[expected == 0].any(), "a token that transformers cuts off was drawn"
        assert chi_square_is_plausible(counts, draws * expected)


def test_chi_square_would_notice() -> None:
    logits = random_logits(3, 64)
    wrong = transformers_distribution(logits, temperature=1.02)
    assert not chi_square_is_plausible(frequencies(logits, 100_000, seed=5), 100_000 * wrong)


def test_ties_at_top_k_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    drawn = set(sample(logits, range(500), top_k=2, seed=1).token_ids)
    assert drawn == {1, 2, 3, 4}


def test_greedy_takes_the_lowest_of_the_best() -> None:
    logits = np.zeros(200, np.float32)
    logits[[77, 130]] = 5
    assert sample(logits, temperature=0.0).token_ids == [77]
    logits[:] = -np.inf
    logits[199] = -1e30
    assert sample(logits, temperature=0.0).token_ids == [199]
    assert sample(logits, temperature=1.0).token_ids == [199]


def test_log_probabilities_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(1, 5000)
    result = sample(logits, range(50), temperature=0.5, top_k=10, logprobs=6, seed=2)
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    best = np.argsort(-exact, kind="stable")[:6]
    for token, logprob, top in zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True):
        assert logprob == pytest.approx(exact[token], abs=2e-6)
        assert [i for i, _ in top] == best.tolist()
        assert [p for _, p in top] == pytest.approx(exact[best], abs=2e-6)
    assert math.isnan(sample(logits).logprobs[0])
    assert sample(logits, logprobs=0).top_logprobs == [[]]


def test_draws_depend_on_seed_position_and_sample_alone() -> None:
    logits = random_logits(8, 1000)
    alone = [sample(logits, range(p, p + 1), seed=9).token_ids[0] for p in range(40)]
    assert sample(logits, range(40), seed=9).token_ids == alone
    assert sample(logits, range(40), seed=10).token_ids != alone
    assert sample(logits, range(40), seed=9 + 2**32).token_ids != alone
    assert sample(logits, range(40), seed=9, sample_index=1).token_ids != alone
    one_thread = ExecContext(1)
    sampler = Sampler(1)
    sampler.set(0, seed=9)
    rows = np.broadcast_to(logits, (40, 1000)).copy()
    result = sampler.sample(one_thread, rows, np.zeros(40, np.int32), np.arange(40, dtype=np.int32))
    assert result.token_ids == alone


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper defines it (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ key[0], p1 & mask, (p0 >> 32) ^ counter[3] ^ key[1], p0 & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def test_random_numbers_are_philox() -> None:
    known = philox4x32([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert known == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # Random123's kat_vectors
    vocab_size = 4096  # equal logits: the token is the integer part of u * vocab_size
    seed, sample_index = 0x0123456789ABCDEF, 3
    result = sample(np.zeros(vocab_size, np.float32), range(300), seed=seed, sample_index=sample_index)
    for position, token in enumerate(result.token_ids):
        r = philox4x32([position, 0, sample_index, 0], [seed & 0xFFFFFFFF, seed >> 32])
        u = (((r[1] << 32) | r[0]) >> 11) * 2.0**-53
        assert token == int(u * vocab_size)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_mark_their_row_alone(bad: float) -> None:
    sampler = Sampler(4)
    for slot in range(4):
        sampler.set(slot, seed=slot, logprobs=2)
    logits = np.stack([random_logits(i, 300) for i in range(3)])
    slots, positions = np.array([0, 2, 3], np.int32), np.array([5, 5, 5], np.int32)
    good = sampler.sample(CTX, logits, slots, positions)
    logits[1, 270] = bad
    result = sampler.sample(CTX, logits, slots, positions)
    assert result.token_ids == [good.token_ids[0], -1, good.token_ids[2]]
    assert math.isnan(result.logprobs[1])
    assert result.top_logprobs == [good.top_logprobs[0], [], good.top_logprobs[2]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 1e39),  # infinite in float32
        ("temperature", 1e-46),  # 0 in float32: it would be greedy
        ("top_k", -1),
        ("top_p", 1.1),
        ("logprobs", -2),
    ],
)
def test_parameters_are_checked(name: str, value: float) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(RequestError, match=name):
        Sampler(1).set(0, **arguments)


def test_slots_and_shapes_are_checked() -> None:
    sampler = Sampler(2)
    logits = np.zeros((2, 5), np.float32)
    zeros = np.zeros(2, np.int32)
    with pytest.raises(RequestError, match="slot 2"):
        sampler.set(2)
    with pytest.raises(RequestError, match="slot 9"):
        sampler.sample(CTX, logits, np.array([0, 9], np.int32), zeros)
    with pytest.raises(RequestError, match="one slot and one position per row"):
        sampler.sample(CTX, logits, zeros[:1], zeros)
