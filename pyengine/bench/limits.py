"""What the machine allows, measured in the same run: memory bandwidth and arithmetic peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyengine.bench.profile import PartTotals

_PROBE_BYTES = 512 << 20  # as much as GPT-2 124M's float32 weights, so that caches hold no more of it
# Which of ExecContext.arithmetic_peaks an instruction set may use; those not named here: all of them.
_INSTRUCTIONS = {"baseline": ("baseline",), "avx2": ("baseline", "avx2", "avx_vnni")}


@dataclass(frozen=True)
class Limits:
    """Of all threads together."""

    bandwidth: float  # bytes per second, reading
    peaks: dict[str, float]  # "float32", "bfloat16", "int8": operations per second

    def peak(self, part: str, dtype: str) -> float:
        """Operations per second that a part of a step with weights of ``dtype`` could reach."""
        if part == "attention":  # computes in float32 whatever the weights are
            return self.peaks["float32"]
        kinds = {"f32": ["float32"], "bf16": ["float32", "bfloat16"]}.get(dtype, ["float32", "int8"])
        return max(self.peaks[kind] for kind in kinds if kind in self.peaks)

    def seconds(self, part: str, totals: PartTotals, dtype: str) -> tuple[float, str]:
        """The least time that the part could take, and which limit sets it."""
        memory = totals.bytes / self.bandwidth
        arithmetic = totals.operations / self.peak(part, dtype)
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def measure(context: Any) -> Limits:
    """Takes about a second; ``context``: the _C.ExecContext whose threads and instruction set count."""
    usable = _INSTRUCTIONS.get(context.isa)
    peaks: dict[str, float] = {}
    for name, rate in context.arithmetic_peaks().items():
        kind, instructions = name.split()
        if usable is None or instructions in usable:
            peaks[kind] = max(rate, peaks.get(kind, 0.0))
    return Limits(context.read_bandwidth(_PROBE_BYTES), peaks)
