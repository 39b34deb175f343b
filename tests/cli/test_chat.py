"""``chat``: through a pipe within this process, and on a terminal of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyengine import LLM, SamplingParams
from pyengine.cli._chat_session import COMMANDS, SETTINGS, completions
from tests.cli.conftest import Run
from tests.cli.test_process import SLOWLY

GREEDY = ("chat", "--quiet", "--temperature", "0", "--max-tokens", "12")


def test_replies_continue_the_transcript(run: Run) -> None:
    result = run(*GREEDY, "--system", "A play.", input="Who are you?\n\nAnd the king?\n")
    llm = LLM()
    params = SamplingParams(temperature=0, max_tokens=12, stop=["\nUser:", "\nBot:"])
    first = llm.generate("A play.\n\nUser: Who are you?\nBot:", params)[0].outputs[0].text.strip()
    prompt = f"A play.\n\nUser: Who are you?\nBot: {first}\nUser: And the king?\nBot:"
    second = llm.generate(prompt, params)[0].outputs[0].text.strip()
    assert first and second
    assert (result.exit_code, result.stdout.replace(" \n", "\n"), result.stderr) == (
        0,
        f"{first}\n{second}\n",
        "",
    )


def test_a_backslash_joins_lines(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    assert run(*GREEDY, input=f"one\\\ntwo\n/save {path}\nlast, without an end\\").exit_code == 0
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "one\ntwo"}


def test_commands(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    script = f"""Hello
/set top-k 5
/set stop ["x", "y"]
/set max_new_tokens=3
/set
/save {path}
/undo
/history
/undo
/load {path}
/history
/system A play.
/system
/reset
/history
/set temperature none
/set
/quit
not read any more
"""
    result = run(*GREEDY[:1], *GREEDY[2:], input=script)
    assert result.exit_code == 0, result.stderr
    reply = json.loads(path.read_text())["messages"][1]["content"]
    settings = 'max_tokens = 3\nstop = ["x", "y"]\n'
    assert result.stdout.replace(" \n", "\n") == (
        f"{reply}\n{settings}temperature = 0.0\ntop_k = 5\n"
        f"user: Hello\nassistant: {reply}\nA play.\n{settings}top_k = 5\n"
    )
    for note in (
        'taken back: "Hello"',
        "nothing to take back",
        f"2 turns in {path}",
        f"2 turns from {path}",
        "a new conversation",
    ):
        assert result.stderr.count(note) == 1


def test_retry_gives_another_reply(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    options = ("chat", "--quiet", "--max-tokens", "24")
    result = run(*options, input=f"Hello, sir.\n/retry\n/retry\n/save {path}\n")
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert result.stdout.rstrip().endswith(messages[1]["content"])
    assert len(result.stdout) > len(messages[1]["content"]) + 10


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/nope", "/nope is no command"),
        ("/set temperatur 1", "temperatur: no such setting here; there are "),
        ("/set n 2", "n: no such setting"),
        ("/set top_p", "the value is missing"),
        ("/set top_p 2", "top_p=2: must be a number above 0 and up to 1"),
        ("/set temperature warm", "temperature='warm': must be"),
        ("/save", "the name of the file is missing"),
        ("/load /nonexistent/talk.json", "/nonexistent/talk.json: No such file"),
        ("/retry", "there is no message yet"),
        ("word " * 600, "the context holds 512, the reply included: shorten it"),
    ],
)
def test_errors_end_a_script(run: Run, line: str, hint: str) -> None:
    result = run(*GREEDY, input=f"{line}\nHello\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert hint in result.stderr


def test_refused_settings_before_loading(run: Run) -> None:
    result = run("chat", "--model", "/nonexistent/gpt2", "--top-p", "2", input="")
    assert result.exit_code == 2 and "top_p=2.0: must be" in result.stderr
    result = run("chat", "--format", "eos", "--system", "x", input="")
    assert result.exit_code == 1 and "no place for a system message" in result.stderr


def test_a_long_conversation_drops_its_oldest_turns(run: Run) -> None:
    lines = "".join(f"{number}: who was it that came to the old house?\n" for number in range(12))
    result = run("chat", "--temperature", "0", "--max-tokens", "20", "--max-model-len", "128", input=lines)
    assert result.exit_code == 0, result.stderr
    assert len(re.findall(r"the model does not see the \d+ oldest turns any more", result.stderr)) >= 2
    quiet = run(*GREEDY, "--max-model-len", "128", input=lines)
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_completions() -> None:
    assert completions("/un") == ["/undo"]
    assert completions("/set temp") == ["/set temperature "]
    assert completions("un") == []
    assert set(completions("/set ")) == {"/set ", *(f"/set {name} " for name in SETTINGS)}
    assert all(run.__doc__ for run in COMMANDS.values())


class Screen:
    """The other side of a terminal in which ``chat`` runs."""

    def __init__(self, fd: int) -> None:
        self._fd, self.text = fd, ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self, process: subprocess.Popen[bytes], pattern: str, start: int) -> int:
        """Ctrl-C at the prompt. CPython's readline sleeps through one that comes just before it waits for the
        next key."""
        for seconds in (2, 2, 2):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, start, seconds)
        return self.wait_for(pattern, start)

    def wait_for(self, pattern: str, start: int = 0, seconds: float = 60) -> int:
        """Until the pattern has been shown after ``start``; where it ends."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text[start:])):
            assert time.monotonic() < until, f"{pattern!r} was not shown: {self.text!r}"
            if select.select([self._fd], [], [], 1)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended before {pattern!r} was shown: {self.text!r}") from None
        return start + found.end()


