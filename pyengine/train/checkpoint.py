"""What a run keeps on the disk: exported checkpoints in Hugging Face's layout, and a state to go on from.

    OUT/            the best checkpoint so far: config.json, model.safetensors, tokenizer.json …
    OUT/last/       the last one
    OUT/state/      checkpoint.pt: weights, optimisers and counters, float32
    OUT/log.jsonl, samples.jsonl, loss.png, README.md

Each file is written beside its name, flushed and renamed: after a crash it is the old one or the new one.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyengine.errors import CheckpointError, ConfigError, TrainingError
from pyengine.train.files import atomic_file, write_atomically, write_json
from pyengine.train.model import ModelConfig, to_huggingface
from pyengine.train.options import TrainOptions, flag

FORMAT = 1
# What a resumed run must not change, because the rest of it would not be the same run.
FIXED = (
    "n_layer n_head n_embd block_size bias activation batch_size grad_accum optimizer schedule seed dropout "
    "lora_rank lora_alpha parallel"
).split()


class RunDirectory:
    """The files of one run. Only the main process writes."""

    def __init__(self, path: Path, config: ModelConfig, export_dtype: str) -> None:
        self.path = path
        self.state_file = state_file(path)
        self._config = config
        self._dtype: torch.dtype = getattr(torch, export_dtype)
        self.saved_step: int | None = None

    def prepare(self, tokenizer: Path) -> None:
        """Directories, and everything of the exported checkpoints but the weights."""
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        ids = {"bos_token_id": self._config.bos_token_id, "eos_token_id": self._config.eos_token_id}
        for directory in (self.path, self.path / "last"):
            directory.mkdir(parents=True, exist_ok=True)
            for file in tokenizer.iterdir():
                shutil.copyfile(file, directory / file.name)
            write_json(directory / "config.json", self._config.to_dict(self._dtype))
            write_json(directory / "generation_config.json", {**ids, "do_sample": True})

    def export(self, weights: dict[str, Tensor], best: bool) -> None:
        """Write ``model.safetensors`` of ``last/``, and of the directory itself where it is the best."""
        from safetensors.torch import save_file

        tensors = {n: v.to("cpu", self._dtype) for n, v in to_huggingface(weights, self._config).items()}
        for directory in (self.path / "last", *([self.path] if best else [])):
            with atomic_file(directory / "model.safetensors") as file:
                save_file(tensors, str(file), metadata={"format": "pt"})
                file.chmod(0o644)  # safetensors makes it readable by its owner alone

    def save_state(self, state: dict[str, Any]) -> None:
        def write(file: BinaryIO) -> None:
            torch.save({"format": FORMAT, **state}, file)

        try:
            write_atomically(self.state_file, write)
        except RuntimeError as error:  # torch's, where a write fails
            raise OSError(None, str(error)) from error
        self.saved_step = state["step"]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns what cannot be written (a full disk) into a TrainingError that names the last good state."""
        from safetensors import SafetensorError

        try:
            yield
        except BrokenPipeError:  # nobody reads what the run tells
            raise
        except (OSError, SafetensorError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise TrainingError(
                f"{self.path}: cannot be written: {reason}; {self.last_good}. Make room, then go on with "
                "--resume auto"
            ) from error

    @property
    def last_good(self) -> str:
        if self.saved_step is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self.state_file}, after step {self.saved_step}"


def state_file(run: Path) -> Path:
    return run / "state" / "checkpoint.pt"


def load_state(run: Path) -> dict[str, Any]:
    """The state of a run; CheckpointError if it cannot be read."""
    file = state_file(run)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"--resume {run}: there is no {file}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file} was not written by this version of pyengine-cli train")
    return state


def check_options(state: dict[str, Any], options: TrainOptions, run: Path) -> None:
    """ConfigError if the options differ in what makes the run what it is."""
    saved = state["options"]
    for name in FIXED:
        if saved[name] != getattr(options, name):
            raise ConfigError(
                f"--resume: the run in {run} has {flag(name)} {saved[name]}, not {getattr(options, name)}; "
                "use the same value, or another --out"
            )
    if state["step"] > options.steps:
        raise ConfigError(
            f"--steps {options.steps}: the run in {run} has already done {state['step']}; give more steps"
        )


def check_data(state: dict[str, Any], data_identity: str, run: Path) -> None:
    """ConfigError if the tokens are others."""
    if state["data"] != data_identity:
        raise ConfigError(
            f"--resume: the run in {run} was trained on other data or with another tokenizer; use the same "
            "--data, --val-fraction, --tokenizer and --vocab-size, or another --out"
        )


def cut_log(file: Path, step: int) -> list[dict[str, Any]]:
    """Lines of ``file`` up to ``step``, after removing the others (steps that will be done again)."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        if row["step"] <= step:
            rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(file, lambda out: out.write(text.encode("utf-8")))
    return rows
