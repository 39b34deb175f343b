"""Finishing, aborting, failing, streaming."""

from __future__ import annotations

import pytest

from pyengine.engine.request import Request
from pyengine.errors import RequestError

from .helpers import Letters, engine, params, request, run, tokens_of

PROMPT = [1, 2, 3]


def finished(max_tokens: int = 20, **fields: object) -> Request:
    one = request(0, PROMPT, params(PROMPT, max_tokens, **fields), codec=Letters())  # type: ignore[arg-type]
    run(engine(), one)
    return one


PLAIN = finished().output().outputs[0]


def test_max_tokens() -> None:
    assert len(PLAIN.token_ids) == 20
    assert (PLAIN.finish_reason, PLAIN.stop_reason) == ("length", None)
    assert PLAIN.text == Letters().append(PLAIN.token_ids)


def test_end_of_the_context() -> None:
    completion = finished(max_tokens=1000).output().outputs[0]
    assert len(PROMPT) + len(completion.token_ids) == 120
    assert completion.finish_reason == "length"
    assert completion.token_ids[:20] == PLAIN.token_ids


@pytest.mark.parametrize("stop", [(), ("~",)], ids=["text at the end", "text token by token"])
def test_stop_id_ends_the_text_before_it(stop: tuple[str, ...]) -> None:
    token = PLAIN.token_ids[5]
    at = PLAIN.token_ids.index(token)
    got = finished(stop_ids=frozenset((token,)), stop=stop).output().outputs[0]
    assert got.token_ids == PLAIN.token_ids[: at + 1]
    assert got.text == PLAIN.text[:at]
    assert (got.finish_reason, got.stop_reason) == ("stop", token)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_string_across_tokens(length: int) -> None:
    stop = PLAIN.text[7 : 7 + length]
    at = PLAIN.text.index(stop)
    got = finished(stop=(stop,)).output().outputs[0]
    assert got.text == PLAIN.text[:at]
    assert got.token_ids == PLAIN.token_ids[: at + length]
    assert (got.finish_reason, got.stop_reason) == ("stop", stop)


def test_stop_string_on_the_last_token_wins_over_length() -> None:
    got = finished(stop=(PLAIN.text[-2:],)).output().outputs[0]
    assert got.finish_reason == "stop"


def test_logprobs() -> None:
    got = finished(logprobs=2).output().outputs[0]
    assert got.token_ids == PLAIN.token_ids
    assert got.logprobs is not None and len(got.logprobs) == 20
    for token, row in zip(got.token_ids, got.logprobs, strict=True):
        assert row[token].decoded_token == Letters().decode_token(token)
        ranks = [entry.rank for entry in row.values() if entry.rank is not None]
        assert ranks == [1, 2]
        values = [entry.logprob for entry in row.values()]
        assert values == sorted(values, reverse=True), "best first, a token that is not among them last"
    assert got.cumulative_logprob == pytest.approx(
        sum(row[token].logprob for token, row in zip(got.token_ids, got.logprobs, strict=True))
    )
    assert PLAIN.logprobs is None and PLAIN.cumulative_logprob is None


def test_logprobs_zero_reports_the_chosen_token_only() -> None:
    got = finished(logprobs=0).output().outputs[0]
    assert got.logprobs is not None
    assert [list(row) for row in got.logprobs] == [[token] for token in got.token_ids]


def test_deltas_add_up() -> None:
    stop = (PLAIN.text[10:12], "~~~")
    whole = request(0, PROMPT, params(PROMPT, 30, n=3, stop=stop, logprobs=1), codec=Letters())
    run(engine(), whole)
    one = engine()
    streamed = request(
        0, PROMPT, params(PROMPT, 30, n=3, stop=stop, logprobs=1), codec=Letters(), stream=True
    )
    run(one, streamed)
    assert streamed.outbox is not None
    deltas = list(streamed.outbox)
    for completion in whole.output().outputs:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert sum((delta.token_ids for delta in own), []) == completion.token_ids
        assert sum((delta.logprobs or [] for delta in own), []) == completion.logprobs
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == completion.finish_reason
        assert own[-1].stop_reason == completion.stop_reason
    assert [delta.output is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].output is not None and deltas[-1].output.outputs == whole.output().outputs


def test_abort_frees_blocks_and_keeps_what_there_is() -> None:
    one = engine()
    first = request(0, PROMPT, params(PROMPT, 50), codec=Letters(), stream=True)
    second = request(1, PROMPT, params(PROMPT, 20))
    one.add(first)
    one.add(second)
    for _ in range(5):
        one.step()
    one.abort(first)
    one.process_aborts()
    completion = first.output().outputs[0]
    assert completion.finish_reason == "abort" and completion.token_ids == PLAIN.token_ids[:5]
    assert completion.text == PLAIN.text[:5]
    assert first.outbox is not None and first.outbox[-1].finish_reason == "abort"
    while one.requests:
        one.step()
    assert tokens_of(second) == [PLAIN.token_ids]
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    one = engine(num_blocks=3)
    with pytest.raises(RequestError, match=r"3 tokens and up to 47 new ones need 4 blocks .* has 3"):
        one.add(request(0, PROMPT, params(PROMPT, 47)))
    assert not one.requests
    one.add(request(0, PROMPT, params(PROMPT, 46)))  # the last token takes no room


def test_an_id_can_be_used_once_at_a_time() -> None:
    one = engine()
    one.add(request(0, PROMPT, params(PROMPT, 2)))
    with pytest.raises(RequestError, match="'0'"):
        one.add(request(0, PROMPT, params(PROMPT, 2)))
    while one.requests:
        one.step()
    one.add(request(0, PROMPT, params(PROMPT, 2)))


def test_metrics() -> None:
    one = finished(max_tokens=4)
    metrics = one.output().metrics
    assert (metrics.prompt_tokens, metrics.new_tokens, metrics.preemptions) == (3, 4, 0)
    assert metrics.ttft is not None and metrics.total_time is not None
    assert 0 <= metrics.queue_time <= metrics.ttft <= metrics.total_time


def test_nothing_to_do() -> None:
    assert engine().step() == 0