@contextlib.contextmanager
def terminal(history: Path, *options: str) -> Iterator[tuple[Screen, subprocess.Popen[bytes]]]:
    """``chat`` on a terminal, each step 50 ms long."""
    ours, its = pty.openpty()
    fixed = ("--ignore-eos", "--seed", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "chat", *fixed, "--history-file", str(history), *options],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    os.close(its)
    try:
        yield Screen(ours), process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)
        os.close(ours)


def test_on_a_terminal(tmp_path: Path) -> None:
    history, talk = tmp_path / "state" / "history", tmp_path / "talk.json"
    with terminal(history, "--max-tokens", "400") as (screen, process):
        screen.wait_for("format transcript; /help lists commands")
        at = screen.wait_for("you> ")
        screen.type("Tell me all.\n")
        at = screen.wait_for(r"(?s)model> .*?[a-z]{2}", at)
        process.send_signal(signal.SIGINT)  # ends the reply only
        at = screen.wait_for("stopped; what was said stays", at)
        at = screen.wait_for("you> ", at)
        screen.type("half a li")
        at = screen.wait_for("half a li", at)
        at = screen.interrupt(process, "Ctrl-D ends the conversation", at)  # drops the line
        at = screen.wait_for("you> ", at)
        screen.type("/set top_p 2\n")
        at = screen.wait_for("top_p=2: must be a number", at)
        at = screen.wait_for("you> ", at)
        screen.type("/set max_tok\t2\n")  # completed
        at = screen.wait_for("you> ", at)
        screen.type("And then?\n")
        at = screen.wait_for("the reply is cut", at)
        at = screen.wait_for("you> ", at)
        screen.type(f"/save {talk}\n")
        at = screen.wait_for("4 turns in ", at)
        at = screen.wait_for("you> ", at)
        screen.type("\x04")
        assert process.wait(timeout=60) == 0
    messages = json.loads(talk.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "Tell me all." and messages[1]["content"]
    assert history.stat().st_mode & 0o777 == 0o600
    lines = [line for line in history.read_text().splitlines() if line != "_HiStOrY_V2_"]
    assert lines[0].replace("\\040", " ") == "Tell me all."
    with terminal(history, "--max-tokens", "2", "--no-history") as (screen, process):
        screen.wait_for("you> ")
        screen.type("\x04")
        assert process.wait(timeout=60) == 0


def test_the_history_of_earlier_sessions(tmp_path: Path) -> None:
    history = tmp_path / "history"
    for expected in ("first words", "first words, and more"):
        with terminal(history, "--max-tokens", "2") as (screen, process):
            at = screen.wait_for("you> ")
            screen.type("first words\n" if expected == "first words" else "\x1b[A\x1b[A\x1b[A, and more\n")
            at = screen.wait_for("the reply is cut", at)
            at = screen.wait_for("you> ", at)
            screen.type("/history\n")
            screen.wait_for(f"user: {expected}\r", at)
            screen.type("/quit\n")
            assert process.wait(timeout=60) == 0
