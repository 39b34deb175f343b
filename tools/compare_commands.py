#!/usr/bin/env python3
"""Time two or more commands in turn (A B A B ...) and print wall time, peak memory and the paired ratios.

Machines drift: only a ratio of neighbouring runs says something. Each run is a whole process, from exec to
exit, with its output thrown away; memory is the kernel's peak resident set of that process.

    tools/compare_commands.py --runs 15 "pyengine-cli generate --max-tokens 1 Hello" "other-engine Hello"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time


def run_once(argv: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one run."""
    start = time.perf_counter()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took the status from Popen
    if process.returncode != 0:
        sys.exit(f"{shlex.join(argv)} failed with exit code {process.returncode}; run it by hand to see why")
    return seconds, usage.ru_maxrss / 1024


def spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="a whole command as one argument")
    parser.add_argument("--runs", type=int, default=11, help="counted runs of each command (default 11)")
    parser.add_argument("--warmup", type=int, default=2, help="runs of each that are not counted (default 2)")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: at least 1")
    commands = [shlex.split(c) for c in args.commands]

    runs: list[list[tuple[float, float]]] = [[] for _ in commands]
    for turn in range(args.warmup + args.runs):
        for index, argv in enumerate(commands):
            result = run_once(argv)
            if turn >= args.warmup:
                runs[index].append(result)

    for index, argv in enumerate(commands):
        row = {
            "command": shlex.join(argv),
            "seconds": spread([seconds for seconds, _ in runs[index]]),
            "peak_mib": spread([mib for _, mib in runs[index]]),
        }
        if index:
            row["first_over_this"] = spread([a[0] / b[0] for a, b in zip(runs[0], runs[index], strict=True)])
        print(json.dumps(row))


if __name__ == "__main__":
    main()
