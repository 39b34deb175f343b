"""Opening what a checkpoint's directory holds: regular files only, of a size that a small file may have."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from pyengine.errors import PyEngineError

MAX_BYTES = 100_000_000  # of JSON and tokenizer files; what safetensors allows its header, too


def open_file(path: str | os.PathLike[str], error: type[PyEngineError]) -> BinaryIO:
    """A regular file, for reading. A pipe would wait for its writer for ever, and a device may not end.

    ``error`` names what is missing, unreadable or of another kind.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as e:  # ValueError: a path with a null character
        raise unreadable(path, e, error) from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "Is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
        raise error(f"cannot read {os.fspath(path)}: {kind}")
    return os.fdopen(fd, "rb")


def read_file(path: str | os.PathLike[str], error: type[PyEngineError]) -> bytes:
    """All of a small file; ``error`` if it cannot be read or has more than MAX_BYTES."""
    require_small(path, error)
    with open_file(path, error) as file:
        try:
            return file.read(MAX_BYTES)
        except OSError as e:
            raise unreadable(path, e, error) from None


def require_small(path: str | os.PathLike[str], error: type[PyEngineError]) -> None:
    """``error`` if the file has more than MAX_BYTES."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as e:
        raise unreadable(path, e, error) from None
    if size > MAX_BYTES:
        raise error(f"{os.fspath(path)} is {size} bytes long; files of its kind may have {MAX_BYTES}")


def unreadable(path: str | os.PathLike[str], cause: Exception, error: type[PyEngineError]) -> PyEngineError:
    return error(f"cannot read {os.fspath(path)}: {getattr(cause, 'strerror', None) or cause}")
