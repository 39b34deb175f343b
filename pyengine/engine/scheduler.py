"""Which tokens run in the next step.

Sequences have one order: by priority, the lower the earlier, and first come first served within one. A step
takes, in that order, the next tokens of the sequences that run (one each where they generate, a chunk where
they do not) and admits sequences that wait, while tokens, slots and blocks last.

- A sequence is admitted when there are blocks for all of its tokens, so that only growth can run out of
  blocks. Then the last sequence that runs loses its blocks and goes back to its place in the queue, to be
  computed again (preemption by recomputation). The first is never preempted for another, and one alone always
  fits.
- A sequence that waits may also take the place of later ones that run with a lower priority.
- Of those that wait, the one that came first moves to the front of all when ``MAX_OVERTAKING`` later ones
  have been admitted before it. So every request finishes, whatever priorities keep coming.
- The blocks of a prompt enter the prefix index as soon as they are scheduled: within a step, keys and values
  are written before they are read, so that requests of one step share a prefix that is new to all of them.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import Counter, abc
from typing import Protocol

from pyengine.engine.generation import Generation
from pyengine.engine.request import Key, Request, Sequence

BLOCK_TOKENS = 16  # csrc/kv/layout.h
MAX_OVERTAKING = 16  # admissions: what comes first waits for 16 others at most, and 1 in 17 goes by age
_FRONT = -math.inf  # in a key: before all priorities


class BlockManager(Protocol):
    """``_C.BlockManager``, as far as the scheduler knows it."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def match(self, token_ids: array[int], /) -> list[int]: ...
    def allocate(self, count: int, /) -> list[int]: ...
    def fork(self, blocks: abc.Sequence[int], /) -> None: ...
    def free(self, blocks: abc.Sequence[int], /) -> None: ...
    def make_writable(self, block: int, /) -> int: ...
    def publish(self, token_ids: array[int], blocks: abc.Sequence[int], /) -> None: ...
    def reference_count(self, block: int, /) -> int: ...
    def reset_prefix_cache(self) -> None: ...


def blocks_for(tokens: int) -> int:
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


def _key(seq: Sequence) -> Key:
    return seq.key


