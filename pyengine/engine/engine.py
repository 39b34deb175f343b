"""The step: schedule, build one ragged batch, run it, hand out its tokens.

The engine knows no threads: whoever calls it makes sure that calls do not overlap. Only ``abort`` may be
called at any time, from any thread; it takes effect between steps.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyengine.engine.request import Request, Sequence
from pyengine.engine.scheduler import BLOCK_TOKENS, BlockManager, Scheduler, blocks_for
from pyengine.errors import InternalError, PyEngineError, RequestError


@dataclass(frozen=True)
class Core:
    """What runs a step: objects of ``pyengine._C``, or others of the same interface."""

    model: Any
    kv: Any
    sampler: Any
    manager: BlockManager
    batch: Callable[..., Any]  # _C.Batch
    prefix_caching: bool = True


class Engine:
    """Requests in, tokens out."""

    def __init__(
        self, core: Core, *, max_model_len: int, max_num_seqs: int = 64, max_num_batched_tokens: int = 2048
    ) -> None:
        self.core = core
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.scheduler = Scheduler(
            core.manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.requests: dict[str, Request] = {}  # unfinished ones by id
        self._aborts: deque[Request] = deque()
        self._positions = array("i", range(max_model_len))
        self._padding = array("i", bytes(4 * blocks_for(max_model_len)))

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never finish, whatever else runs."""
        # The last token is drawn, never fed back: it needs no keys and values.
        needed = blocks_for(request.params.max_length - 1)
        if needed > self.core.manager.num_blocks:
            new = request.params.max_length - len(request.prompt_ids)
            num_blocks = self.core.manager.num_blocks
            raise RequestError(
                f"the prompt's {len(request.prompt_ids)} tokens and up to {new} new ones need {needed} "
                f"blocks of {BLOCK_TOKENS} tokens, and the whole KV cache has {num_blocks}: "
                "lower max_tokens, or give the LLM a larger kv_cache_memory"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run or its id is taken."""
        self.check(request)
        self.process_aborts()  # may free the id
        if request.id in self.requests:
            raise RequestError(f"request_id={request.id!r} belongs to a request that is still running")
        self.requests[request.id] = request
        for seq in request.sequences:
            self.scheduler.add(seq)

    def abort(self, request: Request) -> None:
        """End a request before the next step; one that was not added or is finished is left alone."""
        self._aborts.append(request)

    @property
    def has_aborts(self) -> bool:
        return bool(self._aborts)

    def process_aborts(self) -> None:
        while self._aborts:
            request = self._aborts.popleft()
            if self.requests.get(request.id) is request:
                self._give_up(request)

    def step(self) -> int:
        """Run one step for whoever is scheduled; the number of tokens that ran (0: nothing to do).

        A request whose logits are not finite, or whose text cannot be made, is given up with an error of
        its own, and the others go on. If the step as a whole fails, Ctrl-C included, every request is given
        up with that error. Their blocks are free then, and the engine can be used again.
        """
        try:
            self.process_aborts()
            scheduled = self.scheduler.schedule()
            if not scheduled:
                if self.requests:
                    raise InternalError(f"{len(self.requests)} requests wait and none can run")
                return 0
            self._set_samplers(scheduled)
            return self._run([(seq, count) for seq, count in scheduled if seq.finish_reason is None])
        except BaseException as error:
            self.give_up_all(error)
            raise

    def give_up_all(self, error: BaseException) -> None:
        self.scheduler.clear()
        for request in list(self.requests.values()):
            failure = InternalError(f"request {request.id} was given up, because a step failed: {error!r}")
            failure.__cause__ = error
            self._give_up(request, failure)

    def _run(self, scheduled: list[tuple[Sequence, int]]) -> int:
        if not scheduled:
            return 0
        core = self.core
        tokens, positions = array("i"), array("i")
        query_start, context_len = array("i", (0,)), array("i")
        block_table, slots = array("i"), array("i")
        max_blocks = max(len(seq.blocks) for seq, _ in scheduled)
        for seq, count in scheduled:
            begin = seq.num_computed
            end = begin + count
            if count == 1:
                tokens.append(seq.token_ids[begin])
                positions.append(begin)
            else:
                tokens.extend(seq.token_ids[begin:end])
                positions.extend(self._positions[begin:end])
            query_start.append(len(tokens))
            context_len.append(end)
            block_table.extend(seq.blocks)
            block_table.extend(self._padding[: max_blocks - len(seq.blocks)])
            slots.append(seq.slot if end == len(seq.token_ids) else -1)
        copies = self.scheduler.block_copies
        batch = core.batch(tokens, positions, query_start, context_len, block_table, copies or None)
        result = core.model.step(core.kv, core.sampler, batch, slots)

        sampled = result.token_ids
        logprobs: list[float] | None = None
        now = time.perf_counter()
        row = -1
        for (seq, count), slot in zip(scheduled, slots, strict=True):
            row += slot >= 0
            request = seq.request
            if request.error is not None:
                continue  # given up just now, with another of its samples
            seq.num_computed += count
            if slot < 0:
                continue
            token = sampled[row]
            if token < 0:
                self._give_up(request, _not_finite(seq))
                continue
            if seq.num_computed - count < len(request.prompt_ids):
                self.scheduler.prompt_is_computed(seq)
            if request.params.logprobs >= 0:
                if logprobs is None:
                    logprobs, top_logprobs = result.logprobs, result.top_logprobs
                seq.logprobs.append((token, logprobs[row], top_logprobs[row]))
            if request.first_token is None:
                request.first_token = now
            try:
                seq.append(token)
                if seq.finish_reason is not None:
                    self.scheduler.release(seq)
                    if request.finished:
                        self._remove(request)
                if request.outbox is not None:
                    request.report(seq)
            except Exception as error:  # its text cannot be made
                self._give_up(request, _named(request, error))
        return len(tokens)

    def _set_samplers(self, scheduled: list[tuple[Sequence, int]]) -> None:
        """Hand the parameters of newcomers to the sampler; a request whose parameters it refuses ends."""
        for seq, _ in scheduled:
            if seq.sampler_is_set or seq.finish_reason is not None:
                continue
            request, params = seq.request, seq.request.params
            try:
                self.core.sampler.set(
                    seq.slot,
                    temperature=params.temperature,
                    top_k=params.top_k,
                    top_p=params.top_p,
                    seed=params.seed,
                    sample_index=seq.index,
                    logprobs=params.logprobs,
                )
            except Exception as error:
                self._give_up(request, _named(request, error))
                continue
            seq.sampler_is_set = True
            if request.first_step is None:
                request.first_step = time.perf_counter()

    def _remove(self, request: Request) -> None:
        request.end = time.perf_counter()
        self.requests.pop(request.id, None)

    def _give_up(self, request: Request, error: Exception | None = None) -> None:
        """End a request as it is. Blocks and books come first: making its text may fail, too."""
        request.error = error
        for seq in request.sequences:
            self.scheduler.release(seq)
        self._remove(request)
        for seq in request.sequences:
            if seq.finish_reason is None:
                try:
                    seq.finish("abort")
                    request.report(seq)
                except Exception as failure:
                    request.error = request.error or _named(request, failure)


def _named(request: Request, error: Exception) -> PyEngineError:
    """``error`` as that of one request, by the class it has."""
    kind = type(error) if isinstance(error, PyEngineError) else InternalError
    named = kind(f"request {request.id}: {error if isinstance(error, PyEngineError) else repr(error)}")
    named.__cause__ = error
    return named


def _not_finite(seq: Sequence) -> InternalError:
    return InternalError(
        f"request {seq.request.id}: the logits after its token {len(seq.token_ids) - 1} are NaN or infinite: "
        "the weights are damaged, or too large for their dtype (pyengine-cli inspect --check reads them all)"
    )
