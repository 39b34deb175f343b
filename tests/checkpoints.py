"""Test checkpoints: small GPT-2 models with every parameter randomised, saved by `transformers`.

Freshly initialised models hide mistakes: their biases are 0, their gains 1, their attention is nearly
uniform and their activations nearly linear, so that a wrong epsilon or activation stays below any sane
tolerance. Here biases are N(0, 0.3), gains 1 + N(0, 0.3), and the attention is peaked.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BASE = {"vocab_size": 307, "n_positions": 160, "n_embd": 64, "n_layer": 2, "n_head": 2}

# Fields that differ from _BASE; "dtype" is that of the file.
CONFIGS: dict[str, dict[str, Any]] = {
    "head_dim_8": {"vocab_size": 97, "n_embd": 32, "n_head": 4},
    "head_dim_20": {"vocab_size": 1000, "n_embd": 60, "n_head": 3},
    "head_dim_32": {"vocab_size": 5003, "n_embd": 128, "n_head": 4, "n_layer": 3},
    "head_dim_64": {"vocab_size": 1000, "n_embd": 256, "n_head": 4, "n_layer": 4},
    "head_dim_80": {"n_embd": 160, "n_head": 2, "n_inner": 333},
    "head_dim_128": {"n_embd": 256, "n_head": 2},
    "head_dim_odd": {"n_embd": 45, "n_head": 3, "n_inner": 7},
    "one_head_one_layer": {"n_head": 1, "n_layer": 1, "n_positions": 48},
    "gelu": {"activation_function": "gelu"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "no_scale": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4},
    "no_scale_inverse_layer": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "n_layer": 3,
    },
    "large_epsilon": {"layer_norm_epsilon": 0.1},
    "untied": {"tie_word_embeddings": False, "vocab_size": 1000},
    "untied_50257": {"tie_word_embeddings": False, "vocab_size": 50257, "n_embd": 32},
    "tied_50257": {"vocab_size": 50257, "n_embd": 48},
    "wide": {"n_embd": 320, "n_head": 5, "n_inner": 1025},  # crosses the 256-k blocks of the reduction
    "float16_file": {"dtype": "float16"},
    "bfloat16_file": {"dtype": "bfloat16"},
}


def randomise(model: torch.nn.Module, config: Any, seed: int) -> None:
    """Fill every parameter of a GPT2LMHeadModel: seeded, peaked attention, activations of size 1."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    head_dim = config.n_embd // config.n_head
    # Normalised inputs have about unit variance, so the scores have a standard deviation of about
    # scale * sqrt(head_dim) * q_std^2. Three makes the largest of 100 keys take most of the weight.
    scale = 1 / math.sqrt(head_dim) if config.scale_attn_weights else 1.0
    q_std = math.sqrt(3 / (scale * math.sqrt(head_dim)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if name.endswith("bias"):
                value = 0.3 * noise
            elif ".ln_" in name:
                value = 1 + 0.3 * noise
            elif name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                value = 0.1 * noise  # small, so that the epsilon of the first norm shows
            else:  # Conv1D, (in, out)
                value = noise / math.sqrt(parameter.shape[0])
                if "c_attn" in name:
                    value[:, : 2 * config.n_embd] *= q_std
            parameter.copy_(value)


def make_checkpoint(directory: Path, fields: dict[str, Any], seed: int = 0) -> Path:
    """Write the checkpoint with ``fields`` (over _BASE) to ``directory``, unless it is there already."""
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {**_BASE, "bos_token_id": 0, "eos_token_id": 0, **fields}
    dtype = getattr(torch, fields.pop("dtype", "float32"))
    config = GPT2Config(**fields)
    model = GPT2LMHeadModel(config)
    randomise(model, config, seed)
    model.to(dtype).save_pretrained(directory)
    return directory
