"""Guessing ahead changes how many steps a text takes, and nothing else."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.engine.beams import BeamSearch
from pyengine.engine.draft_model import DraftModel
from pyengine.engine.generation import Generation, Sample
from pyengine.engine.speculation import Guess, NgramDrafting, Speculator, StepCosts
from pyengine.errors import ConfigError

from .fake_core import VOCAB, drawn
from .helpers import MAX_MODEL_LEN, engine, generate, params, request, run
from .test_real_core import real_engine
from .test_schedules import Arrival, arrivals, check_equal, play


class Oracle:
    """Knows what the fake model will draw, and errs at random."""

    def __init__(self, right: float, seed: int = 0) -> None:
        self.right = right
        self.random = random.Random(seed)
        self.lessons: list[tuple[int, int]] = []

    def guess(self, samples: list[tuple[Sample, int]], costs: StepCosts) -> list[list[Guess]]:
        found = []
        for sample, most in samples:
            tokens, guesses = sample.token_ids[:], []
            for place in range(self.random.randint(0, most)):
                token = drawn(tokens.tobytes(), sample.request.params.seed, sample.index)
                if self.random.random() >= self.right:
                    token = self.random.randrange(VOCAB)
                tokens.append(token)
                guesses.append((token, 0.9 ** (place + 1)))
            found.append(guesses)
        return found

    def learn(self, sample: Sample, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted and drafted > 0
        self.lessons.append((drafted, accepted))


class Eager(Speculator):
    """Runs all drafts, whatever steps cost."""

    def __init__(self, drafter: Any, max_drafts: int = 12) -> None:
        super().__init__(drafter, max_drafts)
        self.costs.choose = self._all  # type: ignore[method-assign]

    @staticmethod
    def _all(probabilities: list[list[float]], num_seqs: int, most: int) -> list[int]:
        chosen = []
        for ones in probabilities:
            chosen.append(min(len(ones), most))
            most -= chosen[-1]
        return chosen


@settings(max_examples=150, deadline=None)
@given(
    trace=arrivals,
    num_blocks=st.integers(8, 40),
    budget=st.sampled_from([1, 3, 7, 16, 33, 200]),
    max_num_seqs=st.integers(1, 8),
    prefix_caching=st.booleans(),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_tokens_equal_those_without_drafts(
    trace: list[Arrival],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
    right: float,
) -> None:
    crowded = engine(num_blocks, budget=budget, max_num_seqs=max_num_seqs, prefix_caching=prefix_caching)
    crowded.speculator = Eager(Oracle(right))
    requests = play(crowded, trace)
    assert max((tokens for tokens, _ in crowded.core.model.batches), default=0) <= budget
    if not any(isinstance(one, BeamSearch) for one in requests):
        new_tokens = [one.num_new_tokens for one in requests if isinstance(one, Generation)]
        assert crowded.counters.new_tokens == sum(new_tokens)
    for number, (arrival, one) in enumerate(zip(trace, requests, strict=True)):
        alone = arrival.request(number)
        run(engine(64, budget=1000, max_num_seqs=8), alone)
        check_equal(one, alone, arrival.abort_after is not None)


def test_right_drafts_save_steps_and_are_counted() -> None:
    one = engine()
    one.speculator = Eager(Oracle(1.0), max_drafts=4)
    first = request(0, [1, 2, 3], params([1, 2, 3], 40))
    (tokens,) = generate(one, first)[0]
    assert len(tokens) == 40
    metrics = first.output().metrics
    assert metrics.draft_tokens == metrics.accepted_tokens == one.counters.accepted_tokens
    assert one.counters.steps == 40 - metrics.accepted_tokens < 40
    assert sum(accepted for _, accepted in one.speculator.drafter.lessons) == metrics.accepted_tokens  # type: ignore[attr-defined]


def test_wrong_drafts_are_not_in_the_prefix_cache() -> None:
    """A second turn finds what has been said, and not a block of guesses."""
    one = engine()
    one.speculator = Eager(Oracle(0.5))
    (answer,) = generate(one, request(0, [1] * 20, params([1] * 20, 40)))[0]
    turn = [1] * 20 + answer + [2]
    second = request(1, turn, params(turn, 30))
    assert generate(one, second) == generate(engine(), request(1, turn, params(turn, 30)))
    assert second.cached_tokens == 48


def test_drafts_take_no_blocks_from_others() -> None:
    """Three blocks each are enough for both; guesses would like more."""
    for right in (0.0, 1.0):
        one = engine(num_blocks=6)
        one.speculator = Eager(Oracle(right), max_drafts=32)
        requests = [request(number, [number] * 16, params([number] * 16, 32)) for number in range(2)]
        run(one, *requests)
        assert sum(seq.preemptions for seq in requests) == 0


def test_a_stop_token_ends_the_text_among_drafts() -> None:
    expected = generate(engine(), request(0, [5], params([5], 60)))[0][0]
    for token in expected[:20]:
        resolved = params([5], 60, stop_ids=frozenset((token,)))
        alone = generate(engine(), request(0, [5], resolved))
        one = engine()
        one.speculator = Eager(Oracle(1.0))
        assert generate(one, request(0, [5], resolved)) == alone


def test_a_batch_that_fails_runs_apart_with_its_drafts() -> None:
    prompts = [[number] * 5 for number in range(3)]
    one = engine()
    one.speculator = Eager(Oracle(0.7))
    requests = [request(number, prompt, params(prompt, 30)) for number, prompt in enumerate(prompts)]
    one.core.model.fail_at = 4
    got = generate(one, *requests)
    assert one.counters.failed_steps == 1
    assert got == [generate(engine(), request(0, prompt, params(prompt, 30)))[0] for prompt in prompts]


@pytest.fixture(scope="module")
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("head_dim_20")


def drafters(directory: Path, max_num_seqs: int, threads: int) -> dict[str, Callable[[], Any]]:
    def smaller() -> DraftModel:
        # The very model: its drafts are right unless its own KV cache or draws are wrong.
        core = real_engine(directory, "float32", "float32", threads=threads, max_num_seqs=max_num_seqs).core
        return DraftModel(core, MAX_MODEL_LEN, max_num_seqs, 50)

    return {
        "ngram": lambda: NgramDrafting(
            _C.NgramDrafter, 1, 8, find_numbers=lambda: _C.NumberTokens(array("i", range(0, 50, 3)))
        ),
        "suffix": lambda: NgramDrafting(_C.NgramDrafter, 1, 24, lambda: _C.SharedFollowers(300)),
        "model": smaller,
    }


@pytest.mark.parametrize("method", ["ngram", "suffix", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_tokens_and_logprobs_equal_those_without(directory: Path, method: str, dtype: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        trace=arrivals,
        num_blocks=st.integers(8, 40),
        budget=st.sampled_from([3, 7, 16, 33, 200]),
        max_num_seqs=st.integers(1, 8),
        prefix_caching=st.booleans(),
        threads=st.sampled_from([1, 2]),
        eager=st.booleans(),
    )
    def check(
        trace: list[Arrival],
        num_blocks: int,
        budget: int,
        max_num_seqs: int,
        prefix_caching: bool,
        threads: int,
        eager: bool,
    ) -> None:
        crowded = real_engine(
            directory,
            dtype,
            dtype,
            threads=threads,
            num_blocks=num_blocks,
            budget=budget,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
        )
        drafter = drafters(directory, max_num_seqs, threads)[method]()
        crowded.speculator = Eager(drafter) if eager else Speculator(drafter, 12)
        requests = play(crowded, trace)
        for number, (arrival, one) in enumerate(zip(trace, requests, strict=True)):
            alone = arrival.request(number)
            run(real_engine(directory, dtype, dtype), alone)
            check_equal(one, alone, arrival.abort_after is not None)

    check()


def test_a_draft_model_draws_what_the_model_draws(directory: Path) -> None:
    """Coupled by the random numbers of the positions: all drafts of the same model are right."""
    one = real_engine(directory, "float32", "float32")
    one.speculator = Eager(drafters(directory, 8, 1)["model"](), max_drafts=5)
    requests = [request(number, [3, number, 9], params([3], 40, seed=number, n=2)) for number in range(3)]
    run(one, *requests)
    assert one.counters.accepted_tokens > 0
    assert one.counters.accepted_tokens == one.counters.draft_tokens


def measured(costs: StepCosts, seconds: Callable[[int], float], num_seqs: int = 1, times: int = 60) -> None:
    for number in range(times):
        drafts = number % 16
        costs.of_drafts(num_seqs, 15)  # as before every step
        costs.measure(num_seqs, drafts, seconds(drafts))


def test_costs_find_the_number_that_pays() -> None:
    likely = [0.9**place for place in range(1, 16)]
    cheap, dear, jump = StepCosts(), StepCosts(), StepCosts()
    measured(cheap, lambda drafts: 0.010 * (1 + 0.002 * drafts))
    measured(dear, lambda drafts: 0.010 * (1 + 2 * drafts))
    measured(jump, lambda drafts: 0.010 * (1.0 if drafts < 8 else 3.0))
    assert cheap.choose([likely], 1, 15) == [15]
    assert dear.choose([likely], 1, 15) == [0]
    assert jump.choose([likely], 1, 15) == [7]
    assert cheap.choose([[0.0005]], 1, 15) == [0]
    assert cheap.choose([likely, likely[:2]], 1, 3) == [2, 1]
    assert StepCosts().choose([[0.5, 0.2, 0.001]], 1, 15) == [2]


def test_costs_forget_one_slow_step() -> None:
    costs = StepCosts()
    measured(costs, lambda drafts: 0.010)
    costs.measure(1, 3, 10.0)
    measured(costs, lambda drafts: 0.010, times=200)
    assert costs.of_drafts(1, 15)[3] < 1.05


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    low=st.integers(1, 4),
    more=st.integers(0, 20),
    shared=st.sampled_from([None, 1, 50, 1000]),
)
def test_an_ngram_drafter_depends_on_the_text_alone(
    text: list[int], cuts: list[int], low: int, more: int, shared: int | None
) -> None:
    def drafter() -> Any:
        followers = None if shared is None else _C.SharedFollowers(shared)
        return _C.NgramDrafter(low, low + more, followers)

    whole, pieces = drafter(), drafter()
    whole.extend(array("i", text))
    begin = 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        pieces.extend(array("i", text[begin:end]))
        begin = end
    assert whole.num_tokens == pieces.num_tokens == len(text)
    drafts = whole.draft(10)
    assert drafts == pieces.draft(10) == whole.draft(10)
    probabilities = [probability for _, probability in drafts]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 < probability <= 1 for probability in probabilities)
    assert {token for token, _ in drafts} <= set(text)
    assert whole.draft(10, 0.3) == [one for one in drafts if one[1] >= 0.3]


def test_an_ngram_drafter_learns_to_copy_and_to_doubt() -> None:
    random_ids = random.Random(1)
    line = [random_ids.randrange(50_000) for _ in range(30)]
    copying = _C.NgramDrafter(1, 8)
    copying.extend(array("i", line * 6 + line[:3]))
    drafts = copying.draft(20)
    assert [token for token, _ in drafts] == line[3:23]
    assert drafts[-1][1] > 0.3
    doubting = _C.NgramDrafter(1, 8)
    doubting.extend(array("i", [random_ids.randrange(20) for _ in range(2000)]))
    assert all(probability < 0.12 for _, probability in doubting.draft(1))


def test_an_ngram_drafter_takes_numbers_for_one() -> None:
    """After numbers that have not come before it knows what stands between numbers."""
    numbers, comma, name, end = range(100, 1100), 1, 2, 3
    random_ids = random.Random(2)
    rows = [[random_ids.choice(numbers), comma, name, random_ids.choice(numbers), end] for _ in range(40)]
    text = array("i", [token for row in rows for token in row])
    right = {}
    for known in (None, _C.NumberTokens(array("i", numbers))):
        drafter = _C.NgramDrafter(1, 8, None, known)
        right[known] = 0
        for place, token in enumerate(text):
            drafts = drafter.draft(1)
            right[known] += [token] == [guess for guess, _ in drafts]
            drafter.extend(text[place : place + 1])
    separators = 3 * len(rows)
    assert right.pop(None) < 0.85 * separators < 0.95 * separators < right.popitem()[1]


def test_number_tokens() -> None:
    known = _C.NumberTokens(array("i", [3, 70]))
    assert [token for token in (-1, 0, 3, 4, 69, 70, 71, 10**9) if token in known] == [3, 70]
    with pytest.raises(ConfigError, match="token ids must be 0 or positive, not -2"):
        _C.NumberTokens(array("i", [-2]))


def test_shared_followers_know_other_texts_and_forget_old_ones() -> None:
    shared = _C.SharedFollowers(100)
    first = _C.NgramDrafter(1, 4, shared)
    first.extend(array("i", range(40)))
    second = _C.NgramDrafter(1, 4, shared)
    second.extend(array("i", [7, 8, 9]))
    assert [token for token, _ in second.draft(4)] == [10, 11, 12, 13]
    other = _C.NgramDrafter(1, 4, shared)
    other.extend(array("i", range(1000, 1120)))
    assert shared.num_tokens <= 100
    third = _C.NgramDrafter(1, 4, shared)
    third.extend(array("i", [7, 8, 9]))
    assert third.draft(4) == []
