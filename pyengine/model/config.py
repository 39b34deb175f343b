"""The configuration of a GPT-2 checkpoint: ``config.json``, with the defaults of ``transformers``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pyengine import _C
from pyengine.errors import ConfigError
from pyengine.model.json_file import read_json_object, show
from pyengine.model.quantization import METHODS, parse_quantization_config, quantized_bytes

# Hugging Face activation name -> kernel (csrc/ops/ops.h). The tanh family is one function written in
# several ways: gelu_fast has sqrt(2/pi) as 0.7978845608, the same float32 number; gelu_new, gelu_accurate
# and gelu_pytorch_tanh differ in the order of rounding only.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MAX_PARAMETERS = 2**40
# Largest accepted value of each size; far above any GPT-2, low enough that no product overflows 64 bits.
_SIZE_LIMITS = {
    "vocab_size": 2**31 - 1,  # token ids are int32
    "n_positions": 2**24,
    "n_embd": 2**20,
    "n_layer": 10_000,
    "n_head": 2**16,
    "n_inner": 2**24,
}
_BOOLEANS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
# transformers sets these after the fields they stand for, so they win where a file has both.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(frozen=True)
class GPT2Config:
    """Fields of a GPT-2 configuration that decide what the model computes.

    Sizes: ``vocab_size`` V, ``n_positions`` (longest context, tokens), ``n_embd`` C, ``n_inner`` (width
    of the MLP; None becomes 4 C), ``head_dim`` C / n_head. ``bos_token_id`` and ``eos_token_id`` are None
    where the file has none or ids outside the vocabulary (many fine-tuned models keep GPT-2's 50256).
    Raises ConfigError naming the field, its value and what is allowed.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None  # type: ignore[assignment]  # an int once constructed
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # rounding only: attention is float32 here
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    torch_dtype: str | None = None  # as the file says; the tensors' own dtypes decide
    quantization: str | None = None  # "int8" or "int4": the weights are stored quantised

    def __post_init__(self) -> None:
        inner: object = self.n_inner
        if inner is None:
            _check_size("n_embd", self.n_embd)
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for field in _SIZE_LIMITS:
            _check_size(field, getattr(self, field))
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd is {self.n_embd} and n_head is {self.n_head}; n_embd must be a multiple of n_head"
            )
        if not isinstance(self.activation_function, str) or self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function is {show(self.activation_function)}; "
                f"pyengine knows {', '.join(ACTIVATIONS)}"
            )
        eps = self.layer_norm_epsilon
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps <= 1:
            raise ConfigError(f"layer_norm_epsilon is {show(eps)}; it must be a number above 0 and at most 1")
        for field in _BOOLEANS:
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} is {show(getattr(self, field))}; it must be true or false")
        if self.torch_dtype is not None and not isinstance(self.torch_dtype, str):
            raise ConfigError(f"torch_dtype is {show(self.torch_dtype)}; it must be a string or null")
        self._normalise_token_ids()
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(
                f"vocab_size {self.vocab_size}, n_positions {self.n_positions}, n_embd {self.n_embd}, "
                f"n_layer {self.n_layer} and n_inner {self.n_inner} make {self.num_parameters():,} "
                f"parameters; at most {MAX_PARAMETERS:,} are supported"
            )
        if self.head_dim > _C.MAX_HEAD_DIM:
            raise ConfigError(
                f"n_embd is {self.n_embd} and n_head is {self.n_head}: heads of {self.head_dim} channels; "
                f"pyengine's attention takes at most {_C.MAX_HEAD_DIM}"
            )

    def _normalise_token_ids(self) -> None:
        for field in ("bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, (list, tuple)) and field == "eos_token_id" else [value]
            for i in ids:
                if (isinstance(i, bool) or not isinstance(i, int)) and value is not None:
                    allowed = "an integer, a list of integers" if field == "eos_token_id" else "an integer"
                    raise ConfigError(f"{field} is {show(value)}; it must be {allowed} or null")
            known = tuple(i for i in ids if i is not None and 0 <= i < self.vocab_size)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, field, known or None)
            else:
                object.__setattr__(self, field, known[0] if known else None)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> GPT2Config:
        """The configuration in a parsed ``config.json``; ``source`` names the file in errors."""
        try:
            return cls(**_fields(data))
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> GPT2Config:
        """The configuration in a ``config.json``, or in the one of a checkpoint directory."""
        if os.path.isdir(path):
            path = os.path.join(path, "config.json")
        return cls.from_dict(read_json_object(path, ConfigError), str(path))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def activation(self) -> str:
        """Kernel name of the activation: gelu_tanh, gelu_erf, relu or silu."""
        return ACTIVATIONS[self.activation_function]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence ids; empty if there is none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one layer, without its ``h.<i>.``; dense weights are (in, out)."""
        c, inner = self.n_embd, self.n_inner
        return {
            "ln_1.weight": (c,),
            "ln_1.bias": (c,),
            "attn.c_attn.weight": (c, 3 * c),
            "attn.c_attn.bias": (3 * c,),
            "attn.c_proj.weight": (c, c),
            "attn.c_proj.bias": (c,),
            "ln_2.weight": (c,),
            "ln_2.bias": (c,),
            "mlp.c_fc.weight": (c, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, c),
            "mlp.c_proj.bias": (c,),
        }

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor outside the layers; ``lm_head.weight`` only where it is not tied."""
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, self.n_embd),
            "wpe.weight": (self.n_positions, self.n_embd),
            "ln_f.weight": (self.n_embd,),
            "ln_f.bias": (self.n_embd,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.n_embd)
        return shapes

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor the model needs."""
        layer = self.layer_shapes()
        shapes = self.outer_shapes()
        for i in range(self.n_layer):
            shapes.update({f"h.{i}.{name}": shape for name, shape in layer.items()})
        return shapes

    def _count(self) -> tuple[int, int]:
        """Elements of all matrices, and of all vectors (gains and biases)."""
        matrices = vectors = 0
        for shapes, times in ((self.outer_shapes(), 1), (self.layer_shapes(), self.n_layer)):
            for shape in shapes.values():
                if len(shape) == 2:
                    matrices += times * shape[0] * shape[1]
                else:
                    vectors += times * shape[0]
        return matrices, vectors

    def num_parameters(self) -> int:
        """Parameters of the model; a tied head counts once."""
        return sum(self._count())

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights in memory: matrices in ``dtype``, also "int8", "int4"; vectors in float32."""
        if dtype in METHODS:
            return quantized_bytes(self, dtype)
        if dtype not in DTYPE_BYTES:
            known = ", ".join((*DTYPE_BYTES, *METHODS))
            raise ConfigError(f"dtype is {show(dtype)}; it must be one of {known}")
        matrices, vectors = self._count()
        return matrices * DTYPE_BYTES[dtype] + vectors * 4

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token takes in the KV cache, over all layers, padding of its layout included."""
        return _C.KVCache.bytes_per_block(self.n_layer, self.n_head, self.head_dim, dtype) // _C.BLOCK_TOKENS

    def kernel_config(self) -> dict[str, Any]:
        """The fields that ``_C.Model`` takes."""
        return {
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_inner": self.n_inner,
            "n_positions": self.n_positions,
            "vocab_size": self.vocab_size,
            "activation": self.activation,
            "layer_norm_epsilon": float(self.layer_norm_epsilon),
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
        }


def _check_size(field: str, value: object) -> None:
    limit = _SIZE_LIMITS[field]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(f"{field} is {show(value)}; it must be an integer from 1 to {limit}")


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPT2Config from a parsed config.json: aliases resolved, other architectures refused."""
    model_type = data.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise ConfigError(
            f"model_type is {show(model_type)}; pyengine runs GPT-2 models only (model_type 'gpt2')"
        )
    for flag in ("add_cross_attention", "is_encoder_decoder"):
        if data.get(flag):
            raise ConfigError(
                f"{flag} is {show(data[flag])}; pyengine runs decoders without cross-attention, "
                "so it must be false"
            )
    if data.get("pruned_heads"):
        raise ConfigError(
            f"pruned_heads is {show(data['pruned_heads'])}; all layers must have the same heads, "
            "so it must be empty"
        )
    fields = {k: data[k] for k in GPT2Config.__dataclass_fields__ if k in data and k != "quantization"}
    if data.get("quantization_config"):
        fields["quantization"] = parse_quantization_config(data["quantization_config"])
    for alias, field in _ALIASES.items():
        if alias in data:
            fields[field] = data[alias]
    if "n_positions" not in fields and data.get("n_ctx") is not None:  # files from before n_positions
        fields["n_positions"] = data["n_ctx"]
    if "torch_dtype" not in fields and "dtype" in data:  # the field's name since transformers 4.56
        fields["torch_dtype"] = data["dtype"]
    return fields
