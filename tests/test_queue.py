"""The queue of an LLM: bounded, in order, and what happens to those that are aborted on their way in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyengine import (
    LLM,
    PyEngineError,
    SamplingParams,
    StreamDelta,
)
from pyengine.engine.generation import Generation
from pyengine.engine.request import Request
from pyengine.engine.scoring import Scoring

from .waiting import paused, wait_until, wait_until_idle

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, seed=0)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, seed=0)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(checkpoint("gelu"), seed=1, max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Any:
    yield
    wait_until_idle(llm)
    assert not llm._thread.names and not llm._thread._open


def test_the_queue_is_bounded(checkpoint: Callable[[str], Path]) -> None:
    """With one place to run and two to wait, the fourth stream waits until there is room, the urgent one
    first.
    """
    llm = LLM(checkpoint("gelu"), max_num_seqs=1, max_queue_size=2)
    with pytest.raises(PyEngineError, match="max_queue_size"):
        LLM(checkpoint("gelu"), max_queue_size=0)
    entered: list[int] = []  # priorities of requests as they enter the queue
    add = llm._engine.add

    def watched(request: Request) -> None:
        entered.append(request.priority)
        add(request)

    llm._engine.add = watched  # type: ignore[method-assign]

    def enter(priority: int) -> None:
        assert len(list(llm.stream([2], GREEDY, priority=priority))) == 30

    with paused(llm, after=1):
        first = llm.stream([1], LONG)
        next(first)
        threads = [threading.Thread(target=enter, args=(priority,)) for priority in (0, 0, 1, 0)]
        for number, thread in enumerate(threads, 2):
            thread.start()
            wait_until(lambda number=number: len(llm._thread._open) == number)  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert len(list(first)) == 149
    assert entered == [0, 0, 0, 0, 1]
    assert llm.stats().waiting == 0
    outputs = llm.generate([[3]] * 20, GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    wait_until_idle(llm)


def test_an_urgent_request_does_not_wait_outside(checkpoint: Callable[[str], Path]) -> None:
    """The queue is full; what goes before all of it enters, and takes the place of one that runs."""
    llm = LLM(checkpoint("gelu"), max_num_seqs=1, max_queue_size=1)
    ended: list[int] = []
    llm._engine.counters.count_request = lambda request: ended.append(request.priority)  # type: ignore[method-assign]
    with paused(llm, after=1):
        running = llm.stream([1], GREEDY, priority=2)
        next(running)
        threads = [
            threading.Thread(target=llm.generate, args=([2], GREEDY), kwargs={"priority": priority})
            for priority in (0, 1, -1)
        ]
        for number, thread in enumerate(threads, 2):
            thread.start()
            wait_until(lambda number=number: len(llm._thread._open) == number)  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert len(list(running)) == 29
    assert ended == [-1, 0, 1, 2]


def test_an_abort_outside_the_queue_tells_its_stream(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), max_num_seqs=1, max_queue_size=1)
    with paused(llm, after=1):
        running = llm.stream([1], GREEDY)
        next(running)
        queued, outside = (
            threading.Thread(target=lambda name=name: deltas.extend(llm.stream([2], GREEDY, request_id=name)))
            for name in ("queued", "outside")
        )
        deltas: list[StreamDelta] = []
        for number, thread in enumerate((queued, outside), 2):
            thread.start()
            wait_until(lambda number=number: len(llm._thread._open) == number)  # type: ignore[misc]
        llm.abort("outside")
    outside.join(60)
    queued.join(60)
    (last,) = [delta for delta in deltas if delta.request_id == "outside"]
    assert last.finish_reason == "abort" and last.output is not None and last.output.finished
    assert len(list(running)) == 29


def test_an_abort_while_a_request_is_submitted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name, and is ended before it has entered."""
    requests: list[Request] = []
    lock = llm._thread._names_lock

    class Names(dict[str, Request]):
        def setdefault(self, name: str, request: Any = None) -> Any:
            requests.append(request)
            return super().setdefault(name, request)

    class Lock:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if len(requests) == 1 and not aborting:
                aborting.append(True)
                llm.abort("mine")
                wait_until(lambda: requests[0].ended)

    aborting: list[bool] = []
    llm.generate([1], GREEDY)
    monkeypatch.setattr(llm._thread, "names", Names())
    monkeypatch.setattr(llm._thread, "_names_lock", Lock())
    (last,) = llm.stream([1], GREEDY, request_id="mine")
    assert last.finish_reason == "abort" and not llm._thread._open


def test_the_queue_never_holds_more(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), max_num_seqs=2, max_queue_size=3)
    engine, seen = llm._engine, []
    step = type(engine).step

    def watched() -> int:
        seen.append(len(engine.scheduler.waiting))
        return step(engine)

    engine.step = watched  # type: ignore[method-assign]
    llm.generate([[number] for number in range(40)], GREEDY)
    assert max(seen) == 3


def test_a_long_list_to_score_does_not_keep_others_waiting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[number % 300] * 150 for number in range(400)]
    ended: list[type] = []
    count = llm._engine.counters.count_request

    def watched(request: Request) -> None:
        ended.append(type(request))
        count(request)

    monkeypatch.setattr(llm._engine.counters, "count_request", watched)
    with paused(llm, after=2):
        threads = [threading.Thread(target=llm.score, args=(texts,))]
        threads[0].start()
        wait_until(lambda: llm.stats().scored_tokens > 0)
        threads.append(threading.Thread(target=llm.generate, args=([1], GREEDY), kwargs={"priority": -1}))
        threads[1].start()
        wait_until(lambda: any(isinstance(one, Generation) for one in list(llm._thread._open.values())))
    for thread in threads:
        thread.join(60)
    assert len(ended) == 401 and ended[-1] is Scoring and ended.index(Generation) < 300
