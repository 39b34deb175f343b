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

    __slots__ = ("_items", "_loop", "_post", "_waiter")

    def __init__(self, loop: AbstractEventLoop) -> None:
        # Weak: _offices, which forgets a loop that is gone, leads here.
        self._loop = weakref.ref(loop)
        post = _offices.get(loop)
        if post is None:
            post = _offices[loop] = _PostOffice(loop)
        self._post = post
        self._items: deque[Any] = deque()
        self._waiter: Future[None] | None = None

    def put(self, item: Any, /) -> None:
        """RuntimeError if the loop is closed."""
        self._post.put((self, item))

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

    def deliver(self, item: Any) -> None:
        """Called by the loop."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _PostOffice:
    """Takes what is for the mailboxes of one event loop, which sorts it: whoever puts runs the engine, and is
    to be done soon. A pipe wakes the loop, once for all: ``loop.call_soon_threadsafe`` lets go of the GIL,
    and the loop would take the turn of whoever has more to put.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._mail: deque[tuple[AsyncMailbox, Any]] = deque()
        self._is_waking = False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        loop.add_reader(self._pipe[0], self._sort)

    def put(self, mail: tuple[AsyncMailbox, Any]) -> None:
        self._mail.append(mail)
        if self._is_waking:
            return
        loop = self._loop()
        if loop is None or loop.is_closed():
            self._mail.clear()  # nobody waits
            raise RuntimeError("the event loop is closed")
        self._is_waking = True  # first: the loop may sort at once
        wake(self._pipe[1])

    def _sort(self) -> None:
        os.read(self._pipe[0], 4096)
        self._is_waking = False  # first: what is put from here on wakes again
        while self._mail:
            mailbox, item = self._mail.popleft()
            mailbox.deliver(item)

    def __del__(self) -> None:
        for end in self._pipe:
            os.close(end)


_offices: WeakKeyDictionary[AbstractEventLoop, _PostOffice] = WeakKeyDictionary()
