"""Reading every weight of a checkpoint: is anything not finite, and how large are the numbers?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyengine.model.safetensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CHUNK = 1 << 16  # elements converted at a time: 256 KB of float32 stay in the L2 cache


@dataclass(frozen=True)
class TensorReport:
    """What one tensor holds; minimum, maximum and rms are of its finite values (0 if there are none)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    num_elements: int
    num_nan: int
    num_inf: int
    minimum: float
    maximum: float
    rms: float

    @property
    def ok(self) -> bool:
        return self.num_nan == 0 and self.num_inf == 0


@dataclass(frozen=True)
class CheckReport:
    """Reports of all tensors, in the order of the model."""

    tensors: tuple[TensorReport, ...]

    @property
    def faults(self) -> tuple[TensorReport, ...]:
        """Tensors with values that are not finite."""
        return tuple(t for t in self.tensors if not t.ok)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def num_elements(self) -> int:
        return sum(t.num_elements for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def num_nan(self) -> int:
        return sum(t.num_nan for t in self.tensors)

    @property
    def num_inf(self) -> int:
        return sum(t.num_inf for t in self.tensors)


# NumPy's type of what is stored; bfloat16 as its bits.
_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "uint8": "u1"}


def check_tensors(tensors: Mapping[str, Tensor]) -> CheckReport:
    """Read every value of float tensors, and the bytes of quantised ones, a chunk at a time."""
    return CheckReport(tuple(_check_tensor(name, tensor) for name, tensor in tensors.items()))


def _check_tensor(name: str, tensor: Tensor) -> TensorReport:
    import numpy as np

    stored = np.frombuffer(tensor.data, _STORED[tensor.dtype])
    num_nan = num_inf = num_finite = 0
    minimum, maximum, squares = math.inf, -math.inf, 0.0
    for start in range(0, stored.size, _CHUNK):
        values = _to_float32(stored[start : start + _CHUNK], tensor.dtype)
        low, high = float(values.min()), float(values.max())  # NaN if any value is NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            num_nan += int(np.isnan(values).sum())
            num_inf += int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
            if values.size == 0:
                continue
            low, high = float(values.min()), float(values.max())
        minimum, maximum = min(minimum, low), max(maximum, high)
        # A float32 sum of squares overflows from 1e19 on; such weights are rare, and double is slow.
        largest = max(-low, high)
        if largest > 1e15:
            values = values.astype(np.float64)
        squares += float(np.dot(values, values))
        num_finite += values.size
    return TensorReport(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        num_elements=stored.size,
        num_nan=num_nan,
        num_inf=num_inf,
        minimum=minimum if num_finite else 0.0,
        maximum=maximum if num_finite else 0.0,
        rms=math.sqrt(squares / num_finite) if num_finite else 0.0,
    )


def _to_float32(stored: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    """One chunk as float32, in memory that np.dot takes."""
    import numpy as np

    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=dtype == "float16")
