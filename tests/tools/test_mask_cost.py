"""``tools/mask_cost.py`` with the bundled model's tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.decoding.constrained import CASES

pytest.importorskip("llguidance", reason="constrained text needs llguidance")

TOOL = Path(__file__).resolve().parents[2] / "tools/mask_cost.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_masks_of_all_constraints_are_timed() -> None:
    result = run("--tokens", "3", "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["constraints"] == len(CASES) and len(CASES) <= row["masks"] <= 3 * len(CASES)
    for name in ("make", "apply", "both"):
        assert row[f"{name}_us_median"] <= row[f"{name}_us_p99"] <= row[f"{name}_us_max"]
    assert row["make_us_median"] > 0


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    result = run("--tokenizer", str(tmp_path))
    assert result.returncode == 1
    assert "has no tokenizer files" in result.stderr and "Traceback" not in result.stderr
