"""Tests of what the engine's thread does: wait for it, or hold it still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyengine import LLM


def wait_until(holds: Callable[[], bool]) -> None:
    """What the engine's thread is to do soon."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.001)


def blocks_in_use(llm: LLM) -> int:
    return llm._engine.core.manager.num_in_use  # type: ignore[attr-defined]


def wait_until_idle(llm: LLM) -> None:
    """All requests have ended, and nothing of them is left."""
    wait_until(lambda: not llm._engine.requests)
    assert blocks_in_use(llm) == 0
    llm._engine.core.manager.check_invariants()  # type: ignore[attr-defined]
    scheduler = llm._engine.scheduler
    assert not scheduler.running and not scheduler.waiting


@contextmanager
def paused(llm: LLM, after: int = 0) -> Iterator[None]:
    """Steps but the first ``after`` ones wait until the block ends; they run then."""
    engine, gate, free = llm._engine, threading.Event(), iter(range(after))

    def step() -> int:
        if next(free, None) is None:
            assert gate.wait(60)
        return type(engine).step(engine)

    engine.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.step
        gate.set()


def in_threads(*works: Callable[[], object]) -> list[Any]:
    """The results of functions that run at the same time, or what they raised."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller hangs"
    return results
