"""``pyengine-cli generate``: continue prompts."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _options, _sampling, _text

if TYPE_CHECKING:
    from pyengine.decoding.params import SamplingParams
    from pyengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

Prompt = str | list[int] | None  # None: from BOS

_prompt_option = _options.in_section("Prompts")
_output_option = _options.in_section("Output")

_EPILOG = """\b
Examples:
  pyengine-cli generate "Once upon a time"
  pyengine-cli generate --model ./gpt2 --temperature 0 --max-length 100 "Hello, my dog is cute"
  pyengine-cli generate --temperature 0.7 --top-k 50 --seed 1 --n 3 "The old house"
  echo "It was a dark and stormy night" | pyengine-cli generate - > story.txt
  pyengine-cli generate --file prompts.txt --json > results.jsonl
  pyengine-cli generate --ids --json 15496,11,616,3290
  pyengine-cli generate --num-beams 4 --length-penalty 0.8 "The old house"
  pyengine-cli generate --min-p 0.05 --repetition-penalty 1.1 --stop "." --stop "!" "The old house"
  pyengine-cli generate --regex "[0-9]{4}-[0-9]{2}-[0-9]{2}" "The date is "
  pyengine-cli generate --speculative-method ngram --file prompts.txt

\b
Standard output: the new text (with --echo after the prompt); for several texts a line ==> NUMBER: PROMPT <==
before each; with --json a line for each continuation, with the fields prompt_index, index, prompt,
prompt_token_ids, text, token_ids, finish_reason ("stop", "length"; "abort" after Ctrl-C), stop_reason, seed,
score (of beams), logprobs and prompt_logprobs (if asked for), and metrics (seconds and token counts of the
prompt).
Standard error: a summary (tokens/s are new tokens over the whole time, that of the prompts included), and a
progress bar for several prompts on a terminal.

\b
--file takes one prompt per line, blank lines skipped. Files ending in .jsonl or .ndjson, and standard input
that begins with {, hold one JSON object per line with a "prompt": a string or a list of token ids (other
fields are not read).
What docs/decoding.md says about the fields of SamplingParams holds for the options of their names.
"""


@click.command(cls=_options.SectionedCommand, context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.argument("prompts", nargs=-1, metavar="[PROMPTS]...")
@_prompt_option(
    "--file", "-f", metavar="PATH", help="More prompts, one per line or JSON lines; - is standard input."
)
@_prompt_option(
    "--ids", is_flag=True, help="PROMPTS are token ids, e.g. 15496,11 (for models without a tokenizer)."
)
@_sampling.every_control
@_output_option("--echo", is_flag=True, help="Print the prompt in front of its continuation.")
@_output_option(
    "--stream/--no-stream",
    default=None,
    help="Print as it is generated, or when complete.  [default: stream one continuation without --json]",
)
@_options.json_lines
@_options.quiet
@_options.speculation
@_options.engine
def command(
    prompts: tuple[str, ...],
    file: str | None,
    ids: bool,
    echo: bool,
    stream: bool | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue each of PROMPTS; - is all of standard input, and without a prompt the model starts by itself.

    The text is chosen as the options say, where they do not as the checkpoint's generation_config.json says,
    else at temperature 1.
    """
    params = _sampling.take_params(options)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None and not as_json:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} needs --json: plain text has no place for numbers.")
    listed: list[Prompt] = list(_text.collect_prompts(prompts, file, ids)) or [None]
    single = len(listed) == 1 and params.n == params.num_beams == 1 and params.best_of in (None, 1)
    if stream and (as_json or not single):
        raise click.UsageError(
            "--stream prints one continuation as it grows: not with --json, --n, --best-of, --num-beams or "
            "more prompts."
        )
    _text.prepare_output()
    start = time.perf_counter()
    llm = _options.open_llm(**options)
    summary = _Summary(loaded=time.perf_counter() - start)
    try:
        if single and not as_json and stream is not False:
            _stream(llm, listed[0], params, echo, summary)
        else:
            _generate(
                llm, listed, params, _Printer(len(listed) * params.n > 1, as_json, echo), summary, quiet
            )
    except KeyboardInterrupt:
        summary.interrupted = True
        raise
    finally:
        if not quiet and summary.new_tokens:
            _text.note(summary.line())


class _Summary:
    """What the line on standard error says. The clock starts when the model is loaded."""

    def __init__(self, loaded: float) -> None:
        self.loaded = loaded  # seconds
        self.start = time.perf_counter()
        self.first_token: float | None = None  # seconds after the start
        self.prompt_tokens: int | None = None  # None: not known yet
        self.new_tokens = 0
        self.draft_tokens = self.accepted_tokens = 0
        self.interrupted = False

    def add(self, metrics: RequestMetrics) -> None:
        """A request has ended."""
        self.prompt_tokens = (self.prompt_tokens or 0) + metrics.prompt_tokens
        self.draft_tokens += metrics.draft_tokens
        self.accepted_tokens += metrics.accepted_tokens

    def line(self) -> str:
        seconds = time.perf_counter() - self.start
        prompt = "" if self.prompt_tokens is None else f"{self.prompt_tokens} prompt + "
        first = "" if self.first_token is None else f"first token {self.first_token * 1e3:.1f} ms, "
        guessed = ""
        if self.draft_tokens:
            guessed = f", {self.accepted_tokens} of {self.draft_tokens} guessed tokens were right"
        return (
            f"{'interrupted: ' if self.interrupted else ''}"
            f"{prompt}{self.new_tokens} new tokens, {first}"
            f"{self.new_tokens / seconds:.1f} tokens/s in {seconds:.2f} s (loading {self.loaded:.2f} s)"
            f"{guessed}"
        )


