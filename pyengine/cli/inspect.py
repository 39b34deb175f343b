"""``pyengine-cli inspect``: what a checkpoint is, before anything is computed with it."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _options, _text

if TYPE_CHECKING:
    from pyengine.model.check import CheckReport
    from pyengine.model.checkpoint import Checkpoint

_EPILOG = """\b
Examples:
  pyengine-cli inspect
  pyengine-cli inspect --model ./gpt2 --check
  pyengine-cli inspect --model ./gpt2 --json | jq .parameters

\b
Only headers are read, so this is quick for a model of any size; --check reads every weight, and ends with
exit status 1 if one is not a finite number.
"""

_COMPUTE_DTYPES = ("float32", "bfloat16")
_WEIGHT_DTYPES = (*_COMPUTE_DTYPES, "int8", "int4")


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@_options.model
@click.option(
    "--check", is_flag=True, help="Read every weight: not-a-number, infinity, range of each tensor."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str | None, check: bool, as_json: bool) -> None:
    """Architecture, parameters, memory and files of a checkpoint."""
    from pyengine.model.checkpoint import load_checkpoint

    _text.prepare_output()
    checkpoint = load_checkpoint(model)
    report = _report(checkpoint)
    checked = checkpoint.check() if check else None
    if as_json:
        if checked is not None:
            report["check"] = {
                "ok": checked.ok,
                "values": checked.num_elements,
                "tensors": [dataclasses.asdict(tensor) for tensor in checked.tensors],
            }
        _text.print_json(report)
    else:
        for line in [*_lines(report), *(_check_lines(checked) if checked else [])]:
            click.echo(line)
    if checked is not None and not checked.ok:
        sys.exit(1)


def _report(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    files = [path for path in sorted(checkpoint.path.iterdir()) if path.is_file()]
    return {
        "path": str(checkpoint.path),
        "config": dataclasses.asdict(config),
        "head_dim": config.head_dim,
        "parameters": config.num_parameters(),
        "weights": {
            "dtype": checkpoint.dtype,
            "bytes": checkpoint.nbytes,
            "files": [path.name for path in checkpoint.files],
            "ignored_tensors": list(checkpoint.ignored),
        },
        "computes_in": checkpoint.auto_dtype,
        "cuda": _cuda(checkpoint),
        "weight_bytes": {dtype: config.weight_bytes(dtype) for dtype in _WEIGHT_DTYPES},
        "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(dtype) for dtype in _COMPUTE_DTYPES},
        "tokenizer": _tokenizer(checkpoint),
        "generation_config": checkpoint.generation_config,
        "files": {path.name: path.stat().st_size for path in files},
    }


def _cuda(checkpoint: Checkpoint) -> dict[str, Any]:
    """Whether the kernels for GPUs take the checkpoint; ``doctor`` knows whether there is a GPU."""
    from pyengine.backends import cuda_dtype, cuda_refuses

    refused = cuda_refuses(checkpoint)
    computes_in = cuda_dtype(checkpoint, checkpoint.quantization) if refused is None else None
    return {"runs": refused is None, "computes_in": computes_in, "reason": refused}


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    from pyengine.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    if tokenizer is None:
        return None
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    config, weights, tokenizer = report["config"], report["weights"], report["tokenizer"]
    size = _text.binary_size
    plural = "s" if len(weights["files"]) != 1 else ""
    rows = {
        "checkpoint": report["path"],
        "architecture": f"GPT-2: {config['n_layer']} layers, {config['n_head']} heads of "
        f"{report['head_dim']}, {config['n_embd']} channels, {config['n_inner']} in the MLP, "
        + config["activation_function"],
        "context": f"{config['n_positions']} tokens",
        "vocabulary": f"{config['vocab_size']} tokens, output head "
        + ("tied to the embedding" if config["tie_word_embeddings"] else "of its own"),
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens"
        if tokenizer
        else "none: token ids only",
        "parameters": f"{report['parameters']:,}",
        "weights": f"{weights['dtype']}, {size(weights['bytes'])} in {len(weights['files'])} file{plural}; "
        f"computed in {report['computes_in']}",
        "on CUDA": f"computed in {report['cuda']['computes_in']}"
        if report["cuda"]["runs"]
        else f"no: {report['cuda']['reason']}",
        "weights in memory": _per_dtype(report["weight_bytes"], 1),
        "KV per token": _per_dtype(report["kv_bytes_per_token"], 1),
        "KV of full context": _per_dtype(report["kv_bytes_per_token"], config["n_positions"]),
        "numerics": _numerics(config),
        "generation": ", ".join(
            f"{key}={value}"
            for key, value in report["generation_config"].items()
            if key[0] != "_" and key != "transformers_version"
        )
        or "-",
    }
    if weights["ignored_tensors"]:
        rows["ignored tensors"] = ", ".join(weights["ignored_tensors"])
    lines = [f"{key:<20}{value}" for key, value in rows.items()]
    return lines + [
        f"{'files' if index == 0 else '':<20}{name}  {size(count)}"
        for index, (name, count) in enumerate(report["files"].items())
    ]


def _per_dtype(sizes: dict[str, int], factor: int) -> str:
    return ", ".join(f"{dtype} {_text.binary_size(count * factor)}" for dtype, count in sizes.items())


def _numerics(config: dict[str, Any]) -> str:
    names = (
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    )
    return ", ".join(f"{name}={config[name]}" for name in names)


def _check_lines(checked: CheckReport) -> list[str]:
    values = f"{len(checked.tensors)} tensors, {checked.num_elements:,} values"
    if checked.ok:
        widest = max(checked.tensors, key=lambda tensor: max(-tensor.minimum, tensor.maximum))
        return [
            f"{'check':<20}{values}, all finite; the largest is in {widest.name}, "
            f"{widest.minimum:.4g} to {widest.maximum:.4g}"
        ]
    faults = [
        f"{'':<20}{tensor.name} {list(tensor.shape)}: {tensor.num_nan} NaN, {tensor.num_inf} infinite"
        for tensor in checked.faults
    ]
    return [f"{'check':<20}{values}; not finite in {len(checked.faults)} tensors:", *faults]
