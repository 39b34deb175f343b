"""A checkpoint that is truncated, overwritten or replaced while it is in use: an error, no dead process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyengine import LLM
from pyengine.errors import CheckpointError
from pyengine.model.checkpoint import load_checkpoint
from tests.hardening import tiny

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: without its guard it would end by SIGBUS.
USE = """
import os, sys
from pathlib import Path
from pyengine import LLM, SamplingParams
from pyengine.errors import CheckpointError
from tests.hardening import tiny
directory = tiny.make(Path(sys.argv[1]))
file = directory / sys.argv[2]
{before}
llm = LLM(directory, num_threads=2, dtype={dtype!r})
params = SamplingParams(max_tokens=4, temperature=0)
expected = llm.generate([[1, 2, 3]] * 9, params)[0].outputs[0].token_ids
{change}
generate = lambda: llm.generate([[1, 2, 3]] * 9, params)
for call in (generate, lambda: llm.score([1, 2]), lambda: list(llm.stream([1], params))):
    try:
        result = call()
    except CheckpointError as error:
        print(error)
    else:
        print("fine")
directory = tiny.make(Path(sys.argv[1] + "-other"))
assert LLM(directory, num_threads=2).generate([1, 2, 3], params)[0].outputs[0].token_ids == expected
"""


def use(directory: Path, change: str, *, file: str = "model.safetensors", **parts: str) -> list[str]:
    """What three calls say after a change of the weight file."""
    script = USE.format(**{"change": change, "before": "", "dtype": "float32", **parts})
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory), file],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.splitlines()


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    lines = use(tmp_path / "model", f"os.truncate(file, {size})")
    assert len(lines) == 3
    for line in lines:
        assert str(tmp_path / "model" / "model.safetensors") in line
        assert "was truncated while it was in use" in line and "load the checkpoint again" in line


def test_an_overwritten_file(tmp_path: Path) -> None:
    lines = use(tmp_path / "model", "file.write_bytes(file.read_bytes()[::-1])")
    assert len(lines) == 3 and all("was written to while it was in use" in line for line in lines)


def test_a_replaced_file_disturbs_nobody(tmp_path: Path) -> None:
    change = "new = Path(str(file) + '.new'); new.write_bytes(b'!'); new.rename(file)"
    assert use(tmp_path / "model", change) == ["fine"] * 3


def test_a_removed_directory_disturbs_nobody(tmp_path: Path) -> None:
    assert use(tmp_path / "model", "import shutil; shutil.rmtree(directory)") == ["fine"] * 3


def test_a_truncated_pytorch_file(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="reads a pytorch_model.bin")
    before = """
import torch
torch.save({n: torch.tensor(v).reshape(s) for n, (s, v) in tiny.tensors().items()}, file)
(directory / "model.safetensors").unlink()
"""
    lines = use(tmp_path / "model", "os.truncate(file, 3000)", file="pytorch_model.bin", before=before)
    assert len(lines) == 3 and all("pytorch_model.bin was truncated" in line for line in lines)


OTHER_FAULT = """
import faulthandler, mmap, os, sys, tempfile
from pathlib import Path
from pyengine.model.checkpoint import load_checkpoint
from tests.hardening import tiny
if {first}: faulthandler.enable()
checkpoint = load_checkpoint(tiny.make(Path(sys.argv[1])))
if not {first}: faulthandler.enable()
with tempfile.TemporaryFile() as file:
    file.truncate(4096)
    theirs = mmap.mmap(file.fileno(), 4096)
    file.truncate(0)
    theirs[0]
"""


@pytest.mark.parametrize("first", [True, False])
def test_faults_of_others_reach_faulthandler(tmp_path: Path, first: bool) -> None:
    """And end the process: no handler may swallow them, nor two of them call each other for ever."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_FAULT.format(first=first), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode < 0
    assert "Fatal Python error: Bus error" in done.stderr


def changing(file: Path) -> Callable[[object], None]:
    return lambda _: os.truncate(file, 4000)


def test_a_file_truncated_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(tiny.make(tmp_path / "model"))
    assert checkpoint.check().ok
    monkeypatch.setattr("pyengine.model.check.check_tensors", changing(checkpoint.files[0]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated while it was in use"):
        checkpoint.check()


def test_a_file_truncated_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check of its header and the reading of its weights."""
    directory = tiny.make(tmp_path / "model")

    def cut(*_: object, **__: object) -> int:
        os.truncate(directory / "model.safetensors", 4000)
        return 8  # blocks

    monkeypatch.setattr("pyengine.loading.kv_blocks", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated while it was in use"):
        LLM(directory)


def test_a_file_that_shrinks_while_its_header_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.make(tmp_path / "model")
    file = directory / "model.safetensors"
    size = os.stat(file)
    os.truncate(file, 200)
    monkeypatch.setattr("pyengine.model.safetensors.os.fstat", lambda _: size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated while it was read"):
        load_checkpoint(directory)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads Linux's /proc")
def test_the_guard_of_a_file_goes_with_its_model(tmp_path: Path) -> None:
    directory = tiny.make(tmp_path / "model")
    weights = str(directory / "model.safetensors")  # the tokenizer's thread has other files open, for a while

    def descriptors() -> int:
        links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(link) and os.readlink(link) == weights for link in links)

    llm = LLM(directory)
    assert 1 <= descriptors() <= 2
    del llm
    gc.collect()
    assert descriptors() == 0
