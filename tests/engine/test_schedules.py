"""Whatever the company, the chunks, the cache and the aborts: a request's tokens are those it gets alone."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.decoding.resolve import BeamParams
from pyengine.engine import scheduler
from pyengine.engine.beams import BeamSearch
from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.scoring import Scoring, Window

from .helpers import engine, generate, params, request, run, tokens_of


@dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    logprobs: int
    seed: int
    stop_id: int
    step: int  # when it arrives
    abort_after: int | None  # steps after its arrival
    priority: int = 0
    score_from: int | None = None  # not to generate, but to score the prompt from this token on
    early_stopping: bool | str | None = None  # of a beam search

    def request(self, number: int) -> Generation | Scoring:
        if self.score_from is not None and len(self.prompt) > 1:
            ids = array("i", self.prompt)
            windows = [(ids, min(self.score_from, len(ids) - 1)), (ids[len(ids) // 2 - 1 :], 1)]
            return Scoring(str(number), number, windows, max(self.logprobs, 0), priority=self.priority)
        beams = None
        if self.early_stopping is not None and self.n > 1:
            width = min(self.n, 3)
            beams = BeamParams(width, 2 * width, width, 1.0, self.early_stopping)
        resolved = params(
            self.prompt,
            min(self.max_tokens, 20) if beams else self.max_tokens,
            n=1 if beams else self.n,
            beams=beams,
            seed=self.seed,
            logprobs=self.logprobs,
            stop_ids=frozenset((self.stop_id,)),
        )
        return request(number, self.prompt, resolved, priority=self.priority)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Prompts that often begin alike."""
    common = draw(st.sampled_from([0, 0, 5, 16, 17, 32, 40]))
    own = draw(st.lists(st.integers(0, 2), min_size=1, max_size=40))
    return (*([7] * common), *own)


arrivals = st.lists(
    st.builds(
        Arrival,
        prompt=prompts(),
        max_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 1, 2, 3, 5]),
        logprobs=st.sampled_from([-1, 0, 2]),
        seed=st.integers(0, 3),
        stop_id=st.integers(0, 49),
        step=st.integers(0, 20),
        abort_after=st.none() | st.integers(0, 30),
        priority=st.sampled_from([0, 0, 0, 0, -1, 1, 1, 7]),
        score_from=st.none() | st.none() | st.integers(1, 50),
        early_stopping=st.none() | st.sampled_from([True, False, "never"]),
    ),
    min_size=1,
    max_size=8,
)


def play(one: Engine, trace: list[Arrival]) -> list[Generation | Scoring]:
    """Run a trace; the manager's books and the lists of the scheduler are checked after each step."""
    requests = [arrival.request(number) for number, arrival in enumerate(trace)]
    manager, lists = one.core.manager, one.scheduler
    pending = sorted(range(len(trace)), key=lambda number: trace[number].step)
    step = 0
    while pending or one.requests:
        while pending and trace[pending[0]].step <= step:
            one.add(requests[pending.pop(0)])
        for number, arrival in enumerate(trace):
            if arrival.abort_after is not None and step == arrival.step + arrival.abort_after:
                one.abort(requests[number])
        ran = one.step()
        assert ran <= one.max_num_batched_tokens
        manager.check_invariants()  # type: ignore[attr-defined]
        held = {block for seq in lists.running for block in seq.blocks}
        assert len(held) == manager.num_in_use  # type: ignore[attr-defined]
        keys = [seq.key for seq in lists.running]
        assert keys == sorted(keys) and len(set(keys)) == len(keys)
        slots = [seq.slot for seq in lists.running]
        assert len(set(slots)) == len(slots) and min(slots, default=0) >= 0
        assert not any(seq.blocks or seq.num_computed or seq.slot >= 0 for seq in lists.waiting)
        step += 1
        assert step < 20_000, "the trace does not end"
    assert not lists.running and not lists.waiting
    assert [request.error for request in requests] == [None] * len(requests)
    assert one.counters.failed_steps == 0
    assert manager.num_in_use == 0  # type: ignore[attr-defined]
    return requests


