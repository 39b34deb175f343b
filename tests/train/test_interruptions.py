"""Nothing is lost: kill at any moment, signals, a full disk, losses that are not finite."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from pyengine.errors import ConfigError, TrainingError  # noqa: E402
from pyengine.train import loop  # noqa: E402
from pyengine.train.checkpoint import load_state  # noqa: E402
from pyengine.train.files import write_atomically  # noqa: E402
from pyengine.train.options import TrainOptions  # noqa: E402
from pyengine.train.run import train  # noqa: E402
from tests.train import processes  # noqa: E402
from tests.train.helpers import (  # noqa: E402
    ENVIRONMENT,
    HANG_SECONDS,
    PYTHON,
    command_line,
    losses,
    read_log,
    tiny_options,
)

pytestmark = pytest.mark.timeout(2 * HANG_SECONDS)


def weights(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = load_state(out)["model"]
    return state


def lines(out: Path) -> int:
    """Complete lines of the log, which are the steps done where each is logged."""
    file = out / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_step(out: Path, step: int, status: Callable[[], int | None]) -> None:
    """``status()`` is None while the run goes on."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and status() is None:
        if lines(out) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached in {lines(out)} lines; status {status()}")


def test_resume_after_ten_kills_is_exact(text_file: str, tmp_path: Path) -> None:
    """SIGKILL at ten random moments; going on from there gives the losses of a run that was left alone."""

    def options(name: str) -> TrainOptions:
        changes = {"steps": 240, "eval_every": 20, "save_every": 7, "dropout": 0.1, "grad_accum": 2}
        return tiny_options(text_file, tmp_path / name, optimizer="muon", resume="auto", **changes)

    train(options("whole"), quiet=True)
    out = tmp_path / "killed"
    rng = random.Random("ten moments")
    reached: list[int] = []
    for _ in range(10):
        saved = load_state(out)["step"] if reached and (out / "state/checkpoint.pt").exists() else 0
        process = processes.start(options("killed"))
        wait_for_step(out, saved + rng.randrange(1, 20), partial(getattr, process, "exitcode"))
        time.sleep(rng.random() / 50)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(lines(out))
    assert len(set(reached)) > 3 and max(reached) < 240
    train(options("killed"), quiet=True)
    assert losses(out) == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(out)[name]), name


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_from_anywhere_is_exact(
    text_file: str, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends ten times in the middle of a step, an evaluation or a write, and goes on each time."""

    def options(name: str) -> TrainOptions:
        changes = {"steps": 50, "eval_every": 9, "save_every": 4, "dropout": 0.1, "log_every": 3}
        return tiny_options(
            text_file, tmp_path / name, optimizer=optimizer, sample_tokens=3, resume="auto", **changes
        )

    train(options("whole"), quiet=True)
    rng = random.Random(optimizer)
    original = {
        (loop.Trainer, "_step"): loop.Trainer._step,
        (loop.Trainer, "evaluate"): loop.Trainer.evaluate,
        (loop.Trainer, "_sample"): loop.Trainer._sample,
    }
    left = [0]

    def dying(function):  # type: ignore[no-untyped-def]
        def call(*arguments):  # type: ignore[no-untyped-def]
            result = function(*arguments)
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return result

        return call

    def dying_write(path, write):  # type: ignore[no-untyped-def]
        def half(file):  # type: ignore[no-untyped-def]
            write(file)
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        write_atomically(path, half)

    for (owner, name), function in original.items():
        monkeypatch.setattr(owner, name, dying(function))
    monkeypatch.setattr("pyengine.train.checkpoint.write_atomically", dying_write)
    deaths = 0
    while True:
        left[0] = rng.randrange(2, 16) if deaths < 10 else 1_000_000
        try:
            train(options("killed"), quiet=True)
            break
        except Killed:
            deaths += 1
    assert deaths == 10
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name]), name
    assert (tmp_path / "killed/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def check_saved(out: Path) -> None:
    assert load_state(out)["step"] == read_log(out)[-1]["step"] >= 3
    assert (out / "last/model.safetensors").is_file()


def test_sigint_saves_first(text_file: str, out: Path) -> None:
    options = tiny_options(text_file, out, steps=100_000, eval_every=100_000)
    process = subprocess.Popen(
        [*PYTHON, *command_line(options)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for_step(out, 3, process.poll)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, errors
    assert b"--resume auto goes on" in errors
    check_saved(out)


def test_sigterm_saves_first(text_file: str, out: Path) -> None:
    process = processes.start(tiny_options(text_file, out, steps=100_000, eval_every=100_000))
    wait_for_step(out, 3, lambda: process.exitcode)
    process.terminate()
    process.join(HANG_SECONDS)
    assert process.exitcode == 143
    check_saved(out)


def test_full_disk(text_file: str, out: Path) -> None:
    """A limit on the size of files, which fails writes as a full disk does."""
    train(tiny_options(text_file, out, steps=6), quiet=True)
    size = (out / "state/checkpoint.pt").stat().st_size
    good = (out / "state/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot be written: .*checkpoint.pt, after step 6"):
            train(tiny_options(text_file, out, steps=12, resume="auto"), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "state/checkpoint.pt").read_bytes() == good
    assert not list(out.rglob("*.tmp"))
    train(tiny_options(text_file, out, steps=12, resume="auto"), quiet=True)
    assert read_log(out)[-1]["step"] == 12


def test_full_disk_under_the_log(text_file: str, out: Path) -> None:
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot be written: No space left.*checkpoint.pt, after step 2"):
        train(tiny_options(text_file, out, steps=6, log_every=3, eval_every=6, save_every=2), quiet=True)
    assert load_state(out)["step"] == 2


def test_full_disk_under_the_data(text_file: str, out: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"--out .*/data: cannot be written to: File too large"):
            train(tiny_options(text_file, out), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_losses_that_are_not_finite(text_file: str, out: Path) -> None:
    options = tiny_options(text_file, out, steps=200, lr=1e30, grad_clip=0, save_every=1, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"step \d+ is not finite: .*(last good|no checkpoint)") as caught:
        train(options, quiet=True)
    state = load_state(out)
    assert f"after step {state['step']}" in str(caught.value)
    assert all(value.isfinite().all() for value in state["model"].values())
