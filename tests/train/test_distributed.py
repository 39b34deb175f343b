"""Two processes give the losses of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.train.options import TrainOptions  # noqa: E402
from pyengine.train.run import train  # noqa: E402
from tests.train import processes  # noqa: E402
from tests.train.helpers import ENVIRONMENT, HANG_SECONDS, command_line, read_log, tiny_options  # noqa: E402

pytestmark = pytest.mark.timeout(2 * HANG_SECONDS)

CHANGES: dict[str, Any] = {"eval_every": 4, "grad_accum": 2, "sample_tokens": 4}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # whatever the machine's name resolves to


def run_two(options: TrainOptions) -> None:
    """As torchrun starts them. Who starts them holds the store where they meet: nobody else gets its port."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2", **LOOPBACK}
    both = [processes.start(options, **place, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for process in both:
        process.join(HANG_SECONDS)
    assert [process.exitcode for process in both] == [0, 0], processes.errors(options)


def check_equal(ours: Path, theirs: Path) -> None:
    for name in ("train_loss", "val_loss"):
        first, second = ([row[name] for row in read_log(out) if name in row] for out in (ours, theirs))
        assert len(first) == len(second) > 1
        np.testing.assert_allclose(second, first, atol=1e-5)


def test_torchrun(text_file: str, tmp_path: Path) -> None:
    train(tiny_options(text_file, tmp_path / "one", steps=8, **CHANGES), quiet=True)
    options = command_line(tiny_options(text_file, tmp_path / "two", steps=8, **CHANGES))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "--local-addr", "127.0.0.1", "-m", "pyengine.train", *options]
    process = subprocess.Popen(
        command, env=ENVIRONMENT | LOOPBACK, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, too
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    check_equal(tmp_path / "one", tmp_path / "two")


def test_shards(text_file: str, tmp_path: Path) -> None:
    """FSDP, with the end of the run after a resume from gathered shards."""
    train(tiny_options(text_file, tmp_path / "one", steps=8, schedule="constant", **CHANGES), quiet=True)
    for steps in (4, 8):
        changes = {**CHANGES, "schedule": "constant", "parallel": "fsdp", "resume": "auto"}
        run_two(tiny_options(text_file, tmp_path / "two", steps=steps, **changes))
    check_equal(tmp_path / "one", tmp_path / "two")
