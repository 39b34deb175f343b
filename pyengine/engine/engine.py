"""The step: schedule, build one ragged batch, run it, hand out what it yields.

The engine knows no threads: whoever calls it makes sure that calls do not overlap (thread.py).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyengine.engine.beams import Beam
from pyengine.engine.failures import named, not_finite, why_no_token
from pyengine.engine.generation import Generation, Sample
from pyengine.engine.metrics import Counters
from pyengine.engine.request import Request, Sequence
from pyengine.engine.scheduler import BlockManager, Scheduler, blocks_for
from pyengine.engine.scoring import Window
from pyengine.engine.speculation import Speculator
from pyengine.errors import InternalError, RequestError

SKIPPED = -4  # in place of a token after a draft that was wrong (csrc/sampling/sampler.h)
Scheduled = list[tuple[Sequence, int]]  # and how many of its next tokens run


@dataclass(frozen=True)
class Core:
    """What runs a step: objects of ``pyengine._C``, or others of the same interface."""

    model: Any
    kv: Any
    sampler: Any
    manager: BlockManager
    batch: Callable[..., Any]  # _C.Batch


class Engine:
    """Requests in, tokens and log-probabilities out."""

    def __init__(
        self, core: Core, *, max_model_len: int, max_num_seqs: int = 64, max_num_batched_tokens: int = 2048
    ) -> None:
        self.core = core
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.scheduler = Scheduler(
            core.manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.requests: dict[int, Request] = {}  # unfinished ones by number
        self.ended: list[Request] = []  # since somebody last emptied it
        self.num_waiting = 0  # requests of which nothing has run yet
        self.counters = Counters()
        self.speculator: Speculator | None = None
        self._positions = array("i", range(max_model_len))
        self._padding = array("i", bytes(4 * blocks_for(max_model_len)))

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never finish, whatever else runs."""
        needed, num_blocks = blocks_for(request.length), self.core.manager.num_blocks
        if needed > num_blocks:
            raise RequestError(request.why_refused(num_blocks, needed))

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        self.check(request)
        self.requests[request.number] = request
        self.num_waiting += 1
        for seq in request.sequences:
            self.scheduler.add(seq)

    def abort(self, request: Request) -> None:
        """End a request with what it has; one that was not added or is finished is left alone."""
        if self.requests.get(request.number) is request:
            self.give_up(request)

    def step(self) -> int:
        """Run one step for whoever is scheduled; the number of tokens that ran (0: nothing to do).

        A request whose logits are not finite, or whose text cannot be made, is given up with an error of its
        own, and the others go on. If the model cannot run the batch, each sequence of it runs alone, and
        those that fail even so are given up. After any other failure every request is given up and the error
        raised. Their blocks are free then, and the engine can be used again.
        """
        begin = time.perf_counter()
        try:
            scheduled = self.scheduler.schedule()
            if not scheduled:
                if self.requests:
                    raise InternalError(f"{len(self.requests)} requests wait and none can run")
                return 0
            if self.speculator is not None:
                self.speculator.propose(scheduled, self.scheduler)
            self._set_up(scheduled, begin)
            copies = self.scheduler.block_copies
            running = [entry for entry in scheduled if entry[0].slot >= 0]
            if not running:
                return 0
            start = time.perf_counter()
            try:
                ran = self._run(running, copies)
            except Exception as error:
                self._run_apart(running, copies, error)
            else:
                if self.speculator is not None:
                    self.speculator.measure(running, time.perf_counter() - start)
                self._hand_out(running, *ran)
            self.counters.count_step(begin, time.perf_counter())
            return sum([count for _, count in running])
        except BaseException as error:
            self.give_up_all(error)
            raise

    def give_up_all(self, error: BaseException) -> None:
        self.scheduler.clear()
        for request in list(self.requests.values()):
            failure = InternalError(f"request {request.id} was given up, because a step failed: {error!r}")
            failure.__cause__ = error
            self.give_up(request, failure)

    def _run(self, scheduled: Scheduled, copies: array[int]) -> tuple[Any, array[int], array[int]]:
        """The model's result, and for each sequence its slot, if it draws a token, and its scored rows."""
        core = self.core
        tokens, positions = array("i"), array("i")
        query_start, context_len = array("i", (0,)), array("i")
        block_table, slots = array("i"), array("i")
        score_rows, targets, num_scored = array("i"), array("i"), array("i")
        num_drafts = array("i")
        top_n = 0
        max_blocks = max([len(seq.blocks) for seq, _ in scheduled])
        num_tokens = 0
        for seq, count in scheduled:
            begin, blocks, scored = seq.num_computed, seq.blocks, 0
            end = begin + count
            num_tokens += count
            if count == 1:
                tokens.append(seq.token_ids[begin])
                positions.append(begin)
            else:
                tokens.extend(seq.token_ids[begin:end])
                positions.extend(self._positions[begin:end])
            slots.append(seq.slot if end == seq.num_inputs and seq.draws else -1)
            if begin < seq.num_prompt:  # nothing else is scored
                first, last = seq.targets
                first, last = max(first, begin + 1), min(last, end + 1)  # each is scored by the row before it
                if first < last:
                    scored, shift = last - first, num_tokens - end - 1
                    score_rows.extend(range(first + shift, last + shift))
                    targets.extend(seq.token_ids[first:last])
                    top_n = max(top_n, seq.top_n)
            num_scored.append(scored)
            drafts = seq.drafts
            if drafts:
                tokens.extend(drafts)
                positions.extend(self._positions[end : end + len(drafts)])
                end += len(drafts)
                num_tokens += len(drafts)
            num_drafts.append(len(drafts))
            query_start.append(num_tokens)
            context_len.append(end)
            block_table.extend(blocks)
            if len(blocks) < max_blocks:
                block_table.extend(self._padding[: max_blocks - len(blocks)])
        batch = core.batch(tokens, positions, query_start, context_len, block_table, copies or None)
        further: dict[str, Any] = {}
        if score_rows:
            further.update(score_rows=score_rows, targets=targets, top_n=top_n)
        if len(tokens) > len(num_drafts) and any(num_drafts):
            further["num_drafts"] = num_drafts
        result = core.model.step(core.kv, core.sampler, batch, slots, **further)
        return result, slots, num_scored

    def _run_apart(self, scheduled: Scheduled, copies: array[int], error: Exception) -> None:
        """Find out whose fault it was. What has been computed and copied already is so once more."""
        self.counters.failed_steps += 1
        for seq, _ in scheduled:
            if seq.slot >= 0:
                self.scheduler.abandon(seq)  # from here on, no promised block is anybody else's
        for entry in scheduled:
            seq = entry[0]
            if len(scheduled) > 1 and seq.slot >= 0:
                seq.is_set_up = False  # its slot may have gone on already
                self._set_up([entry], time.perf_counter())
            if seq.slot < 0:
                continue  # it shared blocks, or it or another of its request has just been given up
            if len(scheduled) > 1:
                try:
                    ran = self._run([entry], copies)
                except Exception as own_error:
                    error = own_error
                else:
                    copies = array("i")
                    self._hand_out([entry], *ran)
                    continue
            self.give_up(seq.request, named(seq.request, error))

    def _hand_out(self, scheduled: Scheduled, result: Any, slots: array[int], num_scored: array[int]) -> None:
        sampled = result.token_ids
        logprobs: list[float] | None = None
        scores: list[float] | None = None
        now = time.perf_counter()
        next_row = score_row = num_new = 0
        counters = self.counters
        beams: list[tuple[Beam, int]] = []
        for (seq, count), slot, num_rows in zip(scheduled, slots, num_scored, strict=True):
            request = seq.request
            row = next_row
            if slot >= 0:
                next_row += 1 + len(seq.drafts)
            if num_rows:
                if scores is None:
                    scores, score_tops = result.scores, result.score_tops
                rows = slice(score_row, score_row + num_rows)
                score_row += num_rows
                if request.error is None:
                    self._take_scores(seq, scores[rows], score_tops[rows])
            if request.error is not None:
                continue  # given up just now, with another of its samples
            if not seq.draws:
                assert isinstance(seq, Window)
                self._advance(seq, count)
                continue
            if TYPE_CHECKING:
                assert isinstance(seq, Sample) and isinstance(request, Generation)
            begin = seq.num_computed
            seq.num_computed = begin + count
            is_prompt = begin < seq.num_prompt
            if is_prompt:
                counters.prompt_tokens += count
            if slot < 0:
                continue
            token = sampled[row]
            if token < 0 and (token != -2 or not isinstance(seq, Beam)):
                self.give_up(request, why_no_token(self.core.sampler, seq, token))
                continue
            if isinstance(seq, Beam):
                num_new += 1
                beams.append((seq, row))
                continue
            if is_prompt and seq.index == 0 and len(seq.token_ids) == seq.num_prompt:
                if len(request.sequences) > 1:
                    self.scheduler.start_samples(request)
            if logprobs is None and request.keeps_logprobs:
                logprobs, top_logprobs = result.logprobs, result.top_logprobs
            try:
                while token >= 0:
                    if request.uses_mirostat:
                        seq.mirostat_mu = result.mirostat_mu[row]
                    if logprobs is not None and request.keeps_logprobs:
                        seq.logprobs.append((token, logprobs[row], top_logprobs[row]))
                    num_new += 1
                    seq.append(token, now)
                    row += 1
                    if row == next_row or seq.finish_reason is not None:
                        break
                    token = sampled[row]
                    if token != SKIPPED:
                        seq.num_computed += 1  # the draft was right: its keys and values are the token's
                if seq.drafts:
                    self._count_drafts(seq, row - next_row + len(seq.drafts))
                if token < 0 and token != SKIPPED:
                    self.give_up(request, why_no_token(self.core.sampler, seq, token))
                    continue
                if seq.finish_reason is None:
                    if request.stream:
                        request.report(seq)
                    continue
                self.scheduler.release(seq)
                if request.finished:
                    request.end = now
                request.report(seq)
                if request.finished:
                    self._remove(request)
            except Exception as error:  # its text cannot be made, or nobody takes it
                self.give_up(request, named(request, error))
        counters.new_tokens += num_new
        if beams:
            self._search(beams, result, now)

    def _search(self, beams: list[tuple[Beam, int]], result: Any, now: float) -> None:
        """Searches whose beams all have their candidates go on."""
        candidates, best = result.candidates, result.top_logprobs
        for beam, row in beams:
            beam.candidates, beam.best = candidates[row], best[row]
        for request in {beam.request.number: beam.request for beam, _ in beams}.values():
            if request.error is not None or not request.is_ready:
                continue
            last = request.sequences[0]
            try:
                request.advance(self.scheduler, now)
                if request.finished and request.hypotheses:
                    request.end = now
                    self._remove(request)
                elif request.finished:
                    self.give_up(request, why_no_token(self.core.sampler, last, -2))
            except Exception as error:
                self.give_up(request, named(request, error))

    def _count_drafts(self, seq: Sample, accepted: int) -> None:
        drafted, request, counters = len(seq.drafts), seq.request, self.counters
        request.draft_tokens += drafted
        request.accepted_tokens += accepted
        counters.draft_tokens += drafted
        counters.accepted_tokens += accepted
        if self.speculator is not None:
            self.speculator.drafter.learn(seq, drafted, accepted)

    def _take_scores(
        self, seq: Sequence, logprobs: list[float], tops: list[list[tuple[int, float]]]
    ) -> None:
        first, top_n, request = seq.targets[0], seq.top_n, seq.request
        for offset, value in enumerate(logprobs):
            if value != value:  # NaN
                where = f"logits of window {seq.index}" if isinstance(seq, Window) else "logits"
                self.give_up(request, not_finite(request, where, first + offset - 1))
                return
        self.counters.scored_tokens += len(logprobs)
        if isinstance(seq, Window):
            seq.logprobs.extend(logprobs)
            if top_n:
                seq.top_logprobs.extend([top[:top_n] for top in tops])
            return
        assert isinstance(seq, Sample)
        for offset, (value, top) in enumerate(zip(logprobs, tops, strict=True)):
            seq.prompt_logprobs.append((seq.token_ids[first + offset], value, top[:top_n]))

    def _advance(self, window: Window, count: int) -> None:
        window.num_computed += count
        self.counters.prompt_tokens += count
        if window.num_computed == window.num_inputs:
            window.finish("length")
            self.scheduler.release(window)
            if window.request.finished:
                self._remove(window.request)

    def _set_up(self, scheduled: Scheduled, now: float) -> None:
        """Tell the sampler the parameters of newcomers, and what the next token of constrained texts may be;
        a request that it refuses ends."""
        for seq, count in scheduled:
            if seq.slot < 0:
                continue
            request = seq.request
            try:
                if isinstance(seq, Sample):
                    if not seq.is_set_up:
                        self._set_sampler(seq)
                    if seq.constraint is not None and seq.num_computed + count == seq.num_inputs:
                        masks, allowed = seq.constraint.masks(seq.drafts)
                        seq.drafts = seq.drafts[:allowed]
                        self.core.sampler.set_mask(seq.slot, masks, allowed + 1)
            except Exception as error:
                for sibling in request.sequences:
                    if sibling.slot >= 0:
                        self.scheduler.abandon(sibling)
                self.give_up(request, named(request, error))
                continue
            seq.is_set_up = True
            if request.first_step is None:
                request.first_step = now
                self.num_waiting -= 1

    def _set_sampler(self, seq: Sample) -> None:
        params = seq.request.params
        arguments = params.sampler_arguments
        if params.sampler:
            arguments.update(token_ids=seq.token_ids, num_prompt=seq.num_prompt)
        if seq.request.uses_mirostat:
            arguments["mirostat_mu"] = seq.mirostat_mu
        self.core.sampler.set(seq.slot, sample_index=seq.index, **arguments)

    def _remove(self, request: Request) -> None:
        if request.end is None:
            request.end = time.perf_counter()
        if request.first_step is None:
            self.num_waiting -= 1
        del self.requests[request.number]
        self.ended.append(request)
        self.counters.count_request(request)

    def give_up(self, request: Request, error: Exception | None = None) -> None:
        """End a request as it is. Blocks and books come first: making its text may fail, too."""
        request.error = error
        request.end = time.perf_counter()
        unfinished = [seq for seq in request.sequences if seq.finish_reason is None]
        for seq in request.sequences:
            self.scheduler.release(seq)
        for seq in unfinished:
            try:
                seq.finish("abort")
                request.report(seq)
            except Exception as failure:
                request.error = request.error or named(request, failure)
        if self.requests.get(request.number) is request:
            self._remove(request)
