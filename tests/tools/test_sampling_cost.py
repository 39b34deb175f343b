"""``tools/sampling_cost.py`` on short runs of the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/sampling_cost.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_each_set_of_controls_is_compared_with_greedy() -> None:
    result = run("--json", "--sequences", "3", "--steps", "6", "--rounds", "2", "--threads", "1")
    assert result.returncode == 0, result.stderr
    greedy, *others = map(json.loads, result.stdout.splitlines())
    assert (greedy["controls"], greedy["added_percent"], greedy["sequences"]) == ("greedy", 0, 3)
    assert [row["controls"] for row in others] == ["temperature", "top-k", "top-p", "min-p", "all"]
    for row in others:
        assert row["step_ms"] > 0
        assert row["added_min"] <= row["added_percent"] <= row["added_max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "nowhere"], "nowhere"), (["--steps", "1", "--sequences", "2"], "raise --steps")],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
