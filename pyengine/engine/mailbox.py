"""Where the callers of one engine wait: threads in a ``SimpleQueue``, coroutines in an ``AsyncMailbox``."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

ENTERED = None  # what a streamed request's mailbox gets when the request has entered the queue


class AsyncMailbox:
    """Takes items from any thread, gives them to one coroutine of one event loop.

    The loop is woken once for all items that come before it gets to run. It is handed in, because importing
    asyncio takes longer than loading a model.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._waiter: Future[None] | None = None
        self._is_waking = False

    def put(self, item: Any, /) -> None:
        """RuntimeError if the loop is closed."""
        self._items.append(item)
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._wake)

    async def get(self) -> Any:
        while not self._items:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def _wake(self) -> None:
        self._is_waking = False  # first: what is put from here on wakes again
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
