"""Loading a checkpoint: a directory in the Hugging Face layout, a Hub id, or the bundled model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine._C import FileView
from pyengine.errors import CheckpointError
from pyengine.model.config import GPT2Config
from pyengine.model.json_file import read_json_object, show
from pyengine.model.names import select_weights
from pyengine.model.safetensors import Tensor, read_safetensors

if TYPE_CHECKING:
    from pyengine.model.check import CheckReport

BUNDLED_MODEL = "gutenberg-gpt2"  # directory in pyengine/assets

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# In order of preference, as in transformers.
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, TORCH_BIN, TORCH_BIN + INDEX_SUFFIX)
_OTHER_FORMATS = (".h5", ".msgpack", ".ckpt", ".gguf", ".ggml", ".onnx", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are checked and mapped; no weight has been read yet."""

    path: Path  # its directory
    config: GPT2Config
    tensors: dict[str, Tensor]  # exactly those of config.weight_shapes(), by canonical name
    dtype: str  # of the weights: "float32", "float16", "bfloat16", "mixed", "int8", "int4"
    generation_config: dict[str, Any]  # empty without generation_config.json
    files: tuple[Path, ...]  # the weight files
    ignored: tuple[str, ...]  # tensors that the model does not use

    @property
    def quantization(self) -> str | None:
        """ "int8" or "int4" if the weights are stored quantised."""
        return self.config.quantization

    @property
    def auto_dtype(self) -> str:
        """What ``dtype="auto"`` computes in: bfloat16 for bfloat16 files, otherwise float32."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in their files."""
        return sum(t.nbytes for t in self.tensors.values())

    def weights(self) -> dict[str, tuple[memoryview, str, tuple[int, ...]]]:
        """(buffer, dtype, shape) by canonical name, as ``_C.Model`` takes them; read in place."""
        return {name: (t.data, t.dtype, t.shape) for name, t in self.tensors.items()}

    def check(self) -> CheckReport:
        """Read every weight: non-finite values and statistics per tensor. Needs numpy."""
        from pyengine.model.check import check_tensors

        report = check_tensors(self.tensors)
        for file in {t.data.obj for t in self.tensors.values() if isinstance(t.data.obj, FileView)}:
            file.check()  # what was read is what the file holds
        return report


def load_checkpoint(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint.

    ``model``: a directory; one weight file (or shard index) in a directory; a Hub id such as ``gpt2`` or
    ``owner/name``, downloaded into the Hub's cache unless ``local_files_only``, at ``revision``; or None for
    the bundled model. Raises CheckpointError, or ConfigError for a configuration that cannot work.
    """
    path = resolve(model, revision=revision, local_files_only=local_files_only)
    directory, weight_file = (path, None) if path.is_dir() else (path.parent, path)
    if weight_file is not None:
        _require_weight_file(weight_file)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{directory} has no config.json; a checkpoint directory holds config.json and weights"
            + _hint_for(directory, "copy the model's config.json beside it")
        )
    config = GPT2Config.from_file(config_file)
    if weight_file is None:
        weight_file = _find_weights(directory)
    tensors, files = _read_weights(weight_file)
    weights, ignored = select_weights(tensors, config, str(weight_file))
    dtypes = {t.dtype for t in weights.values()}
    generation_file = directory / "generation_config.json"
    generation_config = read_json_object(generation_file, CheckpointError) if generation_file.exists() else {}
    return Checkpoint(
        path=directory,
        config=config,
        tensors=weights,
        dtype=config.quantization or (dtypes.pop() if len(dtypes) == 1 else "mixed"),
        generation_config=generation_config,
        files=files,
        ignored=ignored,
    )


def resolve(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory or file that ``model`` stands for; see load_checkpoint."""
    if model is None:
        path = Path(__file__).parent.parent / "assets" / BUNDLED_MODEL
        if not path.is_dir():
            raise CheckpointError(f"this installation has no bundled model ({path} is missing); name a model")
        return path
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"the model is {show(name)}; it must be a directory, a file or a Hub id")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as e:  # a name too long, no permission; "~" of nobody
        raise CheckpointError(f"the model is {show(name)}: {getattr(e, 'strerror', None) or e}") from None
    if isinstance(model, str):
        from pyengine.model.hub import download, is_hub_id

        if is_hub_id(name):
            return download(name, revision, local_files_only=local_files_only)
    shown = name if name.isprintable() else show(name)
    raise CheckpointError(f"{shown} does not exist; the model must be a directory, a file or a Hub id")


def _find_weights(directory: Path) -> Path:
    for name in WEIGHT_FILES:
        if (directory / name).exists():
            return directory / name
    raise CheckpointError(
        f"{directory} has no weights: expected {', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]}"
        + _hint_for(directory, "name that file as the model to load it")
    )


def _hint_for(directory: Path, what_to_do: str) -> str:
    """What the directory holds instead, if that is a known thing; ``what_to_do`` with loose weights."""
    names = sorted(os.listdir(directory))
    if "adapter_config.json" in names:
        return "; it holds an adapter (PEFT): merge it into its base model first"
    others = [n for n in names if n.endswith(_OTHER_FORMATS)]
    if others:
        return f"; it holds {', '.join(others[:3])}: convert it with transformers (save_pretrained)"
    loose = [n for n in names if n.endswith((".safetensors", ".bin"))]
    if loose:
        return f"; it holds {', '.join(loose[:3])}: {what_to_do}"
    return ""


def _read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """All tensors of a weight file or of the shards of an index, by their names in the files."""
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return _reader(path)(path), (path,)


def _reader(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    if path.suffix == ".safetensors":
        return lambda p: read_safetensors(p).tensors
    if path.suffix == ".bin":
        from pyengine.model.torch_bin import read_torch_bin

        return read_torch_bin
    raise _not_a_weight_file(path)


def _require_weight_file(path: Path) -> None:
    if not path.name.endswith((".safetensors", ".bin", INDEX_SUFFIX)):
        raise _not_a_weight_file(path)


def _not_a_weight_file(path: Path) -> CheckpointError:
    remedy = "; convert it with transformers (save_pretrained)" if path.name.endswith(_OTHER_FORMATS) else ""
    return CheckpointError(
        f"{path} is not a weight file that pyengine reads (.safetensors, .bin or {INDEX_SUFFIX}){remedy}"
    )


def _read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    weight_map = read_json_object(index, CheckpointError, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {show(weight_map)}; it must map tensors to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{index}: weight_map places tensor {show(name)} in {show(file)}; "
                "it must be the name of a file in the same directory"
            )
    shards = sorted(set(weight_map.values()))
    # os.path: False, where pathlib raises for a name that is too long or not Unicode
    absent = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
    if absent:
        listed = ", ".join(show(shard)[1:-1] for shard in absent[:4]) + (", ..." if len(absent) > 4 else "")
        raise CheckpointError(f"{index}: {len(absent)} of {len(shards)} shards are missing: {listed}")
    contents = {shard: _reader(index.parent / shard)(index.parent / shard) for shard in shards}
    tensors = {}
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise CheckpointError(
                f"{index}: weight_map places tensor {show(name)} in {shard}, but that file does not have it"
            )
        tensors[name] = contents[shard][name]
    for content in contents.values():  # what the index does not list can only be unused
        for name, tensor in content.items():
            tensors.setdefault(name, tensor)
    return tensors, tuple(index.parent / shard for shard in shards)


def _is_plain_name(file: str) -> bool:
    return file not in ("", ".", "..") and not set(file) & set("/\\\0:")
