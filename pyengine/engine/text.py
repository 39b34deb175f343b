"""From token ids to text as it may be shown: stop strings are found across token borders and never shown."""

from __future__ import annotations

from collections import abc
from typing import Protocol


class Detokenizer(Protocol):
    """``pyengine.model.detokenizer.StreamingDetokenizer``, as far as the engine knows it."""

    def append(self, ids: abc.Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class Codec(Protocol):
    """Makes text of token ids; a request has none where its checkpoint has no tokenizer."""

    def detokenizer(self, prompt_ids: abc.Sequence[int], skip_special_tokens: bool) -> Detokenizer: ...
    def decode_token(self, token_id: int) -> str: ...


class TextStream:
    """The text of one sequence. What could be the beginning of a stop string is held back by ``take``."""

    __slots__ = ("_beginnings", "_detokenizer", "_finished", "_overlap", "_shown", "_stop", "text")

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = stop
        self._overlap = max(map(len, stop), default=1) - 1  # characters of a stop string already here
        # Proper beginnings of the stop strings by length, longest first: what the end of the text may be.
        self._beginnings = [
            tuple({s[:length] for s in stop if len(s) > length}) for length in range(self._overlap, 0, -1)
        ]
        self._shown = 0
        self._finished = False

    def append(self, ids: abc.Sequence[int]) -> str | None:
        """Add tokens; the stop string that ends the text, which is cut before it, or None."""
        return self._extend(self._detokenizer.append(ids))

    def finish(self) -> str | None:
        """No more tokens: incomplete characters come out as they are. May complete a stop string."""
        if self._finished:
            return None
        stop = self._extend(self._detokenizer.finish())
        self._finished = True
        return stop

    def take(self) -> str:
        """Text that may be shown and was not taken before."""
        end = len(self.text)
        if not self._finished:
            for beginnings in self._beginnings:
                if self.text.endswith(beginnings):
                    end -= len(beginnings[0])
                    break
        if end <= self._shown:
            return ""
        new = self.text[self._shown : end]
        self._shown = end
        return new

    def _extend(self, piece: str) -> str | None:
        if not piece or self._finished:
            return None
        start = max(0, len(self.text) - self._overlap)
        self.text += piece
        hits = [(at, s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if not hits:
            return None
        # The one that is complete first, the longest of those that are: as if it came by single characters.
        at, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[:at]
        self._finished = True
        return stop
