"""Where the time of steps goes, and what they cost, as the extension counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PREPARE = "prepare"  # entered once in each step


@dataclass(frozen=True)
class PartTotals:
    """One part of the steps ("qkv", "attention", ...); bytes and operations are the least possible."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    operations: int = 0

    def __add__(self, other: PartTotals) -> PartTotals:
        return PartTotals(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.operations + other.operations,
        )


@dataclass(frozen=True)
class Profile:
    parts: dict[str, PartTotals]

    @property
    def total(self) -> PartTotals:
        """Of all parts: the time of the steps, without what happens between them."""
        return sum(self.parts.values(), PartTotals())

    @property
    def steps(self) -> int:
        return self.parts.get(PREPARE, PartTotals()).calls


def context_of(llm: Any) -> Any:
    """The _C.ExecContext that an ``LLM`` computes on."""
    return llm._engine.core.model.context


def profiled(llm: Any, run: Callable[[], object]) -> Profile:
    """The profile of every step that runs during ``run()``."""
    context = context_of(llm)
    context.start_profile()
    try:
        run()
    finally:
        parts = context.stop_profile()
    return Profile({name: PartTotals(*totals) for name, totals in parts.items()})
