"""Arrays for the tests of single operations: both dtypes, references in float64, one context per setting."""

from __future__ import annotations

import functools
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pyengine import _C

Floats: TypeAlias = npt.NDArray[np.float32]
Array: TypeAlias = npt.NDArray[Any]

# PYENGINE_ISA restricts the tests to one instruction set, for emulated processors.
ISAS = [os.environ["PYENGINE_ISA"]] if os.environ.get("PYENGINE_ISA") else _C.available_isas()
DTYPES = ["float32", "bfloat16"]


@functools.cache
def context(isa: str, threads: int = 1) -> _C.ExecContext:
    return _C.ExecContext(threads, isa)


def narrow(x: Array) -> npt.NDArray[np.uint16]:
    """bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(x: Array) -> Floats:
    """float32 values of a float32 array or of bfloat16 bits."""
    if x.dtype == np.float32:
        return x
    return (x.astype(np.uint32) << 16).view(np.float32)


def stored(x: Array, dtype: str) -> Array:
    """``x`` in the form that the operations take for ``dtype``."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    return x if dtype == "float32" else narrow(x)
