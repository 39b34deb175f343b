"""What fails one request, what fails all, and that nothing is left behind by either."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.scoring import Scoring
from pyengine.errors import CheckpointError, InternalError, PyEngineError, RequestError, TokenizerError

from .helpers import Letters, engine, generate, params, request, tokens_of

PROMPT = [1, 2, 3]
POISON = 60  # no token that is ever drawn


def alone(max_tokens: int = 20, **fields: Any) -> list[list[int]]:
    (tokens,) = generate(engine(), request(0, PROMPT, params(PROMPT, max_tokens, **fields)))
    return tokens


def finish(one: Engine) -> None:
    while one.requests:
        one.step()
    assert one.core.manager.num_in_use == 0  # type: ignore[attr-defined]
    one.core.manager.check_invariants()  # type: ignore[attr-defined]
    assert not one.scheduler.running and not one.scheduler.waiting


def error_of(one: Generation) -> Exception:
    assert one.finished and one.end is not None and one.error is not None
    return one.error


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("budget", [7, 64])
def test_logits_that_are_not_finite_fail_their_request_only(n: int, budget: int) -> None:
    one = engine(budget=budget)
    one.core.model.poison = POISON
    bad_prompt = [*PROMPT, POISON, *range(30)]
    before = request(0, PROMPT, params(PROMPT, 20))
    bad = request(1, bad_prompt, params(bad_prompt, 20, n=n), codec=Letters(), stream=True)
    after = request(2, PROMPT, params(PROMPT, 20, n=2))
    for each in (before, bad, after):
        one.add(each)
    finish(one)
    error = error_of(bad)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith("request 1: the logits after its token 33 are NaN or infinite: ")
    assert {completion.finish_reason for completion in bad.output().outputs} == {"abort"}
    assert before.error is None and after.error is None
    assert tokens_of(before) == alone() and tokens_of(after) == alone(n=2)


def test_logits_that_stop_being_finite_keep_what_there_is() -> None:
    tokens = alone(seed=3)[0]
    one = engine()
    one.core.model.poison = tokens[8]
    bad = request(0, PROMPT, params(PROMPT, 20, seed=3), codec=Letters())
    one.add(bad)
    finish(one)
    at = tokens.index(tokens[8])
    assert f"its token {len(PROMPT) + at} are" in str(error_of(bad))
    (completion,) = bad.output().outputs
    assert completion.token_ids == tokens[: at + 1]
    assert completion.text == Letters().append(completion.token_ids)


@pytest.mark.parametrize("error", [RequestError("no such temperature"), RuntimeError("a surprise")])
def test_parameters_that_the_sampler_refuses_fail_their_request_only(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(budget=6)
    accept = one.core.sampler.set

    def refuse(slot: int, **given: Any) -> None:
        if given["seed"] == 77 and given["sample_index"] == 1:
            raise error
        accept(slot, **given)

    monkeypatch.setattr(one.core.sampler, "set", refuse)
    good = [request(number, PROMPT, params(PROMPT, 20)) for number in (0, 2)]
    bad = request(1, PROMPT, params(PROMPT, 20, seed=77, n=3))
    for each in (good[0], bad, good[1]):
        one.add(each)
    finish(one)
    failure = error_of(bad)
    assert type(failure) is (RequestError if isinstance(error, RequestError) else InternalError)
    assert str(failure).startswith("request 1: ") and str(error) in str(failure)
    assert failure.__cause__ is error
    assert [tokens_of(each) for each in good] == [alone()] * 2


def test_parameters_refused_in_a_step_with_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()

    def refuse(slot: int, **given: Any) -> None:
        raise RequestError("no such temperature")

    monkeypatch.setattr(one.core.sampler, "set", refuse)
    bad = request(0, PROMPT, params(PROMPT, 20))
    one.add(bad)
    assert one.step() == 0
    finish(one)
    assert "no such temperature" in str(error_of(bad))


class Broken(Letters):
    """Fails where ``place`` says: at the first token after ``count``, at the end, or in log-probabilities."""

    def __init__(self, place: str, count: int = 0) -> None:
        self.place, self.count = place, count

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Broken:
        return Broken(self.place, self.count)

    def append(self, ids: Sequence[int]) -> str:
        self.count -= len(ids)
        if self.place == "append" and self.count < 0:
            raise TokenizerError("token 7 has no text")
        return super().append(ids)

    def finish(self) -> str:
        if self.place == "finish":
            raise TokenizerError("token 7 has no text")
        return ""

    def decode_token(self, token_id: int) -> str:
        if self.place == "logprobs":
            raise TokenizerError("token 7 has no text")
        return super().decode_token(token_id)


@pytest.mark.parametrize(
    ("codec", "stream", "stop"),
    [
        (Broken("append"), False, ()),  # all text at the end
        (Broken("finish"), False, ()),
        (Broken("append", 4), False, ("~",)),  # text token by token
        (Broken("append", 4), True, ()),
        (Broken("finish"), True, ()),
        (Broken("logprobs"), True, ()),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_text_that_cannot_be_made_fails_its_request_only(
    codec: Broken, stream: bool, stop: tuple[str, ...], n: int
) -> None:
    one = engine()
    good = request(0, PROMPT, params(PROMPT, 20, n=2), codec=Letters())
    bad = request(1, PROMPT, params(PROMPT, 10, n=n, logprobs=1, stop=stop), codec=codec, stream=stream)
    one.add(good)
    one.add(bad)
    finish(one)
    error = error_of(bad)
    assert isinstance(error, TokenizerError) and str(error) == "request 1: token 7 has no text"
    assert good.error is None and tokens_of(good) == alone(n=2)


@pytest.mark.parametrize("place", ["append", "finish", "logprobs"])
def test_an_abort_whose_text_cannot_be_made_frees_the_blocks(place: str) -> None:
    one = engine()
    bad = request(0, PROMPT, params(PROMPT, 20, n=3, logprobs=0), codec=Broken(place))
    one.add(bad)
    for _ in range(3):
        one.step()
    one.abort(bad)
    finish(one)
    if place != "logprobs":  # which are made when the output is asked for
        assert isinstance(error_of(bad), TokenizerError)


def test_a_step_that_fails_once_changes_nothing() -> None:
    """Each sequence of the batch runs once more, alone."""
    for fail_at in range(1, 12):
        one = engine(budget=20)
        one.core.model.fail_at = fail_at
        long_prompt = [*PROMPT, *range(40)]
        several = [
            request(0, PROMPT, params(PROMPT, 10, n=3)),
            request(1, long_prompt, params(long_prompt, 10)),
            request(2, long_prompt, params(long_prompt, 10, n=2)),
        ]
        for each in several:
            one.add(each)
        finish(one)
        expected = [
            generate(engine(), request(0, prompt, params(prompt, 10, n=n)))[0]
            for prompt, n in ((PROMPT, 3), (long_prompt, 1), (long_prompt, 2))
        ]
        alone_in_its_step = [each for each in several if each.error is not None]
        assert len(alone_in_its_step) <= 1
        for each, tokens in zip(several, expected, strict=True):
            assert each.error is not None or tokens_of(each) == tokens


def test_a_request_that_the_model_cannot_run_fails_alone() -> None:
    one = engine()
    one.core.model.fail_on = POISON
    prompts = [PROMPT, [*PROMPT, POISON], [7] * 40]
    several = [request(number, prompt, params(prompt, 20)) for number, prompt in enumerate(prompts)]
    for each in several:
        one.add(each)
    finish(one)
    error = error_of(several[1])
    assert isinstance(error, InternalError) and str(error).startswith("request 1: the step failed")
    assert [each.error for each in several[::2]] == [None, None]
    assert tokens_of(several[0]) == alone()
    assert tokens_of(several[2]) == generate(engine(), request(0, [7] * 40, params([7] * 40, 20)))[0]


def test_whoever_shares_what_failed_computes_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two requests with one new prefix fails in the step in which the second has matched it."""
    prefix = [9] * 48
    prompts = [[*prefix, POISON], [*prefix, 1], [2, 3], [*prefix, 4]]
    one = engine(budget=1000)
    one.core.model.fail_on = POISON
    several = [request(number, prompt, params(prompt, 20)) for number, prompt in enumerate(prompts)]
    for each in several:
        one.add(each)
    one.step()
    assert [each.cached_tokens for each in several] == [0, 48, 0, 48]
    finish(one)
    assert isinstance(error_of(several[0]), InternalError)
    for number in (1, 2, 3):
        expected = generate(engine(), request(0, prompts[number], params(prompts[number], 20)))[0]
        assert several[number].error is None and tokens_of(several[number]) == expected
    again = request(7, prompts[3], params(prompts[3], 20))
    assert generate(one, again)[0] == tokens_of(several[3]) and again.cached_tokens == 48


