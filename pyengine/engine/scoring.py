"""Log-probabilities of given tokens: windows of text through ragged batches, without sampling.

Windows that begin alike share the keys and values of their beginning through the prefix index: those whose
context is being computed by another window of the batch wait for the next one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyengine.engine.engine import Engine
from pyengine.engine.scheduler import BLOCK_TOKENS, blocks_for
from pyengine.errors import OutOfMemory


@dataclass
class Window:
    """Tokens, of which those from ``first`` on (1 or more) are scored, each given all before it."""

    token_ids: array[int]
    first: int
    logprobs: list[float] = field(default_factory=list)  # of token_ids[first:]
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # best first
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_inputs(self) -> int:
        """Tokens that run; the last one is only a target."""
        return len(self.token_ids) - 1

    @property
    def num_shared(self) -> int:
        """Tokens in full blocks that another window may have computed: up to the row of the first target."""
        return (self.first - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def context(self) -> bytes:
        return self.token_ids[: self.num_shared].tobytes()


def window_spans(num_tokens: int, first: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (begin, end, first scored token) of at most ``size`` tokens; they score [first, num_tokens).

    Every scored token has at least ``size - stride`` tokens of context, or all there are. The last window
    reaches back as far as it can.
    """
    spans = []
    scored = first
    while scored < num_tokens:
        begin = max(0, scored - (size - stride))
        if begin + size >= num_tokens:
            begin = max(0, num_tokens - size)
        end = min(begin + size, num_tokens)
        spans.append((begin, end, scored))
        scored = end
    return spans


def score_windows(engine: Engine, windows: Sequence[Window], top_n: int = 0) -> None:
    """Fill in ``logprobs`` and ``top_logprobs``; requests are preempted where their blocks are needed."""
    pending = [window for window in windows if window.first < len(window.token_ids)]
    active: list[Window] = []
    try:
        while pending or active:
            _admit(engine, pending, active)
            _score_batch(engine, active, top_n)
            for window in list(active):
                full = window.num_computed // BLOCK_TOKENS
                engine.core.manager.publish(window.token_ids[: full * BLOCK_TOKENS], window.blocks[:full])
                if window.num_computed == window.num_inputs:
                    active.remove(window)
                    _release(engine, window)
    finally:
        for window in active:
            _release(engine, window)


def _release(engine: Engine, window: Window) -> None:
    blocks, window.blocks = window.blocks, []
    engine.core.manager.free(blocks)


def _admit(engine: Engine, pending: list[Window], active: list[Window]) -> None:
    """Move windows from ``pending`` to ``active`` while there are blocks and one batch can hold them."""
    manager = engine.core.manager
    being_computed = {window.context for window in active if window.num_computed < window.num_shared}
    num_tokens = sum(window.num_inputs - window.num_computed for window in active)
    position = 0
    while position < len(pending) and num_tokens < engine.max_num_batched_tokens:
        window = pending[position]
        context = window.context
        if engine.core.prefix_caching and context in being_computed:
            position += 1
            continue
        window.blocks = manager.match(window.token_ids[: window.first])
        missing = blocks_for(window.num_inputs) - len(window.blocks)
        if missing > manager.num_available and (active or not engine.scheduler.make_room(missing)):
            _release(engine, window)
            if not active:
                raise OutOfMemory(
                    f"scoring {len(window.token_ids)} tokens needs {missing} blocks of {BLOCK_TOKENS} "
                    f"tokens, and {manager.num_available} are available: give the LLM more kv_cache_memory"
                )
            return
        window.num_computed = len(window.blocks) * BLOCK_TOKENS
        window.blocks.extend(manager.allocate(missing))
        active.append(pending.pop(position))
        num_tokens += window.num_inputs - window.num_computed
        if window.num_computed < window.num_shared:
            being_computed.add(context)


def _score_batch(engine: Engine, active: list[Window], top_n: int) -> None:
    budget = engine.max_num_batched_tokens
    tokens, positions = array("i"), array("i")
    query_start, context_len, block_table = array("i", (0,)), array("i"), array("i")
    rows, targets = array("i"), array("i")
    max_blocks = max(len(window.blocks) for window in active)
    ran: list[tuple[Window, int, int]] = []  # window, its new num_computed, its rows
    for window in active:
        begin = window.num_computed
        end = min(window.num_inputs, begin + budget)
        if end == begin:
            break
        scored = max(begin, window.first - 1)  # the first row with a target
        rows.extend(range(len(tokens) + scored - begin, len(tokens) + end - begin))
        targets.extend(window.token_ids[scored + 1 : end + 1])
        ran.append((window, end, max(0, end - scored)))
        tokens.extend(window.token_ids[begin:end])
        positions.extend(range(begin, end))
        query_start.append(len(tokens))
        context_len.append(end)
        block_table.extend(window.blocks)
        block_table.extend([0] * (max_blocks - len(window.blocks)))
        budget -= end - begin
    core = engine.core
    batch = core.batch(tokens, positions, query_start, context_len, block_table)
    logprobs, top_ids, top_values = core.model.score(core.kv, batch, rows, targets, top_n)
    row = 0
    for window, end, count in ran:
        window.num_computed = end
        window.logprobs.extend(logprobs[row : row + count].tolist())
        if top_n:
            ids, values = top_ids[row : row + count].tolist(), top_values[row : row + count].tolist()
            window.top_logprobs.extend(
                list(zip(*best, strict=True)) for best in zip(ids, values, strict=True)
            )
        row += count
