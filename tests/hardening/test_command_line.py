"""Wrong arguments, files and streams of the command line: one line that says what, and an exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hardening import tiny
from tests.hardening.faults import command, refused_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make(tmp_path_factory.mktemp("tiny") / "model"))


# content of a file of prompts -> what the message names behind the file
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "Latin-1": ("a.txt", b"caf\xe9\n", ("not UTF-8", "byte 0xe9 at offset 3", "iconv -f latin1")),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), ("not UTF-8", "iconv -f utf-16")),
    "cut in the middle of a character": ("a.txt", "犬".encode()[:2], ("not UTF-8", "offset 0")),
    "empty": ("a.txt", b"", ("no prompt in it",)),
    "blank": ("a.txt", b"\n \n\t\r\n", ("no prompt in it",)),
    "not JSON": ("a.jsonl", b'{"prompt": "a"}\nnope\n', ("line 2", "not JSON")),
    "cut JSON": ("a.jsonl", b'{"prompt": "a', ("line 1", "not JSON")),
    "a list": ("a.jsonl", b'["a"]\n', ("line 1", '"prompt"')),
    "no prompt": ("a.jsonl", b'{"text": "a"}\n', ("line 1", '"prompt"')),
    "prompt is null": ("a.ndjson", b'{"prompt": null}\n', ("line 1", '"prompt"')),
    "ids are floats": ("a.jsonl", b'{"prompt": [1.5]}\n', ("line 1", "list of token ids")),
    "ids are true": ("a.jsonl", b'{"prompt": [true]}\n', ("line 1", "list of token ids")),
    "nested too deeply": ("a.jsonl", b"[" * 100_000, ("line 1", "nested too deeply")),
    "a number of 5000 digits": ("a.jsonl", b'{"prompt": [1' + b"0" * 5000 + b"]}", ("line 1", "not JSON")),
}


@pytest.mark.parametrize("name", ["generate", "score", "tokenize"])
@pytest.mark.parametrize("fault", FILES)
def test_files_of_prompts(fault: str, name: str, model: str, tmp_path: Path) -> None:
    file, content, fragments = FILES[fault]
    (tmp_path / file).write_bytes(content)
    path = str(tmp_path / file)
    refused_command(name, "--model", model, "--file", path, fragments=(path, *fragments))


@pytest.mark.parametrize("name", ["generate", "score", "tokenize"])
def test_files_that_are_not_there(name: str, model: str, tmp_path: Path) -> None:
    refused_command(name, "--file", str(tmp_path), fragments=(str(tmp_path), "Is a directory"))
    refused_command(name, "--file", str(tmp_path / "no"), fragments=("No such file",))
    refused_command(name, "--file", "a\0b", fragments=("a", "null"))
    refused_command(name, "--file", "", code=2, fragments=("--file: the name is empty",))
    refused_command(name, "-", fragments=("standard input is empty",))
    refused_command(name, "-", input=b"caf\xe9", fragments=("standard input: not UTF-8",))
    refused_command(name, "-", "-", code=2, fragments=("only once",))


# (status, arguments behind --model, what the message names)
ARGUMENTS: list[tuple[int, str, tuple[str, ...]]] = [
    (2, "generate --max-tokens 0 a", ("max_tokens=0", "from 1")),
    (2, "generate --max-tokens 1e3 a", ("--max-tokens", "1e3")),
    (2, "generate --max-tokens 99999999999999999999 a", ("max_tokens=99999999999999999999",)),
    (1, "generate --max-length 1 hello", ("max_length=1", "2 tokens", "3 or more")),
    (2, "generate --max-length 9 --max-tokens 9 a", ("max_tokens=9 and max_length=9", "contradict")),
    (2, "generate --temperature -1 a", ("temperature=-1.0",)),
    (2, "generate --temperature nan a", ("temperature=nan",)),
    (2, "generate --temperature 1e39 a", ("temperature=1e+39", "float32")),
    (2, "generate --top-k -2 a", ("top_k=-2",)),
    (2, "generate --top-p 0 a", ("top_p=0.0", "above 0")),
    (2, "generate --top-p 1.5 a", ("top_p=1.5", "up to 1")),
    (2, "generate --seed -1 a", ("seed=-1",)),
    (2, "generate --seed 18446744073709551616 a", ("seed=18446744073709551616",)),
    (2, "generate --n 0 a", ("n=0",)),
    (2, "generate --n 2 --temperature 0 a", ("n=2", "temperature=0")),
    (1, "generate --n 2 a", ("n=2", "do_sample: false")),
    (1, "generate --stop \udcff a", ("--stop: not UTF-8",)),
    (1, "generate --bad-words \udcff a", ("--bad-words: not UTF-8",)),
    (1, "generate --regex \udcff a", ("--regex: not UTF-8",)),
    (1, "generate --grammar /nowhere a", ("/nowhere: No such file",)),
    (2, "generate --logit-bias 1=x a", ("--logit-bias", "'1=x'")),
    (1, "generate --suppress-tokens 260 a", ("suppress_tokens: token id 260", "0 to 259")),
    (1, "generate --stop-token-ids 260 a", ("stop_token_ids: token id 260", "0 to 259")),
    (1, "generate --speculative-model /nowhere a", ("/nowhere does not exist",)),
    (1, "generate --draft-model x --num-speculative-tokens 0 a", ("num_speculative_tokens=0", "1 to 256")),
    (2, "generate --speculative-config x a", ("--speculative-config: not JSON",)),
    (1, "chat --load /nowhere", ("/nowhere: No such file",)),
    (1, "chat --system \udcff", ("--system: not UTF-8",)),
    (1, "chat --format template", ("has no chat template",)),
    (2, "chat --mirostat 2 --top-k 4", ("mirostat=2 and top_k=4",)),
    (2, "generate --truncate-prompt-tokens 0 a", ("truncate_prompt_tokens=0",)),
    (2, "generate --json --logprobs 65 a", ("logprobs=65", "0 to 64")),
    (2, "generate --logprobs 1 a", ("--logprobs needs --json",)),
    (2, "generate --stream a b", ("--stream",)),
    (2, "generate --threads 0 a", ("--threads", "x>=1")),
    (1, "generate --threads 9999 a", ("num_threads=9999", "1 to 1024")),
    (1, "generate --max-model-len 33 a", ("max_model_len=33", "1 to 32")),
    (1, "generate --kv-cache-memory lots a", ("kv_cache_memory='lots'", "512MiB")),
    (1, "generate --kv-cache-memory 1B a", ("kv_cache_memory='1B'", "needs")),
    (2, "generate --dtype float8 a", ("--dtype", "float8", "bfloat16")),
    (2, "generate --nope a", ("--nope",)),
    (2, "generate --ids 1.5", ("whole numbers", "1.5")),
    (2, "generate --ids []", ("none in an empty text",)),
    (1, "generate --ids 260", ("token 0 of the prompt is 260", "0 to 259")),
    (1, f"generate {'x' * 99}", ("99 tokens", "context holds 32", "truncate_prompt_tokens")),
    (1, "generate a \udcff", ("argument 2: not UTF-8", "0xff")),
    (2, "score", ("Nothing to score",)),
    (2, "score --choice a a", ("at least two choices",)),
    (2, "score --choice a --choice b --continuation c a", ("one of the two",)),
    (1, "score --continuation \udcff a", ("--continuation: not UTF-8",)),
    (1, "score --choice a --choice \udcff a", ("--choice 2: not UTF-8",)),
    (1, "score --ids 1 --continuation 999", ("is 999", "0 to 259")),
    (2, "score --ids 1 --continuation x", ("whole numbers", "'x'")),
    (2, "tokenize", ("Nothing to tokenize",)),
    (1, "tokenize --ids 260", ("token id 260", "0 to 259")),
    (1, "tokenize --ids 99999999999999999999", ("99999999999999999999", "outside the vocabulary")),
    (2, "inspect more", ("unexpected extra argument",)),
]


@pytest.mark.parametrize(
    ("code", "line", "fragments"), ARGUMENTS, ids=[ascii(case[1])[:50] for case in ARGUMENTS]
)
def test_arguments(code: int, line: str, fragments: tuple[str, ...], model: str) -> None:
    name, *arguments = line.split(" ")
    refused_command(name, "--model", model, *arguments, code=code, fragments=fragments)


@pytest.mark.parametrize("name", ["generate", "chat", "score", "tokenize", "inspect"])
@pytest.mark.parametrize(
    ("path", "fragments"),
    [
        ("", ("the model is ''",)),
        ("/nowhere/at/all", ("/nowhere/at/all does not exist",)),
        ("a\nb", ("'a\\nb'",)),
        ("x" * 5000, ("File name too long",)),
        ("https://example.org/gpt2", ("https://example.org/gpt2 does not exist",)),
        ("/dev/zero", ("/dev/",)),
    ],
)
def test_models_that_are_none(name: str, path: str, fragments: tuple[str, ...]) -> None:
    prompt = [] if name in ("inspect", "chat") else ["a"]
    refused_command(name, "--model", path, *prompt, fragments=fragments)


def test_a_directory_whose_name_is_not_utf8(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    tiny.make(directory)
    assert command("generate", "--quiet", "--model", str(directory), "a").exit_code == 0
    os.truncate(directory / "model.safetensors", 3000)
    refused_command("generate", "--model", str(directory), "a", fragments=("model.safetensors", "incomplete"))


# In a process of its own: what the shell does to streams, signals and variables.


def run(*arguments: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[str]:
    """``shell`` says how the command is run, as "$@"."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "pyengine", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def failed(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("pyengine: ") and done.stderr.count("\n") == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr


