from __future__ import annotations

from array import array
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.engine.engine import Engine
from pyengine.engine.scoring import Scoring, Window, window_spans
from pyengine.errors import CheckpointError, RequestError

from .fake_core import best_tokens, fake_logprob
from .helpers import engine, generate, params, request, run, tokens_of

Text: TypeAlias = "tuple[array[int], int]"  # token ids, and the first of them that is scored


def expected(text: Text) -> list[float]:
    ids, first = text
    return [fake_logprob(ids[:at].tobytes(), ids[at]) for at in range(first, len(ids))]


def score(one: Engine, *texts: Text, top_n: int = 0) -> list[Window]:
    """Each text as a request of one window."""
    requests = [Scoring(str(number), number, [text], top_n) for number, text in enumerate(texts)]
    run(one, *requests)
    one.core.manager.check_invariants()  # type: ignore[attr-defined]
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]
    return [request.sequences[0] for request in requests]


@st.composite
def texts(draw: st.DrawFn) -> Text:
    common = draw(st.sampled_from([0, 5, 16, 33]))
    ids = array("i", [4] * common + draw(st.lists(st.integers(0, 3), min_size=2, max_size=60)))
    return ids, draw(st.integers(1, len(ids) - 1))


@settings(max_examples=100, deadline=None)
@given(
    group=st.lists(texts(), min_size=1, max_size=6),
    num_blocks=st.integers(6, 30),
    budget=st.sampled_from([1, 7, 16, 50, 1000]),
    prefix_caching=st.booleans(),
    top_n=st.sampled_from([0, 3]),
)
def test_scores_do_not_depend_on_company_or_chunks(
    group: list[Text], num_blocks: int, budget: int, prefix_caching: bool, top_n: int
) -> None:
    one = engine(num_blocks, budget=budget, prefix_caching=prefix_caching)
    for text, window in zip(group, score(one, *group, top_n=top_n), strict=True):
        assert window.logprobs == expected(text)
        if top_n:
            ids, first = text
            best = [best_tokens(ids[:at].tobytes(), top_n) for at in range(first, len(ids))]
            assert window.top_logprobs == best
    assert all(tokens <= budget for tokens, _ in one.core.model.batches)


def test_a_shared_context_is_computed_once() -> None:
    one = engine(budget=1000)
    context = list(range(33))
    texts = [(array("i", [*context, choice, choice]), len(context)) for choice in range(4)]
    score(one, *texts)
    assert one.core.model.batches == [(34 + 3 * 2, 4)], "in the very step that computes it"


def test_texts_share_a_step_with_requests_that_generate() -> None:
    one = engine(budget=1000)
    prompt = [1] * 20
    generating = request(9, prompt, params(prompt, 5))
    one.add(generating)
    one.step()
    texts = [(array("i", [text] * 40), 1) for text in range(4)]
    for text, window in zip(texts, score(one, *texts), strict=True):
        assert window.logprobs == expected(text)
    assert one.core.model.batches[1] == (4 * 39 + 1, 5)
    assert tokens_of(generating) == generate(engine(), request(0, prompt, params(prompt, 5)))[0]


def test_windows_of_one_text() -> None:
    ids = array("i", [number % 7 for number in range(200)])
    spans = window_spans(len(ids), 1, 50, 20)
    one = Scoring("0", 0, [(ids[begin:end], first - begin) for begin, end, first in spans])
    run(engine(num_blocks=9), one)
    for window, (begin, end, first) in zip(one.sequences, spans, strict=True):
        assert window.logprobs == expected((ids[begin:end], first - begin))
    assert one.num_scored == 199 and one.finished


def test_a_text_that_loses_its_place_keeps_its_scores() -> None:
    prompt = [1] * 30
    one = engine(num_blocks=6, budget=16)
    text = array("i", [2] * 70), 1
    scoring = Scoring("5", 5, [text])
    generating = request(9, prompt, params(prompt, 60), priority=-1)
    one.add(scoring)
    for _ in range(3):
        one.step()
    run(one, generating)
    assert scoring.preemptions > 0 and generating.preemptions == 0
    assert scoring.sequences[0].logprobs == expected(text)
    assert one.counters.scored_tokens == 69, "none of them twice"
    assert tokens_of(generating) == generate(engine(), request(0, prompt, params(prompt, 60)))[0]


def test_more_than_the_cache_is_refused_with_the_numbers() -> None:
    with pytest.raises(RequestError, match="100 tokens at once needs 7 blocks .* has 4"):
        score(engine(num_blocks=4), (array("i", [2] * 100), 1))


def test_scores_that_are_not_finite_fail_their_text_only() -> None:
    one = engine()
    one.core.model.poison = 49
    good, bad = (array("i", [2] * 40), 1), (array("i", [2] * 30 + [49] + [3] * 5), 7)
    requests = [Scoring(str(number), number, [text, good]) for number, text in enumerate((good, bad, good))]
    for each in requests:
        one.add(each)
    while one.requests:
        one.step()
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]
    assert requests[0].error is None and requests[2].error is None
    assert requests[2].sequences[1].logprobs == expected(good)
    error = requests[1].error
    assert isinstance(error, CheckpointError)
    assert "request 1: the logits of window 0 after its token 30 are NaN" in str(error)


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
