"""Fixtures for the tests of checkpoints and tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.small_checkpoint import make_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small float32 checkpoint, fresh for each test to damage."""
    make_model().save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"
