"""Legacy ``pytorch_model.bin`` files, read through torch where it is installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyengine.errors import CheckpointError
from pyengine.model.json_file import show
from pyengine.model.safetensors import Tensor

if TYPE_CHECKING:
    import torch


def read_torch_bin(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a state dict saved by ``torch.save``, as buffers that share torch's memory.

    Only data is unpickled (``weights_only=True``). Zip files are memory-mapped; files from before
    torch 1.6 are read. CheckpointError where torch is missing or the file is not a state dict.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    if magic == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run 'git lfs pull'")
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch file and torch is not installed. Either install it (pip install torch), or "
            "convert the checkpoint to safetensors where transformers is installed: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=magic.startswith(b"PK"))
    except Exception as e:  # torch raises a dozen unrelated classes for a damaged file
        reason = (str(e).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch state dict: {type(e).__name__}: {reason[:200]}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict (name -> tensor)")
    return {
        name: _to_buffer(name, value, path)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _to_buffer(name: object, tensor: torch.Tensor, path: str) -> Tensor:
    import torch

    if not isinstance(name, str):
        raise CheckpointError(f"{path}: a tensor's name is {show(name)}; it must be a string")
    where = f"{path}: tensor {show(name)}"
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{where} is {tensor.layout} {tensor.dtype} on {tensor.device}; it must be dense numbers"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # Only an expanded tensor has more elements than storage; a copy of it could be of any size.
        raise CheckpointError(f"{where}: shape {show(tuple(tensor.shape))} repeats its elements; save a copy")
    data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return Tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data, path)
