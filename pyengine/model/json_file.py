"""JSON of checkpoints: objects read from untrusted bytes, with errors that name the file."""

from __future__ import annotations

import json
import os
from typing import Any

from pyengine.errors import PyEngineError
from pyengine.model.files import read_file

_SHOWN = 80  # characters of an untrusted value in a message


def show(value: object) -> str:
    """``repr`` of an untrusted value, cut to a length that fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # ValueError: an integer of more digits than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {show(key)} appears twice")
            seen.add(key)
    return result


def parse_json_object(
    data: bytes, where: str, error: type[PyEngineError], *, unique_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in ``data`` (UTF-8). Anything else raises ``error``, naming ``where``."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{where} is not UTF-8: {e.reason} at byte {e.start}") from None
    if text.startswith("\ufeff"):  # a byte order mark, as some Windows editors leave it
        text = text[1:]
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys if unique_keys else None)
    except RecursionError:
        raise error(f"{where} is not valid JSON: nested too deeply") from None
    except ValueError as e:  # JSONDecodeError, a key twice, an integer of thousands of digits
        raise error(f"{where} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object, not {show(value)}")
    return value


def read_json_object(
    path: str | os.PathLike[str], error: type[PyEngineError], *, unique_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in a file; a missing, unreadable or malformed file raises ``error``, naming it."""
    return parse_json_object(read_file(path, error), str(path), error, unique_keys=unique_keys)
