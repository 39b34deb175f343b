"""``speculative_config``: how tokens are guessed ahead of the model, with vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.errors import ConfigError

METHODS = ("ngram", "suffix", "draft_model")
_MAX_CONTEXT = 64  # csrc/drafting/ngram.h
_MAX_TOKENS = 256
_OF_METHOD: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 8},
    "suffix": {"suffix_decoding_max_tree_depth": 24, "suffix_decoding_max_cached_tokens": 50_000},
    "draft_model": {"model": None, "quantization": None},
}
_RANGES = {
    "num_speculative_tokens": _MAX_TOKENS,
    "prompt_lookup_min": _MAX_CONTEXT,
    "prompt_lookup_max": _MAX_CONTEXT,
    "suffix_decoding_max_tree_depth": _MAX_CONTEXT,
    "suffix_decoding_max_cached_tokens": 2**31 - 1,
}


@dataclass(frozen=True)
class SpeculativeConfig:
    """A checked ``speculative_config``.

    method: "ngram" guesses from prompt and output of the same text, "suffix" also from all other texts of the
        LLM, "draft_model" lets a smaller model guess.
    num_tokens: tokens guessed at most in one step.
    min_context, max_context: tokens before a guess that are looked at; not for "draft_model".
    max_cached_tokens: of other texts, that "suffix" remembers.
    model, quantization: of the smaller model, as in ``LLM``.
    """

    method: str
    num_tokens: int
    min_context: int = 1
    max_context: int = 8
    max_cached_tokens: int = 0
    model: str | None = None
    quantization: str | None = None

    @classmethod
    def from_mapping(cls, given: object) -> SpeculativeConfig:
        """ConfigError naming the field, its value and what is allowed."""
        if not isinstance(given, Mapping):
            raise ConfigError(
                f'speculative_config={given!r}: must be a dict like {{"method": "ngram"}}, '
                '{"method": "suffix"} or {"model": "path/to/a/smaller/checkpoint"}'
            )
        values: dict[str, Any] = dict(given)
        method = values.pop("method", "draft_model" if "model" in values else None)
        if method not in METHODS:
            raise ConfigError(
                f"speculative_config: method={method!r}: must be one of {', '.join(METHODS)}"
            )
        num_tokens = 5 if method == "draft_model" else 15
        fields: dict[str, Any] = {"num_speculative_tokens": num_tokens, **_OF_METHOD[method]}
        for name in values:
            if name not in fields:
                raise ConfigError(
                    f"speculative_config: {name}={values[name]!r}: method {method!r} has the fields "
                    f"{', '.join(fields)}"
                )
        fields.update(values)
        for name, high in _RANGES.items():
            value = fields.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ConfigError(
                    f"speculative_config: {name}={value!r}: must be an integer from 1 to {high}"
                )
        num_tokens = fields["num_speculative_tokens"]
        if method == "draft_model":
            if fields["model"] is None:
                raise ConfigError('speculative_config: method "draft_model" needs a "model": a checkpoint')
            return cls(method, num_tokens, model=str(fields["model"]), quantization=fields["quantization"])
        if method == "suffix":
            depth, cached = (fields[name] for name in _OF_METHOD[method])
            return cls(method, num_tokens, 1, depth, cached)
        low, high = fields["prompt_lookup_min"], fields["prompt_lookup_max"]
        if low > high:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min={low} is more than prompt_lookup_max={high}"
            )
        return cls(method, num_tokens, low, high)
