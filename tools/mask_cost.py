#!/usr/bin/env python3
"""Time what a constraint adds to a token: making the mask of what may follow, and applying it.

The constraints are those of the tests of constrained text: regular expressions, choices, grammars and
JSON schemas. Each is followed for some tokens, drawn with a seed from those that its masks allow. The first
masks of a constraint, which prepare it, count like all others; compiling it does not.

    tools/mask_cost.py --tokenizer path/to/gpt2
    tools/mask_cost.py --tokenizer path/to/gpt2 --seeds 3 --json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine import PyEngineError  # noqa: E402
from pyengine._C import ExecContext, Sampler  # noqa: E402
from pyengine.decoding.constraints import Constraint, ConstraintCompiler  # noqa: E402
from pyengine.model.checkpoint import resolve  # noqa: E402
from pyengine.model.tokenizer import load_tokenizer  # noqa: E402
from tests.decoding.constrained import CASES  # noqa: E402


class MaskedDraw:
    """Seconds that a mask adds to a greedy draw of one row."""

    def __init__(self, vocab_size: int) -> None:
        self._logits = np.random.default_rng(0).normal(0, 2, (1, vocab_size)).astype(np.float32)
        self._context, self._sampler = ExecContext(1), Sampler(1)
        self._sampler.set(0, temperature=0.0)
        self._row = np.zeros(1, np.int32)

    def _draw(self) -> float:
        logits = self._logits.copy()
        begin = time.perf_counter()
        self._sampler.sample(self._context, logits, self._row, self._row)
        return time.perf_counter() - begin

    def __call__(self, mask: memoryview) -> float:
        without = self._draw()
        begin = time.perf_counter()
        self._sampler.set_mask(0, mask)
        return time.perf_counter() - begin + self._draw() - without


def follow(
    constraint: Constraint, rng: random.Random, most: int, draw: MaskedDraw
) -> list[tuple[float, float]]:
    """Seconds to make and to apply each mask on the way of one text."""
    times = []
    for _ in range(most):
        begin = time.perf_counter()
        mask = constraint.mask()
        made = time.perf_counter() - begin
        times.append((made, draw(mask)))
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        if constraint.take(int(allowed[rng.randrange(len(allowed))])):
            break
    return times


def measure(directory: Path, seeds: int, most: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise SystemExit(f"mask_cost: {directory} has no tokenizer files")
    compiler, draw = ConstraintCompiler(tokenizer.vocab_size), MaskedDraw(tokenizer.vocab_size)
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    times: list[tuple[float, float]] = []
    compiled = []
    for params, _ in CASES:
        for seed in range(seeds):
            begin = time.perf_counter()
            constraint = compiler.compile(params, tokenizer, eos)
            if seed == 0:
                compiled.append(time.perf_counter() - begin)
            times += follow(constraint, random.Random(seed), most, draw)
    made, applied = np.array(times).T
    row: dict[str, Any] = {
        "vocabulary": tokenizer.vocab_size,
        "constraints": len(CASES),
        "masks": len(times),
        "compile_ms_median": round(1e3 * float(np.median(compiled)), 3),
    }
    for name, values in (("make", made), ("apply", applied), ("both", made + applied)):
        for label, share in (("median", 50), ("p99", 99), ("max", 100)):
            row[f"{name}_us_{label}"] = round(1e6 * float(np.percentile(values, share)), 1)
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", help="directory with tokenizer files (default: the bundled model)")
    parser.add_argument("--seeds", type=int, default=1, help="texts of each constraint (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="of a text, at most (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON line")
    return parser.parse_args()


def main() -> None:
    args = parse()
    row = measure(resolve(args.tokenizer), args.seeds, args.tokens)
    if args.json:
        print(json.dumps(row))
        return
    print(
        f"{row['masks']} masks of {row['constraints']} constraints, {row['vocabulary']} tokens; "
        f"compiling: {row['compile_ms_median']} ms (median)"
    )
    print(f"{'microseconds':<14}{'median':>9}{'p99':>9}{'max':>9}")
    for name, what in (("make", "make a mask"), ("apply", "apply it"), ("both", "both")):
        shares = (row[f"{name}_us_{label}"] for label in ("median", "p99", "max"))
        print(f"{what:<14}" + "".join(f"{value:>9.1f}" for value in shares))


if __name__ == "__main__":
    try:
        main()
    except PyEngineError as error:
        sys.exit(f"mask_cost: {error}")
