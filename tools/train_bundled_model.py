#!/usr/bin/env python3
"""Train the bundled model with ``pyengine-cli train``, and measure it on the held-out books.

    python tools/train_bundled_model.py ../shared/data --work runs/bundled

The directory given first holds ``*.txt`` and ``gutenberg/*.txt``. One command writes the corpus (passages of
the books, as JSON lines), trains or goes on with the training, copies the best checkpoint to ``--out``, and
evaluates it beside a 5-gram model of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HELD_OUT = ("austen-persuasion", "carroll-alice", "burgess-busterbrown")
MAX_BYTES = 12_000_000  # of the whole directory, so that the package stays small
PASSAGE_CHARS = 8000  # a book is cut at blank lines into passages; the model learns to open one after BOS
VALIDATION_EVERY = 50  # every 50th passage is for validation, 2 % of the text
ROOT = Path(__file__).resolve().parent.parent
FILES = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"

# 6 x 256 with 4096 tokens fills the 12 MB with float16 weights.
OPTIONS = """
--tokenizer bpe --vocab-size 4096 --n-layer 6 --n-head 4 --n-embd 256 --block-size 512
--batch-size 8 --optimizer muon --lr 0.007 --min-lr 0 --schedule wsd --decay-fraction 0.55
--warmup-steps 100 --beta2 0.95 --dropout 0.1 --dtype bfloat16 --eval-every 500 --save-every 100
--export-dtype float16 --resume auto
""".split()


def read_text(file: Path) -> str:
    """UTF-8, or Latin-1 where a file is not (some of the Gutenberg texts)."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n")


def cut_into_passages(text: str) -> list[str]:
    """Pieces of at least PASSAGE_CHARS (the last may be shorter), cut at blank lines; together the text."""
    passages, passage = [], ""
    for paragraph in text.strip().split("\n\n"):
        passage += ("\n\n" if passage else "") + paragraph.strip("\n")
        if len(passage) >= PASSAGE_CHARS:
            passages.append(passage)
            passage = ""
    return [*passages, passage] if passage else passages


def write_json_lines(file: Path, texts: Iterable[str]) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if not file.is_file() or file.read_text(encoding="utf-8") != content:
        file.write_text(content, encoding="utf-8")


def pyengine_cli(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pyengine", *map(str, arguments)], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="directory with *.txt and gutenberg/*.txt")
    parser.add_argument("--work", type=Path, default=Path("runs/bundled"), help="corpus, run and its state")
    parser.add_argument("--out", type=Path, default=ROOT / "pyengine/assets/gutenberg-gpt2")
    parser.add_argument("--steps", type=int, default=6500, help="of 4,096 tokens each [%(default)s]")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    files = sorted(args.data.glob("*.txt")) + sorted((args.data / "gutenberg").glob("*.txt"))
    books = {file.stem: read_text(file) for file in files}
    held_out = {name: books.pop(name) for name in HELD_OUT}
    passages = [passage for text in books.values() for passage in cut_into_passages(text)]
    write_json_lines(work / "train.jsonl", (p for i, p in enumerate(passages) if i % VALIDATION_EVERY))
    write_json_lines(work / "val.jsonl", passages[::VALIDATION_EVERY])
    for name, text in held_out.items():
        (work / f"{name}.txt").write_text(text, encoding="utf-8")

    run = work / "run"
    sources = ("--data", work / "train.jsonl", "--val-data", work / "val.jsonl", "--out", run)
    pyengine_cli("train", *sources, *OPTIONS, "--steps", args.steps)
    size = sum((run / name).stat().st_size for name in FILES.split())
    if size > MAX_BYTES:
        raise SystemExit(f"{run} takes {size} bytes, more than {MAX_BYTES}: make the model smaller")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES.split(), "special_tokens_map.json"):
        shutil.copyfile(run / name, args.out / name)
    defaults = json.loads((run / "generation_config.json").read_text()) | {"temperature": 0.8}
    (args.out / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
    pyengine_cli("eval", "--model", run, *(work / f"{name}.txt" for name in HELD_OUT), "--ngram-order", 5)


if __name__ == "__main__":
    main()
