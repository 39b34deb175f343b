"""GPT-2 in plain PyTorch: the one reference every kernel is compared with, and the model the trainer trains.

Letters in the shape comments: B sequences of T tokens, C channels (n_embd), H heads, D = C / H, V vocabulary.

The modules carry Hugging Face's parameter names (``transformer.h.0.attn.c_attn.weight`` ...), so a
checkpoint loads by name. One thing differs: Hugging Face keeps the four dense layers of a block as "Conv1D",
weights of (in, out), where ``nn.Linear`` keeps (out, in); ``to_huggingface`` and ``from_huggingface``
transpose.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyengine.train.attention import causal_attention

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of a Hugging Face GPT-2 ``config.json`` that change the numbers, under their own names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Take the known fields of a parsed ``config.json`` and ignore the others."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

    def to_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """What ``config.json`` needs for `transformers` to build the same model; weights are ``dtype``."""
        kind = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return {**kind, **dataclasses.asdict(self), "torch_dtype": str(dtype).removeprefix("torch.")}


class Dropout(nn.Module):
    """Inverted dropout: elements are zero with probability p, the others divided by 1 - p.

    PyTorch's own draws the elements one after the other on a CPU, which took a seventh of a step. Here 16
    random bits decide on an element, so that four share one drawn number; p is rounded to 1/65536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        count = x.numel()
        drawn = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None)
        bits = drawn.view(torch.int16)[:count].view(x.shape)  # uniform from -32768 to 32767
        return x * torch.where(bits >= round(65536 * self.p) - 32768, 1.0 / (1.0 - self.p), 0.0)


def add_projection(residual: Tensor, y: Tensor, linear: nn.Module, dropout: Dropout) -> Tensor:
    """``residual + dropout(linear(y))``; one product that adds to the residual where nothing is between."""
    plain = type(linear) is nn.Linear and getattr(linear, "bias", None) is None  # no adapter, no bias
    plain = plain and not (dropout.training and dropout.p)
    if plain and not torch.is_autocast_enabled(y.device.type):  # autocast would round the residual
        assert isinstance(linear, nn.Linear)
        return torch.addmm(residual, y, linear.weight.t())
    return residual + dropout(linear(y))


class Attention(nn.Module):
    """Causal multi-head self-attention with its residual connection; x and residual are (B T, C)."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.scale = 1.0
        if config.scale_attn_weights:
            self.scale /= math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor, batch_size: int) -> Tensor:
        n, c = x.shape
        heads = (batch_size, n // batch_size, self.n_head, c // self.n_head)  # B, T, H, D
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.c_attn(x).split(c, dim=1))
        y = causal_attention(q, k, v, self.scale)  # (B, H, T, D)
        return add_projection(residual, y.transpose(1, 2).reshape(n, c), self.c_proj, self.dropout)


class MLP(nn.Module):
    """Two dense layers with the activation between them, and the residual connection; all (B T, C)."""

    def __init__(self, config: ModelConfig, dropout: float, bias: bool) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_fc = nn.Linear(config.n_embd, n_inner, bias=bias)
        self.c_proj = nn.Linear(n_inner, config.n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return add_projection(residual, self.activation(self.c_fc(x)), self.c_proj, self.dropout)


class Block(nn.Module):
    """Pre-norm residual block, (B T, C) -> (B T, C)."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=bias)
        self.attn = Attention(config, layer, dropout, bias)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=bias)
        self.mlp = MLP(config, dropout, bias)

    def forward(self, x: Tensor, batch_size: int) -> Tensor:
        x = self.attn(self.ln_1(x), x, batch_size)
        return self.mlp(self.ln_2(x), x)


class Transformer(nn.Module):
    """Token ids (B, T) -> final hidden states (B T, C): tokens of all sequences as rows of one matrix."""

    def __init__(self, config: ModelConfig, dropout: float, bias: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = Dropout(dropout)
        self.h = nn.ModuleList(Block(config, layer, dropout, bias) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        x = self.dropout(x).flatten(0, 1)
        for block in self.h:
            x = block(x, b)
        return self.ln_f(x)


class GPT2(nn.Module):
    """GPT-2 language model: token ids (B, T) -> logits (B, T, V).

    Dropout acts on the embeddings and on both residual branches while training; attention weights have
    none (PyTorch's fused CPU attention cannot drop them, and a small model does not miss it). Without
    ``bias`` the dense layers and norms have no biases; exported checkpoints have zeros in their place.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, dropout, bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.initialise()

    def initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections smaller by sqrt(2 n_layer), biases 0.

        Radford et al. 2019, section 2.3: "scale the weights of residual layers at initialization by a
        factor of 1/sqrt(N) where N is the number of residual layers".
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, 0.0, std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with ``targets`` (B, T) the mean cross-entropy in nats instead, a scalar."""
        logits = self.lm_head(self.transformer(ids))
        if targets is None:
            return logits.unflatten(0, ids.shape)
        return F.cross_entropy(logits.float(), targets.flatten())

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def to_huggingface(self) -> dict[str, Tensor]:
        """State dict in the names and layouts of `transformers`' GPT2LMHeadModel, without a tied head."""
        return to_huggingface(self.state_dict(), self.config)

    def from_huggingface(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a Hugging Face state dict, its names with or without ``transformer.``; buffers are ignored."""
        state = {}
        for name in self.state_dict():
            short = name.removeprefix("transformer.")
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                source = tensors.get("transformer.wte.weight", tensors.get("wte.weight"))
            else:
                source = tensors.get(name, tensors.get(short))
            if source is None:
                raise KeyError(f"the state dict has neither {name} nor {short}")
            state[name] = source.T if name.endswith(CONV1D) else source
            bias = (name.removesuffix("weight") + "bias").removeprefix("transformer.")
            if bias.endswith(".bias") and f"transformer.{bias}" not in self.state_dict():
                value = tensors.get(f"transformer.{bias}", tensors.get(bias))
                if value is not None and value.any():
                    raise ValueError(f"{bias} is not zero, but this model has no biases")
        self.load_state_dict(state)

    @classmethod
    def from_checkpoint(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> GPT2:
        """Read ``config.json`` and all ``*.safetensors`` of a Hugging Face directory; ready to evaluate."""
        from safetensors.torch import load_file

        directory = Path(directory)
        config = ModelConfig.from_dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors.update(load_file(file))
        model = cls(config).to(dtype)
        model.from_huggingface({name: value.to(dtype) for name, value in tensors.items()})
        return model.eval()

    def save_checkpoint(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``, weights stored as ``dtype``."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config.to_dict(dtype), indent=2)
        (directory / "config.json").write_text(config + "\n", encoding="utf-8")
        tensors = {name: value.to(dtype) for name, value in self.to_huggingface().items()}
        file = directory / "model.safetensors"
        save_file(tensors, str(file), metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable by its owner alone


def to_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of GPT2 in the names and layouts of `transformers`, without a tied head, with biases."""
    tensors = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[name] = (value.T if name.endswith(CONV1D) else value).detach().contiguous()
        layer, kind = name.rsplit(".", 1)
        has_bias = layer.startswith("transformer.") and not layer.endswith(("wte", "wpe"))
        if kind == "weight" and has_bias and f"{layer}.bias" not in state:
            tensors[f"{layer}.bias"] = value.new_zeros(len(value))
    return tensors
