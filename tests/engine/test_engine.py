"""Finishing, aborting, failing, streaming."""

from __future__ import annotations

import time

import pytest

from pyengine.engine.generation import Generation
from pyengine.engine.metrics import Counters
from pyengine.errors import CheckpointError, RequestError

from .helpers import Letters, deltas_of, engine, generate, params, request, tokens_of

PROMPT = [1, 2, 3]


def finished(max_tokens: int = 20, **fields: object) -> Generation:
    one = request(0, PROMPT, params(PROMPT, max_tokens, **fields), codec=Letters())  # type: ignore[arg-type]
    generate(engine(), one)
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
    generate(engine(), whole)
    one = engine()
    streamed = request(
        0, PROMPT, params(PROMPT, 30, n=3, stop=stop, logprobs=1), codec=Letters(), stream=True
    )
    generate(one, streamed)
    deltas = deltas_of(streamed)
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
    completion = first.output().outputs[0]
    assert completion.finish_reason == "abort" and completion.token_ids == PLAIN.token_ids[:5]
    assert completion.text == PLAIN.text[:5]
    assert deltas_of(first)[-1].finish_reason == "abort"
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


def test_metrics() -> None:
    one = finished(max_tokens=4)
    metrics = one.output().metrics
    assert (metrics.prompt_tokens, metrics.new_tokens, metrics.preemptions) == (3, 4, 0)
    assert metrics.ttft is not None and metrics.total_time is not None
    assert 0 <= metrics.queue_time <= metrics.ttft <= metrics.total_time
    assert metrics.inter_token_latency is not None and metrics.max_inter_token_latency is not None
    assert 0 < metrics.inter_token_latency <= metrics.max_inter_token_latency <= metrics.total_time
    assert 3 * metrics.inter_token_latency == pytest.approx(metrics.total_time - metrics.ttft, abs=1e-3)
    assert abs(metrics.arrival_time - time.time()) < 60


def test_metrics_of_one_token() -> None:
    metrics = finished(max_tokens=1).output().metrics
    assert metrics.ttft is not None and metrics.inter_token_latency is None
    assert metrics.max_inter_token_latency is None


def test_counters() -> None:
    one = engine()
    prompt = list(range(40))
    ids = iter(range(100))
    generate(one, request(next(ids), prompt, params(prompt, 5)))
    generate(one, request(next(ids), prompt, params(prompt, 7, n=2)))
    counters, scheduler = one.counters, one.scheduler
    assert counters.steps == one.core.model.steps and counters.busy_time > 0
    assert counters.new_tokens == 5 + 14 and counters.finished == 2
    assert counters.prompt_tokens == 40 + 8 + 1, "the second sample runs the last token again"
    assert (scheduler.hit_tokens, scheduler.looked_up_tokens) == (32, 80)
    aborted = request(next(ids), prompt, params(prompt, 5))
    one.add(aborted)
    assert one.num_waiting == 1
    one.abort(aborted)
    assert one.num_waiting == 0 and counters.aborted == 1 and counters.failed == 0
    one.core.model.poison = 0
    bad = request(next(ids), prompt, params(prompt, 5))
    with pytest.raises(CheckpointError):
        generate(one, bad)
    assert counters.failed == 1


def test_rates_are_those_of_the_last_ten_seconds() -> None:
    counters = Counters()
    assert counters.rates(5.0) == (0.0, 0.0)
    for step in range(400):  # 20 s of steps, each with 10 prompt tokens and, from 10 s on, 2 new ones
        begin = 100 + step / 20
        counters.prompt_tokens += 10
        counters.new_tokens += 2 * (step >= 200)
        counters.count_step(begin, begin + 0.05)
    assert counters.rates(120.0) == pytest.approx((200.0, 40.0), rel=0.03)
    assert counters.rates(125.0) == pytest.approx((100.0, 20.0), rel=0.05)
    assert counters.rates(140.0) == (0.0, 0.0)
    assert len(counters._marks) < 120


def test_nothing_to_do() -> None:
    assert engine().step() == 0
