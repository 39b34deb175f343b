"""BlockManager against a plain-Python model of what it promises, under random schedules."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyengine._C import BLOCK_TOKENS, BlockManager
from pyengine.errors import ConfigError, InternalError, OutOfMemory


def int32(tokens: list[int]) -> array[int]:
    return array("i", tokens)


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]


# Two kinds of block are enough to make prefixes that meet and part.
block_kinds = st.lists(st.integers(0, 1), min_size=0, max_size=4)
tail_lengths = st.integers(1, BLOCK_TOKENS)


class BlockManagerMachine(RuleBasedStateMachine):
    """``content[b]`` is the text up to the end of block b when it was last published; a hit must equal it."""

    @initialize(num_blocks=st.integers(1, 12), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self.manager = BlockManager(num_blocks, caching)
        self.sequences: list[Sequence] = []
        self.content: dict[int, list[int]] = {}

    def pick(self, data: st.DataObject) -> Sequence:
        return self.sequences[data.draw(st.integers(0, len(self.sequences) - 1))]

    def allocate(self, count: int) -> list[int] | None:
        before = self.manager.num_available
        if count > before:
            with pytest.raises(OutOfMemory):
                self.manager.allocate(count)
            assert self.manager.num_available == before
            return None
        blocks = self.manager.allocate(count)
        assert len(set(blocks)) == count
        assert self.manager.num_available == before - count
        for block in blocks:
            self.content.pop(block, None)
        return blocks

    @rule(kinds=block_kinds, tail=tail_lengths)
    def arrive(self, kinds: list[int], tail: int) -> None:
        tokens = [100 * kind + i for kind in kinds for i in range(BLOCK_TOKENS)] + list(range(tail))
        blocks = self.manager.match(int32(tokens))
        assert len(blocks) <= (len(tokens) - 1) // BLOCK_TOKENS
        assert self.caching or not blocks
        for i, block in enumerate(blocks):
            assert self.content[block] == tokens[: (i + 1) * BLOCK_TOKENS]
        missing = self.allocate(-(-len(tokens) // BLOCK_TOKENS) - len(blocks))
        if missing is None:
            self.manager.free(blocks)
        else:
            self.sequences.append(Sequence(tokens, blocks + missing))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.sequences.remove(sequence)
        self.manager.free(sequence.blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.manager.publish(int32(sequence.tokens), sequence.blocks)
        full = len(sequence.tokens) // BLOCK_TOKENS
        for i in range(full):
            self.content[sequence.blocks[i]] = sequence.tokens[: (i + 1) * BLOCK_TOKENS]
        if self.caching and full:  # what was just published is found
            hit = self.manager.match(int32([*sequence.tokens[: full * BLOCK_TOKENS], 0]))
            assert len(hit) == full
            self.manager.free(hit)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        self.manager.fork(parent.blocks)
        self.sequences.append(Sequence(list(parent.tokens), list(parent.blocks)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token=st.integers(500, 505))
    def rewrite_last_token(self, data: st.DataObject, token: int) -> None:
        sequence = self.pick(data)
        block = sequence.blocks[-1]
        shared = self.manager.reference_count(block) > 1
        if shared and self.manager.num_available == 0:
            with pytest.raises(OutOfMemory):
                self.manager.make_writable(block)
            return
        try:
            copy = self.manager.make_writable(block)
        except OutOfMemory:  # indexed and alone, and no block to copy it to
            assert self.manager.num_available == 0
            return
        assert not (shared and copy == block)
        if copy != block:
            self.content.pop(copy, None)
        sequence.blocks[-1] = copy
        sequence.tokens[-1] = token

    @rule()
    def forget(self) -> None:
        self.manager.reset_prefix_cache()
        self.content.clear()

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_invariants()
        held = [block for sequence in self.sequences for block in sequence.blocks]
        assert self.manager.num_in_use == len(set(held))
        assert self.manager.num_available == self.num_blocks - len(set(held))
        for block in range(self.num_blocks):
            assert self.manager.reference_count(block) == held.count(block)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_least_recently_freed_prefix_is_evicted_first() -> None:
    manager = BlockManager(4)
    texts = [list(range(100 * t, 100 * t + 2 * BLOCK_TOKENS)) for t in range(2)]
    held = [manager.allocate(2) for _ in texts]
    for text, blocks in zip(texts, held, strict=True):
        manager.publish(int32(text), blocks)
    manager.free(held[1])
    manager.free(held[0])
    manager.allocate(1)  # the tail of text 1, freed first
    assert [len(manager.match(int32([*text, 0]))) for text in texts] == [2, 1]


def test_errors_are_the_classes_of_the_package() -> None:
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockManager(0)
    manager = BlockManager(2)
    with pytest.raises(InternalError, match="held by nobody"):
        manager.free([1])
    with pytest.raises(InternalError, match="block 7"):
        manager.reference_count(7)
    with pytest.raises(TypeError, match="int32"):
        manager.match(array("q", [1]))
    with pytest.raises(TypeError, match="token_ids"):
        manager.match("abc")  # type: ignore[arg-type]
