"""The loop: batches through the model, updates, evaluations, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.errors import TrainingError
from pyengine.train.checkpoint import RunDirectory
from pyengine.train.data import Batches, TokenStore
from pyengine.train.distributed import Processes
from pyengine.train.lora import merged_state
from pyengine.train.model import GPT2
from pyengine.train.optim import Optimizers, learning_rate
from pyengine.train.options import TrainOptions
from pyengine.train.report import Reporter, flops_per_token, peak_flops
from pyengine.train.samples import sample_text

_EVALUATION_LOGITS = 1 << 25  # float32 logits of one evaluation batch at most: 128 MiB


@dataclass
class Progress:
    """What a run counts, saved with its state."""

    step: int = 0  # updates done
    seconds: float = 0.0  # spent on them, evaluation left out
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of the log
    val_loss: float | None = None


class Trainer:
    """One run in one process. ``model`` holds the weights, ``wrapped`` is how it is called."""

    def __init__(
        self,
        options: TrainOptions,
        processes: Processes,
        model: GPT2,
        wrapped: nn.Module,
        optimizers: Optimizers,
        batches: Batches,
        validation: TokenStore,
        run: RunDirectory,
        reporter: Reporter,
        data_identity: str,
    ) -> None:
        self.options, self.processes, self.model, self.wrapped = options, processes, model, wrapped
        self.optimizers, self.batches, self.validation = optimizers, batches, validation
        self.run, self.reporter, self._identity = run, reporter, data_identity
        self.progress = Progress()
        self.device = processes.device
        name = options.dtype
        if name == "auto":
            name = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        self.dtype: torch.dtype = getattr(torch, name)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.dtype == torch.float16 else None
        self._losses: list[Tensor] = []  # of the steps since the last line, still on the device
        self._line_seconds = 0.0  # of progress.seconds, at the last line
        self._line_step = 0
        self._signal = 0
        assert options.block_size is not None and options.save_every is not None
        self._block, self._save_every = options.block_size, options.save_every
        reporter.tokens_per_step = options.batch_size * options.grad_accum * self._block

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved run was."""
        self.processes.load_full_state(self.model, state["model"])
        self.processes.load_optimizer_state(self.model, self.optimizers.optimizers, state["optimizers"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._line_seconds, self._line_step = self.progress.seconds, self.progress.step

    def fit(self) -> int:
        """Train to the last step; the number of the signal that ended it earlier, else 0."""
        options, progress = self.options, self.progress
        self.run.saved_step = progress.step or None
        self.reporter.start(progress.step)
        peak = self._peak()
        called: Callable[..., Tensor] = torch.compile(self.wrapped) if self._compiles() else self.wrapped
        self.wrapped.train()
        clock = time.perf_counter()
        with self._signals():
            while progress.step < options.steps:
                loss = self._step(called, progress.step)
                progress.step += 1
                now = time.perf_counter()
                progress.seconds += now - clock
                clock = now
                step, last = progress.step, progress.step == options.steps
                self._show(step, loss, peak)
                evaluate = last or step % options.eval_every == 0
                stop = self.processes.any(bool(self._signal))
                if evaluate or step % options.log_every == 0:
                    self._log(step, evaluate)
                patience = options.patience and progress.evaluations_since_best >= options.patience
                if last or stop or patience or evaluate or step % self._save_every == 0:
                    self._save(exported=evaluate or stop or last)
                if evaluate:
                    self._sample(step)
                    self.reporter.draw()
                if stop:
                    return self._signal or signal.SIGTERM
                if patience:
                    self.reporter.note(f"no better loss in {options.patience} evaluations: stopped")
                    return 0
                clock = time.perf_counter()
        return 0

    def _step(self, model: Callable[..., Tensor], step: int) -> Tensor:
        """One update; its loss, a scalar on the device (the mean of this process's share)."""
        options, processes = self.options, self.processes
        rate = learning_rate(options, step)
        self.optimizers.set_learning_rate(rate)
        total = torch.zeros((), device=self.device)
        for micro in range(options.grad_accum):
            tokens = torch.from_numpy(self.batches.batch(step, micro, processes.rank, processes.world))
            tokens = tokens.to(self.device, non_blocking=True)
            if options.dropout:  # depends on the step alone, so that a resumed run drops the same
                torch.manual_seed(hash((options.seed, step, micro, processes.rank)) & 0x7FFF_FFFF_FFFF_FFFF)
            with processes.no_sync(self.wrapped, micro == options.grad_accum - 1):
                with self._autocast():
                    loss = model(tokens[:, :-1], tokens[:, 1:])
                part = loss / options.grad_accum if options.grad_accum > 1 else loss
                torch.autograd.backward(part if self.scaler is None else self.scaler.scale(part))
            total = total + part.detach()
        if self.scaler is not None:
            for optimizer in self.optimizers.optimizers:
                self.scaler.unscale_(optimizer)
        norm = self.optimizers.clip(options.grad_clip)
        self._check_finite(total, norm, step)
        self.optimizers.step(self.scaler)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizers.zero_grad()
        self._losses.append(total)
        return total

    def _check_finite(self, loss: Tensor, norm: Tensor, step: int) -> None:
        """Before the update, so that the weights stay good. On a GPU only where the log waits anyway."""
        if self.device.type != "cpu" and (step + 1) % self.options.log_every:
            return
        bad = not math.isfinite(loss.item())
        what = "the loss"
        if not bad and self.scaler is None:
            bad, what = not math.isfinite(norm.item()), "the gradient"
        if bad:
            raise TrainingError(
                f"{what} of step {step + 1} is not finite: {self.run.last_good}. A lower --lr, a longer "
                "--warmup-steps or --dtype float32 may help"
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _compiles(self) -> bool:
        wanted = self.options.compile
        if wanted is None:  # compiling takes a minute, which a short run does not get back
            return self.device.type == "cuda" and self.options.steps - self.progress.step >= 1000
        return wanted

    def _log(self, step: int, evaluate: bool) -> None:
        """A line of the log: the mean loss since the last one, and the validation loss where it is due."""
        progress = self.progress
        mean = self._mean_losses()
        steps = max(1, step - self._line_step)
        seconds = max(1e-9, progress.seconds - self._line_seconds)
        rate = steps * self.options.batch_size * self.options.grad_accum * self._block / seconds
        row: dict[str, Any] = {
            "step": step,
            "train_loss": mean,
            "lr": learning_rate(self.options, step - 1),
            "tok_per_s": round(rate, 1),
            "seconds": round(progress.seconds, 3),
        }
        progress.losses = []
        self._line_step, self._line_seconds = step, progress.seconds
        if evaluate and len(self.validation):
            loss = row["val_loss"] = progress.val_loss = self.evaluate()
            if not math.isfinite(loss):
                raise TrainingError(f"the validation loss of step {step} is {loss}: {self.run.last_good}")
            progress.evaluations_since_best += 1
            if loss < progress.best_loss:
                progress.best_loss, progress.best_step = loss, step
                progress.evaluations_since_best = 0
        self.reporter.log(row)

    def _mean_losses(self) -> float:
        """Mean over the steps since the last line and all processes; those on the device are fetched."""
        if self._losses:
            means = self.processes.sum(torch.stack(self._losses)) / self.processes.world
            self.progress.losses += means.tolist()
            self._losses = []
        return math.fsum(self.progress.losses) / max(1, len(self.progress.losses))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the whole validation set, in non-overlapping windows (the last may be shorter)."""
        self.wrapped.eval()
        store, size, world = self.validation, self._block, self.processes.world
        count = (len(store) - 1) // size
        chunk = max(1, min(256, _EVALUATION_LOGITS // (size * self.model.config.vocab_size)))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, count, chunk * world):
            # Every process runs the same number of batches, as FSDP needs it; those beyond the end count 0.
            begin = first + self.processes.rank * chunk
            end = min(begin + chunk, count)
            weight = max(0, end - begin)
            numbers = torch.arange(begin, end) if weight else torch.zeros(1, dtype=torch.int64)
            total += self._window_loss(store.windows((numbers * size).numpy(), size + 1)) * weight * size
        rest = len(store) - 1 - count * size
        if rest:
            loss = self._window_loss(store.slice(count * size, len(store))[None]) * rest
            total += loss if self.processes.is_main else 0.0
        self.wrapped.train()
        return float(self.processes.sum(total)) / (len(store) - 1)

    def _window_loss(self, windows: Any) -> Tensor:
        tokens = torch.from_numpy(windows).to(self.device)
        with self._autocast():
            return self.model(tokens[:, :-1], tokens[:, 1:]).double()

    def _save(self, exported: bool) -> None:
        """The state, and the exported checkpoint where ``exported``."""
        progress = self.progress
        self._mean_losses()  # so that no loss stays outside the state
        weights = self.processes.full_state(self.model)
        optimizers = self.processes.optimizer_state(self.model, self.optimizers.optimizers)
        if self.processes.is_main:
            if exported:
                best = not len(self.validation) or progress.best_step == progress.step
                self.run.export(merged_state(self.model, weights), best)
            self.run.save_state(
                {
                    "step": progress.step,
                    "options": self.options.to_dict(),
                    "data": self._identity,
                    "model": weights,
                    "optimizers": optimizers,
                    "scaler": self.scaler.state_dict() if self.scaler else None,
                    "progress": asdict(progress),
                }
            )

    def _sample(self, step: int) -> None:
        if self.options.sample_tokens and self.processes.is_main:
            text = sample_text(self.run.path / "last", self.options)
            self.reporter.sample(step, text)

    def _peak(self) -> float:
        """FLOP/s of all processes that MFU is measured against; 0: nobody looks."""
        if not self.reporter.is_live:
            return 0.0
        return peak_flops(self.device, self.dtype) * self.processes.world

    def _show(self, step: int, loss: Tensor, peak: float) -> None:
        if not self.reporter.is_live or not self.reporter.is_due:
            return
        seconds = max(1e-9, self.progress.seconds - self._line_seconds)
        rate = (step - self._line_step) / seconds
        flops = flops_per_token(self.model.config, self.model.num_parameters(), self._block)
        mfu = rate * self.reporter.tokens_per_step * flops / peak if peak else None
        self.reporter.live(step, loss.item(), rate, mfu)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step, with a checkpoint; a second SIGINT at once."""

        def handle(number: int, _frame: object) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            self.reporter.note("stopping after this step; its checkpoint is saved first")

        try:
            before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are its business
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
