"""LoRA adapters by `peft` on the dense layers of the blocks (Hu et al. 2021), merged when exported."""

from __future__ import annotations

from torch import Tensor

from pyengine.errors import ConfigError
from pyengine.train.model import GPT2

_TARGETS = ["c_attn", "c_proj", "c_fc"]


def add_adapters(model: GPT2, rank: int, alpha: int, dropout: float) -> None:
    """Freeze the model and put adapters into it; only they are trained."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("--lora-rank: peft is not installed; pip install 'pyengine[train]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_TARGETS)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged_state(model: GPT2, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with every adapter added to its matrix, under the names of the plain model."""
    if not any(".lora_A." in name for name in state):
        return state
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            module = name.removesuffix(".base_layer.weight")
            layer = model.get_submodule(module)
            a, b = state[f"{module}.lora_A.default.weight"], state[f"{module}.lora_B.default.weight"]
            value = value + (b @ a) * layer.scaling["default"]  # type: ignore[index]
        merged[plain] = value
    return merged
