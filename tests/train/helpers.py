"""Small texts, and runs that take a second."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from pyengine.train.options import TrainOptions

WORDS = "the quick brown fox jumps over a lazy dog while seven green birds sing of rain and stones".split()
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。\n"
    "どこで生れたかとんと見当がつかぬ。何でも薄暗い所でニャーニャー泣いていた。\n"
)
CHINESE = "学而时习之,不亦说乎?有朋自远方来,不亦乐乎?\n人不知而不愠,不亦君子乎?\n"

TINY: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "steps": 12,
    "eval_every": 6,
    "log_every": 1,
    "warmup_steps": 3,
    "sample_tokens": 0,
    "plot": False,
    "threads": 1,
    "tokenizer": "char",
}


def make_text(words: int = 2000, seed: int = 0) -> str:
    """Lines of random words."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + ("\n" if rng.random() < 0.1 else "") for _ in range(words))


def write_text(path: Path, text: str | None = None) -> str:
    path.write_text(make_text() if text is None else text, encoding="utf-8")
    return str(path)


def tiny_options(data: str, out: Path, **changes: Any) -> TrainOptions:
    if changes.get("steps", 12) < TINY["warmup_steps"]:
        changes.setdefault("warmup_steps", 0)
    return TrainOptions.from_values(changes, {**TINY, "data": (data,), "out": str(out)})


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float | None]]:
    """What must be equal in two runs that are the same."""
    return [(row["step"], row["train_loss"], row.get("val_loss")) for row in read_log(out)]


def command_line(options: TrainOptions) -> list[str]:
    """Arguments of ``pyengine-cli train`` for the given options."""
    words = []
    for name, value in options.to_dict().items():
        if name not in options.given:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, str(one)]
    return words


PYTHON = [sys.executable, "-m", "pyengine", "train"]
HANG_SECONDS = 900  # after which a process is given up; on a busy machine 240 were too few to import torch
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
