#!/usr/bin/env python3
"""Time what sampling controls add to a step of the model.

32 requests generate at once, each round once with every set of controls, in turn; only steps in which all of
them generate count. The time is that of ``Model.step``, which samples, beside greedy steps of the same round.

    tools/sampling_cost.py --model path/to/gpt2 --dtype float32 --threads 2
    tools/sampling_cost.py --sequences 8 --rounds 9 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine import LLM, PyEngineError, SamplingParams  # noqa: E402
from pyengine.bench.workloads import token_ids  # noqa: E402
from tools.engine_overhead import TimedModel  # noqa: E402

CONTROLS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "all": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
        "logprobs": 5,
    },
}


def step_ms(llm: LLM, timed: TimedModel, controls: dict[str, Any], sequences: int, steps: int) -> float:
    """Median milliseconds of a step in which all sequences generate."""
    prompts = token_ids(sequences, 16, llm.config.vocab_size)
    params = [SamplingParams(max_tokens=steps, ignore_eos=True, seed=i, **controls) for i in range(sequences)]
    timed.steps.clear()
    llm.generate(prompts, params)
    times = [end - begin for begin, end, *size in timed.steps if size == [sequences, sequences]]
    if not times:
        raise SystemExit("sampling_cost: the requests never ran together: raise --steps")
    return statistics.median(times) * 1e3


def measure(llm: LLM, sequences: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    timed = TimedModel(llm._engine.core.model)
    llm._engine.core = dataclasses.replace(llm._engine.core, model=timed)
    step_ms(llm, timed, CONTROLS["all"], sequences, steps)  # first allocations
    times: dict[str, list[float]] = {name: [] for name in CONTROLS}
    for _ in range(rounds):
        for name, controls in CONTROLS.items():
            times[name].append(step_ms(llm, timed, controls, sequences, steps))
    rows = []
    for name, values in times.items():
        added = [100 * (value / greedy - 1) for value, greedy in zip(values, times["greedy"], strict=True)]
        rows.append(
            {
                "controls": name,
                "sequences": sequences,
                "step_ms": round(statistics.median(values), 3),
                "added_percent": round(statistics.median(added), 2),
                "added_min": round(min(added), 2),
                "added_max": round(max(added), 2),
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--sequences", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=24, help="new tokens of each (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    return parser.parse_args()


def main() -> None:
    args = parse()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        num_threads=args.threads,
        max_num_seqs=args.sequences,
        enable_prefix_caching=False,
    )
    rows = measure(llm, args.sequences, args.steps, args.rounds)
    if args.json:
        for row in rows:
            print(json.dumps({"dtype": llm.dtype, "threads": llm.num_threads, **row}))
        return
    print(f"{args.sequences} requests, {llm.dtype}, {llm.num_threads} threads: a step of the model")
    print(f"{'controls':<14}{'ms':>9}{'beside greedy':>16}   least to most")
    for row in rows:
        print(
            f"{row['controls']:<14}{row['step_ms']:>9.2f}{row['added_percent']:>+15.1f}%"
            f"   {row['added_min']:+.1f} to {row['added_max']:+.1f} %"
        )


if __name__ == "__main__":
    try:
        main()
    except PyEngineError as error:
        sys.exit(f"sampling_cost: {error}")
