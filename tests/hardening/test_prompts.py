"""Prompts, texts, choices and parameters that cannot be served are refused, with what is wrong named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import LLM, SamplingParams
from pyengine.decoding.params import ALIASES
from pyengine.errors import CheckpointError, ConfigError, PyEngineError, RequestError, TokenizerError
from tests.hardening import tiny
from tests.hardening.faults import refused

ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny.make(tmp_path_factory.mktemp("tiny") / "model"), num_threads=1)


# not one prompt, nor a list of them -> what the message names
NO_PROMPT: dict[str, tuple[Any, type[PyEngineError], str]] = {
    "a number": (5, RequestError, "not int"),
    "a float": (1.5, RequestError, "not float"),
    "bytes": (b"abc", RequestError, "not bytes"),
    "a dictionary": ({"prompt": "a"}, RequestError, "not dict"),
    "a set": ({1, 2}, RequestError, "not set"),
    "a generator": ((i for i in [1]), RequestError, "not generator"),
    "a class": (list, RequestError, "not type"),
    "a range": (range(3), RequestError, "not range"),
    "a path": (Path("a"), RequestError, "not PosixPath"),
    "an array of no axis": (np.array(3), RequestError, "not ndarray"),
    "below the vocabulary": (
        [1, -1],
        RequestError,
        "token 1 of the prompt is -1: token ids are integers from 0 to 259",
    ),
    "above the vocabulary": ([260], RequestError, "token 0 of the prompt is 260"),
    "beyond 64 bits": ([2**70], RequestError, "from 0 to 259"),
    "float ids": ([1, 2.0], RequestError, "token 1 of the prompt is 2.0"),
    "float array": (np.ones(3), RequestError, "not float"),
    "NaN": ([1, math.nan], RequestError, "is nan"),
    "true": ([1, True], RequestError, "token 1 of the prompt is True"),
    "a word among ids": ([1, "a"], RequestError, "token 1 of the prompt is 'a'"),
    "an id among words": (["a", 1], RequestError, "not int"),
    "nothing among ids": ([1, None], RequestError, "token 1 of the prompt is None"),
    "complex ids": ([1, 1j], RequestError, "is 1j"),
    "nested too deeply": ([[[[1]]]], RequestError, "token 0 of the prompt is [[1]]"),
    "a list of bytes": ([b"a"], RequestError, "not bytes"),
    "a lone surrogate": ("a\ud800", TokenizerError, "character 1 is the lone surrogate U+D800"),
}
_ENTRIES: dict[str, Callable[[LLM, Any], object]] = {
    "generate": lambda llm, value: llm.generate(value, ONE),
    "stream": lambda llm, value: llm.stream(value, ONE),
    "astream": lambda llm, value: llm.astream(value, ONE),
    "score": lambda llm, value: llm.score(value),
    "continuation": lambda llm, value: llm.score("hello", value),
    "choose": lambda llm, value: llm.choose(value, ["a", "b"]),
    "choice": lambda llm, value: llm.choose("hello", ["a", value]),
}


@pytest.mark.parametrize("entry", _ENTRIES)
@pytest.mark.parametrize("fault", NO_PROMPT)
def test_what_is_no_prompt_is_refused_everywhere(llm: LLM, fault: str, entry: str) -> None:
    value, kind, fragment = NO_PROMPT[fault]
    call = _ENTRIES[entry]
    if entry not in ("generate", "score"):  # these want one prompt, and say so of several
        with pytest.raises((RequestError, TokenizerError)):
            call(llm, value)
        return
    refused(lambda: call(llm, value), kind, (fragment,))


# (call, class, what the message names)
CALLS: dict[str, tuple[Callable[[LLM], object], type[PyEngineError], tuple[str, ...]]] = {
    "a prompt as long as the context": (
        lambda llm: llm.generate([1] * 32, ONE),
        RequestError,
        ("the prompt has 32 tokens", "context holds 32", "truncate_prompt_tokens to 31"),
    ),
    "a text of two million characters": (
        lambda llm: llm.generate("x" * 2_000_000, ONE),
        RequestError,
        ("2000000 tokens", "context holds 32"),
    ),
    "one of several": (
        lambda llm: llm.generate(["a", "x" * 99, "b"], ONE),
        RequestError,
        ("prompt 2 of 3: the prompt has 99 tokens",),
    ),
    "two prompts to stream": (
        lambda llm: llm.stream(["a", "b"]),  # type: ignore[list-item]
        RequestError,
        ("a stream continues one prompt",),
    ),
    "max_length within the prompt": (
        lambda llm: llm.generate([1] * 9, SamplingParams(max_length=9)),
        RequestError,
        ("max_length=9", "has 9 tokens", "10 or more"),
    ),
    "several greedy samples": (
        lambda llm: llm.generate("a", SamplingParams(n=2)),
        RequestError,
        ("n=2", "do_sample: false", "temperature above 0"),
    ),
    "parameters for other prompts": (
        lambda llm: llm.generate(["a"], [ONE, ONE]),
        RequestError,
        ("2 sampling parameters for 1 prompts",),
    ),
    "parameters of no kind": (
        lambda llm: llm.generate("a", {"max_tokens": 1}),  # type: ignore[arg-type]
        RequestError,
        ("params must be SamplingParams", "dict"),
    ),
    "progress is a number": (
        lambda llm: llm.generate("a", ONE, progress=5),  # type: ignore[arg-type]
        RequestError,
        ("progress=5: must be a function",),
    ),
    "on_output is a list": (
        lambda llm: llm.generate("a", ONE, on_output=[]),  # type: ignore[arg-type]
        RequestError,
        ("on_output=[]: must be a function",),
    ),
    "priority is a word": (
        lambda llm: llm.generate("a", ONE, priority="high"),  # type: ignore[arg-type]
        RequestError,
        ("priority='high'", "integer"),
    ),
    "request_id is a number": (
        lambda llm: llm.stream("a", ONE, request_id=5),  # type: ignore[arg-type]
        RequestError,
        ("request_id=5: must be a string",),
    ),
    "nothing to score": (lambda llm: llm.score([[1], []]), RequestError, ("nothing to score", "empty")),
    "an empty continuation": (lambda llm: llm.score("a", ""), RequestError, ("adds no token",)),
    "continuations for other texts": (
        lambda llm: llm.score(["a", "b"], ["c"]),
        RequestError,
        ("2 texts need a list of 2 continuations",),
    ),
    "stride of the whole context": (
        lambda llm: llm.score("a", stride=32),
        RequestError,
        ("stride=32", "from 1 to 31"),
    ),
    "stride is true": (lambda llm: llm.score("a", stride=True), RequestError, ("stride=True",)),
    "65 best tokens": (
        lambda llm: llm.score("a", top_logprobs=65),
        RequestError,
        ("top_logprobs=65", "0 to 64"),
    ),
    "add_bos is a word": (
        lambda llm: llm.score("a", add_bos="yes"),  # type: ignore[call-overload]
        RequestError,
        ("add_bos='yes'", "True or False"),
    ),
    "no choices": (lambda llm: llm.choose("a", []), RequestError, ("choices=[]", "one choice or more")),
    "choices are one text": (lambda llm: llm.choose("a", "bc"), RequestError, ("choices='bc'",)),
    "choices are a number": (
        lambda llm: llm.choose("a", 5),  # type: ignore[arg-type]
        RequestError,
        ("choices=5",),
    ),
    "choices are ids": (
        lambda llm: llm.choose("a", [1, 2]),  # type: ignore[list-item]
        RequestError,
        ("not int",),
    ),
    "an empty choice": (
        lambda llm: llm.choose("a", ["b", ""]),
        RequestError,
        ("choice 2 of 2 ('')", "adds no token"),
    ),
    "an unknown normalisation": (
        lambda llm: llm.choose("a", ["b", "c"], length_normalization="words"),
        RequestError,
        ("length_normalization='words'", '"tokens"'),
    ),
    "ids to decode that are words": (
        lambda llm: llm.tokenizer and llm.tokenizer.decode("ab"),  # type: ignore[arg-type]
        TokenizerError,
        ("must be a list of integers",),
    ),
    "ids to decode that are not there": (
        lambda llm: llm.tokenizer and llm.tokenizer.decode([1, 260]),
        TokenizerError,
        ("token id 260", "0 to 259"),
    ),
    "bytes to encode": (
        lambda llm: llm.tokenizer and llm.tokenizer.encode(b"a"),  # type: ignore[arg-type]
        TokenizerError,
        ("must be str, not bytes",),
    ),
}


@pytest.mark.parametrize("fault", CALLS)
def test_calls_that_cannot_be_served(llm: LLM, fault: str) -> None:
    call, kind, fragments = CALLS[fault]
    refused(lambda: call(llm), kind, fragments)


def test_the_engine_is_as_before(llm: LLM) -> None:
    """After all of the above, whose tests share it."""
    assert llm.generate("hello", ONE)[0].finished
    assert llm.stats().running == llm.stats().waiting == 0
    assert llm._engine.core.manager.num_in_use == 0  # type: ignore[attr-defined]
    llm._engine.core.manager.check_invariants()  # type: ignore[attr-defined]


# (argument, value, what the message names)
ARGUMENTS: list[tuple[str, Any, type[PyEngineError], str]] = [
    ("model", 5, CheckpointError, "the model is 5"),
    ("model", b"gpt2", CheckpointError, "the model is b'gpt2'"),
    ("model", "", CheckpointError, "the model is ''"),
    ("model", "a\0b", CheckpointError, "directory, a file or a Hub id"),
    ("model", "x" * 10_000, CheckpointError, "File name too long"),
    ("model", "~nobody-at-all/x", CheckpointError, "~nobody-at-all/x"),
    ("model", "/dev/null", CheckpointError, "/dev/null is not a weight file"),
    ("device", "tpu", ConfigError, "device='tpu'"),
    ("device", None, ConfigError, "device=None"),
    ("dtype", "float16", ConfigError, "float16"),
    ("dtype", 32, ConfigError, "dtype=32"),
    ("quantization", "int3", ConfigError, "quantization='int3'"),
    ("kv_cache_dtype", "int3", ConfigError, "kv_cache_dtype='int3'"),
    ("num_threads", 0, ConfigError, "num_threads=0"),
    ("num_threads", 1.5, ConfigError, "num_threads=1.5"),
    ("num_threads", True, ConfigError, "num_threads=True"),
    ("num_threads", 10**9, ConfigError, "num_threads=1000000000"),
    ("max_model_len", 33, ConfigError, "max_model_len=33: must be an integer from 1 to 32"),
    ("max_model_len", "32", ConfigError, "max_model_len='32'"),
    ("max_num_seqs", 0, ConfigError, "max_num_seqs=0"),
    ("max_num_seqs", 2**40, ConfigError, "max_num_seqs=1099511627776"),
    ("max_num_batched_tokens", -1, ConfigError, "max_num_batched_tokens=-1"),
    ("max_queue_size", 0, ConfigError, "max_queue_size=0"),
    ("kv_cache_memory", "lots", ConfigError, "kv_cache_memory='lots'"),
    ("kv_cache_memory", "1", ConfigError, "no block of the KV cache"),
    ("kv_cache_memory", -1, ConfigError, "kv_cache_memory=-1"),
    ("kv_cache_memory", math.nan, ConfigError, "kv_cache_memory=nan"),
    ("enable_prefix_caching", "yes", ConfigError, "enable_prefix_caching='yes'"),
    ("seed", -1, ConfigError, "seed=-1"),
    ("seed", 2**64, ConfigError, "seed=18446744073709551616"),
]


@pytest.mark.parametrize(("argument", "value", "kind", "fragment"), ARGUMENTS, ids=lambda v: str(v)[:30])
def test_arguments_of_the_llm(
    llm: LLM, argument: str, value: Any, kind: type[PyEngineError], fragment: str
) -> None:
    refused(lambda: LLM(**{"model": llm.path, argument: value}), kind, (fragment,))


VALUES = [
    None, 0, -1, 1.5, -0.0, math.nan, math.inf, "1", "", b"x", [], [-1], ["a"], [""], [None], {}, True,
    False, 2**64, -(2**63), 10**400, 5e-324, np.float32(0.5), np.array([1, 2]), object(), 1j, "\ud800",
    ["\ud800"], [2**31],
]  # fmt: skip


@pytest.mark.parametrize("field", SamplingParams.__dataclass_fields__)
def test_sampling_parameters_of_every_type(llm: LLM, field: str) -> None:
    """Refused when they are made, naming the field, or good enough to run with."""
    names = (field, ALIASES.get(field, field))
    for value in VALUES:
        fields: dict[str, Any] = {"max_tokens": 2, field: value} if field != "max_length" else {field: value}
        try:
            params = SamplingParams(**fields)
        except RequestError as error:
            assert any(name in str(error) for name in names)
            continue
        try:
            llm.generate([1, 2], params)
        except RequestError as error:
            assert any(name in str(error) for name in names)
