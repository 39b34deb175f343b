"""``score``, ``tokenize``, ``inspect`` and ``doctor`` on the bundled model and on test checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pyengine import LLM
from pyengine._C import default_num_threads
from pyengine.cli import doctor
from pyengine.model.checkpoint import resolve
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def test_score_table(run: Run, llm: LLM) -> None:
    score = llm.score("The old house")
    *table, totals = run("score", "The old house").stdout.splitlines()
    assert [row.split()[:2] for row in table[1:]] == [[str(i), str(t)] for i, t in enumerate(score.token_ids)]
    assert table[1].split()[2] == "-" and float(table[2].split()[2]) == pytest.approx(
        score.logprobs[1], abs=1e-4
    )
    assert f"perplexity {score.perplexity:.6g}" in totals
    assert f"bits per character {score.bits_per_character:.4f}" in totals


def test_score_json_is_what_the_llm_says(run: Run, llm: LLM) -> None:
    first, second = map(json.loads, run("score", "--json", "The old house", "A").stdout.splitlines())
    score = llm.score("The old house")
    assert first["logprobs"] == score.logprobs and first["token_ids"] == score.token_ids
    assert first["perplexity"] == score.perplexity and first["text"] == "The old house"
    assert second["num_scored"] == 0 and second["perplexity"] is None


def test_score_continuation_and_bos(run: Run, llm: LLM) -> None:
    row = json.loads(run("score", "--json", "--continuation", " was old", "The house").stdout)
    assert row["total_logprob"] == llm.score("The house", " was old").total_logprob
    row = json.loads(run("score", "--json", "--add-bos", "The house").stdout)
    assert None not in row["logprobs"] and row["logprobs"] == llm.score("The house", add_bos=True).logprobs


def test_score_choices(run: Run, llm: LLM) -> None:
    ranked = llm.choose("The old house", [" cat", " was"])
    arguments = ("score", "--choice", " cat", "--choice", " was", "The old house")
    row = json.loads(run(*arguments, "--json").stdout)
    assert [(choice["text"], choice["index"], choice["logprob"]) for choice in row["choices"]] == [
        (choice.text, choice.index, choice.logprob) for choice in ranked
    ]
    assert math.fsum(choice["probability"] for choice in row["choices"]) == pytest.approx(1)
    lines = run(*arguments).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [json.dumps(choice.text) for choice in ranked]


def test_score_token_ids(run: Run, llm: LLM) -> None:
    row = json.loads(run("score", "--json", "--ids", "5,6,7").stdout)
    assert row["logprobs"] == llm.score([5, 6, 7]).logprobs


@pytest.mark.parametrize(
    "arguments", [[], ["--choice", "a", "b"], ["--choice", "a", "--choice", "b", "--continuation", "c", "d"]]
)
def test_score_wrong_usage(run: Run, arguments: list[str]) -> None:
    assert run("score", *arguments).exit_code == 2


def test_tokenize_and_back(run: Run, llm: LLM) -> None:
    text = "Hello, my dog is\ncute: é 犬"
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(text)
    lines = run("tokenize", text).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == ids
    row = json.loads(run("tokenize", "--json", "-", input=text.encode() + b"\n").stdout)
    assert (row["text"], row["token_ids"], row["count"]) == (text, ids, len(ids))
    assert run("tokenize", "--ids", " ".join(map(str, ids))).stdout == text + "\n"
    assert json.loads(run("tokenize", "--ids", "--json", " ".join(map(str, ids))).stdout)["text"] == text


def test_pieces_for_people_and_for_programs(run: Run) -> None:
    table = run("tokenize", "my dog, 犬").stdout
    assert '" dog"' in table and "Ġ" not in table
    assert [f"<0x{byte:02X}>" in table for byte in "犬".encode()] == [True] * 3
    assert '"Ġdog"' in run("tokenize", "--raw", "my dog, 犬").stdout
    assert "Ġdog" in json.loads(run("tokenize", "--json", "my dog").stdout)["pieces"]
    assert '" dog"' in run("score", "my dog").stdout


def test_tokenize_several(run: Run) -> None:
    assert run("tokenize", "a", "b").stdout.count("==>") == 2
    assert run("tokenize").exit_code == 2


@pytest.mark.parametrize("command", ["tokenize", "score"])
def test_one_of_several_texts_is_named_as_its_heading_would(run: Run, command: str) -> None:
    result = run(command, "--ids", "1,2", "3,999999")
    assert result.exit_code == 1
    # Texts to score are all checked before the first one runs, as prompts are.
    assert result.stdout.startswith("==> 1: ") == (command == "tokenize")
    assert result.stderr.startswith("pyengine: text 2 of 2: ") and "999999" in result.stderr
    assert "text 1" not in run(command, "--ids", "3,999999").stderr


def test_tokenize_without_a_tokenizer(run: Run, checkpoint: Callable[[str], Path]) -> None:
    result = run("tokenize", "--model", str(checkpoint("gelu")), "a")
    assert result.exit_code == 1 and "no tokenizer files" in result.stderr


def test_inspect_counts_the_parameters(run: Run, checkpoint: Callable[[str], Path]) -> None:
    from safetensors.numpy import load_file

    path = checkpoint("gelu")
    row = json.loads(run("inspect", "--model", str(path), "--json").stdout)
    stored = load_file(path / "model.safetensors")
    assert row["parameters"] == sum(array.size for array in stored.values())
    assert row["weights"]["bytes"] == sum(array.nbytes for array in stored.values())
    assert row["files"]["model.safetensors"] == (path / "model.safetensors").stat().st_size
    assert row["tokenizer"] is None
    assert row["kv_bytes_per_token"]["float32"] == 2 * row["kv_bytes_per_token"]["bfloat16"]


def test_inspect_says_it_in_words(run: Run) -> None:
    text = run("inspect").stdout
    row = json.loads(run("inspect", "--json").stdout)
    for expected in (
        f"{row['parameters']:,}",
        row["tokenizer"]["kind"],
        row["weights"]["dtype"],
        "config.json",
    ):
        assert expected in text


def test_inspect_check_finds_a_bad_weight(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(resolve(None), path)
    good = run("inspect", "--check", "--model", str(path))
    assert good.exit_code == 0 and "all finite" in good.stdout
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x7e")  # the last value becomes float16's NaN
    bad = run("inspect", "--check", "--model", str(path))
    assert bad.exit_code == 1 and "1 NaN, 0 infinite" in bad.stdout
    row = json.loads(run("inspect", "--check", "--json", "--model", str(path)).stdout)
    assert not row["check"]["ok"] and sum(tensor["num_nan"] for tensor in row["check"]["tensors"]) == 1


def test_doctor_finds_all_well(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.endswith("all well\n")
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ok"] and report["processor"]["in_use"] in report["processor"]["instruction_sets"]
    assert report["memory"]["total_bytes"] is None or report["memory"]["total_bytes"] > 2**20
    assert report["threads"]["default"] == default_num_threads()
    assert isinstance(report["self_test"]["load_seconds"], float)
    assert report["self_test"]["threads_agree"]
    assert report["cuda"]["available"] or report["cuda"]["reason"]


def test_doctor_names_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_NEEDED", (*doctor._NEEDED, "no-such-package"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "pip install no-such-package" in result.stdout and result.stdout.endswith("failed: versions\n")
    report = json.loads(run("doctor", "--json").stdout)
    assert not report["ok"] and report["self_test"]["threads_agree"]


def without(directory: Path, target: Path, *names: str) -> Path:
    """A copy of a checkpoint that lacks some files."""
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(*names))
    return target


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_echo_of_token_ids(run: Run, llm: LLM, tmp_path: Path, options: list[str]) -> None:
    arguments = ["generate", "--quiet", "--temperature", "0", "--max-tokens", "4", "--ids", *options]
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("The old house")
    ids = ",".join(map(str, prompt))
    new = run(*arguments, ids).stdout
    assert run(*arguments, "--echo", ids).stdout == "The old house" + new

    model = str(without(resolve(), tmp_path / "ids-only", "*token*"))
    bare = run(*arguments, "--model", model, ids).stdout
    assert bare.count("\n") == 1 and len(bare.split(",")) == 4
    assert run(*arguments, "--model", model, "--echo", ids).stdout == f"{ids},{bare}"


def test_settings_that_are_not_applied_are_named_in_one_line(run: Run, tmp_path: Path) -> None:
    model = without(resolve(), tmp_path / "model", "generation_config.json")
    (model / "generation_config.json").write_text('{"num_beams": 4}', encoding="utf-8")
    stderr = run("generate", "--quiet", "--max-tokens", "2", "--model", str(model), "a").stderr
    ignored = "pyengine does not apply num_beams=4 of generation_config.json"
    assert stderr == f"pyengine: warning: {model}: {ignored}\n"


def test_more_threads_than_processors_are_warned_about(run: Run) -> None:
    threads = default_num_threads() + 1
    stderr = run("generate", "--quiet", "--max-tokens", "2", "--threads", str(threads), "a").stderr
    assert stderr.startswith(f"pyengine: warning: {threads} threads on {threads - 1} processors")
    assert run("generate", "--quiet", "--max-tokens", "2", "--threads", "1", "a").stderr == ""


def test_truncated_prompt(run: Run, llm: LLM) -> None:
    assert llm.tokenizer is not None
    arguments = ["generate", "--max-tokens", "2", "--json", "--truncate-prompt-tokens", "2"]
    row = json.loads(run(*arguments, "The old house by the sea").stdout)
    assert row["prompt_token_ids"] == llm.tokenizer.encode("The old house by the sea")[-2:]
