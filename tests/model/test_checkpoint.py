"""Checkpoints are read as transformers saves and loads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pyengine import LLM
from pyengine.errors import CheckpointError
from pyengine.model import checkpoint as checkpoint_module
from pyengine.model.checkpoint import load_checkpoint, resolve
from tests.model.small_checkpoint import assert_same_weights, edit_json, make_model, raw_bytes, rewrite


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", ["10MB", "8KB"], ids=["single", "sharded"])
def test_reads_what_transformers_saves(
    dtype: str, tied: bool, safe: bool, shard_size: str, tmp_path: Path
) -> None:
    model = make_model(dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=shard_size)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_weights(checkpoint, model)
    assert checkpoint.path == tmp_path
    assert checkpoint.dtype == dtype
    assert checkpoint.auto_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    assert checkpoint.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert checkpoint.ignored == ()
    assert {f.suffix for f in checkpoint.files} == {".safetensors" if safe else ".bin"}
    assert (len(checkpoint.files) > 3) == (shard_size == "8KB")
    assert checkpoint.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_names_without_prefix(safe: bool, tmp_path: Path) -> None:
    model = make_model()
    model.transformer.save_pretrained(tmp_path, safe_serialization=safe)
    assert_same_weights(load_checkpoint(str(tmp_path)), model)


def test_state_dict_from_before_torch_1_6(saved: Path) -> None:
    model = make_model()
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load_checkpoint(saved), model)


def test_non_contiguous_and_shared_tensors_of_a_state_dict(saved: Path) -> None:
    model = make_model()
    (saved / "model.safetensors").unlink()
    state = {
        name: p.t().contiguous().t() if p.dim() == 2 else torch.nn.Parameter(p)
        for name, p in model.state_dict().items()
    }
    assert not state["transformer.wpe.weight"].is_contiguous()
    torch.save({**state, "epoch": 3}, saved / "pytorch_model.bin")
    assert_same_weights(load_checkpoint(saved), model)


def test_buffers_of_old_versions_and_heads_of_other_tasks(saved: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(3):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril().to(torch.uint8)
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["score.weight"] = torch.ones(2, 24)
        tensors["position_ids"] = torch.arange(16)
        tensors["transformer.h.3.ln_1.weight"] = torch.ones(24)  # a layer more than config.json has

    rewrite(saved, add)
    checkpoint = load_checkpoint(saved)
    assert_same_weights(checkpoint, make_model())
    assert set(checkpoint.ignored) == {"score.weight", "position_ids", "transformer.h.3.ln_1.weight"}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_training_are_stripped(wrapper: str, saved: Path) -> None:
    rewrite(saved, lambda tensors: [tensors.update({wrapper + n: tensors.pop(n)}) for n in list(tensors)])
    assert_same_weights(load_checkpoint(saved), make_model())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_in_the_file_as_in_transformers(tied: bool, saved: Path) -> None:
    """A tied head in the file gives way to the embedding; an untied one is its own."""
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": torch.full((61, 24), 0.5)}))
    edit_json(saved / "config.json", tie_word_embeddings=tied)
    checkpoint = load_checkpoint(saved)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(saved)
    assert_same_weights(checkpoint, theirs)
    head = checkpoint.weights().get("lm_head.weight", checkpoint.weights()["wte.weight"])
    assert bytes(head[0]) == raw_bytes(theirs.lm_head.weight)


def test_mixed_dtypes_compute_in_float32(saved: Path) -> None:
    name = "transformer.wte.weight"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    checkpoint = load_checkpoint(saved)
    assert (checkpoint.dtype, checkpoint.auto_dtype) == ("mixed", "float32")
    assert checkpoint.tensors["wte.weight"].dtype == "bfloat16"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_path_of_a_weight_file(file: str, tmp_path: Path) -> None:
    model = make_model()
    size = "8KB" if "index" in file else "10MB"
    model.save_pretrained(tmp_path, safe_serialization="safetensors" in file, max_shard_size=size)
    checkpoint = load_checkpoint(tmp_path / file)
    assert_same_weights(checkpoint, model)
    assert checkpoint.path == tmp_path


def test_safetensors_come_before_bin(saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"never read")
    assert load_checkpoint(saved).files == (saved / "model.safetensors",)


def test_weights_at_odd_places_of_the_file(saved: Path) -> None:
    expected = LLM(saved).score([3, 1, 4, 1, 5]).logprobs
    file = saved / "model.safetensors"
    content = file.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    unaligned = header + b" " * (1 - len(header) % 8 % 4 + 4)
    file.write_bytes(len(unaligned).to_bytes(8, "little") + unaligned + content[8 + len(header) :])
    checkpoint = load_checkpoint(saved)
    for data, _, _ in checkpoint.weights().values():
        assert np.frombuffer(data, np.uint8).ctypes.data % 4 != 0
    assert_same_weights(checkpoint, make_model())
    assert LLM(saved).score([3, 1, 4, 1, 5]).logprobs == expected


def test_weights_are_not_copied(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert all(
        data.obj is checkpoint.tensors[name].data.obj for name, (data, _, _) in checkpoint.weights().items()
    )


def test_without_generation_config(saved: Path) -> None:
    (saved / "generation_config.json").unlink()
    assert load_checkpoint(saved).generation_config == {}


def test_home_directory_is_expanded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_checkpoint("~/ckpt").path == saved


def test_bundled_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = saved.parent / "pyengine"
    monkeypatch.setattr(checkpoint_module, "__file__", str(package / "model" / "checkpoint.py"))
    with pytest.raises(CheckpointError, match="no bundled model"):
        resolve(None)
    shutil.copytree(saved, package / "assets" / checkpoint_module.BUNDLED_MODEL)
    assert_same_weights(load_checkpoint(), make_model())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_check_counts_what_is_not_finite(dtype: str, tmp_path: Path) -> None:
    model = make_model(dtype)
    with torch.no_grad():
        model.transformer.wte.weight[3, :5] = float("nan")
        model.transformer.wte.weight[4, :2] = float("-inf")
        model.transformer.wte.weight[60, 23] = float("inf")
        model.transformer.h[2].mlp.c_fc.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    report = load_checkpoint(tmp_path).check()
    assert not report.ok
    assert {(t.name, t.num_nan, t.num_inf) for t in report.faults} == {
        ("wte.weight", 5, 3),
        ("h.2.mlp.c_fc.bias", 96, 0),
    }
    assert (report.num_nan, report.num_inf) == (101, 3)
    assert report.num_elements == model.num_parameters()
    parameters = {name.removeprefix("transformer."): p.detach() for name, p in model.named_parameters()}
    for tensor in report.tensors:
        values = parameters[tensor.name].double()
        values = values[values.isfinite()]
        assert tensor.num_elements == parameters[tensor.name].numel()
        assert tensor.nbytes == parameters[tensor.name].nbytes
        if values.numel() == 0:
            assert (tensor.minimum, tensor.maximum, tensor.rms) == (0, 0, 0)
        else:
            assert (tensor.minimum, tensor.maximum) == (values.min().item(), values.max().item())
            assert tensor.rms == pytest.approx(values.square().mean().sqrt().item(), rel=1e-5)


def test_check_of_good_and_of_huge_weights(saved: Path) -> None:
    name = "h.1.attn.c_attn.weight"
    rewrite(saved, lambda tensors: tensors["transformer." + name].fill_(3e38))
    report = load_checkpoint(saved).check()
    assert report.ok
    assert report.nbytes == 4 * report.num_elements
    (rms,) = [t.rms for t in report.tensors if t.name == name]
    assert rms == pytest.approx(3e38)


def test_check_spans_chunks(tmp_path: Path) -> None:
    model = make_model(vocab_size=9001)  # 216,024 embeddings: several chunks, the last one short
    with torch.no_grad():
        model.transformer.wte.weight[9000, 23] = float("nan")
        model.transformer.wte.weight[5000, 0] = 77
    model.save_pretrained(tmp_path)
    (fault,) = load_checkpoint(tmp_path).check().faults
    assert (fault.name, fault.num_elements, fault.num_nan, fault.maximum) == ("wte.weight", 216_024, 1, 77)


def test_loading_imports_nothing_slow(saved: Path) -> None:
    code = (
        "import sys; from pyengine.model.checkpoint import load_checkpoint; "
        f"load_checkpoint({str(saved)!r}).weights(); "
        "print({'numpy', 'torch', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