def _stream(llm: Any, prompt: Prompt, params: SamplingParams, echo: bool, summary: _Summary) -> None:
    """One continuation, printed as it grows."""
    deltas = llm.stream(prompt, params)
    if echo and prompt is not None:
        click.echo(_echoed(prompt, llm.tokenizer), nl=False)
    output: RequestOutput | None = None
    separator = "," if echo and prompt is not None else ""  # between token ids, where there is no tokenizer
    try:
        for delta in deltas:
            if summary.first_token is None:
                summary.first_token = time.perf_counter() - summary.start
            summary.new_tokens += len(delta.token_ids)
            if delta.text:
                click.echo(delta.text, nl=False)
            output = delta.output
            if delta.token_ids and llm.tokenizer is None:
                click.echo(separator + _ids_line(delta.token_ids), nl=False)
                separator = ","
    finally:
        click.echo()
    if output is not None:
        summary.add(output.metrics)


def _generate(
    llm: Any, prompts: list[Prompt], params: SamplingParams, printer: _Printer, summary: _Summary, quiet: bool
) -> None:
    """Every continuation, printed when it and those before it are complete."""
    bar = None
    if len(prompts) > 1 and not quiet and sys.stderr.isatty():
        from pyengine.cli._progress import ProgressBar

        bar = ProgressBar(len(prompts))

    def on_output(index: int, output: RequestOutput) -> None:
        summary.add(output.metrics)
        summary.new_tokens += output.metrics.new_tokens
        if output.metrics.ttft is not None and summary.first_token is None:
            summary.first_token = output.metrics.ttft
        if output.finished or output.metrics.new_tokens:
            with bar.hidden() if bar else nullcontext():
                printer.print(index, output, llm.tokenizer)

    with bar or nullcontext():
        llm.generate(prompts, params, progress=bar.advance if bar else False, on_output=on_output)


class _Printer:
    """Results on standard output: one text, several texts apart by headings, or JSON lines."""

    def __init__(self, several: bool, as_json: bool, echo: bool) -> None:
        self.several, self.as_json, self.echo = several, as_json, echo

    def print(self, index: int, output: RequestOutput, tokenizer: Any) -> None:
        for sample in output.outputs:
            if self.as_json:
                _text.print_json(_json_row(index, output, sample))
                continue
            if self.several:
                detail = f".{sample.index + 1}" if len(output.outputs) > 1 else ""
                prompt = output.prompt_token_ids if output.prompt is None else output.prompt
                click.echo(_text.heading(index + 1, prompt, detail))
            prompt = output.prompt_token_ids if output.prompt is None else output.prompt
            if tokenizer is None:
                click.echo(_ids_line((output.prompt_token_ids if self.echo else []) + sample.token_ids))
            else:
                click.echo((_echoed(prompt, tokenizer) if self.echo else "") + sample.text)


def _echoed(prompt: str | list[int], tokenizer: Any) -> str:
    """A prompt as text; its ids where there is no tokenizer."""
    if isinstance(prompt, str):
        return prompt
    return _ids_line(prompt) if tokenizer is None else tokenizer.decode(prompt)


def _ids_line(token_ids: list[int]) -> str:
    return ",".join(map(str, token_ids))


def _json_row(prompt_index: int, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_index": prompt_index,
        "index": sample.index,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "seed": sample.seed,
        "metrics": vars(output.metrics),
    }
    if sample.score is not None:
        row["score"] = sample.score
    if output.prompt_logprobs is not None:
        row["prompt_logprobs"] = [
            None if entry is None else _json_logprobs(token, entry)
            for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        ]
    if sample.logprobs is not None:
        row["cumulative_logprob"] = sample.cumulative_logprob
        row["logprobs"] = [
            _json_logprobs(chosen, entry)
            for chosen, entry in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
    return row


def _json_logprobs(chosen: int, entry: dict[int, Logprob]) -> dict[str, Any]:
    """``entry``: the chosen token and the n best; a chosen one that is not among the n best has no rank."""
    top = [
        {"token_id": token, "token": value.decoded_token, "logprob": value.logprob}
        for token, value in entry.items()
        if value.rank is not None
    ]
    return {
        "token_id": chosen,
        "token": entry[chosen].decoded_token,
        "logprob": entry[chosen].logprob,
        "top": top,
    }
