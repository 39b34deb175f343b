"""Checkpoint directories that are wrong in every way are refused, with the fault named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyengine.errors import CheckpointError, ConfigError, PyEngineError
from pyengine.model.checkpoint import load_checkpoint
from tests.model.small_checkpoint import edit_json, make_model, rewrite


def index_of(directory: Path) -> Path:
    return directory / "model.safetensors.index.json"


def shard_up(directory: Path, **weight_map: Any) -> None:
    """Save the model in shards, with some entries of the weight_map changed."""
    (directory / "model.safetensors").unlink()
    make_model().save_pretrained(directory, max_shard_size="8KB")
    index = json.loads(index_of(directory).read_text())
    index["weight_map"].update(weight_map)
    index_of(directory).write_text(json.dumps(index))


def misplace(directory: Path, name: str) -> None:
    """Let the index place a tensor in the first shard."""
    index = json.loads(index_of(directory).read_text())
    assert not index["weight_map"][name].startswith("model-00001")
    index["weight_map"][name] = min(index["weight_map"].values())
    index_of(directory).write_text(json.dumps(index))


def then(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        for step in changes:
            step(directory)

    return change


def drop(*names: str) -> Callable[[Path], None]:
    return lambda d: rewrite(d, lambda tensors: [tensors.pop(n) for n in names])


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda d: rewrite(d, lambda tensors: tensors.update({name: tensor}))


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(content)


def only_bin(content: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        file = directory / "pytorch_model.bin"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)

    return change


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda d: (d / old).rename(d / new)


ATTN = "transformer.h.1.attn.c_attn.weight"
# what is done to a good directory, and what the message must name
MALFORMED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ["ckpt", "config.json"]),
    "config is a directory": (
        then(lambda d: (d / "config.json").unlink(), lambda d: (d / "config.json").mkdir()),
        ["config.json"],
    ),
    "config is not JSON": (write("config.json", b"{"), ["config.json", "not valid JSON"]),
    "config of another model": (
        lambda d: edit_json(d / "config.json", model_type="llama"),
        ["config.json", "'llama'"],
    ),
    "config with another width": (
        lambda d: edit_json(d / "config.json", n_embd=48),
        ["model.safetensors", "transformer.wte.weight", "(61, 24)", "(61, 48)", "n_embd", "config.json"],
    ),
    "config with another vocabulary": (
        lambda d: edit_json(d / "config.json", vocab_size=60),
        ["transformer.wte.weight", "(61, 24)", "(60, 24)", "vocab_size"],
    ),
    "config with another context": (
        lambda d: edit_json(d / "config.json", n_positions=17),
        ["transformer.wpe.weight", "(16, 24)", "(17, 24)", "n_positions"],
    ),
    "config with another MLP": (
        lambda d: edit_json(d / "config.json", n_inner=95),
        ["mlp.c_fc", "96", "95", "n_inner"],
    ),
    "config with more layers": (
        lambda d: edit_json(d / "config.json", n_layer=4),
        ["model.safetensors", "lacks 12 of the 52", "h.3.ln_1.weight"],
    ),
    "generation_config is not JSON": (write("generation_config.json", b"{]"), ["generation_config.json"]),
    "generation_config is a list": (write("generation_config.json", b"[]"), ["generation_config.json", "[]"]),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        ["ckpt has no weights", "model.safetensors", "pytorch_model.bin"],
    ),
    "TensorFlow weights": (rename("model.safetensors", "tf_model.h5"), ["tf_model.h5", "convert"]),
    "weights under another name": (rename("model.safetensors", "gpt.safetensors"), ["gpt.safetensors"]),
    "an adapter": (rename("model.safetensors", "adapter_config.json"), ["adapter", "merge"]),
    "empty file": (write("model.safetensors", b""), ["model.safetensors", "0 bytes"]),
    "cut file": (
        lambda d: write("model.safetensors", (d / "model.safetensors").read_bytes()[:-1])(d),
        ["model.safetensors", "data_offsets", "incomplete"],
    ),
    "no tensors": (lambda d: save_file({}, d / "model.safetensors"), ["lacks 40 of the 40", "holds none"]),
    "tensors of another model": (
        lambda d: save_file({"model.layers.0.q_proj.weight": torch.ones(2)}, d / "model.safetensors"),
        ["lacks 40 of the 40", "'model.layers.0.q_proj.weight'"],
    ),
    "one tensor missing": (drop(ATTN), ["model.safetensors", "lacks 1 of the 40", "h.1.attn.c_attn.weight"]),
    "no embedding": (drop("transformer.wte.weight"), ["wte.weight"]),
    "untied without a head": (
        lambda d: edit_json(d / "config.json", tie_word_embeddings=False),
        ["model.safetensors", "lm_head.weight", "tie_word_embeddings"],
    ),
    "transposed": (put(ATTN, torch.zeros(72, 24)), [ATTN, "(72, 24)", "(24, 72)", "transposed"]),
    "one dimension too many": (put(ATTN, torch.zeros(24, 72, 1)), [ATTN, "(24, 72, 1)", "(24, 72)"]),
    "scalar": (put(ATTN, torch.tensor(1.0)), [ATTN, "()", "(24, 72)"]),
    "int8 weights": (put(ATTN, torch.zeros(24, 72, dtype=torch.int8)), [ATTN, "int8", "bfloat16"]),
    "float64 weights": (put(ATTN, torch.zeros(24, 72, dtype=torch.float64)), [ATTN, "float64", "float32"]),
    "one tensor under two names": (
        put("h.1.attn.c_attn.weight", torch.zeros(24, 72)),
        [f"'{ATTN}'", "'h.1.attn.c_attn.weight'", "remove one"],
    ),
    "cross-attention": (
        put("transformer.h.0.crossattention.c_attn.weight", torch.zeros(24, 48)),
        ["model.safetensors", "transformer.h.0.crossattention.c_attn.weight", "cross-attention"],
    ),
    "index is not JSON": (
        then(shard_up, lambda d: index_of(d).write_bytes(b"{")),
        ["model.safetensors.index.json", "not valid JSON"],
    ),
    "index without weight_map": (
        then(shard_up, lambda d: index_of(d).write_bytes(b"{}")),
        ["model.safetensors.index.json", "weight_map is None"],
    ),
    "index with an empty weight_map": (
        then(shard_up, lambda d: index_of(d).write_bytes(b'{"weight_map": {}}')),
        ["model.safetensors.index.json", "weight_map is {}"],
    ),
    "index with a list": (
        then(shard_up, lambda d: index_of(d).write_bytes(b'{"weight_map": ["a"]}')),
        ["model.safetensors.index.json", "weight_map is ['a']"],
    ),
    "index with a tensor twice": (
        then(shard_up, lambda d: index_of(d).write_bytes(b'{"weight_map": {"a": "x", "a": "y"}}')),
        ["model.safetensors.index.json", "'a' appears twice"],
    ),
    "shard is a number": (lambda d: shard_up(d, x=1), ["index.json", "weight_map", "'x' in 1"]),
    "shard in the parent": (
        lambda d: shard_up(d, x="../x.safetensors"),
        ["index.json", "'x'", "'../x.safetensors'", "same directory"],
    ),
    "shard with an absolute path": (lambda d: shard_up(d, x="/etc/passwd"), ["index.json", "'/etc/passwd'"]),
    "shard with a backslash": (lambda d: shard_up(d, x="..\\x.safetensors"), ["index.json", "'x'"]),
    "shard is the directory": (lambda d: shard_up(d, x="."), ["index.json", "'.'"]),
    "shard without a name": (lambda d: shard_up(d, x=""), ["index.json", "''"]),
    "shard with a null": (lambda d: shard_up(d, x="a\0"), ["index.json", "'a\\x00'"]),
    "shard of another kind": (
        then(lambda d: shard_up(d, x="x.json"), lambda d: write("x.json", b"{}")(d)),
        ["x.json", "not a weight file"],
    ),
    "shard missing": (
        then(shard_up, lambda d: sorted(d.glob("model-*"))[1].unlink()),
        ["index.json", "1 of ", "model-00002-of-"],
    ),
    "shard damaged": (
        then(shard_up, lambda d: sorted(d.glob("model-*"))[1].write_bytes(b"\xff" * 64)),
        ["model-00002-of-", "the header claims"],
    ),
    "tensor not in its shard": (
        then(shard_up, lambda d: misplace(d, "transformer.ln_f.bias")),
        ["index.json", "'transformer.ln_f.bias'", "in model-00001-of-"],
    ),
    "bin: empty": (only_bin(b""), ["pytorch_model.bin", "state dict"]),
    "bin: noise": (only_bin(bytes(range(256)) * 4), ["pytorch_model.bin", "state dict"]),
    "bin: damaged zip": (only_bin(b"PK\x03\x04" + bytes(100)), ["pytorch_model.bin", "state dict"]),
    "bin: git lfs pointer": (only_bin(b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "bin: a list": (only_bin([torch.ones(2)]), ["pytorch_model.bin", "holds a list"]),
    "bin: a training checkpoint": (
        only_bin({"model": {"wte.weight": torch.ones(2)}, "step": 1}),
        ["pytorch_model.bin", "lacks 40 of the 40"],
    ),
    "bin: name is a number": (only_bin({1: torch.ones(2)}), ["pytorch_model.bin", "name is 1"]),
    "bin: sparse": (only_bin({"a": torch.eye(3).to_sparse()}), ["pytorch_model.bin", "'a'", "sparse"]),
    "bin: expanded without end": (
        only_bin({"a": torch.zeros(1).expand(10**12)}),
        ["pytorch_model.bin", "'a'", "repeats"],
    ),
    "bin: no data": (only_bin({"a": torch.empty(3, device="meta")}), ["pytorch_model.bin", "'a'", "meta"]),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_checkpoint_is_refused_with_its_fault_named(fault: str, saved: Path) -> None:
    change, fragments = MALFORMED[fault]
    change(saved)
    with pytest.raises(PyEngineError) as error:
        load_checkpoint(saved)
    assert isinstance(error.value, (CheckpointError, ConfigError))
    for fragment in fragments:
        assert fragment in str(error.value)
    assert len(str(error.value)) < 800


class Malicious:
    """Makes a directory when unpickled without care."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(zipped: bool, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    content = {"wte.weight": Malicious(saved / "run")}
    torch.save(content, saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*state dict"):
        load_checkpoint(saved)
    assert not (saved / "run").exists()


def test_bin_without_torch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_bin({"a": torch.ones(1)})(saved)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pip install torch.*safetensors"):
        load_checkpoint(saved)


def test_not_a_weight_file(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not a weight file"):
        load_checkpoint(saved / "config.json")
    (saved / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a weight file.*convert it"):
        load_checkpoint(saved / "model.gguf")


def test_weights_without_a_configuration(saved: Path) -> None:
    (saved / "config.json").unlink()
    for model in (saved, saved / "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"no config\.json.*copy the model's config\.json beside it"
        ):
            load_checkpoint(model)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "~/nowhere/x", "a b"])
def test_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(name)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_name_that_cannot_be_a_path(name: str) -> None:
    with pytest.raises(CheckpointError, match="directory, a file or a Hub id"):
        load_checkpoint(name)
