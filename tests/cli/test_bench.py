"""``bench``: its workloads, what it prints, what it counts, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyengine import LLM
from pyengine.bench import measure, replay, workloads
from pyengine.bench.limits import Limits
from pyengine.bench.limits import measure as measure_limits
from pyengine.bench.profile import PartTotals, context_of, profiled
from pyengine.errors import ConfigError
from tests.cli.conftest import Run

# What scripts of other engines print, and what pyengine adds.
PEER_KEYS = ["engine", "dtype", "workload", "threads", "tok_per_s_median", "min", "max", "load_s"]
OWN_KEYS = ["device", "rate", "sequences", "prompt_tokens", "new_tokens", "kv_dtype", "cached_tokens"]
OWN_KEYS += ["gb_per_s", "gflop_per_s", "gb_per_s_limit", "gflop_per_s_limit"]
GPT2_VOCABULARY = 50257
LAYERS = 2  # of the test checkpoint "gelu"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    path = Path(__file__).resolve().parents[3] / "shared/peers/peers.py"
    if not path.is_file():
        pytest.skip("no shared/peers/peers.py next to the repository")
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["decode", "prefill", "batch"])
def test_workloads_are_the_peers(peers: ModuleType, name: str) -> None:
    sequences, prompt, new = peers.WORKLOADS[name]
    workload = workloads.named(name, GPT2_VOCABULARY)
    assert workload.prompts == peers.prompts(sequences, prompt)
    assert workload.new_tokens == [new] * sequences
    assert workload.tokens_per_second(0.25, 2.0) == pytest.approx(peers.rate(name, 0.25, 2.0))


def test_mixed_is_the_peers(peers: ModuleType) -> None:
    mixed = workloads.named("mixed", GPT2_VOCABULARY)
    assert mixed.prompts == peers.mixed_prompts()
    assert mixed.new_tokens == [new for _, new in peers.mixed_lengths()]
    assert mixed.tokens_per_second(0.0, 2.0) == pytest.approx(peers.rate("mixed", 0.0, 2.0))


def test_ids_fit_a_small_vocabulary() -> None:
    rows = workloads.token_ids(3, 200, 97)
    assert {len(row) for row in rows} == {200}
    assert min(map(min, rows)) == 0 and max(map(max, rows)) == 96


def test_workloads_of_own_sizes() -> None:
    assert workloads.of_size(1, 16, 128, GPT2_VOCABULARY).prompts == workloads.named("decode", 50257).prompts
    sizes = [(1, 9, 4), (1, 9, 1), (5, 9, 4)]
    own = [workloads.of_size(*size, GPT2_VOCABULARY) for size in sizes]
    assert [w.name for w in own] == ["9+4", "9+1", "5x(9+4)"]
    assert [w.rate for w in own] == ["decode", "prefill", "total"]
    with pytest.raises(ConfigError, match="'latency' does not exist; there are decode"):
        workloads.named("latency", GPT2_VOCABULARY)


def rows_of(run: Run, *arguments: str) -> list[dict[str, Any]]:
    result = run("bench", "--json", "--threads", "1", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_of_the_fixed_workloads(run: Run, checkpoint: Callable[[str], Path]) -> None:
    path = str(checkpoint("gelu"))
    (row,) = rows_of(run, "--model", path, "--workload", "decode", "--repeats", "2")
    assert list(row) == PEER_KEYS + OWN_KEYS
    assert (row["engine"], row["dtype"], row["workload"], row["threads"]) == ("pyengine", "f32", "decode", 1)
    assert 0 < row["min"] <= row["tok_per_s_median"] <= row["max"]
    assert (row["prompt_tokens"], row["new_tokens"], row["cached_tokens"]) == (16, 128, 0)
    for rate in ("gb_per_s", "gflop_per_s"):
        assert row[f"{rate}_limit"] > 0


def test_json_of_own_workloads(run: Run, checkpoint: Callable[[str], Path]) -> None:
    rows = rows_of(
        run,
        *("--model", str(checkpoint("gelu")), "--dtype", "bfloat16", "--repeats", "1", "--profile"),
        *("--prompt-tokens", "8,20", "--new-tokens", "3", "--batch", "1,4"),
    )
    assert [row["workload"] for row in rows] == ["8+3", "20+3", "4x(8+3)", "4x(20+3)"]
    assert {row["dtype"] for row in rows} == {row["kv_dtype"] for row in rows} == {"bf16"}
    for row in rows:
        parts = {part["part"]: part for part in row["profile"]}
        assert parts["attention"]["calls"] == LAYERS * 3 and parts["head"]["calls"] == 3
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1, abs=0.01)
        assert parts["outside the steps"]["ms"] > 0


def test_table(run: Run, checkpoint: Callable[[str], Path]) -> None:
    result = run(
        *("bench", "--model", str(checkpoint("gelu")), "--threads", "1", "--repeats", "1", "--profile"),
        *("--prompt-tokens", "8", "--new-tokens", "4"),
    )
    assert result.exit_code == 0, result.output
    assert "weights f32, keys and values f32, 1 thread" in result.stdout
    assert "8+4" in result.stdout and "new tokens after the first" in result.stdout
    for part in ("qkv", "attention", "mlp_fc", "head", "sampling", "outside the steps"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workload", "decode,latency"],
            "'latency' does not exist; there are decode, prefill, batch, mixed",
        ),
        (["--prompt-tokens", "16"], "needs both --prompt-tokens and --new-tokens"),
        (["--new-tokens", "16"], "needs both --prompt-tokens and --new-tokens"),
        (["--batch", "4"], "--batch belongs to an own workload"),
        (["--prompt-tokens", "16,x", "--new-tokens", "1"], "whole numbers of at least 1"),
        (["--prompt-tokens", "16", "--new-tokens", "0"], "whole numbers of at least 1"),
        (["--replay", "a", "--batch", "4"], "--replay runs alone"),
        (["--replay", "a", "--workload", "decode"], "--replay runs alone"),
        (["--replay", "a", "--prompt-tokens", "8,16"], "--replay takes one --prompt-tokens"),
        (["--speculative-method", "ngram"], "needs --replay FILE"),
        (["--repeats", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_requests_longer_than_the_context_are_refused(run: Run, checkpoint: Callable[[str], Path]) -> None:
    path = str(checkpoint("gelu"))  # 160 positions
    result = run("bench", "--model", path, "--workload", "decode,prefill")
    assert result.exit_code == 1
    assert result.stderr == (
        "pyengine: workload prefill has a request of 513 tokens, prompt and new ones together, but the "
        "context is 160: choose another --workload, or --prompt-tokens and --new-tokens\n"
    )


REPLAY_KEYS = [*PEER_KEYS, "device", "file", "method", "prompt_tokens", "new_tokens", "kv_dtype"]
REPLAY_KEYS += ["plain_tok_per_s_median", "plain_min", "plain_max", "ratio_median", "ratio_min", "ratio_max"]
REPLAY_KEYS += ["acceptance_rate", "mean_draft_length", "tokens_per_step"]
REPEATED = "".join(f"{number % 3}: a line that comes again and again\n" for number in range(60))


@pytest.fixture
def repeated(tmp_path: Path) -> str:
    path = tmp_path / "repeated.txt"
    path.write_text(REPEATED)
    return str(path)


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_json_of_a_replay(run: Run, repeated: str, method: str) -> None:
    (row,) = rows_of(
        run,
        *("--replay", repeated, "--speculative-method", method, "--repeats", "2"),
        *("--prompt-tokens", "40", "--new-tokens", "100"),
    )
    assert list(row) == REPLAY_KEYS
    assert (row["workload"], row["method"], row["file"]) == ("replay", method, repeated)
    assert (row["prompt_tokens"], row["new_tokens"], row["threads"]) == (40, 100, 1)
    for name in ("", "plain_"):
        assert 0 < row[f"{name}min"] <= row[f"{name}tok_per_s_median"] <= row[f"{name}max"]
    assert 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert row["tokens_per_step"] == pytest.approx(
        1 + row["acceptance_rate"] * row["mean_draft_length"], abs=0.01
    )
    assert row["acceptance_rate"] > 0.5 and row["tokens_per_step"] > 1.5


def test_table_of_a_replay(run: Run, repeated: str) -> None:
    result = run("bench", "--replay", "-", "--repeats", "1", "--threads", "1", input=REPEATED)
    assert result.exit_code == 0, result.output
    assert "standard input: 16 prompt tokens, 496 new ones" in result.stdout  # as many as the context holds
    for word in ("none", "ngram", "ratio", "of them right", "tokens a step"):
        assert word in result.stdout


def test_a_replay_forgets_between_its_runs() -> None:
    """What has no repetition in it must not be known from the run before."""
    with LLM(num_threads=1, speculative_config={"method": "suffix"}, enable_prefix_caching=False) as llm:
        assert llm.tokenizer is not None
        ids = list(range(1000, 1100))
        found = replay.Replay(ids[:10], ids[10:])
        speculator = llm._engine.speculator
        replay.measure(llm, found, 2)
        assert found.accepted_tokens == 0 and found.steps == 2 * 89
        assert len(found.plain) == len(found.drafting) == len(found.ratios) == 2
        assert llm._engine.speculator is speculator


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (None, [], "No such file or directory"),
        (b"\xff\xfe", [], "not UTF-8 text: byte 0xff at offset 0"),
        (b"", [], "too short: it has 0 tokens, and 16 prompt tokens and 2 new ones are needed"),
        (b"A short text.", ["--new-tokens", "90"], "and 16 prompt tokens and 90 new ones are needed"),
        (b"text " * 99, ["--new-tokens", "1"], "--new-tokens 1: --replay times what comes after"),
        (b"text " * 99, ["--prompt-tokens", "500", "--new-tokens", "13"], "more than the context of 512"),
    ],
)
def test_texts_that_cannot_be_replayed(
    run: Run, tmp_path: Path, data: bytes | None, arguments: list[str], message: str
) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    result = run("bench", "--replay", str(path), "--threads", "1", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_replay_needs_a_tokenizer(run: Run, checkpoint: Callable[[str], Path], repeated: str) -> None:
    result = run("bench", "--model", str(checkpoint("gelu")), "--replay", repeated, "--threads", "1")
    assert result.exit_code == 1
    assert "--replay needs a tokenizer" in result.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_profile_counts_what_a_step_costs(checkpoint: Callable[[str], Path], dtype: str) -> None:
    llm = LLM(checkpoint("gelu"), dtype=dtype, num_threads=1, enable_prefix_caching=False)
    config, size = llm.config, 4 if dtype == "float32" else 2
    channels, inner, prompt, new = config.n_embd, 4 * config.n_embd, 11, 3
    workload = workloads.of_size(2, prompt, new, config.vocab_size)
    counted = profiled(llm, lambda: measure.run(llm, workload))
    assert counted.steps == new
    rows = 2 * (prompt + new - 1)  # the last token is not computed
    fc = counted.parts["mlp_fc"]
    # Only the prompts' last rows go through the last layer's MLP.
    fc_rows = LAYERS * rows - 2 * (prompt - 1)
    assert fc.operations == 2 * fc_rows * channels * inner
    assert fc.bytes == LAYERS * new * channels * inner * size + fc_rows * (channels + inner) * size
    attention = counted.parts["attention"]
    # Keys that each query sees; in the last layer only the prompts' last rows have queries.
    keys = 2 * sum(range(prompt, prompt + new))
    seen = (LAYERS - 1) * 2 * sum(range(1, prompt + new)) + keys
    assert attention.operations == seen * 4 * channels
    queries = (LAYERS - 1) * rows + 2 * new
    assert attention.bytes == LAYERS * keys * 2 * channels * size + queries * channels * (4 + size)
    qkv = counted.parts["qkv"]
    assert qkv.operations == 2 * channels * channels * (LAYERS * rows * 2 + queries)
    assert counted.parts["head"].operations == 2 * 2 * new * channels * config.vocab_size
    assert counted.parts["head"].calls == counted.parts["sampling"].calls == new
    assert counted.total.seconds >= max(part.seconds for part in counted.parts.values()) > 0
    assert profiled(llm, lambda: None).parts == {}  # nothing of before is left


def test_profile_of_scoring(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), num_threads=1)
    counted = profiled(llm, lambda: llm.score(list(range(1, 21))))
    assert counted.parts["score"].operations == 2 * 19 * llm.config.n_embd * llm.config.vocab_size
    assert "head" not in counted.parts


def test_limits_follow_the_instruction_set(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENGINE_ISA", "baseline")
    context = context_of(LLM(checkpoint("gelu"), num_threads=1))
    limits = measure_limits(context)
    assert limits.bandwidth > 0
    assert limits.peaks.keys() == {"float32"}  # no instructions for shorter types
    assert limits.peak("qkv", "bf16") == limits.peak("qkv", "int8") == limits.peaks["float32"]


def test_the_nearer_limit_counts() -> None:
    limits = Limits(bandwidth=10.0, peaks={"float32": 100.0, "bfloat16": 400.0, "int8": 800.0})
    assert limits.seconds("qkv", PartTotals(1, 9.0, 50, 400), "f32") == (5.0, "memory")
    assert limits.seconds("qkv", PartTotals(1, 9.0, 5, 400), "f32") == (4.0, "arithmetic")
    assert limits.seconds("qkv", PartTotals(1, 9.0, 5, 400), "bf16") == (1.0, "arithmetic")
    assert limits.seconds("head", PartTotals(1, 9.0, 1, 400), "int4") == (0.5, "arithmetic")
    assert limits.seconds("attention", PartTotals(1, 9.0, 5, 400), "int8") == (4.0, "arithmetic")
