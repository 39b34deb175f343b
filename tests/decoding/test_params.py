from __future__ import annotations

import math
from typing import Any

import pytest

from pyengine.decoding.params import GenerationDefaults, SamplingParams
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
    assert (params.temperature, params.top_k, params.top_p, params.max_length) == (1.0, 0, 1.0, 138)
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
    assert (params.temperature, params.top_k, params.top_p) == expected


def test_what_is_given_wins_over_generation_config() -> None:
    config = {"do_sample": False, "top_k": 40, "top_p": 0.5, "max_new_tokens": 3}
    params = resolve(config, temperature=0.6, top_k=0, top_p=1.0, max_tokens=9, seed=5)
    assert (params.temperature, params.top_k, params.top_p, params.max_length, params.seed) == (
        0.6,
        0,
        1.0,
        19,
        5,
    )


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
        "repetition_penalty": 1.2,
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "min_length": 5,
        "top_k": 3,
        "guidance_scale": 1,
        "diversity_penalty": 0.0,
        "stop_strings": "end",
    }
    assert GenerationDefaults.from_config(config).unsupported == (
        "repetition_penalty=1.2",
        "min_length=5",
        "stop_strings='end'",
    )
