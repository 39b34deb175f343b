"""A small GPT-2 checkpoint that the tests of this directory save, change and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from pyengine.model.checkpoint import Checkpoint
from tests.checkpoints import randomise

FIELDS = {
    "vocab_size": 61,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(dtype: str = "float32", **fields: Any) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(**{**FIELDS, **fields})
    model = transformers.GPT2LMHeadModel(config)
    randomise(model, config, seed=3)
    return model.to(getattr(torch, dtype)).eval()


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Names, dtypes, shapes and bytes of the parameters of ``model``, which are all there are."""
    expected = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    weights = checkpoint.weights()
    assert set(weights) == set(expected) == set(checkpoint.config.weight_shapes())
    for name, (data, dtype, shape) in weights.items():
        assert dtype == str(expected[name].dtype).removeprefix("torch.")
        assert shape == tuple(expected[name].shape)
        assert bytes(data) == raw_bytes(expected[name]), name


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save model.safetensors again after ``change`` was applied to its tensors."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
