"""``tools/replay_tables.py`` on short texts of the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.replay_tables import KINDS, text_of

TOOL = Path(__file__).resolve().parents[2] / "tools/replay_tables.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_text(kind: str) -> None:
    assert text_of(kind, 1) == text_of(kind, 1) != text_of(kind, 2)
    assert len(text_of(kind, 1)) > 4000


def test_each_text_is_replayed_with_and_without_drafts() -> None:
    sizes = ("--prompt-tokens", "100", "--new-tokens", "60", "--repeats", "1", "--threads", "1")
    result = run("--kinds", "noise,sensors", "--seeds", "1,2", "--json", *sizes)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["file"], row["seed"]) for row in rows] == [
        ("noise", 1), ("noise", 2), ("sensors", 1), ("sensors", 2)
    ]  # fmt: skip
    for row in rows:
        assert (row["prompt_tokens"], row["new_tokens"], row["method"]) == (100, 60, "ngram")
        assert row["ratio_median"] > 0 and row["tokens_per_step"] > 1


def test_texts_are_shown_and_unknown_ones_refused() -> None:
    assert run("--show", "sql", "--seeds", "3").stdout == text_of("sql", 3)
    result = run("--kinds", "sql,novel")
    assert result.returncode == 2 and "novel: there are sensors" in result.stderr
