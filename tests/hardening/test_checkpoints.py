"""Checkpoints whose parts contradict each other, or break only in use: through ``LLM`` and the command line.

What a single file can have wrong is in the tables of tests/model, which come here through the command line.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyengine import LLM, SamplingParams
from pyengine.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from tests.hardening import tiny
from tests.hardening.faults import Fault, refused, refused_command
from tests.model import test_config, test_safetensors


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(template: Path, tmp_path: Path) -> Path:
    """A good checkpoint, fresh for each test to damage."""
    return Path(shutil.copytree(template, tmp_path / "model"))


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda d: (d / name).write_bytes(data)


def fields(name: str, **values: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        old = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
        tiny.write_json(directory / name, {**old, **values})

    return change


def config(**values: Any) -> Callable[[Path], object]:
    return fields("config.json", **values)


def generation(**values: Any) -> Callable[[Path], object]:
    return fields("generation_config.json", **values)


def tokenizer(**values: Any) -> Callable[[Path], object]:
    return fields("tokenizer_config.json", **values)


def weight(name: str, value: float, count: int = 1) -> Callable[[Path], object]:
    """The first values of one tensor."""

    def change(directory: Path) -> None:
        content = tiny.tensors()
        content[name][1][:count] = array("f", [value] * count)
        (directory / "model.safetensors").write_bytes(tiny.safetensors(content))

    return change


def without(*names: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def then(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda d: [change(d) for change in changes]


def directory(name: str) -> Callable[[Path], object]:
    return then(without(name), lambda d: (d / name).mkdir())


def fifo(name: str) -> Callable[[Path], object]:
    """A pipe that nobody writes to: opening it would wait for ever."""
    return then(without(name), lambda d: os.mkfifo(d / name))


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        pieces = json.loads((directory / "vocab.json").read_text())
        change(pieces)
        tiny.write_json(directory / "vocab.json", pieces)

    return edit


def tokenizer_json(content: Any) -> Callable[[Path], object]:
    return lambda d: tiny.write_json(d / "tokenizer.json", content)


WEIGHTS = "model.safetensors"
BPE: dict[str, Any] = {"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel"}}
FAULTS: dict[str, Fault] = {
    # the weights against the configuration
    "more layers": Fault(
        config(n_layer=3), CheckpointError, (WEIGHTS, "lacks 12 of the 40", "h.2.ln_1.weight")
    ),
    "wider": Fault(config(n_embd=16), CheckpointError, (WEIGHTS, "'wte.weight'", "(260, 8)", "n_embd")),
    "another vocabulary": Fault(config(vocab_size=50257), CheckpointError, ("'wte.weight'", "vocab_size")),
    "another context": Fault(config(n_positions=1024), CheckpointError, ("'wpe.weight'", "n_positions")),
    "a head of its own": Fault(
        config(tie_word_embeddings=False), CheckpointError, ("lm_head.weight", "tie_word_embeddings")
    ),
    "two names of one size that disagree": Fault(
        config(hidden_size=16), CheckpointError, ("'wte.weight'", "(260, 16)")
    ),
    "heads of 3 channels": Fault(
        config(n_head=3), ConfigError, ("config.json", "n_embd is 8", "n_head is 3")
    ),
    "a model of ten trillion parameters": Fault(
        config(n_embd=2**19, n_head=2**12, n_layer=9999),
        ConfigError,
        ("config.json", "at most 1,099,511,627,776"),
    ),
    "vocabulary of two billion": Fault(config(vocab_size=2**31 - 1), CheckpointError, ("'wte.weight'",)),
    # files that are not files
    "configuration is a directory": Fault(directory("config.json"), CheckpointError, ("has no config.json",)),
    "weights are a directory": Fault(directory(WEIGHTS), CheckpointError, (WEIGHTS, "Is a directory")),
    "weights are a pipe": Fault(fifo(WEIGHTS), CheckpointError, (WEIGHTS, "not a regular file")),
    "configuration is a pipe": Fault(fifo("config.json"), CheckpointError, ("has no config.json",)),
    "generation settings are a pipe": Fault(
        fifo("generation_config.json"), CheckpointError, ("generation_config.json", "not a regular file")
    ),
    "weights are a dangling link": Fault(
        then(without(WEIGHTS), lambda d: (d / WEIGHTS).symlink_to("nowhere")),
        CheckpointError,
        ("has no weights",),
    ),
    "weights link to themselves": Fault(
        then(without(WEIGHTS), lambda d: (d / WEIGHTS).symlink_to(WEIGHTS)), CheckpointError, ("model",)
    ),
    "weights without end": Fault(
        then(without(WEIGHTS), lambda d: (d / WEIGHTS).symlink_to("/dev/zero")),
        CheckpointError,
        (WEIGHTS, "not a regular file"),
    ),
    "index without end": Fault(
        then(without(WEIGHTS), lambda d: (d / f"{WEIGHTS}.index.json").symlink_to("/dev/zero")),
        CheckpointError,
        (f"{WEIGHTS}.index.json", "not a regular file"),
    ),
    # numbers that are not numbers: seen when they are met
    "NaN in a matrix": Fault(
        weight("h.1.mlp.c_fc.weight", float("nan")),
        CheckpointError,
        ("the logits after its token", "NaN or infinite", "inspect --check"),
    ),
    "infinity in a bias": Fault(
        weight("h.0.attn.c_attn.bias", float("inf")), CheckpointError, ("NaN or infinite",)
    ),
    "weights too large": Fault(
        weight("h.0.mlp.c_fc.weight", 3e38, 256), CheckpointError, ("NaN or infinite",)
    ),
    # generation_config.json
    "generation settings are cut": Fault(
        write("generation_config.json", '{"top_k": '),
        CheckpointError,
        ("generation_config.json", "not valid JSON"),
    ),
    "generation settings are not UTF-8": Fault(
        write("generation_config.json", b'{"top_k": "\xff"}'),
        CheckpointError,
        ("generation_config.json", "UTF-8"),
    ),
    "generation settings are a string": Fault(
        write("generation_config.json", '"greedy"'), CheckpointError, ("generation_config.json", "'greedy'")
    ),
    "temperature below 0": Fault(
        generation(temperature=-1), ConfigError, ("model/generation_config.json: temperature=-1", "positive")
    ),
    "temperature is NaN": Fault(
        write("generation_config.json", '{"temperature": NaN}'),
        ConfigError,
        ("generation_config.json", "temperature=nan"),
    ),
    "temperature is a word": Fault(generation(temperature="hot"), ConfigError, ("temperature='hot'",)),
    "top_p of 2": Fault(generation(top_p=2), ConfigError, ("generation_config.json", "top_p=2", "up to 1")),
    "top_k is a float": Fault(generation(top_k=50.0), ConfigError, ("top_k=50.0", "integer")),
    "top_k is true": Fault(generation(top_k=True), ConfigError, ("top_k=True", "integer")),
    "max_new_tokens of 0": Fault(generation(max_new_tokens=0), ConfigError, ("max_new_tokens=0",)),
    "max_length is a list": Fault(generation(max_length=[1]), ConfigError, ("max_length=[1]",)),
    "end-of-text token is a word": Fault(
        generation(eos_token_id="end"), ConfigError, ("eos_token_id='end'",)
    ),
    "end-of-text tokens below 0": Fault(generation(eos_token_id=[-1]), ConfigError, ("eos_token_id=[-1]",)),
    "do_sample is a word": Fault(
        generation(do_sample="no"), ConfigError, ("do_sample='no'", "true or false")
    ),
    # tokenizers
    "no merges": Fault(without("merges.txt"), TokenizerError, ("merges.txt is missing", "copy it")),
    "merges are not UTF-8": Fault(
        write("merges.txt", b"#version: 0.2\nh \xff\n"), TokenizerError, ("merges.txt is not UTF-8",)
    ),
    "merges of another vocabulary": Fault(
        write("merges.txt", "#version: 0.2\nq u\n"),
        TokenizerError,
        ("merges.txt, line 2", "'qu'", "vocab.json"),
    ),
    "a merge of three": Fault(
        write("merges.txt", "#version: 0.2\nh e l\n"), TokenizerError, ("merges.txt, line 2", "two pieces")
    ),
    "vocabulary is empty": Fault(write("vocab.json", b""), TokenizerError, ("vocab.json", "not valid JSON")),
    "vocabulary is a list": Fault(write("vocab.json", b"[]"), TokenizerError, ("vocab.json", "object")),
    "vocabulary holds no bytes": Fault(write("vocab.json", b"{}"), TokenizerError, ("vocab.json",)),
    "a piece has no number": Fault(
        vocabulary(lambda v: v.update({"h": None})), TokenizerError, ("vocab.json", "'h'", "None")
    ),
    "ids that the model does not have": Fault(
        vocabulary(lambda v: v.update({"h": 777, "e": 778, "he": 779, "hell": 780})),
        TokenizerError,
        ("the model has only 260 embeddings", "vocab_size"),
    ),
    "vocabulary is a directory": Fault(
        directory("vocab.json"), TokenizerError, ("merges.txt, but not vocab.json", "copy it")
    ),
    "tokenizer.json is empty": Fault(write("tokenizer.json", b""), TokenizerError, ("tokenizer.json",)),
    "tokenizer.json is not UTF-8": Fault(
        write("tokenizer.json", b'{"a": "\xff"}'), TokenizerError, ("tokenizer.json",)
    ),
    "tokenizer.json is a list": Fault(tokenizer_json([]), TokenizerError, ("tokenizer.json",)),
    "tokenizer.json without a model": Fault(tokenizer_json(BPE), TokenizerError, ("tokenizer.json", "model")),
    "tokenizer.json of an unknown kind": Fault(
        tokenizer_json({**BPE, "model": {"type": "Magic"}}), TokenizerError, ("tokenizer.json",)
    ),
    "tokenizer.json with merges of nothing": Fault(
        tokenizer_json({**BPE, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
        TokenizerError,
        ("tokenizer.json",),
    ),
    "tokenizer.json nested too deeply": Fault(
        write("tokenizer.json", b'{"model":' * 20_000), TokenizerError, ("tokenizer.json",)
    ),
    "tokenizer settings are cut": Fault(
        write("tokenizer_config.json", b'{"a'), TokenizerError, ("tokenizer_config.json", "not valid JSON")
    ),
    "unknown tokenizer class": Fault(
        tokenizer(tokenizer_class="MagicTokenizer"), TokenizerError, ("'MagicTokenizer' is not supported",)
    ),
    "tokenizer of another family": Fault(
        tokenizer(tokenizer_class="T5Tokenizer"), TokenizerError, ("T5Tokenizer", "spiece.model")
    ),
    "special token is a number": Fault(
        tokenizer(bos_token=5), TokenizerError, ("tokenizer_config.json", "bos_token", "5")
    ),
    "added token has no id": Fault(
        write("added_tokens.json", '{"<x>": null}'), TokenizerError, ("added_tokens.json", "'<x>'", "None")
    ),
    "damaged SentencePiece model": Fault(
        then(without("vocab.json", "merges.txt"), write("spiece.model", b"\x0a\xff\xff\xff\xff\x0f")),
        TokenizerError,
        ("spiece.model is not a SentencePiece model",),
    ),
    "empty word list": Fault(
        then(without("vocab.json", "merges.txt"), write("vocab.txt", b"")),
        TokenizerError,
        ("vocab.txt", "'[UNK]'"),
    ),
    "no tokenizer for a text": Fault(
        without("vocab.json", "merges.txt"), RequestError, ("no tokenizer files", "token ids")
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_refused_with_its_fault_named(fault: str, model: Path) -> None:
    change, kind, fragments = FAULTS[fault]
    change(model)
    params = SamplingParams(max_tokens=2, temperature=0)
    refused(lambda: LLM(model, num_threads=1).generate("hello", params), kind, fragments)
    options = ("--model", str(model), "--threads", "1", "--max-tokens", "2", "--no-stream")
    refused_command("generate", *options, "hello", fragments=fragments)
    refused_command("generate", *options, "--json", "hello", "hello there", fragments=fragments)


@pytest.mark.parametrize("fault", test_safetensors.MALFORMED)
def test_bad_weight_files_on_the_command_line(fault: str, model: Path) -> None:
    content, fragments = test_safetensors.MALFORMED[fault]
    (model / "model.safetensors").write_bytes(content)
    refused_command("inspect", "--model", str(model), fragments=("model.safetensors", *fragments))


@pytest.mark.parametrize(
    ("content", "fragments"), test_config.MALFORMED, ids=[str(case[0])[:60] for case in test_config.MALFORMED]
)
def test_bad_configurations_on_the_command_line(content: Any, fragments: list[str], model: Path) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (model / "config.json").write_bytes(data)
    refused_command("inspect", "--model", str(model), fragments=("config.json", *fragments))
    refused_command("tokenize", "--model", str(model), "hello", fragments=("config.json", *fragments))
