"""Quantised checkpoints: written, read, refused; and how near float32 they stay on held-out text."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import _C, LLM, SamplingParams
from pyengine.errors import CheckpointError, ConfigError
from pyengine.model.checkpoint import Checkpoint, load_checkpoint
from pyengine.model.quantization import METHODS, quantization_config, quantized_bytes
from pyengine.model.quantize import quantize_weights, write_quantized
from pyengine.model.safetensors import read_safetensors, write_safetensors
from tests.forward import Runner
from tools.quantization_accuracy import accuracy, windows, with_outliers

MODELS = ["head_dim_odd", "untied", "float16_file", "wide"]


@pytest.fixture
def quantized(saved: Path, tmp_path: Path) -> Path:
    """A small int4 checkpoint, fresh for each test to damage."""
    write_quantized(load_checkpoint(saved), tmp_path / "int4", "int4")
    return tmp_path / "int4"


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(directory: Path, change: Callable[[dict[str, tuple[Any, str, Sequence[int]]]], object]) -> None:
    """Write the tensors of a checkpoint anew, as ``change`` leaves them."""
    path = directory / "model.safetensors"
    tensors: dict[str, tuple[Any, str, Sequence[int]]] = {
        name: (bytes(t.data), t.dtype, t.shape) for name, t in read_safetensors(path).tensors.items()
    }
    change(tensors)
    write_safetensors(path, tensors, {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_written_once_or_quantized_when_loaded(
    name: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_checkpoint(checkpoint(name))
    written = write_quantized(source, tmp_path / "q", method)
    stored = load_checkpoint(tmp_path / "q")
    assert stored.quantization == stored.dtype == method
    assert stored.nbytes == written == quantized_bytes(source.config, method)
    assert source.config == dataclasses.replace(
        stored.config, quantization=None, torch_dtype=source.config.torch_dtype
    )
    at_load = quantize_weights(_C.ExecContext(2), source, method)
    assert set(at_load) == set(stored.tensors)
    for tensor, (buffer, dtype, shape) in at_load.items():
        found = stored.tensors[tensor]
        assert (found.dtype, found.shape, bytes(found.data)) == (dtype, tuple(shape), bytes(buffer))
    ids = np.random.default_rng(0).integers(source.config.vocab_size, size=40).tolist()
    loaded = Runner(checkpoint(name), method, kv_dtype="float32").logits([ids])[0]
    mapped = Runner(tmp_path / "q", "float32").logits([ids])[0]
    assert np.array_equal(loaded.view(np.uint32), mapped.view(np.uint32))


def test_packed_weights_lie_on_cache_lines(quantized: Path) -> None:
    for name, tensor in read_safetensors(quantized / "model.safetensors").tensors.items():
        if tensor.dtype == "uint8" and name.endswith(".weight"):
            assert np.frombuffer(tensor.data, np.uint8).ctypes.data % 64 == 0


@pytest.mark.parametrize("method", METHODS)
def test_llm(method: str, tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24)
    with LLM(quantization=method, num_threads=1) as llm:
        assert (llm.dtype, llm.quantization, llm.kv_cache_dtype) == ("float32", method, "bfloat16")
        expected = llm.generate("It was a", greedy)[0].outputs[0].token_ids
    write_quantized(load_checkpoint(None), tmp_path / "q", method)
    for quantization in (None, method):
        with LLM(tmp_path / "q", quantization=quantization) as llm:
            assert llm.quantization == method
            assert llm.generate("It was a", greedy)[0].outputs[0].token_ids == expected
    other = "int4" if method == "int8" else "int8"
    with pytest.raises(ConfigError, match=f"{other}.*holds {method} weights"):
        LLM(tmp_path / "q", quantization=other)
    with pytest.raises(ConfigError, match="bfloat16.*computed with in float32"):
        LLM(quantization=method, dtype="bfloat16")


def test_other_software_does_not_misread_it(quantized: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises((ValueError, RuntimeError), match="pyengine|size mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized)


def test_what_is_quantized_already_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantised to int4 already"):
        write_quantized(load_checkpoint(quantized), tmp_path / "again", "int8")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'.*pyengine-cli quantize"),
        ("int8", "pyengine-cli quantize"),
        ({**quantization_config("int4"), "version": 2}, "version is 2"),
        ({**quantization_config("int4"), "weight_group_size": 64}, "it must be"),
        ({**quantization_config("int8"), "bits": 3}, "it must be"),
        ({**quantization_config("int8"), "extra": 1}, "it must be"),
    ],
)
def test_unknown_schemes_are_refused(quantized: Path, value: object, message: str) -> None:
    edit_config(quantized, quantization_config=value)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(quantized)


def test_weights_and_config_must_agree(quantized: Path, saved: Path) -> None:
    edit_config(quantized, quantization_config=quantization_config("int8"))
    with pytest.raises(CheckpointError, match=r"wte\.weight.* has shape"):
        load_checkpoint(quantized)
    edit_config(quantized, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"wte\.weight.* has shape"):
        load_checkpoint(quantized)
    edit_config(saved, quantization_config=quantization_config("int8"))
    with pytest.raises(CheckpointError, match="lacks .* tensors"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("wte.scale"), r"lacks 1 .*wte\.scale"),
        (lambda t: t.pop("h.0.mlp.c_fc.group"), r"lacks 1 .*h\.0\.mlp\.c_fc\.group"),
        (lambda t: t.update({"ln_f.bias": (bytes(8), "float32", [2])}), r"ln_f\.bias.* has shape"),
        (lambda t: t.update({"wte.group": (bytes(64), "uint8", [2, 2, 16])}), r"wte\.group.* has shape"),
        (lambda t: t.update({"wte.scale": (t["wte.scale"][0], "int32", t["wte.scale"][2])}),
         r"wte\.scale.* has dtype int32"),
        (lambda t: t.update({"wte.weight": (t["wte.weight"][0], "int8", t["wte.weight"][2])}),
         r"wte\.weight.* has dtype int8"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(
    quantized: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(quantized, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(quantized)


def test_the_extension_checks_for_itself(saved: Path) -> None:
    checkpoint, ctx = load_checkpoint(saved), _C.ExecContext(1)
    config = checkpoint.config.kernel_config()
    good = quantize_weights(ctx, checkpoint, "int4")
    _C.Model(ctx, config, good, "float32")
    with pytest.raises(ConfigError, match="computed with in float32"):
        _C.Model(ctx, config, good, "bfloat16")
    for name, part in (("wte.weight", "shape"), ("wte.group", "shape"), ("h.0.attn.c_attn.scale", "shape")):
        buffer, dtype, shape = good[name]
        with pytest.raises(CheckpointError, match=f"{name}.*{part}"):
            _C.Model(ctx, config, {**good, name: (buffer, dtype, [*shape[:-1], shape[-1] + 1])}, "float32")
        with pytest.raises(CheckpointError, match=f"{name}.*bytes"):
            _C.Model(ctx, config, {**good, name: (bytes(buffer)[:-4], dtype, shape)}, "float32")
    bias = good["ln_f.bias"]
    as_bytes = {**good, "ln_f.bias": (bytes(bias[0])[: bias[2][0]], "uint8", bias[2])}
    with pytest.raises(CheckpointError, match=r"ln_f\.bias.*bytes where numbers"):
        _C.Model(ctx, config, as_bytes, "float32")


def test_nan_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, tuple[Any, str, Sequence[int]]]) -> None:
        name = next(n for n in tensors if n.endswith("h.1.mlp.c_proj.weight"))
        data = array("f", tensors[name][0])
        data[7] = math.nan
        tensors[name] = (data.tobytes(), *tensors[name][1:])

    rewrite(saved, poison)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_proj\.weight.* NaN or infinity"):
        write_quantized(load_checkpoint(saved), tmp_path / "q", "int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_output_directories(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer_config.json").write_text("{}")
    (saved / "notes.bin.txt").write_text("kept")
    source, output = load_checkpoint(saved), tmp_path / "a" / "q"
    output.mkdir(parents=True)  # empty: taken
    write_quantized(source, output, "int8")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "notes.bin.txt"} <= names
    assert [p.name for p in output.parent.iterdir()] == ["q"]  # nothing left beside it
    with pytest.raises(CheckpointError, match="not empty"):
        write_quantized(source, output, "int4")
    assert load_checkpoint(output).quantization == "int8"
    write_quantized(source, output, "int4", overwrite=True)
    assert load_checkpoint(output).quantization == "int4"
    assert [p.name for p in output.parent.iterdir()] == ["q"]
    for bad, message in (
        (saved, "checkpoint that is read"),
        (tmp_path, "not a checkpoint"),
        (saved / "config.json", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_quantized(source, bad, "int8", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_quantized(source, saved / "config.json" / "q", "int8")
    assert load_checkpoint(saved).quantization is None


HELD_OUT = ("austen-persuasion", "carroll-alice", "burgess-busterbrown")


@pytest.fixture(scope="module")
def held_out(shared_data: Path) -> tuple[Checkpoint, list[list[int]]]:
    """The bundled model, and a window of its context from the middle of each held-out book."""
    checkpoint = load_checkpoint(None)
    texts = [(shared_data / "gutenberg" / f"{book}.txt").read_text()[20_000:] for book in HELD_OUT]
    return checkpoint, windows(checkpoint, texts, 3 * (checkpoint.config.n_positions - 1))


def test_accuracy_on_held_out_text(held_out: tuple[Checkpoint, list[list[int]]]) -> None:
    checkpoint, sequences = held_out
    ctx = _C.ExecContext(2)
    exact = accuracy(ctx, checkpoint, checkpoint.weights(), sequences)
    assert exact.divergence == 0
    found = {
        method: accuracy(ctx, checkpoint, quantize_weights(ctx, checkpoint, method), sequences, "bfloat16")
        for method in METHODS
    }
    print(exact, found)
    assert 0 < found["int8"].divergence <= 5e-3
    assert found["int8"].perplexity <= 1.005 * exact.perplexity
    assert found["int4"].perplexity <= 1.05 * exact.perplexity


def test_outlier_channels_change_nothing(held_out: tuple[Checkpoint, list[list[int]]]) -> None:
    checkpoint, sequences = held_out
    ctx, outliers = _C.ExecContext(2), with_outliers(checkpoint)
    same = accuracy(ctx, checkpoint, outliers.weights(), sequences[:1])
    assert same.divergence < 1e-6  # the same function
    for method in METHODS:
        plain, scaled = (
            accuracy(ctx, c, quantize_weights(ctx, c, method), sequences[:4]).divergence
            for c in (checkpoint, outliers)
        )
        assert scaled <= 1.1 * plain
