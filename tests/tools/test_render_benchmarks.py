"""``tools/render_benchmarks.py``: tables between their marks, and plots where matplotlib is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, run

__all__ = ["run"]
TOOL = Path(__file__).resolve().parents[2] / "tools/render_benchmarks.py"


def compared(*pairs: list[float], isa: str = "avx2") -> dict[str, Any]:
    about = {"isa": isa, "dtype": "f32", "kv_dtype": "f32", "peer_engine": "ov", "peer_dtype": "f32"}
    return {**about, "threads": 2, "workload": "decode", "pairs": list(pairs)}


def render(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def results(tmp_path: Path, run: Run, checkpoint: Callable[[str], Path]) -> Path:
    arguments = [
        "--model",
        str(checkpoint("gelu")),
        "--threads",
        "1",
        "--repeats",
        "1",
        "--json",
        "--profile",
    ]
    lines = run("bench", *arguments, "--workload", "decode").stdout
    lines += run("bench", *arguments, "--prompt-tokens", "64", "--new-tokens", "64", "--batch", "2,4").stdout
    path = tmp_path / "results.jsonl"
    rows = [compared([10.0, 5.0], [12.0, 5.0]), compared([11.0, 5.0])]
    path.write_text(lines + "\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_tables(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "A\n<!-- begin peers -->\nold\n<!-- end peers -->\nB\n<!-- begin parts -->\n<!-- end parts -->\n"
    )
    done = render(results, "--pages", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    row = (
        "| float32 | f32 | decode | 11.0 (10.0–12.0) | OpenVINO f32 | 5.0 (5.0–5.0) | 2.20 (2.00–2.40) | 3 |"
    )
    assert row in text and "old" not in text
    assert text.startswith("A\n<!-- begin peers -->\n| weights |") and "<!-- end peers -->\nB\n" in text
    assert "### decode, float32" in text and "128 steps" in text
    assert "| attention | 2 |" in text and "| head | 1 |" in text  # two layers
    render(results, "--pages", page)
    assert page.read_text() == text


def test_tables_of_each_instruction_set(tmp_path: Path) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    rows = [compared([10.0, 5.0]), compared([30.0, 10.0], isa="amx")]
    results.write_text("\n".join(map(json.dumps, rows)) + "\n")
    page.write_text("<!-- begin peers_amx -->\n<!-- end peers_amx -->\n")
    done = render(results, "--pages", page)
    assert done.returncode == 0, done.stderr
    assert "| 3.00 (3.00–3.00) | 1 |" in page.read_text() and "2.00" not in page.read_text()


def test_plots(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    done = render(results, "--plots", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["speed-by-batch.svg", "step-by-part.svg"]
    assert "float32" in (tmp_path / "speed-by-batch.svg").read_text()


def test_what_it_cannot_read(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin speed -->\n<!-- end speed -->\n")
    error = render(results, "--pages", page).stderr
    assert "there is no table 'speed', only peers, peers_avx2, speeds, parts" in error
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"engine": \n')
    assert "broken.jsonl, line 1: not JSON" in render(broken).stderr
