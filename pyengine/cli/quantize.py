"""``pyengine-cli quantize``: a checkpoint with int8 or int4 weights, for quick starts and small files."""

from __future__ import annotations

import click

from pyengine.cli import _options, _text

_EPILOG = """\b
Examples:
  pyengine-cli quantize ./gpt2 ./gpt2-int8 --quantization int8
  pyengine-cli generate --model ./gpt2-int8 "Once upon a time"

\b
The same weights as --quantization gives on any command, bit for bit, but quantised once: the new
checkpoint is mapped into memory and ready at once. Only pyengine reads it.
docs/quantization.md has the formulas and the accuracy.
"""


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT", type=click.Path(path_type=str))
@click.option(
    "--quantization",
    type=click.Choice(["int8", "int4"]),
    default="int8",
    help="Bits of a weight.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a checkpoint.")
@_options.threads
@_options.quiet
def command(
    source: str, output: str, quantization: str, overwrite: bool, threads: int | None, quiet: bool
) -> None:
    """Quantise the checkpoint IN (a directory or a Hub id) and write it to the directory OUT."""
    from pyengine.model.checkpoint import load_checkpoint
    from pyengine.model.quantize import write_quantized

    _text.prepare_output()
    checkpoint = load_checkpoint(source)
    nbytes = write_quantized(checkpoint, output, quantization, overwrite=overwrite, num_threads=threads)
    if not quiet:
        size = _text.binary_size
        _text.note(
            f"{output}: {quantization} weights, {size(nbytes)} "
            f"({checkpoint.dtype}: {size(checkpoint.nbytes)})"
        )
