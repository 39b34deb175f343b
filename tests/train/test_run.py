"""Whole runs on tiny models: the losses are those of transformers, and what is exported loads everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine import LLM, SamplingParams  # noqa: E402
from pyengine.errors import CheckpointError, ConfigError, TokenizerError  # noqa: E402
from pyengine.train import loop  # noqa: E402
from pyengine.train.data import Batches, Dataset  # noqa: E402
from pyengine.train.model import GPT2, ModelConfig  # noqa: E402
from pyengine.train.optim import learning_rate  # noqa: E402
from pyengine.train.options import TrainOptions  # noqa: E402
from pyengine.train.run import train  # noqa: E402
from tests.train.helpers import CHINESE, JAPANESE, TINY, losses, make_text, read_log, tiny_options, write_text  # noqa: E402,E501


def transformers_losses(options: TrainOptions, out: Path, initial: Path) -> list[float]:
    """GPT2LMHeadModel from the same weights, on the same batches, with torch's AdamW."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(initial, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).train()
    if not options.bias:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("bias"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2))
    manifest = json.loads((out / "data/manifest.json").read_text())
    store = Dataset(out / "data", manifest).store("train")
    batches = Batches(store, options.block_size or 0, options.batch_size, options.grad_accum, options.seed)
    found = []
    for step in range(options.steps):
        total = 0.0
        for micro in range(options.grad_accum):
            tokens = torch.from_numpy(batches.batch(step, micro))
            logits = model(tokens[:, :-1]).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) / options.grad_accum
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, options.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize("changes", [{"bias": False, "grad_accum": 2}, {"activation": "gelu"}])
def test_losses_are_those_of_transformers(text_file: str, out: Path, changes: dict[str, Any]) -> None:
    options = tiny_options(text_file, out, steps=20, eval_every=20, lr=1e-2, grad_clip=0.5, **changes)
    train(options, quiet=True)
    config = ModelConfig.from_dict(json.loads((out / "config.json").read_text()))
    torch.manual_seed(options.seed)
    initial = out.parent / "initial"
    GPT2(config, bias=options.bias).save_checkpoint(initial)
    expected = transformers_losses(options, out, initial)
    ours = [row["train_loss"] for row in read_log(out)]
    assert len(ours) == 20 and ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def check_loads_everywhere(directory: Path, text: str) -> None:
    """transformers, the reference and the engine give the same tokens and the same probabilities."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()
    llm = LLM(directory, num_threads=1, dtype="float32")
    ids = tokenizer(text)["input_ids"][: model.config.n_positions]
    assert llm.tokenizer is not None
    assert llm.tokenizer.encode(text)[: len(ids)] == ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        assert torch.allclose(GPT2.from_checkpoint(directory)(torch.tensor([ids]))[0], logits, atol=1e-4)
    logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(llm.score(ids).logprobs[1:], logprobs.numpy(), atol=1e-4)
    assert llm.generate(None, SamplingParams(max_tokens=5, seed=0))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False, "dropout": 0.1},
        {"optimizer": "muon", "tokenizer": "bpe", "vocab_size": 280, "schedule": "wsd"},
        {"tokenizer": "sentencepiece", "export_dtype": "bfloat16", "dtype": "bfloat16"},
    ],
)
def test_exported_checkpoints(text_file: str, out: Path, changes: dict[str, Any]) -> None:
    options = tiny_options(text_file, out, sample_tokens=8, **changes)
    options.plot = True
    result = train(options, quiet=True)
    assert result.exit_status == 0
    text = Path(text_file).read_text()[:300]
    for directory in (out, out / "last"):
        check_loads_everywhere(directory, text)
    rows = read_log(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"step", "train_loss", "lr", "tok_per_s"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert result.progress.best_loss == min(row["val_loss"] for row in rows if "val_loss" in row)
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert "validation loss" in (out / "README.md").read_text()
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_bias_exports_zeros(text_file: str, out: Path) -> None:
    from safetensors.torch import load_file

    train(tiny_options(text_file, out, bias=False, steps=3), quiet=True)
    biases = {n: v for n, v in load_file(out / "model.safetensors").items() if n.endswith("bias")}
    assert len(biases) == 2 * 6 + 1 and not any(v.any() for v in biases.values())


@pytest.mark.parametrize("text", [JAPANESE, CHINESE], ids=["japanese", "chinese"])
@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece"])
def test_chinese_and_japanese(tmp_path: Path, text: str, tokenizer: str) -> None:
    options = tiny_options(
        write_text(tmp_path / "t.txt", text * 20),
        tmp_path / "out",
        tokenizer=tokenizer,
        steps=60,
        eval_every=60,
        lr=3e-2,
        n_embd=32,
    )
    train(options, quiet=True)
    llm = LLM(tmp_path / "out", num_threads=1)
    prompt = text[:4]
    output = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0))[0].outputs[0]
    assert output.text and set(output.text) <= set(text) | {"\ufffd"}
    assert llm.score(text).perplexity < 12


def test_validation_loss_is_that_of_the_whole_set(text_file: str, out: Path) -> None:
    train(tiny_options(text_file, out, steps=2), quiet=True)
    manifest = json.loads((out / "data/manifest.json").read_text())
    store = Dataset(out / "data", manifest).store("val")
    tokens = torch.from_numpy(store.slice(0, len(store)))
    model = GPT2.from_checkpoint(out)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[None, start : start + 17]
            nats += float(model(window[:, :-1], window[:, 1:])) * (window.shape[1] - 1)
    assert read_log(out)[-1]["val_loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)


def test_accumulation_is_a_larger_batch(text_file: str, tmp_path: Path) -> None:
    for name, changes in {"a": {"batch_size": 8}, "b": {"batch_size": 2, "grad_accum": 4}}.items():
        train(tiny_options(text_file, tmp_path / name, **changes), quiet=True)
    a, b = (np.array([row["train_loss"] for row in read_log(tmp_path / name)]) for name in "ab")
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_early_stopping(text_file: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda _: next(losses))
    result = train(tiny_options(text_file, out, steps=40, eval_every=2, patience=3), quiet=True)
    assert (result.progress.best_step, result.progress.step) == (4, 10)
    assert (out / "last/model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rank", [0, 2])
def test_finetuning(text_file: str, tmp_path: Path, rank: int) -> None:
    if rank:
        pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "tuned"
    train(tiny_options(text_file, base), quiet=True)
    values = {k: v for k, v in TINY.items() if k not in ("tokenizer", "n_layer", "n_head", "n_embd")}
    other = write_text(tmp_path / "b.txt", make_text(500, 9))
    changes = {"data": (other,), "out": str(out), "init_from": str(base), "lora_rank": rank, "lr": 1e-2}
    result = train(TrainOptions.from_values(changes, values), quiet=True)
    check_loads_everywhere(out, make_text(20))
    before, after = (GPT2.from_checkpoint(d).to_huggingface() for d in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if rank:
        assert changed == {n for n in before if n.endswith(("attn.weight", "proj.weight", "fc.weight"))}
    else:
        assert changed == set(before)
    manifest = json.loads((out / "data/manifest.json").read_text())
    assert result.progress.best_loss < LLM(base, num_threads=1).score(make_text(100, 9)).perplexity
    assert manifest["document_start"] == [0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_size": 100_000}, ConfigError, "--block-size 100000: the training data has only"),
        ({"tokenizer": "bpe", "vocab_size": 60_000}, ConfigError, "the data supports"),
        ({"tokenizer": "/nowhere"}, ConfigError, "must be char, bpe, sentencepiece, or a directory"),
        ({"init_from": "/nowhere"}, CheckpointError, "/nowhere"),
        ({"out": "/proc/pyengine"}, ConfigError, "--out /proc/pyengine: cannot be written to"),
        ({"data": ("/nowhere.txt",)}, ConfigError, "no such file"),
        ({"device": "cuda"}, ConfigError, "no CUDA device"),
        ({"sample_prompt": "the " * 9, "sample_tokens": 5}, ConfigError, "--sample-prompt: has 36 tokens"),
    ],
)
def test_refused_before_training(
    text_file: str, out: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    values = {**TINY, "data": (text_file,), "out": str(out)}
    with pytest.raises(error, match=message):
        train(TrainOptions.from_values(changes, values), quiet=True)
    assert not (out / "log.jsonl").exists()


def test_other_data_of_an_empty_or_short_kind(tmp_path: Path) -> None:
    empty = write_text(tmp_path / "e.txt", "")
    with pytest.raises(ConfigError, match="the corpus is empty"):
        train(tiny_options(empty, tmp_path / "a"), quiet=True)
    (tmp_path / "latin.txt").write_bytes("naïve café".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.txt: not UTF-8 text: byte 0xef at offset 2"):
        train(tiny_options(str(tmp_path / "latin.txt"), tmp_path / "b"), quiet=True)
    one = write_text(tmp_path / "one.txt", "x")
    with pytest.raises(ConfigError, match="a single document of 1 characters, too short to cut"):
        train(tiny_options(one, tmp_path / "c"), quiet=True)


def test_a_tokenizer_of_another_checkpoint(text_file: str, tmp_path: Path) -> None:
    train(tiny_options(text_file, tmp_path / "a", steps=2, tokenizer="bpe", vocab_size=270), quiet=True)
    options = tiny_options(text_file, tmp_path / "b", tokenizer=str(tmp_path / "a"), steps=2)
    train(options, quiet=True)
    assert (tmp_path / "b/tokenizer.json").read_text() == (tmp_path / "a/tokenizer.json").read_text()
    (tmp_path / "none").mkdir()
    with pytest.raises(TokenizerError, match="no tokenizer files"):
        train(tiny_options(text_file, tmp_path / "c", tokenizer=str(tmp_path / "none")), quiet=True)


def test_existing_directories_are_not_overwritten(text_file: str, out: Path) -> None:
    train(tiny_options(text_file, out, steps=2), quiet=True)
    with pytest.raises(ConfigError, match="holds a run already; --resume auto"):
        train(tiny_options(text_file, out), quiet=True)
    before, manifest = losses(out), (out / "data/manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="has --n-embd 16, not 32"):
        train(tiny_options(text_file, out, resume="auto", n_embd=32, tokenizer="bpe"), quiet=True)
    assert (out / "data/manifest.json").read_bytes() == manifest  # refused before the data is prepared
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": "bpe"}, "other data or with another tokenizer"),
        ({"steps": 1, "warmup_steps": 0}, "has already done 2"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            train(tiny_options(text_file, out, resume="auto", **changes), quiet=True)
    assert losses(out) == before
    assert math.isfinite(LLM(out, num_threads=1).score("the fox").perplexity)
