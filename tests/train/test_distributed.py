"""Two processes of torchrun give the losses of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.train.run import train  # noqa: E402
from tests.train.helpers import ENVIRONMENT, command_line, read_log, tiny_options  # noqa: E402


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(text_file: str, tmp_path: Path, parallel: str) -> None:
    one = tiny_options(text_file, tmp_path / "one", steps=8, eval_every=4, grad_accum=2)
    train(one, quiet=True)
    two = tiny_options(
        text_file, tmp_path / "two", steps=8, eval_every=4, grad_accum=2, parallel=parallel, sample_tokens=4
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*torchrun, "-m", "pyengine.train", *command_line(two)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("train_loss", "val_loss"):
        ours, theirs = (
            [row[name] for row in read_log(o) if name in row] for o in (tmp_path / "one", tmp_path / "two")
        )
        assert len(ours) == len(theirs) > 1
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    if parallel == "fsdp":  # goes on from gathered shards
        more = tiny_options(
            text_file,
            tmp_path / "two",
            steps=10,
            eval_every=4,
            grad_accum=2,
            parallel=parallel,
            resume="auto",
        )  # noqa: E501
        subprocess.run(
            [*torchrun, "-m", "pyengine.train", *command_line(more)], env=ENVIRONMENT, check=True, timeout=200
        )  # noqa: E501
        assert read_log(tmp_path / "two")[-1]["step"] == 10