@settings(max_examples=150, deadline=None)
@given(
    trace=arrivals,
    num_blocks=st.integers(8, 40),
    budget=st.sampled_from([1, 3, 7, 16, 33, 200]),
    max_num_seqs=st.integers(1, 8),
    prefix_caching=st.booleans(),
    max_overtaking=st.sampled_from([1, 2, 16]),
)
def test_tokens_equal_those_alone(
    trace: list[Arrival],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
    max_overtaking: int,
) -> None:
    crowded = engine(num_blocks, budget=budget, max_num_seqs=max_num_seqs, prefix_caching=prefix_caching)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MAX_OVERTAKING", max_overtaking)
        requests = play(crowded, trace)
    assert crowded.core.model.rows_sampled == crowded.counters.new_tokens
    if not any(isinstance(one, BeamSearch) for one in requests):  # whose tokens are drawn for several beams
        new_tokens = [one.num_new_tokens for one in requests if isinstance(one, Generation)]
        assert crowded.counters.new_tokens == sum(new_tokens)
    for number, (arrival, one) in enumerate(zip(trace, requests, strict=True)):
        alone = arrival.request(number)
        run(engine(64, budget=1000, max_num_seqs=8), alone)
        check_equal(one, alone, arrival.abort_after is not None)


def check_equal(got: Generation | Scoring, alone: Generation | Scoring, may_be_aborted: bool) -> None:
    """To the bit; of an aborted request, what it has."""
    assert got.finished
    if isinstance(got, Scoring):
        for window, expected_window in zip(got.sequences, alone.sequences, strict=True):
            assert isinstance(expected_window, Window)
            known = len(window.logprobs)
            assert known == len(expected_window.logprobs) or may_be_aborted
            assert window.logprobs == expected_window.logprobs[:known]
            assert window.top_logprobs == expected_window.top_logprobs[:known]
        return
    assert isinstance(alone, Generation)
    if isinstance(alone, BeamSearch) and may_be_aborted:
        return  # the best of its beams need not be the beginnings of those that are the best at the end
    for sample, expected in zip(got.output().outputs, alone.output().outputs, strict=True):
        if sample.finish_reason == "abort":
            assert may_be_aborted
            known = len(sample.token_ids)
            assert sample.token_ids == expected.token_ids[:known]
            assert sample.logprobs == (expected.logprobs and expected.logprobs[:known])
        else:
            assert sample == expected


