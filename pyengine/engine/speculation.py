"""Guessing tokens ahead of the model, so that one step yields several of them.

The guesses (drafts) of a sequence run in the same step as its last token, and the sampler draws at each of
them as it would have drawn in a step of its own: with the same logits, the same state and the random number
of that position. As long as what is drawn is what was guessed, the next draw counts. So the text is the same
with and without drafts, whatever they are; only how many steps it takes depends on them.

How many drafts run is decided from how likely each is to be right, and from what steps have cost so far.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Protocol

from pyengine.engine.generation import Sample
from pyengine.engine.request import Sequence
from pyengine.engine.scheduler import Scheduler

# A draft, and how likely it and all before it are right.
Guess = tuple[int, float]


class Drafter(Protocol):
    """What guesses: ``NgramDrafting``, or ``DraftModel`` (draft_model.py)."""

    def guess(self, samples: list[tuple[Sample, int]], costs: StepCosts) -> list[list[Guess]]:
        """For each sample, at most so many tokens that follow it."""

    def learn(self, sample: Sample, drafted: int, accepted: int) -> None:
        """So many of a sample's drafts were right."""

    def forget(self) -> None:
        """Texts that have ended count no more."""


class NgramDrafting:
    """Guesses what followed the same tokens before: in the same text, and, if shared, in all others."""

    def __init__(
        self,
        make: Any,
        min_context: int,
        max_context: int,
        make_shared: Callable[[], Any] | None = None,
        find_numbers: Callable[[], Any] | None = None,
    ) -> None:
        """``make``: _C.NgramDrafter; ``make_shared``: makes a _C.SharedFollowers; ``find_numbers``: makes the
        _C.NumberTokens of the vocabulary, asked for when the first guess is made."""
        self._make = make
        self._make_shared = make_shared
        self._find_numbers = find_numbers
        self._numbers: Any = None
        self._contexts = (min_context, max_context)
        self.forget()

    def guess(self, samples: list[tuple[Sample, int]], costs: StepCosts) -> list[list[Guess]]:
        if self._find_numbers is not None:
            self._numbers, self._find_numbers = self._find_numbers(), None
        least = costs.least_probability(len(samples))
        found = []
        for sample, most in samples:
            if sample.drafter is None:
                sample.drafter = self._make(*self._contexts, self._shared, self._numbers)
            drafter = sample.drafter
            drafter.extend(sample.token_ids[drafter.num_tokens :])
            found.append(drafter.draft(most, least))
        return found

    def learn(self, sample: Sample, drafted: int, accepted: int) -> None:
        """It learns from the text itself, what was not drafted included."""

    def forget(self) -> None:
        self._shared = None if self._make_shared is None else self._make_shared()


