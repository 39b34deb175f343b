"""Runs in processes of their own that start at once: forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess

from pyengine.train.options import TrainOptions

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pyengine.train.run", "torch.distributed.fsdp", "tests.train.processes"])


def _run(options: TrainOptions, environment: dict[str, str]) -> None:
    from pyengine.train.run import train

    os.environ.update(environment)
    sys.exit(train(options, quiet=True).exit_status)


def start(options: TrainOptions, **environment: str) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_run, args=(options, environment), daemon=True)
    process.start()
    return process
