"""``pyengine-cli doctor``: what this machine and this installation are, and whether they work together."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import pyengine
from pyengine.cli import _options, _text

_EPILOG = """\b
Examples:
  pyengine-cli doctor
  PYENGINE_ISA=avx2 pyengine-cli doctor     force an instruction set, and test it
  pyengine-cli doctor --json                for a report

\b
--json: sizes are bytes, times seconds, and what is missing is null.
Exit status 1 if something that pyengine needs is missing or the self-test fails.
"""

_NEEDED = ("click", "numpy", "rich", "sentencepiece", "tokenizers")
_OPTIONAL = {"huggingface_hub": "Hub ids as --model", "torch": "pytorch_model.bin"}


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@_options.threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(threads: int | None, as_json: bool) -> None:
    """Versions, instruction sets, threads, memory; then a self-test on the bundled model.

    The self-test generates a few tokens on one thread and on all, which must agree.
    """
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": _versions,
        "processor": _processor,
        "threads": _threads,
        "memory": _memory,
        "cuda": _cuda,
        "self_test": lambda: _self_test(threads),
    }
    report: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        try:
            report[name] = check()
        except Exception as error:  # a broken installation is what this command is there to describe
            if os.environ.get("PYENGINE_DEBUG") == "1":
                raise
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    failed = [name for name, values in report.items() if "error" in values]
    if as_json:
        _text.print_json({**report, "ok": not failed})
    else:
        for name, values in report.items():
            click.echo(name.replace("_", "-"))
            for key, value in values.items():
                click.echo(f"  {_label(key):<22} {_show(key, value)}")
        click.echo(f"failed: {', '.join(failed).replace('_', '-')}" if failed else "all well")
    if failed:
        sys.exit(1)


def _label(key: str) -> str:
    """``total_bytes`` as "total"; names of packages and variables as they are."""
    if key.isupper() or key in _OPTIONAL:
        return key
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _show(key: str, value: Any) -> str:
    """For people; --json has the values as they are."""
    if value is None:
        return f"not installed (optional: {_OPTIONAL[key]})" if key in _OPTIONAL else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key.endswith("_bytes"):
        return _text.binary_size(value)
    if key.endswith("_seconds"):
        return f"{value * 1e3:.0f} ms"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"pyengine": pyengine.__version__, "python": platform.python_version()}
    versions["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    versions.update({name: _version(name) for name in (*_NEEDED, *_OPTIONAL)})
    missing = [name for name in _NEEDED if versions[name] is None]
    if missing:
        versions["error"] = f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}"
    return versions


def _processor() -> dict[str, Any]:
    from pyengine import _C

    return {
        "name": _field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "instruction_sets": _C.available_isas(),
        "in_use": _C.ExecContext(1).isa,
        "PYENGINE_ISA": os.environ.get("PYENGINE_ISA"),
    }


def _threads() -> dict[str, Any]:
    from pyengine import _C

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "processors": os.cpu_count(),
        "allowed_by_affinity": affinity,
        "default": _C.default_num_threads(),  # cgroup quota included
    }


def _memory() -> dict[str, Any]:
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total_bytes": _kilobytes("MemTotal"),
        "available_bytes": _kilobytes("MemAvailable"),
        "cgroup_limit_bytes": int(limit) if limit.isdigit() else None,
    }


def _cuda() -> dict[str, Any]:
    from pyengine import cuda
    from pyengine.errors import ConfigError

    library = cuda.find_library()
    if library is None:
        return {"available": False, "reason": "not in this build", "how": "docs/cuda.md, Install"}
    try:
        gpu = cuda.find_device()
    except ConfigError as error:  # no fault of the installation
        return {"available": False, "reason": str(error), "library": str(library)}
    return {
        "available": True,
        "name": gpu.name,
        "capability": "{}.{}".format(*gpu.capability),
        "total_bytes": gpu.total_memory,
        "free_bytes": gpu.free_memory,
        "library": str(library),
        "architectures": gpu.architectures,
    }


def _kilobytes(field: str) -> int | None:
    """A field of /proc/meminfo, in bytes."""
    value = _field("/proc/meminfo", field)
    return int(value.split()[0]) * 1024 if value else None


def _self_test(threads: int | None) -> dict[str, Any]:
    from pyengine import LLM, SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    start = time.perf_counter()
    llm = LLM(num_threads=threads)
    loaded = time.perf_counter()
    tokens = llm.generate("The old house", greedy)[0].outputs[0].token_ids
    done = time.perf_counter()
    alone = LLM(num_threads=1).generate("The old house", greedy)[0].outputs[0].token_ids
    result: dict[str, Any] = {
        "load_seconds": round(loaded - start, 6),
        "tokens_per_second": round(len(tokens) / (done - loaded), 1),
        "threads_agree": tokens == alone,
    }
    if tokens != alone:
        result["error"] = f"one thread gives {alone}, all threads {tokens}; please report this"
    return result


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(path: str, name: str) -> str | None:
    """Value of the first ``name: value`` line of a file of /proc."""
    for line in _read(path).splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() == name:
            return value.strip()
    return None