def test_whoever_shares_what_the_sampler_refused_computes_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [9] * 40
    one = engine(budget=1000)
    accept = one.core.sampler.set

    def refuse(slot: int, **given: Any) -> None:
        if given["seed"] == 77:
            raise RequestError("no such temperature")
        accept(slot, **given)

    monkeypatch.setattr(one.core.sampler, "set", refuse)
    bad, good = request(0, prompt, params(prompt, 20, seed=77)), request(1, prompt, params(prompt, 20))
    one.add(bad)
    one.add(good)
    finish(one)
    assert bad.error is not None and good.error is None and good.cached_tokens == 32
    assert tokens_of(good) == generate(engine(), request(0, prompt, params(prompt, 20)))[0]


@pytest.mark.parametrize("fault", ["the model fails", "the logits are NaN"])
def test_whoever_shares_what_another_window_has_promised_computes_it_itself(fault: str) -> None:
    """The first window of a text fails in the step in which its second has promised blocks to a request."""
    one = engine(budget=1000)
    if fault == "the model fails":
        one.core.model.fail_on = POISON
    else:  # which comes out when the sequences of a failed step run alone
        one.core.model.poison, one.core.model.fail_at = POISON, 1
    bad = Scoring("0", 0, [(array("i", [8, POISON, 1, 2]), 1), (array("i", [9] * 50), 1)])
    good = request(1, [9] * 48 + [4], params([9] * 48 + [4], 20))
    one.add(bad)
    one.add(good)
    one.step()
    assert good.cached_tokens == 48 and bad.error is not None and bad.finished
    finish(one)
    expected = generate(engine(), request(0, good.prompt_ids, params(good.prompt_ids, 20)))
    assert good.error is None and tokens_of(good) == expected[0]


