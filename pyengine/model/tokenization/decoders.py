"""Incremental decoders: token ids in, text that can no longer change out.

Every kind of tokenizer decodes by a chain of these, in one piece (`Tokenizer.decode`) and token by token
(`StreamingDetokenizer`) alike, so that both give the same text by construction. `push` returns the text that
is certain whatever ids follow; `finish` returns the rest. The cost of a token does not depend on how many
came before it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Generic, Protocol, TypeVar

Value = TypeVar("Value")


class TextDecoder(Protocol):
    """State of decoding one sequence; ``_C.ByteDecoder`` is another. Attributes hold immutable values or
    shared tables, see `copy`.
    """

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str:
        """Text that became certain with ``ids``; TokenizerError for an id outside the vocabulary."""

    @abstractmethod
    def finish(self) -> str:
        """The text held back so far, now that nothing follows. The decoder is used up."""

    def copy(self) -> TextDecoder:
        """An independent decoder in the same state."""
        return copy(self)


class TokenTable(dict[int, Value], Generic[Value]):
    """What each id contributes to the text, looked up in the tokenizer when the id first occurs."""

    def __init__(self, lookup: Callable[[int], Value]) -> None:
        super().__init__()
        self._lookup = lookup

    def __missing__(self, token_id: int) -> Value:
        value = self[token_id] = self._lookup(token_id)
        return value


class PieceDecoder(TextDecoder):
    """Tokens whose text depends on nothing but whether they come first (WordPiece, Metaspace, words)."""

    def __init__(self, first: TokenTable[str | None], following: TokenTable[str | None]) -> None:
        """The tables hold None for tokens that are left out (special tokens, ids without a piece)."""
        self._first = first
        self._following = following
        self._started = False

    def push(self, ids: Sequence[int]) -> str:
        texts = []
        for token_id in ids:
            text = (self._following if self._started else self._first)[token_id]
            if text is not None:
                self._started = True
                texts.append(text)
        return "".join(texts)

    def finish(self) -> str:
        return ""


class ByteFallbackDecoder(TextDecoder):
    """Pieces and, between them, runs of bytes ("<0xE6>"), as `tokenizers`' ByteFallback joins them.

    A run that is not UTF-8 as a whole is one U+FFFD per byte, so that a run is certain only behind its last
    byte. ``space`` is the character that spells a space.
    """

    def __init__(self, table: TokenTable[str | None], space: str) -> None:
        """The table holds None for tokens that are left out."""
        self._table = table
        self._space = space
        self._bytes = b""

    def push(self, ids: Sequence[int]) -> str:
        texts = []
        for token_id in ids:
            piece = self._table[token_id]
            if piece is None:
                continue
            byte = self._BYTE.fullmatch(piece)
            if byte:
                self._bytes += bytes.fromhex(byte[1])
            else:
                texts += [self._end_run(), piece.replace(self._space, " ")]
        return "".join(texts)

    def finish(self) -> str:
        return self._end_run()

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def _end_run(self) -> str:
        data, self._bytes = self._bytes, b""
        try:
            return data.decode("utf-8").replace(self._space, " ")
        except UnicodeDecodeError:
            return "\ufffd" * len(data)


class WholeDecoder(TextDecoder):
    """For decoders of `tokenizers` that are not described here: exact, but all text comes at the end."""

    def __init__(self, decode: Callable[[list[int]], str], check: Callable[[int], object]) -> None:
        self._decode = decode
        self._check = check
        self._ids: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        for token_id in ids:
            self._check(token_id)
        self._ids += ids
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._decode(ids)

    def copy(self) -> TextDecoder:
        twin = copy(self)
        twin._ids = self._ids[:]
        return twin


class CleanUpDecoder(TextDecoder):
    """`clean_up_tokenization_spaces` of transformers behind another decoder.

    transformers replaces " ." " ?" " !" " ," " ' " " n't" " 'm" " 's" " 've" " 're" one after the other.
    The first four commute, and so do the last five (each deletes a space before something that is not a
    space), which leaves three passes; each holds back an end of text that could become a match.
    """

    _BEFORE_PUNCTUATION = re.compile(r" (?=[.?!,])")
    _BEFORE_CONTRACTION = re.compile(r" (?=n't|'m|'s|'ve|'re)")
    _CONTRACTION_START = re.compile(r" (?:n'?|'[vr]?)?\Z")
    _QUOTE_START = re.compile(r" '?\Z")

    def __init__(self, inner: TextDecoder) -> None:
        self._inner = inner
        self._held = ("", "", "")  # what each pass holds back

    def push(self, ids: Sequence[int]) -> str:
        return self._pass(self._inner.push(ids), final=False)

    def finish(self) -> str:
        return self._pass(self._inner.finish(), final=True)

    def copy(self) -> TextDecoder:
        twin = copy(self)
        twin._inner = self._inner.copy()
        return twin

    def _pass(self, text: str, final: bool) -> str:
        punctuation, quote, contraction = self._held
        text, punctuation = punctuation + text, ""
        if not final and text.endswith(" "):
            text, punctuation = text[:-1], " "
        text = self._BEFORE_PUNCTUATION.sub("", text)

        # The end to hold is looked for behind the last match: a quote that a match has produced is spent.
        *matched, text = (quote + text).split(" ' ")
        text, quote = _hold(text, self._QUOTE_START, final)
        text = "'".join([*matched, text])

        text, contraction = _hold(contraction + text, self._CONTRACTION_START, final)
        text = self._BEFORE_CONTRACTION.sub("", text)
        self._held = (punctuation, quote, contraction)
        return text


def _hold(text: str, start_of_match: re.Pattern[str], final: bool) -> tuple[str, str]:
    """``text`` cut before an end that could become a match; the end."""
    found = None if final else start_of_match.search(text, max(0, len(text) - 3))
    if found is None:
        return text, ""
    return text[: found.start()], text[found.start() :]
