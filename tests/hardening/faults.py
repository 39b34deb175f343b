"""What a table of malformed inputs holds, and what every one of them must come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from pyengine.cli import main
from pyengine.errors import PyEngineError

Change = Callable[[Path], object]


class Fault(NamedTuple):
    """``change`` makes a good checkpoint directory bad; the message of the error names ``fragments``."""

    change: Change
    kind: type[PyEngineError]
    fragments: tuple[str, ...]


def refused(call: Callable[[], object], kind: type[PyEngineError], fragments: tuple[str, ...]) -> None:
    """``call`` raises an error of that class, whose message says all that and is one short line."""
    with pytest.raises(PyEngineError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for fragment in fragments:
        assert fragment in message, message
    assert len(message) < 900 and "\n" not in message


def command(*arguments: str, input: bytes | str | None = None) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, arguments, input=input)


def refused_command(
    *arguments: str, fragments: tuple[str, ...], input: bytes | str | None = None, code: int = 1
) -> Result:
    """A command that prints no result, but lines that say all that, and is not called a bug."""
    result = command(*arguments, input=input)
    errors = result.stderr
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == "", result.stdout
    assert errors.endswith("\n") and "Traceback" not in errors and "internal error" not in errors
    if code == 1:
        assert all(line.startswith("pyengine: ") for line in errors.splitlines()), errors
    for fragment in fragments:
        assert fragment in errors, errors
    return result
