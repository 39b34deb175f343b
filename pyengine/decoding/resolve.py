"""Parameters of one request with every default filled in, from what the caller and the checkpoint say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pyengine.decoding import checks
from pyengine.decoding.constraints import Constraint, StructuredOutputsParams
from pyengine.decoding.params import ALIASES, LogitsProcessor, SamplingParams
from pyengine.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEFAULT_MAX_TOKENS = 128

# Fields of generation_config.json that are SamplingParams' own, beside transformers' names for them.
_FIELDS = {
    **ALIASES,
    **{
        name: name
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
            *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
            *("max_length", "min_length", "eos_token_id"),
        )
    },
}
for _name in ("num_return_sequences", "guided_decoding"):  # the caller's to say
    del _FIELDS[_name]
# Fields of generation_config.json that would change the tokens, with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "force_words_ids": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}
# What a control is where neither the caller nor the checkpoint says.
_OFF: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


class Vocabulary(Protocol):
    """What of a checkpoint's tokens the parameters have to know (pyengine/codec.py)."""

    vocab_size: int

    def encode_word(self, text: str) -> Sequence[int]: ...
    def constraint(self, params: StructuredOutputsParams, eos: Sequence[int]) -> Constraint: ...


@dataclass(frozen=True)
class BeamParams:
    """The rules of a beam search."""

    num_beams: int
    num_candidates: int  # of all beams together, so many that num_beams of them go on
    num_returned: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True, slots=True)
