"""Which device is used, how much memory it gives, and what is said where it cannot be used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyengine import LLM, ConfigError, cuda
from pyengine.backends import Cuda, back_end
from pyengine.cli import main
from pyengine.errors import OutOfMemory
from pyengine.model.checkpoint import load_checkpoint

GPU = cuda.Device("a GPU", (7, 5), 16 << 30, 15 << 30, "75")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cuda.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "libpyengine_cuda.so")


@pytest.mark.usefixtures("no_library")
def test_a_build_without_cuda_says_how_to_get_it() -> None:
    assert cuda.find_library() is None
    with pytest.raises(ConfigError, match="PYENGINE_CUDA=on"):
        LLM(device="cuda")
    assert back_end("auto").device == "cpu"
    with pytest.raises(ConfigError, match='"cpu", "cuda" or "auto"'):
        LLM(device="tpu")
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert report["ok"] and report["cuda"]["reason"] == "not in this build"


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not ELF")
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(broken))
    with pytest.raises(ConfigError, match="cannot be opened.*broken.so"):
        LLM(device="cuda")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0 and "cannot be opened" in result.stdout


def test_the_gpu_is_found(gpu: Path, checkpoint: Callable[[str], Path]) -> None:
    assert back_end("auto").device == "cuda"
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert report["cuda"]["available"] and report["cuda"]["name"] == cuda.find_device().name
    assert report["cuda"]["library"] == str(gpu)
    arguments = ["generate", "--device", "cuda", "--model", str(checkpoint("head_dim_8")), "--ids", "3,4"]
    arguments += ["--max-tokens", "3", "--temperature", "0", "--json"]
    on_gpu, on_cpu = (
        CliRunner().invoke(main, [*arguments[:2], device, *arguments[3:]]) for device in ("cuda", "cpu")
    )
    assert on_gpu.exit_code == 0, on_gpu.stderr
    assert json.loads(on_gpu.stdout)["token_ids"] == json.loads(on_cpu.stdout)["token_ids"]


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_is_refused_with_the_sizes(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("head_dim_8")
    with pytest.raises(OutOfMemory, match=r"the KV cache takes \d+ MiB .* are free"):
        LLM(path, device="cuda", kv_cache_memory="20TiB")
    with pytest.raises(ConfigError, match='must be None, "int8" or "int4"'):
        LLM(path, device="cuda", quantization="int3")
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16'.*float32, or int8"):
        LLM(path, device="cuda", kv_cache_dtype="bfloat16")
    with pytest.raises(ConfigError, match="n_embd / n_head is 15, but must be a multiple of 8"):
        LLM(checkpoint("head_dim_odd"), device="cuda")


def test_inspect_tells(checkpoint: Callable[[str], Path]) -> None:
    def inspected(name: str, *more: str) -> str:
        return CliRunner().invoke(main, ["inspect", "--model", str(checkpoint(name)), *more]).stdout

    assert "on CUDA             computed in float16" in inspected("float16_file")
    row = json.loads(inspected("float16_file", "--json"))
    assert row["cuda"] == {"runs": True, "computes_in": "float16", "reason": None}
    assert "on CUDA             no: n_embd / n_head is 15" in inspected("head_dim_odd")


@pytest.mark.usefixtures("gpu")
def test_bench_on_the_gpu(checkpoint: Callable[[str], Path]) -> None:
    sizes = ["--prompt-tokens", "5", "--new-tokens", "2", "--repeats", "1"]
    arguments = ["bench", "--device", "cuda", "--model", str(checkpoint("head_dim_8")), *sizes]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["device"] == "cuda" and row["tok_per_s_median"] > 0 and "gb_per_s_limit" not in row
    assert "tokens/s" in CliRunner().invoke(main, arguments).stdout
    refused = CliRunner().invoke(main, [*arguments, "--profile"])
    assert refused.exit_code == 2 and "--profile needs --device cpu" in refused.stderr


def test_bfloat16_needs_capability_8(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="capability 7.5 and no bfloat16"):
        Cuda(GPU).check("bfloat16", None, "auto")
    file = load_checkpoint(checkpoint("bfloat16_file"))
    assert Cuda(GPU).dtypes(file, "auto", None, "auto") == ("float32", "float32")
    newer = dataclasses.replace(GPU, capability=(9, 0))
    assert Cuda(newer).dtypes(file, "auto", None, "auto") == ("bfloat16", "bfloat16")


def test_the_default_kv_cache_leaves_room(checkpoint: Callable[[str], Path]) -> None:
    file = load_checkpoint(checkpoint("gelu"))
    small = dataclasses.replace(GPU, free_memory=50 << 20)
    budget = Cuda(small).kv_budget(file, "float16", None, 64, 2048)
    assert budget is not None
    assert file.config.weight_bytes("float16") < (50 << 20) - budget < 25 << 20
    # Quantised weights leave room for more keys and values, by what they are smaller.
    larger = Cuda(small).kv_budget(file, "float16", "int4", 64, 2048)
    assert larger is not None
    saved = file.config.weight_bytes("float16") - file.config.weight_bytes("int4")
    assert larger - budget >= saved // 10 * 9 > 0
    nothing = dataclasses.replace(GPU, free_memory=1 << 20)
    assert Cuda(nothing).kv_budget(file, "float16", None, 64, 2048) == 0
