"""Controls of ``SamplingParams`` through an ``LLM``: against transformers, and among themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from pyengine import LLM, RequestError, SamplingParams

PROMPTS = [[1, 2, 3], [7], list(range(20, 40)), [5, 5, 5, 5], [11, 12, 11, 12, 11]]


@pytest.fixture(scope="module")
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("gelu")


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize(
    "controls",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[1], [2, 3], [4, 5, 6]]},
        {"sequence_bias": {(3,): 5.0, (3, 9): 20.0}},
        {"suppress_tokens": list(range(60))},
        {"min_new_tokens": 15, "eos_token_id": list(range(0, 90, 2))},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_transformers(llm: LLM, reference: Any, controls: dict[str, Any]) -> None:
    ours = llm.generate(PROMPTS, SamplingParams(do_sample=False, max_new_tokens=20, **controls))
    for prompt, output in zip(PROMPTS, ours, strict=True):
        ids = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=20,
            **controls,
            attention_mask=torch.ones(1, len(prompt)),
        )
        assert output.outputs[0].token_ids == ids[0, len(prompt) :].tolist()


MIXES = [
    SamplingParams(max_tokens=25, seed=1, repetition_penalty=1.3, top_k=20),
    SamplingParams(max_tokens=25, seed=2, presence_penalty=1.0, frequency_penalty=0.5, min_p=0.02),
    SamplingParams(max_tokens=25, seed=3, mirostat=2, mirostat_tau=3.0),
    SamplingParams(max_tokens=25, seed=4, no_repeat_ngram_size=2, typical_p=0.8, n=3),
    SamplingParams(max_tokens=25, seed=5, temperature=0, bad_words_ids=[[3, 4]], logit_bias={7: 3.0}),
    SamplingParams(
        max_tokens=25,
        seed=6,
        min_tokens=12,
        eos_token_id=list(range(30)),
        eta_cutoff=0.01,
        logits_processors=[lambda ids, logits: logits - 0.2 * np.isin(np.arange(logits.size), ids)],
    ),
]


def tokens_of(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    return [[sample.token_ids for sample in output.outputs] for output in llm.generate(prompts, params)]


def test_equal_alone_in_a_batch_after_preemption_and_at_any_thread_count(llm: LLM, directory: Path) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(MIXES))]
    alone = [
        [sample.token_ids for sample in llm.generate([prompt], params)[0].outputs]
        for prompt, params in zip(prompts, MIXES, strict=True)
    ]
    assert tokens_of(llm, MIXES) == alone
    block = llm._engine.core.kv.block_bytes
    for threads in (1, 3):
        small = LLM(directory, num_threads=threads, kv_cache_memory=7 * block, max_num_batched_tokens=16)
        outputs = small.generate(prompts, MIXES)
        assert [[sample.token_ids for sample in output.outputs] for output in outputs] == alone
        assert sum(output.metrics.preemptions for output in outputs) > 0


def test_minimum_length_holds_eos_and_stop_strings_back(llm: LLM) -> None:
    every_other = list(range(0, 90, 2))
    for least in (0, 5, 17):
        params = SamplingParams(max_tokens=30, min_tokens=least, eos_token_id=every_other, seed=8)
        token_ids = llm.generate([[1]], params)[0].outputs[0].token_ids
        assert len(token_ids) > least
        assert all(token % 2 for token in token_ids[:least] if token < 90)


def test_prompt_logprobs_are_those_of_scoring(llm: LLM, directory: Path) -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=4, n=2, seed=1)
    small = LLM(directory, max_num_batched_tokens=16)
    for model in (llm, llm, small):  # the second time from the prefix cache, the third in chunks
        outputs = model.generate(PROMPTS, params)
        for prompt, output, score in zip(PROMPTS, outputs, llm.score(PROMPTS, top_logprobs=4), strict=True):
            assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompt)
            assert score.top_logprobs is not None
            rows = zip(
                prompt[1:],
                output.prompt_logprobs[1:],
                score.logprobs[1:],
                score.top_logprobs[1:],
                strict=True,
            )
            for token, row, logprob, best in rows:
                assert row is not None and best is not None
                assert row[token].logprob == logprob
                assert [each.logprob for each in list(row.values())[:4]] == [each.logprob for each in best]
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=2))[0].prompt_logprobs is None


def test_the_best_samples_are_returned(llm: LLM) -> None:
    every = llm.generate([[1, 2]], SamplingParams(max_tokens=8, n=6, logprobs=0, seed=9))[0].outputs
    best = llm.generate([[1, 2]], SamplingParams(max_tokens=8, n=2, best_of=6, seed=9))[0].outputs
    ranked = sorted(every, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    assert [sample.token_ids for sample in best] == [sample.token_ids for sample in ranked[:2]]
    assert [sample.index for sample in best] == [0, 1] and best[0].logprobs is None
    with pytest.raises(RequestError, match="best_of=6 with n=2"):
        llm.stream([1], SamplingParams(n=2, best_of=6))


def test_a_request_without_any_token_left_ends_alone(llm: LLM) -> None:
    bad = SamplingParams(max_tokens=4, allowed_token_ids=[3, 4], bad_words_ids=[[3], [4]])
    good = llm.stream([1], SamplingParams(max_tokens=4, temperature=0))
    with pytest.raises(RequestError, match="allowed_token_ids, bad_words.* forbid every token"):
        llm.generate([[1]], bad)
    assert len([delta for delta in good if delta.token_ids]) == 4


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_processor_that_fails_ends_its_request_alone(llm: LLM, kind: type[BaseException]) -> None:
    def fails(ids: Any, logits: Any) -> None:
        raise kind("no such word")

    good = llm.stream([1], SamplingParams(max_tokens=4, temperature=0))
    with pytest.raises(
        RequestError, match=f"its logits processor failed: {kind.__name__}.'no such word'"
    ) as caught:
        llm.generate([[1]], SamplingParams(logits_processors=[fails]))
    assert isinstance(caught.value.__cause__, kind)
    assert len([delta for delta in good if delta.token_ids]) == 4


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM()


def test_stop_strings_may_stay_in_the_text(bundled: LLM) -> None:
    whole = (
        bundled.generate("Once upon a time", SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text
    )
    stop = whole[30:34]
    cut = whole[: whole.index(stop)]
    for include in (False, True):
        params = SamplingParams(max_tokens=40, temperature=0, stop=stop, include_stop_str_in_output=include)
        sample = bundled.generate("Once upon a time", params)[0].outputs[0]
        assert (sample.text, sample.stop_reason) == (cut + stop * include, stop)
        assert "".join(delta.text for delta in bundled.stream("Once upon a time", params)) == sample.text
    token = sample.token_ids[3]
    params = SamplingParams(
        max_tokens=40, temperature=0, stop_token_ids=[token], include_stop_str_in_output=True
    )
    sample = bundled.generate("Once upon a time", params)[0].outputs[0]
    assert sample.stop_reason == token and whole.startswith(sample.text)
    assert "".join(delta.text for delta in bundled.stream("Once upon a time", params)) == sample.text
    without = bundled.generate(
        "Once upon a time", SamplingParams(max_tokens=40, temperature=0, stop_token_ids=[token])
    )
    assert len(without[0].outputs[0].text) < len(sample.text)


def test_a_stop_string_does_not_count_before_the_minimum(bundled: LLM) -> None:
    params: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "stop": [" "]}
    early = bundled.generate("Once upon a time", SamplingParams(**params))[0].outputs[0]
    late = bundled.generate("Once upon a time", SamplingParams(**params, min_tokens=20))[0].outputs[0]
    assert len(early.token_ids) < 5 and len(late.token_ids) > 20 and " " in late.text


def test_echo_puts_the_prompt_in_front(bundled: LLM) -> None:
    plain: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "stop": ["time"]}
    text = bundled.generate("Once upon a time", SamplingParams(**plain))[0].outputs[0].text
    params = SamplingParams(**plain, echo=True)
    assert bundled.generate("Once upon a time", params)[0].outputs[0].text == "Once upon a time" + text
    assert "".join(d.text for d in bundled.stream("Once upon a time", params)) == "Once upon a time" + text


def test_bad_words_do_not_come(bundled: LLM) -> None:
    plain = SamplingParams(max_tokens=60, temperature=0)
    text = bundled.generate("Once upon a time", plain)[0].outputs[0].text
    word = max(text.split(), key=len)
    without = SamplingParams(max_tokens=60, temperature=0, bad_words=[word])
    assert word not in bundled.generate("Once upon a time", without)[0].outputs[0].text
