"""Who goes first, who gives way, and that nobody waits for ever."""

from __future__ import annotations

import pytest

from pyengine.engine import scheduler
from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.scheduler import MAX_OVERTAKING

from .helpers import engine, generate, params, request, run, tokens_of


def asked(number: int, priority: int, *, length: int = 10, max_tokens: int = 10, n: int = 1) -> Generation:
    prompt = [number % 40] * length
    return request(number, prompt, params(prompt, max_tokens, n=n), priority=priority)


def order_of_ends(one: Engine, requests: list[Generation]) -> list[int]:
    run(one, *requests)
    return [ended.number for ended in one.ended]


def same_as_alone(one: Generation) -> bool:
    alone = asked(one.number, 0, length=len(one.prompt_ids), max_tokens=one.params.max_length)
    return tokens_of(one)[0] == generate(engine(), alone)[0][0][: one.num_new_tokens]


def test_lower_numbers_first_and_first_come_first_served_among_equals() -> None:
    priorities = [3, 0, 3, -5, 0, 1]
    requests = [asked(number, priority) for number, priority in enumerate(priorities)]
    assert order_of_ends(engine(max_num_seqs=1), requests) == [3, 1, 4, 5, 0, 2]
    assert not any(one.preemptions for one in requests)


@pytest.mark.parametrize("what_is_short", ["slots", "blocks"])
def test_a_newcomer_takes_the_place_of_a_lower_priority(what_is_short: str) -> None:
    one = engine(max_num_seqs=2) if what_is_short == "slots" else engine(num_blocks=8)
    running = [asked(number, priority, length=40, max_tokens=20) for number, priority in enumerate([0, 5])]
    for each in running:
        one.add(each)
    one.step()
    one.step()
    urgent = asked(2, -1, length=40, max_tokens=20)
    assert order_of_ends(one, [urgent])[-1] == 1
    assert [each.preemptions for each in (*running, urgent)] == [0, 1, 0]
    assert all(map(same_as_alone, (*running, urgent)))
    first_token_of_urgent, end = urgent.first_token, running[0].end
    assert first_token_of_urgent is not None and end is not None and first_token_of_urgent < end


@pytest.mark.parametrize("priority", [0, 5])
def test_equals_and_better_ones_are_left_where_they_are(priority: int) -> None:
    one = engine(max_num_seqs=1)
    running = asked(0, 0)
    one.add(running)
    one.step()
    assert order_of_ends(one, [asked(1, priority)]) == [0, 1]
    assert running.preemptions == 0


def test_nobody_is_preempted_in_vain() -> None:
    """Where even all lower priorities together would not make room, they go on."""
    one = engine(num_blocks=8)
    first = asked(0, -1, length=80, max_tokens=20)  # 5 to 7 blocks
    low = asked(1, 5, length=10, max_tokens=5)
    for each in (first, low):
        one.add(each)
    one.step()
    one.step()
    assert order_of_ends(one, [asked(2, -1, length=100, max_tokens=5)]) == [1, 0, 2]
    assert first.preemptions == low.preemptions == 0


def test_when_blocks_run_out_the_last_in_order_gives_way() -> None:
    one = engine(num_blocks=9)
    requests = [asked(number, (1, 0, 1)[number], length=30, max_tokens=60) for number in range(3)]
    assert order_of_ends(one, requests) == [1, 0, 2]
    assert requests[1].preemptions == 0 < requests[2].preemptions
    assert all(map(same_as_alone, requests))


@pytest.mark.parametrize("when", ["waits", "runs"])
def test_a_steady_stream_of_urgent_ones_starves_nobody(when: str) -> None:
    """Of the urgent ones there is always one that waits; the other gets its turn all the same."""
    one = engine(max_num_seqs=1)
    patient = asked(0, 9, max_tokens=30)
    one.add(patient)
    if when == "runs":
        one.step()
    number = 0
    while not patient.finished:
        if len(one.requests) < 3:
            number += 1
            one.add(asked(number, 0))
        one.step()
        assert number < 3 * MAX_OVERTAKING, "starved"
    assert MAX_OVERTAKING <= len(one.ended) - 1 <= MAX_OVERTAKING + 1
    assert patient.preemptions == (when == "runs")
    assert same_as_alone(patient)
    run(one)


def test_of_many_that_wait_one_in_seventeen_goes_by_age() -> None:
    one = engine(max_num_seqs=1)
    patient = [asked(number, 9, max_tokens=2) for number in range(5)]
    for each in patient:
        one.add(each)
    number = 5
    while not all(each.finished for each in patient):
        if len(one.requests) < 10:
            one.add(asked(number, 0, max_tokens=2))
            number += 1
        one.step()
    ended = [ended.number for ended in one.ended]
    assert [ended.index(number) for number in range(5)] == [MAX_OVERTAKING + 17 * turn for turn in range(5)]
    run(one)


def test_whoever_moves_to_the_front_does_not_disturb_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places become free at once: an urgent one takes the first, and so the patient one is next."""
    monkeypatch.setattr(scheduler, "MAX_OVERTAKING", 1)
    one = engine(max_num_seqs=3)
    requests = [
        asked(number, priority, max_tokens=max_tokens)
        for number, (priority, max_tokens) in enumerate([(0, 30), (0, 3), (0, 3), (9, 10), (0, 10), (0, 10)])
    ]
    run(one, *requests)
    assert all(map(same_as_alone, requests))
    assert len(one.ended) == 6 and one.ended[-1].number == 0


def test_samples_of_a_request_have_its_priority() -> None:
    one = engine(max_num_seqs=3)
    low = asked(0, 5, length=40, max_tokens=20, n=5)
    expected = generate(engine(max_num_seqs=16), asked(0, 0, length=40, max_tokens=20, n=5))[0]
    one.add(low)
    one.step()
    one.step()
    urgent = [asked(number, 0, length=40, max_tokens=20) for number in (1, 2, 3)]
    assert order_of_ends(one, urgent) == [1, 2, 3, 0]
    assert tokens_of(low) == expected and low.preemptions > 0


def test_nobody_gives_way_for_blocks_that_others_share() -> None:
    """What the lower priority would free is not enough: most of its blocks are the first one's, too."""
    one = engine(num_blocks=8)
    prompt = [7] * 49
    shares = [request(number, prompt, params(prompt, 10), priority=5 * number) for number in range(2)]
    for each in shares:
        one.add(each)
    one.step()
    needs_six = asked(2, 1, length=90, max_tokens=5)
    one.add(needs_six)
    one.step()
    assert not any(each.preemptions for each in shares)
    run(one)
    assert needs_six.finished and [each.preemptions for each in shares] == [0, 0]
