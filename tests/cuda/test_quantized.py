"""int8 and int4 weights on a simulated GPU: the function of the floats that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pyengine import LLM, SamplingParams
from pyengine.cli import main
from pyengine.model.checkpoint import load_checkpoint
from pyengine.model.quantization import METHODS, matrix_names
from pyengine.model.quantize import write_quantized
from pyengine.model.safetensors import write_safetensors

TEXT = [(11 * i) % 300 for i in range(40)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def dequantized(source: Path, output: Path) -> Path:
    """A float32 checkpoint of the weights that a quantised one stands for (docs/quantization.md)."""
    shutil.copytree(source, output)
    checkpoint = load_checkpoint(source)
    arrays = {
        name: np.frombuffer(t.data, np.uint8 if t.dtype == "uint8" else np.float32).reshape(t.shape)
        for name, t in checkpoint.tensors.items()
    }
    shapes = checkpoint.config.weight_shapes()
    for name, layout in matrix_names(checkpoint.config).items():
        packed, scale = arrays.pop(f"{name}.weight").astype(np.int32), arrays.pop(f"{name}.scale")
        group = arrays.pop(f"{name}.group", None)
        tiles = packed.shape[0]
        if group is None:
            integers = packed.transpose(0, 2, 1, 3).reshape(tiles * 16, -1) - 128
        else:
            nibbles = np.stack([packed % 16, packed // 16], axis=3)  # (tile, K / 8, 16, 2, 4)
            nibbles = nibbles.transpose(0, 2, 1, 3, 4).reshape(tiles * 16, -1)
            fit = group.astype(np.int32).transpose(0, 2, 1).reshape(tiles * 16, -1).repeat(32, axis=1)
            integers = fit % 16 * (nibbles - fit // 16)
        shape = shapes[f"{name}.weight"]
        outputs, inputs = shape if layout == "out_in" else shape[::-1]
        weights = integers[:outputs, :inputs].astype(np.float32) * scale.astype(np.float32)[:, None]
        arrays[f"{name}.weight"] = weights if layout == "out_in" else weights.T
    tensors = {name: (np.ascontiguousarray(a).tobytes(), "float32", a.shape) for name, a in arrays.items()}
    write_safetensors(output / "model.safetensors", tensors, {})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gelu", "head_dim_8"])
def test_scores_are_those_of_the_weights(
    name: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = tmp_path / "stored"
    write_quantized(load_checkpoint(checkpoint(name)), stored, method)
    text = [token % load_checkpoint(stored).config.vocab_size for token in TEXT]
    exact = LLM(dequantized(stored, tmp_path / "floats"), num_threads=1).score(text).logprobs[1:]
    with LLM(stored, device="cuda", dtype="float32", num_threads=1) as llm:
        assert llm.quantization == method and llm.kv_cache_dtype == "float32"
        got = llm.score(text).logprobs[1:]
        tokens = llm.generate(text[:9], GREEDY)[0].outputs[0].token_ids
    assert got == pytest.approx(exact, abs=1e-3)
    with LLM(checkpoint(name), device="cuda", quantization=method, dtype="float32", num_threads=1) as llm:
        assert llm.score(text).logprobs[1:] == got  # quantised while loading: the same bits
        assert llm.generate(text[:9], GREEDY)[0].outputs[0].token_ids == tokens
    for dtype, kv in (("auto", "auto"), ("bfloat16", "int8")):
        with LLM(stored, device="cuda", dtype=dtype, kv_cache_dtype=kv, num_threads=1) as llm:
            expected = ("float16", "float16") if dtype == "auto" else (dtype, kv)
            assert (llm.dtype, llm.kv_cache_dtype) == expected
            assert llm.score(text).logprobs[1:] == pytest.approx(exact, abs=0.5)


@pytest.mark.usefixtures("gpu")
def test_a_quantised_draft_model(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("head_dim_8")
    config = {"model": str(path), "num_speculative_tokens": 3, "quantization": "int8"}
    with LLM(path, device="cuda", num_threads=1) as llm:
        expected = llm.generate([3, 1, 4], GREEDY)[0].outputs[0].token_ids
    with LLM(path, device="cuda", num_threads=1, speculative_config=config) as llm:
        assert llm.generate([3, 1, 4], GREEDY)[0].outputs[0].token_ids == expected
        assert llm.stats().accepted_tokens > 0


def test_inspect_tells_what_a_gpu_computes_in(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write_quantized(load_checkpoint(checkpoint("gelu")), tmp_path / "q", "int4")
    row = json.loads(CliRunner().invoke(main, ["inspect", "--model", str(tmp_path / "q"), "--json"]).stdout)
    assert row["cuda"] == {"runs": True, "computes_in": "float16", "reason": None}
