"""``pyengine-cli train``: from text to a checkpoint. The options are those of ``TrainOptions``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from pyengine.train.options import TrainOptions, field_types, flag, read_config_file

_EPILOG = """\b
Examples:
  pyengine-cli train --data shakespeare.txt --tokenizer char --out shakespeare
  pyengine-cli train --data 'books/*.txt' --vocab-size 4096 --preset mini --optimizer muon --out books
  pyengine-cli train --config run.toml --steps 5000 --resume auto
  pyengine-cli train --data letters.txt --init-from gpt2 --lora-rank 8 --lr 3e-4 --out letters
  pyengine-cli generate --model shakespeare "ROMEO:"

\b
--config names a TOML, YAML or JSON file with the same options (n_layer = 4); the command line goes first.
The directory --out holds the best checkpoint so far in Hugging Face's layout (generate, eval and transformers
load it), last/ with the last one, log.jsonl, samples.jsonl, loss.png, and state/ to resume from.
Several processes or machines: torchrun --nproc-per-node 2 -m pyengine.train OPTIONS.
Needs the extra "train": pip install 'pyengine[train]'.
"""


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A click option for each field, without a default: what is not given may be in the --config file."""
    kinds = field_types()
    for field in reversed(dataclasses.fields(TrainOptions)):
        kind, optional, many = kinds[field.name]
        meta = field.metadata
        text = meta["help"]
        if "[default" not in text and not many and field.default not in ("", None):
            shown = field.default
            if kind is bool:
                shown = field.name if field.default else f"no-{field.name}".replace("_", "-")
            text += f"  [default: {shown}]"
        name = flag(field.name)
        extra: dict[str, Any] = {}
        if kind is bool:
            name += f"/--no-{field.name.replace('_', '-')}"
        else:
            extra["type"] = click.Choice(meta["choices"]) if meta["choices"] else kind
            if meta["metavar"]:
                extra["metavar"] = meta["metavar"]
            elif not meta["choices"]:
                extra["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        function = click.option(
            name, field.name, default=None, multiple=many, help=text, show_default=False, **extra
        )(function)
    return function


@click.command(epilog=_EPILOG)
@click.option("--config", metavar="FILE", help="Options from a TOML, YAML or JSON file.")
@_options
@click.option("--quiet", "-q", is_flag=True, help="No progress on standard error.")
def command(config: str | None, quiet: bool, **values: Any) -> None:
    """Train a GPT-2 model and its tokenizer from text, or finetune one.

    Maximises the likelihood of the next token: the sum of log p(w_t | w_<t) over the data.
    """
    options = TrainOptions.from_values(values, read_config_file(config) if config else {})
    try:
        from pyengine.train.run import train
    except ImportError as error:
        raise click.ClickException(f"{error}: training needs torch: pip install 'pyengine[train]'") from None
    result = train(options, quiet=quiet)
    if result.exit_status:
        raise SystemExit(result.exit_status)
