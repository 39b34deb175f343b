"""What a request asks for: validated when it is made, completed by the checkpoint's defaults later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.errors import ConfigError, RequestError

DEFAULT_MAX_TOKENS = 128
MAX_SAMPLES = 4096
MAX_LOGPROBS = 64  # score_rows and the sampler keep at most this many best tokens (csrc/ops/ops.h)
MAX_SEED = 2**64 - 1
# The sampler computes in float32, where a smaller temperature would be 0 (greedy) and a larger one infinite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 2.0**-149, (2 - 2.0**-23) * 2.0**127

# Fields of generation_config.json -> of SamplingParams.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "max_new_tokens": "max_tokens",
    "max_length": "max_length",
    "eos_token_id": "stop_token_ids",
}
# Fields of generation_config.json that would change the tokens, with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_p": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "stop_strings": (),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. ``None`` means: what the checkpoint's generation_config.json says,
    otherwise the default in brackets.

    n: samples per prompt; they share the prompt's part of the KV cache.
    max_tokens: new tokens at most [128].
    max_length: tokens at most, the prompt's included; excludes ``max_tokens``.
    temperature: 0 is greedy [1.0; greedy where generation_config.json has ``do_sample: false``].
    top_k: sample among the k likeliest tokens; 0 or -1: among all [0].
    top_p: sample among the likeliest tokens that together reach this probability, in (0, 1] [1.0].
    seed: 0 to 2**64 - 1; the same seed gives the same tokens, in any batch [a fresh one, reported in
        the output; derived from the seed of the ``LLM`` if that has one].
    stop: strings that end the text; the text is cut before them.
    stop_token_ids: ids that end the text, like EOS.
    ignore_eos: go on after an EOS token.
    logprobs: report the log-probability of each token, and of the n best ones, 0 to 64.
    skip_special_tokens: leave special tokens out of the text.
    truncate_prompt_tokens: keep only the last k tokens of the prompt.

    Raises RequestError naming the field, its value and what is allowed.
    """

    n: int = 1
    max_tokens: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_SAMPLES)
        for field in ("max_tokens", "max_length", "truncate_prompt_tokens"):
            if getattr(self, field) is not None:
                _check_int(field, getattr(self, field), 1, 2**31 - 1)
        if self.max_tokens is not None and self.max_length is not None:
            raise RequestError(
                f"max_tokens={self.max_tokens} and max_length={self.max_length} contradict each other: "
                "give max_tokens (new tokens) or max_length (prompt and new tokens together)"
            )
        if self.temperature is not None:
            is_zero = type(self.temperature) in (int, float) and self.temperature == 0
            if not is_zero:
                allowed = "0, or a positive number that float32 can hold"
                _check_float("temperature", self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE, allowed)
        if self.top_p is not None:
            _check_float("top_p", self.top_p, 2.0**-1074, 1.0, "a number above 0 and up to 1")
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for field in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                raise RequestError(f"{field}={getattr(self, field)!r}: must be True or False")
        if not isinstance(self.stop, (str, list, tuple, type(None))):
            raise RequestError(f"stop={self.stop!r}: must be a string or a list of strings")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"stop={self.stop!r}: every entry must be a string of one character or more"
                )
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError(
                    f"stop={text!r}: a lone surrogate (from bytes that are not UTF-8?) is in no text"
                )
        if not isinstance(self.stop_token_ids, (list, tuple, type(None))):
            raise RequestError(f"stop_token_ids={self.stop_token_ids!r}: must be a list of token ids")
        if any(not _is_int(token, 0, 2**31 - 1) for token in self.stop_token_ids or ()):
            raise RequestError(
                f"stop_token_ids={self.stop_token_ids!r}: entries must be integers from 0 to {2**31 - 1}"
            )
        if self.n > 1 and self.temperature == 0:
            raise RequestError(
                f"n={self.n} with temperature=0: greedy decoding gives {self.n} times the same text; "
                "set n=1, or a temperature above 0"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class ResolvedParams:
    """Parameters of one request with every default filled in; what the engine works with."""

    n: int
    max_length: int  # tokens at most, the prompt's included; never above the context
    temperature: float
    top_k: int  # 0: all
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]  # EOS (unless ignored) and stop_token_ids
    logprobs: int  # -1: none
    skip_special_tokens: bool


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about sampling where the caller does not."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    unsupported: tuple[str, ...] = ()  # "field=value" of settings that pyengine does not apply

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        eos_token_id: int | tuple[int, ...] | None = None,
        source: str = "generation_config.json",
    ) -> GenerationDefaults:
        """``config``: generation_config.json, called ``source`` in errors; ``eos_token_id``: used where that
        names none. ConfigError names the field and its value."""
        values = dict(config)
        if values.get("eos_token_id") is None:
            values["eos_token_id"] = eos_token_id
        eos = values["eos_token_id"]
        if eos is not None and not isinstance(eos, (list, tuple)):
            values["eos_token_id"] = [eos]
        known: dict[str, Any] = {}
        for field, ours in _FIELDS.items():
            given: dict[str, Any] = {ours: values.get(field)}
            try:
                known[ours] = getattr(SamplingParams(**given), ours)
            except RequestError as error:
                raise ConfigError(f"{source}: {str(error).replace(ours, field, 1)}") from error
        do_sample = config.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ConfigError(f"{source}: do_sample={do_sample!r}: must be true or false")
        # transformers samples only with do_sample: true; here only an explicit false is greedy.
        temperature = 1.0 if known["temperature"] is None else float(known["temperature"])
        return cls(
            temperature=0.0 if do_sample is False else temperature,
            top_k=max(known["top_k"] or 0, 0),
            top_p=1.0 if known["top_p"] is None else float(known["top_p"]),
            max_tokens=known["max_tokens"],
            max_length=known["max_length"],
            eos_token_ids=tuple(known["stop_token_ids"] or ()),
            unsupported=tuple(
                f"{field}={config[field]!r}"
                for field, off in _UNSUPPORTED.items()
                if config.get(field) is not None and config[field] not in off
            ),
        )

    def resolve(
        self, params: SamplingParams, *, prompt_tokens: int, max_model_len: int, seed: int
    ) -> ResolvedParams:
        """Fill in what ``params`` leaves open. ``seed`` is used where ``params`` has none.

        Raises RequestError if the prompt leaves no room for a new token.
        """
        if prompt_tokens >= max_model_len:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, and the context holds {max_model_len}, prompt and "
                f"new tokens together: shorten it, or set truncate_prompt_tokens to {max_model_len - 1}"
            )
        temperature = self.temperature if params.temperature is None else float(params.temperature)
        if params.n > 1 and temperature == 0:
            raise RequestError(
                f"n={params.n}, but this checkpoint's generation_config.json says do_sample: false "
                f"(greedy), which gives {params.n} times the same text: set a temperature above 0"
            )
        eos = () if params.ignore_eos else self.eos_token_ids
        return ResolvedParams(
            n=params.n,
            max_length=min(self._max_length(params, prompt_tokens), max_model_len),
            temperature=temperature,
            top_k=self.top_k if params.top_k is None else max(params.top_k, 0),
            top_p=self.top_p if params.top_p is None else float(params.top_p),
            seed=seed if params.seed is None else params.seed,
            stop=params.stop_strings,
            stop_ids=frozenset((*eos, *(params.stop_token_ids or ()))),
            logprobs=-1 if params.logprobs is None else params.logprobs,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _max_length(self, params: SamplingParams, prompt_tokens: int) -> int:
        if params.max_length is not None:
            if params.max_length <= prompt_tokens:
                raise RequestError(
                    f"max_length={params.max_length} counts the prompt, which has {prompt_tokens} tokens: "
                    f"set it to {prompt_tokens + 1} or more, or use max_tokens"
                )
            return params.max_length
        if params.max_tokens is not None:
            return prompt_tokens + params.max_tokens
        if self.max_tokens is not None:
            return prompt_tokens + self.max_tokens
        if self.max_length is not None and self.max_length > prompt_tokens:
            return self.max_length
        return prompt_tokens + DEFAULT_MAX_TOKENS


def params_of_each(params: Any, count: int) -> list[SamplingParams]:
    """One for each of ``count`` prompts, from one for all of them, a list, or None."""
    if params is None:
        params = SamplingParams()
    listed = [params] * count if isinstance(params, SamplingParams) else params
    if not isinstance(listed, (list, tuple)) or any(not isinstance(one, SamplingParams) for one in listed):
        raise RequestError(f"params must be SamplingParams or a list of them, not {type(params).__name__}")
    if len(listed) != count:
        raise RequestError(
            f"{len(listed)} sampling parameters for {count} prompts: give one for all, or one for each"
        )
    return list(listed)


def derived_seed(seed: int, number: int) -> int:
    """The seed of request ``number`` of an LLM with ``seed``: splitmix64; neighbours share nothing."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return (z ^ (z >> 31)) >> 1


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if not _is_int(value, low, high):
        raise RequestError(f"{field}={value!r}: must be an integer from {low} to {high}")


def _check_float(field: str, value: object, low: float, high: float, allowed: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{field}={value!r}: must be {allowed}")