@settings(max_examples=40, deadline=None)
@given(trace=arrivals)
def test_a_cache_of_one_longest_request_is_enough(trace: list[Arrival]) -> None:
    longest = max(len(arrival.prompt) + arrival.max_tokens - 1 for arrival in trace)
    requests = play(engine((min(longest, 119) + 15) // 16, budget=32), trace)
    assert all(one.finished for one in requests)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_tenth_of_the_cache(prefix_caching: bool) -> None:
    """All finish, with the same tokens, and begin in the order in which they came."""
    prompts = [[number % 7] * (5 + number % 30) for number in range(60)]

    def requests() -> list[Generation]:
        return [request(number, prompt, params(prompt, 60)) for number, prompt in enumerate(prompts)]

    needed = sum((len(prompt) + 59 + 15) // 16 for prompt in prompts)
    roomy = requests()
    expected = generate(engine(needed, budget=200, max_num_seqs=60), *roomy)
    assert sum(one.preemptions for one in roomy) == 0
    crowded = requests()
    one = engine(needed // 10, budget=200, max_num_seqs=60, prefix_caching=prefix_caching)
    assert generate(one, *crowded) == expected
    assert sum(one.preemptions for one in crowded) > 0
    for moment in ("first_step", "first_token"):
        moments = [getattr(one, moment) for one in crowded]
        assert moments == sorted(moments)
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]


def test_preemption_happens_and_changes_nothing() -> None:
    prompts = [[number] * 20 for number in range(4)]
    alone = [generate(engine(), request(0, prompt, params(prompt, 40)))[0] for prompt in prompts]
    small = engine(9)
    requests = [request(number, prompt, params(prompt, 40)) for number, prompt in enumerate(prompts)]
    assert generate(small, *requests) == alone
    assert sum(one.preemptions for one in requests) > 0
    assert requests[0].preemptions == 0, "the oldest is never preempted"
    ends = [one.end or 0.0 for one in requests]
    assert ends == sorted(ends)


@pytest.mark.parametrize("budget", [1, 5, 16, 64])
def test_long_prompt_runs_in_chunks_beside_decoding(budget: int) -> None:
    one = engine(budget=budget)
    first, second = request(0, [1, 2], params([1, 2], 60)), request(1, [3] * 50, params([3] * 50, 2))
    one.add(first)
    one.step()
    one.step()
    one.add(second)
    while one.requests:
        one.step()
    assert max(tokens for tokens, _ in one.core.model.batches) <= budget
    if budget > 1:  # both in one step
        assert (min(budget, 51), 2) in one.core.model.batches
    assert tokens_of(second) == generate(engine(), request(0, [3] * 50, params([3] * 50, 2)))[0]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 32, 33, 40])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_samples_share_the_prompt(length: int, prefix_caching: bool) -> None:
    one = engine(prefix_caching=prefix_caching)
    prompt = list(range(length))
    many = request(0, prompt, params(prompt, 20, n=4))
    one.add(many)
    one.step()
    assert one.core.model.tokens_run == length
    one.step()
    # The prompt's last token runs again in each of the other samples, to draw from its row.
    assert one.core.model.tokens_run == length + 1 + 3
    shared = (length - 1) // 16
    assert one.core.manager.num_in_use == shared + 4 * ((length + 16) // 16 - shared) - (  # type: ignore[attr-defined]
        3 if length % 16 == 0 else 0  # their first new token has not been drawn when the blocks are taken
    )
    while one.requests:
        one.step()
    samples = tokens_of(many)
    assert len({tuple(tokens) for tokens in samples}) == 4
    seq_alone = generate(engine(), request(0, prompt, params(prompt, 20)))[0]
    assert samples[0] == seq_alone[0]


def test_more_samples_than_slots() -> None:
    prompt = list(range(20))
    expected = generate(engine(max_num_seqs=16), request(0, prompt, params(prompt, 20, n=12)))
    assert generate(engine(max_num_seqs=3), request(0, prompt, params(prompt, 20, n=12))) == expected


def test_prefix_is_computed_once() -> None:
    one = engine()
    prompt = list(range(40))
    first, second = request(0, prompt, params(prompt, 1)), request(1, prompt, params(prompt, 1))
    assert generate(one, first)[0] == generate(one, second)[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert one.core.model.tokens_run == 40 + 8


@pytest.mark.parametrize(("new", "cached"), [(28, 32), (29, 48), (30, 48)])
def test_generated_tokens_are_a_prefix_for_the_next_turn(new: int, cached: int) -> None:
    """All but the last one, whose keys and values were never needed."""
    one = engine()
    (answer,) = generate(one, request(0, [1] * 20, params([1] * 20, new)))[0]
    turn = [1] * 20 + answer + [2]
    second = request(1, turn, params(turn, 5))
    assert generate(one, second) == generate(engine(), request(1, turn, params(turn, 5)))
    assert second.cached_tokens == cached


def test_what_an_aborted_prompt_computed_is_a_prefix() -> None:
    prompt = list(range(49)) + [0] * 31
    one = engine(budget=20)
    first = request(0, prompt, params(prompt, 5))
    one.add(first)
    one.step()
    one.step()  # 40 of 80 tokens
    one.abort(first)
    second = request(1, prompt, params(prompt, 5))
    assert generate(one, second) == generate(engine(), request(1, prompt, params(prompt, 5)))
    assert second.cached_tokens == 32


def test_a_block_is_not_source_and_destination_of_copies_in_one_step() -> None:
    """Two samples must copy their indexed tails, and the first one's source is the only block left."""
    prompts = [[1] * 16, [2] * 16]
    firsts = [generate(engine(), request(0, prompt, params(prompt, 1)))[0][0][0] for prompt in prompts]

    def requests() -> list[Generation]:  # the first sample of each ends with its first token
        resolved = [
            params(prompt, 15, n=2, stop_ids=frozenset((first,)))
            for prompt, first in zip(prompts, firsts, strict=True)
        ]
        return [request(number, prompts[number], resolved[number]) for number in range(2)]

    crowded = requests()
    got = generate(engine(num_blocks=3), *crowded)
    assert [one.preemptions for one in crowded] == [0, 1]
    assert got == [generate(engine(), one)[0] for one in requests()]
    assert [len(tokens) for tokens, _ in got] == [1, 1]
