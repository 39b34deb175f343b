"""A stand-in for ``pyengine._C`` whose tokens depend on what its KV blocks hold.

The next token is a hash of the token ids found through the block table, so a wrong block, a missing copy
or a token that was never computed shows as a wrong token. Positions are stored with the tokens and checked.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyengine.engine.engine import Core
from pyengine.errors import InternalError, OutOfMemory

BLOCK = 16
VOCAB = 50


class Wrong(BaseException):
    """The engine broke a rule. No Exception, which it would take for the fault of one request."""


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (AssertionError, LookupError) as error:
            raise Wrong(str(error)) from error

    return checked


class FakeBlockManager:
    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = enable_prefix_caching
        self._free = list(range(num_blocks))
        self._references = [0] * num_blocks
        self._index: dict[bytes, int] = {}  # tokens up to the end of a block -> block
        self._key: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.taken: list[int] = []  # blocks that the model has to take for empty

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_available

    def match(self, token_ids: array[int]) -> list[int]:
        found = []
        for end in range(BLOCK, len(token_ids), BLOCK):
            block = self._index.get(token_ids[:end].tobytes())
            if block is None:
                break
            self._cached.pop(block, None)
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int]:
        if count > self.num_available:
            raise OutOfMemory(f"{count} blocks wanted, {self.num_available} left")
        return [self._take() for _ in range(count)]

    def fork(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self._references[block] > 0
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def make_writable(self, block: int) -> int:
        assert self._references[block] > 0
        if self._references[block] == 1 and block not in self._key:
            return block
        (copy,) = self.allocate(1)
        self.free([block])
        return copy

    def publish(self, token_ids: array[int], blocks: Sequence[int]) -> None:
        if not self._caching:
            return
        for number in range(len(token_ids) // BLOCK):
            key = token_ids[: (number + 1) * BLOCK].tobytes()
            block = blocks[number]
            assert self._references[block] > 0
            if key not in self._index:
                if block in self._key:
                    del self._index[self._key[block]]
                self._index[key] = block
                self._key[block] = key

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._index[self._key.pop(block)]
        self._references[block] = 1
        self.taken.append(block)
        return block

    def reference_count(self, block: int) -> int:
        return self._references[block]

    def reset_prefix_cache(self) -> None:
        self._index.clear()
        self._key.clear()
        self._free += self._cached
        self._cached.clear()

    def is_private(self, block: int) -> bool:
        return self._references[block] == 1 and block not in self._key

    def check_invariants(self) -> None:
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not free & cached
        for block, references in enumerate(self._references):
            assert (references == 0) == (block in free or block in cached), block
        assert {block: key for key, block in self._index.items()} == self._key
        assert cached <= set(self._key) and not free & set(self._key)


class FakeBatch:
    @strict
    def __init__(
        self,
        token_ids: array[int],
        positions: array[int],
        query_start: array[int],
        context_len: array[int],
        block_table: array[int],
        block_copies: array[int] | None = None,
    ) -> None:
        self.token_ids, self.positions = token_ids, positions
        self.query_start, self.context_len = query_start, context_len
        num_seqs = len(context_len)
        assert len(token_ids) == len(positions) == query_start[-1] and len(query_start) == num_seqs + 1
        assert num_seqs and len(block_table) % num_seqs == 0
        width = len(block_table) // num_seqs
        self.tables = [block_table[row * width : (row + 1) * width] for row in range(num_seqs)]
        pairs = list(block_copies or ())
        self.copies = list(zip(pairs[::2], pairs[1::2], strict=True))
        sources, destinations = {source for source, _ in self.copies}, [to for _, to in self.copies]
        assert len(set(destinations)) == len(destinations) and not sources & set(destinations)


class FakeSampler:
    def __init__(self) -> None:
        self.slots: dict[int, dict[str, Any]] = {}

    def set(self, slot: int, **params: Any) -> None:
        self.slots[slot] = params


class FakeStepResult:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.scores: list[float] = []
        self.score_tops: list[list[tuple[int, float]]] = []
        self.candidates: list[list[tuple[int, float, float]]] = []


class FakeModel:
    """``fail_at``: the step that raises InternalError, counted from 1. ``fail_on``: a token whose batches
    raise. ``poison``: a token after which logits are NaN."""

    def __init__(self, manager: FakeBlockManager) -> None:
        self.manager = manager
        self.steps = 0
        self.tokens_run = 0
        self.rows_sampled = 0
        self.fail_at = 0
        self.fail_on: int | None = None
        self.poison: int | None = None
        self.batches: list[tuple[int, int]] = []  # tokens and sequences of each step

    @strict
    def step(
        self,
        kv: dict[int, list],
        sampler: FakeSampler,
        batch: FakeBatch,
        slots: array[int],
        score_rows: Sequence[int] = (),
        targets: Sequence[int] = (),
        top_n: int = 0,
        num_drafts: Sequence[int] | None = None,
    ) -> FakeStepResult:
        self.steps += 1
        self._write(kv, batch)
        if self.steps == self.fail_at or self.fail_on in batch.token_ids:
            raise InternalError("the step failed, as the test asked")
        assert len({slot for slot in slots if slot >= 0}) == sum(slot >= 0 for slot in slots)
        result = FakeStepResult()
        for row, slot in enumerate(slots):
            drafts = 0 if num_drafts is None else num_drafts[row]
            assert drafts == 0 or slot >= 0
            assert drafts < batch.query_start[row + 1] - batch.query_start[row]
            is_skipped = False
            for place in range(drafts + 1 if slot >= 0 else 0):
                length = batch.context_len[row] - drafts + place
                if place > 0:
                    drafted = batch.token_ids[batch.query_start[row + 1] - 1 - drafts + place]
                    is_skipped = is_skipped or result.token_ids[-1] != drafted
                if is_skipped:
                    result.token_ids.append(-4)
                    result.logprobs.append(float("nan"))
                    result.top_logprobs.append([])
                    result.candidates.append([])
                    continue
                history = self._read(kv, batch.tables[row], length)
                params = sampler.slots[slot]
                draw = (params["seed"], params["sample_index"]) if params["temperature"] else (0, 0)
                token = drawn(history, *draw)
                if self.poison is not None and self.poison in array("i", history):
                    token = -1
                self.rows_sampled += 1
                result.token_ids.append(token)
                wanted = params["logprobs"]
                result.logprobs.append(fake_logprob(history, token) if wanted >= 0 else float("nan"))
                result.top_logprobs.append(best_tokens(history, wanted))
                best = best_tokens(history, params.get("num_candidates", 0))
                result.candidates.append([(token, value, value) for token, value in best])
        for row, target in zip(score_rows, targets, strict=True):
            seq = next(b for b in range(len(batch.tables)) if row < batch.query_start[b + 1])
            history = self._read(kv, batch.tables[seq], batch.positions[row] + 1)
            is_poisoned = self.poison is not None and self.poison in array("i", history)
            result.scores.append(float("nan") if is_poisoned else fake_logprob(history, target))
            result.score_tops.append(best_tokens(history, top_n))
        return result

    def _write(self, kv: dict[int, list], batch: FakeBatch) -> None:
        """Blocks may be shared as soon as they are scheduled; what is in them is never changed then."""
        copied = {destination: list(kv[source]) for source, destination in batch.copies}
        for block in self.manager.taken:
            kv.pop(block, None)
        self.manager.taken.clear()
        kv.update(copied)
        written = set()
        self.tokens_run += len(batch.token_ids)
        self.batches.append((len(batch.token_ids), len(batch.tables)))
        for row, table in enumerate(batch.tables):
            first, last = batch.query_start[row], batch.query_start[row + 1]
            assert last > first and batch.positions[last - 1] + 1 == batch.context_len[row]
            for at in range(first, last):
                position = batch.positions[at]
                block = table[position // BLOCK]
                assert (block, position % BLOCK) not in written, "two sequences write to one place"
                written.add((block, position % BLOCK))
                entry = (position, batch.token_ids[at])
                places = kv.setdefault(block, [None] * BLOCK)
                if not self.manager.is_private(block):
                    assert places[position % BLOCK] in (None, entry), "what others may read is changed"
                places[position % BLOCK] = entry

    def _read(self, kv: dict[int, list], table: array[int], length: int) -> bytes:
        tokens = array("i")
        for position in range(length):
            entry = kv[table[position // BLOCK]][position % BLOCK]
            assert entry is not None and entry[0] == position, "a key that was never computed"
            tokens.append(entry[1])
        return tokens.tobytes()


def drawn(history: bytes, seed: int, sample_index: int) -> int:
    digest = hashlib.blake2b(history + struct.pack("<QI", seed, sample_index), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def fake_logprob(history: bytes, token: int) -> float:
    digest = hashlib.blake2b(history + struct.pack("<i", token), digest_size=4).digest()
    return float(np.float32(-int.from_bytes(digest, "little") / 2**30 - 0.01))


def best_tokens(history: bytes, count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest (token, log-probability), best first."""
    if count <= 0:
        return []
    rows = [(token, fake_logprob(history, token)) for token in range(VOCAB)]
    return sorted(rows, key=lambda row: -row[1])[:count]


def fake_core(num_blocks: int, *, prefix_caching: bool = True) -> Core:
    manager = FakeBlockManager(num_blocks, prefix_caching)
    return Core(
        model=FakeModel(manager),
        kv={},
        sampler=FakeSampler(),
        manager=manager,
        batch=FakeBatch,
    )
