"""``pyengine-cli score``: log-probabilities of texts, and of choices given a text."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _options, _text

if TYPE_CHECKING:
    from pyengine.model.tokenizer import Tokenizer
    from pyengine.outputs import Choice, ScoreOutput

_EPILOG = """\b
Examples:
  pyengine-cli score "The quick brown fox jumps over the lazy dog."
  pyengine-cli score --continuation " Paris" "The capital of France is"
  pyengine-cli score --choice " positive" --choice " negative" "I loved it. Sentiment:"
  pyengine-cli score - < book.txt | tail -n 1
  pyengine-cli score --file sentences.txt --json | jq .perplexity

\b
Standard output: a row for each token (position, id, natural logarithm of its probability, the probability,
its piece; with --top-logprobs the best tokens there), then a line of totals. With --choice: the choices,
likeliest first.
A text longer than the context is scored in overlapping windows. The first token of a text follows nothing
and has no probability unless the tokenizer, or --add-bos, puts a token in front.
Standard error: a progress bar for several texts, or a long one, on a terminal.
"""
_LONG = 10_000  # characters (or token ids) of a text that takes a while


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.argument("texts", nargs=-1, metavar="[TEXTS]...")
@click.option(
    "--file", "-f", metavar="PATH", help="Texts from a file, one per line or JSON lines; - is standard input."
)
@click.option("--continuation", metavar="TEXT", help="Score this text as what follows each of TEXTS.")
@click.option(
    "--choice", "choices", multiple=True, metavar="TEXT", help="Rank continuations; give two or more."
)
@click.option("--ids", is_flag=True, help="TEXTS, continuation and choices are token ids, e.g. 15496,11.")
@click.option("--add-bos", is_flag=True, help="Put the model's BOS token in front of each text.")
@click.option(
    "--top-logprobs", type=int, default=0, metavar="N", help="Show the N best tokens at each place, too."
)
@click.option(
    "--stride",
    type=int,
    metavar="N",
    help="How far apart the windows of texts are that the context does not hold.  [default: half of it]",
)
@_options.engine
@_options.json_lines
@_options.quiet
def command(
    texts: tuple[str, ...],
    file: str | None,
    continuation: str | None,
    choices: tuple[str, ...],
    ids: bool,
    add_bos: bool,
    top_logprobs: int,
    stride: int | None,
    as_json: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Log-probability of every token of TEXTS, and their perplexity.

    A text of - is all of standard input. How likely a continuation or a choice is depends on its first
    character: after a word, begin it with a space.
    """
    if continuation is not None and choices:
        raise click.UsageError("--continuation scores one text, --choice ranks several: give one of the two.")
    if len(choices) == 1:
        raise click.UsageError("--choice: at least two choices are needed to rank them.")
    if choices and (top_logprobs or stride is not None):
        raise click.UsageError("--choice ranks choices: --top-logprobs and --stride are for texts.")
    prompts = _text.collect_prompts(texts, file, ids)
    if not prompts:
        raise click.UsageError("Nothing to score: give TEXTS, --file, or - for standard input.")
    parse = _text.parse_ids if ids else str
    if continuation is not None:
        continuation = _text.argument(continuation, "--continuation")
    choices = tuple(_text.argument(choice, f"--choice {number}") for number, choice in enumerate(choices, 1))
    _text.prepare_output()
    llm = _options.open_llm(**engine)
    bar = None
    if not quiet and sys.stderr.isatty() and (len(prompts) > 1 or len(prompts[0]) > _LONG):
        from pyengine.cli._progress import ProgressBar

        bar = ProgressBar(len(prompts), "texts")

    def show(index: int, result: dict[str, Any], lines: list[str]) -> None:
        with bar.hidden() if bar else nullcontext():
            if as_json:
                _text.print_json({"text": prompts[index], **result})
                return
            if len(prompts) > 1:
                click.echo(_text.heading(index + 1, prompts[index]))
            for line in lines:
                click.echo(line)

    def show_score(index: int, score: ScoreOutput) -> None:
        show(index, _score_row(score, continuation), _score_lines(score, llm.tokenizer))

    with bar or nullcontext():
        if choices:
            num_scored = 0
            for index, prompt in enumerate(prompts):
                with _text.naming("text", index + 1, len(prompts)):
                    ranked = llm.choose(prompt, [parse(choice) for choice in choices], add_bos=add_bos)
                rows = [_choice_row(choice) for choice in ranked]
                show(index, {"choices": rows}, _choice_lines(rows))
                num_scored += sum(choice.score.num_scored for choice in ranked)
                if bar:
                    bar.advance(index + 1, len(prompts), num_scored)
        else:
            following = None if continuation is None else [parse(continuation)] * len(prompts)
            progress = bar.advance if bar else False
            llm.score(
                prompts,
                following,
                add_bos=add_bos,
                stride=stride,
                top_logprobs=top_logprobs,
                progress=progress,
                on_output=show_score,
            )


def _score_row(score: ScoreOutput, continuation: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "continuation": continuation,
        "token_ids": score.token_ids,
        "tokens": score.tokens,
        "logprobs": score.logprobs,
        "total_logprob": score.total_logprob,
        "num_scored": score.num_scored,
        "perplexity": score.perplexity if score.num_scored else None,
        "bits_per_character": score.bits_per_character,
    }
    if score.top_logprobs is not None:
        row["top_logprobs"] = [
            None if best is None else [{"token": one.decoded_token, "logprob": one.logprob} for one in best]
            for best in score.top_logprobs
        ]
    return row


def _score_lines(score: ScoreOutput, tokenizer: Tokenizer | None) -> list[str]:
    lines = [f"{'position':>8}  {'id':>6}  {'logprob':>9}  {'prob':>8}  token"]
    for index, (token, logprob) in enumerate(zip(score.token_ids, score.logprobs, strict=True)):
        value = f"{'-':>9}  {'-':>8}" if logprob is None else f"{logprob:9.4f}  {math.exp(logprob):8.2%}"
        shown = _text.quote(tokenizer.readable_piece(token)) if tokenizer else "-"
        best = (score.top_logprobs or [None] * (index + 1))[index] or ()
        others = "  ".join(f"{_text.quote(one.decoded_token)} {math.exp(one.logprob):.2%}" for one in best)
        shown += others and f"   best: {others}"
        lines.append(f"{score.num_context_tokens + index:8d}  {token:6d}  {value}  {shown}")
    totals = f"tokens {score.num_scored}   log-probability {score.total_logprob:.4f}"
    if score.num_scored:
        totals += f"   perplexity {score.perplexity:.6g}"
    if score.bits_per_character is not None:
        totals += f"   bits per character {score.bits_per_character:.4f}"
    return [*lines, totals]


def _choice_row(choice: Choice) -> dict[str, Any]:
    return {
        "text": choice.text,
        "token_ids": choice.score.token_ids,
        "index": choice.index,
        "logprob": choice.logprob,
        "probability": choice.probability,
    }


def _choice_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'prob':>8}  {'logprob':>9}  choice"]
    for row in rows:
        shown = _text.quote(row["token_ids"] if row["text"] is None else row["text"])
        lines.append(f"{row['probability']:8.2%}  {row['logprob']:9.4f}  {shown}")
    return lines
