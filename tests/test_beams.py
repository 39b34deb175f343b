"""Beam search: the sequences and scores of transformers, and what a request may combine it with."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from pyengine import LLM, RequestError, SamplingParams, StructuredOutputsParams
from pyengine.engine.beams import Beam
from pyengine.model.checkpoint import resolve

# Of the prompts, 8 of each: transformers runs those of one length together. It takes no notice of a bias for
# a sequence that is longer than the text so far, though all but its last token are there.
Scored = tuple[list[int], float]
LENGTHS = (2, 5, 9, 16)
NEW_TOKENS = 20
COMMON = [12, 14, 199, 262]  # comma, full stop, line end and " the" end texts: there are complete ones

SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": COMMON},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "eos_token_id": COMMON},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "eos_token_id": COMMON},
    {"num_beams": 4, "length_penalty": -1.0, "eos_token_id": COMMON, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "eos_token_id": COMMON[0]},
    {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": COMMON},
    {"num_beams": 4, "bad_words_ids": [[16], [262, 284]], "sequence_bias": {(284,): -2.0, (12, 284): 3.0},
     "min_new_tokens": 6, "eos_token_id": COMMON, "num_return_sequences": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


@pytest.fixture(scope="module")
def reference() -> Any:
    model = GPT2LMHeadModel.from_pretrained(resolve(None), attn_implementation="eager", dtype=torch.float32)
    model.generation_config = type(model.generation_config)(pad_token_id=0, eos_token_id=0)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    rng = np.random.default_rng(5)
    assert llm.tokenizer is not None
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    text += "must be in want of a wife. However little known the feelings or views of such a man may be on "
    ids = llm.tokenizer.encode(text)
    starts = [int(start) for start in rng.integers(0, len(ids) - max(LENGTHS), 32)]
    return [ids[start : start + LENGTHS[number // 8]] for number, start in enumerate(starts)]


def gain_in_float64(
    model: Any, prompt: list[int], ours: Scored, theirs: Scored, penalty: float
) -> float:
    """How much better their sequence is, once the models part of both scores is in float64."""

    def corrected(ids: list[int], score: float) -> float:
        tokens, totals = torch.tensor([prompt + ids]), []
        for precise in (model.float(), copy.deepcopy(model).double()):
            with torch.no_grad():
                logits = precise(tokens).logits[0, len(prompt) - 1 : -1]
            found = torch.log_softmax(logits, -1).gather(1, tokens[0, len(prompt) :, None])
            totals.append(float(found.double().sum() / len(ids) ** penalty))
        return score + totals[1] - totals[0]

    return corrected(*theirs) - corrected(*ours)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_transformers(
    llm: LLM, reference: Any, prompts: list[list[int]], settings: dict[str, Any]
) -> None:
    ours = llm.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, **settings))
    count = settings.get("num_return_sequences", 1)
    theirs: list[tuple[list[int], float]] = []
    for first in range(0, len(prompts), 8):
        batch = torch.tensor(prompts[first : first + 8])
        found = reference.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        new = found.sequences[:, batch.shape[1] :].tolist()
        theirs += zip(new, found.sequences_scores.tolist(), strict=True)
    reasons = []
    for number, output in enumerate(ours):
        assert len(output.outputs) == count
        for rank, completion in enumerate(output.outputs):
            reasons.append(completion.finish_reason)
            ids, score = theirs[number * count + rank]
            ids = without_padding(ids, settings.get("eos_token_id", 0))
            assert completion.score == pytest.approx(score, abs=1e-4)
            if completion.token_ids != ids:
                penalty = settings.get("length_penalty", 1.0)
                assert completion.score is not None
                mine = (completion.token_ids, completion.score)
                assert abs(gain_in_float64(reference, prompts[number], mine, (ids, score), penalty)) <= 1e-4
    if "eos_token_id" in settings:
        assert reasons.count("stop") > len(reasons) // 8


def without_padding(ids: list[int], eos: int | list[int]) -> list[int]:
    ends = [at for at, token in enumerate(ids) if token in (eos if isinstance(eos, list) else [eos])]
    return ids[: ends[0] + 1] if ends else ids


def test_company_and_memory_change_nothing(llm: LLM, prompts: list[list[int]]) -> None:
    """Other requests, other beams, preemption, few slots, chunks, the cache of prefixes."""
    long = [prompt * (20 // len(prompt)) for prompt in prompts[:12]]
    mixed = [
        SamplingParams(max_tokens=40, num_beams=1 + number % 4, n=1, seed=1, logprobs=2,
                       temperature=0 if number % 4 else None, repetition_penalty=1.0 + 0.1 * (number % 3))
        for number in range(len(long))
    ]  # fmt: skip
    alone = [llm.generate(prompt, params)[0] for prompt, params in zip(long, mixed, strict=True)]
    block = llm._engine.core.kv.block_bytes
    for caching in (True, False):
        small = LLM(dtype="float32", num_threads=1, kv_cache_memory=11 * block, max_num_seqs=5,
                    max_num_batched_tokens=16, enable_prefix_caching=caching, max_model_len=80)  # fmt: skip
        crowded = small.generate(long, mixed)
        assert [output.outputs for output in crowded] == [output.outputs for output in alone]
        assert small.stats().preemptions > 0 and small.stats().kv_blocks_used == 0
        small._engine.core.manager.check_invariants()  # type: ignore[attr-defined]


def test_beams_share_blocks_until_they_write(llm: LLM) -> None:
    """Eight beams of a prompt of six blocks never hold more than those six, and two of their own each."""
    most = 0
    seen = llm._engine._hand_out

    def watched(*arguments: Any) -> None:
        nonlocal most
        most = max(most, llm.stats().kv_blocks_used)
        seen(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._engine, "_hand_out", watched)
        llm.generate([7] * 96, SamplingParams(num_beams=8, max_tokens=16, ignore_eos=True))
    assert 6 < most <= 6 + 8 * 2


def test_scores_and_logprobs(llm: LLM) -> None:
    """Without processors the score is the sum of the model's own log-probabilities, by its length."""
    params = SamplingParams(
        num_beams=4, n=4, max_tokens=12, length_penalty=0.5, logprobs=3, prompt_logprobs=1
    )
    output = llm.generate("The old house", params)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    scores = [completion.score or 0.0 for completion in output.outputs]
    assert scores == sorted(scores, reverse=True)
    for completion in output.outputs:
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        assert completion.score is not None and completion.cumulative_logprob is not None
        assert completion.score * len(completion.token_ids) ** 0.5 == pytest.approx(
            completion.cumulative_logprob, abs=1e-4
        )
        scored = llm.score(output.prompt_token_ids, completion.token_ids)
        assert scored.total_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.metrics.new_tokens == sum(len(completion.token_ids) for completion in output.outputs)


