"""Logits against `transformers` (eager attention, float32) and against the float64 reference.

Two bars: the largest difference is at most 1e-5 of the largest logit, and the RMS error against float64 is
at most 1.5 times that of `transformers`. The tests below them flip each field of config.json and see the
first bar fail, so that agreement says something about every field.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pyengine import _C, CheckpointError
from pyengine.train.model import GPT2
from tests.checkpoints import CONFIGS
from tests.forward import Runner

MAX_ERROR = 1e-5  # of the largest logit
MAX_RMS_RATIO = 1.5  # RMS error against float64, over that of transformers in float32

FloatArray = npt.NDArray[Any]


def token_ids(directory: Path) -> list[list[int]]:
    """Two sequences of random tokens: the whole context (130 tokens at most), and about half of it."""
    config = json.loads((directory / "config.json").read_text())
    length = min(config["n_positions"], 130)
    rng = np.random.default_rng(7)
    return [rng.integers(config["vocab_size"], size=n).tolist() for n in (length, length // 2 + 1)]


def transformers_logits(directory: Path) -> list[FloatArray]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in token_ids(directory)]


def float64_logits(directory: Path) -> list[FloatArray]:
    model = GPT2.from_checkpoint(directory, torch.float64)
    with torch.no_grad():
        return [model(torch.tensor([ids]))[0].numpy() for ids in token_ids(directory)]


def max_error(logits: list[FloatArray], expected: list[FloatArray]) -> float:
    """Largest difference, relative to the largest logit."""
    return max(float(np.abs(a - b).max()) for a, b in zip(logits, expected, strict=True)) / max(
        float(np.abs(b).max()) for b in expected
    )


def rms(logits: list[FloatArray], expected: list[FloatArray]) -> float:
    return float(np.sqrt(np.mean((np.concatenate(logits) - np.concatenate(expected)) ** 2)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(name)
    logits = Runner(directory, "float32", threads=2).logits(token_ids(directory))
    theirs = transformers_logits(directory)
    exact = float64_logits(directory)
    error, ratio = max_error(logits, theirs), rms(logits, exact) / rms(theirs, exact)
    print(f"{name}: max error {error:.2e}, RMS error {ratio:.2f} x transformers'")
    assert error <= MAX_ERROR
    assert ratio <= MAX_RMS_RATIO


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("name", ["head_dim_20", "wide", "silu"])
def test_every_instruction_set_is_as_accurate(name: str, isa: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(name)
    logits = Runner(directory, "float32", isa=isa).logits(token_ids(directory))
    theirs = transformers_logits(directory)
    exact = float64_logits(directory)
    assert max_error(logits, theirs) <= MAX_ERROR
    assert rms(logits, exact) <= MAX_RMS_RATIO * rms(theirs, exact)


@pytest.mark.parametrize(
    "name", ["head_dim_20", "head_dim_64", "head_dim_odd", "wide", "bfloat16_file", "no_scale"]
)
def test_bfloat16_stays_near_float32(name: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(name)
    ids = token_ids(directory)
    logits = Runner(directory, "bfloat16", threads=2).logits(ids)
    exact = float64_logits(directory)
    with torch.no_grad():
        model = GPT2.from_checkpoint(directory, torch.bfloat16)
        theirs = [model(torch.tensor([i]))[0].float().numpy() for i in ids]
    # PyTorch rounds the residual stream to bfloat16, too, so this asks for no more than ours must reach.
    assert rms(logits, exact) <= rms(theirs, exact)


def with_fields(directory: Path, target: Path, fields: dict[str, Any]) -> Path:
    """A copy of the checkpoint with other values in config.json."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("head_dim_20", "n_head", 6),
        ("head_dim_20", "n_layer", 1),
        ("head_dim_20", "layer_norm_epsilon", 1e-6),
        ("large_epsilon", "layer_norm_epsilon", 0.05),
        ("head_dim_20", "activation_function", "gelu"),
        ("gelu", "activation_function", "gelu_new"),
        ("gelu_fast", "activation_function", "relu"),
        ("gelu_pytorch_tanh", "activation_function", "silu"),
        ("relu", "activation_function", "gelu_new"),
        ("silu", "activation_function", "gelu"),
        ("head_dim_20", "scale_attn_weights", False),
        ("no_scale", "scale_attn_weights", True),
        ("head_dim_20", "scale_attn_by_inverse_layer_idx", True),
        ("inverse_layer", "scale_attn_by_inverse_layer_idx", False),
        ("untied", "tie_word_embeddings", True),
    ],
)
def test_a_flipped_field_shows(
    name: str, field: str, value: object, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoint(name)
    flipped = with_fields(directory, tmp_path / "flipped", {field: value})
    logits = Runner(flipped).logits(token_ids(directory))
    assert max_error(logits, transformers_logits(directory)) > MAX_ERROR


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 306),
        ("n_positions", 159),
        ("n_embd", 62),
        ("n_inner", 255),
        ("n_layer", 3),
        ("tie_word_embeddings", False),
    ],
)
def test_a_flipped_field_that_the_tensors_contradict_is_refused(
    field: str, value: object, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    flipped = with_fields(checkpoint("gelu"), tmp_path / "flipped", {field: value})
    with pytest.raises(CheckpointError, match=field if field != "n_layer" else "h.2"):
        Runner(flipped)


@pytest.mark.parametrize(
    "fields",
    [
        {"reorder_and_upcast_attn": True},
        {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        {"initializer_range": 1.0, "use_cache": False, "torch_dtype": "float16"},
        {"summary_type": "mean", "summary_use_proj": False, "summary_first_dropout": 0.5},
        {"summary_activation": "tanh", "summary_proj_to_labels": False, "task_specific_params": {"x": 1}},
        {"n_ctx": 7, "bos_token_id": 3, "eos_token_id": [4, 5], "transformers_version": "3.0"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_pytorch_tanh"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_without_numeric_effect_has_none(
    fields: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoint("head_dim_20")
    other = with_fields(directory, tmp_path / "other", fields)
    ids = token_ids(directory)
    for ours, theirs in zip(Runner(other).logits(ids), Runner(directory).logits(ids), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_old_name_of_the_context_length(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoint("head_dim_20")
    old = with_fields(directory, tmp_path / "old", {"n_ctx": 160})
    config = json.loads((old / "config.json").read_text())
    del config["n_positions"]
    (old / "config.json").write_text(json.dumps(config))
    assert Runner(old).config.n_positions == 160
