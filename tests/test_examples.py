"""Every program in examples/ runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_is_one_for_each_way_to_call() -> None:
    assert {path.stem for path in EXAMPLES} >= {"hello", "batch", "streaming", "async_streams", "scoring"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    assert f"python examples/{path.name} [CHECKPOINT]" in path.read_text()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 60 and result.stderr == ""
