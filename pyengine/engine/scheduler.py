"""Which tokens run in the next step.

First come, first served, over one pool of KV blocks. A step first takes the tokens of the sequences that
run (one each where they generate, a chunk of the prompt where they do not), oldest first, then admits from
the queue while tokens, slots and blocks last. A sequence is admitted when there are blocks for all of its
tokens, so that only growth can run out of blocks; then the youngest sequence loses its blocks and goes
back to its place in the queue, to be computed again (preemption by recomputation). The oldest is never
preempted for another, and one alone always fits, so every sequence finishes.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import abc
from typing import Protocol

from pyengine.engine.request import Sequence

BLOCK_TOKENS = 16  # csrc/kv/layout.h


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


def blocks_for(tokens: int) -> int:
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.key


class Scheduler:
    """Owns the queue, the running sequences, their slots, and which blocks they hold."""

    def __init__(self, manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.manager = manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both lists by age, oldest first
        self.running: list[Sequence] = []
        self.block_copies = array("i")  # of the step just scheduled: source, destination, source, ...
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_age)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Sequences of the next step, and how many of its next tokens each runs."""
        self.block_copies = array("i")
        budget = self.max_num_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []
        num_waiting = len(self.waiting)
        position = 0
        while budget and position < len(self.running):
            seq = self.running[position]
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            if not self._reserve(seq, seq.num_computed + count):
                continue  # it lost its place; the next one, if any, moved up
            scheduled.append((seq, count))
            budget -= count
            position += 1
        if scheduled and len(self.waiting) > num_waiting:
            return scheduled  # blocks ran out: admit nobody
        position = 0
        while budget and self._free_slots and position < len(self.waiting):
            seq = self.waiting[position]
            if self._waits_for_prompt(seq):
                position += 1
                continue
            if not self._admit(seq):
                break
            del self.waiting[position]
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            scheduled.append((seq, count))
            budget -= count
        return scheduled

    def prompt_is_computed(self, seq: Sequence) -> None:
        """Let others share the prompt: by prefix, and the other samples of the request by its very blocks."""
        self.publish(seq)
        num_prompt = len(seq.request.prompt_ids)
        if seq.index > 0 or len(seq.token_ids) > num_prompt:
            return
        # The last prompt token runs again in each sample, to draw its own first token from its row.
        shared = seq.blocks[: blocks_for(num_prompt - 1)]
        for sample in seq.request.sequences[1:]:
            if not self._free_slots:
                break  # the others are admitted later, like everyone else
            if sample.finish_reason is not None or sample.slot >= 0:
                continue
            self.waiting.remove(sample)
            self.manager.fork(shared.tolist())
            sample.blocks = shared[:]
            sample.num_computed = num_prompt - 1
            sample.shares_tail = seq.shares_tail = True
            self._start(sample)

    def publish(self, seq: Sequence) -> None:
        full = seq.num_computed // BLOCK_TOKENS
        if full:
            self.manager.publish(seq.token_ids[: full * BLOCK_TOKENS], seq.blocks[:full].tolist())

    def release(self, seq: Sequence) -> None:
        """Take a finished or aborted sequence out."""
        if seq.slot >= 0:
            self._stop(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def clear(self) -> None:
        """After a failed step: whatever it left half done is not to run again."""
        for seq in list(self.running):
            self._stop(seq)
        self.waiting.clear()

    def make_room(self, count: int) -> bool:
        """Preempt the youngest until ``count`` blocks are available; whether they are."""
        while self.manager.num_available < count and self.running:
            self._preempt(self.running[-1])
        return self.manager.num_available >= count

    def _reserve(self, seq: Sequence, length: int) -> bool:
        """Blocks for the first ``length`` tokens, the next of them writable; False: preempted itself."""
        missing = blocks_for(length) - len(seq.blocks)
        tail = seq.num_computed // BLOCK_TOKENS
        copy = seq.shares_tail and tail < len(seq.blocks)
        if missing <= 0 and not copy:
            return True
        while self.manager.num_available < max(missing, 0) + copy:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is seq:
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

    def _admit(self, seq: Sequence) -> bool:
        blocks = self.manager.match(seq.token_ids)
        missing = blocks_for(len(seq.token_ids)) - len(blocks)
        # One block of growth for everyone who runs, or the newcomer would soon be preempted again.
        if missing + len(self.running) > self.manager.num_available:
            if self.running or missing > self.manager.num_available:
                self.manager.free(blocks)
                return False
        seq.num_computed = len(blocks) * BLOCK_TOKENS
        seq.blocks = array("i", blocks)
        seq.blocks.extend(self.manager.allocate(missing))
        if seq.request.cached_tokens is None:
            seq.request.cached_tokens = seq.num_computed
        self._start(seq)
        return True

    def _waits_for_prompt(self, seq: Sequence) -> bool:
        """The samples of a request wait until the first of them has computed the prompt."""
        first = seq.request.sequences[0]
        return (
            seq is not first
            and first.finish_reason is None
            and first.num_computed < len(seq.request.prompt_ids)
        )

    def _start(self, seq: Sequence) -> None:
        seq.slot = self._free_slots.pop()
        seq.sampler_is_set = False
        insort(self.running, seq, key=_age)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1
        self.publish(seq)
        self.manager.free(seq.blocks.tolist())
        seq.blocks = array("i")
        seq.num_computed = 0
        seq.shares_tail = False

    def _preempt(self, seq: Sequence) -> None:
        self._stop(seq)
        seq.request.preemptions += 1
        self.add(seq)
