"""Rows of drafts: what is drawn is what single rows would have drawn, as far as the drafts are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine._C import ExecContext, Sampler
from pyengine.errors import InternalError, RequestError

from .test_state import MIXES, VOCAB, alone, logits_of

SKIPPED = -4


@given(
    seed=st.integers(0, 50),
    threads=st.sampled_from([1, 3]),
    right=st.sampled_from([0.0, 0.6, 0.9, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_any_drafts_give_the_tokens_of_single_rows(seed: int, threads: int, right: float) -> None:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 12, rng.integers(1, 30)).tolist() for _ in MIXES]
    wanted = [alone(mix, prompt, 24, seed) for mix, prompt in zip(MIXES, prompts, strict=True)]
    ctx, sampler = ExecContext(threads), Sampler(len(MIXES))
    for slot, (mix, prompt) in enumerate(zip(MIXES, prompts, strict=True)):
        ids = np.array(prompt, np.int32)
        sampler.set(slot, token_ids=ids, num_prompt=len(prompt), seed=seed, **mix)
    texts = [list(prompt) for prompt in prompts]
    steps = 0
    while any(len(text) < len(goal) for text, goal in zip(texts, wanted, strict=True)):
        steps += 1
        rows, slots, positions, drafts = [], [], [], []
        for slot in rng.permutation(len(MIXES)).tolist():
            text, goal = texts[slot], wanted[slot]
            room = len(goal) - len(text)
            if room == 0:
                continue
            guessed = list(text)
            for place in range(int(rng.integers(0, room)) + 1):
                if place > 0:
                    token = goal[len(guessed)] if rng.random() < right else int(rng.integers(0, VOCAB))
                    guessed.append(token)
                rows.append(logits_of(guessed, 1))
                slots.append(slot)
                positions.append(len(guessed))
                drafts.append(guessed[-1] if place > 0 else -1)
        result = sampler.sample(
            ctx,
            np.stack(rows),
            np.array(slots, np.int32),
            np.array(positions, np.int32),
            np.array(drafts, np.int32),
        )
        stopped = False
        for row, (slot, draft) in enumerate(zip(slots, drafts, strict=True)):
            stopped = draft >= 0 and (stopped or result.token_ids[row - 1] != draft)
            if stopped:
                assert result.token_ids[row] == SKIPPED and np.isnan(result.logprobs[row])
            else:
                texts[slot].append(result.token_ids[row])
    assert texts == wanted
    assert right < 1.0 or steps < 24


def test_a_mask_for_each_row() -> None:
    sampler = Sampler(1)
    sampler.set(0, temperature=0.0)
    rows = np.zeros((4, VOCAB), np.float32)
    masks = np.zeros((3, (VOCAB + 31) // 32), np.uint32)
    for row, token in enumerate((7, 40, 290)):
        masks[row, token // 32] |= np.uint32(1 << token % 32)
    arguments = (np.zeros(4, np.int32), np.arange(4, dtype=np.int32), np.array([-1, 7, 40, 290], np.int32))
    sampler.set_mask(0, masks.reshape(-1).view(np.int32), 3)
    assert sampler.sample(ExecContext(1), rows, *arguments).token_ids == [7, 40, 290, 0]
    assert sampler.sample(ExecContext(1), rows, *arguments).token_ids == [0, SKIPPED, SKIPPED, SKIPPED]
    with pytest.raises(RequestError, match="30 words are not 4 masks"):
        sampler.set_mask(0, masks.reshape(-1).view(np.int32), 4)


def test_replayed_tokens_take_the_place_of_those_drawn() -> None:
    sampler = Sampler(1)
    prompt = np.array([1, 2], np.int32)
    sampler.set(0, token_ids=prompt, num_prompt=2, replay=[9, 8, 7], presence_penalty=50.0)
    text = [1, 2]
    for _ in range(3):
        row = logits_of(text, 1)[None]
        positions = np.array([len(text)], np.int32)
        text += sampler.sample(ExecContext(1), row, np.zeros(1, np.int32), positions).token_ids
    assert text == [1, 2, 9, 8, 7]
    row = np.zeros((1, VOCAB), np.float32)
    row[0, [7, 8, 9]] = 40.0  # they count as said
    (drawn,) = sampler.sample(ExecContext(1), row, np.zeros(1, np.int32), np.array([5], np.int32)).token_ids
    assert drawn not in (7, 8, 9)


@pytest.mark.parametrize(
    ("slots", "positions", "drafts", "message"),
    [
        ([0], [5], [3], "row 0 does not follow"),
        ([0, 1], [5, 6], [-1, 3], "row 1 does not follow"),
        ([0, 0], [5, 7], [-1, 3], "row 1 does not follow"),
        ([2, 2], [0, 1], [-1, 3], "slot 2 has a logits processor, and takes no drafts"),
    ],
)
def test_rows_that_follow_nothing_are_refused(
    slots: list[int], positions: list[int], drafts: list[int], message: str
) -> None:
    sampler = Sampler(3)
    sampler.set(2, processor=lambda ids, logits: None)
    given: list[Any] = [np.array(one, np.int32) for one in (slots, positions, drafts)]
    with pytest.raises(InternalError, match=message):
        sampler.sample(ExecContext(1), np.zeros((len(slots), VOCAB), np.float32), *given)


def test_the_number_of_drafts_is_checked() -> None:
    with pytest.raises(RequestError, match="drafts must have one entry per row"):
        Sampler(1).sample(
            ExecContext(1),
            np.zeros((1, VOCAB), np.float32),
            np.zeros(1, np.int32),
            np.zeros(1, np.int32),
            np.zeros(2, np.int32),
        )
