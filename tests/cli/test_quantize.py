"""``pyengine-cli quantize`` and what other commands make of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyengine.model.checkpoint import resolve
from tests.cli.conftest import Run

GREEDY = "generate --temperature 0 --max-tokens 8 --quiet".split()


@pytest.mark.parametrize(("method", "share"), [("int8", 0.6), ("int4", 0.35)])
def test_quantized_checkpoints_run_as_quantizing_does(
    run: Run, method: str, share: float, tmp_path: Path
) -> None:
    source, output = str(resolve(None)), str(tmp_path / "q")
    result = run("quantize", source, output, "--quantization", method)
    assert result.exit_code == 0 and result.stdout == ""
    assert f"{output}: {method} weights" in result.stderr
    text = run(*GREEDY, "--model", output, "It was a").stdout
    assert text and text == run(*GREEDY, "--quantization", method, "It was a").stdout
    row = json.loads(run("inspect", "--model", output, "--check", "--json").stdout)
    assert row["weights"]["dtype"] == row["config"]["quantization"] == method
    assert row["weights"]["bytes"] == row["weight_bytes"][method]
    assert row["weights"]["bytes"] < share * row["weight_bytes"]["bfloat16"]
    assert row["check"]["ok"]
    assert f"{method}, " in run("inspect", "--model", output).stdout


def test_refusals_are_one_line(run: Run, tmp_path: Path) -> None:
    source, output = str(resolve(None)), str(tmp_path / "q")
    assert run("quantize", source, output, "--quiet").stderr == ""
    for arguments, message in (
        (("quantize", source, output), "not empty"),
        (("quantize", output, str(tmp_path / "again")), "quantised to int8 already"),
        (("quantize", str(tmp_path / "nothing"), output), "does not exist"),
        (("generate", "--model", output, "--quantization", "int4", "a"), "holds int8 weights"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert run("quantize", source, output, "--overwrite", "--quantization", "int4").exit_code == 0
    assert run("quantize", source).exit_code == 2
