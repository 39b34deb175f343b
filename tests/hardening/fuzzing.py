"""Fuzzing of every file that a checkpoint may hold: what is mutated, how, and what must come of it.

A target gets one file's bytes. It may accept them or raise a PyEngineError; nothing else. The inputs in
``corpus/<target>`` are where mutation starts, and what has once gone wrong. The tests run them and a few
mutations; ``tools/fuzz.py`` runs as long as it is told.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from pyengine import LLM, SamplingParams
from pyengine.decoding.resolve import GenerationDefaults
from pyengine.errors import CheckpointError, PyEngineError
from pyengine.model.checkpoint import load_checkpoint
from pyengine.model.config import GPT2Config
from pyengine.model.json_file import read_json_object
from pyengine.model.safetensors import read_safetensors
from pyengine.model.tokenizer import load_tokenizer
from tests.hardening import tiny

CORPUS = Path(__file__).with_name("corpus")
MAX_INPUT = 200_000  # bytes


class Target(NamedTuple):
    file: str  # what the mutated bytes are called
    run: Callable[[Path], object]  # with the directory that holds it
    form: str  # "json", "safetensors" or "bytes": what mutations know of it
    beside: tuple[str, ...] = ()  # files of the tiny checkpoint that have to be there
    quantization: str | None = None  # of that checkpoint


def _tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, 1000)
    if tokenizer is not None:
        ids = tokenizer.encode("hello <|endoftext|> World 犬 \0")
        tokenizer.decode(ids)
        [tokenizer.readable_piece(token) for token in ids]


def _torch_bin(directory: Path) -> None:
    from pyengine.model.torch_bin import read_torch_bin

    for tensor in read_torch_bin(directory / "pytorch_model.bin").values():
        bytes(tensor.data[:64])


def _safetensors(directory: Path) -> None:
    for tensor in read_safetensors(directory / "model.safetensors").tensors.values():
        bytes(tensor.data[:64])


def _generation_config(directory: Path) -> None:
    values = read_json_object(directory / "generation_config.json", CheckpointError)
    GenerationDefaults.from_config(values, 259).resolve(
        SamplingParams(), prompt_tokens=3, max_model_len=32, seed=0
    )


def _model(directory: Path) -> None:
    """All the way to tokens: what the readers let through must not trouble the kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with LLM(directory, num_threads=1, max_num_seqs=2) as llm:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
            llm.score([1, 2, 3])


TARGETS: dict[str, Target] = {
    "safetensors": Target("model.safetensors", _safetensors, "safetensors"),
    "config": Target("config.json", lambda d: GPT2Config.from_file(d / "config.json"), "json"),
    "index": Target(
        "model.safetensors.index.json", load_checkpoint, "json", ("config.json", "shard.safetensors")
    ),
    "generation_config": Target("generation_config.json", _generation_config, "json"),
    "torch_bin": Target("pytorch_model.bin", _torch_bin, "bytes"),
    "tokenizer_json": Target("tokenizer.json", _tokenizer, "json"),
    "tokenizer_config": Target("tokenizer_config.json", _tokenizer, "json", ("vocab.json", "merges.txt")),
    "special_tokens_map": Target("special_tokens_map.json", _tokenizer, "json", ("vocab.json", "merges.txt")),
    "added_tokens": Target("added_tokens.json", _tokenizer, "json", ("vocab.json", "merges.txt")),
    "vocab": Target("vocab.json", _tokenizer, "json", ("merges.txt",)),
    "merges": Target("merges.txt", _tokenizer, "bytes", ("vocab.json",)),
    "wordpiece": Target("vocab.txt", _tokenizer, "bytes"),
    "sentencepiece": Target("spiece.model", _tokenizer, "bytes"),
    "model_config": Target("config.json", _model, "json", ("model.safetensors",)),
    "quantized_config": Target("config.json", _model, "json", ("model.safetensors",), "int8"),
    "quantized_int8": Target("model.safetensors", _model, "safetensors", ("config.json",), "int8"),
    "quantized_int4": Target("model.safetensors", _model, "safetensors", ("config.json",), "int4"),
    "model_weights": Target("model.safetensors", _model, "safetensors", ("config.json",)),
}


