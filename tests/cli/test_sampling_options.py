"""Options for the controls of decoding: which field of SamplingParams each is, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from pyengine import SamplingParams, StructuredOutputsParams
from pyengine.cli.generate import command
from pyengine.decoding.params import ALIASES
from tests.cli.conftest import Run
from tests.cli.fake_llm import FakeLLM

Fake = type[FakeLLM]


def asked_for(run: Run, fake_llm: Fake, *arguments: str) -> SamplingParams:
    result = run("generate", "--no-stream", *arguments, "a")
    assert result.exit_code == 0, result.stderr
    return fake_llm.made[-1].calls[0][1]


def test_every_field_has_an_option() -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    # The constraint has options by kind; functions cannot be said on a command line.
    fields -= {"structured_outputs", "logits_processors"}
    fields |= set(ALIASES) - {"guided_decoding"} | {"do_sample"}
    assert {"--" + field.replace("_", "-") for field in fields} <= options


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ("--min-tokens 3 --max-new-tokens 9", {"min_tokens": 3, "max_tokens": 9}),
        ("--min-new-tokens 3", {"min_tokens": 3}),
        ("--min-length 3 --max-length 9", {"min_length": 3, "max_length": 9}),
        ("--num-return-sequences 3 --best-of 4", {"n": 3, "best_of": 4}),
        ("--stop-strings x", {"stop": ["x"]}),
        ("--stop x --include-stop-str-in-output", {"stop": ["x"], "include_stop_str_in_output": True}),
        ("--stop-token-ids 4,5 --eos-token-id 6", {"stop_token_ids": [4, 5], "eos_token_id": [6]}),
        ("--no-do-sample", {"temperature": 0.0}),
        ("--do-sample --temperature 0.5", {"temperature": 0.5}),
        ("--min-p 0.1 --typical-p 0.9", {"min_p": 0.1, "typical_p": 0.9}),
        ("--epsilon-cutoff 0.01 --eta-cutoff 0.02", {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02}),
        (
            "--mirostat 2 --mirostat-tau 3 --mirostat-eta 0.2",
            {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        ),
        (
            "--repetition-penalty 1.2 --presence-penalty -1 --frequency-penalty 0.5 --no-repeat-ngram-size 3",
            {
                "repetition_penalty": 1.2,
                "presence_penalty": -1.0,
                "frequency_penalty": 0.5,
                "no_repeat_ngram_size": 3,
            },
        ),
        (
            "--bad-words x --bad-words y --bad-words-ids 4,5 --bad-words-ids 6 --suppress-tokens 7",
            {"bad_words": ["x", "y"], "bad_words_ids": [[4, 5], [6]], "suppress_tokens": [7]},
        ),
        ("--allowed-token-ids [4,5]", {"allowed_token_ids": [4, 5]}),
        (
            "--logit-bias 4=-2.5 --sequence-bias 4,5=1 --logit-bias 6=-inf",
            {"logit_bias": [([4], -2.5), ([4, 5], 1.0), ([6], -float("inf"))]},
        ),
        (
            "--num-beams 4 --n 2 --length-penalty 0.5 --early-stopping true",
            {"num_beams": 4, "n": 2, "length_penalty": 0.5, "early_stopping": True},
        ),
        ("--num-beams 4 --early-stopping false", {"num_beams": 4, "early_stopping": False}),
        ("--num-beams 4 --early-stopping never", {"num_beams": 4, "early_stopping": "never"}),
        ("--no-skip-special-tokens", {"skip_special_tokens": False}),
        ("--json --logprobs 3 --prompt-logprobs 2", {"logprobs": 3, "prompt_logprobs": 2}),
        ("--regex a+b", {"structured_outputs": StructuredOutputsParams(regex="a+b")}),
        ("--choice x --choice y", {"structured_outputs": StructuredOutputsParams(choice=["x", "y"])}),
        (
            "--json-object --disable-any-whitespace",
            {"structured_outputs": StructuredOutputsParams(json_object=True, disable_any_whitespace=True)},
        ),
        ('--json-schema {"a":1}', {"structured_outputs": StructuredOutputsParams(json='{"a":1}')}),
    ],
)  # fmt: skip
def test_options_are_fields(run: Run, fake_llm: Fake, options: str, fields: dict[str, Any]) -> None:
    assert asked_for(run, fake_llm, *options.split(" ")) == SamplingParams(**fields)


def test_schemas_and_grammars_come_from_files(run: Run, fake_llm: Fake, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "integer"}')
    grammar.write_text('start: "é"+')
    found = asked_for(run, fake_llm, "--json-schema", str(schema)).structured_outputs
    assert found == StructuredOutputsParams(json='{"type": "integer"}')
    found = asked_for(run, fake_llm, "--grammar", str(grammar)).structured_outputs
    assert found == StructuredOutputsParams(grammar='start: "é"+')


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ("--speculative-method suffix", {"method": "suffix"}),
        ("--speculative-model m --num-speculative-tokens 4", {"model": "m", "num_speculative_tokens": 4}),
        ("--draft-model m", {"model": "m"}),
        ("--assistant-model m --num-assistant-tokens 3", {"model": "m", "num_speculative_tokens": 3}),
        (
            '--speculative-config {"method":"ngram"} --num-speculative-tokens 4',
            {"method": "ngram", "num_speculative_tokens": 4},
        ),
    ],
)
def test_speculation(run: Run, fake_llm: Fake, options: str, config: dict[str, Any]) -> None:
    asked_for(run, fake_llm, *options.split())
    assert fake_llm.made[0].settings["speculative_config"] == config


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--top-k -2", "top_k=-2: must be an integer from -1 to 2147483647"),
        ("--min-p 1.5", "min_p=1.5: must be a number from 0 to 1"),
        ("--typical-p 0", "typical_p=0.0: must be a number above 0 and up to 1"),
        ("--repetition-penalty 0", "repetition_penalty=0.0: must be a number above 0"),
        ("--presence-penalty 3", "presence_penalty=3.0: must be a number from -2 to 2"),
        ("--mirostat 1", "mirostat=1: must be 0 (off) or 2"),
        ("--mirostat 2 --top-p 0.5", "mirostat=2 and top_p=0.5 contradict each other"),
        ("--num-beams 2 --n 3", "n must be from 1 to 2"),
        ("--num-beams 2 --do-sample", "do_sample=True and num_beams=2 contradict each other"),
        ("--n 3 --best-of 2", "best_of=2: must be an integer from 3 to"),
        ("--n 2 --no-do-sample", "n=2 with temperature=0"),
        ("--min-tokens 5 --max-tokens 4", "min_tokens must be from 0 to 4"),
        ("--json --logprobs 65", "logprobs=65: must be an integer from 0 to 64"),
        ("--stop-token-ids x", "--stop-token-ids: Token ids are whole numbers"),
        ("--logit-bias 4", "--logit-bias: token ids and a number are expected"),
        ("--logit-bias 4=nan", "a bias must be a number up to 1e30"),
        ("--regex a --choice b", "not --regex and --choice"),
        ("--disable-any-whitespace", "not --disable-any-whitespace alone"),
        ("--json-schema {", "must be a JSON schema"),
        ("--grammar -", "--grammar: the name of a file is expected"),
        ("--num-speculative-tokens 3", "--speculative-method"),
        ("--speculative-config [1]", "an object is expected"),
        ("--speculative-config {", "not JSON"),
        ('--speculative-config {"method":"ngram"} --speculative-method suffix', "give one of the two"),
        ("--early-stopping maybe --num-beams 2", "--early-stopping"),
    ],
)
def test_refusals_before_anything_is_loaded(run: Run, fake_llm: Fake, options: str, hint: str) -> None:
    result = run("generate", *options.split(), "a")
    assert (result.exit_code, result.stdout, fake_llm.made) == (2, "", [])
    assert hint in re.sub(r"\s+", " ", result.stderr)


def test_help_has_sections_and_every_option_once() -> None:
    context = click.Context(command, info_name="generate", max_content_width=110, terminal_width=110)
    text = command.get_help(context)
    for heading in ("Prompts:", "Length and end:", "Repetition:", "Output:", "Model and machine:"):
        assert text.count(f"\n{heading}\n") == 1
    options = text.split("Examples:")[0]
    assert "[PROMPTS]..." not in options.split("Prompts:")[1]
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            first = next(option for option in parameter.opts if option.startswith("--"))
            assert len(re.findall(rf"^  (?:-\w, )?{first}(?![\w-])", options, re.M)) == 1, first


def test_the_bundled_model_obeys(run: Run) -> None:
    """Through the real engine: constraint, bias, beams, probabilities of the prompt and speculation."""
    pytest.importorskip("llguidance")
    base = ("generate", "--quiet", "--seed", "1", "--max-tokens", "12")
    assert re.fullmatch("[0-9]{4}\n", run(*base, "--regex", "[0-9]{4}", "The").stdout)
    assert run(*base, "--choice", "up", "--choice", "down", "The").stdout in ("up\n", "down\n")
    rows = run(*base, "--json", "--num-beams", "3", "--n", "2", "--prompt-logprobs", "1", "The old").stdout
    first, second = map(json.loads, rows.splitlines())
    assert first["score"] > second["score"]
    assert first["prompt_logprobs"][0] is None and first["prompt_logprobs"][1]["logprob"] < 0
    plain = run(*base, "The old house").stdout
    assert run(*base, "--speculative-method", "suffix", "The old house").stdout == plain
    result = run(*base, "--allowed-token-ids", "999999", "The")
    assert result.exit_code == 1 and "ids run from 0 to" in result.stderr


def test_score_shows_the_best_tokens_and_strides(run: Run) -> None:
    row = json.loads(run("score", "--json", "--top-logprobs", "2", "The old house").stdout)
    assert row["top_logprobs"][0] is None and [len(best) for best in row["top_logprobs"][1:]] == [2, 2]
    assert row["top_logprobs"][1][0]["logprob"] >= row["logprobs"][1]
    lines = run("score", "--top-logprobs", "2", "The old house").stdout.splitlines()
    assert json.dumps(row["top_logprobs"][1][0]["token"]) in lines[2].split("best:")[1]
    assert "best:" not in lines[1]
    windows = ("score", "--json", "--max-model-len", "8", "The old house was a very old house, it was said.")
    one, other = (json.loads(run(*windows, "--stride", stride).stdout) for stride in ("1", "7"))
    assert one["logprobs"][:8] == other["logprobs"][:8] and one["logprobs"][8:] != other["logprobs"][8:]
    assert run("score", "--stride", "0", "The").exit_code == 1
    assert run("score", "--top-logprobs", "1", "--choice", "a", "--choice", "b", "The").exit_code == 2
