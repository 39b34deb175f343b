"""What a request asks for: validated when it is made, completed by the checkpoint's defaults later."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any

from pyengine.decoding import checks
from pyengine.decoding.constraints import StructuredOutputsParams
from pyengine.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_SAMPLES = 4096
MAX_BEAMS = 256
MAX_LOGPROBS = 64  # score_rows and the sampler keep at most this many best tokens (csrc/ops/ops.h)
MAX_SEED = 2**64 - 1
# The sampler computes in float32, where a smaller temperature would be 0 (greedy) and a larger one infinite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 2.0**-149, (2 - 2.0**-23) * 2.0**127

# Called with the token ids so far (n,) and the logits (V,), which it edits in place, or returns others.
LogitsProcessor = Callable[["npt.NDArray[np.int32]", "npt.NDArray[np.float32]"], Any]

def _same(a: object, b: object) -> bool:
    """Equality of values that are not checked yet: an array has no single answer."""
    try:
        return bool(a == b)
    except ValueError:
        return False


# transformers' name -> the field, of those that mean the same.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "sequence_bias": "logit_bias",
    "guided_decoding": "structured_outputs",
}
_CUT_OFFS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. ``None`` means: what the checkpoint's generation_config.json says,
    otherwise the default in brackets. docs/decoding.md has the formulas and the order of application.

    n: samples per prompt; they share the prompt's part of the KV cache.
    best_of: samples that are made, of which the n likeliest (sum of log-probabilities) are returned [n].
    max_tokens: new tokens at most [128].
    max_length: tokens at most, the prompt's included; excludes ``max_tokens``.
    min_tokens: new tokens before EOS, ``stop_token_ids`` or ``stop`` may end the text [0].
    min_length: the same, the prompt's tokens included; excludes ``min_tokens``.

    num_beams: continuations that beam search keeps, of which the n best are returned; 1: no beam search [1].
    length_penalty: beams are ranked by their log-probability / length ** length_penalty, -20 to 20 [1.0].
    early_stopping: end when there are num_beams complete texts (True), when a better one is unlikely (False)
        or when none can be better ("never") [False].

    logit_bias: token id -> what is added to its logit; a tuple of ids -> to the last one's after the others.
    allowed_token_ids: no other token may come.
    repetition_penalty: above 0; tokens of the prompt and the text: positive logits are divided by it, others
        multiplied [1.0].
    presence_penalty: -2 to 2; subtracted from the logits of tokens of the text (not the prompt) [0.0].
    frequency_penalty: -2 to 2; the same, times how often the token was generated [0.0].
    no_repeat_ngram_size: no sequence of so many tokens comes twice; 0: off [0].
    bad_words: texts that must not come, each also after a space.
    bad_words_ids: the same as lists of token ids.
    suppress_tokens: token ids that must not come.
    structured_outputs: a regular expression, choices, a JSON schema or a grammar that the text has to follow
        (StructuredOutputsParams).
    logits_processors: functions (token_ids, logits) -> logits or None: NumPy arrays of all tokens so far (n,)
        and of the logits (V,), which may be edited in place. Called in the engine's thread.

    temperature: 0 is greedy [1.0; greedy where generation_config.json has ``do_sample: false``].
    top_k: sample among the k likeliest tokens; 0 or -1: among all [0].
    top_p: sample among the likeliest tokens that together reach this probability, in (0, 1] [1.0].
    min_p: drop tokens below this share of the likeliest one's probability, 0 to 1 [0.0].
    typical_p: keep the tokens of most average surprise that together reach this, in (0, 1] [1.0].
    epsilon_cutoff: drop tokens less probable than this, 0 to 1 [0.0].
    eta_cutoff: the same with a bound that sinks as entropy rises, 0 to 1 [0.0].
    mirostat: 2 steers the surprise of the text instead of all cuts above; 0: off.
    mirostat_tau, mirostat_eta: the surprise in bits to aim at, and the rate of adapting.
    seed: 0 to 2**64 - 1; the same seed gives the same tokens, in any batch [a fresh one, reported in
        the output; derived from the seed of the ``LLM`` if that has one].

    stop: strings that end the text; the text is cut before them.
    include_stop_str_in_output: the text is cut after them.
    stop_token_ids: ids that end the text, like EOS.
    eos_token_id: the EOS of this request, or several [the checkpoint's].
    ignore_eos: go on after an EOS token.
    logprobs: report the log-probability of each token, and of the n best ones, 0 to 64.
    prompt_logprobs: the same for the tokens of the prompt.
    skip_special_tokens: leave special tokens out of the text.
    echo: the text begins with the prompt.
    truncate_prompt_tokens: keep only the last k tokens of the prompt.

    transformers' names are taken as well, where they mean the same: max_new_tokens, min_new_tokens,
    num_return_sequences, stop_strings, sequence_bias; ``do_sample=False`` is ``temperature=0``. vLLM's
    guided_decoding is structured_outputs.

    Raises RequestError naming the field, its value and what is allowed.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    min_tokens: int | None = None
    min_length: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    logit_bias: Mapping[Any, float] | Sequence[Any] | None = None
    allowed_token_ids: Sequence[int] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    bad_words: str | Sequence[str] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    eos_token_id: int | list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    echo: bool = False
    truncate_prompt_tokens: int | None = None
    max_new_tokens: InitVar[int | None] = None
    min_new_tokens: InitVar[int | None] = None
    num_return_sequences: InitVar[int | None] = None
    stop_strings: InitVar[str | list[str] | None] = None
    sequence_bias: InitVar[Any] = None
    guided_decoding: InitVar[StructuredOutputsParams | None] = None
    do_sample: InitVar[bool | None] = None

    def __post_init__(
        self,
        max_new_tokens: int | None,
        min_new_tokens: int | None,
        num_return_sequences: int | None,
        stop_strings: str | list[str] | None,
        sequence_bias: Any,
        guided_decoding: StructuredOutputsParams | None,
        do_sample: bool | None,
    ) -> None:
        given: tuple[Any, ...] = (max_new_tokens, min_new_tokens, num_return_sequences, stop_strings)
        given += (sequence_bias, guided_decoding)
        taken = {}  # field -> the name that the caller knows it by
        for (alias, field), value in zip(ALIASES.items(), given, strict=True):
            if value is not None:
                self._take_alias(alias, field, value)
                taken[field] = alias
        try:
            self._take_do_sample(do_sample)
            self._check_lengths()
            self._check_edits()
            self._check_draw()
            self._check_output()
            self._check_together()
        except RequestError as error:
            message = str(error)
            for field, alias in taken.items():
                message = re.sub(rf"\b{field}=", f"{alias}=", message)
            raise RequestError(message) from None

    def _take_alias(self, alias: str, field: str, value: Any) -> None:
        own, unset = getattr(self, field), type(self).__dataclass_fields__[field].default
        if not _same(own, unset) and not _same(own, value):
            raise RequestError(f"{alias}={value!r} and {field}={own!r} are one setting: give one of them")
        object.__setattr__(self, field, value)

    def _take_do_sample(self, do_sample: bool | None) -> None:
        if do_sample is None:
            return
        checks.check_bool("do_sample", do_sample)
        if do_sample and self.num_beams != 1:
            raise RequestError(
                f"do_sample=True and num_beams={self.num_beams} contradict each other: "
                "beam search draws nothing"
            )
        if self.temperature is None:
            if not do_sample:
                object.__setattr__(self, "temperature", 0.0)
            return
        if do_sample == _same(self.temperature, 0):
            raise RequestError(
                f"do_sample={do_sample} and temperature={self.temperature} contradict each other: "
                "temperature 0 is greedy, every other one samples"
            )

    def _check_lengths(self) -> None:
        checks.check_int("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            checks.check_int("best_of", self.best_of, self.n, MAX_SAMPLES)
        checks.check_int("num_beams", self.num_beams, 1, MAX_BEAMS)
        if self.length_penalty is not None:
            checks.check_float("length_penalty", self.length_penalty, -20, 20)
        early = self.early_stopping
        if not isinstance(early, (bool, type(None))) and not (isinstance(early, str) and early == "never"):
            raise RequestError(f'early_stopping={self.early_stopping!r}: must be True, False or "never"')
        for field in ("max_tokens", "max_length", "truncate_prompt_tokens"):
            if getattr(self, field) is not None:
                checks.check_int(field, getattr(self, field), 1)
        for field in ("min_tokens", "min_length"):
            if getattr(self, field) is not None:
                checks.check_int(field, getattr(self, field), 0)

    def _check_edits(self) -> None:
        checks.biases("logit_bias", self.logit_bias)
        if self.allowed_token_ids is not None:
            if not checks.token_ids("allowed_token_ids", self.allowed_token_ids):
                raise RequestError("allowed_token_ids=[]: must name one token at least")
        if self.repetition_penalty is not None:
            allowed = "a number above 0 and up to 1e30"
            checks.check_float("repetition_penalty", self.repetition_penalty, 1e-30, 1e30, allowed)
        for field in ("presence_penalty", "frequency_penalty"):
            checks.check_float(field, getattr(self, field), -2, 2)
        if self.no_repeat_ngram_size is not None:
            checks.check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        checks.strings("bad_words", self.bad_words)
        checks.token_sequences("bad_words_ids", self.bad_words_ids)
        checks.token_ids("suppress_tokens", self.suppress_tokens)
        constraint = self.structured_outputs
        if constraint is not None and not isinstance(constraint, StructuredOutputsParams):
            raise RequestError(f"structured_outputs={constraint!r}: must be StructuredOutputsParams")
        processors = self.logits_processors
        if processors is not None and (
            not isinstance(processors, (list, tuple)) or not all(callable(each) for each in processors)
        ):
            raise RequestError(f"logits_processors={processors!r}: must be a list of functions")

    def _check_draw(self) -> None:
        if self.temperature is not None:
            is_zero = type(self.temperature) in (int, float) and self.temperature == 0
            if not is_zero:
                allowed = "0, or a positive number that float32 can hold"
                checks.check_float("temperature", self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE, allowed)
        if self.top_k is not None:
            checks.check_int("top_k", self.top_k, -1)
        for field in ("top_p", "typical_p"):
            if getattr(self, field) is not None:
                allowed = "a number above 0 and up to 1"
                checks.check_float(field, getattr(self, field), 2.0**-1074, 1.0, allowed)
        for field in ("min_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(self, field) is not None:
                checks.check_float(field, getattr(self, field), 0, 1)
        if not checks.is_int(self.mirostat) or self.mirostat not in (0, 2):
            raise RequestError(f"mirostat={self.mirostat!r}: must be 0 (off) or 2 (Mirostat 2)")
        for field in ("mirostat_tau", "mirostat_eta"):
            allowed = "a number above 0 and up to 1000"
            checks.check_float(field, getattr(self, field), 1e-30, 1000, allowed)
        if self.seed is not None:
            checks.check_int("seed", self.seed, 0, MAX_SEED)

    def _check_output(self) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                checks.check_int(field, getattr(self, field), 0, MAX_LOGPROBS)
        for field in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "echo"):
            checks.check_bool(field, getattr(self, field))
        checks.strings("stop", self.stop)
        checks.token_ids("stop_token_ids", self.stop_token_ids)
        if isinstance(self.eos_token_id, int):
            checks.check_int("eos_token_id", self.eos_token_id, 0)
        else:
            checks.token_ids("eos_token_id", self.eos_token_id)

    def _check_together(self) -> None:
        def refuse(first: str, second: str, why: str) -> None:
            raise RequestError(
                f"{first}={getattr(self, first)} and {second}={getattr(self, second)} contradict each "
                f"other: {why}"
            )

        if self.max_tokens is not None and self.max_length is not None:
            refuse("max_tokens", "max_length", "give max_tokens (new tokens) or max_length (prompt and new "
                   "tokens together)")  # fmt: skip
        if self.min_tokens is not None and self.min_length is not None:
            refuse("min_tokens", "min_length", "give min_tokens (new tokens) or min_length (prompt and new "
                   "tokens together)")  # fmt: skip
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            refuse("min_tokens", "max_tokens", f"min_tokens must be from 0 to {self.max_tokens}")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            refuse("min_length", "max_length", f"min_length must be from 0 to {self.max_length}")
        self._check_beams(refuse)
        count, field = (self.n, "n") if self.best_of is None else (self.best_of, "best_of")
        if count > 1 and self.temperature == 0 and self.num_beams == 1:
            raise RequestError(
                f"{field}={count} with temperature=0: greedy decoding gives {count} times the same text; "
                f"set {field}=1, or a temperature above 0"
            )
        if not self.mirostat:
            for field in ("mirostat_tau", "mirostat_eta"):
                if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                    refuse(field, "mirostat", "it is for Mirostat, which mirostat=2 turns on")
        else:
            if self.temperature == 0:
                refuse("mirostat", "temperature", "greedy decoding draws nothing that it could steer")
            for cut in _CUT_OFFS:
                if getattr(self, cut) is not None:
                    refuse("mirostat", cut, "Mirostat takes the place of all cut-offs")

    def _check_beams(self, refuse: Callable[[str, str, str], None]) -> None:
        if self.num_beams == 1:
            for field in ("length_penalty", "early_stopping"):
                if getattr(self, field) is not None:
                    refuse(field, "num_beams", "it is for beam search, of 2 beams or more")
            return
        if self.n > self.num_beams:
            refuse("n", "num_beams", f"n must be from 1 to {self.num_beams}, the beams that there are")
        if self.best_of is not None:
            refuse("best_of", "num_beams", "beam search returns the n best of its num_beams")
        if self.mirostat:
            refuse("mirostat", "num_beams", "beam search draws nothing")
        if self.temperature is not None and self.temperature != 0:
            refuse("temperature", "num_beams", "beam search draws nothing; leave it out, or 0")
        for cut in _CUT_OFFS:
            if getattr(self, cut) is not None:
                refuse(cut, "num_beams", "beam search draws nothing that it could cut off")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return checks.strings("stop", self.stop)


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
