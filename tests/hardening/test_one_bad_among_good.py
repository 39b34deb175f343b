"""One request of several fails: the others of its call go on, and other callers know nothing of it."""

from __future__ import annotations

import json
import threading
from array import array
from pathlib import Path

import pytest

from pyengine import LLM, RequestOutput, SamplingParams, ScoreOutput
from pyengine.errors import CheckpointError, RequestError
from tests.hardening import tiny
from tests.hardening.faults import command

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
POISON = 7  # its embedding is NaN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.make(tmp_path_factory.mktemp("poison") / "model")
    content = tiny.tensors()
    shape, values = content["wte.weight"]
    # Tied, so that its own logit would be NaN in every row: the head is given apart, and whole.
    content["lm_head.weight"] = (shape, values[:])
    width = shape[1]
    values[POISON * width : (POISON + 1) * width] = array("f", [float("nan")] * width)
    (directory / "model.safetensors").write_bytes(tiny.safetensors(content))
    tiny.edit_json(directory / "config.json", tie_word_embeddings=False)
    return directory


def test_the_others_of_a_call_finish(model: Path) -> None:
    llm = LLM(model)
    expected = [llm.generate([token], GREEDY)[0].outputs[0].token_ids for token in range(4)]
    seen: dict[int, RequestOutput] = {}
    with pytest.raises(
        CheckpointError, match=r"^prompt 2 of 5: request auto-\d+: the logits .* NaN"
    ) as caught:
        llm.generate([[0], [POISON], [2], [1, POISON], [3]], GREEDY, on_output=seen.__setitem__)
    assert isinstance(caught.value.__cause__, CheckpointError)
    assert sorted(seen) == [0, 2, 4]
    assert [seen[i].outputs[0].token_ids for i in (0, 2, 4)] == [expected[0], expected[2], expected[3]]
    assert all(output.finished for output in seen.values())
    assert llm.stats().running == llm.stats().waiting == 0
    assert llm.generate([0], GREEDY)[0].outputs[0].token_ids == expected[0]


def test_the_others_of_a_scoring_call_finish(model: Path) -> None:
    llm = LLM(model)
    seen: dict[int, ScoreOutput] = {}
    texts: list[list[int]] = [[1, POISON, 2], [1, 2], [3, 4]]
    with pytest.raises(CheckpointError, match=r"^text 1 of 3: "):
        llm.score(texts, on_output=seen.__setitem__)
    assert {i: score.token_ids for i, score in seen.items()} == {1: [1, 2], 2: [3, 4]}
    assert seen[1].logprobs == llm.score([1, 2]).logprobs


def test_other_callers_know_nothing_of_it(model: Path) -> None:
    llm = LLM(model, max_num_seqs=4)
    expected = [llm.generate([[token] * 5], GREEDY)[0].outputs[0].token_ids for token in range(4)]
    wrong: list[object] = []

    def good(token: int) -> None:
        for _ in range(20):
            if llm.generate([[token] * 5], GREEDY)[0].outputs[0].token_ids != expected[token]:
                wrong.append(token)

    def bad(_: int) -> None:
        for call in (lambda: llm.generate([1, POISON], GREEDY), lambda: llm.generate([999])) * 10:
            with pytest.raises((CheckpointError, RequestError)):
                call()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4) for work in (good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert llm._engine.core.manager.num_in_use == 0  # type: ignore[attr-defined]


def test_the_others_of_a_call_run_where_some_are_refused(model: Path) -> None:
    """Bad prompts, bad parameters and one that fails later, among good ones."""
    llm = LLM(model, seed=3)
    prompts: list[object] = [[1], [999], [2], 5.5, [3], [POISON], [0], [1, 2]]
    sampled = SamplingParams(max_tokens=6, ignore_eos=True)
    params = [sampled] * len(prompts)
    params[4] = SamplingParams(logit_bias={999: 1.0})
    params[6] = SamplingParams(max_tokens=3, max_length=None, truncate_prompt_tokens=1, seed=5)
    params[7] = SamplingParams(min_tokens=5000)
    seen: dict[int, RequestOutput] = {}
    with pytest.raises(RequestError, match="^prompt 2 of 8: token 0 of the prompt is 999") as caught:
        llm.generate(prompts, params, on_output=seen.__setitem__)  # type: ignore[arg-type]
    outputs = caught.value.outputs
    assert outputs is not None and len(outputs) == 8
    messages = {index: str(output.error) for index, output in enumerate(outputs) if output.error}
    assert list(messages) == [1, 3, 4, 5, 7]
    assert messages[3] == "prompt 4 of 8: a prompt is a string or a list of token ids, not float"
    assert messages[4].startswith("prompt 5 of 8: logit_bias: token id 999 is outside the vocabulary")
    assert messages[5].startswith("prompt 6 of 8: request auto-") and "NaN" in messages[5]
    assert messages[7].startswith("prompt 8 of 8: min_tokens=5000 asks for 5000 new tokens")
    assert [type(output.error) for output in outputs][5] is CheckpointError
    assert not any(output.outputs or output.finished for output in outputs if output.error)
    assert sorted(seen) == [0, 2, 6] and all(outputs[index] is seen[index] for index in seen)
    # The seeds of the others are those that they have among good ones.
    good = LLM(model, seed=3).generate([[1], [1], [2], [1], [3], [1], [0], [1]], sampled)
    assert [seen[index].outputs[0].token_ids for index in (0, 2)] == [
        good[index].outputs[0].token_ids for index in (0, 2)
    ]


def test_what_concerns_the_whole_call_is_refused_before_anything_runs(model: Path) -> None:
    llm = LLM(model)
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts") as caught:
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])
    assert caught.value.outputs is None and llm.stats().steps == 0


def test_a_call_of_bad_ones_alone(model: Path) -> None:
    llm = LLM(model)
    with pytest.raises(RequestError, match="^prompt 1 of 2: token 0 of the prompt is 999"):
        llm.generate([[999], [998]], GREEDY)
    with pytest.raises(RequestError, match="^token 0 of the prompt is 999"):
        llm.generate([999], GREEDY)
    assert llm.stats().steps == 0


def test_the_command_line_prints_what_finished(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": [{token}]}}\n' for token in (0, POISON, 2)))
    result = command("generate", "--model", str(model), "--json", "--quiet", "--file", str(prompts))
    assert [json.loads(line)["prompt_index"] for line in result.stdout.splitlines()] == [0, 2]
    assert result.exit_code == 1
    assert result.stderr.startswith("pyengine: prompt 2 of 3: ") and result.stderr.count("\n") == 1
    prompts.write_text("".join(f'{{"prompt": [{token}]}}\n' for token in (0, POISON, 2, 999)))
    result = command("generate", "--model", str(model), "--json", "--quiet", "--file", str(prompts))
    assert [json.loads(line)["prompt_index"] for line in result.stdout.splitlines()] == [0, 2]
    first, second = result.stderr.splitlines()
    assert first.startswith("pyengine: prompt 2 of 4: ") and second.startswith("pyengine: prompt 4 of 4: ")
    assert result.exit_code == 1
