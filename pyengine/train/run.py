"""A run from its options: everything is checked and prepared, then the loop runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pyengine.errors import CheckpointError, ConfigError
from pyengine.train.card import write_card
from pyengine.train.checkpoint import RunDirectory, check_data, check_options, load_state, state_file
from pyengine.train.data import Batches, Dataset, check_lengths, prepare
from pyengine.train.distributed import Processes
from pyengine.train.files import make_writable_directory
from pyengine.train.loop import Progress, Trainer
from pyengine.train.lora import add_adapters
from pyengine.train.model import GPT2, ModelConfig
from pyengine.train.optim import Optimizers
from pyengine.train.options import TrainOptions, flag
from pyengine.train.report import Reporter
from pyengine.train.tokenizers import TRAINED, TextEncoder


@dataclass(frozen=True)
class Result:
    """``exit_status`` is 0, or 128 + the signal that ended the run."""

    out: Path
    progress: Progress
    exit_status: int


def train(options: TrainOptions, *, quiet: bool = False) -> Result:
    """Train as the options say. ConfigError, CheckpointError or TokenizerError before any time is spent;
    TrainingError if the loss stops being finite or a checkpoint cannot be written."""
    processes = Processes(options)
    try:
        return _train(options, processes, quiet)
    finally:
        processes.close()


def _train(options: TrainOptions, processes: Processes, quiet: bool) -> Result:
    out = Path(options.out)
    resume_from = _resume_from(options, out)
    initial = _initial_checkpoint(options)
    state = None
    if resume_from is not None:
        state = load_state(resume_from)
        check_options(state, options, resume_from)
    with processes.main_first():
        make_writable_directory(out, "--out")
    reporter = Reporter(
        out,
        options.steps,
        active=processes.is_main,
        quiet=quiet,
        plot=options.plot,
        tensorboard=options.tensorboard,
    )
    with processes.main_first():
        dataset = _dataset(options, out, initial, reporter.progress)
    check_lengths(dataset, options.block_size or 0)
    config = _model_config(options, dataset, initial)
    _check_prompt(options, dataset)
    if resume_from is not None and state is not None:
        check_data(state, dataset.identity, resume_from)

    torch.manual_seed(options.seed)
    model = GPT2(config, options.dropout, options.bias or initial is not None)
    if initial is not None:
        load_initial(model, initial)
    num_parameters = model.num_parameters()
    if options.lora_rank:
        add_adapters(model, options.lora_rank, options.lora_alpha or 1, options.dropout)
    model.to(processes.device)
    if options.parallel == "fsdp":  # shards first, then what is trained
        wrapped = processes.wrap(model)
        optimizers = Optimizers(model, options, processes.device)
    else:
        optimizers = Optimizers(model, options, processes.device)
        wrapped = processes.wrap(model)
    run = RunDirectory(out, config, options.export_dtype)
    if processes.is_main:
        run.prepare(dataset.tokenizer)
    batches = Batches(
        dataset.store("train"), options.block_size or 0, options.batch_size, options.grad_accum, options.seed
    )
    trainer = Trainer(
        options,
        processes,
        model,
        wrapped,
        optimizers,
        batches,
        dataset.store("val"),
        run,
        reporter,
        dataset.identity,
    )
    if state is not None:
        trainer.load_state(state)
        reporter.note(f"resumed after step {trainer.progress.step:,}")
    splits = dataset.manifest["splits"]
    reporter.note(
        f"{num_parameters:,} parameters; {splits['train']['tokens']:,} training tokens, "
        f"{splits['val']['tokens']:,} validation tokens, vocabulary {config.vocab_size:,}"
    )
    with run.guarded():
        ended_by = trainer.fit()
        if processes.is_main:
            reporter.draw(final=True)
            write_card(out, options, config, num_parameters, dataset, trainer.progress, reporter.rows)
    if processes.is_main:
        reporter.close()
        _summarise(reporter, out, trainer.progress, ended_by)
    return Result(out, trainer.progress, 128 + ended_by if ended_by else 0)


def _summarise(reporter: Reporter, out: Path, progress: Progress, ended_by: int) -> None:
    if ended_by:
        reporter.note(f"stopped after step {progress.step:,}; --resume auto goes on")
    elif math.isfinite(progress.best_loss):
        reporter.note(f"{out}: validation loss {progress.best_loss:.4f} (step {progress.best_step:,})")
    else:
        reporter.note(f"{out}: trained for {progress.step:,} steps")


def _resume_from(options: TrainOptions, out: Path) -> Path | None:
    """The run to go on with. ConfigError where --out holds something that must not be overwritten."""
    if options.resume not in (None, "auto"):
        run = Path(options.resume)
        if run.resolve() != out.resolve():
            _refuse_existing(out)
        return run
    if state_file(out).is_file() and options.resume == "auto":
        return out
    if not (options.resume == "auto" and (out / "log.jsonl").is_file()):
        _refuse_existing(out, ours=(out / "state").is_dir())
    return None


def _refuse_existing(out: Path, ours: bool = False) -> None:
    if state_file(out).is_file():
        raise ConfigError(f"--out {out}: holds a run already; --resume auto goes on with it, or name another")
    if not ours and (out / "model.safetensors").exists():
        raise ConfigError(f"--out {out}: holds a checkpoint already; name another directory")


@dataclass(frozen=True)
class _Initial:
    """A checkpoint to finetune."""

    path: Path
    config: ModelConfig


def _initial_checkpoint(options: TrainOptions) -> _Initial | None:
    """Take shape and tokenizer from --init-from; ConfigError for options that contradict it."""
    if options.init_from is None:
        return None
    from pyengine.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(options.init_from)
    values = dataclasses.asdict(checkpoint.config)
    config = ModelConfig.from_dict(values)
    for name in ("n_layer", "n_head", "n_embd"):
        theirs = getattr(config, name)
        if name in options.given and getattr(options, name) != theirs:
            raise ConfigError(
                f"{flag(name)} {getattr(options, name)}: {options.init_from} has {theirs}; leave it out"
            )
        setattr(options, name, theirs)
    if "activation" in options.given and options.activation != config.activation_function:
        raise ConfigError(
            f"--activation {options.activation}: {options.init_from} has {config.activation_function}"
        )
    if "block_size" not in options.given:
        options.block_size = config.n_positions
    elif (options.block_size or 0) > config.n_positions:
        raise ConfigError(
            f"--block-size {options.block_size}: {options.init_from} has a context of {config.n_positions}"
        )
    return _Initial(checkpoint.path, config)


def load_initial(model: GPT2, initial: _Initial) -> None:
    """The weights of the checkpoint, as float32."""
    from safetensors.torch import load_file

    files = sorted(initial.path.glob("*.safetensors"))
    if files:
        tensors = {name: value.float() for file in files for name, value in load_file(file).items()}
    else:
        tensors = {}
        for file in sorted(initial.path.glob("pytorch_model*.bin")):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            tensors |= {name: value.float() for name, value in loaded.items()}
    try:
        model.from_huggingface(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{initial.path}: {error}") from None


def _dataset(
    options: TrainOptions, out: Path, initial: _Initial | None, progress: Callable[[str, float], object]
) -> Dataset:
    tokenizer = None
    if options.tokenizer is None:
        assert initial is not None
        tokenizer = initial.path
    elif options.tokenizer not in TRAINED:
        tokenizer = Path(options.tokenizer)
        if not tokenizer.is_dir():
            raise ConfigError(
                f"--tokenizer {options.tokenizer}: must be {', '.join(TRAINED)}, or a "
                "directory with a tokenizer"
            )
        if options.vocab_size is not None:
            raise ConfigError("--vocab-size: belongs to a tokenizer that is trained, not to an existing one")
    directory = Path(options.data_cache) if options.data_cache else out / "data"
    option = "--data-cache" if options.data_cache else "--out"
    make_writable_directory(directory, option)
    try:
        return prepare(options, directory, tokenizer, progress)
    except OSError as error:  # those of the texts are ConfigErrors already
        raise ConfigError(f"{option} {directory}: cannot be written to: {error.strerror or error}") from None


def _model_config(options: TrainOptions, dataset: Dataset, initial: _Initial | None) -> ModelConfig:
    encoder = TextEncoder(dataset.tokenizer)
    if initial is not None:
        if dataset.vocab_size > initial.config.vocab_size:
            raise ConfigError(
                f"--tokenizer {options.tokenizer}: has {dataset.vocab_size} tokens, but {options.init_from} "
                f"has only {initial.config.vocab_size}; leave --tokenizer out to use its own"
            )
        return initial.config
    assert options.n_embd and options.n_layer and options.n_head and options.block_size
    tokenizer = encoder.tokenizer
    return ModelConfig(
        vocab_size=dataset.vocab_size,
        n_positions=options.block_size,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
        activation_function=options.activation,
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _check_prompt(options: TrainOptions, dataset: Dataset) -> None:
    if options.sample_tokens and options.sample_prompt:
        tokens = len(TextEncoder(dataset.tokenizer).tokenizer.encode(options.sample_prompt))
        if tokens >= (options.block_size or 0):
            raise ConfigError(
                f"--sample-prompt: has {tokens} tokens, and --block-size {options.block_size} leaves no room "
                "for a new one"
            )
