"""Every option of ``pyengine-cli train``: one dataclass, from which the command line is made. No torch here.

A value comes, in this order, from the command line, the ``--config`` file, the ``--preset`` (the shape of the
model), the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyengine.errors import ConfigError

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")

# Layers, heads, channels, context. The small ones are minGPT's; "micro" is nanoGPT's documented CPU run.
PRESETS: dict[str, dict[str, int]] = {
    "nano": {"n_layer": 3, "n_head": 3, "n_embd": 48, "block_size": 64},
    "micro": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 192, "block_size": 256},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024},
}


def _option(default: Any, group: str, text: str, *, choices: Sequence[str] = (), metavar: str = "") -> Any:
    metadata = {"group": group, "help": text, "choices": tuple(choices), "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class TrainOptions:
    """What a run is made of; ``None`` means "decided by another option", as the help of each says."""

    data: tuple[str, ...] = _option(
        (), "Data", "Text files, globs, .jsonl files, or - (standard input). Repeat for more.", metavar="PATH"
    )
    val_data: tuple[str, ...] = _option(
        (), "Data", "Validation texts of their own, instead of a part of --data.", metavar="PATH"
    )
    text_field: str = _option("text", "Data", "Field of the .jsonl objects that holds the text.")
    val_fraction: float = _option(
        0.1, "Data", "Part of --data kept for validation: whole documents, or the end of a single one."
    )
    data_cache: str | None = _option(
        None, "Data", "Directory of the tokenised shards.  [default: OUT/data]", metavar="DIR"
    )
    out: str = _option("", "Data", "Directory to write the checkpoint to.", metavar="DIR")

    tokenizer: str | None = _option(
        None,
        "Tokenizer",
        "char, bpe, sentencepiece (trained from the data), or a directory with a tokenizer.  "
        "[default: bpe, or that of --init-from]",
        metavar="char|bpe|sentencepiece|PATH",
    )
    vocab_size: int | None = _option(
        None, "Tokenizer", "Tokens of the trained tokenizer.  [default: up to 8192; char: all characters]"
    )
    sentencepiece_type: str = _option(
        "unigram", "Tokenizer", "Model of a SentencePiece tokenizer.", choices=("unigram", "bpe")
    )

    preset: str = _option("micro", "Model", "Shape of the model.", choices=tuple(PRESETS))
    n_layer: int | None = _option(None, "Model", "Layers.  [default: the preset's]")
    n_head: int | None = _option(None, "Model", "Attention heads.  [default: the preset's]")
    n_embd: int | None = _option(None, "Model", "Channels.  [default: the preset's]")
    block_size: int | None = _option(
        None, "Model", "Tokens of a sequence, the context.  [default: the preset's]"
    )
    bias: bool = _option(True, "Model", "Biases in dense layers and norms; without, zeros are exported.")
    activation: str = _option("gelu_new", "Model", "Activation of the MLP.", choices=ACTIVATIONS)
    dropout: float = _option(0.0, "Model", "Dropout on embeddings and residual branches.")
    init_from: str | None = _option(
        None, "Model", "Finetune this checkpoint: a directory, or a Hub id.", metavar="PATH|ID"
    )
    lora_rank: int = _option(
        0, "Model", "With --init-from: train LoRA adapters of this rank, merged on export.  0: all weights."
    )
    lora_alpha: int | None = _option(None, "Model", "Scale of the adapters.  [default: twice the rank]")

    steps: int = _option(2000, "Training", "Updates.")
    batch_size: int = _option(12, "Training", "Sequences of a micro-batch, over all processes.")
    grad_accum: int = _option(1, "Training", "Micro-batches of a step.")
    optimizer: str = _option(
        "adamw",
        "Training",
        "adamw, or muon: Muon for the matrices of the blocks and AdamW for the rest.",
        choices=OPTIMIZERS,
    )
    lr: float | None = _option(
        None, "Training", "Highest learning rate.  [default: 0.001 with adamw, 0.01 with muon]"
    )
    min_lr: float | None = _option(None, "Training", "Last learning rate.  [default: a tenth of --lr]")
    schedule: str = _option(
        "cosine", "Training", "Way from --lr to --min-lr; wsd: constant, then linear.", choices=SCHEDULES
    )
    warmup_steps: int = _option(
        100, "Training", "Steps of linear warm-up.  [default: 100, at most a tenth of --steps]"
    )
    decay_fraction: float = _option(0.3, "Training", "Part of the steps in which wsd decays.")
    beta1: float = _option(0.9, "Training", "AdamW's average of gradients.")
    beta2: float = _option(0.99, "Training", "AdamW's average of squared gradients.")
    momentum: float = _option(0.95, "Training", "Muon's momentum.")
    weight_decay: float = _option(0.1, "Training", "Decoupled weight decay, on matrices only.")
    grad_clip: float = _option(1.0, "Training", "Largest norm of the gradient.  0: no clipping.")
    seed: int = _option(1337, "Training", "Of initialisation, order of the data, and dropout.")
    patience: int = _option(0, "Training", "Stop after so many evaluations without a better loss.  0: never.")

    device: str = _option("auto", "Machine", "cpu, cuda, or auto.", choices=("auto", "cpu", "cuda"))
    dtype: str = _option(
        "auto",
        "Machine",
        "Type of forward and backward; weights and optimiser stay float32. auto: bfloat16 on CUDA.",
        choices=DTYPES,
    )
    compile: bool | None = _option(
        None, "Machine", "torch.compile.  [default: on CUDA, for 1,000 steps or more]"
    )
    threads: int | None = _option(
        None, "Machine", "Threads of a process.  [default: the processors, shared by its processes]"
    )
    parallel: str = _option(
        "ddp", "Machine", "Under torchrun: copies of the model, or its shards.", choices=("ddp", "fsdp")
    )

    resume: str | None = _option(
        None,
        "Progress",
        "auto: go on with the run in --out, if there is one. Or the directory of a run to go on with.",
        metavar="auto|DIR",
    )
    eval_every: int = _option(250, "Progress", "Steps between evaluations on the whole validation set.")
    save_every: int | None = _option(
        None, "Progress", "Steps between resumable checkpoints.  [default: --eval-every]"
    )
    log_every: int = _option(10, "Progress", "Steps between lines of log.jsonl; train_loss is their mean.")
    sample_prompt: str = _option("", "Progress", "What sample texts begin with.  [default: BOS]")
    sample_tokens: int = _option(100, "Progress", "Tokens of the sample text at each evaluation.  0: none.")
    plot: bool = _option(True, "Progress", "Draw loss.png (needs matplotlib).")
    tensorboard: bool = _option(False, "Progress", "Write TensorBoard events to OUT/tensorboard.")
    export_dtype: str = _option("float32", "Progress", "Type of the exported weights.", choices=EXPORT_DTYPES)

    def __post_init__(self) -> None:
        self.given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_values(cls, *sources: Mapping[str, Any]) -> TrainOptions:
        """Options from several mappings, the first that has a name decides; then ``resolve`` and checks."""
        values: dict[str, Any] = {}
        for source in sources:
            for name, value in source.items():
                if value is not None and value != () and name not in values:
                    values[name] = value
        options = cls(**values)
        options.given = set(values)
        options.resolve()
        options.check()
        return options

    def resolve(self) -> None:
        """Fill in what the preset and other options decide."""
        if self.preset not in PRESETS:
            raise ConfigError(f"preset={self.preset!r}: must be one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lr is None:
            self.lr = 1e-2 if self.optimizer == "muon" else 1e-3
        if self.min_lr is None:
            self.min_lr = self.lr / 10
        if "warmup_steps" not in self.given:
            self.warmup_steps = min(self.warmup_steps, self.steps // 10)
        if self.save_every is None:
            self.save_every = self.eval_every
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_rank
        if self.tokenizer is None and self.init_from is None:
            self.tokenizer = "bpe"

    def check(self) -> None:
        """ConfigError for every value that cannot work, whatever the data."""
        if not self.data:
            raise ConfigError("--data: name at least one text file, glob or .jsonl file")
        if not self.out:
            raise ConfigError("--out: name the directory to write the checkpoint to")
        low = {"vocab_size": 2, "n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "steps": 1}
        low |= {"batch_size": 1, "grad_accum": 1, "warmup_steps": 0, "seed": 0, "patience": 0, "threads": 1}
        low |= {"eval_every": 1, "save_every": 1, "log_every": 1, "sample_tokens": 0, "lora_rank": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise self._error(name, f"must be {least} or more")
        for name in ("lr", "min_lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise self._error(name, "must be a number, 0 or more")
        for name in ("beta1", "beta2", "momentum", "dropout", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise self._error(name, "must be 0 or more and less than 1")
        if not 0 < self.decay_fraction <= 1:
            raise self._error("decay_fraction", "must be more than 0 and at most 1")
        if self.min_lr is not None and self.lr is not None and self.min_lr > self.lr:
            raise self._error("min_lr", f"must not be larger than --lr {self.lr}")
        if self.warmup_steps > self.steps:
            raise self._error("warmup_steps", f"must not be larger than --steps {self.steps}")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise self._error(field.name, f"must be one of {', '.join(choices)}")
        assert self.n_embd is not None and self.n_head is not None
        if self.init_from is None and self.n_embd % self.n_head:
            raise self._error("n_embd", f"must be a multiple of --n-head {self.n_head}")
        if self.lora_rank and self.init_from is None:
            raise self._error("lora_rank", "adapters need a checkpoint to adapt: give --init-from")
        if self.lora_rank and self.parallel == "fsdp":
            raise self._error("lora_rank", "is not supported with --parallel fsdp: use ddp")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise self._error("optimizer", "Muon needs whole matrices: use adamw with --parallel fsdp")

    def _error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{flag(name)} {getattr(self, name)}: {problem}")

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def flag(name: str) -> str:
    """``n_layer`` -> ``--n-layer``."""
    return "--" + name.replace("_", "-")


def field_types() -> dict[str, tuple[type, bool, bool]]:
    """For each option: the type of its value, whether it may be None, whether it is a tuple of them."""
    found = {}
    for name, hint in typing.get_type_hints(TrainOptions).items():
        arguments = typing.get_args(hint)
        if isinstance(hint, types.UnionType):
            (inner,) = (a for a in arguments if a is not type(None))
            found[name] = (inner, True, False)
        elif typing.get_origin(hint) is tuple:
            found[name] = (arguments[0], False, True)
        else:
            found[name] = (hint, False, False)
    return found


def read_config_file(path: str) -> dict[str, Any]:
    """Options of a TOML (``.toml``), YAML (``.yaml``, ``.yml``) or JSON file; ``n-layer`` is ``n_layer``."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte at offset {error.start}") from None
    try:
        values = _parse(file.suffix.lower(), text, path)
    except ConfigError:
        raise
    except Exception as error:  # each parser has an exception of its own
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold names and values, one option each")
    known = field_types()
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{path}: unknown option {key!r}{hint}")
        options[name] = _checked(path, name, value, *known[name])
    return options


def _parse(suffix: str, text: str, path: str) -> Any:
    if suffix == ".toml":
        # In the standard library from Python 3.11 on; tomli is the same code for 3.10.
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        return tomllib.loads(text)
    if suffix in (".yaml", ".yml"):
        return importlib.import_module("yaml").safe_load(text)
    if suffix == ".json":
        return json.loads(text)
    raise ConfigError(f"{path}: a configuration file ends in .toml, .yaml, .yml or .json")


def _checked(path: str, name: str, value: Any, kind: type, optional: bool, many: bool) -> Any:
    if many:
        values = [value] if isinstance(value, kind) else value
        if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
            raise ConfigError(f"{path}: {name}={value!r}: must be a string, or a list of strings")
        return tuple(values)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {name}={value!r}: must be of type {kind.__name__}")
    return value
