"""The quantised checkpoint: what ``config.json`` says of it, and which tensors it holds.

A dense matrix ``x.weight`` of K inputs and N outputs becomes

    x.weight  uint8    (N / 16, K / 4, 16, 4), or (N / 16, K / 8, 16, 4) for int4: csrc/ops/types.h
    x.group   uint8    (N / 16, K / 32, 16), int4 only: multiplier + 16 * zero point
    x.scale   float32  (N,)

with N rounded up to 16 and K to 64. Everything else is float32. docs/quantization.md has the formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyengine import _C
from pyengine.errors import ConfigError
from pyengine.model.json_file import show

if TYPE_CHECKING:
    from pyengine.model.config import GPT2Config

METHODS = ("int8", "int4")
QUANT_METHOD = "pyengine"  # what other software sees, and does not know
VERSION = 1
INPUT_GROUP = 256  # inputs of a row that share a scale

BITS = {"int8": 8, "int4": 4}
_DENSE = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def check_method(method: object) -> None:
    if method not in METHODS:
        raise ConfigError(f'quantization={method!r}: must be None, "int8" or "int4"')


def quantization_config(method: str) -> dict[str, Any]:
    """The field ``quantization_config`` of config.json."""
    fields: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "bits": BITS[method],
        "input_group_size": INPUT_GROUP,
    }
    if method == "int4":
        fields["weight_group_size"] = _C.NIBBLE_GROUP
    return fields


def parse_quantization_config(value: object) -> str:
    """The method that a ``quantization_config`` describes; ConfigError if it is not one of ours."""
    if not isinstance(value, dict) or value.get("quant_method") != QUANT_METHOD:
        method = show(value.get("quant_method")) if isinstance(value, dict) else show(value)
        raise ConfigError(
            f"quantization_config is set (quant_method {method}): pyengine reads quantised weights that "
            "pyengine-cli quantize wrote; save the checkpoint as float32, float16 or bfloat16 first"
        )
    for method in METHODS:
        if value == quantization_config(method):
            return method
    if value.get("version") != VERSION:
        raise ConfigError(
            f"quantization_config: version is {show(value.get('version'))}, but this pyengine reads "
            f"{VERSION}; quantise the checkpoint again"
        )
    known = " or ".join(str(quantization_config(method)) for method in METHODS)
    raise ConfigError(f"quantization_config is {show(value)}; it must be {known}")


def matrix_names(config: GPT2Config) -> dict[str, str]:
    """Name (without ``.weight``) of every matrix that is quantised -> "in_out" or "out_in"."""
    names = {f"h.{i}.{name}": "in_out" for i in range(config.n_layer) for name in _DENSE}
    names["wte"] = "out_in"
    if not config.tie_word_embeddings:
        names["lm_head"] = "out_in"
    return names


def packed_tensors(inputs: int, outputs: int, method: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of "weight", "scale" and, for int4, "group" of a matrix."""
    tiles = -(-outputs // _C.TILE_COLUMNS)
    padded = -(-inputs // _C.QUANT_PAD) * _C.QUANT_PAD
    words = padded * BITS[method] // 32
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("uint8", (tiles, words, _C.TILE_COLUMNS, 4)),
        "scale": ("float32", (outputs,)),
    }
    if method == "int4":
        tensors["group"] = ("uint8", (tiles, padded // _C.NIBBLE_GROUP, _C.TILE_COLUMNS))
    return tensors


def quantized_tensors(config: GPT2Config, method: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of a quantised checkpoint, by canonical name."""
    layouts = matrix_names(config)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in config.weight_shapes().items():
        base = name.removesuffix(".weight")
        if base not in layouts or not name.endswith(".weight"):
            expected[name] = ("float32", shape)
            continue
        inputs, outputs = shape if layouts[base] == "in_out" else shape[::-1]
        for part, entry in packed_tensors(inputs, outputs, method).items():
            expected[f"{base}.{part}"] = entry
    return expected


def quantized_bytes(config: GPT2Config, method: str) -> int:
    """Bytes of the weights of a quantised checkpoint, in memory as in the file."""
    total = 0
    for dtype, shape in quantized_tensors(config, method).values():
        size = 4 if dtype == "float32" else 1
        for n in shape:
            size *= n
        total += size
    return total
