"""What a slot keeps from step to step: its tokens, a mask, Mirostat's bound, the caller's processor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine._C import ExecContext, Sampler, StepResult
from pyengine.errors import InternalError, RequestError

CTX = ExecContext(2)
VOCAB = 300

# Every control at once, and by itself where it keeps a state.
MIXES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "min_p": 0.05},
    {"no_repeat_ngram_size": 2, "top_k": 5},
    {"bad_words": [[3], [5, 6], [1, 2, 3]], "logit_bias": [([7], 4.0), ([7, 8], 5.0)], "top_k": 4},
    {"mirostat_tau": 3.0, "mirostat_eta": 0.2},
    {"min_tokens": 6, "stop_ids": [1, 2], "typical_p": 0.7, "epsilon_cutoff": 0.01},
    {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram_size": 3,
        "allowed_token_ids": list(range(200)),
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "eta_cutoff": 0.01,
        "logprobs": 3,
    },
]


def logits_of(tokens: list[int], seed: int) -> npt.NDArray[np.float32]:
    """A model: logits (V,) that depend on the last two tokens."""
    rng = np.random.default_rng([seed, *tokens[-2:]])
    return rng.normal(0, 2, VOCAB).astype(np.float32)


def step(
    sampler: Sampler, sequences: list[list[int]], slots: list[int], ctx: ExecContext = CTX
) -> StepResult:
    rows = np.stack([logits_of(tokens, 1) for tokens in sequences])
    positions = np.array([len(tokens) for tokens in sequences], np.int32)
    return sampler.sample(ctx, rows, np.array(slots, np.int32), positions)


def alone(mix: dict[str, Any], prompt: list[int], count: int, seed: int) -> list[int]:
    sampler = Sampler(1)
    sampler.set(0, token_ids=np.array(prompt, np.int32), num_prompt=len(prompt), seed=seed, **mix)
    tokens = list(prompt)
    for _ in range(count):
        tokens += step(sampler, [tokens], [0]).token_ids
    return tokens


@given(
    seed=st.integers(0, 50),
    threads=st.sampled_from([1, 3]),
    preempt_at=st.lists(st.integers(0, 19), max_size=6),
)
@settings(max_examples=25, deadline=None)
def test_ragged_batches_and_preemption_equal_one_by_one(
    seed: int, threads: int, preempt_at: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 12, rng.integers(1, 30)).tolist() for _ in MIXES]
    wanted = [alone(mix, prompt, 20, seed) for mix, prompt in zip(MIXES, prompts, strict=True)]
    count = len(MIXES)
    sampler, ctx = Sampler(count + 2), ExecContext(threads)
    sequences = [list(prompt) for prompt in prompts]
    mu: list[float | None] = [None] * count
    slots = list(range(count))

    def start(i: int) -> None:
        tokens = np.array(sequences[i], np.int32)
        sampler.set(
            slots[i], token_ids=tokens, num_prompt=len(prompts[i]), seed=seed, mirostat_mu=mu[i], **MIXES[i]
        )

    for i in range(count):
        start(i)
    for turn in range(20):
        for i in (k for k, at in enumerate(preempt_at) if at == turn):
            slots[i] = int(next(s for s in range(count + 2) if s not in slots))
            start(i)
        running = [i for i in rng.permutation(count).tolist() if len(sequences[i]) - len(prompts[i]) < 20]
        result = step(sampler, [sequences[i] for i in running], [slots[i] for i in running], ctx)
        for row, i in enumerate(running):
            sequences[i].append(result.token_ids[row])
            mu[i] = result.mirostat_mu[row]
    assert sequences == wanted


def test_no_ngram_repeats_and_no_bad_word_comes() -> None:
    for seed in range(5):
        mix: dict[str, Any] = {"no_repeat_ngram_size": 2, "allowed_token_ids": list(range(20))}
        tokens = alone(mix, [1, 2, 3], 100, seed)
        pairs = list(zip(tokens[2:], tokens[3:], strict=False))
        assert len(set(pairs)) == len(pairs)
        tokens = alone({"bad_words": [[4], [1, 2]], "allowed_token_ids": [1, 2, 3, 4]}, [3], 100, seed)
        assert 4 not in tokens and (1, 2) not in list(zip(tokens, tokens[1:], strict=False))


def test_a_mask_holds_for_one_draw() -> None:
    sampler = Sampler(1)
    sampler.set(0, seed=3)
    allowed = {5, 31, 32, 99}
    words = np.zeros(4, np.uint32)  # 128 tokens: those beyond are forbidden
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    free = 0
    for position in range(60):
        sampler.set_mask(0, words.view(np.int32))
        tokens = list(range(position))
        assert step(sampler, [tokens], [0]).token_ids[0] in allowed
        free += step(sampler, [tokens], [0]).token_ids[0] not in allowed
    assert free > 50
    with pytest.raises(RequestError, match="mask"):
        sampler.set_mask(0, np.zeros(0, np.int32))


def test_edits_that_forbid_everything_mark_their_row_alone() -> None:
    sampler = Sampler(2)
    sampler.set(0, allowed_token_ids=[3], bad_words=[[3]], logprobs=2)
    sampler.set(1, seed=1)
    result = step(sampler, [[1], [1]], [0, 1])
    assert result.token_ids[0] == -2 and result.token_ids[1] >= 0
    assert math.isnan(result.logprobs[0])


def test_log_probabilities_are_the_models_whatever_is_edited() -> None:
    raw = logits_of([9], 1).astype(np.float64)
    exact = raw - raw.max() - math.log(np.exp(raw - raw.max()).sum())
    best = np.argsort(-exact, kind="stable")[:5].tolist()

    def halve(ids: Any, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return logits * np.float32(0.5)

    for mix in (
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "logit_bias": [([best[0]], -50.0), ([9], 60.0)]},
        {"processor": halve, "temperature": 0.0},
        {"bad_words": [[best[0]]], "allowed_token_ids": best, "top_k": 2},
    ):
        sampler = Sampler(1)
        sampler.set(0, token_ids=np.array([9], np.int32), num_prompt=0, logprobs=5, **mix)
        result = step(sampler, [[9]], [0])
        assert result.logprobs[0] == pytest.approx(exact[result.token_ids[0]], abs=2e-6)
        assert [token for token, _ in result.top_logprobs[0]] == best
        assert [value for _, value in result.top_logprobs[0]] == pytest.approx(exact[best], abs=2e-6)


def test_processors_see_their_tokens_and_the_edited_logits() -> None:
    seen: list[tuple[list[int], npt.NDArray[np.float32]]] = []

    def only_the_tokens_so_far(
        ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32] | None:
        seen.append((ids.tolist(), logits.copy()))
        banned = np.ones(VOCAB, bool)
        banned[ids] = False
        if len(seen) % 2:
            logits[banned] = -np.inf
            return None
        return np.where(banned, -np.inf, logits).astype(np.float64)

    sampler = Sampler(2)
    tokens = [4, 7, 9]
    sampler.set(0, token_ids=np.array(tokens, np.int32), num_prompt=3, processor=only_the_tokens_so_far,
                bad_words=[[7]])  # fmt: skip
    sampler.set(1, seed=2)
    for _ in range(10):
        result = step(sampler, [tokens, tokens], [0, 1])
        assert seen[-1][0] == tokens
        assert seen[-1][1][7] == -np.inf and seen[-1][1][4] == logits_of(tokens, 1)[4]
        tokens.append(result.token_ids[0])
    assert set(tokens[3:]) == {4, 9}


def test_a_processor_that_fails_marks_its_row_alone() -> None:
    def fails(ids: Any, logits: Any) -> None:
        raise ValueError("no such word")

    sampler = Sampler(3)
    sampler.set(0, processor=fails)
    sampler.set(1, processor=lambda ids, logits: logits[:5])
    sampler.set(2)
    result = step(sampler, [[], [], []], [0, 1, 2])
    assert result.token_ids[:2] == [-3, -3] and result.token_ids[2] >= 0
    error = sampler.take_error(0)
    assert isinstance(error, ValueError) and str(error) == "no such word"
    assert isinstance(sampler.take_error(1), RequestError)
    assert sampler.take_error(0) is None and sampler.take_error(2) is None


def test_mirostat_is_that_of_its_paper() -> None:
    """Algorithm 2 of Basu et al. 2021 as llama.cpp has it, with our random numbers."""
    tau, eta, temperature = 2.5, 0.3, 1.4
    sampler = Sampler(1)
    sampler.set(0, mirostat_tau=tau, mirostat_eta=eta, temperature=temperature, seed=4)
    mu = 2 * tau
    tokens: list[int] = []
    surprises = []
    for _ in range(400):
        logits = logits_of(tokens, 1)
        scores = logits.astype(np.float64) / temperature
        p = np.exp(scores - scores.max())
        p /= p.sum()
        kept = -np.log2(p) <= mu
        kept[p.argmax()] = True
        result = step(sampler, [tokens], [0])
        token = result.token_ids[0]
        assert kept[token]
        surprise = -math.log2(p[token] / p[kept].sum())
        mu -= eta * (surprise - tau)
        assert result.mirostat_mu[0] == pytest.approx(mu, abs=1e-4)
        mu = result.mirostat_mu[0]
        surprises.append(surprise)
        tokens.append(token)
    assert np.mean(surprises[50:]) == pytest.approx(tau, abs=0.1)


def test_a_slot_that_missed_a_token_is_noticed() -> None:
    sampler = Sampler(1)
    sampler.set(0, token_ids=np.array([1, 2], np.int32), num_prompt=2, repetition_penalty=1.5)
    with pytest.raises(InternalError, match="has seen 2 tokens, but samples position 3"):
        step(sampler, [[1, 2, 3]], [0])
    with pytest.raises(InternalError, match="two groups of rows"):
        step(sampler, [[1, 2], [1, 2]], [0, 0])
