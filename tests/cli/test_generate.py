"""``generate``: what it asks of the LLM, and what it prints of what the LLM answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyengine import SamplingParams
from tests.cli.conftest import Run
from tests.cli.fake_llm import FakeLLM

Fake = type[FakeLLM]


def test_one_prompt_is_streamed(run: Run, fake_llm: Fake) -> None:
    result = run("generate", "a b c")
    assert (result.exit_code, result.stdout) == (0, "c b a\n")
    assert fake_llm.made[0].calls == [("a b c", SamplingParams())]


def test_no_stream_prints_the_same(run: Run, fake_llm: Fake) -> None:
    assert run("generate", "--no-stream", "a b c").stdout == run("generate", "a b c").stdout
    assert [call[0] for llm in fake_llm.made for call in llm.calls] == [["a b c"], "a b c"]


def test_options_reach_the_llm(run: Run, fake_llm: Fake) -> None:
    sampling = (
        "--max-tokens 7 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 5 --stop x --stop y --ignore-eos"
    )
    numbers = "--model m --device auto --dtype bfloat16 --quantization int8 --kv-cache-dtype float32"
    sizes = "--kv-cache-memory 8MiB --max-model-len 9 --threads 2"
    assert run("generate", *f"{sampling} {numbers} {sizes}".split(), "a").exit_code == 0
    (llm,) = fake_llm.made
    assert llm.model == "m"
    assert llm.settings == {
        "device": "auto",
        "dtype": "bfloat16",
        "quantization": "int8",
        "kv_cache_dtype": "float32",
        "kv_cache_memory": "8MiB",
        "max_model_len": 9,
        "num_threads": 2,
    }
    assert llm.calls[0][1] == SamplingParams(
        max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=5, stop=["x", "y"], ignore_eos=True
    )


def test_max_length(run: Run, fake_llm: Fake) -> None:
    assert run("generate", "--max-length", "100", "a").exit_code == 0
    assert fake_llm.made[0].calls[0][1].max_length == 100


def test_without_a_prompt_the_model_starts_by_itself(run: Run, fake_llm: Fake) -> None:
    assert run("generate").exit_code == 0
    assert fake_llm.made[0].calls[0][0] is None


def test_several_prompts_have_headings(run: Run, fake_llm: Fake) -> None:
    result = run("generate", "a b", "c\nd e")
    assert result.stdout == '==> 1: "a b" <==\nb a\n==> 2: "c\\nd e" <==\ne c\nd\n'
    assert fake_llm.made[0].calls[0][0] == ["a b", "c\nd e"]


def test_several_samples_have_headings(run: Run, fake_llm: Fake) -> None:
    result = run("generate", "--n", "2", "a b")
    assert result.stdout == '==> 1.1: "a b" <==\nb a\n==> 1.2: "a b" <==\nb a\n'


def test_echo(run: Run, fake_llm: Fake) -> None:
    for options in ([], ["--no-stream"]):
        assert run("generate", "--echo", *options, "a b ").stdout == "a b  b a\n"


def test_json_lines(run: Run, fake_llm: Fake) -> None:
    result = run("generate", "--json", "--n", "2", "--seed", "5", "a é", "c")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["prompt_index"], row["index"], row["prompt"], row["text"]) for row in rows] == [
        (0, 0, "a é", "é a"),
        (0, 1, "a é", "é a"),
        (1, 0, "c", "c"),
        (1, 1, "c", "c"),
    ]
    assert "é" in result.stdout
    first = rows[0]
    assert (first["token_ids"], first["finish_reason"], first["seed"]) == ([100, 101], "length", 5)
    assert first["prompt_token_ids"] == [1, 2, 3]
    assert first["metrics"]["prompt_tokens"] == 3 and first["metrics"]["ttft"] == 0.01
    assert "logprobs" not in first


def test_json_logprobs(run: Run, fake_llm: Fake) -> None:
    row = json.loads(run("generate", "--json", "--logprobs", "1", "a").stdout)
    top = [{"token_id": 7, "token": "seven", "logprob": -0.5}]
    assert row["logprobs"] == [{"token_id": 100, "token": "a", "logprob": -1.5, "top": top}]
    assert row["cumulative_logprob"] == -1.5


def test_summary_is_on_standard_error(run: Run, fake_llm: Fake) -> None:
    for arguments in (["a b c"], ["--no-stream", "a b c"]):
        result = run("generate", *arguments)
        assert result.stderr.startswith("pyengine: 3 prompt + 3 new tokens, first token ")
        assert result.stderr.count("\n") == 1
        assert run("generate", "--quiet", *arguments).stderr == ""


def test_summary_adds_up_all_prompts(run: Run, fake_llm: Fake) -> None:
    assert run("generate", "--n", "2", "a b", "c").stderr.startswith("pyengine: 6 prompt + 6 new tokens, ")


def test_prompts_from_files_and_arguments(run: Run, fake_llm: Fake, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": [4, 5], "extra": 1}\n')
    assert run("generate", "--file", str(path), "first").exit_code == 0
    assert fake_llm.made[0].calls[0][0] == ["first", "a", [4, 5]]


def test_token_ids_without_a_tokenizer(run: Run, fake_llm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_llm, "has_tokenizer", False)
    for options in ([], ["--no-stream"]):
        result = run("generate", "--ids", *options, "4, 5 6")
        assert result.stdout.split() == ["100,101,102"]
    assert fake_llm.made[0].calls[0][0] == [4, 5, 6]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_refused_prompt_is_one_line(run: Run, fake_llm: Fake, options: tuple[str, ...]) -> None:
    result = run("generate", *options, "a", "refuse")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "pyengine: prompt 1: refused\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--stream", "--json", "a"], "--stream"),
        (["--stream", "a", "b"], "--stream"),
        (["--stream", "--n", "2", "a"], "--stream"),
        (["--logprobs", "1", "a"], "--json"),
        (["--max-tokens", "1", "--max-length", "2", "a"], "max_length=2"),
        (["--prompt-logprobs", "1", "a"], "--json"),
        (["--stream", "--num-beams", "2", "a"], "--stream"),
        (["--stream", "--best-of", "2", "a"], "--stream"),
        (["--ids", "4,x"], "Token ids"),
        (["-", "-"], "only once"),
        (["--file", "-", "-"], "only once"),
        (["--threads", "0", "a"], "--threads"),
        (["--temperature", "warm", "a"], "--temperature"),
        (["--tempreature", "1", "a"], "--temperature"),
    ],
)
def test_wrong_usage_is_exit_status_2(run: Run, fake_llm: Fake, arguments: list[str], hint: str) -> None:
    result = run("generate", *arguments)
    assert (result.exit_code, result.stdout, fake_llm.made) == (2, "", [])
    assert hint in result.stderr


@pytest.mark.parametrize("option", ["--max-tokens=0", "--top-p=2", "--temperature=-1", "--n=0", "--seed=-1"])
def test_impossible_sampling_is_refused_before_loading(run: Run, fake_llm: Fake, option: str) -> None:
    result = run("generate", option, "a")
    assert (result.exit_code, result.stdout, fake_llm.made) == (2, "", [])
    field = option.strip("-").split("=")[0].replace("-", "_")
    assert f"Error: {field}=" in result.stderr


def test_interrupted_stream_keeps_what_was_printed(
    run: Run, fake_llm: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "interrupt_after", 2)
    result = run("generate", "a b c d")
    assert (result.exit_code, result.stdout) == (130, "d c \n")
    assert result.stderr.startswith("pyengine: interrupted: 2 new tokens")


def test_interrupted_batch_prints_what_there_is(
    run: Run, fake_llm: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_llm, "interrupt_after", 1)
    result = run("generate", "--json", "a b", "c")
    assert result.exit_code == 130
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["text"], row["finish_reason"]) for row in rows] == [("b a", "length"), ("c", "abort")]
    assert "interrupted" in result.stderr


def test_a_bug_is_reported_without_a_traceback(
    run: Run, fake_llm: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one divided by none")

    monkeypatch.setattr(fake_llm, "stream", fail)
    result = run("generate", "a")
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError: one divided by none" in result.stderr
    assert "PYENGINE_DEBUG=1" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setenv("PYENGINE_DEBUG", "1")
    assert isinstance(run("generate", "a").exception, ZeroDivisionError)
