"""Generating and streaming with the bundled model and with a checkpoint that has no tokenizer."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine
from pyengine import LLM, ConfigError, InternalError, RequestError, RequestOutput, SamplingParams

from .waiting import blocks_in_use, paused, wait_until, wait_until_idle

PROMPT = "Once upon a time there was a little"
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=40, temperature=0, seed=0)  # outputs report the seed even so


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_num_seqs=8, seed=1)


@pytest.fixture(scope="module")
def ids_only(checkpoint: Callable[[str], Path]) -> LLM:
    """160 positions, 307 tokens, no tokenizer."""
    return LLM(checkpoint("gelu"), seed=1)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM, ids_only: LLM) -> Any:
    yield
    for each in (llm, ids_only):
        wait_until_idle(each)


def test_import_is_light() -> None:
    code = (
        "import sys, pyengine\n"
        "llm = pyengine.LLM()\n"
        "out = llm.generate('The old house', pyengine.SamplingParams(max_tokens=3, stop='~', logprobs=2))\n"
        "assert out[0].outputs[0].token_ids\n"
        "heavy = ('torch', 'numpy', 'rich', 'transformers', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_exports() -> None:
    for name in pyengine.__all__:
        assert getattr(pyengine, name) is not None
    assert set(pyengine.__all__) <= set(dir(pyengine))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pyengine.nonsense  # noqa: B018


def test_generate(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, GREEDY)
    assert isinstance(output, RequestOutput) and output.finished and output.prompt == PROMPT
    assert llm.tokenizer is not None
    assert output.prompt_token_ids == llm.tokenizer.encode(PROMPT)
    (completion,) = output.outputs
    assert len(completion.token_ids) == 40 and completion.finish_reason == "length"
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert output.metrics.prompt_tokens == len(output.prompt_token_ids) and output.metrics.new_tokens == 40
    assert llm.generate(PROMPT, GREEDY)[0].outputs == output.outputs
    assert llm.generate(output.prompt_token_ids, GREEDY)[0].outputs == output.outputs


def test_every_way_to_give_prompts(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    expected = llm.generate(ids, GREEDY)[0].outputs[0].token_ids

    def tokens(prompts: Any) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]

    assert tokens([PROMPT]) == tokens([ids]) == tokens(tuple(ids)) == tokens(array("i", ids)) == [expected]
    assert tokens(np.array(ids)) == tokens(np.array([ids])) == [expected]
    assert tokens([PROMPT, ids, PROMPT]) == [expected] * 3
    assert tokens([]) == []
    bos = tokens([0])
    assert tokens(None) == tokens("") == tokens([[]]) == tokens([None]) == bos


def test_a_batch_is_its_prompts_alone(llm: LLM) -> None:
    prompts = [PROMPT[: 3 + 2 * i] for i in range(12)]
    params = [
        SamplingParams(max_tokens=5 + i, temperature=0.5 * (i % 3), seed=i, logprobs=1) for i in range(12)
    ]
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [output.outputs for output in together] == [output.outputs for output in alone]


def test_samples_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=12, seed=3)
    first = llm.generate(PROMPT, params)[0].outputs
    assert [completion.index for completion in first] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in first}) == 4
    assert llm.generate(PROMPT, params)[0].outputs == first
    assert llm.generate(PROMPT, SamplingParams(max_tokens=12, seed=3))[0].outputs[0] == first[0]
    assert llm.generate(PROMPT, SamplingParams(max_tokens=12, seed=4))[0].outputs[0] != first[0]


def test_a_reported_seed_gives_the_same_tokens(llm: LLM) -> None:
    one, two = (llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0] for _ in range(2))
    assert one.seed != two.seed and one.token_ids != two.token_ids
    again = llm.generate(PROMPT, SamplingParams(max_tokens=12, seed=two.seed))[0].outputs[0]
    assert again == two


def test_the_seed_of_the_llm_makes_a_program_reproducible(checkpoint: Callable[[str], Path]) -> None:
    def program(seed: int | None) -> list[list[int]]:
        llm = LLM(checkpoint("gelu"), seed=seed)
        return [output.outputs[0].token_ids for output in llm.generate([[1], [1], [2]])]

    assert program(5) == program(5)
    assert program(5) != program(6)
    assert program(None) != program(None)
    assert len({tuple(tokens) for tokens in program(5)}) == 3


def test_stop_strings(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    for stop in (text[10:11], text[17:20], text[3:30]):
        (completion,) = llm.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0, stop=["@@", stop]))[
            0
        ].outputs
        assert completion.text == text[: text.index(stop)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_stop_token_and_eos(llm: LLM, ids_only: LLM) -> None:
    tokens = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    params = SamplingParams(max_tokens=40, temperature=0, stop_token_ids=[tokens[9]])
    (completion,) = llm.generate(PROMPT, params)[0].outputs
    assert completion.token_ids == tokens[: tokens.index(tokens[9]) + 1]
    assert completion.stop_reason == tokens[9]
    # Random weights draw EOS (0) now and then; the seed is one with which they do.
    ends = [
        ids_only.generate([1], SamplingParams(max_tokens=150, seed=seed))[0].outputs[0] for seed in range(40)
    ]
    stopped = next(end for end in ends if end.finish_reason == "stop")
    assert stopped.token_ids[-1] == 0 == stopped.stop_reason and 0 not in stopped.token_ids[:-1]
    params = SamplingParams(max_tokens=150, seed=stopped.seed, ignore_eos=True)
    longer = ids_only.generate([1], params)[0].outputs[0]
    assert len(longer.token_ids) == 150 and longer.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_stream_adds_up_to_generate(llm: LLM) -> None:
    for params in (
        GREEDY,
        SamplingParams(max_tokens=30, n=3, seed=2, logprobs=2),
        SamplingParams(max_tokens=60, seed=8, temperature=2.0),  # odd bytes: characters in parts
        SamplingParams(max_tokens=60, seed=2, stop=["the ", "e"]),
    ):
        (whole,) = llm.generate(PROMPT, params)
        deltas = list(llm.stream(PROMPT, params))
        for completion in whole.outputs:
            own = [delta for delta in deltas if delta.index == completion.index]
            assert "".join(delta.text for delta in own) == completion.text
            assert [token for delta in own for token in delta.token_ids] == completion.token_ids
            assert own[-1].finish_reason == completion.finish_reason
        assert deltas[-1].output is not None and deltas[-1].output.outputs == whole.outputs


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    aborted = llm.stats().aborted
    with paused(llm, after=1):
        stream = llm.stream(PROMPT, LONG)
        next(stream)
        assert blocks_in_use(llm) > 0
        stream.close()
    wait_until(lambda: blocks_in_use(llm) == 0)
    with paused(llm, after=1):
        forgotten = llm.stream(PROMPT, LONG)
        next(forgotten)
        del forgotten
        gc.collect()
    wait_until(lambda: blocks_in_use(llm) == 0)
    with paused(llm):
        llm.stream(PROMPT, LONG)  # never begun
        gc.collect()
    wait_until(lambda: not llm._engine.requests)
    assert llm.stats().aborted == aborted + 3


def test_abort_ends_a_stream(llm: LLM) -> None:
    with paused(llm, after=3):
        stream = llm.stream(PROMPT, LONG, request_id="mine")
        deltas = [next(stream) for _ in range(3)]
        llm.abort("mine")
    deltas += stream
    assert 4 <= len(deltas) <= 5
    assert deltas[-1].finish_reason == "abort" and deltas[-1].request_id == "mine"
    llm.abort("mine")
    llm.abort("nobody's")


def test_streams_and_lists_run_together(llm: LLM) -> None:
    expected = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    text = ""
    for delta in llm.stream(PROMPT, GREEDY):
        text += delta.text
        if len(text) % 3 == 0:
            assert llm.generate(PROMPT, GREEDY)[0].outputs[0] == expected
    assert text == expected.text


def test_threads(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=10 + i, seed=i, n=1 + i % 2) for i in range(8)]
    expected = [llm.generate(PROMPT, one)[0].outputs for one in params]
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        if number % 2:
            results[number] = llm.generate(PROMPT, params[number])[0].outputs
        else:
            *_, last = llm.stream(PROMPT, params[number])
            assert last.output is not None
            results[number] = last.output.outputs

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results.get(number) for number in range(8)] == expected


def test_a_failing_step_fails_every_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InternalError("as the test asked")

    with paused(llm, after=1):
        stream = llm.stream(PROMPT, LONG)
        next(stream)
        monkeypatch.setattr(llm._engine.scheduler, "schedule", fail)
    with pytest.raises(InternalError, match="given up.*as the test asked"):
        llm.generate(PROMPT, LONG)
    with pytest.raises(InternalError, match="given up.*as the test asked"):
        list(stream)
    monkeypatch.undo()
    assert llm.generate(PROMPT, GREEDY)[0].finished


def test_progress(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int, int]] = []
    llm.generate([PROMPT] * 3, GREEDY, progress=lambda *counts: calls.append(counts))
    assert calls[-1] == (3, 3, 120)
    assert calls == sorted(calls)
    llm.generate([PROMPT] * 3, GREEDY, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("\r3/3 prompts, 120 new tokens\n")


def test_a_bad_prompt_is_named_and_nothing_runs(llm: LLM) -> None:
    prompts: list[str | list[int]] = [PROMPT, [1, 2, 4096], PROMPT]
    ran = llm._engine.core.manager.num_available
    with pytest.raises(RequestError, match=r"^prompt 2 of 3: token 2 of the prompt is 4096: .* to 4095"):
        llm.generate(prompts, GREEDY)
    assert llm._engine.core.manager.num_available == ran


@pytest.mark.parametrize(
    "prompt",
    [[-1], [True], [1.5], ["a", 3.0], [1, None], [2**31], 7, 1.5, {"a": 1}, [[["a"]]], b"bytes", "\ud800"],
    ids=repr,
)
def test_bad_prompts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(pyengine.PyEngineError):
        llm.generate(prompt, GREEDY)


def test_params_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate([PROMPT] * 3, [GREEDY] * 2)
    with pytest.raises(RequestError, match="not dict"):
        llm.generate(PROMPT, {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="one prompt"):
        llm.stream([PROMPT, PROMPT])  # type: ignore[list-item]


def test_long_prompts(ids_only: LLM) -> None:
    prompt = [i % 300 for i in range(500)]
    with pytest.raises(RequestError, match="has 500 tokens, and the context holds 160"):
        ids_only.generate(prompt)
    params = SamplingParams(max_tokens=8, seed=1, truncate_prompt_tokens=100)
    (output,) = ids_only.generate(prompt, params)
    assert output.prompt_token_ids == prompt[-100:]
    assert output.outputs == ids_only.generate(prompt[-100:], SamplingParams(max_tokens=8, seed=1))[0].outputs
    (output,) = ids_only.generate(prompt[:150], SamplingParams(ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 10 and output.outputs[0].finish_reason == "length"


def test_without_a_tokenizer(ids_only: LLM) -> None:
    assert ids_only.tokenizer is None
    with pytest.raises(RequestError, match="no tokenizer files"):
        ids_only.generate("Hello")
    (output,) = ids_only.generate([5, 6], SamplingParams(max_tokens=4, logprobs=1, ignore_eos=True))
    assert output.prompt is None and output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 4
    (from_bos,) = ids_only.generate(None, SamplingParams(max_tokens=2))
    assert from_bos.prompt_token_ids == [0]


def test_a_cache_too_small_for_the_request(checkpoint: Callable[[str], Path]) -> None:
    block = 2 * 2 * 2 * 32 * 16 * 4  # layers, keys and values, heads, head_dim, tokens, bytes
    llm = LLM(checkpoint("gelu"), kv_cache_memory=4 * block)
    assert llm.num_kv_blocks == 4
    with pytest.raises(RequestError, match="need 5 blocks of 16 tokens, and the whole KV cache has 4"):
        llm.generate([1] * 10, SamplingParams(max_tokens=60))
    prompts = [[i] * 10 for i in range(5)]
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    got = llm.generate(prompts, params)
    plenty = LLM(checkpoint("gelu")).generate(prompts, params)
    assert [output.outputs[0].token_ids for output in got] == [
        output.outputs[0].token_ids for output in plenty
    ]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("device", "tpu"),
        ("dtype", "float16"),
        ("dtype", "int8"),
        ("quantization", "int3"),
        ("kv_cache_dtype", "int4"),
        ("num_threads", 0),
        ("max_model_len", 513),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", -1),
        ("kv_cache_memory", "a lot"),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=argument):
        LLM(**{argument: value})


def test_settings_not_applied_are_warned_of(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("relu")
    (directory / "generation_config.json").write_text('{"num_beams": 4, "do_sample": false}')
    with pytest.warns(UserWarning, match=r"does not apply num_beams=4"):
        llm = LLM(directory)
    first, second = (llm.generate([3])[0].outputs[0].token_ids for _ in range(2))
    assert first == second, "do_sample: false is greedy"
