"""``tools/compare_peers.py`` with a peer that is a few lines of Python."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/compare_peers.py"
FAKE = """
import pathlib, sys
def engine_fake(dtype, model, threads):
    print("loading", dtype, model, threads)  # where answers go, if the tool does not take care
    log = pathlib.Path(model)
    def run(workload):
        log.open("a").write(f"{workload} {dtype} {threads}\\n")
        return 0.5, 2.5
    return run
def engine_broken(dtype, model, threads):
    def run(workload):
        sys.exit("out of luck")
    return run
def rate(workload, ttft, total):
    return 100 / (total - ttft)
"""


@pytest.fixture
def compare(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    script = tmp_path / "script.py"
    script.write_text(FAKE)

    def run(peer: str, *more: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--peers-python", python, "--peers-script", str(script)]
        command += ["--peer", peer, "--peer-dtype", "f32", "--peer-model", str(tmp_path / "log")]
        command += ["--model", str(checkpoint("gelu")), "--threads", "1", *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def test_pairs_and_ratios(compare: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    result = compare("fake", "--workload", "decode", "--pairs", "3", "--json", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    (row,) = map(json.loads, result.stdout.splitlines())
    assert (row["workload"], row["dtype"], row["kv_dtype"]) == ("decode", "bf16", "bf16")
    assert (row["peer_engine"], row["peer_dtype"], row["threads"]) == ("fake", "f32", 1)
    assert [theirs for _, theirs in row["pairs"]] == [50.0] * 3
    assert row["peer"] == {"median": 50.0, "min": 50.0, "max": 50.0}
    ratios = sorted(ours / 50 for ours, _ in row["pairs"])
    assert [row["ratio"][name] for name in ("min", "median", "max")] == pytest.approx(ratios, abs=2e-3)
    # One run that does not count, then the three, and those that other processes have disturbed.
    assert (tmp_path / "log").read_text() == "decode f32 1\n" * (4 + row["discarded"])
    assert 0 <= row["discarded"] <= 3 and 0 <= row["others"] <= 1
    assert "loading f32" in result.stderr


def test_table(compare: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = compare("fake", "--workload", "decode", "--pairs", "1")
    assert result.returncode == 0, result.stderr
    first, head, row = result.stdout.splitlines()
    assert first == "tokens/s of 1 pairs, 1 threads: median (least-most)"
    assert head.split() == ["workload", "pyengine", "f32,", "KV", "f32", "fake", "f32", "ratio", "others"]
    assert row.startswith("decode") and "50.0 (50.0-50.0)" in row


@pytest.mark.parametrize(
    ("peer", "arguments", "message"),
    [
        ("broken", ["--workload", "decode"], "compare_peers: broken f32: its process ended with status 1"),
        ("absent", ["--workload", "decode"], "compare_peers: absent f32: its process ended with status 1"),
        ("fake", ["--workload", "prefill"], "compare_peers: workload prefill has a request of 513 tokens"),
        ("fake", ["--workload", "latency"], "--workload latency: there are decode, prefill, batch, mixed"),
        ("fake", ["--pairs", "0"], "--pairs 0: at least 1"),
        ("fake", ["--peers-script", "none.py"], "--peers-script none.py: no such file"),
        ("fake", ["--workload", "decode", "--peers-python", "./none"], "--peers-python ./none: No such file"),
    ],
)
def test_failures_say_why(
    compare: Callable[..., subprocess.CompletedProcess[str]], peer: str, arguments: list[str], message: str
) -> None:
    result = compare(peer, *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stdout == ""
    if peer == "broken":
        assert "out of luck" in result.stderr


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="no /proc: not Linux")
def test_bystanders_are_seen() -> None:
    spec = importlib.util.spec_from_file_location("compare_peers", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        known, unknown = tool.Bystanders(os.getpid(), busy.pid), tool.Bystanders(os.getpid())
        time.sleep(1)
        assert unknown.share() > known.share() >= 0
    finally:
        busy.kill()
        busy.wait()
    known.share()
    assert known.share() is None  # a process is gone
