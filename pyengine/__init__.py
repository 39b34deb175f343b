"""pyengine: GPT-2 inference with its own kernels.

    from pyengine import LLM, SamplingParams

    llm = LLM("path/to/checkpoint")
    print(llm.generate("Hello, my dog is cute", SamplingParams(max_tokens=64))[0].outputs[0].text)

Names are imported when first used, so that ``import pyengine`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyengine.decoding.constraints import StructuredOutputsParams
    from pyengine.decoding.params import SamplingParams
    from pyengine.errors import (
        CheckpointError,
        ClosedError,
        ConfigError,
        InternalError,
        OutOfMemory,
        PyEngineError,
        RequestError,
        TokenizerError,
        TrainingError,
    )
    from pyengine.llm import LLM
    from pyengine.outputs import (
        Choice,
        CompletionOutput,
        EngineStats,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoreOutput,
        StreamDelta,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "Choice",
    "ClosedError",
    "CompletionOutput",
    "ConfigError",
    "EngineStats",
    "InternalError",
    "Logprob",
    "OutOfMemory",
    "PyEngineError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StreamDelta",
    "StructuredOutputsParams",
    "TokenizerError",
    "TrainingError",
    "__version__",
]

_ERRORS = {name for name in __all__ if name.endswith("Error")} | {"OutOfMemory"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
    if name == "LLM":
        module = "pyengine.llm"
    elif name == "SamplingParams":
        module = "pyengine.decoding.params"
    elif name == "StructuredOutputsParams":
        module = "pyengine.decoding.constraints"
    else:
        module = "pyengine.errors" if name in _ERRORS else "pyengine.outputs"
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
