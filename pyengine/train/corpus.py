"""Texts as documents: files, globs, JSON lines and standard input, read in pieces that fit in memory.

A text file is one document; each object of a ``.jsonl`` file is one. A document comes as a sequence of
pieces, strings of at most about ``PIECE_CHARS`` characters that together are its text.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyengine.errors import ConfigError

PIECE_CHARS = 1 << 18
_READ_BYTES = 1 << 20
_JSON_LINES = (".jsonl", ".ndjson")
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Source:
    """One file. ``name`` is what messages and the manifest call it."""

    path: Path
    name: str
    text_field: str

    @property
    def is_json_lines(self) -> bool:
        return self.path.suffix.lower() in _JSON_LINES

    def documents(self, digest: hashlib._Hash | None = None) -> Iterator[Iterator[str]]:
        """The documents, each to be read to its end before the next; ``digest`` sees every byte."""
        try:
            if self.is_json_lines:
                yield from self._json_documents(digest)
            else:
                yield self._text_pieces(digest)
        except OSError as error:
            raise ConfigError(f"{self.name}: {error.strerror}") from None

    def _text_pieces(self, digest: hashlib._Hash | None) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, text, first = 0, "", True
        with self.path.open("rb") as file:
            while True:
                data = file.read(_READ_BYTES)
                if digest is not None:
                    digest.update(data)
                pending = len(decoder.getstate()[0])
                try:
                    text += decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    where = offset - pending + error.start
                    raise ConfigError(
                        f"{self.name}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                        f"{where}; convert it first, for example with: iconv -f latin1 -t utf-8"
                    ) from None
                offset += len(data)
                if first:
                    text, first = text.removeprefix("\ufeff"), False
                while len(text) > 2 * PIECE_CHARS or (text and not data):
                    piece, text = _cut(text)
                    yield piece
                if not data:
                    return

    def _json_documents(self, digest: hashlib._Hash | None) -> Iterator[Iterator[str]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if digest is not None:
                    digest.update(line)
                if not line.strip():
                    continue
                where = f"{self.name}, line {number}"
                try:
                    row = json.loads(line)
                except UnicodeDecodeError:
                    raise ConfigError(f"{where}: not UTF-8 text") from None
                except ValueError as error:
                    raise ConfigError(f"{where}: not JSON: {error}") from None
                text = row.get(self.text_field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise ConfigError(
                        f'{where}: no text in the field "{self.text_field}"; --text-field names another one'
                    )
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise ConfigError(
                        f"{where}: the text holds a lone surrogate (\\ud800 to \\udfff)"
                    ) from None
                yield pieces(text)


def pieces(text: str) -> Iterator[str]:
    """Cut a text as a file with it would be."""
    while text:
        piece, text = _cut(text)
        yield piece


def _cut(text: str) -> tuple[str, str]:
    """A piece of at most ``PIECE_CHARS`` and the rest, cut where no tokenizer would join: before white space.

    Byte-level BPE splits words from the white space behind them, so that it gives the tokens it would give
    for the whole; a text without white space is cut anywhere.
    """
    if len(text) <= PIECE_CHARS:
        return text, ""
    head = text[:PIECE_CHARS]
    for pattern in (r"(?s).*\S(?=\n)", r"(?s).*\S(?=\s)"):
        found = re.match(pattern, text[: PIECE_CHARS + 1])
        if found and found.end() > PIECE_CHARS // 2:
            head = found[0]
            break
    return head, text[len(head) :]


def find_sources(patterns: Sequence[str], text_field: str, spool: Path, option: str) -> list[Source]:
    """The files that ``patterns`` name, in order, each once; standard input is copied to ``spool``."""
    sources: dict[str, Source] = {}
    for pattern in patterns:
        if pattern == STANDARD_INPUT:
            sources[pattern] = _spool_standard_input(spool, text_field)
            continue
        path = Path(pattern)
        if path.is_dir():
            names = sorted(
                str(f)
                for f in path.iterdir()
                if f.is_file() and f.suffix.lower() in (".txt", ".md", *_JSON_LINES)
            )
            problem = "no .txt, .md or .jsonl file in this directory"
        elif path.exists():
            names, problem = [pattern], ""
        else:
            names = sorted(f for f in glob.glob(pattern, recursive=True) if Path(f).is_file())
            problem = "no such file" if not glob.has_magic(pattern) else "no file matches"
        if not names:
            raise ConfigError(f"{option} {pattern}: {problem}")
        for name in names:
            sources.setdefault(name, Source(Path(name), name, text_field))
    return list(sources.values())


def _spool_standard_input(spool: Path, text_field: str) -> Source:
    """A file with all of standard input, as texts are read more than once; JSON lines if it begins with {."""
    spool.parent.mkdir(parents=True, exist_ok=True)
    stream = sys.stdin.buffer
    first = stream.read(1)
    path = spool.with_suffix(".jsonl" if first == b"{" else ".txt")
    with path.open("wb") as file:
        file.write(first)
        shutil.copyfileobj(stream, file)
    return Source(path, "standard input", text_field)


@dataclass
class Scan:
    """What one reading of all documents has shown; documents are numbered in order over all sources."""

    sources: list[dict[str, str | int]]  # name, bytes, sha256
    hashes: array[int]  # of each document, 64 bits
    characters: array[int]
    num_bytes: array[int]

    @property
    def num_characters(self) -> int:
        return sum(self.characters)


def scan(sources: Iterable[Source]) -> Scan:
    """Read everything once: sizes and hashes; ConfigError for what is not text."""
    result = Scan([], array("Q"), array("Q"), array("Q"))
    for source in sources:
        digest = hashlib.sha256()
        for document in source.documents(digest):
            sha, characters, size = hashlib.sha256(), 0, 0
            for piece in document:
                data = piece.encode("utf-8")
                sha.update(data)
                characters += len(piece)
                size += len(data)
            if characters:
                result.hashes.append(int.from_bytes(sha.digest()[:8], "little"))
                result.characters.append(characters)
                result.num_bytes.append(size)
        size = source.path.stat().st_size
        result.sources.append({"name": source.name, "bytes": size, "sha256": digest.hexdigest()})
    if not result.characters:
        names = ", ".join(str(s["name"]) for s in result.sources)
        raise ConfigError(f"the corpus is empty: no text in {names}")
    return result


@dataclass(frozen=True)
class Split:
    """Which documents validate; with a single document, from which of its characters on."""

    validation: frozenset[int]
    cut: int | None = None  # of the only document: training text before this character


def split(result: Scan, fraction: float) -> Split:
    """Choose documents for validation by their hashes, so that order and machine do not matter.

    Documents are taken in the order of their hashes while they fit into ``fraction`` of the characters; if
    none fits, the shortest one. A single document is cut: its end validates.
    """
    if not fraction:
        return Split(frozenset())
    total = result.num_characters
    if len(result.characters) == 1:
        cut = int((1 - fraction) * total)
        if cut == 0 or cut == total:
            raise ConfigError(
                f"--val-fraction {fraction}: the data is a single document of {total} characters, too short "
                "to cut; give more data, or --val-fraction 0"
            )
        return Split(frozenset(), cut)
    chosen, taken = set(), 0
    order = sorted(range(len(result.hashes)), key=lambda i: (result.hashes[i], i))
    for index in order:
        if taken + result.characters[index] <= fraction * total:
            chosen.add(index)
            taken += result.characters[index]
    if not chosen:
        chosen = {min(order, key=lambda i: (result.characters[i], result.hashes[i]))}
    return Split(frozenset(chosen))


def read_split(sources: Iterable[Source], chosen: Split, validation: bool) -> Iterator[tuple[bool, str]]:
    """(whether a document begins, piece) of the training or the validation part, in order."""
    index = 0
    for source in sources:
        for document in source.documents():
            position, begins = 0, True
            for piece in document:
                if chosen.cut is None:
                    wanted = piece if (index in chosen.validation) == validation else ""
                else:
                    at = max(0, chosen.cut - position)
                    wanted = piece[at:] if validation else piece[:at]
                if wanted:
                    # The end of a cut document continues it: no document begins there.
                    yield begins and not (validation and chosen.cut is not None), wanted
                    begins = False
                position += len(piece)
            if position:
                index += 1
