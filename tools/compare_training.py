#!/usr/bin/env python3
"""Tokens per second of ``pyengine-cli train`` beside another trainer's, in turn, with nanoGPT's CPU settings.

    python tools/compare_training.py ../shared/data/tinyshakespeare.txt ../shared/peers/train_peer.py

The peer is a script that takes TEXT, --steps and --threads and prints JSON with ``tok_per_s_median``
(forward, backward and update of the median step). Ours is the median line of log.jsonl: one whole step with
its data, checks and log. Both leave out the first 20 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "--tokenizer char --no-bias --activation gelu --no-plot --sample-tokens 0 --log-every 1 "
    "--eval-every 1000000"
).split()
WARM_UP = 20  # steps


def run(command: list[object]) -> str:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def peer_rate(args: argparse.Namespace) -> float:
    command = [args.peer.resolve(), args.text.resolve(), "--steps", args.steps, "--threads", args.threads]
    return float(json.loads(run(command))["tok_per_s_median"])


def our_rate(args: argparse.Namespace, directory: Path) -> float:
    options = ["--data", args.text.resolve(), "--out", directory / "run", "--data-cache", args.cache]
    options += ["--steps", args.steps, "--threads", args.threads, *SETTINGS, *args.ours]
    run(["-m", "pyengine", "train", *options])
    rows = [json.loads(line) for line in (directory / "run/log.jsonl").read_text().splitlines()]
    return statistics.median(row["tok_per_s"] for row in rows if row["step"] > WARM_UP)


def line(peer: float, ours: float) -> str:
    return f"peer {peer:,.0f}  ours {ours:,.0f} tokens/s  ratio {ours / peer:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150, help="of each run, more than 20")
    parser.add_argument("--threads", type=int, default=2)
    args, ours = parser.parse_known_args()
    args.ours = ours  # what is left, such as --compile, goes to our trainer
    if args.steps <= 2 * WARM_UP:
        parser.error(f"--steps must be more than {2 * WARM_UP}")
    pairs = []
    with tempfile.TemporaryDirectory() as work:
        args.cache = Path(work) / "data"
        for number in range(args.rounds):
            pair = peer_rate(args), our_rate(args, Path(work) / str(number))
            pairs.append(pair)
            print(line(*pair), flush=True)
    peers, rates = zip(*pairs, strict=True)
    print("median:", line(statistics.median(peers), statistics.median(rates)))
    ratios = [rate / peer for peer, rate in pairs]
    print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
