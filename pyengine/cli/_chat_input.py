"""Lines of a conversation: from a terminal, with editing and history, or from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from pyengine.cli import _text

_MAX_HISTORY = 1000  # lines


def default_history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "pyengine" / "chat_history"


class Pipe:
    """Each line of standard input; one that ends in a backslash goes on in the next."""

    is_terminal = False

    def read(self) -> str | None:
        """A message; None at the end of the input."""
        lines: list[str] = []
        while True:
            data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
            if not data:
                return "\n".join(lines) if lines else None
            line = _text.decode(data, "standard input").rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def close(self) -> None:
        pass


class Terminal:
    """Lines from a person: GNU readline (or libedit) edits them and completes commands."""

    is_terminal = True

    def __init__(
        self, prompt: str, history: Path | None, complete: Callable[[str], Sequence[str]]
    ) -> None:
        self._prompt, self._history = prompt, history
        self._complete = complete
        self._found: Sequence[str] = ()
        try:
            import readline
        except ImportError:  # a Python without it: lines come as the terminal gives them
            self._readline = None
            return
        self._readline = readline
        readline.set_completer(self._completion)
        readline.set_completer_delims("\n")
        editor = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if editor else "tab: complete")
        if history is not None:
            try:
                readline.read_history_file(history)
            except OSError:  # none yet
                pass
        readline.set_history_length(_MAX_HISTORY)

    def _completion(self, text: str, state: int) -> str | None:
        if state == 0:
            self._found = self._complete(text)
        return self._found[state] if state < len(self._found) else None

    def read(self) -> str | None:
        """A message; None after Ctrl-D. KeyboardInterrupt after Ctrl-C, which drops the line."""
        lines: list[str] = []
        while True:
            try:
                line = input("...> " if lines else self._prompt)
            except EOFError:
                click.echo()
                return None
            except UnicodeDecodeError:
                _text.note("this line is not UTF-8 text; please type it again")
                continue
            line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def close(self) -> None:
        """Keep the history, for this user alone to read."""
        if self._readline is None or self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.write_history_file(self._history)
        except OSError as error:
            _text.note(f"warning: {self._history}: {error.strerror or error}: the history is not kept")
