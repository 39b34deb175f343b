"""What the documentation says holds: links, commands, options, and the README's examples as they stand."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pyengine.cli
from pyengine.model.checkpoint import resolve

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    ROOT.glob("docs/*.md")
)
COMMANDS: dict[str, click.Command] = {
    name: importlib.import_module(f"pyengine.cli.{name}").command
    for name in pyengine.cli.main.list_commands(click.Context(pyengine.cli.main))
}
README = (ROOT / "README.md").read_text()


def ci_command(name: str) -> str:
    found = re.findall(rf"^<!-- ci: {name} -->\n```sh\n(.*?)\n```$", README, re.M | re.S)
    assert len(found) == 1
    return str(found[0])


def shell_examples() -> Iterator[tuple[str, str]]:
    """(where, command line) of every ``pyengine-cli`` in pages and help texts."""
    for page in PAGES:
        text = page.read_text()
        code = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)) + "\n".join(
            re.findall(r"`([^`\n]+)`", text)
        )
        for line in code.splitlines():
            if found := re.search(r"pyengine-cli [a-z].*", line):
                yield page.name, found[0].removesuffix('" \\')  # a command that is an argument itself
    for name, command in {**COMMANDS, "main": pyengine.cli.main}.items():
        assert command.epilog and "Examples:" in command.epilog, f"{name} --help has no examples"
        for found in re.finditer(r"pyengine-cli [a-z].*", command.epilog):
            yield f"{name} --help", found[0]


def test_readme_has_the_two_commands() -> None:
    for name in ("run", "test"):
        command = ci_command(name)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
        assert "\n" not in command
    assert "&& .venv/bin/pyengine-cli generate " in ci_command("run")
    assert " && .venv/bin/pytest" in ci_command("test")
    assert README.count("<!-- ci:") == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("https://", "http://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_pages_list_every_command(page: str) -> None:
    listed = re.findall(r"^\| `(?:pyengine-cli )?([a-z]+)\b[^`]*` \|", (ROOT / page).read_text(), re.M)
    assert listed == list(COMMANDS)


def test_every_option_is_explained() -> None:
    for name, command in COMMANDS.items():
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"


@pytest.mark.parametrize(("where", "line"), list(dict.fromkeys(shell_examples())))
def test_examples_are_understood(where: str, line: str) -> None:
    words = shlex.split(re.split(r" [|<>]|  +", line.replace("…", ""))[0])[1:]
    words = [word for word in words if not re.fullmatch(r"\[[A-Z]+\]|COMMAND", word)]
    name, *arguments = words
    arguments = ["model" if word == "PATH" else word for word in arguments if word != "--help"]
    assert name in COMMANDS, where
    COMMANDS[name].make_context(name, arguments)  # raises UsageError for what it does not know


def test_options_in_prose_exist() -> None:
    known = {
        option
        for command in COMMANDS.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for option in re.findall(r"`(--[a-z-]+)", (ROOT / "docs/cli.md").read_text()):
        assert option in known | {"--help", "--version"}, option


def python_examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_readme_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original in transformers, its greedy twin and the sampled one, on a directory called gpt2."""
    gpt2 = tmp_path / "gpt2"
    shutil.copytree(resolve(None), gpt2)
    (gpt2 / "generation_config.json").unlink()  # GPT-2's does not sample, the bundled model's does
    # GPT-2 has its tokenizer in both forms, and GPT2Tokenizer of transformers 4 reads the older one.
    bpe = json.loads((gpt2 / "tokenizer.json").read_text())["model"]
    (gpt2 / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"])
    (gpt2 / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "path").mkdir()
    (tmp_path / "path/to").mkdir()
    (tmp_path / "path/to/checkpoint").symlink_to(gpt2)
    monkeypatch.chdir(tmp_path)
    original, twin, sampled, api = python_examples()
    variables: dict[str, object] = {}

    def printed(code: str) -> str:
        exec(code, variables)
        return capsys.readouterr().out

    expected = printed(original)
    assert len(expected) > 100
    assert printed(twin) == expected
    text = printed(sampled)
    assert text.startswith("Hello, my dog is cute") and text != expected
    assert printed(api)