class Runner:
    """Runs inputs of one target in a directory of its own."""

    def __init__(self, name: str, root: Path) -> None:
        self.target = TARGETS[name]
        self.directory = root / name
        template = tiny.make(root / f"{name}-template")
        if self.target.quantization is not None:
            template = quantized(template, self.target.quantization)
        shutil.copy(template / "model.safetensors", template / "shard.safetensors")
        self.directory.mkdir()
        for file in self.target.beside:
            shutil.copy(template / file, self.directory / file)

    def __call__(self, data: bytes) -> PyEngineError | None:
        """The error that the input came to, None if it was accepted; any other exception is a finding."""
        # A new file each time: the guard of one that is still mapped would notice an old one's change.
        (self.directory / self.target.file).unlink(missing_ok=True)
        (self.directory / self.target.file).write_bytes(data)
        try:
            self.target.run(self.directory)
        except PyEngineError as error:
            message = str(error)
            assert message and len(message) < 2000, f"a message of {len(message)} characters"
            return error
        return None


def quantized(checkpoint: Path, method: str) -> Path:
    """A quantised copy of a checkpoint, beside it."""
    from pyengine.model.quantize import write_quantized

    output = checkpoint.with_name(f"{checkpoint.name}-{method}")
    write_quantized(load_checkpoint(checkpoint), output, method)
    return output


def seeds(name: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


# Mutations.

_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    8,
    255,
    256,
    260,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63,
    2**64,
    -(2**63),
)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, None, True, False, "", "a", "\ud800", "\0", "../x", "x" * 300, 0.5, 1e308, -1e308,
    float("nan"), float("inf"), [], {}, [[]], [{}], {"": {}}, {"content": "x"}, [0, 0], [0, 2**60],
    [2**60, 2**61], "F32", "BF16", "F4", "GPT2Tokenizer", "T5Tokenizer", "BPE", "WordPiece",
    "Unigram", "ByteLevel",
)  # fmt: skip
_BYTES = (
    b"\0",
    b"\xff" * 8,
    b"{",
    b"}",
    b'"',
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"1e999",
    b"\n",
    b"\xef\xbb\xbf",
    b"\\ud800",
)


def mutate(random: Random, data: bytes, others: list[bytes], form: str) -> bytes:
    """One to four changes of ``data``, of its structure where that can be parsed."""
    for _ in range(random.randint(1, 4)):
        changed = None
        if form != "bytes" and random.random() < 0.7:
            changed = _mutate_json(random, data) if form == "json" else _mutate_header(random, data)
        data = _mutate_bytes(random, data, others) if changed is None else changed
    return data[:MAX_INPUT]


def _mutate_bytes(random: Random, data: bytes, others: list[bytes]) -> bytes:
    at = random.randint(0, len(data))
    length = random.choice((0, 1, 2, 8, 64, len(data)))
    cut, rest = data[:at], data[at + length :]
    kind = random.randrange(6)
    if kind == 0:
        return cut + random.choice(_BYTES) + rest
    if kind == 1:
        return cut + random.randbytes(random.choice((1, 2, 4, 8))) + rest
    if kind == 2:
        return cut
    if kind == 3:
        return cut + data[at : at + length] * random.randint(2, 40) + rest
    if kind == 4:
        other = random.choice(others)
        start = random.randint(0, len(other))
        return cut + other[start : start + 200] + rest
    return cut + bytes(byte ^ (1 << random.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :]


def _mutate_json(random: Random, data: bytes) -> bytes | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if random.random() < 0.05:
        return b"[" * 100_000 + data
    return _dump(_mutate_value(random, value))


def _mutate_header(random: Random, data: bytes) -> bytes | None:
    """The header of a safetensors file; its length stays true as a rule, and its data as long as it was."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return None
    header = _mutate_json(random, data[8 : 8 + length])
    if header is None:
        return None
    said = (
        len(header) if random.random() < 0.9 else random.choice((0, 1, 2**32, 2**60, 2**63, len(header) + 1))
    )
    return said.to_bytes(8, "little") + header + data[8 + length :]


def _mutate_value(random: Random, value: Any) -> Any:
    """A JSON value with one of its nodes changed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, random.choice(["", "x", "__metadata__", "h.0.ln_1.weight", *value]): value[key]}
        return {**value, key: _mutate_value(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        kind = random.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return value * random.choice((2, 50))
        return [*value[:at], _mutate_value(random, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return value + random.choice((-1, 1, -8, 8))
    return random.choice(_VALUES)


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")
