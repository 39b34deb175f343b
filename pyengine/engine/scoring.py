"""Requests that find the log-probabilities of given tokens: windows of a text, run like any sequence."""

from __future__ import annotations

from array import array
from collections import abc

from pyengine.engine.request import Mailbox, Request, Sequence


class Window(Sequence):
    """Tokens, of which those from ``first`` on (1 or more) are scored, each given all before it.

    The last token is only a target: it does not run.
    """

    __slots__ = ("first", "logprobs", "top_logprobs")
    request: Scoring

    def __init__(self, request: Scoring, index: int, token_ids: array[int], first: int) -> None:
        super().__init__(request, index, token_ids, len(token_ids) - 1)
        self.first = first
        self.logprobs: list[float] = []  # of token_ids[first:], as far as they are known
        self.top_logprobs: list[list[tuple[int, float]]] = []  # best first

    @property
    def targets(self) -> tuple[int, int]:
        """What is scored stays scored when the window loses its blocks."""
        return self.first + len(self.logprobs), len(self.token_ids)

    @property
    def top_n(self) -> int:
        return self.request.top_n


class Scoring(Request):
    """One text, in one window or several. ``top_n``: also the best tokens at each place, 0 to 64."""

    __slots__ = ("top_n",)
    sequences: list[Window]

    def __init__(
        self,
        request_id: str,
        number: int,
        windows: abc.Sequence[tuple[array[int], int]],  # token ids, the first that is scored
        top_n: int = 0,
        *,
        priority: int = 0,
        mailbox: Mailbox | None = None,
    ) -> None:
        super().__init__(request_id, number, priority, mailbox)
        self.top_n = top_n
        self.sequences = [Window(self, index, ids, first) for index, (ids, first) in enumerate(windows)]
        self.num_unfinished = len(self.sequences)
        self.ended = not self.sequences  # there is nothing to score

    @property
    def num_scored(self) -> int:
        return sum(len(window.logprobs) for window in self.sequences)

    def why_refused(self, num_blocks: int, needed: int) -> str:
        return (
            f"scoring {self.length + 1} tokens at once needs {needed} blocks of 16 tokens, "
            f"and the whole KV cache has {num_blocks}: give the LLM a larger kv_cache_memory"
        )


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