class StepCosts:
    """Seconds of a step by the number of sequences and of drafts, as measured; what was measured long ago
    counts for less and less."""

    _SLOPE = 0.01  # of a step without drafts: what a draft is taken to cost before it is known
    _DECAY = 0.98  # of a measurement's weight, per step
    _DOUBT = 0.25  # measurements that outweigh no more than what fewer drafts make likely
    _MOST = 10.0  # measurements that an estimate remembers

    def __init__(self) -> None:
        self._levels: dict[int, float] = {}  # sequences: seconds without drafts, from steps of any number
        self._measured: dict[int, dict[int, tuple[float, float, int]]] = {}  # mean, weight, when
        self._ratios: dict[int, list[float]] = {}  # what of_drafts said last
        self._now = 0

    def measure(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        self._now += 1
        ratios = self._ratios.get(num_seqs, ())
        plain = seconds / (ratios[num_drafts] if num_drafts < len(ratios) else 1 + self._SLOPE * num_drafts)
        level = self._levels.get(num_seqs)
        self._levels[num_seqs] = plain if level is None else level + (min(plain, 2 * level) - level) / 16
        table = self._measured.setdefault(num_seqs, {})
        place = _place(num_drafts)
        mean, weight, then = table.get(place, (seconds, 0.0, self._now))
        weight = min(weight * self._DECAY ** (self._now - then), self._MOST - 1)
        if weight > 1:
            seconds = min(seconds, 2 * mean)  # somebody else had the processor
        table[place] = ((mean * weight + seconds) / (weight + 1), weight + 1, self._now)

    def of_drafts(self, num_seqs: int, most: int) -> list[float]:
        """The time of steps with 0 to ``most`` drafts, as a multiple of one without any."""
        level = self._levels.get(num_seqs)
        if level is None:
            return [1 + self._SLOPE * drafts for drafts in range(most + 1)]
        table = self._measured[num_seqs]
        found: list[float] = []
        expected, last = level, -1
        for drafts in range(most + 1):
            if (place := _place(drafts)) != last:
                last = place
                mean, weight, then = table.get(place, (0.0, 0.0, self._now))
                weight *= self._DECAY ** (self._now - then)
                doubt = self._DOUBT if drafts else self._DOUBT / 16  # a level is less sure than that
                estimate = (mean * weight + expected * doubt) / (weight + doubt)
                expected = max(estimate, found[-1] if found else 0.0)
            else:
                expected += self._SLOPE * level
            found.append(expected)
            if drafts + 1 <= most and _place(drafts + 1) != last:
                expected += self._SLOPE * level
        ratios = self._ratios[num_seqs] = [seconds / found[0] for seconds in found]
        return ratios

    def seconds(self, num_seqs: int) -> float | None:
        """Of a step without drafts; None: not known yet."""
        return self._levels.get(num_seqs)

    def least_probability(self, num_seqs: int) -> float:
        """Drafts less likely than this are not worth a look."""
        times = self.of_drafts(num_seqs, 1)
        return min(max(0.5 * num_seqs * (times[1] - 1), 0.01), 0.5)

    def choose(self, probabilities: list[list[float]], num_seqs: int, most: int) -> list[int]:
        """How many of each sequence's drafts to run, ``most`` in all: those that yield most tokens a second.

        probabilities: by sequence, falling.
        """
        ranked = sorted(
            ((p, index) for index, ones in enumerate(probabilities) for p in ones), key=lambda one: -one[0]
        )[:most]
        times = self.of_drafts(num_seqs, len(ranked))
        tokens = best = float(num_seqs)
        number = 0
        for drafts, (probability, _) in enumerate(ranked, 1):
            tokens += probability
            if tokens / times[drafts] > best:
                best, number = tokens / times[drafts], drafts
        chosen = [0] * len(probabilities)
        for _, index in ranked[:number]:
            chosen[index] += 1
        return chosen


def _place(drafts: int) -> int:
    """Where measurements of so many drafts are kept: many are not told apart as finely as few."""
    return drafts if drafts < 16 else 12 + drafts // 4 if drafts < 64 else 24 + drafts // 16


class Speculator:
    """Gives drafts to the sequences of a step."""

    def __init__(self, drafter: Drafter, max_drafts: int) -> None:
        self.drafter = drafter
        self.max_drafts = max_drafts  # of a sequence
        self.costs = StepCosts()

    def propose(self, scheduled: list[tuple[Sequence, int]], scheduler: Scheduler) -> None:
        """Set the drafts of everyone who draws. They take what others leave: tokens of the step, and blocks
        beyond one for each that runs."""
        open_ones: list[tuple[Sample, int]] = []
        room = scheduler.max_num_batched_tokens
        for seq, count in scheduled:
            room -= count
            if not isinstance(seq, Sample):
                continue
            seq.drafts = ()
            if count > 1 or seq.num_computed + 1 < seq.num_inputs or not seq.takes_drafts:
                continue
            # The last token is drawn, never fed back.
            most = min(seq.request.params.max_length - 1 - seq.num_inputs, self.max_drafts)
            if most > 0:
                open_ones.append((seq, most))
        if not open_ones or room <= 0:
            return
        guesses = [
            _before_stop(seq, ones)
            for (seq, _), ones in zip(open_ones, self.drafter.guess(open_ones, self.costs), strict=True)
        ]
        chosen = self.costs.choose([[p for _, p in ones] for ones in guesses], len(scheduled), room)
        for (seq, _), ones, number in zip(open_ones, guesses, chosen, strict=True):
            if number:
                number = scheduler.reserve_drafts(seq, number)
                seq.drafts = array("i", [token for token, _ in ones[:number]])

    def measure(self, scheduled: list[tuple[Sequence, int]], seconds: float) -> None:
        """A step has run. Only steps without prompts tell what drafts cost."""
        num_drafts = 0
        for seq, count in scheduled:
            if count > 1:
                return
            num_drafts += len(seq.drafts)
        self.costs.measure(len(scheduled), num_drafts, seconds)


def _before_stop(sample: Sample, guesses: list[Guess]) -> list[Guess]:
    """Nothing that is drawn after a stop token counts."""
    stop_ids = sample.request.params.stop_ids
    if stop_ids:
        for place, (token, _) in enumerate(guesses):
            if token in stop_ids:
                return guesses[:place]
    return guesses
