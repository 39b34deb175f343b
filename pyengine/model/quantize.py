"""Quantising a checkpoint: when it is loaded, or once and for all into a new one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pyengine import _C
from pyengine.errors import CheckpointError, ConfigError
from pyengine.model.checkpoint import SAFETENSORS, WEIGHT_FILES, Checkpoint
from pyengine.model.json_file import read_json_object
from pyengine.model.quantization import BITS, check_method, matrix_names, quantization_config
from pyengine.model.safetensors import write_safetensors

Weights: TypeAlias = dict[str, tuple[Any, str, Sequence[int]]]  # as _C.Model takes them
Progress: TypeAlias = Callable[[int, int], object]

_EQUALIZED = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}  # dense layer -> the norm in front of it
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".tiktoken")


def quantize_weights(
    context: _C.ExecContext, checkpoint: Checkpoint, method: str, progress: Progress | None = None
) -> Weights:
    """The tensors of ``checkpoint``, quantised: the bytes that ``write_quantized`` writes.

    ``method``: "int8" or "int4". ``progress`` is called with (tensors done, all). Matrices are read one after
    the other, and the pages of their file given back. ConfigError if the checkpoint is quantised already;
    CheckpointError names a tensor that holds NaN or infinity.
    """
    check_method(method)
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"{checkpoint.path} is quantised to {checkpoint.quantization} already; quantise the "
            "checkpoint that it was made from"
        )
    sources = checkpoint.weights()
    layouts = matrix_names(checkpoint.config)
    weights: Weights = {}
    for done, name in enumerate(sources):
        base, _, part = name.rpartition(".")
        if part == "weight" and base in layouts:
            tensors = _quantize_matrix(context, checkpoint, base, layouts[base], method, weights)
            weights.update({f"{base}.{key}": tensor for key, tensor in tensors.items()})
        elif name not in weights:  # an equalised norm is there already
            weights[name] = _C.to_float32(context, sources[name])
        if progress is not None:
            progress(done + 1, len(sources))
    return weights


def _quantize_matrix(
    context: _C.ExecContext, checkpoint: Checkpoint, base: str, layout: str, method: str, weights: Weights
) -> Weights:
    sources = checkpoint.weights()
    matrix, factor = sources[f"{base}.weight"], None
    layer, _, dense = base.partition("h.")[2].partition(".")
    if dense in _EQUALIZED:
        norm = f"h.{layer}.{_EQUALIZED[dense]}"
        gain, bias = sources[f"{norm}.weight"], sources[f"{norm}.bias"]
        factor, weights[f"{norm}.weight"], weights[f"{norm}.bias"] = _C.equalize(context, matrix, gain, bias)
    try:
        return dict(_C.quantize(context, matrix, layout, BITS[method], factor))
    except CheckpointError as error:
        tensor = checkpoint.tensors[f"{base}.weight"]
        if "NaN" not in str(error):
            raise
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} {error}") from None


def write_quantized(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    method: str,
    *,
    overwrite: bool = False,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the quantised ``checkpoint`` to the directory ``output``; returns the bytes of its weights.

    config.json is the old one with a ``quantization_config``; tokenizer and other small files are copied. The
    directory is written beside ``output`` and renamed at the end: there is never half a checkpoint. An
    ``output`` that holds files is a CheckpointError, unless ``overwrite`` and it is a checkpoint, which the
    new one then replaces.
    """
    check_method(method)
    output = Path(output)
    _check_output(checkpoint, output, overwrite)
    context = _C.ExecContext(num_threads or 0)
    weights = quantize_weights(context, checkpoint, method, progress)
    config = read_json_object(checkpoint.path / "config.json", ConfigError)
    config["quantization_config"] = quantization_config(method)
    config["torch_dtype"] = "float32"
    config.pop("dtype", None)  # the field's other name
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error.strerror}") from None
    try:
        scratch.chmod(0o777 & ~_umask())
        nbytes = write_safetensors(scratch / SAFETENSORS, weights, {"format": "pt"})
        for source in checkpoint.path.iterdir():
            if _is_copied(source):
                shutil.copyfile(source, scratch / source.name)
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _replace(scratch, output)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return nbytes


def _check_output(checkpoint: Checkpoint, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; the quantised checkpoint is a directory")
    if not output.is_dir():
        return
    if output.resolve() == checkpoint.path.resolve():
        raise CheckpointError(f"{output} is the checkpoint that is read; write to another directory")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{output} exists and is not empty; name another directory, or overwrite it")
    if not (output / "config.json").is_file():
        raise CheckpointError(f"{output} is not a checkpoint (no config.json): it is not overwritten")
    if output.resolve() in checkpoint.path.resolve().parents:
        raise CheckpointError(f"{output} contains the checkpoint that is read; write to another directory")


def _is_copied(source: Path) -> bool:
    name = source.name
    is_weights = name in WEIGHT_FILES or name.endswith((".safetensors.index.json", ".bin.index.json"))
    is_small = name.endswith(_COPIED_SUFFIXES) or name.startswith("LICENSE")
    return source.is_file() and name != "config.json" and not is_weights and is_small


def _replace(scratch: Path, output: Path) -> None:
    """``scratch`` becomes ``output``; what was there is removed last."""
    if not output.exists() or not any(output.iterdir()):
        os.replace(scratch, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.replace(output, old)
    try:
        os.replace(scratch, output)
    except OSError:
        os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
