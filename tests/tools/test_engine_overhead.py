"""``tools/engine_overhead.py``: what it counts, on short runs of the bundled model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/engine_overhead.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_overhead", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fit_finds_a_line(tool: ModuleType) -> None:
    assert tool.fit([(1, 25.0), (8, 60.0), (64, 340.0)]) == pytest.approx((20.0, 5.0))


@pytest.mark.parametrize("callers", ["asyncio", "threads", "generate"])
def test_json(callers: str) -> None:
    arguments = ["--json", "--callers", callers, "--threads", "1", "--sequences", "1,4"]
    arguments += ["--new-tokens", "60", "--prompt-tokens", "80", "--cached-tokens", "64", "--repeats", "2"]
    result = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    one, four, fit, ttft = map(json.loads, result.stdout.splitlines())
    assert (one["sequences"], one["bound_us"], four["sequences"], four["bound_us"]) == (1, 105, 4, 120)
    for row in (one, four):
        assert row["callers"] == callers and row["steps"] > 0
        assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"] and row["callers_us"] > 0
    slope = (four["median_us"] - one["median_us"]) / 3
    assert fit["slope_us"] == pytest.approx(slope, abs=0.1)
    assert ttft["cached_tokens"] == 64  # whole blocks of 16
    assert 0 < ttft["cached_ms"]["min"] and 0 < ttft["ratio"]["min"] <= ttft["ratio"]["median"]


def test_streams_that_never_run_together() -> None:
    arguments = ["--threads", "1", "--sequences", "2", "--new-tokens", "1"]
    result = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr == "engine_overhead: the 2 streams never ran together: raise --new-tokens\n"


def test_one_number_of_sequences_gives_no_line() -> None:
    arguments = ["--sequences", "2", "--threads", "1", "--new-tokens", "20", "--prompt-tokens", "40"]
    arguments += ["--cached-tokens", "32", "--repeats", "1"]
    result = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "fitted" not in result.stdout and "time to the first token of 40 tokens" in result.stdout
