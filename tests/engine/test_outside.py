"""Requests that wait until the queue has room."""

from __future__ import annotations

import pytest

from pyengine.engine.generation import Generation
from pyengine.engine.outside import Outside
from pyengine.engine.scheduler import MAX_OVERTAKING

from .helpers import params, request


def asked(number: int, priority: int = 0) -> Generation:
    return request(number, [1], params([1]), priority=priority)


def order(outside: Outside) -> list[int]:
    return [outside.pop().number for _ in range(len(outside))]


def test_by_priority_and_first_come_first_served_within_one() -> None:
    outside = Outside()
    for number, priority in enumerate([3, 0, 3, -5, 0, 1]):
        outside.append(asked(number, priority))
    assert outside.first().number == 3
    assert order(outside) == [3, 1, 4, 5, 0, 2]
    with pytest.raises(IndexError):
        outside.pop()


def test_the_oldest_is_not_kept_waiting_for_ever() -> None:
    outside = Outside()
    outside.append(asked(0, 9))
    outside.append(asked(1, 8))
    went_in = []
    for number in range(2, 60):
        outside.append(asked(number))
        went_in.append(outside.pop().number)
    assert went_in.index(0) == MAX_OVERTAKING
    assert went_in.index(1) == 2 * MAX_OVERTAKING + 1


def test_those_that_leave_are_forgotten() -> None:
    outside = Outside()
    several = [asked(number, -number) for number in range(4)]
    for each in several:
        outside.append(each)
    outside.discard(several[3])
    outside.discard(several[0])
    outside.discard(several[0])
    assert len(outside) == 2 and order(outside) == [2, 1]
