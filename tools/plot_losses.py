#!/usr/bin/env python3
"""Draw the losses of several runs of ``pyengine-cli train`` into one picture, against the time of training.

python tools/plot_losses.py RUN [RUN ...] [--out losses.svg] [--against step]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyengine.train.report import draw_losses  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="directories with a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("losses.svg"))
    parser.add_argument("--against", choices=("seconds", "step"), default="seconds")
    args = parser.parse_args()
    logs = {
        run.name: [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in args.runs
    }
    draw_losses(logs, args.out, against=args.against)


if __name__ == "__main__":
    main()
