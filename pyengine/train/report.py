"""What a run shows: the live line, ``log.jsonl``, ``loss.png``, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pyengine.train.checkpoint import cut_log
from pyengine.train.model import ModelConfig

_LINE_INTERVAL = 0.2  # seconds between updates of the live line
_PLOT_INTERVAL = 30.0


class Reporter:
    """Writes the log and tells people. In processes but the main one it does nothing."""

    def __init__(
        self, out: Path, steps: int, *, active: bool, quiet: bool, plot: bool, tensorboard: bool
    ) -> None:
        self._out, self._steps, self._active = out, steps, active
        self._show = active and not quiet
        self._live = self._show and sys.stderr.isatty()
        self._line_time = 0.0
        self._width = 0
        self.tokens_per_step = 0
        self._plot, self._plot_time = plot, -math.inf
        self.rows: list[dict[str, Any]] = []
        self._board: Any = _tensorboard(out) if active and tensorboard else None

    def start(self, step: int) -> None:
        """Keep the log up to ``step`` and append from there."""
        if self._active:
            self.rows = cut_log(self._out / "log.jsonl", step)
            cut_log(self._out / "samples.jsonl", step)

    def log(self, row: dict[str, Any]) -> None:
        if not self._active:
            return
        self.rows.append(row)
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])
        if self._show and "val_loss" in row:
            self.note(
                f"step {row['step']:,}: train_loss {row['train_loss']:.4f}, val_loss {row['val_loss']:.4f}, "
                f"{row['tok_per_s']:,.0f} tokens/s"
            )

    def sample(self, step: int, text: str) -> None:
        if not self._active:
            return
        with (self._out / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
        if self._show:
            self.note("| " + text.strip().replace("\n", "\n| "))

    def progress(self, what: str, part: float) -> None:
        """Preparation of the data."""
        self._update(f"{what} {100 * part:3.0f} %" if part else f"{what} …", part >= 1.0)

    @property
    def is_live(self) -> bool:
        return self._live

    @property
    def is_due(self) -> bool:
        """Whether the live line is old enough to be written again."""
        return time.monotonic() - self._line_time > _LINE_INTERVAL

    def live(self, step: int, loss: float, rate: float, mfu: float | None) -> None:
        """``rate`` in steps per second, ``mfu`` as a part of 1."""
        left = (self._steps - step) / max(rate, 1e-9)
        text = f"step {step:,}/{self._steps:,}  loss {loss:.4f}  {self.tokens_per_step * rate:,.0f} tokens/s"
        if mfu is not None:
            text += f"  MFU {100 * mfu:.0f} %"
        self._update(f"{text}  {_duration(left)} left", step == self._steps)

    def _update(self, text: str, now: bool) -> None:
        clock = time.monotonic()
        if self._live and (now or clock - self._line_time > _LINE_INTERVAL):
            self._line_time = clock
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._show:
            if self._width:
                sys.stderr.write("\r" + " " * self._width + "\r")
                self._width = 0
            encoding = sys.stderr.encoding or "utf-8"
            sys.stderr.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            sys.stderr.flush()

    def draw(self, final: bool = False) -> None:
        """loss.png, now and then."""
        if not (self._active and self._plot) or (
            not final and time.monotonic() - self._plot_time < _PLOT_INTERVAL
        ):
            return
        self._plot_time = time.monotonic()
        try:
            draw_losses({"": self.rows}, self._out / "loss.png")
        except ImportError:
            self._plot = False
            self.note("no loss.png: matplotlib is not installed")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from pyengine.errors import ConfigError

        raise ConfigError("--tensorboard: not installed; pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def draw_losses(runs: dict[str, list[dict[str, Any]]], file: Path, *, against: str = "step") -> None:
    """Losses of runs by name, and the learning rate of a single one, against "step" or "seconds"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in runs.items():
        label = f"{name} " if name else ""
        train = axes.plot(
            [r[against] for r in rows],
            [r["train_loss"] for r in rows],
            lw=1,
            alpha=0.4,
            label=f"{label}training",
        )
        evaluated = [r for r in rows if "val_loss" in r]
        axes.plot(
            [r[against] for r in evaluated],
            [r["val_loss"] for r in evaluated],
            marker=".",
            color=train[0].get_color() if name else None,
            label=f"{label}validation",
        )
    axes.set_xlabel({"step": "step", "seconds": "seconds of training"}[against])
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if len(runs) == 1:
        (rows,) = runs.values()
        rate = axes.twinx()
        rate.plot(
            [r[against] for r in rows],
            [r["lr"] for r in rows],
            color="gray",
            lw=0.8,
            ls=":",
            label="learning rate",
        )
        rate.set_ylabel("learning rate (dotted)")
        rate.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")  # the suffix chooses the format
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(file)


def flops_per_token(config: ModelConfig, num_parameters: int, block_size: int) -> float:
    """Arithmetic of forward and backward: 6 per weight but positions, and attention (PaLM, appendix B)."""
    weights = num_parameters - config.n_positions * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * block_size


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here: the reference of MFU."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        a = product / product.norm()
    return 2.0 * size**3 / best