class ResolvedParams:
    """What the engine works with."""

    n: int  # samples that are made
    max_length: int  # tokens at most, the prompt's included; never above the context
    temperature: float
    seed: int
    logprobs: int  # -1: none
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()  # EOS (unless ignored) and stop_token_ids
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop: bool = False  # the text keeps the stop string, or the text of the stop token
    echo: bool = False
    num_returned: int | None = None  # the best of the n samples; None: all
    prompt_logprobs: int = -1
    constraint: Constraint | None = None  # at its start; each sample follows a copy
    beams: BeamParams | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)  # further arguments of _C.Sampler.set

    @property
    def sampler_arguments(self) -> dict[str, Any]:
        """Those of ``_C.Sampler.set`` that are the same for every sample and at every time."""
        scored = self.logprobs
        if self.num_returned is not None:
            scored = max(scored, 0)  # how likely a sample is decides whether it is returned
        found = {"temperature": self.temperature, "seed": self.seed, "logprobs": scored, **self.sampler}
        if self.beams is not None:
            found["num_candidates"] = self.beams.num_candidates
        return found


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about sampling where the caller does not."""

    params: SamplingParams = SamplingParams()
    max_length: int | None = None  # in a generation_config.json both may stand, and max_tokens wins
    min_length: int | None = None
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
        known: dict[str, Any] = {}
        for name, ours in _FIELDS.items():
            if values.get(name) is None:
                continue
            given: dict[str, Any] = {ours: values[name]}
            try:
                SamplingParams(**given)
            except RequestError as error:
                raise ConfigError(f"{source}: {str(error).replace(ours, name, 1)}") from error
            known[ours] = values[name]
        do_sample = config.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ConfigError(f"{source}: do_sample={do_sample!r}: must be true or false")
        if do_sample is False:  # transformers samples only with true; here only an explicit false is greedy
            known["temperature"] = 0.0
        eos = known.pop("eos_token_id", ())
        return cls(
            max_length=known.pop("max_length", None),
            min_length=known.pop("min_length", None),
            params=SamplingParams(**known),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
            unsupported=tuple(
                f"{name}={config[name]!r}"
                for name, off in _UNSUPPORTED.items()
                if config.get(name) is not None and config[name] not in off
            ),
        )

    def resolve(
        self,
        params: SamplingParams,
        *,
        prompt_tokens: int,
        max_model_len: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
    ) -> ResolvedParams:
        """Fill in what ``params`` leaves open. ``seed`` is used where ``params`` has none.

        Raises RequestError if the prompt leaves no room for a new token, or a token id is outside of the
        vocabulary.
        """
        if prompt_tokens >= max_model_len:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, and the context holds {max_model_len}, prompt and "
                f"new tokens together: shorten it, or set truncate_prompt_tokens to {max_model_len - 1}"
            )

        def value_of(name: str) -> Any:
            own = getattr(params, name)
            found = getattr(self.params, name) if own is None else own
            return _OFF.get(name) if found is None else found

        temperature = float(value_of("temperature"))
        count = params.n if params.best_of is None else params.best_of
        if params.num_beams > 1:  # what the checkpoint says about drawing does not matter
            count, temperature = 1, 0.0
        if temperature == 0 and (count > 1 or params.mirostat):
            name = "mirostat" if params.mirostat else "n" if params.best_of is None else "best_of"
            raise RequestError(
                f"{name}={getattr(params, name)}, but this checkpoint's generation_config.json says "
                "do_sample: false (greedy), which draws nothing and gives one text: set a temperature above 0"
            )
        if vocabulary is not None:
            _check_vocabulary(params, vocabulary.vocab_size)
        own_eos = params.eos_token_id
        eos = self.eos_token_ids
        if own_eos is not None:
            eos = (own_eos,) if isinstance(own_eos, int) else tuple(own_eos)
        stop_ids = (*(() if params.ignore_eos else eos), *(params.stop_token_ids or ()))
        max_length = min(self._max_length(params, prompt_tokens), max_model_len)
        min_tokens = self._min_tokens(params, prompt_tokens, max_length)
        constraint = None
        if params.structured_outputs is not None:
            if vocabulary is None:
                raise RequestError("structured_outputs: there is no tokenizer")
            constraint = vocabulary.constraint(params.structured_outputs, () if params.ignore_eos else eos)
        sampler = {
            "repetition_penalty": float(value_of("repetition_penalty")),
            "presence_penalty": float(params.presence_penalty),
            "frequency_penalty": float(params.frequency_penalty),
            "no_repeat_ngram_size": value_of("no_repeat_ngram_size"),
            "logit_bias": checks.biases("logit_bias", value_of("logit_bias")),
            "allowed_token_ids": checks.token_ids("allowed_token_ids", params.allowed_token_ids),
            "bad_words": _banned(params, value_of, eos, vocabulary),
            "min_tokens": min_tokens,
            "stop_ids": stop_ids,
            "processor": _composed(params.logits_processors),
        }
        if params.mirostat:
            sampler |= {"mirostat_tau": params.mirostat_tau, "mirostat_eta": params.mirostat_eta}
        elif params.num_beams == 1:
            sampler["top_k"] = max(value_of("top_k"), 0)
            for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
                sampler[name] = float(value_of(name))
        beams = None
        if params.num_beams > 1:
            # One more per token that ends a text, as in transformers: then num_beams of them surely go on.
            per_beam = max(2, 1 + len(set(stop_ids)))
            beams = BeamParams(
                num_beams=params.num_beams,
                num_candidates=per_beam * params.num_beams,
                num_returned=params.n,
                length_penalty=1.0 if params.length_penalty is None else float(params.length_penalty),
                early_stopping=params.early_stopping or False,
            )
        defaults = {"presence_penalty": 0.0, "frequency_penalty": 0.0, **_OFF}
        return ResolvedParams(
            n=count,
            max_length=max_length,
            temperature=temperature,
            seed=seed if params.seed is None else params.seed,
            logprobs=-1 if params.logprobs is None else params.logprobs,
            stop=checks.strings("stop", value_of("stop")),
            stop_ids=frozenset(stop_ids),
            min_tokens=min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            echo=params.echo,
            num_returned=None if count == params.n or beams is not None else params.n,
            beams=beams,
            prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
            constraint=constraint,
            # Only what is asked for: a request without controls pays for none, not even here.
            sampler={
                name: value
                for name, value in sampler.items()
                if value != defaults.get(name)
                and value not in (None, (), 0)
                and not (name == "stop_ids" and not min_tokens)
            },
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
        if self.params.max_tokens is not None:
            return prompt_tokens + self.params.max_tokens
        if self.max_length is not None and self.max_length > prompt_tokens:
            return self.max_length
        return prompt_tokens + DEFAULT_MAX_TOKENS

    def _min_tokens(self, params: SamplingParams, prompt_tokens: int, max_length: int) -> int:
        if params.min_tokens is not None or params.min_length is not None:
            least = (
                params.min_tokens
                if params.min_tokens is not None
                else max((params.min_length or 0) - prompt_tokens, 0)
            )
            if least > max_length - prompt_tokens:
                name = "min_length" if params.min_tokens is None else "min_tokens"
                raise RequestError(
                    f"{name}={getattr(params, name)} asks for {least} new tokens, and {max_length} tokens, "
                    f"the prompt's {prompt_tokens} included, are the most: lower it, or raise max_tokens"
                )
            return least
        least = self.params.min_tokens or max((self.min_length or 0) - prompt_tokens, 0)
        return min(least, max_length - prompt_tokens)


def _banned(
    params: SamplingParams,
    value_of: Callable[[str], Any],
    eos: Sequence[int],
    vocabulary: Vocabulary | None,
) -> tuple[tuple[int, ...], ...]:
    """Sequences that must not be completed; EOS alone is not banned this way, as in transformers."""
    ids = checks.token_sequences("bad_words_ids", value_of("bad_words_ids"))
    banned = [sequence for sequence in ids if sequence not in {(token,) for token in eos}]
    banned += [(token,) for token in checks.token_ids("suppress_tokens", value_of("suppress_tokens"))]
    for word in checks.strings("bad_words", params.bad_words):
        if vocabulary is None:
            raise RequestError(f"bad_words={word!r}: there is no tokenizer: give bad_words_ids")
        # At the start of a word and inside of a text: "word" and " word".
        for text in (word, " " + word.lstrip()):
            sequence = tuple(vocabulary.encode_word(text))
            if sequence and sequence not in banned:
                banned.append(sequence)
    return tuple(banned)


def _composed(processors: Sequence[LogitsProcessor] | None) -> LogitsProcessor | None:
    """One function of several, each working on what the one before left."""
    if not processors or len(processors) == 1:
        return processors[0] if processors else None
    listed = tuple(processors)

    def run(token_ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> Any:
        for processor in listed:
            returned = processor(token_ids, logits)
            logits = logits if returned is None else returned
        return logits

    return run


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Token ids that the model does not have would be taken for satisfied; they are somebody's mistake."""
    biased = [token for ids, _ in checks.biases("logit_bias", params.logit_bias) for token in ids]
    banned = [token for ids in params.bad_words_ids or () for token in ids]
    eos = (params.eos_token_id,) if isinstance(params.eos_token_id, int) else params.eos_token_id
    for name, ids in (
        ("logit_bias", biased),
        ("bad_words_ids", banned),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("suppress_tokens", params.suppress_tokens or ()),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("eos_token_id", eos or ()),
    ):
        for token in ids:
            if token >= vocab_size:
                raise RequestError(
                    f"{name}: token id {token} is outside the vocabulary: ids run from 0 to {vocab_size - 1}"
                )