def test_streams_that_are_closed_or_full(model: str) -> None:
    generate = ("generate", "--quiet", "--model", model, "--max-tokens", "2")
    failed(run(*generate, "a", shell='"$@" >&-'), "standard output is closed")
    failed(run(*generate, "-", shell='"$@" <&-'), "standard input is closed")
    done = run(*generate, "a", shell='"$@" 2>&-')
    assert done.returncode == 0 and done.stdout
    if os.path.exists("/dev/full"):
        failed(run(*generate, "a", shell='"$@" >/dev/full'), "No space left on device")
        failed(run(*generate, "--json", "a", shell='"$@" >/dev/full'), "No space left on device")
        failed(run("--help", shell='"$@" >/dev/full'), "No space left on device")


def test_a_reader_that_leaves(model: str) -> None:
    status = '{ "$@"; echo $? >&2; } | head -c 5'
    assert run("score", "--model", model, *"abcdefgh" * 40, shell=status).stderr == "141\n"


def test_variables(model: str) -> None:
    failed(run("generate", "--model", model, "a", PYENGINE_ISA="mmx"), '"mmx" does not exist', "PYENGINE_ISA")
    failed(run("generate", "--model", model, "a", PYENGINE_ISA="\udcff"), "\\xff", "PYENGINE_ISA")
    done = run("generate", "--model", model, "--ids", "999", PYENGINE_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "token 0 of the prompt" in done.stderr


READING = """
import sys
from pyengine.cli import _text, main
read = _text.read_text
_text.read_text = lambda path: (print("reads", file=sys.stderr, flush=True), read(path))[1]
main(sys.argv[1:])
"""


def test_ctrl_c_while_it_waits_for_input(model: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READING, "generate", "--model", model, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout and process.stderr
        assert process.stderr.readline() == b"reads\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.stdout.read(), process.stderr.read()
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_json_errors_leave_standard_output_to_the_results(model: str) -> None:
    result = command("generate", "--model", model, "--json", "--ids", "1", "2")
    assert [json.loads(line)["prompt_index"] for line in result.stdout.splitlines()] == [0, 1]
    result = command("generate", "--model", model, "--json", "--quiet", "--ids", "1", "2,999", "3")
    assert [json.loads(line)["prompt_index"] for line in result.stdout.splitlines()] == [0, 2]
    assert result.stderr.startswith("pyengine: prompt 2 of 3: token 1 of the prompt is 999")
    assert result.stderr.count("\n") == 1 and result.exit_code == 1


def test_many_prompts_that_fail(model: str) -> None:
    """A line for each, the same one once, and at most ten."""
    options = ("--model", model, "--quiet", "--max-tokens", "3")
    result = command("generate", *options, "a", "x" * 99, "b", "y" * 99)
    (line,) = result.stderr.splitlines()
    assert line.startswith("pyengine: prompt 2 of 4: the prompt has 99 tokens") and result.exit_code == 1
    assert result.stdout.count("==>") == 2
    ids = [str(999 + number) for number in range(14)]
    result = refused_command("generate", *options, "--ids", *ids, fragments=("is 1008",))
    lines = result.stderr.splitlines()
    assert len(lines) == 11 and lines[-1] == "pyengine: 4 more prompts failed"
