"""Where the callers of one engine wait: threads in a ``SimpleQueue``, coroutines in an ``AsyncMailbox``."""

from __future__ import annotations

import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pyengine._C import wake

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

ENTERED = None  # what a streamed request's mailbox gets when the request has entered the queue


class AsyncMailbox:
    """Takes items from any thread, gives them to one coroutine of one event loop.

    The loop is handed in, because importing asyncio takes longer than loading a model.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        # Weak: _alarms, which forgets a loop that is gone, leads here.
        self._loop = weakref.ref(loop)
        alarm = _alarms.get(loop)
        if alarm is None:
            alarm = _alarms[loop] = _Alarm(loop)
        self._alarm = alarm
        self._items: deque[Any] = deque()
        self._waiter: Future[None] | None = None
        self._is_waking = False

    def put(self, item: Any, /) -> None:
        """RuntimeError if the loop is closed."""
        self._items.append(item)
        if not self._is_waking:
            self._is_waking = True
            self._alarm.wake(self)

    async def get(self) -> Any:
        while not self._items:
            loop = self._loop()
            assert loop is not None  # it runs this
            self._waiter = loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def wake(self) -> None:
        """Called by the loop."""
        self._is_waking = False  # first: what is put from here on wakes again
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Alarm:
    """Wakes an event loop once for all of its mailboxes, through a pipe: ``loop.call_soon_threadsafe`` lets
    go of the GIL, and the loop would take the turn of whoever has more to put.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._mailboxes: deque[AsyncMailbox] = deque()
        self._is_set = False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        loop.add_reader(self._pipe[0], self._ring)

    def wake(self, mailbox: AsyncMailbox) -> None:
        loop = self._loop()
        if loop is None or loop.is_closed():
            self._mailboxes.clear()  # nobody waits
            raise RuntimeError("the event loop is closed")
        self._mailboxes.append(mailbox)
        if not self._is_set:
            self._is_set = True  # first: the loop may ring at once
            wake(self._pipe[1])

    def _ring(self) -> None:
        os.read(self._pipe[0], 4096)
        self._is_set = False  # first: whoever comes from here on sets it again
        while self._mailboxes:
            self._mailboxes.popleft().wake()

    def __del__(self) -> None:
        for end in self._pipe:
            os.close(end)


_alarms: WeakKeyDictionary[AbstractEventLoop, _Alarm] = WeakKeyDictionary()
