"""Where options come from, and which are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from pyengine.cli.train import command
from pyengine.errors import ConfigError
from pyengine.train.options import PRESETS, TrainOptions, read_config_file
from tests.train.helpers import ENVIRONMENT, PYTHON

NEEDED: dict[str, Any] = {"data": ("x.txt",), "out": "out"}


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "mini"\nn-layer = 5\nlr = 1\ndata = "a.txt"\nout = "there"\nbias = false\n')
    options = TrainOptions.from_values({"n_layer": 7, "data": (), "steps": None}, read_config_file(str(file)))
    assert (options.n_layer, options.n_head, options.n_embd) == (7, 6, 192)
    assert (options.lr, options.min_lr, options.data, options.bias) == (1.0, 0.1, ("a.txt",), False)
    assert options.steps == 2000


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_config_formats_agree(tmp_path: Path, suffix: str) -> None:
    text = {
        ".toml": 'data = ["a", "b"]\nlr = 1e-3\nn_head = 2\n',
        ".yaml": "data: [a, b]\nlr: 1e-3\nn-head: 2\n",
        ".json": '{"data": ["a", "b"], "lr": 1e-3, "n_head": 2}',
    }[suffix]
    file = tmp_path / f"c{suffix}"
    file.write_text(text)
    assert read_config_file(str(file)) == {"data": ("a", "b"), "lr": 1e-3, "n_head": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layers = 3", "did you mean n_layer"),
        ("n_layer = 3.5", "n_layer=3.5: must be of type int"),
        ("n_layer = true", "must be of type int"),
        ("data = 3", "must be a string"),
        ("lr = = 3", "run.toml"),
    ],
)
def test_config_errors(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config_file(str(file))


def test_config_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config_file(str(tmp_path / "none.toml"))
    (tmp_path / "c.ini").write_text("")
    with pytest.raises(ConfigError, match="ends in .toml"):
        read_config_file(str(tmp_path / "c.ini"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "--data"),
        ({"out": ""}, "--out"),
        ({"n_embd": 10, "n_head": 3}, "multiple of --n-head 3"),
        ({"steps": 0}, "--steps 0: must be 1 or more"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"min_lr": 1.0, "lr": 0.1}, "--min-lr 1.0: must not be larger"),
        ({"warmup_steps": 9, "steps": 5}, "--warmup-steps 9"),
        ({"optimizer": "sgd"}, "must be one of adamw, muon"),
        ({"preset": "gigantic"}, "must be one of nano"),
        ({"lora_rank": 4}, "give --init-from"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "Muon needs whole matrices"),
        ({"val_fraction": 1.5}, "--val-fraction 1.5"),
    ],
)
def test_refused_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainOptions.from_values({k: v for k, v in {**NEEDED, **changes}.items() if v not in ((), "")})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit(preset: str) -> None:
    options = TrainOptions.from_values(NEEDED, {"preset": preset})
    assert options.n_embd and options.n_head and options.n_embd % options.n_head == 0


def test_every_option_is_on_the_command_line() -> None:
    names = {p.name for p in command.params if isinstance(p, click.Option)}
    assert names == {f.name for f in dataclasses.fields(TrainOptions)} | {"config", "quiet"}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom pyengine.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    for name in ("train", "eval"):
        result = subprocess.run(
            [sys.executable, "-c", code, name, "--help"], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_bad_option_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [*PYTHON, "--data", "x", "--out", str(tmp_path), "--steps", "0"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == "pyengine: --steps 0: must be 1 or more\n"
