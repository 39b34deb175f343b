"""One process or many: torchrun's processes, as copies of the model (DDP) or shards of it (FSDP).

The global batch is the same for any number of processes: each takes its share of every micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyengine.errors import ConfigError
from pyengine.train.memory import keep_freed_memory
from pyengine.train.model import GPT2
from pyengine.train.options import TrainOptions


class Processes:
    """The process group of a run; of one process without torchrun."""

    def __init__(self, options: TrainOptions) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = _device(options.device, local_rank)
        self.parallel = options.parallel if self.world > 1 else "none"
        if options.batch_size % self.world:
            raise ConfigError(
                f"--batch-size {options.batch_size}: {self.world} processes share it, so it must be a "
                f"multiple of {self.world}"
            )
        if self.device.type == "cpu":
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(options.threads or max(1, usable // local_world))
            keep_freed_memory()
        else:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: GPT2) -> nn.Module:
        """The model as it is called in training; ``model`` stays its owner."""
        if self.parallel == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for block in model.transformer.h:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def no_sync(self, wrapped: nn.Module, last: bool) -> Any:
        """Around the backward of a micro-batch: gradients are exchanged with the last one."""
        if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
            return wrapped.no_sync()
        if self.parallel == "fsdp":
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value)
        return bool(value > 0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do; where it fails, all end with its error."""
        if self.world == 1:
            yield
            return
        failure: list[Any] = [None]
        if self.is_main:
            try:
                yield
            except BaseException as error:
                failure[0] = str(error)
                dist.broadcast_object_list(failure)
                raise
            dist.broadcast_object_list(failure)
        else:
            dist.broadcast_object_list(failure)
            if failure[0] is not None:
                raise ConfigError(f"process 0 failed: {failure[0]}")
            yield

    def full_state(self, model: GPT2) -> dict[str, Tensor]:
        """The whole state dict on the CPU (FSDP: gathered; all processes must call it)."""
        if self.parallel == "fsdp":
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return cast(dict[str, Tensor], get_model_state_dict(model, options=whole))
        return {name: value.detach() for name, value in model.state_dict().items()}

    def load_full_state(self, model: GPT2, state: dict[str, Tensor]) -> None:
        if self.parallel == "fsdp":
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(model, dict[str, Any](state), options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict(state)

    def optimizer_state(self, model: GPT2, optimizers: list[torch.optim.Optimizer]) -> Any:
        if self.parallel == "fsdp":
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_optimizer_state_dict(model, optimizers, options=whole)
        return [optimizer.state_dict() for optimizer in optimizers]

    def load_optimizer_state(self, model: GPT2, optimizers: list[torch.optim.Optimizer], state: Any) -> None:
        if self.parallel == "fsdp":
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

            whole = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(model, optimizers, optim_state_dict=state, options=whole)
            return
        for optimizer, one in zip(optimizers, state, strict=True):
            optimizer.load_state_dict(one)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)