class Scheduler:
    """Owns the queue, the running sequences, their slots, and which blocks they hold."""

    def __init__(self, manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.manager = manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both lists in order
        self.running: list[Sequence] = []
        self.block_copies = array("i")  # of the step just scheduled: source, destination, source, ...
        self.preemptions = 0
        self.hit_tokens = self.looked_up_tokens = 0  # of the prefix cache
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._by_arrival: list[Request] = []  # those that wait, and perhaps some that no longer do
        self._overtaking = 0  # admissions since the first of them became the first

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_key)
        if not self._by_arrival or self._by_arrival[-1] is not seq.request:
            insort(self._by_arrival, seq.request, key=lambda request: request.number)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Sequences of the next step, and how many of its next tokens each runs."""
        self.block_copies = array("i")
        if self._overtaking >= MAX_OVERTAKING:
            self._move_to_front(self._by_arrival[0])
        budget = self.max_num_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []  # running[:position]
        position = 0
        admitting = True
        admitted: Sequence | None = None
        while budget:
            seq = self.running[position] if position < len(self.running) else None
            if admitting:
                next_one = next((one for one in self.waiting if not one.waits), None)
                if next_one is not None and (seq is None or next_one.key < seq.key):
                    admitting = self._admit(next_one, position)
                    admitted = next_one
                    continue
                admitting = next_one is not None
            if seq is None:
                break
            if seq.num_computed == seq.num_inputs:  # a beam waits for the others of its search
                position += 1
                continue
            if seq.num_inputs - seq.num_computed > BLOCK_TOKENS and seq is not admitted:
                self._match(seq)  # others may have computed what it is about to
            count = min(seq.num_inputs - seq.num_computed, budget)
            end = seq.num_computed + count
            if seq.shares_tail or end > len(seq.blocks) * BLOCK_TOKENS:
                num_running = len(self.running)
                kept = self._reserve(seq, end)
                if len(self.running) < num_running:
                    # Blocks ran out: admit nobody, unless nothing else could run.
                    admitting = not kept and position == 0
                if not kept:
                    continue
            if seq.num_computed < seq.num_prompt:
                self._publish(seq, min(end, seq.num_prompt))
            scheduled.append((seq, count))
            budget -= count
            position += 1
        if not scheduled:
            held = [seq for seq in self.running if seq.num_computed == seq.num_inputs]
            if held and self.waiting:  # the other beams need the room of those that wait for them
                self._preempt(held[-1])
                return self.schedule()
        return scheduled

    def reserve_drafts(self, seq: Sequence, wanted: int) -> int:
        """Blocks for drafts after the next token of a sequence that is scheduled; how many drafts they hold.

        Nobody loses a block for guesses, nor the one that it may need for its next token.
        """
        length = seq.num_computed + 1
        missing = blocks_for(length + wanted) - len(seq.blocks)
        if missing > 0:
            spare = self.manager.num_available - len(self.running)
            if spare > 0:
                seq.blocks.extend(self.manager.allocate(min(missing, spare)))
        return min(wanted, len(seq.blocks) * BLOCK_TOKENS - length)

    def start_samples(self, request: Generation) -> None:
        """The first sample has computed the prompt: let the others share its very blocks."""
        first, num_prompt = request.sequences[0], len(request.prompt_ids)
        # The last prompt token runs again in each sample, to draw its own first token from its row.
        shared = first.blocks[: blocks_for(num_prompt - 1)]
        for sample in request.sequences[1:]:
            if not self._free_slots:
                break  # the others are admitted later, like everyone else
            if sample.finish_reason is not None or sample.slot >= 0:
                continue
            self.waiting.remove(sample)
            self.manager.fork(shared.tolist())
            sample.blocks = shared[:]
            sample.num_computed = num_prompt - 1
            sample.shares_tail = first.shares_tail = True
            self._start(sample)

    def branch(self, seq: Sequence, heirs: abc.Sequence[Sequence]) -> None:
        """``heirs`` go on where ``seq`` is, in blocks that they share until they write to them: the first in
        its slot, the others in slots of their own, or they wait for one. Without heirs it is released."""
        if not heirs or seq.slot < 0:
            self.release(seq)
            for heir in heirs:
                self.add(heir)
            return
        for heir in heirs[1:]:
            if not self._free_slots:
                self.add(heir)
                continue
            self.manager.fork(seq.blocks.tolist())
            heir.blocks, heir.num_computed = seq.blocks[:], seq.num_computed
            heir.shares_tail = seq.shares_tail = True
            self._start(heir)
        first = heirs[0]
        first.blocks, first.num_computed = seq.blocks, seq.num_computed
        first.shares_tail, first.slot = seq.shares_tail, seq.slot
        seq.blocks, seq.slot = array("i"), -1
        self.running.remove(seq)
        insort(self.running, first, key=_key)

    def release(self, seq: Sequence) -> None:
        """Take a finished or aborted sequence out."""
        if seq.slot >= 0:
            self._stop(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def abandon(self, seq: Sequence) -> None:
        """What was scheduled of ``seq`` has not been computed: whoever has matched it must begin again."""
        promised = set(seq.blocks[seq.num_computed // BLOCK_TOKENS :])
        self.manager.reset_prefix_cache()
        for other in list(self.running):
            if other is not seq and not promised.isdisjoint(other.blocks):
                other.num_computed = 0
                self._preempt(other)

    def clear(self) -> None:
        """After a failed step: whatever it left half done is not to run again, nor to be found."""
        for seq in list(self.running):
            seq.num_computed = 0
            self._stop(seq)
        self.waiting.clear()
        self._by_arrival.clear()
        self._overtaking = 0
        self.manager.reset_prefix_cache()

    def _reserve(self, seq: Sequence, length: int) -> bool:
        """Blocks for the first ``length`` tokens, the next of them writable; False: preempted itself."""
        missing = max(0, blocks_for(length) - len(seq.blocks))
        tail = seq.num_computed // BLOCK_TOKENS
        copy = seq.shares_tail and tail < len(seq.blocks)
        while self.manager.num_available < missing + copy:
            last = self.running[-1]
            self._preempt(last)
            if last is seq:
                return False
        if missing > 0:
            seq.blocks.extend(self.manager.allocate(missing))
        seq.shares_tail = False
        if copy:
            source = seq.blocks[tail]
            block = seq.blocks[tail] = self.manager.make_writable(source)
            if block != source:
                if block in self.block_copies:
                    # A sequence preempted in this very step left the block as the source of a copy, and
                    # all copies of a step run at once: nothing may be copied there before the next step.
                    self._preempt(seq)
                    return False
                self.block_copies.extend((source, block))
        return True

    def _admit(self, seq: Sequence, position: int) -> bool:
        """Let a sequence run that waits; running[:position] are scheduled already."""
        later = [one for one in self.running[position:] if one.request.priority > seq.request.priority]
        if not self._free_slots and not later:
            return False
        self._match(seq)
        missing = blocks_for(seq.num_inputs) - len(seq.blocks)
        if later and not self._fits(missing) and self._would_fit(missing, without=later):
            while not self._fits(missing):
                self._preempt(later.pop())
        if not self._fits(missing):
            self.manager.free(seq.blocks.tolist())
            seq.blocks, seq.num_computed = array("i"), 0
            return False
        seq.blocks.extend(self.manager.allocate(missing))
        self.looked_up_tokens += seq.num_inputs
        self.hit_tokens += seq.num_computed
        if seq.request.cached_tokens is None:
            seq.request.cached_tokens = seq.num_computed
        self.waiting.remove(seq)
        self._start(seq)
        self._count_overtaking(seq)
        return True

    def _fits(self, missing: int) -> bool:
        # One block of growth for everyone who runs, or the newcomer would soon be preempted again.
        growth = len(self.running)
        return bool(self._free_slots) and missing + growth <= self.manager.num_available

    def _would_fit(self, missing: int, without: list[Sequence]) -> bool:
        """Whether there is a place once all of ``without`` have lost theirs; blocks that they share with
        others stay in use."""
        held = Counter(block for one in without for block in one.blocks)
        freed = sum(self.manager.reference_count(block) == count for block, count in held.items())
        return missing + len(self.running) - len(without) <= self.manager.num_available + freed

    def _match(self, seq: Sequence) -> None:
        """Use the blocks of the prefix index as far as they reach beyond what the sequence has computed."""
        found = self.manager.match(seq.matchable())
        own = seq.num_computed // BLOCK_TOKENS
        if len(found) <= own:
            self.manager.free(found)
            return
        self.manager.free(found[:own] + seq.blocks[own : len(found)].tolist())
        seq.blocks[own : len(found)] = array("i", found[own:])
        seq.num_computed = len(found) * BLOCK_TOKENS

    def _publish(self, seq: Sequence, length: int) -> None:
        full = length // BLOCK_TOKENS
        if full > 0:
            self.manager.publish(seq.token_ids[: full * BLOCK_TOKENS], seq.blocks[:full].tolist())

    def _count_overtaking(self, admitted: Sequence) -> None:
        """How many that came later have been admitted before the first that waits."""
        by_arrival = self._by_arrival
        while by_arrival and all(seq.slot >= 0 or seq.finish_reason for seq in by_arrival[0].sequences):
            by_arrival.pop(0)
            self._overtaking = 0
        if not by_arrival or admitted.request.number <= by_arrival[0].number:
            return
        self._overtaking += 1

    def _move_to_front(self, request: Request) -> None:
        for seq in request.sequences:
            if seq.slot < 0:
                seq.key = (_FRONT, *seq.key[1:])
        self.waiting.sort(key=_key)

    def _start(self, seq: Sequence) -> None:
        seq.slot = self._free_slots.pop()
        seq.is_set_up = False
        insort(self.running, seq, key=_key)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1
        self._publish(seq, seq.num_computed)
        self.manager.free(seq.blocks.tolist())
        seq.blocks = array("i")
        seq.num_computed = 0
        seq.shares_tail = False

    def _preempt(self, seq: Sequence) -> None:
        self._stop(seq)
        self.preemptions += 1
        seq.request.preemptions += 1
        self.add(seq)
