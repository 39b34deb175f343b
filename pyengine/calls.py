"""What a caller does while the engine works for it: submit requests, wait, report, clean up."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pyengine.engine.generation import Generation
from pyengine.engine.mailbox import ENTERED, AsyncMailbox
from pyengine.engine.request import Request
from pyengine.engine.thread import EngineThread
from pyengine.errors import InternalError, PyEngineError, RequestError
from pyengine.outputs import RequestOutput, StreamDelta

Progress = Callable[[int, int, int], object]  # finished requests, all requests, tokens so far
_PROGRESS_INTERVAL = 0.1  # seconds

AnyRequest = TypeVar("AnyRequest", bound=Request)


def finished_in_order(
    engine: EngineThread,
    requests: Sequence[AnyRequest],
    progress: Progress | None,
    count_tokens: Callable[[AnyRequest], int],
) -> Generator[AnyRequest, None, None]:
    """Run requests together and yield each, in order, once it has ended, be it with an error.

    Closing the generator, or an exception thrown at the place where it waits, aborts those that still run.
    """
    mailbox: SimpleQueue[Any] = SimpleQueue()
    for request in requests:
        request.mailbox = mailbox

    def report() -> None:
        if progress is not None:
            ended = sum(request.ended for request in requests)
            progress(ended, len(requests), sum(map(count_tokens, requests)))

    try:
        engine.submit([request for request in requests if not request.ended])
        next_report = time.perf_counter() + _PROGRESS_INTERVAL
        for request in requests:
            while not request.ended:
                engine.check_process()
                if progress is None:
                    mailbox.get()
                    continue
                try:
                    mailbox.get(timeout=max(0.0, next_report - time.perf_counter()))
                except Empty:
                    pass
                if time.perf_counter() >= next_report:
                    report()
                    next_report = time.perf_counter() + _PROGRESS_INTERVAL
            yield request
        report()
    finally:
        for request in requests:
            if not request.ended:
                engine.abort(request)


def raise_first_error(
    requests: Sequence[Request], what: str, outputs: list[RequestOutput] | None = None
) -> None:
    """The error of the first request that failed, named by its place among several (``what`` is "prompt").
    ``outputs``, one per request, go with it, and tell of the others that failed."""
    first: PyEngineError | None = None
    for number, request in enumerate(requests, 1):
        if request.error is None:
            continue
        if len(requests) == 1:
            raise request.error
        named = _kind(request.error)(f"{what} {number} of {len(requests)}: {request.error}")
        named.__cause__ = request.error
        first = first or named
        if outputs is not None:
            outputs[number - 1].error = named
    if first is not None:
        first.outputs = outputs
        raise first


def check_callback(name: str, given: object) -> None:
    if given is not None and not isinstance(given, bool) and not callable(given):
        raise RequestError(f"{name}={given!r}: must be a function")


def _kind(error: Exception) -> type[PyEngineError]:
    return type(error) if isinstance(error, PyEngineError) else InternalError


def wait_for_end(engine: EngineThread, requests: Sequence[Request]) -> None:
    """Until requests that were aborted do not change any more."""
    while engine.is_running and not all(request.ended for request in requests):
        time.sleep(0.001)


def deltas(
    engine: EngineThread, request: Generation, owner: object
) -> Generator[StreamDelta | None, None, None]:
    """None once the request is queued, then its deltas. ``owner``, without which the engine ends, is kept."""
    mailbox: SimpleQueue[Any] = SimpleQueue()
    request.mailbox = mailbox
    try:
        engine.submit([request])
        item = mailbox.get()  # ENTERED, or what it has to say if it was ended before
        yield None
        while item is not request:
            if item is not ENTERED:
                yield item
                engine.check_process()
            item = mailbox.get()
        if request.error is not None:
            raise request.error
    finally:
        engine.abort(request)


async def async_deltas(
    engine: EngineThread, request: Generation, owner: object
) -> AsyncGenerator[StreamDelta, None]:
    """The deltas of a request, for the event loop that runs this."""
    import asyncio

    mailbox = request.mailbox = AsyncMailbox(asyncio.get_running_loop())
    try:
        engine.submit([request])
        while (item := await mailbox.get()) is not request:
            if item is not ENTERED:
                yield item
                engine.check_process()
        if request.error is not None:
            raise request.error
    finally:
        engine.abort(request)


def progress_line(what: str) -> Progress:
    def report(done: int, total: int, tokens: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} {what.format(tokens)}", end=end, file=sys.stderr, flush=True)

    return report
