"""A request and its sequences: token ids, KV blocks, and the text that grows out of them."""

from __future__ import annotations

import time
from array import array
from collections import abc, deque

from pyengine.decoding.params import ResolvedParams
from pyengine.engine.text import Codec, TextStream
from pyengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamDelta

# What the sampler reports for one token: (id, log-probability, the n best of the same form, best first).
TokenLogprobs = tuple[int, float, list[tuple[int, float]]]


class Sequence:
    """One sample of a request. ``token_ids`` are the prompt's and the new ones, in one array.

    The first ``num_computed`` of them have their keys and values in ``blocks``; the rest run next.
    """

    __slots__ = (
        "blocks",
        "finish_reason",
        "index",
        "key",
        "logprobs",
        "num_computed",
        "num_reported",
        "request",
        "sampler_is_set",
        "shares_tail",
        "slot",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.key = (request.number, index)  # age: what the scheduler orders by
        self.token_ids = array("i", request.prompt_ids)
        self.num_computed = 0
        self.blocks = array("i")
        self.shares_tail = False  # the block written next may be another sequence's too
        self.slot = -1  # of the sampler; -1: not running
        self.sampler_is_set = False
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.num_reported = 0  # new tokens that deltas have reported
        params = request.params
        self.text: TextStream | None = None
        if request.codec is not None:
            self.text = TextStream(
                request.codec.detokenizer(request.prompt_ids, params.skip_special_tokens), params.stop
            )

    @property
    def new_token_ids(self) -> array[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    def append(self, token: int) -> None:
        """Add a sampled token and decide whether it is the last."""
        request, params = self.request, self.request.params
        self.token_ids.append(token)
        if token in params.stop_ids:
            self.finish("stop", token)  # without the text of the token itself
            return
        if self.text is not None and request.needs_text:
            stop = self.text.append((token,))
            if stop is not None:
                self.finish("stop", stop)
                return
        if len(self.token_ids) >= params.max_length:
            self.finish("length")

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.request.num_unfinished -= 1
        if self.text is None:
            return
        if not self.request.needs_text:  # all at once, now
            new = self.new_token_ids
            ends_in_stop_id = reason == "stop" and isinstance(stop_reason, int)
            self.text.append(new[:-1] if ends_in_stop_id else new)
        stop = self.text.finish()
        if stop is not None and reason != "abort":
            self.finish_reason, self.stop_reason = "stop", stop


class Request:
    """A prompt, its parameters, and ``params.n`` sequences.

    ``outbox`` collects the deltas of a streamed request for whoever consumes them; None for the others,
    whose text is decoded when it is complete, unless a stop string has to be looked for.
    """

    def __init__(
        self,
        request_id: str,
        number: int,
        prompt: str | None,
        prompt_ids: array[int],
        params: ResolvedParams,
        codec: Codec | None = None,
        stream: bool = False,
    ) -> None:
        self.id = request_id
        self.number = number  # order of arrival
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.codec = codec
        self.outbox: deque[StreamDelta] | None = deque() if stream else None
        self.needs_text = stream or bool(params.stop)
        self.error: Exception | None = None  # why the engine gave the request up; names it
        self.arrival = time.perf_counter()
        self.first_step: float | None = None
        self.first_token: float | None = None
        self.end: float | None = None
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.sequences = [Sequence(self, index) for index in range(params.n)]
        self.num_unfinished = params.n

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    def report(self, seq: Sequence) -> None:
        """Put what is new of a sequence into the outbox."""
        if self.outbox is None:
            return
        start = len(self.prompt_ids) + seq.num_reported
        new = seq.token_ids[start:].tolist()
        logprobs = None
        if self.params.logprobs >= 0:
            logprobs = self._logprobs(seq.logprobs[seq.num_reported :])
        seq.num_reported += len(new)
        self.outbox.append(
            StreamDelta(
                request_id=self.id,
                index=seq.index,
                text="" if seq.text is None else seq.text.take(),
                token_ids=new,
                logprobs=logprobs,
                finish_reason=seq.finish_reason,
                stop_reason=seq.stop_reason,
                output=self.output() if self.finished else None,
            )
        )

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids.tolist(),
            outputs=[self._completion(seq) for seq in self.sequences],
            finished=self.finished,
            metrics=self._metrics(),
        )

    def _completion(self, seq: Sequence) -> CompletionOutput:
        wanted = self.params.logprobs >= 0
        return CompletionOutput(
            index=seq.index,
            text="" if seq.text is None else seq.text.text,
            token_ids=seq.new_token_ids.tolist(),
            logprobs=self._logprobs(seq.logprobs) if wanted else None,
            cumulative_logprob=sum(entry[1] for entry in seq.logprobs) if wanted else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            seed=self.params.seed,
        )

    def _logprobs(self, entries: abc.Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
        decode = self.codec.decode_token if self.codec is not None else lambda _: ""
        result = []
        for chosen, logprob, best in entries:
            row = {token: Logprob(value, rank, decode(token)) for rank, (token, value) in enumerate(best, 1)}
            if chosen not in row:
                row[chosen] = Logprob(logprob, None, decode(chosen))
            result.append(row)
        return result

    def _metrics(self) -> RequestMetrics:
        def since_arrival(moment: float | None) -> float | None:
            return None if moment is None else moment - self.arrival

        return RequestMetrics(
            queue_time=since_arrival(self.first_step) or 0.0,
            ttft=since_arrival(self.first_token),
            total_time=since_arrival(self.end),
            prompt_tokens=len(self.prompt_ids),
            new_tokens=sum(len(seq.token_ids) - len(self.prompt_ids) for seq in self.sequences),
            cached_tokens=self.cached_tokens or 0,
            preemptions=self.preemptions,
        )
