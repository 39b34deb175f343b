"""A smaller model that guesses tokens ahead of the model that is asked.

It draws with the parameters and the random numbers of the request, each position with its own, so that the
two models draw the same token wherever they largely agree, and not only where the likeliest token is drawn.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from pyengine.engine.generation import Sample
from pyengine.engine.scheduler import blocks_for
from pyengine.engine.speculation import Guess, StepCosts
from pyengine.errors import OutOfMemory

_PAUSE = 32  # steps without drafts before one tries again whether they pay now
_MOST_TRIALS = 64.0  # drafts that a rate of acceptance remembers


@dataclass
class _Text:
    """What the draft model has computed of a sample."""

    sample: Sample
    token_ids: array[int] = field(default_factory=lambda: array("i"))  # that have keys and values
    blocks: array[int] = field(default_factory=lambda: array("i"))

    def follow(self) -> None:
        """Forget what does not begin the sample's text: drafts that were wrong."""
        known, text = self.token_ids, self.sample.token_ids
        same = min(len(known), len(text) - 1)  # the last token runs, for what follows it
        while known[:same] != text[:same]:
            same -= 1
        del known[same:]


@dataclass
class _Rate:
    """How often the drafts of a sample are right; assumed to be like those of the others at first."""

    right: float
    trials: float

    @property
    def share(self) -> float:
        return self.right / self.trials

    def count(self, right: int, trials: int) -> None:
        self.right += right
        self.trials += trials
        if self.trials > _MOST_TRIALS:
            self.right *= 0.5
            self.trials *= 0.5


