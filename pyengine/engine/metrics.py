"""What an engine has done so far, and how fast it does it now."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyengine.engine.request import Request

_WINDOW = 10.0  # seconds over which rates are taken


class Counters:
    """Since the engine was made; times are those of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.steps = 0
        self.failed_steps = 0  # whose sequences ran once more, each alone
        self.busy_time = 0.0  # seconds in steps
        self.prompt_tokens = 0  # that ran, scored texts included
        self.new_tokens = 0
        self.scored_tokens = 0
        self.draft_tokens = self.accepted_tokens = 0  # guessed ahead of the model, and right
        self.finished = self.aborted = self.failed = 0  # requests
        # (time, prompt_tokens, new_tokens) at most ten times per second, over a little more than the window
        self._marks: deque[tuple[float, int, int]] = deque()
        self._before = (0, 0)  # prompt_tokens, new_tokens before the step that runs

    def count_step(self, begin: float, end: float) -> None:
        self.steps += 1
        self.busy_time += end - begin
        marks = self._marks
        if not marks or end - marks[-1][0] >= _WINDOW / 100:
            if not marks or begin - marks[-1][0] > _WINDOW:
                marks.append((begin, *self._before))
            marks.append((end, self.prompt_tokens, self.new_tokens))
            while marks[1][0] < end - _WINDOW:
                marks.popleft()
        self._before = (self.prompt_tokens, self.new_tokens)

    def count_request(self, request: Request) -> None:
        if request.error is not None:
            self.failed += 1
        elif any(seq.finish_reason == "abort" for seq in request.sequences):
            self.aborted += 1
        else:
            self.finished += 1

    def rates(self, now: float) -> tuple[float, float]:
        """Prompt tokens and new tokens per second over the last ten seconds, pauses included."""
        recent = [mark for mark in list(self._marks) if mark[0] >= now - _WINDOW]
        if not recent or now <= recent[0][0]:
            return 0.0, 0.0
        seconds = now - recent[0][0]
        return (
            (self.prompt_tokens - recent[0][1]) / seconds,
            (self.new_tokens - recent[0][2]) / seconds,
        )
