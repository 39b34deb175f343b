"""Files that are whole or not there: written beside their name, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyengine.errors import ConfigError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``path`` when the block ends, and vanishes when the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_json(path: Path, value: Any) -> None:
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    write_atomically(path, lambda file: file.write(data))


def _sync_directory(directory: Path) -> None:
    """So that the rename itself is on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable_directory(directory: Path, option: str) -> None:
    """Create it; ConfigError unless files can be written there."""
    probe = directory / f".write-test.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"pyengine")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {directory}: cannot be written to: {error.strerror}") from None
