"""The command line: ``pyengine-cli COMMAND``, also ``python -m pyengine COMMAND``.

Each command is a module of this package with a click command named ``command``, imported when it is
called for: the start of ``generate`` pays for nothing that another command needs. Results go to standard
output, everything else to standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_MOST_LINES = 10  # about prompts that failed; those with the same fault share one

_COMMANDS = {
    "generate": "Continue prompts.",
    "chat": "Talk to a model.",
    "score": "Log-probability and perplexity of texts; rank choices.",
    "tokenize": "Text to token ids, and back.",
    "train": "Train a model and its tokenizer from text, or finetune one.",
    "eval": "Perplexity of a checkpoint on texts, beside an n-gram model.",
    "bench": "Speed on fixed workloads, beside what the machine allows.",
    "quantize": "Write a checkpoint with int8 or int4 weights.",
    "inspect": "What a checkpoint is and what memory it needs.",
    "doctor": "Check this machine and this installation.",
}


class _LazyGroup(click.Group):
    """Commands by name, imported on use; errors of users become one line on standard error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Names alone: what "did you mean" compares with. get_command brings the commands themselves.
        self.commands = {name: click.Command(name) for name in _COMMANDS}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pyengine.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _occupy_closed_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # --help and --version write before a command is invoked
            _fail(error)

    def invoke(self, ctx: click.Context) -> object:
        try:
            if sys.stdout is None:
                raise OSError("standard output is closed: there is no place for results")
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            _discard_output()
            sys.exit(EXIT_BROKEN_PIPE)
        except Exception as error:
            _fail(error)


def _occupy_closed_streams() -> None:
    """Open what was closed for us (``>&-``), or a weight file would become standard output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("PYENGINE_DEBUG") == "1":
        raise error
    if isinstance(error, OSError):
        _discard_output()  # what could not be written now cannot be written later
    click.echo(_describe(error), err=True)
    sys.exit(EXIT_ERROR)


def _discard_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush has no pipe to fail on."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # not backed by a file descriptor: nothing to flush there
        pass


def _describe(error: Exception) -> str:
    from pyengine.errors import InternalError, PyEngineError

    if isinstance(error, PyEngineError) and error.outputs is not None:
        failed = [one.error for one in error.outputs if one.error is not None]
        lines = list({str(each.__cause__): f"pyengine: {each}" for each in reversed(failed)}.values())[::-1]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"pyengine: {len(lines) - _MOST_LINES} more prompts failed"]
        return "\n".join(lines)
    if isinstance(error, PyEngineError) and not isinstance(error, InternalError):
        return f"pyengine: {error}"
    if isinstance(error, OSError) and error.errno is None:
        return f"pyengine: {error}"
    if isinstance(error, OSError):
        return f"pyengine: {error.filename or 'input or output'}: {error.strerror or error}"
    if isinstance(error, ImportError):
        return f"pyengine: {error}: this installation is incomplete; install it again with pip"
    if isinstance(error, MemoryError):
        return "pyengine: out of memory; try --dtype bfloat16 or a smaller --kv-cache-memory"
    return (
        f"pyengine: internal error: {type(error).__name__}: {error}\n"
        "This is a bug in pyengine. PYENGINE_DEBUG=1 shows where it happened."
    )


_EPILOG = """\b
Examples:
  pyengine-cli generate "Once upon a time"
  pyengine-cli generate --model ./gpt2 --temperature 0 "Hello, my dog is cute"
  cat prompts.txt | pyengine-cli generate --file - --json > results.jsonl
  pyengine-cli chat --model ./DialoGPT-medium
  pyengine-cli score --choice " positive" --choice " negative" "I loved it. Sentiment:"
  pyengine-cli inspect --model ./gpt2

\b
Results go to standard output, progress and diagnostics to standard error.
Exit status: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted.
PYENGINE_DEBUG=1 adds the traceback to an error. PYENGINE_ISA chooses the instruction set (see doctor).
"""


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from pyengine import __version__

        click.echo(f"pyengine {__version__}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and leave.",
)
def main() -> None:
    """Run GPT-2 models on the CPU.

    Every command takes --model: a checkpoint directory in Hugging Face format, or a Hub id if
    huggingface_hub is installed. Without it the small bundled model is used.
    """
