"""From texts to tokens on the disk: shards that are mapped, and a manifest that says what they were made of.

A data directory holds ``manifest.json``, ``tokenizer/``, and ``train-00000.bin`` … of little-endian uint16
or uint32. It is made once and used again as long as sources, split and tokenizer are the same.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ConfigError
from pyengine.model.json_file import read_json_object
from pyengine.train import corpus
from pyengine.train.files import write_json
from pyengine.train.options import TrainOptions
from pyengine.train.tokenizers import TRAINED, TextEncoder, copy_tokenizer, fingerprint, train_tokenizer

SHARD_TOKENS = 1 << 26
_BATCH_PIECES = 32  # tokenised together, by all threads
_FORMAT = 1

Progress = Callable[[str, float], object]  # what is being done, and the part of it that is done


class TokenStore:
    """The tokens of one split, in mapped shards: read like one array."""

    def __init__(self, directory: Path, shards: Sequence[dict[str, Any]], dtype: str) -> None:
        self._shards = [np.memmap(directory / s["file"], dtype=np.dtype(dtype), mode="r") for s in shards]
        self._starts = np.cumsum([0, *(len(s) for s in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """(B, length) tokens from each of ``starts`` (B,)."""
        if len(self._shards) == 1:
            return self._shards[0][starts[:, None] + np.arange(length)].astype(np.int64)
        return np.stack([self.slice(int(s), int(s) + length) for s in starts])

    def slice(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens [begin, end), across shards."""
        parts = []
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while begin < end:
            offset = begin - int(self._starts[shard])
            part = self._shards[shard][offset : offset + end - begin]
            parts.append(part.astype(np.int64))
            begin += len(part)
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


@dataclass(frozen=True)
class Dataset:
    """Tokens of both splits; ``manifest`` has the counts of documents, characters and bytes."""

    directory: Path
    manifest: dict[str, Any]

    def store(self, split: str) -> TokenStore:
        return TokenStore(self.directory, self.manifest["splits"][split]["shards"], self.manifest["dtype"])

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer"

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def identity(self) -> str:
        """Hash of the tokens: what a resumed run compares."""
        shards = [s["sha256"] for split in self.manifest["splits"].values() for s in split["shards"]]
        return hashlib.sha256("".join(shards).encode()).hexdigest()


def prepare(options: TrainOptions, directory: Path, tokenizer: Path | None, progress: Progress) -> Dataset:
    """The dataset that the options ask for, from ``directory`` if it is there already.

    ``tokenizer``: directory of an existing one; None: train one. ConfigError for every fault of the data.
    """
    texts = _Texts(options, directory)
    sp_type = options.sentencepiece_type if options.tokenizer == "sentencepiece" else None
    wanted: dict[str, Any] = {
        "format": _FORMAT,
        "val_fraction": None if options.val_data else options.val_fraction,
        "tokenizer": {"files": fingerprint(tokenizer)}
        if tokenizer
        else {
            "kind": options.tokenizer,
            "vocab_size": options.vocab_size,
            "sentencepiece_type": sp_type,
        },
    }
    manifest_file = directory / "manifest.json"
    if manifest_file.is_file():
        manifest = read_json_object(manifest_file, ConfigError)
        if {k: manifest.get(k) for k in wanted} == wanted and texts.unchanged(manifest.get("sources")):
            if _complete(directory, manifest):
                return Dataset(directory, manifest)
        manifest_file.unlink()
    progress("reading", 0.0)
    texts.scan()
    trained = directory / "tokenizer"
    shutil.rmtree(trained, ignore_errors=True)
    if tokenizer:
        copy_tokenizer(tokenizer, trained)
    else:
        assert options.tokenizer in TRAINED
        progress("training the tokenizer", 0.0)
        everything = options.tokenizer == "char"  # the characters of the validation text belong to it, too
        train_tokenizer(
            options.tokenizer,
            lambda: texts.pieces(everything),
            options.vocab_size,
            options.sentencepiece_type,
            trained,
        )
    encoder = TextEncoder(trained)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    manifest = {
        **wanted,
        "sources": texts.sources,
        "fingerprint": fingerprint(trained),
        "vocab_size": encoder.vocab_size,
        "document_start": encoder.document_start,
        "dtype": dtype,
        "splits": _write_splits(texts, encoder, directory, dtype, progress),
    }
    write_json(manifest_file, manifest)
    return Dataset(directory, manifest)


