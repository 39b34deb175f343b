"""Where the callers of one engine wait: threads in a ``SimpleQueue``, coroutines in an ``AsyncMailbox``."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

ENTERED = None  # what a streamed request's mailbox gets when the request has entered the queue


class AsyncMailbox:
    """Takes items from any thread, gives them to one coroutine of one event loop.

    The loop is woken once for all items that come before it gets to run. It is handed in, because importing
    asyncio takes longer than loading a model.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        # Weak: _alarms, which forgets a loop that is gone, leads here.
        self._loop = weakref.ref(loop)
        self._alarm = _alarms.setdefault(loop, _Alarm())
        self._items: deque[Any] = deque()
        self._waiter: Future[None] | None = None
        self._is_waking = False

    def put(self, item: Any, /) -> None:
        """RuntimeError if the loop is closed."""
        self._items.append(item)
        if not self._is_waking:
            self._is_waking = True
            loop = self._loop()
            if loop is None:
                raise RuntimeError("the event loop is gone")
            self._alarm.wake(self, loop)

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
    """Wakes an event loop once for all of its mailboxes: each time costs a system call."""

    def __init__(self) -> None:
        self._mailboxes: deque[AsyncMailbox] = deque()
        self._is_set = False

    def wake(self, mailbox: AsyncMailbox, loop: AbstractEventLoop) -> None:
        self._mailboxes.append(mailbox)
        if self._is_set and not loop.is_closed():
            return
        self._is_set = True  # first: the loop may ring at once
        try:
            loop.call_soon_threadsafe(self._ring)
        except RuntimeError:
            self._is_set = False
            self._mailboxes.clear()  # of a closed loop: nobody waits
            raise

    def _ring(self) -> None:
        self._is_set = False  # first: whoever comes from here on sets it again
        while self._mailboxes:
            self._mailboxes.popleft().wake()


_alarms: WeakKeyDictionary[AbstractEventLoop, _Alarm] = WeakKeyDictionary()
