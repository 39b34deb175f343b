from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.engine.scoring import Window, score_windows, window_spans
from pyengine.errors import InternalError, OutOfMemory

from .fake_core import best_tokens, fake_logprob
from .helpers import engine, params, request, tokens_of


def expected(window: Window) -> list[float]:
    ids = window.token_ids
    return [fake_logprob(ids[:at].tobytes(), ids[at]) for at in range(window.first, len(ids))]


@st.composite
def windows(draw: st.DrawFn) -> Window:
    common = draw(st.sampled_from([0, 5, 16, 33]))
    ids = array("i", [4] * common + draw(st.lists(st.integers(0, 3), min_size=2, max_size=60)))
    return Window(ids, draw(st.integers(1, len(ids))))


@settings(max_examples=100, deadline=None)
@given(
    group=st.lists(windows(), min_size=1, max_size=6),
    num_blocks=st.integers(6, 30),
    budget=st.sampled_from([1, 7, 16, 50, 1000]),
    prefix_caching=st.booleans(),
    top_n=st.sampled_from([0, 3]),
)
def test_scores_do_not_depend_on_company_or_chunks(
    group: list[Window], num_blocks: int, budget: int, prefix_caching: bool, top_n: int
) -> None:
    one = engine(num_blocks, budget=budget, prefix_caching=prefix_caching)
    score_windows(one, group, top_n)
    for window in group:
        assert window.logprobs == expected(window)
        if top_n:
            ids = window.token_ids
            best = [best_tokens(ids[:at].tobytes(), top_n) for at in range(window.first, len(ids))]
            assert window.top_logprobs == best
    assert all(tokens <= budget for tokens, _ in one.core.model.batches)
    one.core.manager.check_invariants()  # type: ignore[attr-defined]
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]


def test_a_shared_context_is_computed_once() -> None:
    one = engine(budget=1000)
    context = list(range(33))
    group = [Window(array("i", [*context, choice, choice]), len(context)) for choice in range(4)]
    score_windows(one, group)
    assert one.core.model.batches == [(34, 1), (6, 3)]


def test_windows_of_different_texts_share_a_batch() -> None:
    one = engine(budget=1000)
    score_windows(one, [Window(array("i", [text] * 40), 1) for text in range(4)])
    assert one.core.model.batches == [(4 * 39, 4)]


def test_running_requests_make_room_and_go_on_unchanged() -> None:
    prompt = [1] * 50
    alone = request(0, prompt, params(prompt, 30))
    plain = engine()
    plain.add(alone)
    while plain.requests:
        plain.step()
    one = engine(num_blocks=5)
    running = request(0, prompt, params(prompt, 30))
    one.add(running)
    for _ in range(10):
        one.step()
    window = Window(array("i", [2] * 70), 1)
    score_windows(one, [window])
    assert window.logprobs == expected(window)
    while one.requests:
        one.step()
    assert running.preemptions == 1
    assert tokens_of(running) == tokens_of(alone)


def test_more_than_the_cache_is_refused_with_the_numbers() -> None:
    with pytest.raises(OutOfMemory, match="100 tokens needs 7 blocks .* 4 are available"):
        score_windows(engine(num_blocks=4), [Window(array("i", [2] * 100), 1)])


def test_a_failure_frees_the_blocks() -> None:
    one = engine()

    def fail(*_: object) -> None:
        raise InternalError("the step failed, as the test asked")

    one.core.model.score = fail
    with pytest.raises(InternalError):
        score_windows(one, [Window(array("i", [2] * 100), 1)])
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]


@given(num_tokens=st.integers(1, 200), first=st.integers(1, 200), size=st.integers(2, 50), data=st.data())
def test_spans_score_each_token_once_with_enough_context(
    num_tokens: int, first: int, size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size - 1))
    spans = window_spans(num_tokens, first, size, stride)
    assert [token for _, end, scored in spans for token in range(scored, end)] == list(
        range(first, num_tokens)
    )
    for begin, end, scored in spans:
        assert 0 <= begin < scored < end <= begin + size
        assert scored - begin >= min(scored, size - stride)
