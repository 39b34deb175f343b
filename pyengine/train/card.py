"""The model card: README.md of the directory that a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyengine.train.data import Dataset
from pyengine.train.files import write_atomically
from pyengine.train.loop import Progress
from pyengine.train.model import ModelConfig
from pyengine.train.options import TrainOptions, flag


def write_card(
    out: Path,
    options: TrainOptions,
    config: ModelConfig,
    num_parameters: int,
    dataset: Dataset,
    progress: Progress,
    rows: list[dict[str, Any]],
) -> None:
    name = out.resolve().name
    splits = dataset.manifest["splits"]
    changed = {
        k: v for k, v in options.to_dict().items() if k in options.given and k not in ("out", "resume")
    }
    lines = [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        f"# {name}",
        "",
        "A GPT-2 language model made by `pyengine-cli train`"
        + (f" from `{options.init_from}`" if options.init_from else "")
        + ". It loads in pyengine and in transformers:",
        "",
        "```sh",
        f"pyengine-cli generate --model {name}",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| layers, heads, channels | {config.n_layer}, {config.n_head}, {config.n_embd} |",
        f"| context | {config.n_positions} tokens |",
        f"| vocabulary | {config.vocab_size:,} tokens ({_tokenizer(options)}) |",
        f"| parameters | {num_parameters:,}, stored as {options.export_dtype} |",
        f"| training data | {_split(splits['train'])} |",
        f"| validation data | {_split(splits['val'])} |",
        f"| steps | {progress.step:,} of {options.steps:,}, each of "
        f"{options.batch_size * options.grad_accum} × {options.block_size} tokens |",
        f"| time | {progress.seconds / 60:.1f} minutes of updates |",
    ]
    if progress.best_step:
        lines.append(
            f"| validation loss | {progress.best_loss:.4f} nats per token, of step {progress.best_step:,} |"
        )
    lines += ["", "## Data", ""]
    for source in dataset.manifest["sources"]:
        lines.append(f"- {source['name']}: {source['bytes']:,} bytes, SHA-256 `{source['sha256'][:16]}…`")
    lines += ["", "## Options", "", "```json", json.dumps(changed, indent=2, ensure_ascii=False), "```"]
    lines += ["", f"All others were the defaults; {flag('seed')} was {options.seed}."]
    evaluated = [row for row in rows if "val_loss" in row]
    if evaluated:
        lines += ["", "## Losses", "", "| step | training | validation |", "|---|---|---|"]
        for row in evaluated[:: max(1, len(evaluated) // 20)]:
            lines.append(f"| {row['step']:,} | {row['train_loss']:.4f} | {row['val_loss']:.4f} |")
    if (out / "loss.png").is_file():
        lines += ["", "![Losses and learning rate](loss.png)"]
    text = "\n".join(lines) + "\n"
    write_atomically(out / "README.md", lambda file: file.write(text.encode("utf-8")))


def _split(counts: dict[str, Any]) -> str:
    return f"{counts['characters']:,} characters, {counts['tokens']:,} tokens" if counts["tokens"] else "none"


def _tokenizer(options: TrainOptions) -> str:
    if options.tokenizer == "sentencepiece":
        return f"SentencePiece {options.sentencepiece_type}"
    return {"char": "characters", "bpe": "byte-level BPE"}.get(
        options.tokenizer or "", "an existing tokenizer"
    )
