"""The corpus of the fuzzers, and a few mutations of it each time the tests run."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine.errors import CheckpointError, ConfigError, TokenizerError
from pyengine.model.config import GPT2Config
from pyengine.model.safetensors import read_safetensors
from pyengine.model.tokenizer import load_tokenizer
from tests.hardening import fuzzing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=fuzzing.TARGETS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "torch_bin":
        pytest.importorskip("torch", reason="reads a pytorch_model.bin")
    return str(request.param)


@pytest.fixture(scope="module")
def runner(name: str, tmp_path_factory: pytest.TempPathFactory) -> fuzzing.Runner:
    return fuzzing.Runner(name, tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # torch's, of pickles in a protocol it does not expect
        warnings.simplefilter("ignore", UserWarning)
        yield


def test_the_corpus(name: str, runner: fuzzing.Runner) -> None:
    for path in sorted((fuzzing.CORPUS / name).iterdir()):
        error = runner(path.read_bytes())
        # What a target starts from is good: else mutations would not come far.
        assert error is None or not path.name.startswith("good"), error


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_mutations_are_refused_or_accepted(name: str, runner: fuzzing.Runner, seed: int) -> None:
    random = Random(seed)
    seeds = fuzzing.seeds(name)
    runner(fuzzing.mutate(random, random.choice(seeds), seeds, runner.target.form))


LIMITED = """
import resource, sys
from pathlib import Path
from tests.hardening import fuzzing
runner = fuzzing.Runner("safetensors", Path(sys.argv[1]))
runner(fuzzing.seeds("safetensors")[0])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
for length in (2**60, 2**63, 2**64 - 1, 99_999_999, 2**31):
    print(runner(length.to_bytes(8, "little") + b'{"a": 1}'))
huge = b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'
print(runner(len(huge).to_bytes(8, "little") + huge))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_sizes_that_are_lies_allocate_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 6, done.stderr
    assert all("claims" in line for line in lines[:5]) and "data_offsets" in lines[5]


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:

    for file, kind, read in (
        ("config.json", ConfigError, lambda: GPT2Config.from_file(tmp_path / "config.json")),
        ("model.safetensors", CheckpointError, lambda: read_safetensors(tmp_path / "model.safetensors")),
        ("tokenizer.json", TokenizerError, lambda: load_tokenizer(tmp_path)),
        ("spiece.model", TokenizerError, lambda: load_tokenizer(tmp_path)),
        ("vocab.txt", TokenizerError, lambda: load_tokenizer(tmp_path)),
    ):
        with open(tmp_path / file, "wb") as sparse:
            sparse.truncate(2**40)
        with pytest.raises(kind, match=file):
            read()
        (tmp_path / file).unlink()


def test_the_tool_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/fuzz.py", "--seconds", "0.2", "--seed", "1", "config", "safetensors"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "config: " in done.stdout and "safetensors: " in done.stdout
