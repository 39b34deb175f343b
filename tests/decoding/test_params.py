from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from pyengine.decoding.params import SamplingParams
from pyengine.decoding.resolve import BeamParams, GenerationDefaults
from pyengine.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", value) for value in (0, -1, 1.0, True, None, "2", 5000)),
        *(("max_tokens", value) for value in (0, -5, 2.5, True, "7", 2**40)),
        *(("max_length", value) for value in (0, -5, 2.5, True, "7")),
        *(
            ("temperature", value)
            for value in (-0.1, math.nan, math.inf, 1e39, 10**400, 1e-46, True, False, "1", 1j)
        ),
        *(("top_p", value) for value in (0, 0.0, -0.5, 1.01, math.nan, True, "0.9")),
        *(("top_k", value) for value in (-2, 1.5, True, "5")),
        *(("seed", value) for value in (-1, 2**64, 0.5, True, "x")),
        *(("logprobs", value) for value in (-1, 65, 1.0, True, "3")),
        *(("stop", value) for value in (5, [""], "", [None], ["a", 3], b"a", {"a"})),
        *(("stop_token_ids", value) for value in (5, "5", [-1], [True], [1.0], [None])),
        *(("ignore_eos", value) for value in (None, 1, "yes")),
        *(("skip_special_tokens", value) for value in (None, 0)),
        *(("truncate_prompt_tokens", value) for value in (0, -1, 1.5, True)),
        *(("num_beams", value) for value in (0, -1, 257, 2.0, True, None)),
        *(("length_penalty", value) for value in (-20.5, 21, math.nan, True, "1")),
        *(("early_stopping", value) for value in ("always", 1, 0, 0.0)),
    ],
)
def test_refused_with_field_and_value(field: str, value: object) -> None:
    kwargs: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match=f"^{field}=") as caught:
        SamplingParams(**kwargs)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.0, "top_k": 5, "top_p": 1},
        {"temperature": 1.5e-45},
        {"temperature": 3.4e38},
        {"top_k": -1},
        {"top_k": 0},
        {"top_p": 1e-9},
        {"seed": 2**64 - 1},
        {"stop": "a"},
        {"stop": ["a", "bc"]},
        {"stop": []},
        {"stop_token_ids": (1, 2)},
        {"logprobs": 0},
        {"logprobs": 64},
        {"n": 7, "temperature": 0.1},
    ],
)
def test_accepted(kwargs: dict[str, Any]) -> None:
    SamplingParams(**kwargs)


def test_contradictions() -> None:
    with pytest.raises(RequestError, match="max_tokens=5 and max_length=10 contradict"):
        SamplingParams(max_tokens=5, max_length=10)
    with pytest.raises(RequestError, match="n=2 with temperature=0"):
        SamplingParams(n=2, temperature=0)


def resolve(config: dict[str, Any] | None = None, prompt_tokens: int = 10, **fields: Any) -> Any:
    defaults = GenerationDefaults.from_config(config or {}, 49)
    return defaults.resolve(SamplingParams(**fields), prompt_tokens=prompt_tokens, max_model_len=200, seed=77)


def test_defaults_without_generation_config() -> None:
    params = resolve()
    assert (params.temperature, params.max_length, params.sampler) == (1.0, 138, {})
    assert (params.seed, params.logprobs, params.stop, params.stop_ids) == (77, -1, (), {49})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": False}, (0.0, 0, 1.0)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9}, (0.7, 40, 0.9)),
        ({"temperature": 0.7}, (0.7, 0, 1.0)),
        ({"temperature": None, "top_k": None}, (1.0, 0, 1.0)),
    ],
)
def test_generation_config_fills_in(config: dict[str, Any], expected: tuple[float, int, float]) -> None:
    params = resolve(config)
    assert (params.temperature, params.sampler.get("top_k", 0), params.sampler.get("top_p", 1.0)) == expected


