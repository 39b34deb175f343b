from __future__ import annotations

import pytest

from pyengine import backends
from pyengine.engine import memory
from pyengine.errors import ConfigError
from pyengine.model.checkpoint import load_checkpoint


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (12345, 12345),
        ("12345", 12345),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2g", 2 * 10**9),
        ("64KiB", 65536),
        ("7B", 7),
    ],
)
def test_parse_size(value: int | str, size: int) -> None:
    assert memory.parse_size(value) == size


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, None, "", "MiB", "12 apples", "-3MB", "0", "1e9", "9999999TiB"]
)
def test_sizes_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory="):
        memory.parse_size(value)  # type: ignore[arg-type]


def blocks(
    available: int | None, monkeypatch: pytest.MonkeyPatch, kv_cache_memory: int | str | None = None
) -> int:
    monkeypatch.setattr(backends, "available_memory", lambda: available)
    budget = backends.Cpu().kv_budget(load_checkpoint(None), "float32", None, 4, 100)
    return memory.kv_blocks(
        1000, max_model_len=100, max_num_seqs=4, kv_cache_memory=kv_cache_memory, budget=budget
    )


def test_default_is_enough_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(10**9, monkeypatch) == 4 * 7
    assert blocks(None, monkeypatch) == 4 * 7


def test_default_takes_a_quarter_of_the_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(80_000, monkeypatch) == 20


def test_default_holds_one_sequence_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(1000, monkeypatch) == 7


def test_given_memory_counts_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(1000, monkeypatch, 3500) == 3
    assert blocks(1000, monkeypatch, "1MB") == 1000


def test_less_than_a_block_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="1000 bytes.*100 tokens needs 7000"):
        blocks(10**9, monkeypatch, 999)


def test_available_memory_is_plausible() -> None:
    size = memory.available_memory()
    assert size is None or 2**20 < size < 2**50


def test_cgroup_limit(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    group = Path(str(tmp_path))
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 200000\nactive_file 7\n")
    assert memory._level_headroom(group, "memory.max", "memory.current") == [500000]
    (group / "memory.max").write_text("max\n")
    assert memory._level_headroom(group, "memory.max", "memory.current") == []
