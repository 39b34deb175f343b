"""``pyengine-cli eval``: perplexity of a checkpoint on texts, beside an n-gram model."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _options, _text

if TYPE_CHECKING:
    from pyengine.evaluation.perplexity import Likelihood
    from pyengine.train.corpus import Source

_EPILOG = """\b
Examples:
  pyengine-cli eval alice.txt
  pyengine-cli eval --model shakespeare 'heldout/*.txt' --ngram-order 7
  pyengine-cli eval --model gpt2 --stride 512 --ngram-data train.txt test.txt --json
  cat book.txt | pyengine-cli eval -

\b
Texts are files, globs, .jsonl files (a document per line), or - for standard input. Documents longer than the
context are scored in windows that advance by --stride tokens: with half the context, the default, every token
has at least half of it before it; a stride of the whole context but one is quickest and sees least.
The n-gram model (interpolated Kneser-Ney) is the baseline: it predicts the same tokens from the n - 1 before.
It learns from the tokens that the checkpoint was trained on, where they are still in the directory that
the train command wrote, or from --ngram-data.
"""


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.argument("texts", nargs=-1, required=True, metavar="TEXTS...")
@click.option("--text-field", default="text", metavar="NAME", help="Field of .jsonl objects with the text.")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens between windows.  [default: half the context]",
)
@click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="Score the first token of a document behind BOS.  [default: where the model has a BOS]",
)
@click.option(
    "--ngram-order",
    type=click.IntRange(min=0, max=12),
    default=5,
    metavar="N",
    help="Order of the n-gram model; 0: none.",
)
@click.option(
    "--ngram-data",
    multiple=True,
    metavar="PATH",
    help="Texts to train the n-gram model on; repeat for more.  [default: the run's own training tokens]",
)
@_options.engine
@_options.json_lines
@_options.quiet
def command(
    texts: tuple[str, ...],
    text_field: str,
    stride: int | None,
    add_bos: bool | None,
    ngram_order: int,
    ngram_data: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Perplexity, bits per character and bits per byte of a checkpoint on TEXTS."""
    from pyengine.evaluation.perplexity import Likelihood, evaluate, ngram_of_run, ngram_of_texts
    from pyengine.train.corpus import find_sources

    _text.prepare_output()
    with tempfile.TemporaryDirectory(prefix="pyengine-eval-") as spool:
        sources = find_sources(texts, text_field, Path(spool) / "input", "TEXTS")
        training = find_sources(ngram_data, text_field, Path(spool) / "ngram", "--ngram-data")
        llm = _options.open_llm(**engine)
        ngram = None
        if ngram_order and training:
            ngram = ngram_of_texts(llm.path, training, ngram_order, llm.config.vocab_size)
        elif ngram_order:
            ngram = ngram_of_run(llm.path, ngram_order, llm.config.vocab_size)
            if ngram is None and not quiet:
                _text.note("no n-gram model: give its training texts with --ngram-data")
        show = _Progress(sources, not quiet and sys.stderr.isatty())
        results = []
        for result in evaluate(
            llm, sources, stride=stride, add_bos=add_bos, ngram=ngram, progress=show.advance
        ):
            results.append(result)
            if as_json:
                show.clear()
                _text.print_json(_row(result, ngram_order))
        show.clear()
    if len(results) > 1:
        total = Likelihood("total")
        for result in results:
            total.add(result)
        results.append(total)
        if as_json:
            _text.print_json(_row(total, ngram_order))
    if not as_json:
        _print_table(results, ngram_order)


class _Progress:
    """One line on standard error with the part of the bytes that is done."""

    def __init__(self, sources: list[Source], shown: bool) -> None:
        self._total = sum(source.path.stat().st_size for source in sources) or 1
        self._done, self._shown = 0, shown

    def advance(self, characters: int) -> None:
        self._done += characters
        if self._shown:
            part = min(100, round(100 * self._done / self._total))
            click.echo(f"\rscoring {part:3d} %", err=True, nl=False)

    def clear(self) -> None:
        if self._shown:
            click.echo("\r             \r", err=True, nl=False)


def _row(result: Likelihood, order: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": result.name,
        "documents": result.documents,
        "tokens": result.tokens,
        "characters": result.characters,
        "bytes": result.num_bytes,
        **result.metrics(result.nats),
    }
    if result.ngram_nats is not None:
        row["ngram"] = {"order": order, **result.metrics(result.ngram_nats)}
    return row


def _print_table(results: list[Likelihood], order: int) -> None:
    width = max(len("text"), *(len(r.name) for r in results), len(f"{order}-gram"))
    click.echo(f"{'text':{width}}  {'tokens':>10}  {'perplexity':>11}  {'bits/char':>9}  {'bits/byte':>9}")
    for result in results:
        _print_line(result.name, result, result.nats, width)
        if result.ngram_nats is not None:
            _print_line(f"  {order}-gram", result, result.ngram_nats, width)
            less = 100 * (1 - result.nats / result.ngram_nats) if result.ngram_nats else 0.0
            click.echo(f"{'  fewer bits than it':{width}}  {'':>10}  {'':>11}  {less:8.1f}%")


def _print_line(name: str, result: Likelihood, nats: float, width: int) -> None:
    m = result.metrics(nats)
    click.echo(
        f"{name:{width}}  {result.tokens:10,}  {m['perplexity']:11.3f}  {m['bits_per_character']:9.4f}  "
        f"{m['bits_per_byte']:9.4f}"
    )
