"""Requests of an ``LLM`` from outside: their ids, what fails one of them, and the process they belong to."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyengine import LLM, CheckpointError, InternalError, RequestError, SamplingParams

from .waiting import paused, wait_until_idle

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(checkpoint("gelu"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    wait_until_idle(llm)


def test_an_id_is_taken_from_the_call_to_the_end(llm: LLM) -> None:
    first = llm.stream([1], GREEDY, request_id="mine")
    list(first)
    list(llm.stream([2], GREEDY, request_id="mine"))
    held = llm.stream([1], GREEDY, request_id="mine")
    wait_until_idle(llm)
    with paused(llm):
        begun = llm.stream([1], GREEDY, request_id="yours")
        with pytest.raises(
            RequestError, match="request_id='yours' belongs to a request that is still running"
        ):
            llm.stream([2], GREEDY, request_id="yours")
    held.close()
    begun.close()
    never_begun = llm.stream([3], GREEDY, request_id="mine")
    del never_begun
    llm.stream([4], GREEDY, request_id="mine").close()
    with pytest.raises(RequestError, match="context holds"):
        llm.stream([5] * 1000, GREEDY, request_id="mine")
    assert len(list(llm.stream([6], GREEDY, request_id="mine"))) == 20


def test_ids_given_do_not_meet_automatic_ones(llm: LLM) -> None:
    automatic = llm.stream([1], GREEDY)
    name = next(automatic).request_id
    with pytest.raises(RequestError, match=f"^request_id='{name}': must be"):
        llm.stream([2], GREEDY, request_id=name)
    with pytest.raises(RequestError, match="^request_id=7: must be a string"):
        llm.stream([2], GREEDY, request_id=7)  # type: ignore[arg-type]
    given = [llm.stream([2], GREEDY, request_id=str(number)) for number in range(20)]
    assert len(llm.generate([[3]] * 20, GREEDY)) == 20
    assert all(len(list(each)) == 20 for each in given)
    with paused(llm):
        automatic = llm.stream([1], GREEDY)
        (name,) = llm._thread.names
        llm.abort(name)
    assert list(automatic)[-1].finish_reason == "abort"


def test_an_abort_is_of_the_request_that_has_the_id_then(llm: LLM) -> None:
    llm.abort("mine")  # nobody yet
    with paused(llm):
        first = llm.stream([1], GREEDY, request_id="mine")
        llm.abort("mine")
        llm.abort("mine")
        assert "mine" not in llm._thread.names, "it is free at once"
    second = llm.stream([1], GREEDY, request_id="mine")
    assert list(first)[-1].finish_reason == "abort"
    assert list(second)[-1].finish_reason == "length"


@pytest.fixture(scope="module")
def no_position_30(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Position 30 of the model is NaN."""
    directory = tmp_path_factory.mktemp("damaged") / "gelu"
    shutil.copytree(checkpoint("gelu"), directory)
    tensors = load_file(directory / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("wpe.weight"))
    tensors[name][30] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # So few blocks that the others come to use those that held NaN.
    return LLM(directory, kv_cache_memory=8 * 2 * 2 * 2 * 32 * 16 * 4, enable_prefix_caching=False)


def test_nan_fails_the_request_that_meets_it_only(llm: LLM, no_position_30: LLM) -> None:
    damaged = no_position_30
    short = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3, seed=0)
    expected = [llm.generate([token] * 18, short)[0].outputs for token in range(3)]
    other = damaged.stream([0] * 18, short)
    with pytest.raises(CheckpointError, match=r"^request auto-\d+: the logits after its token 30 are NaN"):
        damaged.generate([9] * 18, GREEDY)
    *_, last = other
    assert last.output is not None and last.output.outputs == expected[0]
    assert [output.outputs for output in damaged.generate([[1] * 18, [2] * 18], short)] == expected[1:]
    wait_until_idle(damaged)


def test_scoring_nan_is_an_error(llm: LLM, no_position_30: LLM) -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        no_position_30.score([1] * 40, top_logprobs=2)
    wait_until_idle(no_position_30)
    assert no_position_30.score([1] * 30).logprobs == llm.score([1] * 30).logprobs


def test_more_best_tokens_than_the_vocabulary(tmp_path: Path) -> None:
    from tests.checkpoints import make_checkpoint

    small = LLM(make_checkpoint(tmp_path, {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}, seed=1))
    top = small.score([1, 2, 3], top_logprobs=64).top_logprobs
    assert top is not None and [None if row is None else len(row) for row in top] == [None, 11, 11]
    (output,) = small.generate([1, 2], SamplingParams(max_tokens=2, logprobs=64, ignore_eos=True))
    assert [len(row) for row in output.outputs[0].logprobs or []] == [11, 11]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_forked_process_every_call_is_an_error(llm: LLM) -> None:
    stream = llm.stream([1], GREEDY)
    next(stream)
    calls: list[Callable[[], object]] = [
        lambda: llm.generate([1], GREEDY),
        lambda: llm.stream([1], GREEDY),
        lambda: llm.astream([1], GREEDY),
        lambda: llm.abort("auto-0"),
        lambda: next(stream),
        lambda: llm.score([1, 2]),
        lambda: llm.choose([1], [[2], [3]]),
    ]
    busy = llm.stream([1], SamplingParams(max_tokens=150, ignore_eos=True))  # inside a step, most likely
    abandoned = llm.stream([1], GREEDY)
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with llm._thread._names_lock:
            held.set()
            forked.wait(60)

    threading.Thread(target=hold).start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        failed = 0
        for call in calls:
            try:
                call()
            except InternalError as error:
                failed += "make an LLM in each process" in str(error)
        abandoned.close()
        llm.close()
        os._exit(failed)
    forked.set()
    busy.close()
    abandoned.close()
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == len(calls)
    assert len(list(stream)) == 19
