"""Checks of single fields: each raises RequestError with the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import RequestError

MAX_INT = 2**31 - 1


def is_int(value: object, low: int = 0, high: int = MAX_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_int(field: str, value: object, low: int, high: int = MAX_INT) -> None:
    if not is_int(value, low, high):
        raise RequestError(f"{field}={value!r}: must be an integer from {low} to {high}")


def check_float(field: str, value: Any, low: float, high: float, allowed: str = "") -> None:
    if not is_number(value) or not low <= value <= high:
        raise RequestError(f"{field}={value!r}: must be {allowed or f'a number from {low:g} to {high:g}'}")


def check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{field}={value!r}: must be True or False")


def strings(field: str, value: Any) -> tuple[str, ...]:
    """One string, or a list of them; none may be empty."""
    if not isinstance(value, (str, list, tuple, type(None))):
        raise RequestError(f"{field}={value!r}: must be a string or a list of strings")
    listed = (value,) if isinstance(value, str) else tuple(value or ())
    for text in listed:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{field}={value!r}: every entry must be a string of one character or more")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(
                f"{field}={text!r}: a lone surrogate (from bytes that are not UTF-8?) is in no text"
            )
    return listed


def token_ids(field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, type(None))):
        raise RequestError(f"{field}={value!r}: must be a list of token ids")
    if any(not is_int(token) for token in value or ()):
        raise RequestError(f"{field}={value!r}: entries must be integers from 0 to {MAX_INT}")
    return tuple(value or ())


def token_sequences(field: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """A list of non-empty lists of token ids."""
    if not isinstance(value, (list, tuple, type(None))):
        raise RequestError(f"{field}={value!r}: must be a list of lists of token ids")
    for ids in value or ():
        if not isinstance(ids, (list, tuple)) or not ids or any(not is_int(token) for token in ids):
            raise RequestError(
                f"{field}={value!r}: entries must be lists of one or more integers from 0 to {MAX_INT}"
            )
    return tuple(tuple(ids) for ids in value or ())


def biases(field: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """``{token: bias}`` (also with tokens as strings of digits, as JSON has them), transformers'
    ``{(token, ...): bias}`` or its list of ``[[token, ...], bias]``."""
    if value is None:
        return ()
    entries: list[Any]
    if isinstance(value, Mapping):
        entries = [([key] if isinstance(key, (int, str)) else key, bias) for key, bias in value.items()]
    elif isinstance(value, (list, tuple)) and all(
        isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in value
    ):
        entries = list(value)
    else:
        raise RequestError(f"{field}={value!r}: must map token ids, or sequences of them, to numbers")
    result = []
    for ids, bias in entries:
        if isinstance(ids, (list, tuple)):
            ids = tuple(int(t) if isinstance(t, str) and t.isascii() and t.isdigit() else t for t in ids)
        if not isinstance(ids, tuple) or not ids or any(not is_int(token) for token in ids):
            raise RequestError(f"{field}={value!r}: token ids must be integers from 0 to {MAX_INT}")
        if not is_number(bias) or not -float("inf") <= bias <= 1e30:
            raise RequestError(f"{field}={value!r}: a bias must be a number up to 1e30, or -inf")
        result.append((ids, float(bias)))
    return tuple(result)
