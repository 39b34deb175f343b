"""The optimisers, torch's own, and the learning rate's schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyengine.train.options import TrainOptions


def learning_rate(options: TrainOptions, step: int) -> float:
    """Of step ``step`` (from 0): linear warm-up, then the schedule from ``lr`` to ``min_lr``."""
    assert options.lr is not None and options.min_lr is not None
    if step < options.warmup_steps:
        return options.lr * (step + 1) / (options.warmup_steps + 1)
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    if options.schedule == "constant":
        left = 1.0
    elif options.schedule == "linear":
        left = 1.0 - progress
    elif options.schedule == "wsd":  # warm-up, stable, decay
        left = min(1.0, (1.0 - progress) / options.decay_fraction)
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr + (options.lr - options.min_lr) * left


class Optimizers:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Decoupled weight decay acts on matrices only (embeddings among them), never on gains and biases. Muon's
    step has the size of AdamW's (``match_rms_adamw``), so that one learning rate suits both.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, device: torch.device) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.dim() == 2 and ".h." in n] if options.optimizer == "muon" else []
        others = {id(p) for p in hidden}
        decayed = [p for _, p in named if p.dim() >= 2 and id(p) not in others]
        plain = [p for _, p in named if p.dim() < 2]
        self._sharded = options.parallel == "fsdp" and torch.distributed.is_initialized()
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, options.weight_decay), (plain, 0.0))
            if parameters
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups:
            betas = (options.beta1, options.beta2)
            fused = device.type in ("cpu", "cuda") and not self._sharded
            self.optimizers.append(torch.optim.AdamW(groups, lr=options.lr or 0.0, betas=betas, fused=fused))
        if hidden:
            muon = torch.optim.Muon(
                hidden,
                lr=options.lr or 0.0,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.append(muon)

    def set_learning_rate(self, value: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = value

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to norm ``limit`` (0: do not); their norm before, a scalar."""
        if self._sharded:
            norm = nn.utils.clip_grad_norm_(self.parameters, limit or math.inf)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if limit and (norm.device.type != "cpu" or norm.item() > limit):  # a GPU is not waited for
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
