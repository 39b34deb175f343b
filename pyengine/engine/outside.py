"""Requests that the scheduler's queue has no room for."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from pyengine.engine.request import Request
from pyengine.engine.scheduler import MAX_OVERTAKING


class Outside:
    """In the order of the scheduler: by priority, first come first served within one; and the one that came
    first goes first when ``MAX_OVERTAKING`` later ones have gone in before it.
    """

    def __init__(self) -> None:
        self._by_arrival: OrderedDict[int, Request] = OrderedDict()  # by number
        self._by_priority: list[tuple[int, int]] = []  # a heap of (priority, number), also of some that left
        self._overtaking = 0  # that went in since the first of them became the first

    def __len__(self) -> int:
        return len(self._by_arrival)

    def append(self, request: Request) -> None:
        self._by_arrival[request.number] = request
        heapq.heappush(self._by_priority, (request.priority, request.number))

    def discard(self, request: Request) -> None:
        self._leave(request.number)

    def first(self) -> Request:
        """The one that goes in next. IndexError if there is none."""
        if self._by_arrival and self._overtaking >= MAX_OVERTAKING:
            return next(iter(self._by_arrival.values()))
        while self._by_priority[0][1] not in self._by_arrival:
            heapq.heappop(self._by_priority)
        return self._by_arrival[self._by_priority[0][1]]

    def pop(self) -> Request:
        request = self.first()
        self._overtaking += 1
        self._leave(request.number)
        return request

    def _leave(self, number: int) -> None:
        if next(iter(self._by_arrival), None) == number:
            self._overtaking = 0
        self._by_arrival.pop(number, None)
