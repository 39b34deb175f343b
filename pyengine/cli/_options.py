"""Options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pyengine.cli import _text

Function = TypeVar("Function", bound=Callable[..., Any])

CONTEXT_SETTINGS = {"show_default": True}


class SectionedOption(click.Option):
    """An option that ``--help`` shows under a heading."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """Its ``--help`` sets options apart by their headings, in the order in which these come first; options
    without one are at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        others = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is None:
                continue
            if isinstance(parameter, SectionedOption):
                sections.setdefault(parameter.section, []).append(record)
            else:
                others.append(record)
        for heading, records in {**sections, "Other options" if sections else "Options": others}.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def in_section(section: str) -> Callable[..., Callable[[Function], Function]]:
    """``click.option`` whose options belong to a section."""

    def option(*names: str, **settings: Any) -> Callable[[Function], Function]:
        return click.option(*names, cls=SectionedOption, section=section, **settings)

    return option


_model_option = in_section("Model and machine")

model = _model_option(
    "--model",
    "-m",
    metavar="PATH|ID",
    help="Checkpoint directory or Hub id.  [default: the bundled model]",
)
device = _model_option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="cpu",
    help="Where to compute; auto: on the GPU, if there is one that can be used.",
)
dtype = _model_option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Compute in this type; auto: bfloat16 for bfloat16 files, else float32. float16: only on CUDA, and "
    "there auto for float16 files and quantised weights.",
)
quantization = _model_option(
    "--quantization",
    type=click.Choice(["int8", "int4"]),
    help="Quantise the weights while loading.  [default: as the checkpoint stores them]",
)
kv_cache_dtype = _model_option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    help="Store keys and values in this type; auto: as --dtype; on the CPU bfloat16 with quantised weights; "
    "int8: a quarter of float32's memory, with a scale per token and head.",
)
kv_cache_memory = _model_option(
    "--kv-cache-memory",
    metavar="SIZE",
    help='Memory for keys and values, e.g. "512MiB", taken as it is used.  '
    "[default: 64 full contexts, but at most 25% of the available memory]",
)
max_model_len = _model_option(
    "--max-model-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Shorten the context to N tokens.  [default: the model's]",
)
threads = _model_option(
    "--threads",
    "-t",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker threads; results do not depend on it.  [default: the processors this process may use]",
)
_output_option = in_section("Output")
quiet = _output_option("--quiet", "-q", is_flag=True, help="No summary and no progress on standard error.")
json_lines = _output_option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")

_speculation_option = in_section("Speculation (guess ahead: faster, the text stays the same)")
_SPECULATION = (
    _speculation_option(
        "--speculative-config",
        metavar="JSON",
        help='As in vLLM and LLM(speculative_config=...), e.g. \'{"method": "suffix"}\'.',
    ),
    _speculation_option(
        "--speculative-method",
        type=click.Choice(["ngram", "suffix", "draft_model"]),
        help="Guess what followed the same tokens in this text (ngram) or in any so far (suffix), or ask a "
        "smaller model.",
    ),
    _speculation_option(
        "--speculative-model",
        "--draft-model",
        "--assistant-model",
        "speculative_model",
        metavar="PATH|ID",
        help="A smaller checkpoint with the same tokenizer guesses.",
    ),
    _speculation_option(
        "--num-speculative-tokens",
        "--num-assistant-tokens",
        "num_speculative_tokens",
        type=int,
        metavar="N",
        help="Guess N tokens at most.  [default: 15; 5 with a model]",
    ),
)

SPECULATION_FIELDS = (
    "speculative_config",
    "speculative_method",
    "speculative_model",
    "num_speculative_tokens",
)
_ENGINE = (model, device, dtype, quantization, kv_cache_dtype, kv_cache_memory, max_model_len, threads)


def engine(function: Function) -> Function:
    """Every option that ``open_llm`` takes."""
    for option in reversed(_ENGINE):
        function = option(function)
    return function


def speculation(function: Function) -> Function:
    """Options that guess ahead; ``open_llm`` takes them, too."""
    for option in reversed(_SPECULATION):
        function = option(function)
    return function


def _speculative_config(config: str | None, **fields: Any) -> dict[str, Any] | None:
    """``LLM``'s ``speculative_config`` of the options of ``speculation``; None: none was given."""
    values: dict[str, Any] = {}
    if config is not None:
        import json

        try:
            values = json.loads(config)
        except ValueError as error:
            raise click.UsageError(f"--speculative-config: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise click.UsageError('--speculative-config: an object is expected, like {"method": "ngram"}')
    for name, value in fields.items():
        if value is not None and values.setdefault(name, value) != value:
            raise click.UsageError(
                f"--speculative-config says {name}={values[name]!r}, an option of its own {value!r}: "
                "give one of the two"
            )
    if values and "method" not in values and "model" not in values:
        raise click.UsageError("Speculation needs --speculative-method or --speculative-model.")
    return values or None


def speculative_method(options: dict[str, Any]) -> str:
    """Which method the options of ``speculation`` choose, where they choose one."""
    config, method, model, number = (options[name] for name in SPECULATION_FIELDS)
    values = _speculative_config(config, method=method, model=model, num_speculative_tokens=number) or {}
    return str(values.get("method", "draft_model"))


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
    speculative_config: str | None = None,
    speculative_method: str | None = None,
    speculative_model: str | None = None,
    num_speculative_tokens: int | None = None,
    **settings: Any,
) -> Any:
    """The ``LLM`` that the options of ``engine`` and ``speculation`` ask for; ``settings`` are passed on as
    they are. Wrong usage of them is found before anything is loaded."""
    speculative = _speculative_config(
        speculative_config,
        method=speculative_method,
        model=speculative_model,
        num_speculative_tokens=num_speculative_tokens,
    )
    if speculative is not None:
        settings["speculative_config"] = speculative
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