def test_what_is_given_wins_over_generation_config() -> None:
    config = {"do_sample": False, "top_k": 40, "top_p": 0.5, "max_new_tokens": 3}
    params = resolve(config, temperature=0.6, top_k=0, top_p=1.0, max_tokens=9, seed=5)
    assert (params.temperature, params.max_length, params.seed, params.sampler) == (0.6, 19, 5, {})


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        ({"max_new_tokens": 3}, {}, 13),
        ({"max_length": 50}, {}, 50),
        ({"max_length": 10}, {}, 138),  # no room for the prompt: the default
        ({"max_length": 50, "max_new_tokens": 3}, {}, 13),
        ({"max_length": 50}, {"max_tokens": 4}, 14),
        ({"max_new_tokens": 3}, {"max_length": 40}, 40),
        ({}, {"max_length": 11}, 11),
        ({}, {"max_length": 100000}, 200),
        ({}, {"max_tokens": 100000}, 200),
    ],
)
def test_length(config: dict[str, Any], fields: dict[str, int], expected: int) -> None:
    assert resolve(config, **fields).max_length == expected


def test_max_length_counts_the_prompt() -> None:
    with pytest.raises(RequestError, match="max_length=10 counts the prompt, which has 10 tokens"):
        resolve(max_length=10)


def test_prompts_beyond_the_context_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        RequestError, match="has 200 tokens, and the context holds 200.*truncate_prompt_tokens to 199"
    ):
        resolve(prompt_tokens=200)
    assert resolve(prompt_tokens=199).max_length == 200


def test_greedy_checkpoint_refuses_samples() -> None:
    with pytest.raises(RequestError, match="do_sample: false"):
        resolve({"do_sample": False}, n=2)
    assert resolve({"do_sample": False}, n=2, temperature=1.0).n == 2


@pytest.mark.parametrize(("eos", "expected"), [(7, {7}), ([7, 8], {7, 8}), (None, {49})])
def test_eos(eos: object, expected: set[int]) -> None:
    assert resolve({"eos_token_id": eos}).stop_ids == expected
    assert resolve({"eos_token_id": eos}, stop_token_ids=[3]).stop_ids == expected | {3}
    assert resolve({"eos_token_id": eos}, stop_token_ids=[3], ignore_eos=True).stop_ids == {3}


def test_several_eos_of_the_model_configuration() -> None:
    assert GenerationDefaults.from_config({}, (4, 5)).eos_token_ids == (4, 5)
    assert GenerationDefaults.from_config({}, None).eos_token_ids == ()


