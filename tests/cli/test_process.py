"""The command line in a process of its own: the bundled model, pipes, signals, and what gets imported."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CLI = (sys.executable, "-m", "pyengine")
# Slow enough that what must happen in the middle of a text happens there on any machine.
SLOWLY = """
import sys, time
from pyengine.cli import main
from pyengine.engine.engine import Engine
step = Engine.step
Engine.step = lambda self: (time.sleep(0.05), step(self))[1]
main(sys.argv[1:])
"""


def run(*arguments: str, input: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CLI, *arguments],
        input=input,
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        timeout=60,
    )


def start_slowly(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split())


def test_generate_imports_nothing_heavy() -> None:
    modules = modules_after(
        "from pyengine.cli import main\n"
        "main(['generate', '--quiet', '--max-tokens', '2', 'The'], standalone_mode=False)"
    )
    assert "pyengine._C" in modules
    heavy = {"torch", "numpy", "transformers", "huggingface_hub", "rich", "sentencepiece", "json.tool"}
    assert not heavy & modules
    others = {f"pyengine.cli.{name}" for name in ("score", "tokenize", "inspect", "doctor")}
    assert not others & modules


def test_import_pyengine_imports_nothing_heavy() -> None:
    modules = modules_after("import pyengine")
    assert not {"torch", "numpy", "transformers", "tokenizers", "click", "rich", "pyengine._C"} & modules


@pytest.mark.parametrize("command", ["generate", "chat", "score", "tokenize", "inspect", "doctor"])
def test_help_loads_one_command_and_no_engine(command: str) -> None:
    modules = modules_after(
        f"from pyengine.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass"
    )
    loaded = {name for name in modules if name.startswith("pyengine.cli.") and "._" not in name}
    assert loaded == {f"pyengine.cli.{command}"}
    assert not {"pyengine._C", "pyengine.llm", "numpy", "rich"} & modules


def test_every_way_of_asking_gives_the_same_text() -> None:
    greedy = ("generate", "--temperature", "0", "--max-tokens", "20")
    text = run(*greedy, "The old house").stdout
    assert len(text) > 20 and text.endswith(b"\n")
    assert run(*greedy, "-", input=b"The old house\n").stdout == text
    assert run(*greedy, "--no-stream", "The old house").stdout == text
    assert run(*greedy, "--threads", "1", "The old house").stdout == text
    row = json.loads(run(*greedy, "--json", "The old house").stdout)
    assert row["text"].encode() + b"\n" == text
    ids = ",".join(map(str, row["prompt_token_ids"]))
    assert run(*greedy, "--ids", ids).stdout == text
    row = json.loads(run(*greedy, "--json", "--file", "-", input=b'{"prompt": "The old house"}').stdout)
    assert row["text"].encode() + b"\n" == text


def test_the_reported_seed_gives_the_same_tokens() -> None:
    first = json.loads(run("generate", "--json", "--max-tokens", "20", "The").stdout)
    again = json.loads(
        run("generate", "--json", "--max-tokens", "20", "--seed", str(first["seed"]), "The").stdout
    )
    assert again["token_ids"] == first["token_ids"]


def test_standard_error_holds_the_summary_only() -> None:
    result = run("generate", "--max-tokens", "3", "The")
    assert result.stderr.count(b"\n") == 1 and b"tokens/s" in result.stderr
    assert run("generate", "--max-tokens", "3", "--quiet", "The").stderr == b""


@pytest.mark.parametrize("output_too", [False, True])
def test_progress_bar_on_a_terminal(output_too: bool) -> None:
    arguments = [*CLI, "generate", "--temperature", "0", "--max-tokens", "4", "The", "A"]
    plain = subprocess.run(arguments, capture_output=True, timeout=60).stdout
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        arguments,
        stdout=its_end if output_too else subprocess.PIPE,
        stderr=its_end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # end of file of a terminal
        while piece := os.read(terminal, 65536):
            shown += piece
    os.close(terminal)
    results = shown.replace(b"\r\n", b"\n") if output_too else process.communicate(timeout=60)[0]
    assert process.wait(timeout=60) == 0
    assert b"2/2" in shown and b"tokens/s" in shown
    for line in plain.splitlines():
        assert line in results.splitlines() if not output_too else line in results


def test_ctrl_c_keeps_what_was_generated() -> None:
    with start_slowly("generate", "--ignore-eos", "--max-tokens", "400", "The old house") as process:
        assert process.stdout and process.stderr
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert first and rest.endswith(b"\n")
    assert errors.startswith(b"pyengine: interrupted: ") and errors.count(b"\n") == 1


def test_ctrl_c_in_a_batch_prints_what_there_is(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"  # the first has room for one token, the second for 300
    prompts.write_text(f'{{"prompt": {[5] * 300}}}\n{{"prompt": [5]}}\n')
    options = ("--json", "--ignore-eos", "--max-length", "301")
    with start_slowly("generate", *options, "--file", str(prompts)) as process:
        assert process.stdout and process.stderr
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        second = json.loads(process.stdout.readline())
        rest, errors = process.stdout.read(), process.stderr.read()
    assert (process.returncode, rest) == (130, b"")
    assert (first["finish_reason"], len(first["token_ids"])) == ("length", 1)
    assert second["finish_reason"] == "abort" and 1 <= len(second["token_ids"]) < 300
    assert errors.startswith(b"pyengine: interrupted: ") and errors.count(b"\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    with start_slowly("generate", "--ignore-eos", "--max-tokens", "400", "The old house") as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in errors and b"rror" not in errors


def test_input_that_is_not_utf8() -> None:
    result = run("generate", "-", input=b"caf\xe9")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"pyengine: standard input: not UTF-8 text: byte 0xe9 at offset 3;")


def test_output_that_the_terminal_cannot_show() -> None:
    result = run("tokenize", "犬", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert json.loads(run("tokenize", "--json", "犬", PYTHONUTF8="0", PYTHONIOENCODING="ascii").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--model", "/nonexistent/gpt2", "a"), "/nonexistent/gpt2 does not exist"),
        (("generate", "--max-model-len", "100000", "a"), "max_model_len=100000"),
        (("generate", "--kv-cache-memory", "much", "a"), "much"),
        (("generate", "--ids", "999999"), "999999"),
        (("generate", "--file", "/nonexistent/prompts", "a"), "/nonexistent/prompts: No such file"),
        (("score", "--file", "/nonexistent/prompts"), "/nonexistent/prompts: No such file"),
        (("tokenize", "--ids", "999999"), "999999"),
        (("inspect", "--model", "/nonexistent/gpt2"), "/nonexistent/gpt2 does not exist"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    errors = result.stderr.decode()
    assert (result.returncode, result.stdout) == (1, b"")
    assert errors.startswith("pyengine: ") and message in errors and errors.count("\n") == 1
    assert "internal error" not in errors
    assert "Traceback" in run(*arguments, PYENGINE_DEBUG="1").stderr.decode()


def test_wrong_usage() -> None:
    result = run("genrate", "a")
    assert result.returncode == 2 and b"generate" in result.stderr


def test_version_and_both_names() -> None:
    assert run("--version").stdout.startswith(b"pyengine ")
    script = Path(sys.executable).with_name("pyengine-cli")
    assert script.exists(), "the package is not installed in this environment"
    result = subprocess.run([script, "--version"], capture_output=True, timeout=60)
    assert result.stdout == run("--version").stdout
