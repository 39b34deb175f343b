"""The CUDA back end: where its library is, and the GPU that it finds."""

from __future__ import annotations

import functools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pyengine.errors import ConfigError

LIBRARY_VARIABLE = "PYENGINE_CUDA_LIBRARY"
_LIBRARY = Path(__file__).with_name("libpyengine_cuda.so")


@dataclass(frozen=True)
class Device:
    name: str
    capability: tuple[int, int]
    total_memory: int  # bytes
    free_memory: int
    architectures: str  # compute capabilities that the library has code for, as "75;80"


def find_library() -> Path | None:
    """The library of this installation, or the one that PYENGINE_CUDA_LIBRARY names; None: there is none."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    return _LIBRARY if _LIBRARY.is_file() else None


def require_library() -> Path:
    found = find_library()
    if found is None:
        raise ConfigError(
            'device="cuda": this installation of pyengine has no CUDA back end (no nvcc was found when it '
            'was installed, or PYENGINE_CUDA was off); use device="cpu", or install a CUDA toolkit and then '
            "pyengine again, with PYENGINE_CUDA=on (docs/cuda.md)"
        )
    return found


@functools.cache
def load_cublaslt() -> None:
    """Loads PyPI's cuBLASLt, where it is installed: the library then finds it by its name, as it finds the
    system's. Where there is neither, large products are pyengine's own, and slower."""
    for found in Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib/libcublasLt.so.1[23]"):
        import ctypes

        ctypes.CDLL(str(found))
        return


def find_device() -> Device:
    """GPU 0. ConfigError where there is no library, no driver, or no GPU that the library has code for."""
    from pyengine import _C

    load_cublaslt()
    found = _C.cuda_device(str(require_library()))
    return Device(**{**found, "capability": tuple(found["capability"])})