@pytest.mark.parametrize(
    "config",
    [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": 7}, {"max_length": -1}, {"eos_token_id": "</s>"}],
)
def test_damaged_generation_config(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="^generation_config.json: "):
        GenerationDefaults.from_config(config)


def test_settings_that_are_not_applied_are_named() -> None:
    config = {
        "encoder_repetition_penalty": 1.2,
        "num_beams": 4,
        "encoder_no_repeat_ngram_size": 0,
        "top_k": 3,
        "guidance_scale": 1,
        "diversity_penalty": 0.0,
        "forced_eos_token_id": 5,
    }
    assert GenerationDefaults.from_config(config).unsupported == (
        "encoder_repetition_penalty=1.2",
        "num_beams=4",
        "forced_eos_token_id=5",
    )


def test_every_control_of_generation_config_is_applied() -> None:
    config = {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "min_p": 0.03,
        "bad_words_ids": [[5], [49], [6, 7]],
        "suppress_tokens": [8],
        "sequence_bias": [[[3], -1.0]],
        "min_new_tokens": 4,
        "stop_strings": "end",
    }
    params = resolve(config)
    assert params.stop == ("end",)
    assert params.sampler == {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "min_p": 0.03,
        "bad_words": ((5,), (6, 7), (8,)),  # EOS alone is not a bad word
        "logit_bias": (((3,), -1.0),),
        "min_tokens": 4,
        "stop_ids": (49,),
    }
    off: dict[str, Any] = dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p"), 0.0)
    off |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "min_tokens": 0}
    off |= {"bad_words_ids": [], "suppress_tokens": [], "logit_bias": {}}
    assert resolve(config, **off).sampler == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("best_of", value) for value in (0, 1.0, "2", 5000)),
        *((field, value) for field in ("min_tokens", "min_length") for value in (-1, 1.5, True)),
        *(("repetition_penalty", value) for value in (0, -1.0, math.nan, math.inf, True, "1")),
        *((f, v) for f in ("presence_penalty", "frequency_penalty") for v in (-2.1, 2.5, math.nan, None)),
        *(("no_repeat_ngram_size", value) for value in (-1, 2.0, True)),
        *((f, v) for f in ("min_p", "epsilon_cutoff", "eta_cutoff") for v in (-0.1, 1.1, math.nan, "x")),
        *(("typical_p", value) for value in (0, 1.5, True)),
        *(("mirostat", value) for value in (1, 3, True, None, "2")),
        *((f, v) for f in ("mirostat_tau", "mirostat_eta") for v in (0, -1.0, math.inf, None)),
        *(("allowed_token_ids", value) for value in ([], 5, [-1], ["1"])),
        *(("logit_bias", value) for value in (5, {"x": 1.0}, {1: "y"}, {1: math.nan}, {-1: 1.0})),
        *(("logit_bias", value) for value in ({(): 1.0}, [3])),
        *(("bad_words", value) for value in (5, [""], [3])),
        *(("bad_words_ids", value) for value in (5, [5], ((),), [[-1]])),
        *(("suppress_tokens", value) for value in (5, [-1])),
        *(("logits_processors", value) for value in (5, [5], "print")),
        *(("eos_token_id", value) for value in (-1, "x", [True])),
        *(("prompt_logprobs", value) for value in (-1, 65, True)),
        *((f, v) for f in ("echo", "include_stop_str_in_output") for v in (None, 1)),
    ],
)
def test_controls_are_refused_with_field_and_value(field: str, value: object) -> None:
    kwargs: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match=f"^{field}=") as caught:
        SamplingParams(**kwargs)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens=9 and max_tokens=5.*from 0 to 5"),
        ({"min_length": 9, "max_length": 5}, "min_length=9 and max_length=5"),
        ({"min_length": 9, "min_tokens": 5}, "min_tokens=5 and min_length=9"),
        ({"best_of": 3, "n": 4}, "best_of=3: must be an integer from 4 to 4096"),
        ({"best_of": 3, "temperature": 0}, "best_of=3 with temperature=0"),
        ({"mirostat": 2, "top_k": 5}, "mirostat=2 and top_k=5"),
        ({"mirostat": 2, "temperature": 0}, "mirostat=2 and temperature=0"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens=4 and max_tokens=3 are one setting"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False and temperature=0.7"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True and temperature=0"),
        ({"num_beams": 3, "n": 4}, "n=4 and num_beams=3 contradict each other: n must be from 1 to 3"),
        ({"num_beams": 3, "do_sample": True}, "do_sample=True and num_beams=3 contradict"),
        ({"num_beams": 3, "temperature": 0.7}, "temperature=0.7 and num_beams=3 contradict"),
        ({"num_beams": 3, "top_k": 5}, "top_k=5 and num_beams=3 contradict"),
        ({"num_beams": 3, "mirostat": 2}, "mirostat=2 and num_beams=3 contradict"),
        ({"num_beams": 3, "best_of": 2}, "best_of=2 and num_beams=3 contradict"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 and num_beams=1 contradict"),
        ({"early_stopping": False}, "early_stopping=False and num_beams=1 contradict"),
        ({"mirostat_tau": 3.0}, "mirostat_tau=3.0 and mirostat=0 contradict"),
        ({"mirostat_eta": 0.2, "top_p": 0.9}, "mirostat_eta=0.2 and mirostat=0 contradict"),
        # By the names that the caller gave
        ({"max_new_tokens": 0}, "^max_new_tokens=0: must be an integer from 1 to"),
        ({"num_return_sequences": 0}, "^num_return_sequences=0: must be"),
        ({"num_return_sequences": 3, "num_beams": 2}, "^num_return_sequences=3 and num_beams=2 contradict"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "^min_new_tokens=4 and max_new_tokens=3 contradict"),
        ({"stop_strings": [""]}, r"^stop_strings=\[''\]: every entry"),
        ({"sequence_bias": 5}, "^sequence_bias=5: must map"),
        ({"guided_decoding": "a+"}, "^guided_decoding='a\\+': must be StructuredOutputsParams"),
        ({"eos_token_id": -1}, "^eos_token_id=-1: must be an integer from 0 to"),
    ],
)
def test_contradicting_controls(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**kwargs)