def test_stop_strings(llm: LLM) -> None:
    params = SamplingParams(num_beams=4, n=4, max_tokens=30, stop=[",", "and"], early_stopping=True)
    stopped = llm.generate("There was a little", params)[0].outputs
    for completion in stopped:
        assert completion.finish_reason == "stop" and completion.stop_reason in (",", "and")
        assert "," not in completion.text and "and" not in completion.text
    kept = llm.generate(
        "There was a little",
        SamplingParams(num_beams=4, n=4, max_tokens=30, stop=[",", "and"], early_stopping=True,
                       include_stop_str_in_output=True, echo=True),
    )[0].outputs  # fmt: skip
    for with_stop, without in zip(kept, stopped, strict=True):
        assert with_stop.text == f"There was a little{without.text}{without.stop_reason}"


def test_constraints(llm: LLM) -> None:
    pytest.importorskip("llguidance", reason="constrained text needs llguidance")
    choices = ["positive", "negative", "neutral", "no idea"]
    constraint = StructuredOutputsParams(choice=choices)
    params = SamplingParams(num_beams=6, n=6, structured_outputs=constraint)
    output = llm.generate("I loved it. It was", params)[0]
    texts = [completion.text for completion in output.outputs]
    assert len(set(texts)) >= 3 and set(texts) <= set(choices)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    constraint = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    output = llm.generate("x", SamplingParams(num_beams=3, n=2, structured_outputs=constraint))[0]
    assert sorted(json.loads(completion.text)["a"] for completion in output.outputs) == [1, 2]