class DraftModel:
    """Guesses with a model of its own, which has keys and values of its own; see ``Drafter``."""

    def __init__(self, core: Any, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """``core``: an engine's ``Core``, for the small model."""
        self._core = core
        self._max_model_len = max_model_len
        self._max_batch = max_num_batched_tokens
        self._texts: list[_Text | None] = [None] * max_num_seqs  # by slot of the sample
        self._all = _Rate(2.8, 4.0)
        self._seconds = 0.0  # of one round that adds a draft to every sample
        self._rounds = 0
        self._paused = 0

    def guess(self, samples: list[tuple[Sample, int]], costs: StepCosts) -> list[list[Guess]]:
        length = self._length(samples, costs)
        guesses: list[list[Guess]] = [[] for _ in samples]
        open_ones: list[tuple[int, _Text]] = []
        for number, (sample, most) in enumerate(samples):
            text = self._text(sample, min(length, most)) if length else None
            if text is not None:
                open_ones.append((number, text))
        for text_round in range(length):
            open_ones = [
                one for one in open_ones if text_round < min(length, samples[one[0]][1])
                and len(guesses[one[0]]) == text_round
            ]  # fmt: skip
            if not open_ones:
                break
            begin = time.perf_counter()
            self._run(open_ones, guesses)
            if text_round > 0:  # the first also computes what is new of the texts
                self._rounds += 1
                self._seconds += (time.perf_counter() - begin - self._seconds) / min(self._rounds, 16)
        return guesses

    def forget(self) -> None:
        """It looks at nothing but the text that it drafts for."""

    def learn(self, sample: Sample, drafted: int, accepted: int) -> None:
        trials = min(accepted + 1, drafted)
        self._rate(sample).count(accepted, trials)
        self._all.count(accepted, trials)

    def _rate(self, sample: Sample) -> _Rate:
        if sample.drafter is None:
            sample.drafter = _Rate(4 * self._all.share, 4.0)
        rate: _Rate = sample.drafter
        return rate

    def _length(self, samples: list[tuple[Sample, int]], costs: StepCosts) -> int:
        """How many rounds yield most tokens a second."""
        longest = max(most for _, most in samples)
        step = costs.seconds(len(samples))
        if step is None or self._rounds == 0:
            return longest
        times = costs.of_drafts(len(samples), longest * len(samples))
        best, length = len(samples) / step, 0
        tokens = float(len(samples))
        shares = [self._rate(sample).share for sample, _ in samples]
        for rounds in range(1, longest + 1):
            tokens += sum(share**rounds for share in shares)
            rate = tokens / (step * times[rounds * len(samples)] + rounds * self._seconds)
            if rate > best:
                best, length = rate, rounds
        if length:
            self._paused = 0
            return length
        self._paused += 1
        return 1 if self._paused % _PAUSE == 0 else 0

    def _text(self, sample: Sample, drafts: int) -> _Text | None:
        """The sample's, with blocks for so many drafts; None where they do not fit."""
        text = self._texts[sample.slot]
        if text is None or text.sample is not sample:
            self._free(sample.slot)
            text = self._texts[sample.slot] = _Text(sample)
        text.follow()
        length = len(sample.token_ids) + drafts - 1
        missing = blocks_for(length) - len(text.blocks)
        if length > self._max_model_len:
            return None
        if missing > 0:
            if self._core.manager.num_available < missing:
                for slot, other in enumerate(self._texts):
                    if other is not None and other.sample.slot != slot:
                        self._free(slot)  # of one that has ended, or was preempted
            try:
                text.blocks.extend(self._core.manager.allocate(missing))
            except OutOfMemory:
                return None
        arguments = dict(sample.request.params.sampler_arguments)
        arguments.update(logprobs=-1, token_ids=sample.token_ids, num_prompt=sample.num_prompt)
        arguments.pop("replay", None)
        if sample.mirostat_mu is not None:
            arguments["mirostat_mu"] = sample.mirostat_mu
        self._core.sampler.set(sample.slot, sample_index=sample.index, **arguments)
        return text

    def _free(self, slot: int) -> None:
        text = self._texts[slot]
        if text is not None:
            self._core.manager.free(text.blocks.tolist())
            self._texts[slot] = None

    def _run(self, texts: list[tuple[int, _Text]], guesses: list[list[Guess]]) -> None:
        """Add a draft to the guesses of each text; long ones take several steps."""
        pending = list(texts)
        while pending:
            room = self._max_batch
            batch: list[tuple[int, _Text, array[int]]] = []
            while pending and room > 0:
                number, text = pending.pop(0)
                whole = text.sample.token_ids + array("i", [token for token, _ in guesses[number]])
                known = len(text.token_ids)
                new = whole[known : known + room]
                room -= len(new)
                batch.append((number, text, new))
                if known + len(new) < len(whole):
                    pending.insert(0, (number, text))
                    break
            self._step(batch, guesses)

    def _step(self, batch: list[tuple[int, _Text, array[int]]], guesses: list[list[Guess]]) -> None:
        core = self._core
        tokens, positions, table = array("i"), array("i"), array("i")
        query_start, context_len, slots = array("i", (0,)), array("i"), array("i")
        width = max(len(text.blocks) for _, text, _ in batch)
        drawing = []
        for number, text, new in batch:
            begin = len(text.token_ids)
            tokens.extend(new)
            text.token_ids.extend(new)
            end = len(text.token_ids)
            positions.extend(range(begin, end))
            query_start.append(len(tokens))
            context_len.append(end)
            table.extend(text.blocks)
            table.extend([0] * (width - len(text.blocks)))
            is_whole = end == len(text.sample.token_ids) + len(guesses[number])
            slots.append(text.sample.slot if is_whole else -1)
            if is_whole:
                drawing.append((number, text))
        made = core.batch(tokens, positions, query_start, context_len, table)
        result = core.model.step(core.kv, core.sampler, made, slots)
        for (number, text), token in zip(drawing, result.token_ids, strict=True):
            if token < 0:
                continue  # it knows nothing; the model that is asked may
            before = guesses[number][-1][1] if guesses[number] else 1.0
            guesses[number].append((token, before * self._rate(text.sample).share))