def test_beams() -> None:
    config = {"do_sample": True, "temperature": 0.5, "top_k": 7, "num_beams": 9, "eos_token_id": [1, 2]}
    params = resolve(config, num_beams=3, n=2, repetition_penalty=1.5, do_sample=False)
    assert (params.n, params.temperature, params.num_returned) == (1, 0.0, None)
    assert params.sampler == {"repetition_penalty": 1.5}  # nothing is drawn
    assert params.beams == BeamParams(3, 9, 2, 1.0, False)
    assert params.sampler_arguments["num_candidates"] == 9
    assert resolve(config, ignore_eos=True, num_beams=2, early_stopping="never").beams == BeamParams(
        2, 4, 1, 1.0, "never"
    )
    assert resolve(config).beams is None


def test_names_of_transformers() -> None:
    theirs = SamplingParams(
        max_new_tokens=3,
        min_new_tokens=2,
        num_return_sequences=4,
        stop_strings=["x"],
        sequence_bias={(1, 2): 3.0},
    )
    assert theirs == SamplingParams(max_tokens=3, min_tokens=2, n=4, stop=["x"], logit_bias={(1, 2): 3.0})
    assert SamplingParams(do_sample=False) == SamplingParams(temperature=0.0)
    assert SamplingParams(do_sample=True) == SamplingParams()
    assert dataclasses.replace(theirs, n=2) == SamplingParams(
        max_tokens=3, min_tokens=2, n=2, stop=["x"], logit_bias={(1, 2): 3.0}
    )


def test_minimum_length() -> None:
    assert resolve(min_length=15).min_tokens == 5
    assert resolve(min_length=5).min_tokens == 0
    assert resolve({"min_length": 500}, max_tokens=7).min_tokens == 7
    with pytest.raises(RequestError, match="min_length=500 asks for 490 new tokens, and 138 tokens"):
        resolve(min_length=500)


def test_eos_of_the_request() -> None:
    assert resolve(eos_token_id=7).stop_ids == {7}
    assert resolve(eos_token_id=[7, 8], stop_token_ids=[9]).stop_ids == {7, 8, 9}
    assert resolve(eos_token_id=[7, 8], ignore_eos=True).stop_ids == frozenset()


class Words:
    vocab_size = 50

    def encode_word(self, text: str) -> list[int]:
        return [len(text), *text.encode()[:1]]

    def constraint(self, params: Any, eos: Any) -> Any:
        raise NotImplementedError


def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    params = GenerationDefaults().resolve(
        SamplingParams(bad_words=["dog", " cat"]),
        prompt_tokens=1,
        max_model_len=100,
        seed=1,
        vocabulary=Words(),
    )
    assert params.sampler["bad_words"] == ((3, ord("d")), (4, ord(" ")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {50: 1.0}),
        ("logit_bias", {(3, 51): 1.0}),
        ("allowed_token_ids", [3, 50]),
        ("bad_words_ids", [[50]]),
        ("suppress_tokens", [50]),
        ("stop_token_ids", [50]),
        ("eos_token_id", 50),
        ("eos_token_id", [3, 51]),
    ],
)
def test_ids_outside_of_the_vocabulary(field: str, value: Any) -> None:
    kwargs: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match=f"{field}: token id 5. is outside the vocabulary: .* 0 to 49"):
        GenerationDefaults().resolve(
            SamplingParams(**kwargs), prompt_tokens=1, max_model_len=100, seed=1, vocabulary=Words()
        )


def test_processors_run_one_after_the_other() -> None:
    def add(ids: Any, logits: Any) -> None:
        logits += ids.sum()

    run = resolve(logits_processors=[add, lambda ids, logits: logits * 2, add]).sampler["processor"]
    assert run(np.array([1, 2]), np.zeros(3)).tolist() == [9.0, 9.0, 9.0]
    assert resolve(logits_processors=[add]).sampler["processor"] is add
    assert resolve(logits_processors=[]).sampler == {}
