"""``pyengine-cli bench``: tokens per second on fixed workloads, beside what the machine allows."""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _options, _text

if TYPE_CHECKING:
    from pyengine.bench.workloads import Workload

_EPILOG = """\b
Examples:
  pyengine-cli bench --model ./gpt2
  pyengine-cli bench --model ./gpt2 --workload decode,batch --repeats 9 --threads 2 --json
  pyengine-cli bench --model ./gpt2 --prompt-tokens 16,960 --new-tokens 32
  pyengine-cli bench --model ./gpt2 --prompt-tokens 64 --new-tokens 64 --batch 1,4,16,64
  pyengine-cli bench --model ./gpt2 --workload decode --profile
  pyengine-cli bench --model ./gpt2 --replay program.py --speculative-method suffix

\b
Workloads, all greedy with fixed token ids and without the prefix cache:
  decode   1 sequence, 16 prompt tokens, 128 new ones: new tokens per second after the first
  prefill  1 sequence, 512 prompt tokens, 1 new one: prompt tokens per second
  batch    32 sequences, 64 prompt tokens and 64 new ones each: new tokens per second over the whole call
  mixed    64 sequences, 8 to 512 prompt tokens and 8 to 256 new ones each: as batch
An own workload of one sequence is timed as decode, of one new token as prefill, any other as batch.
GB/s and GFLOP/s are what the workload cannot avoid (each weight, key and value read once a step; a
multiply-add is two operations), divided by its time; their limits are measured in the same run.

\b
--replay FILE measures speculation on a text (UTF-8; -: standard input). Its first --prompt-tokens [16] are
the prompt; the next --new-tokens [as many as there are and fit] come whatever the model says, and a draft is
right if it is what comes. The model does all its work, and the drafters see no more than what has come.
With and without speculation take turns; tokens per second are those after the first new token.
"""


def _counts(_ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Whole numbers above 0, separated by commas."""
    if text is None:
        return None
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise click.BadParameter(f"{text!r}: whole numbers of at least 1 are expected, like 16 or 16,64.")
    return counts


def _names(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> list[str] | None:
    from pyengine.bench.workloads import NAMES

    if text is None:
        return None
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise click.BadParameter(f"{name!r} does not exist; there are {', '.join(NAMES)}.")
    return names


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.option(
    "--workload",
    "names",
    metavar="NAMES",
    callback=_names,
    help="Of decode, prefill, batch and mixed, separated by commas.  [default: all four]",
)
@click.option(
    "--prompt-tokens", metavar="N,...", callback=_counts, help="An own workload: prompt tokens of a sequence."
)
@click.option("--new-tokens", metavar="N,...", callback=_counts, help="... new tokens of a sequence.")
@click.option("--batch", metavar="N,...", callback=_counts, help="... sequences at once.  [default: 1]")
@click.option("--repeats", "-r", type=click.IntRange(min=1), default=5, help="Timed runs of each workload.")
@click.option("--profile", is_flag=True, help="Also: where the time of one more run goes, by part of a step.")
@click.option(
    "--replay",
    "replay_file",
    metavar="FILE",
    help="Instead: speed with and without speculation (ngram, or --speculative-...) on this text.",
)
@_options.engine
@_options.speculation
@_options.json_lines
def command(
    names: list[str] | None,
    prompt_tokens: list[int] | None,
    new_tokens: list[int] | None,
    batch: list[int] | None,
    repeats: int,
    profile: bool,
    replay_file: str | None,
    as_json: bool,
    **engine: Any,
) -> None:
    """Tokens per second of a model on this machine.

    Several numbers in --prompt-tokens, --new-tokens or --batch make a workload of each combination. The
    workloads take turns, so that all of them meet the same machine.
    """
    speculation = {name: engine.pop(name) for name in _options.SPECULATION_FIELDS}
    if replay_file is not None:
        if names is not None or batch is not None or profile:
            raise click.UsageError("--replay runs alone: without --workload, --batch and --profile.")
        if max(len(prompt_tokens or [0]), len(new_tokens or [0])) > 1:
            raise click.UsageError("--replay takes one --prompt-tokens and one --new-tokens.")
        if not any(speculation.values()):
            speculation["speculative_method"] = "ngram"
        size = tuple(None if given is None else given[0] for given in (prompt_tokens, new_tokens))
        _replay(replay_file, size, repeats, as_json, engine | speculation)
        return
    if any(value is not None for value in speculation.values()):
        raise click.UsageError("Speculation is measured on a text: --speculative-... needs --replay FILE.")
    if (prompt_tokens is None) != (new_tokens is None):
        raise click.UsageError("An own workload needs both --prompt-tokens and --new-tokens.")
    if profile and engine["device"] != "cpu":
        raise click.UsageError("--profile needs --device cpu: on CUDA the parts of a step are not timed.")
    if batch is not None and prompt_tokens is None:
        raise click.UsageError("--batch belongs to an own workload: give --prompt-tokens and --new-tokens.")
    sizes = list(itertools.product(batch or [1], prompt_tokens or [], new_tokens or []))
    if names is None and not sizes:
        from pyengine.bench.workloads import NAMES

        names = list(NAMES)

    from pyengine.bench import limits, measure
    from pyengine.bench.profile import context_of

    _text.prepare_output()
    start = time.perf_counter()
    llm = _options.open_llm(enable_prefix_caching=False, max_num_seqs=max([64, *(batch or [])]), **engine)
    load_s = time.perf_counter() - start
    workloads = _workloads(names or [], sizes, llm.config.vocab_size)
    progress = _show_progress if sys.stderr.isatty() else lambda _: None
    results = measure.measure(llm, workloads, repeats, progress)
    limit = None
    if llm.device == "cpu":
        progress("limits of the machine")
        limit = limits.measure(context_of(llm))
    progress("")

    rows = []
    for result in results:
        row = measure.as_row(result, llm, load_s, limit)
        if profile and limit is not None:
            row["profile"] = measure.profile_rows(result, row["dtype"], limit)
        if as_json:
            _text.print_json(row)
        rows.append(row)
    if not as_json:
        from pyengine.cli import _bench_tables

        where = context_of(llm).isa if llm.device == "cpu" else llm.device
        _bench_tables.show(rows, f"{llm.path.name}, {where}")


def _replay(
    file: str, size: tuple[int | None, ...], repeats: int, as_json: bool, engine: dict[str, Any]
) -> None:
    text = _text.read_text(file)  # before the model: a wrong name is told at once
    from pyengine.bench import replay

    _text.prepare_output()
    start = time.perf_counter()
    llm = _options.open_llm(enable_prefix_caching=False, max_num_seqs=1, **engine)
    load_s = time.perf_counter() - start
    source = "standard input" if file == _text.STANDARD_INPUT else file
    prompt_tokens, new_tokens = size
    found = replay.of_text(llm, text, prompt_tokens, new_tokens, source)
    progress = _show_progress if sys.stderr.isatty() else lambda _: None
    replay.measure(llm, found, repeats, progress)
    progress("")
    row = replay.as_row(found, llm, _options.speculative_method(engine), source, load_s)
    if as_json:
        _text.print_json(row)
    else:
        from pyengine.cli import _bench_tables

        _bench_tables.show_replay(row, llm.path.name)


def _workloads(names: list[str], sizes: list[tuple[int, int, int]], vocab_size: int) -> list[Workload]:
    from pyengine.bench import workloads

    own = [workloads.of_size(*size, vocab_size) for size in sizes]
    return [workloads.named(name, vocab_size) for name in names] + own


def _show_progress(text: str) -> None:
    click.echo(f"\r\033[K{text}", nl=False, err=True)