class _Texts:
    """Training and validation texts of the options."""

    def __init__(self, options: TrainOptions, directory: Path) -> None:
        field = options.text_field
        self._train = corpus.find_sources(options.data, field, directory / "standard-input", "--data")
        self._val = corpus.find_sources(
            options.val_data, field, directory / "standard-input-val", "--val-data"
        )
        self._fraction = options.val_fraction
        self.sources: list[dict[str, Any]] = []

    def unchanged(self, recorded: object) -> bool:
        """Whether the files are those of a manifest: same names, sizes and times (or hashes)."""
        files = [*self._train, *self._val]
        if not isinstance(recorded, list) or [r.get("name") for r in recorded] != [f.name for f in files]:
            return False
        for record, source in zip(recorded, files, strict=True):
            stat = source.path.stat()
            if stat.st_size != record["bytes"]:
                return False
            if stat.st_mtime_ns != record["mtime_ns"]:
                with source.path.open("rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 20):
                        digest.update(block)
                if digest.hexdigest() != record["sha256"]:
                    return False
        return True

    def scan(self) -> None:
        first = corpus.scan(self._train)
        self.characters = first.num_characters
        self.sources = first.sources
        if self._val:
            self.split = corpus.Split(frozenset())
            second = corpus.scan(self._val)
            self.characters += second.num_characters
            self.sources = first.sources + second.sources
        else:
            self.split = corpus.split(first, self._fraction)
        for record, source in zip(self.sources, [*self._train, *self._val], strict=True):
            record["mtime_ns"] = source.path.stat().st_mtime_ns

    def read(self, validation: bool) -> Iterator[tuple[bool, str]]:
        if validation and self._val:
            return corpus.read_split(self._val, corpus.Split(frozenset()), False)
        return corpus.read_split(self._train, self.split, validation)

    def pieces(self, everything: bool) -> Iterator[str]:
        """Texts to train a tokenizer on."""
        yield from (piece for _, piece in self.read(False))
        if everything:
            yield from (piece for _, piece in self.read(True))


def _write_splits(
    texts: _Texts, encoder: TextEncoder, directory: Path, dtype: str, progress: Progress
) -> dict[str, Any]:
    splits, done = {}, 0
    for name in ("train", "val"):
        writer = _ShardWriter(directory, name, np.dtype(dtype))
        counts = {"documents": 0, "characters": 0, "bytes": 0}
        batch: list[tuple[bool, str]] = []
        for item in chain(texts.read(name == "val"), [None]):
            if item is not None:
                batch.append(item)
            if batch and (item is None or len(batch) == _BATCH_PIECES):
                for (begins, piece), ids in zip(batch, encoder.encode([p for _, p in batch]), strict=True):
                    if begins:
                        writer.write(encoder.document_start)
                    writer.write(ids)
                    counts["documents"] += begins
                    counts["characters"] += len(piece)
                    counts["bytes"] += len(piece.encode("utf-8"))
                    done += len(piece)
                batch = []
                progress("tokenising", done / texts.characters)
        shards = writer.close()
        splits[name] = {**counts, "tokens": sum(s["tokens"] for s in shards), "shards": shards}
    return splits


class _ShardWriter:
    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        self._buffer = array("I")
        self._shards: list[dict[str, Any]] = []
        for old in directory.glob(f"{name}-*.bin"):
            old.unlink()

    def write(self, ids: Sequence[int]) -> None:
        self._buffer.extend(ids)
        while len(self._buffer) >= SHARD_TOKENS:
            self._flush(SHARD_TOKENS)

    def _flush(self, count: int) -> None:
        file = self._directory / f"{self._name}-{len(self._shards):05d}.bin"
        data = np.frombuffer(self._buffer, np.uint32)[:count].astype(self._dtype).tobytes()
        file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        self._shards.append({"file": file.name, "tokens": count, "sha256": digest})
        self._buffer = self._buffer[count:]

    def close(self) -> list[dict[str, Any]]:
        if self._buffer:
            self._flush(len(self._buffer))
        return self._shards


def _complete(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether the shards and the tokenizer are there and as large as the manifest says."""
    size = np.dtype(manifest["dtype"]).itemsize
    shards = [s for split in manifest["splits"].values() for s in split["shards"]]
    for shard in shards:
        file = directory / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["tokens"] * size:
            return False
    tokenizer = directory / "tokenizer"
    return tokenizer.is_dir() and fingerprint(tokenizer) == manifest["fingerprint"]


def check_lengths(dataset: Dataset, block_size: int) -> None:
    """ConfigError unless each split that is there fills a sequence."""
    for name, what in (("train", "training"), ("val", "validation")):
        tokens = dataset.manifest["splits"][name]["tokens"]
        if name == "val" and tokens == 0:
            continue
        needed = block_size + 1 if name == "train" else 2
        if tokens < needed:
            raise ConfigError(
                f"--block-size {block_size}: the {what} data has only {tokens} tokens, and one sequence "
                f"needs {needed}; give more data or a smaller --block-size"
            )


class Batches:
    """The sequences of every step: each epoch takes all windows of the data once, in an order of its own.

    The order depends on the seed and the number of the step alone, so that a run can go on anywhere, and
    any number of processes share the same global batch.
    """

    def __init__(self, store: TokenStore, block_size: int, batch_size: int, grad_accum: int, seed: int):
        self._store, self._block = store, block_size
        self._batch_size, self._grad_accum, self._seed = batch_size, grad_accum, seed
        windows = (len(store) - 1) // block_size
        self._shifts = windows > 1  # each epoch begins at another offset, which may cost the last window
        self.per_epoch = windows - 1 if self._shifts else windows
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def starts(self, numbers: range) -> npt.NDArray[np.int64]:
        """Where in the data the sequences of these global numbers start."""
        found = np.empty(len(numbers), np.int64)
        for at, number in enumerate(numbers):
            epoch, index = divmod(number, self.per_epoch)
            if epoch != self._epoch:
                rng = np.random.default_rng([self._seed, epoch])
                offset = int(rng.integers(self._block)) if self._shifts else 0
                self._order = rng.permutation(self.per_epoch) * self._block + offset
                self._epoch = epoch
            found[at] = self._order[index]
        return found

    def batch(self, step: int, micro: int, rank: int = 0, world: int = 1) -> npt.NDArray[np.int64]:
        """(B, T + 1) tokens of a micro-batch: this process's share of ``batch_size`` sequences."""
        share = self._batch_size // world
        first = (step * self._grad_accum + micro) * self._batch_size + rank * share
        return self._store.windows(self.starts(range(first, first + share)), self._block + 1)
