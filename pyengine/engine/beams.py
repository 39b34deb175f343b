"""Beam search: a request whose sequences are the beams of one search.

The rules are those of transformers 4.57.6 (``GenerationMixin._beam_search``). Beams run like any sequences;
one that has its candidates waits until all have theirs (``Beam.waits``), be it preempted meanwhile, and then
the search decides which beams go on. Beams that go on from the same one share its blocks until they write.
"""

from __future__ import annotations

from collections import abc
from heapq import nlargest
from typing import Any, Protocol

from pyengine.decoding.resolve import BeamParams
from pyengine.engine.generation import Generation, Sample
from pyengine.engine.request import Sequence
from pyengine.outputs import CompletionOutput

BeamCandidate = tuple[int, float, float]  # token id, edited log-probability, the model's


class Blocks(Protocol):
    """``Scheduler``, as far as a search knows it."""

    def branch(self, seq: Sequence, heirs: abc.Sequence[Sequence], /) -> None: ...


class Beam(Sample):
    """A continuation that is being searched, or one that is complete (a hypothesis)."""

    __slots__ = ("best", "candidates", "score", "sum_score")
    request: BeamSearch

    def __init__(self, request: BeamSearch, index: int) -> None:
        super().__init__(request, index)
        self.sum_score = 0.0  # of the edited log-probabilities
        self.score: float | None = None  # of a hypothesis: by its length, too
        self.candidates: list[BeamCandidate] | None = None  # best first, once they are known
        self.best: list[tuple[int, float]] = []  # tokens by the model's log-probability, beside them

    @property
    def takes_drafts(self) -> bool:
        return False  # nothing is drawn that a guess could be compared with

    @property
    def waits(self) -> bool:
        return self.candidates is not None

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        if self.text is not None and not self.request.needs_text:
            self.text = self.text.copy()  # the other beams still need it as it is
        super().finish(reason, stop_reason)

    def extended(self, candidate: BeamCandidate, now: float) -> Beam:
        """This beam with one more token; with a finish_reason if that was its last."""
        token, score, logprob = candidate
        heir: Beam = object.__new__(Beam)
        Sequence.__init__(heir, self.request, self.index, self.token_ids[:], self.num_inputs)
        heir.num_prompt = self.num_prompt
        heir.key = self.key
        heir.stop_reason = None
        heir.mirostat_mu = None
        heir.num_reported = 0
        heir.prompt_logprobs = self.prompt_logprobs
        heir.drafts, heir.drafter = (), None
        heir.constraint = None if self.constraint is None else self.constraint.copy()
        heir.text = self.text
        if self.text is not None and self.request.needs_text:
            heir.text = self.text.copy()
        heir.sum_score = self.sum_score + score
        heir.score = heir.candidates = None
        heir.best = []
        heir.logprobs = []
        if self.request.keeps_logprobs:
            heir.logprobs = [*self.logprobs, (token, logprob, self.best)]
        heir.append(token, now)
        return heir


class BeamSearch(Generation):
    """A prompt and the search for its best continuations. ``sequences``: the beams that run, best first."""

    __slots__ = ("hypotheses", "rules")
    sequences: list[Beam]  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.params.beams is not None
        self.rules: BeamParams = self.params.beams
        self.sequences = [Beam(self, 0)]
        self.prompt_logprobs = self.sequences[0].prompt_logprobs
        self.num_unfinished = 1
        self.hypotheses: list[Beam] = []  # the best complete ones, best first

    @property
    def is_ready(self) -> bool:
        """All beams have their candidates."""
        return self.num_unfinished > 0 and all(beam.candidates is not None for beam in self.sequences)

    @property
    def num_new_tokens(self) -> int:
        return sum(len(beam.token_ids) - beam.num_prompt for beam in self._returned())

    def advance(self, blocks: Blocks, now: float) -> None:
        """From the candidates of all beams to the beams of the next token, or the end of the search."""
        width, beams = self.rules.num_beams, self.sequences
        found = [
            (beam.sum_score + candidate[1], -place, beam, candidate)
            for place, beam in enumerate(beams)
            for candidate in beam.candidates or ()
        ]
        running: list[Beam] = []
        heirs: dict[int, list[Beam]] = {beam.index: [] for beam in beams}
        for rank, (_, _, beam, candidate) in enumerate(nlargest(self.rules.num_candidates, found, _score)):
            if rank >= width and len(running) == width:
                break
            heir = beam.extended(candidate, now)
            if heir.finish_reason is None:
                if len(running) < width:
                    running.append(heir)
                    heirs[beam.index].append(heir)
            elif rank < width:  # the others are only there to keep the search going
                heir.score = self._by_length(heir.sum_score, len(heir.token_ids) - heir.num_prompt)
                self.hypotheses.append(heir)
        self.hypotheses = nlargest(width, self.hypotheses, key=lambda beam: beam.score or 0.0)
        if not running or not self._may_improve(running[0]):
            heirs, running = {}, []
        for index, beam in enumerate(running):
            beam.index = index
            beam.key = (*beam.key[:2], index)
        # Those without heirs first: what they leave is room for the others.
        for beam in sorted(beams, key=lambda beam: bool(heirs.get(beam.index))):
            blocks.branch(beam, heirs.get(beam.index, ()))
        self.sequences, self.num_unfinished = running, len(running)

    def _may_improve(self, best: Beam) -> bool:
        """Whether going on could still change what is returned, as ``early_stopping`` judges that."""
        if len(self.hypotheses) < self.rules.num_beams:
            return True
        if self.rules.early_stopping is True:
            return False
        length = len(best.token_ids) - best.num_prompt
        if self.rules.early_stopping == "never" and self.rules.length_penalty > 0:
            length = self.params.max_length - best.num_prompt
        worst = self.hypotheses[-1].score
        assert worst is not None
        return self._by_length(best.sum_score, length) > worst

    def _by_length(self, sum_score: float, length: int) -> float:
        return float(sum_score / length**self.rules.length_penalty)

    def _returned(self) -> abc.Sequence[Beam]:  # type: ignore[override]
        """The best hypotheses; where the search was ended before its time, unfinished beams after them."""
        return [*self.hypotheses, *self.sequences][: self.rules.num_returned]

    def _completion(self, seq: Sample, index: int) -> CompletionOutput:
        output = super()._completion(seq, index)
        assert isinstance(seq, Beam)
        length = len(output.token_ids)
        output.score = seq.score
        if seq.score is None and length:
            output.score = self._by_length(seq.sum_score, length)
        return output


def _score(entry: tuple[float, int, Beam, BeamCandidate]) -> tuple[float, int]:
    return entry[:2]
