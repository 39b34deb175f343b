"""Legacy ``pytorch_model.bin`` files, read through torch where it is installed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

from pyengine import _C
from pyengine.errors import CheckpointError
from pyengine.model.files import open_file, unreadable
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
    with open_file(path, CheckpointError) as file:
        return _read(file, path)


def _read(file: BinaryIO, path: str) -> dict[str, Tensor]:
    try:
        magic = file.read(8)
    except OSError as e:
        raise unreadable(path, e, CheckpointError) from None
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
    is_zip = magic.startswith(b"PK")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as e:  # torch raises a dozen unrelated classes for a damaged file
        reason = (str(e).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch state dict: {type(e).__name__}: {reason[:200]}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict (name -> tensor)")
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        _require_plain(name, tensor, path)
    mapped = _watched(tensors.values(), file, path) if is_zip else None
    return {name: _to_buffer(name, tensor, mapped, path) for name, tensor in tensors.items()}


def _require_plain(name: object, tensor: torch.Tensor, path: str) -> None:
    import torch

    if not isinstance(name, str):
        raise CheckpointError(f"{path}: a tensor's name is {show(name)}; it must be a string")
    where = f"{path}: tensor {show(name)}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{where} is {tensor.layout} {tensor.dtype} on {tensor.device}; it must be dense numbers"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # Only an expanded tensor has more elements than storage; a copy of it could be of any size.
        raise CheckpointError(f"{where}: shape {show(tuple(tensor.shape))} repeats its elements; save a copy")


def _watched(tensors: Iterable[torch.Tensor], file: BinaryIO, path: str) -> tuple[int, memoryview] | None:
    """Address and bytes of the part of torch's mapping of the file that holds the tensors."""
    storages = [s for s in (t.untyped_storage() for t in tensors) if s.nbytes() > 0]
    begin = min((s.data_ptr() for s in storages), default=0)
    size = max((s.data_ptr() + s.nbytes() for s in storages), default=0) - begin
    if not 0 < size <= os.fstat(file.fileno()).st_size:  # not in one mapping, after all
        return None
    memory = (ctypes.c_char * size).from_address(begin)
    memory.storages = storages  # type: ignore[attr-defined]  # which own that memory
    return begin, memoryview(_C.FileView(memory, file.fileno(), path))


def _to_buffer(name: str, tensor: torch.Tensor, mapped: tuple[int, memoryview] | None, path: str) -> Tensor:
    import torch

    tensor = tensor.contiguous()
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if mapped is not None and data.nbytes > 0:
        begin, view = mapped
        offset = tensor.data_ptr() - begin
        if 0 <= offset <= view.nbytes - data.nbytes:  # else it is a copy: its elements were not in order
            data = view[offset : offset + data.nbytes]
    return Tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data, path)
