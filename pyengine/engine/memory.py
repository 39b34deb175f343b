"""How much memory there is, and how many KV blocks to plan with."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyengine.engine.scheduler import blocks_for
from pyengine.errors import ConfigError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(value: int | str, field: str = "kv_cache_memory") -> int:
    """Bytes of ``512MiB``, ``1.5 GB`` or a number of bytes; ConfigError otherwise."""
    size: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[2].lower().removesuffix("b") + "b") if match else None
        if match is not None and unit is not None:
            size = float(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size is None or not 1 <= size < 2**63:
        raise ConfigError(
            f'{field}={value!r}: must be a number of bytes above 0, or text like "512MiB" or "2GB"'
        )
    return int(size)


def available_memory() -> int | None:
    """Bytes that this process could still take: MemAvailable, and what its cgroup leaves; None if unknown."""
    found = [size for size in (_mem_available(), _cgroup_headroom()) if size is not None]
    return min(found) if found else None


def kv_blocks(
    block_bytes: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory: int | str | None,
    budget: int | None,
) -> int:
    """Blocks of the KV cache: what ``kv_cache_memory`` holds, or the default that ``LLM`` documents, which
    takes no more than ``budget`` bytes."""
    if kv_cache_memory is not None:
        size = parse_size(kv_cache_memory)
        if size < block_bytes:
            raise ConfigError(
                f"kv_cache_memory={kv_cache_memory!r} holds no block of the KV cache (16 tokens, "
                f"{block_bytes} bytes): one sequence of {max_model_len} tokens needs "
                f"{blocks_for(max_model_len) * block_bytes} bytes"
            )
        return min(size // block_bytes, 2**31 - 1)
    one = blocks_for(max_model_len)
    wanted = one * max_num_seqs
    if budget is not None:
        wanted = min(wanted, budget // block_bytes)
    return min(max(one, wanted), 2**31 - 1)


def _mem_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # systems without /proc: all of the memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_headroom() -> int | None:
    """The least that any group from this process's up to the root leaves; file cache counts as free."""
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    left: list[int] = []
    for group in groups:
        _, _, rest = group.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        directory = root / path.lstrip("/")
        # In a container the path may be the host's; its own group is then mounted at the root.
        for level in (directory, *directory.parents):
            left += _level_headroom(level, limit, usage)
            if level == root:
                break
    return min(left) if left else None


def _level_headroom(directory: Path, limit: str, usage: str) -> list[int]:
    try:
        maximum = int((directory / limit).read_text(encoding="ascii"))  # "max": no limit
        used = int((directory / usage).read_text(encoding="ascii"))
        cached = 0
        for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                cached = int(value)
    except (OSError, ValueError):
        return []
    return [max(0, maximum - used + cached)]
