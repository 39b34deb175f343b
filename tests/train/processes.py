"""Runs in processes of their own that start at once: forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pyengine.train.options import TrainOptions

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pyengine.train.run", "torch.distributed.fsdp", "tests.train.processes"])


def _errors_file(options: TrainOptions, rank: str) -> Path:
    return Path(f"{options.out}.errors-{rank}")


def _run(options: TrainOptions, environment: dict[str, str]) -> None:
    from pyengine.train.run import train

    os.environ.update(environment)
    with _errors_file(options, environment.get("RANK", "0")).open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(train(options, quiet=True).exit_status)


def start(options: TrainOptions, **environment: str) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_run, args=(options, environment), daemon=True)
    process.start()
    return process


def errors(options: TrainOptions) -> str:
    """What the processes of a run have written to standard error."""
    files = [_errors_file(options, rank) for rank in ("0", "1")]
    return "\n".join(file.read_text(errors="replace") for file in files if file.exists())
