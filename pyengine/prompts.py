"""Prompts as people give them: a text, token ids, or a list of either."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

from pyengine.errors import RequestError

Prompt: TypeAlias = "str | list[int] | None"
Prompts: TypeAlias = "Prompt | Sequence[str | list[int] | None]"


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text, token ids, None) and not a list of prompts."""
    if prompts is None or isinstance(prompts, str):
        return True
    items = _listed(prompts)
    return bool(items) and isinstance(items[0], int)


def as_list(prompts: Prompts) -> list[Prompt]:
    """The prompts of a call; arrays and tensors become lists. RequestError for anything else."""
    return [as_prompt(item) for item in items_of(prompts)]


def items_of(prompts: Any) -> list[Any]:
    """The prompts of a call as they are given. RequestError if this is neither a prompt nor a list."""
    return [prompts] if is_one(prompts) else _listed(prompts)


def as_prompt(item: Any) -> Prompt:
    return item if item is None or isinstance(item, str) else _listed(item)


def as_one(prompt: Any, what: str) -> Prompt:
    """The one prompt that is wanted as ``what``; RequestError for a list of prompts, or anything else."""
    if is_one(prompt):
        return as_list(prompt)[0]
    items = _listed(prompt)
    if items:
        raise RequestError(f"{what} is one string or list of token ids, not a list of them")
    return items


def as_choices(choices: Any) -> list[Prompt]:
    """The continuations to choose from: a list of one or more."""
    if isinstance(choices, (str, bytes)) or not hasattr(choices, "__iter__"):
        raise RequestError(f"choices={choices!r}: must be a list of one choice or more")
    listed = list(choices)
    if not listed:
        raise RequestError(f"choices={choices!r}: must be a list of one choice or more")
    return [as_one(choice, "a choice") for choice in listed]


def check_token_ids(ids: list[int], vocab_size: int) -> array[int]:
    """``ids`` as int32; RequestError naming the first that is no token id."""
    try:
        if bool not in set(map(type, ids)):
            checked = array("i", ids)
            if not checked or (min(checked) >= 0 and max(checked) < vocab_size):
                return checked
    except (TypeError, OverflowError):
        pass
    position, token = next(
        (position, token)
        for position, token in enumerate(ids)
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size
    )
    raise RequestError(
        f"token {position} of the prompt is {token!r}: token ids are integers from 0 to {vocab_size - 1}"
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, (tuple, array)):
        return list(value)
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0:  # NumPy arrays, PyTorch tensors
        return list(value.tolist())
    raise RequestError(f"a prompt is a string or a list of token ids, not {type(value).__name__}")
