"""A checkpoint of a few kilobytes with a tokenizer, made without torch: quick to make, load and damage."""

from __future__ import annotations

import json
import math
import struct
from array import array
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 260,
    "n_positions": 32,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 259,
    "eos_token_id": 259,
}
MERGES = ("h e", "l l", "he ll")


def byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0 to 255, in the order of its vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, as the files of GPT-2 have them."""
    c = config["n_embd"]
    result: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], c),
        "wpe.weight": (config["n_positions"], c),
    }
    for layer in range(config["n_layer"]):
        for name, shape in {
            "ln_1.weight": (c,),
            "ln_1.bias": (c,),
            "attn.c_attn.weight": (c, 3 * c),
            "attn.c_attn.bias": (3 * c,),
            "attn.c_proj.weight": (c, c),
            "attn.c_proj.bias": (c,),
            "ln_2.weight": (c,),
            "ln_2.bias": (c,),
            "mlp.c_fc.weight": (c, 4 * c),
            "mlp.c_fc.bias": (4 * c,),
            "mlp.c_proj.weight": (4 * c, c),
            "mlp.c_proj.bias": (c,),
        }.items():
            result[f"h.{layer}.{name}"] = shape
    return result | {"ln_f.weight": (c,), "ln_f.bias": (c,)}


def tensors(config: dict[str, Any] | None = None) -> dict[str, tuple[tuple[int, ...], array[float]]]:
    """Shape and float32 values by name: small numbers that differ, gains of about 1."""
    result = {}
    for number, (name, shape) in enumerate(shapes(config or CONFIG).items()):
        gain = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        values = [gain + 0.3 * math.sin(1.7 * i + number) for i in range(math.prod(shape))]
        result[name] = (shape, array("f", values))
    return result


def safetensors(content: dict[str, tuple[tuple[int, ...], array[float]]]) -> bytes:
    """A safetensors file of float32 tensors."""
    header, data = {}, b""
    for name, (shape, values) in content.items():
        raw = values.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format asks: the data is aligned
    return struct.pack("<Q", len(text)) + text + data


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, **fields: object) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **fields})


def make(directory: Path) -> Path:
    """Write the checkpoint: configuration, weights, vocab.json and merges.txt, generation_config.json."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "generation_config.json", {"do_sample": False, "max_new_tokens": 4})
    (directory / "model.safetensors").write_bytes(safetensors(tensors()))
    pieces = [*byte_alphabet(), *("".join(merge.split()) for merge in MERGES), "<|endoftext|>"]
    write_json(directory / "vocab.json", {piece: token for token, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *MERGES, ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory
