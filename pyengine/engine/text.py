"""From token ids to text as it may be shown: stop strings are found across token borders and never shown."""

from __future__ import annotations

from collections import abc
from copy import copy
from typing import Protocol


class Detokenizer(Protocol):
    """``pyengine.model.detokenizer.StreamingDetokenizer``, as far as the engine knows it."""

    def append(self, ids: abc.Sequence[int]) -> str: ...
    def finish(self) -> str: ...
    def copy(self) -> Detokenizer: ...


class Codec(Protocol):
    """Makes text of token ids; a request has none where its checkpoint has no tokenizer."""

    def detokenizer(self, prompt_ids: abc.Sequence[int], skip_special_tokens: bool) -> Detokenizer: ...
    def decode_token(self, token_id: int) -> str: ...


class TextStream:
    """The text of one sequence. What could be the beginning of a stop string is held back by ``take``."""

    __slots__ = (
        "_beginnings",
        "_detokenizer",
        "_finished",
        "_firsts",
        "_lasts",
        "_include_stop",
        "_overlap",
        "_searched_from",
        "_shown",
        "_stop",
        "text",
    )

    def __init__(
        self, detokenizer: Detokenizer, stop: tuple[str, ...], *, include_stop: bool = False, text: str = ""
    ) -> None:
        """``include_stop``: the text is cut after a stop string, not before it. ``text``: what it begins
        with, in which no stop string is looked for."""
        self.text = text
        self._searched_from = len(text)
        self._include_stop = include_stop
        self._detokenizer = detokenizer
        self._stop = stop
        self._overlap = max(map(len, stop), default=1) - 1  # characters of a stop string already here
        # Proper beginnings of the stop strings by length, longest first: what the end of the text may be.
        self._beginnings = [
            tuple({s[:length] for s in stop if len(s) > length}) for length in range(self._overlap, 0, -1)
        ]
        # Few tokens hold a character that a stop string begins or ends with: the others need no search.
        self._firsts = tuple({s[0] for s in stop})
        self._lasts = tuple({s[-1] for s in stop})
        self._shown = 0
        self._finished = False

    def copy(self) -> TextStream:
        """The same text, to go on with on its own."""
        made = copy(self)
        made._detokenizer = self._detokenizer.copy()
        return made

    def append(self, ids: abc.Sequence[int], *, may_stop: bool = True) -> str | None:
        """Add tokens; the stop string that ends the text, which is cut there, or None. Text that comes with
        ``may_stop`` false is no part of a stop string."""
        return self._extend(self._detokenizer.append(ids), may_stop)

    def finish(self) -> str | None:
        """No more tokens: incomplete characters come out as they are. May complete a stop string."""
        if self._finished:
            return None
        stop = self._extend(self._detokenizer.finish())
        self._finished = True
        return stop

    def take(self) -> str:
        """Text that may be shown and was not taken before."""
        text = self.text
        end = len(text)
        if self._overlap and not self._finished:
            tail = text[-self._overlap :]
            for first in self._firsts:
                if first in tail:
                    end -= self._held_back(tail)
                    break
        if end <= self._shown:
            return ""
        new = text[self._shown : end]
        self._shown = end
        return new

    def _held_back(self, tail: str) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        for beginnings in self._beginnings:
            if tail.endswith(beginnings):
                return len(beginnings[0])
        return 0

    def _extend(self, piece: str, may_stop: bool = True) -> str | None:
        if not piece or self._finished:
            return None
        before = self.text
        self.text = before + piece
        if not may_stop:
            self._searched_from = len(self.text)
            return None
        for last in self._lasts:
            if last in piece:
                return self._find_stop(max(self._searched_from, len(before) - self._overlap))
        return None

    def _find_stop(self, start: int) -> str | None:
        """The stop string that is complete from ``start`` on; the text is cut there."""
        hits = [(at, s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if not hits:
            return None
        # The one that is complete first, the longest of those that are: as if it came by single characters.
        at, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self._finished = True
        return stop
