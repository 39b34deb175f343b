"""The thread that an engine runs in, for callers in any number of threads and event loops.

Callers never touch the engine. They put commands into an inbox and wait in a mailbox of their own, into which
the engine's thread puts deltas, and the request itself when it has ended. A forgotten generator may be closed
by a garbage collection, in any thread and at any point of it, and its request is aborted then: ``abort`` and
``stop`` wait for nobody.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.mailbox import ENTERED
from pyengine.engine.outside import Outside
from pyengine.engine.request import Request
from pyengine.errors import ClosedError, InternalError, OutOfMemory, PyEngineError, RequestError
from pyengine.outputs import EngineStats

_running: set[EngineThread] = set()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those that may not be gone yet


class EngineThread:
    """Owns an engine. The thread starts with the first request, and sleeps while there is none.

    max_queue_size: requests that wait in the scheduler at most; others wait outside, in the same order. One
    that goes before all of them does not wait outside.
    """

    def __init__(self, engine: Engine, max_queue_size: int) -> None:
        self.engine = engine
        self.max_queue_size = max_queue_size
        self.names: dict[str, Request] = {}  # unfinished requests by id
        self._open: dict[int, Request] = {}  # those whose callers have to be told how they end
        self._outside = Outside()
        self._inbox: SimpleQueue[tuple[Callable[[Any], None], Any]] = SimpleQueue()
        self._stopping = False
        self._over: Callable[[Request], PyEngineError] | None = None  # why nothing runs any more
        self._process = os.getpid()
        self._start_lock = threading.Lock()
        self._names_lock = threading.RLock()  # reentrant: closing a generator may interrupt its holder
        self._thread: threading.Thread | None = None

    # What callers call, in their threads.

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests. RequestError if an id is taken, ClosedError, or InternalError if the thread died.
        """
        self.check_process()
        if self._thread is None:
            self._start()
        for request in requests:
            if self._over is not None:
                raise self._over(request)
            self._open[request.number] = request  # first: once it has a name, it may be aborted
            with self._names_lock:
                holder = self.names.setdefault(request.id, request)
            if holder is not request:
                self._open.pop(request.number, None)
                raise RequestError(f"request_id={request.id!r} belongs to a request that is still running")
            self._inbox.put((self._enter, request))
        if self._over is not None:  # it ended just now, perhaps without having seen them
            self._end_all()

    def abort(self, request: Request) -> None:
        """End a request before the next step; its id is free at once. Waits for nobody; in a forked child,
        where the lock of the names may be held by a thread that is not there, it does nothing."""
        if os.getpid() != self._process:
            return
        self._free_name(request)
        if not request.ended:
            self._inbox.put((self._abort, request))

    def stop(self) -> None:
        """Like ``close``, without waiting: for finalizers."""
        self._inbox.put((self._stop, None))

    def close(self) -> None:
        """End what runs and waits with a ClosedError, and the thread."""
        if os.getpid() != self._process:
            return
        with self._start_lock:
            if self._thread is None:  # it never ran
                self._over = self._over or _closed
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._over is None

    @property
    def is_over(self) -> bool:
        return self._over is not None

    def stats(self) -> EngineStats:
        engine, counters = self.engine, self.engine.counters
        scheduler, manager = engine.scheduler, engine.core.manager
        prompt_rate, new_rate = counters.rates(time.perf_counter())
        return EngineStats(
            running=len(engine.requests) - engine.num_waiting,
            waiting=len(self._open) - len(engine.requests) + engine.num_waiting,
            kv_blocks=manager.num_blocks,
            kv_blocks_used=manager.num_blocks - manager.num_available,
            prefix_hit_tokens=scheduler.hit_tokens,
            prefix_lookup_tokens=scheduler.looked_up_tokens,
            prompt_tokens=counters.prompt_tokens,
            new_tokens=counters.new_tokens,
            scored_tokens=counters.scored_tokens,
            prompt_tokens_per_second=prompt_rate,
            new_tokens_per_second=new_rate,
            steps=counters.steps,
            failed_steps=counters.failed_steps,
            busy_time=counters.busy_time,
            preemptions=scheduler.preemptions,
            finished=counters.finished,
            aborted=counters.aborted,
            failed=counters.failed,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
        )

    def check_process(self) -> None:
        if os.getpid() != self._process:
            raise InternalError(
                "this process was forked from the one that the LLM belongs to: make an LLM in each process, "
                'or start processes with multiprocessing.set_start_method("spawn")'
            )

    def _start(self) -> None:
        # A daemon, or the interpreter would wait for it before it runs the exit handler below.
        thread = threading.Thread(target=self._run, name="pyengine-engine", daemon=True)
        with self._start_lock:
            if self._thread is not None or self._over is not None:
                return
            try:
                self._thread = thread
                _running.add(self)
                _threads.add(thread)
                thread.start()
            except BaseException as error:  # Ctrl-C, too, after which it may have started
                self._thread = None
                _running.discard(self)
                if isinstance(error, RuntimeError):
                    raise OutOfMemory(f"the engine's thread cannot be started: {error}") from error
                raise

    # What the engine's thread does.

    def _run(self) -> None:
        with self._start_lock:
            if self._thread is not threading.current_thread():
                return  # whoever started it was interrupted, and the next one starts another
        over: Callable[[Request], PyEngineError] = _closed
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            over = _Died(error)
        finally:
            self._over = over
            self._end_all()
            _running.discard(self)

    def _free_name(self, request: Request) -> None:
        with self._names_lock:
            if self.names.get(request.id) is request:
                del self.names[request.id]

    def _turn(self) -> None:
        engine, inbox = self.engine, self._inbox
        idle = not engine.requests and not self._outside
        while idle or not inbox.empty():
            action, argument = inbox.get()  # sleeps while nobody wants anything
            action(argument)
            idle = False
        while self._outside and self._has_room():
            self._let_in(self._outside.pop())
        if engine.requests and not self._stopping:
            try:
                engine.step()
            except Exception:  # all of its requests were given up, each with its error
                if engine.requests:
                    raise
        self._tell_ended()

    def _tell_ended(self) -> None:
        ended, self.engine.ended = self.engine.ended, []
        for request in ended:
            self._tell(request)

    def _has_room(self) -> bool:
        """For the next one from outside; always, if it goes before everyone in the queue, so that it may take
        the place of one that runs."""
        if self.engine.num_waiting < self.max_queue_size:
            return True
        request, waiting = self._outside.first(), self.engine.scheduler.waiting
        return bool(waiting) and (request.priority, request.number) < waiting[0].key

    def _enter(self, request: Request) -> None:
        if not request.ended:
            self._outside.append(request)

    def _let_in(self, request: Request) -> None:
        try:
            self.engine.add(request)
            if isinstance(request, Generation) and request.stream and request.mailbox is not None:
                request.mailbox.put(ENTERED)
        except Exception as error:
            request.error = error
            self.engine.abort(request)
            if not request.finished:
                self._fail(request, error)

    def _abort(self, request: Request) -> None:
        if request.number in self.engine.requests:
            self.engine.abort(request)
        elif not request.ended:
            self._outside.discard(request)
            self._fail(request, None)

    def _stop(self, _: None) -> None:
        self._stopping = True

    def _tell(self, request: Request) -> None:
        """The last that its caller hears of a request."""
        self._free_name(request)
        self._open.pop(request.number, None)
        request.ended = True
        if request.mailbox is not None:
            try:
                request.mailbox.put(request)
            except Exception:
                pass  # its event loop is closed: nobody waits

    def _fail(self, request: Request, error: Exception | None) -> None:
        """End a request without the engine."""
        request.error = request.error or error
        unfinished = [seq for seq in request.sequences if seq.finish_reason is None]
        for seq in unfinished:
            seq.finish_reason = "abort"
        request.num_unfinished = 0
        try:
            for seq in unfinished:
                request.report(seq)
        except Exception as failure:
            request.error = request.error or failure
        self.engine.counters.count_request(request)
        self._tell(request)

    def _end_all(self) -> None:
        """Nothing runs any more: tell everyone, also those whose requests are still in the inbox."""
        assert self._over is not None
        if threading.current_thread() is self._thread:
            self._tell_ended()
            for request in list(self.engine.requests.values()):
                error = self._over(request)
                try:
                    self.engine.give_up(request, error)
                except BaseException:  # a thread that died in the midst of a step may leave anything behind
                    self._fail(request, error)
            self._tell_ended()
        try:
            while True:
                self._inbox.get_nowait()
        except Empty:
            pass
        while self._open:
            try:
                _, request = self._open.popitem()
            except KeyError:
                break
            if not request.ended:
                self._fail(request, self._over(request))


def _closed(request: Request) -> ClosedError:
    return ClosedError(f"request {request.id} was ended, because its LLM is closed: make a new one")


class _Died:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, request: Request) -> InternalError:
        failure = InternalError(
            f"request {request.id} was given up, because the thread of the engine died: {self.error!r}; "
            "make a new LLM"
        )
        failure.__cause__ = self.error
        return failure


@atexit.register
def _close_all() -> None:
    """Threads that still compute when the interpreter is gone would take the process down with them; so would
    one that has ended its engine and is about to destroy it."""
    for thread in list(_running):
        thread.close()
    for native in list(_threads):
        if native.ident is not None:
            native.join()
