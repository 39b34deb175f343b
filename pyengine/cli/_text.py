"""Text in and out: prompts from arguments, files and standard input; results to standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pyengine.errors import RequestError, TokenizerError

STANDARD_INPUT = "-"
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


def read_text(path: str) -> str:
    """The text of a file, or of standard input for ``-``. UTF-8, with or without a byte-order mark."""
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise RequestError("standard input is closed: nothing can be read from it")
        return decode(sys.stdin.buffer.read(), "standard input")
    if not path:
        raise click.UsageError("--file: the name is empty.")
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return decode(data, path)


def decode(data: bytes, source: str) -> str:
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        raise RequestError(
            f"{source}: not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset}; "
            f"convert it first, for example with: iconv -f {encoding} -t utf-8"
        ) from None


def argument(text: str, name: str) -> str:
    """An argument as text: bytes of it that are not UTF-8 arrive as lone surrogates, and are refused."""
    return decode(text.encode("utf-8", "surrogateescape"), name)


def argument_texts(arguments: Sequence[str]) -> list[str]:
    """Arguments as texts. ``-`` is all of standard input, less the line end that ``echo`` adds."""
    if arguments.count(STANDARD_INPUT) > 1:
        raise click.UsageError("'-' (standard input) can be read only once.")
    texts = []
    for number, given in enumerate(arguments, 1):
        if given == STANDARD_INPUT:
            text = _without_line_end(read_text(STANDARD_INPUT))
            if not text:
                raise RequestError("standard input is empty: did the command before it fail?")
            texts.append(text)
        else:
            texts.append(argument(given, f"argument {number}"))
    return texts


def collect_prompts(arguments: Sequence[str], file: str | None, ids: bool) -> list[str | list[int]]:
    """Prompts of the arguments, then those of ``--file``; with ``ids`` the arguments are token ids."""
    if file == STANDARD_INPUT and STANDARD_INPUT in arguments:
        raise click.UsageError("Standard input can be read only once: give '-' or '--file -'.")
    texts = argument_texts(arguments)
    prompts: list[str | list[int]] = [parse_ids(text) for text in texts] if ids else list(texts)
    if file is not None:
        rows = file_prompts(file)
        prompts += [parse_ids(row) if ids and isinstance(row, str) else row for row in rows]
    return prompts


def _without_line_end(text: str) -> str:
    return text[: -2 if text.endswith("\r\n") else -1] if text.endswith("\n") else text


def file_prompts(path: str) -> list[str | list[int]]:
    """One prompt per line that is not blank; in ``.jsonl`` and ``.ndjson`` files ``prompt`` of each object.

    A JSON prompt is a string or a list of token ids. Standard input holds JSON lines if its first
    character is ``{``.
    """
    text = read_text(path)
    is_json = path.endswith(_JSON_LINES_SUFFIXES) or (path == STANDARD_INPUT and text.startswith("{"))
    # Only \n ends a line: other separators that str.splitlines knows may stand inside a prompt.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise RequestError(f"{_name(path)}: no prompt in it; one prompt per line is expected")
    return [
        _json_prompt(line, f"{_name(path)}, line {number}") if is_json else line for number, line in lines
    ]


def _name(path: str) -> str:
    return "standard input" if path == STANDARD_INPUT else path


def _json_prompt(line: str, where: str) -> str | list[int]:
    import json

    try:
        row = json.loads(line)
    except RecursionError:
        raise RequestError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise RequestError(f"{where}: not JSON: {reason}") from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise RequestError(f'{where}: expected an object with "prompt": a string or a list of token ids')


def parse_ids(text: str) -> list[int]:
    """Token ids apart by commas or white space: ``"15496, 11"``; brackets around them are allowed."""
    try:
        ids = [int(word) for word in text.strip().strip("[]").replace(",", " ").split()]
    except ValueError:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise click.UsageError(
            f"Token ids are whole numbers, like 15496,11; these are not: {shown!r}."
        ) from None
    if not ids:
        raise click.UsageError("Token ids are whole numbers, like 15496,11; there is none in an empty text.")
    return ids


def prepare_output() -> None:
    """Characters that the terminal's encoding lacks are shown as escapes instead of ending the program."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """One line of JSON, escaped only where standard output is not UTF-8, flushed for whoever reads along."""
    import json

    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    click.echo(json.dumps(value, ensure_ascii=encoding != "utf8", allow_nan=False))


def quote(value: Any) -> str:
    """The value on one line: a string in double quotes, with escapes for what is not printable."""
    import json

    return json.dumps(value, ensure_ascii=False)


def heading(number: int, prompt: str | list[int], detail: str = "") -> str:
    """The line between results, as ``head`` and ``tail`` set files apart; 60 characters of the prompt."""
    shown = quote(prompt)
    return f"==> {number}{detail}: {shown if len(shown) <= 60 else shown[:57] + '...'} <=="


@contextmanager
def naming(what: str, number: int, count: int) -> Iterator[None]:
    """Errors of one of several texts say which it is, counted from 1 as the headings do."""
    try:
        yield
    except (RequestError, TokenizerError) as error:
        if count == 1:
            raise
        raise type(error)(f"{what} {number} of {count}: {error}") from error


def note(message: str) -> None:
    """One line on standard error."""
    click.echo(f"pyengine: {message}", err=True)


def binary_size(count: float) -> str:
    """``474.7 MiB``"""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
