"""The text that most tests train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.helpers import write_text


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