def test_custom_processors_see_log_probabilities(llm: LLM) -> None:
    sums = []

    def processor(token_ids: Any, scores: Any) -> Any:
        sums.append(float(np.exp(scores.astype(np.float64)).sum()))
        scores[11] = -np.inf
        return scores * 2

    params = SamplingParams(num_beams=3, n=3, max_tokens=8, logits_processors=[processor], logprobs=0)
    outputs = llm.generate("The old house", params)[0].outputs
    assert np.allclose(sums, 1, atol=1e-4)
    for completion in outputs:
        assert 11 not in completion.token_ids and completion.score is not None
        assert completion.cumulative_logprob is not None
        assert completion.score == pytest.approx(2 * completion.cumulative_logprob / 8, abs=1e-4)


def test_edits_that_leave_nothing(llm: LLM) -> None:
    params = SamplingParams(num_beams=2, allowed_token_ids=[5], bad_words_ids=[[5]])
    with pytest.raises(RequestError, match="nothing may follow its token 0: allowed_token_ids"):
        llm.generate([3], params)
    # Beams that cannot go on die, and what has been complete before is returned.
    only = SamplingParams(num_beams=3, n=3, allowed_token_ids=[5, 6, 7], no_repeat_ngram_size=1, max_tokens=9,
                          eos_token_id=7)  # fmt: skip
    outputs = llm.generate([3], only)[0].outputs
    assert outputs and all(set(each.token_ids[:-1]) <= {5, 6} for each in outputs)
    assert all(each.token_ids[-1] == 7 and each.finish_reason == "stop" for each in outputs)


def test_aborted_with_what_it_has(llm: LLM) -> None:
    """After Ctrl-C the best that has been found so far is returned."""
    outputs = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            [[1, 2]],
            SamplingParams(num_beams=3, n=2, max_tokens=500, ignore_eos=True),
            progress=lambda done, of, tokens: interrupt() if tokens else None,
            on_output=lambda index, output: outputs.append(output),
        )
    assert [completion.finish_reason for completion in outputs[0].outputs] == ["abort"] * 2
    assert llm.stats().kv_blocks_used == 0


def test_no_stream(llm: LLM) -> None:
    with pytest.raises(RequestError, match="num_beams=2: which beam is the best is known at the end only"):
        llm.stream("x", SamplingParams(num_beams=2))


def test_a_beam_knows_nothing_of_the_others(llm: LLM) -> None:
    """What one beam adds to its tokens, text and constraint is not another's."""
    params = SamplingParams(num_beams=2, stop=["zzz"], logprobs=1)
    request = llm._requests.generations([[1, 2]], params, 0)[0]
    parent = request.sequences[0]
    assert isinstance(parent, Beam)
    parent.best = [(5, -1.0)]
    first, second = parent.extended((5, -1.0, -1.5), 1.0), parent.extended((6, -2.0, -2.5), 1.0)
    assert (parent.token_ids.tolist(), first.token_ids[-1], second.token_ids[-1]) == ([1, 2], 5, 6)
    assert first.text is not None and second.text is not None and parent.text is not None
    assert llm.tokenizer is not None
    assert first.text.text == llm.tokenizer.decode([5]) and parent.text.text == ""
    assert [len(beam.logprobs) for beam in (parent, first, second)] == [0, 1, 1]
