#!/usr/bin/env python3
"""Train the model that comes with the package, from plain text to a Hugging Face directory.

    python tools/train_bundled_model.py ../shared/data --out pyengine/assets/gutenberg-gpt2

One command does it all: trains a byte-level BPE tokenizer, then the model (bfloat16 autocast, Muon for the
matrices inside the blocks and AdamW for the rest), exports it every few minutes, and in the end measures
bits per character on the held-out books. It stops when --minutes have passed, counted as processor
time over threads: the wall time on an otherwise idle machine, whatever else runs on this one. The learning
rate follows the larger of time used and steps done, so that a slow machine ends with a finished schedule,
too. A run that was interrupted goes on where it was (its state lies in --work); the batches and the dropout
of a step depend on the seed and the step alone. docs/bundled-model.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning at barriers ruins a run on a shared machine

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyengine.train.model import GPT2, ModelConfig  # noqa: E402

HELD_OUT = ("austen-persuasion", "carroll-alice", "burgess-busterbrown")
END_OF_TEXT = "<|endoftext|>"
MAX_BYTES = 12_000_000  # of the whole directory, so that the package stays small
PASSAGE_CHARS = 8000  # a book is cut at blank lines into passages; the model learns to open one after BOS
VALIDATION_EVERY = 50  # every 50th passage is for validation, 2 % of the text

# 6 x 256 fills the 12 MB with float16 weights. The vocabulary takes what the layers leave.
CONFIG = ModelConfig(
    vocab_size=4096, n_positions=512, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0
)


def read_text(file: Path) -> str:
    """UTF-8, or Latin-1 where a file is not (some of the Gutenberg texts)."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return data.decode("latin-1").replace("\r\n", "\n")


