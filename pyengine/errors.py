"""Every exception that pyengine raises on purpose.

A message says what was wrong, where (file, tensor, field, value) and what to do. The extension module
raises the same classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyengine.outputs import RequestOutput

__all__ = [
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "InternalError",
    "OutOfMemory",
    "PyEngineError",
    "RequestError",
    "TokenizerError",
    "TrainingError",
]


class PyEngineError(Exception):
    """Base class of all errors of pyengine.

    outputs: of a ``generate`` call for several prompts, one RequestOutput per prompt; those that failed have
        an ``error`` instead of texts. None elsewhere.
    """

    outputs: list[RequestOutput] | None = None


class CheckpointError(PyEngineError):
    """A checkpoint is missing or damaged, was changed while in use, holds tensors that do not fit its
    configuration, or numbers that lead to NaN."""


class ConfigError(PyEngineError, ValueError):
    """A configuration, or an argument of ``LLM``, has a value that cannot work."""


class TokenizerError(PyEngineError):
    """Tokenizer files are missing or damaged, or a text cannot be encoded."""


class RequestError(PyEngineError, ValueError):
    """A prompt or its sampling parameters cannot be served; other requests are not affected."""


class TrainingError(PyEngineError):
    """Training cannot go on: the loss is not finite, or a checkpoint cannot be written."""


class OutOfMemory(PyEngineError, MemoryError):
    """Memory, or the blocks of the KV cache, ran out."""


class ClosedError(PyEngineError):
    """The LLM was closed while the request ran, or before it came."""


class InternalError(PyEngineError):
    """A fault of pyengine itself (please report it), or the use of an LLM in a forked process."""
