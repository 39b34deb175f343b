"""Requests that continue a prompt: samples, and the text that grows out of them."""

from __future__ import annotations

from array import array
from collections import abc
from typing import TYPE_CHECKING, Any

from pyengine._C import TextStream
from pyengine.decoding.resolve import ResolvedParams
from pyengine.engine.request import Mailbox, Request, Sequence, TokenLogprobs
from pyengine.engine.text import Codec
from pyengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamDelta


class Sample(Sequence):
    """One of the ``n`` continuations. ``token_ids`` are the prompt's and the new ones, in one array."""

    __slots__ = (
        "constraint",
        "drafter",
        "drafts",
        "logprobs",
        "mirostat_mu",
        "num_reported",
        "prompt_logprobs",
        "stop_reason",
        "text",
    )
    request: Generation
    draws = True

    def __init__(self, request: Generation, index: int) -> None:
        super().__init__(request, index, request.prompt_ids[:], len(request.prompt_ids))
        self.stop_reason: str | int | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's tokens from the second on
        self.drafts: abc.Sequence[int] = ()
        self.drafter: Any = None  # what the engine's drafter remembers of it
        self.mirostat_mu: float | None = None  # what Mirostat goes on with after preemption
        self.num_reported = 0  # new tokens that deltas have reported
        params = request.params
        self.constraint = None if params.constraint is None else params.constraint.copy()
        self.text: TextStream | None = None
        if request.codec is not None:
            self.text = TextStream(
                request.codec.detokenizer(request.prompt_ids, params.skip_special_tokens),
                params.stop,
                include_stop=params.include_stop,
                text=request.echo,
            )

    @property
    def targets(self) -> tuple[int, int]:
        """The tokens of the prompt, where they are asked for: the first sample finds them for all."""
        if self.request.params.prompt_logprobs < 0 or self.index > 0:
            return 0, 0
        return 1 + len(self.prompt_logprobs), self.num_prompt

    @property
    def top_n(self) -> int:
        return max(self.request.params.prompt_logprobs, 0)

    @property
    def waits(self) -> bool:
        """The samples of a request wait until the first of them has computed the prompt."""
        if self.index == 0:
            return False
        first = self.request.sequences[0]
        return first.finish_reason is None and first.num_computed < first.num_prompt

    @property
    def takes_drafts(self) -> bool:
        """A logits processor is the caller's: it is asked about tokens that have come, not about guesses."""
        return "processor" not in self.request.params.sampler

    @property
    def new_token_ids(self) -> array[int]:
        return self.token_ids[self.num_prompt :]

    def append(self, token: int, now: float) -> None:
        """Add a sampled token and decide whether it is the last."""
        request = self.request
        params = request.params
        self.token_ids.append(token)
        self.num_inputs = length = self.num_inputs + 1
        if now != request.last_token:
            request.count_token(now)
        if token in params.stop_ids:
            if params.include_stop and self.text is not None and request.needs_text:
                self.text.append(token, False)
            self.finish("stop", token)
            return
        if self.text is not None and request.needs_text:
            stop = self.text.append(token, length - self.num_prompt > params.min_tokens)
            if stop is not None:
                self.finish("stop", stop)
                return
        if self.constraint is not None and self.constraint.take(token):
            self.finish("stop")
        elif length >= params.max_length:
            self.finish("length")

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        super().finish(reason)
        self.stop_reason = stop_reason
        if self.text is None:
            return
        if not self.request.needs_text:  # all at once, now
            new = self.new_token_ids
            ends_in_stop_id = reason == "stop" and isinstance(stop_reason, int)
            without_it = ends_in_stop_id and not self.request.params.include_stop
            self.text.append(new[:-1] if without_it else new)
        stop = self.text.finish()
        if stop is not None and reason != "abort":
            self.finish_reason, self.stop_reason = "stop", stop