def read_books(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """All texts under ``data`` by name: those to train on, and the held-out ones."""
    files = sorted(data.glob("*.txt")) + sorted((data / "gutenberg").glob("*.txt"))
    books = {file.stem: read_text(file) for file in files}
    held_out = {name: books.pop(name) for name in HELD_OUT}
    return books, held_out


def cut_into_passages(text: str) -> list[str]:
    """Pieces of at least PASSAGE_CHARS (the last may be shorter), cut at blank lines; together the text."""
    passages, passage = [], ""
    for paragraph in text.strip().split("\n\n"):
        passage += ("\n\n" if passage else "") + paragraph.strip("\n")
        if len(passage) >= PASSAGE_CHARS:
            passages.append(passage)
            passage = ""
    return [*passages, passage] if passage else passages


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, with <|endoftext|> as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, passages: Sequence[str]) -> Tensor:
    """One stream (N,) int64: <|endoftext|> and the tokens of each passage."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(list(passages)):
        stream += [CONFIG.bos_token_id or 0, *encoding.ids]
    return torch.tensor(stream)


def batch_of_step(stream: Tensor, step: int, args: argparse.Namespace) -> Tensor:
    """Windows (B, T + 1) of step ``step``: each epoch takes all windows once, in its own order."""
    size = args.context + 1
    per_epoch = (len(stream) - size) // args.context // args.batch
    epoch, index = divmod(step, per_epoch)
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    offset = int(torch.randint(args.context, (1,), generator=rng))
    order = torch.randperm((len(stream) - offset - 1) // args.context, generator=rng)
    starts = order[index * args.batch : (index + 1) * args.batch] * args.context + offset
    return torch.stack([stream[s : s + size] for s in starts.tolist()])


def mean_loss(model: GPT2, stream: Tensor, context: int) -> float:
    """Mean nats per token over non-overlapping windows of a stream, in float32."""
    model.eval()
    windows = stream[: (len(stream) - 1) // context * context + 1]
    ids, targets = windows[:-1].view(-1, context), windows[1:].view(-1, context)
    with torch.no_grad():
        parts = [
            float(model(i, t)) * len(i)
            for i, t in zip(torch.split(ids, 8), torch.split(targets, 8), strict=True)
        ]
    model.train()
    return sum(parts) / len(ids)


@torch.no_grad()
def bits_per_character(model: GPT2, tokenizer: Tokenizer, text: str, stride: int) -> float:
    """Bits per character of ``text`` after BOS, every token counted once.

    Windows of the whole context advance by ``stride`` tokens and count the tokens the window before has
    not; stride = context means non-overlapping windows.
    """
    context = model.config.n_positions
    ids = torch.tensor([model.config.bos_token_id or 0, *tokenizer.encode(text).ids])
    nats, done = 0.0, 1  # ids[0] is given
    for start in range(0, len(ids), stride):
        window = ids[start : start + context + 1]
        logprobs = model(window[None, :-1])[0].double().log_softmax(-1).gather(1, window[1:, None])
        nats -= float(logprobs[done - start - 1 :].sum())
        done = start + len(window)
        if done == len(ids):
            break
    return nats / math.log(2) / len(text)


def export(model: GPT2, tokenizer: Tokenizer, directory: Path) -> int:
    """Write the Hugging Face directory, float16 weights; returns its bytes, refuses more than MAX_BYTES."""
    model.save_checkpoint(directory, torch.float16)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    ids = {"bos_token_id": CONFIG.bos_token_id, "eos_token_id": CONFIG.eos_token_id}
    contents = {
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "add_prefix_space": False,
            "model_max_length": CONFIG.n_positions,
            "tokenizer_class": "GPT2TokenizerFast",
        },
        "generation_config.json": {**ids, "do_sample": True, "temperature": 0.8},
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in directory.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{directory} takes {size} bytes, more than {MAX_BYTES}; make CONFIG smaller")
    return size


def make_optimisers(model: GPT2, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW without decay for embeddings, gains and biases."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or ".h." not in name]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, constant for 40 % of the run, then linear to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, 1.0 - progress) / 0.6)


def train(
    model: GPT2, tokenizer: Tokenizer, stream: Tensor, validation: Tensor, args: argparse.Namespace
) -> None:
    """Train until --steps or --minutes are used up; checkpoint, export and log on the way."""
    optimisers = make_optimisers(model, args)
    state_file, log_file = args.work / "state.pt", args.work / "log.jsonl"
    step, before, started = 0, 0.0, time.process_time()
    if args.resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, before = state["step"], state["seconds"]
        print(f"resumed at step {step}, {before / 60:.1f} minutes", file=sys.stderr)

    def seconds() -> float:
        return before + (time.process_time() - started) / args.threads

    def save(note: dict[str, float]) -> None:
        optimiser_states = [o.state_dict() for o in optimisers]
        state = {
            "model": model.state_dict(),
            "optimisers": optimiser_states,
            "step": step,
            "seconds": seconds(),
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)
        entry = {"step": step, "tokens": step * args.batch * args.context, "minutes": seconds() / 60, **note}
        with log_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({k: round(v, 4) for k, v in entry.items()}) + "\n")
        print(entry, file=sys.stderr)

    model.train()
    running, saved_at = 0.0, seconds()
    while (progress := max(step / args.steps, seconds() / 60 / args.minutes)) < 1.0:
        factor = learning_rate_factor(step, progress, args.warmup)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * factor
        windows = batch_of_step(stream, step, args)
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if seconds() - saved_at > 60 * args.save_minutes:
            loss_now = mean_loss(model, validation, args.context)
            export(model, tokenizer, args.out)
            save({"train_loss": running, "validation_loss": loss_now, "lr": args.lr * factor})
            saved_at = seconds()
    save({"train_loss": running, "validation_loss": mean_loss(model, validation, args.context)})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="directory with *.txt and gutenberg/*.txt")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bundled"), help="resumable state and log.jsonl"
    )
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="processor time / threads of the training"
    )
    parser.add_argument("--steps", type=int, default=6000, help="end of the schedule if time does not end it")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--context", type=int, default=CONFIG.n_positions, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    books, held_out = read_books(args.data)
    passages = [p for text in books.values() for p in cut_into_passages(text)]
    training = [p for i, p in enumerate(passages) if i % VALIDATION_EVERY]
    validation = passages[::VALIDATION_EVERY]
    random.Random(args.seed).shuffle(training)
    tokenizer = train_tokenizer(training, CONFIG.vocab_size)
    stream, validation_stream = encode(tokenizer, training), encode(tokenizer, validation)

    model = GPT2(CONFIG, args.dropout)
    size = export(model, tokenizer, args.work / "size-check")  # before an hour's work, not after it
    facts = {
        "parameters": model.num_parameters(),
        "bytes": size,
        "training_characters": sum(map(len, training)),
        "training_tokens": len(stream),
        "validation_characters": sum(map(len, validation)),
        "validation_tokens": len(validation_stream),
    }
    print(json.dumps(facts), flush=True)
    train(model, tokenizer, stream, validation_stream, args)

    facts["bytes"] = export(model, tokenizer, args.out)
    model = GPT2.from_checkpoint(args.out)  # what was stored, float16 rounding included
    context = CONFIG.n_positions
    results: dict[str, dict[str, float]] = {}
    for name, text in held_out.items():
        plain = bits_per_character(model, tokenizer, text, context)
        sliding = bits_per_character(model, tokenizer, text, context // 2)
        results[name] = {"characters": len(text), "non-overlapping": plain, "sliding": sliding}
    total = sum(r["characters"] for r in results.values())
    results["all"] = {"characters": total}
    for kind in ("non-overlapping", "sliding"):
        results["all"][kind] = (
            sum(results[name][kind] * results[name]["characters"] for name in held_out) / total
        )
    (args.work / "result.json").write_text(
        json.dumps({**facts, "bits_per_character": results}, indent=2) + "\n"
    )
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