def test_parameters_refused_after_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    one.core.model.fail_at = 1
    accept, calls = one.core.sampler.set, iter(range(10))

    def refuse(slot: int, **given: Any) -> None:
        if next(calls) == 2:  # two requests were set up for the step; now the first of them again
            raise RequestError("no such temperature")
        accept(slot, **given)

    monkeypatch.setattr(one.core.sampler, "set", refuse)
    bad, good = (request(number, PROMPT, params(PROMPT, 20)) for number in range(2))
    one.add(bad)
    one.add(good)
    finish(one)
    assert str(error_of(bad)) == "request 0: no such temperature"
    assert good.error is None and tokens_of(good) == alone()


def test_a_failing_schedule_gives_up_every_request_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = engine()
    failed = [request(number, PROMPT, params(PROMPT, 10, n=2)) for number in range(3)]
    failed.append(request(3, PROMPT, params(PROMPT, 10), codec=Broken("finish"), stream=True))
    for each in failed:
        one.add(each)
    one.step()
    one.step()

    def fail() -> None:
        raise InternalError("as the test asked")

    monkeypatch.setattr(one.scheduler, "schedule", fail)
    with pytest.raises(InternalError, match="as the test asked") as caught:
        one.step()
    monkeypatch.undo()
    for number, each in enumerate(failed):
        error = error_of(each)
        assert isinstance(error, InternalError) and error.__cause__ is caught.value
        assert str(error).startswith(f"request {number} was given up, because a step failed: ")
    finish(one)
    assert generate(one, request(9, PROMPT, params(PROMPT, 20)))[0] == alone()


def test_an_interrupt_gives_up_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    given_up = request(0, PROMPT, params(PROMPT, 10))
    one.add(given_up)
    one.step()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(one.core.model, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.step()
    assert isinstance(error_of(given_up), PyEngineError)
    finish(one)


def test_an_abort_of_a_request_that_is_not_there_is_left_alone() -> None:
    one = engine()
    first, never_added = (request(number, PROMPT, params(PROMPT, 5)) for number in range(2))
    one.abort(never_added)
    generate(one, first)
    one.abort(first)
    assert not never_added.finished and first.output().outputs[0].finish_reason == "length"