class Generation(Request):
    """A prompt, its parameters, and ``params.n`` samples.

    With ``stream``, the mailbox gets a delta for each token of each sample. The text of the others is decoded
    when it is complete, unless a stop string has to be looked for.
    """

    __slots__ = (
        "accepted_tokens",
        "codec",
        "draft_tokens",
        "echo",
        "first_token",
        "keeps_logprobs",
        "last_token",
        "longest_gap",
        "needs_text",
        "num_token_steps",
        "params",
        "prompt",
        "prompt_ids",
        "prompt_logprobs",
        "stream",
        "uses_mirostat",
    )
    sequences: list[Sample]

    def __init__(
        self,
        request_id: str,
        number: int,
        prompt: str | None,
        prompt_ids: array[int],
        params: ResolvedParams,
        codec: Codec | None = None,
        *,
        echo: str = "",
        priority: int = 0,
        stream: bool = False,
        mailbox: Mailbox | None = None,
    ) -> None:
        super().__init__(request_id, number, priority, mailbox)
        self.echo = echo  # what its texts begin with
        self.keeps_logprobs = params.logprobs >= 0 or params.num_returned is not None
        self.uses_mirostat = "mirostat_tau" in params.sampler
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.codec = codec
        self.stream = stream
        self.needs_text = stream or bool(params.stop)
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.num_token_steps = 0  # steps that gave it a token
        self.longest_gap: float | None = None  # between two of them, seconds
        self.draft_tokens = self.accepted_tokens = 0  # guessed, and right
        self.sequences = [Sample(self, index) for index in range(params.n)]
        self.prompt_logprobs = self.sequences[0].prompt_logprobs
        self.num_unfinished = params.n

    @property
    def length(self) -> int:
        return self.params.max_length - 1  # the last token is drawn, never fed back

    @property
    def num_new_tokens(self) -> int:
        return sum(len(seq.token_ids) - seq.num_prompt for seq in self.sequences)

    def why_refused(self, num_blocks: int, needed: int) -> str:
        new = self.params.max_length - len(self.prompt_ids)
        return (
            f"the prompt's {len(self.prompt_ids)} tokens and up to {new} new ones need {needed} "
            f"blocks of 16 tokens, and the whole KV cache has {num_blocks}: "
            "lower max_tokens, or give the LLM a larger kv_cache_memory"
        )

    def count_token(self, now: float) -> None:
        """A step that ended at ``now`` gave it a token, or one to each of several samples."""
        self.num_token_steps += 1
        last, self.last_token = self.last_token, now
        if last is None:
            self.first_token = now
        elif self.longest_gap is None or now - last > self.longest_gap:
            self.longest_gap = now - last

    def report(self, seq: Sequence) -> None:
        """Send what is new of a sample."""
        if not self.stream or self.mailbox is None:
            return
        if TYPE_CHECKING:
            assert isinstance(seq, Sample)
        new = [seq.token_ids[-1]]
        begin = seq.num_prompt + seq.num_reported
        if begin != seq.num_inputs - 1:
            new = seq.token_ids[begin:].tolist()
        logprobs = None
        if self.keeps_logprobs and self.params.logprobs >= 0:
            logprobs = self._logprobs(seq.logprobs[seq.num_reported :])
        seq.num_reported += len(new)
        text = "" if seq.text is None else seq.text.take()
        output = self.output() if self.num_unfinished == 0 else None
        # Positions, not keywords: this runs for every token of every stream.
        self.mailbox.put(
            StreamDelta(self.id, seq.index, text, new, logprobs, seq.finish_reason, seq.stop_reason, output)
        )

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids.tolist(),
            outputs=[self._completion(seq, index) for index, seq in enumerate(self._returned())],
            prompt_logprobs=self._prompt_logprobs(),
            finished=self.finished,
            metrics=self._metrics(),
        )

    def _returned(self) -> list[Sample]:
        """All samples, or the likeliest ones, best first."""
        if self.params.num_returned is None:
            return self.sequences
        ranked = sorted(self.sequences, key=lambda seq: -_total(seq.logprobs))
        return ranked[: self.params.num_returned]

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.params.prompt_logprobs < 0:
            return None
        return [None, *self._logprobs(self.prompt_logprobs)]

    def _completion(self, seq: Sample, index: int) -> CompletionOutput:
        wanted = self.params.logprobs >= 0
        return CompletionOutput(
            index=index,
            text="" if seq.text is None else seq.text.text,
            token_ids=seq.new_token_ids.tolist(),
            logprobs=self._logprobs(seq.logprobs) if wanted else None,
            cumulative_logprob=_total(seq.logprobs) if self.keeps_logprobs else None,
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

        mean_gap = None
        if self.num_token_steps > 1 and self.last_token is not None and self.first_token is not None:
            mean_gap = (self.last_token - self.first_token) / (self.num_token_steps - 1)
        return RequestMetrics(
            queue_time=since_arrival(self.first_step) or 0.0,
            ttft=since_arrival(self.first_token),
            total_time=since_arrival(self.end),
            prompt_tokens=len(self.prompt_ids),
            new_tokens=self.num_new_tokens,
            cached_tokens=self.cached_tokens or 0,
            preemptions=self.preemptions,
            arrival_time=self.arrival_time,
            inter_token_latency=mean_gap,
            max_inter_token_latency=self.longest_gap,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )


def _total(entries: abc.Sequence[TokenLogprobs]) -> float:
    return sum(entry[1] for entry in entries)
