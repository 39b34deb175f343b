"""Options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pyengine.cli import _text

Function = TypeVar("Function", bound=Callable[..., Any])

CONTEXT_SETTINGS = {"show_default": True}

model = click.option(
    "--model",
    "-m",
    metavar="PATH|ID",
    help="Checkpoint directory or Hub id.  [default: the bundled model]",
)
device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    help="Where to compute; auto: on the GPU, if there is one that can be used.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Compute in this type; auto: bfloat16 for bfloat16 files, else float32. float16: only on CUDA, and "
    "there auto for float16 files.",
)
quantization = click.option(
    "--quantization",
    type=click.Choice(["int8", "int4"]),
    help="Quantise the weights while loading.  [default: as the checkpoint stores them]",
)
kv_cache_dtype = click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    help="Store keys and values in this type; auto: as --dtype, or bfloat16 with quantised weights; "
    "int8: a quarter of float32's memory, "
    "with a scale per token and head.",
)
kv_cache_memory = click.option(
    "--kv-cache-memory",
    metavar="SIZE",
    help='Memory for keys and values, e.g. "512MiB", taken as it is used.  '
    "[default: 64 full contexts, but at most 25% of the available memory]",
)
max_model_len = click.option(
    "--max-model-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Shorten the context to N tokens.  [default: the model's]",
)
threads = click.option(
    "--threads",
    "-t",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker threads; results do not depend on it.  [default: the processors this process may use]",
)
quiet = click.option("--quiet", "-q", is_flag=True, help="No summary and no progress on standard error.")
json_lines = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")

_ENGINE = (model, device, dtype, quantization, kv_cache_dtype, kv_cache_memory, max_model_len, threads)


def engine(function: Function) -> Function:
    """Every option that ``open_llm`` takes."""
    for option in reversed(_ENGINE):
        function = option(function)
    return function


def open_llm(
    *,
    model: str | None,
    device: str,
    dtype: str,
    quantization: str | None,
    kv_cache_dtype: str,
    kv_cache_memory: str | None,
    max_model_len: int | None,
    threads: int | None,
    **settings: Any,
) -> Any:
    """The ``LLM`` that the options of ``engine`` ask for; ``settings`` are passed on as they are."""
    import pyengine

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        llm = pyengine.LLM(
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=kv_cache_memory,
            max_model_len=max_model_len,
            num_threads=threads,
            **settings,
        )
    for warning in caught:
        _text.note(f"warning: {warning.message}")
    if threads is not None:
        from pyengine import _C

        usable = _C.default_num_threads()
        if threads > usable:
            _text.note(f"warning: {threads} threads on {usable} processors are slower than {usable}")
    return llm
