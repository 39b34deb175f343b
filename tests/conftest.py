"""Fixtures that tests of several parts share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import CONFIGS, make_checkpoint

# For torch, which is imported later. OpenMP threads spin at every barrier: two test processes of two
# threads each, on two cores, take a hundred times as long as with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts pytest with "&" makes it ignore Ctrl-C, and so would the programs that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(name)``: directory of the test checkpoint CONFIGS[name], made once per session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        return make_checkpoint(root / name, CONFIGS[name], seed=sorted(CONFIGS).index(name))

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of the training texts next to the repository; tests that need it skip where it is absent."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"no data at {directory.parent.name}/{directory.name} next to the repository")
    return directory
