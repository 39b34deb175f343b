"""The GPU of these tests: the simulator, whose library ``cmake --preset release && cmake --build --preset
release`` builds, or with ``PYENGINE_TEST_GPU=1`` this machine's, with the library of this installation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyengine import cuda
from pyengine.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
_NAME = "libpyengine_cuda_sim.so"


def simulator() -> Path:
    """The library that PYENGINE_CUDA_SIM names, which then must be there, or the newest of build/."""
    named = os.environ.get("PYENGINE_CUDA_SIM")
    if named is not None:
        assert Path(named).is_file(), f"PYENGINE_CUDA_SIM={named}: no such file"
        return Path(named)
    built = [path for kind in ("release", "dev", "ci") for path in _ROOT.glob(f"build/{kind}/{_NAME}")]
    if not built:
        pytest.skip("the simulator of a GPU is not built (docs/cuda.md)")
    return max(built, key=lambda path: path.stat().st_mtime)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library that every ``device="cuda"`` of the test uses."""
    if os.environ.get("PYENGINE_TEST_GPU") == "1":
        monkeypatch.delenv(cuda.LIBRARY_VARIABLE, raising=False)
        cuda.find_device()  # fails the test, saying why, where there is none
        return cuda.require_library()
    library = simulator()
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(library))
    try:
        cuda.find_device()
    except ConfigError as error:
        if "another build" in str(error) and "PYENGINE_CUDA_SIM" not in os.environ:
            pytest.skip(f"{library} is older than the extension: build it again")
        raise
    return library
