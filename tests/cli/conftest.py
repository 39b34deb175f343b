"""The command line within the test's process; tests/cli/test_process.py runs it in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

import pyengine
from pyengine.cli import main
from tests.cli.fake_llm import FakeLLM

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("generate", "text", input=b"...")``: exit code and output of a command."""

    def call(*args: str, input: bytes | str | None = None) -> Result:
        return CliRunner().invoke(main, args, input=input)

    return call


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeLLM]]:
    """Commands get a FakeLLM for their LLM; those made are in its ``made``."""
    monkeypatch.setattr(pyengine, "LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "has_tokenizer", True)
    monkeypatch.setattr(FakeLLM, "interrupt_after", None)
    yield FakeLLM
