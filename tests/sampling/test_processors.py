"""Edits and cut-offs against transformers' processors, and plain formulas where it has none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine._C import ExecContext, Sampler

torch = pytest.importorskip("torch", reason="transformers' processors take torch tensors")
transformers = pytest.importorskip("transformers", reason="transformers is the reference")

Logits = npt.NDArray[np.float32]
CTX = ExecContext(2)
EDGE = 1e-5  # probability mass within which two kept sets may differ


def process(logits: Logits, tokens: list[int], num_prompt: int, **params: Any) -> Logits:
    sampler = Sampler(1)
    sampler.set(0, token_ids=np.array(tokens, np.int32), num_prompt=num_prompt, **params)
    position = np.array([len(tokens)], np.int32)
    return sampler.process(CTX, logits[None], np.zeros(1, np.int32), position)[0]


def edits(params: dict[str, Any], num_prompt: int) -> list[Any]:
    """transformers' processors for the edits, in its order; those that it lacks as functions."""
    chain: list[Any] = []
    if "logit_bias" in params:
        bias = {tuple(ids): value for ids, value in params["logit_bias"]}
        chain.append(transformers.SequenceBiasLogitsProcessor(bias))
    if "allowed_token_ids" in params:
        allowed = params["allowed_token_ids"]

        def only_allowed(ids: Any, scores: Any) -> Any:
            mask = torch.full_like(scores, -math.inf)
            mask[:, allowed] = 0
            return scores + mask

        chain.append(only_allowed)
    if "repetition_penalty" in params:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "presence_penalty" in params or "frequency_penalty" in params:
        presence, frequency = params.get("presence_penalty", 0.0), params.get("frequency_penalty", 0.0)

        def penalties(ids: Any, scores: Any) -> Any:  # https://platform.openai.com/docs/api-reference
            counts = torch.bincount(ids[0, num_prompt:], minlength=scores.shape[1])
            return scores - frequency * counts - presence * (counts > 0)

        chain.append(penalties)
    if "no_repeat_ngram_size" in params:
        chain.append(transformers.NoRepeatNGramLogitsProcessor(params["no_repeat_ngram_size"]))
    if "bad_words" in params:
        chain.append(transformers.NoBadWordsLogitsProcessor(params["bad_words"]))
    if "min_tokens" in params:
        least, stop = params["min_tokens"], params["stop_ids"]
        chain.append(
            transformers.generation.MinNewTokensLengthLogitsProcessor(num_prompt, least, stop, device="cpu")
        )
    return chain


def warper(name: str, value: Any) -> Any:
    classes = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "typical_p": transformers.TypicalLogitsWarper,
        "epsilon_cutoff": transformers.generation.EpsilonLogitsWarper,
        "eta_cutoff": transformers.generation.EtaLogitsWarper,
    }
    return classes[name](value)


def at_the_edge(name: str, value: Any, before: Logits) -> npt.NDArray[np.bool_]:
    """Tokens (V,) that a cut may keep or drop, because they are within EDGE of the threshold."""
    exact = before.astype(np.float64)
    p = np.exp(exact - exact.max())
    p /= p.sum()
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    entropy = -(p * np.where(p > 0, log_p, 0)).sum()
    if name in ("top_p", "typical_p"):
        # Rank of each token: probability from the top, or distance of its surprise from the entropy.
        rank: npt.NDArray[np.float64] = -p if name == "top_p" else np.abs(-log_p - entropy)
        tie = 0.0 if name == "top_p" else 2e-6 * max(1.0, entropy)
        with np.errstate(invalid="ignore"):
            mass_before = np.array([p[rank < r - tie].sum() for r in rank])
            mass_with_ties = np.array([p[rank <= r + tie].sum() for r in rank]) - p
        return (mass_before <= value + EDGE) & (mass_with_ties >= value - EDGE)
    least = {
        "top_k": -1.0,
        "min_p": value * p.max(),
        "epsilon_cutoff": value,
        "eta_cutoff": min(value, math.sqrt(value) * math.exp(-entropy)),
    }[name]
    return np.abs(p - least) < 1e-6 * max(least, 1e-3)


VOCAB = st.sampled_from([5, 63, 64, 200, 1000])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Logits, list[int], int, dict[str, Any]]:
    vocab = draw(VOCAB)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, draw(st.sampled_from([0.3, 2.0, 5.0])), vocab).astype(np.float32)
    if draw(st.booleans()):
        logits = (np.round(logits * 2) / 2).astype(np.float32)  # ties
    # Few different tokens, so that n-grams do repeat.
    tokens = rng.integers(0, min(vocab, draw(st.sampled_from([3, 6, 1000]))), 60).tolist()
    num_prompt = draw(st.integers(1, 60))
    token = st.integers(0, vocab - 1)
    after = st.sampled_from([[], tokens[-1:], tokens[-2:], tokens[-3:], [0, 1]])  # what bans follow
    sequence = st.builds(lambda ids, last: [*ids, last], after, token)
    some = {
        "logit_bias": st.lists(
            st.tuples(sequence, st.floats(-9, 9)), min_size=1, max_size=5, unique_by=lambda e: tuple(e[0])
        ),
        "allowed_token_ids": st.lists(token, min_size=1, max_size=vocab),
        "repetition_penalty": st.floats(0.3, 3),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "no_repeat_ngram_size": st.integers(1, 5),
        "bad_words": st.lists(sequence, min_size=1, max_size=4),
        "min_tokens": st.integers(1, 61),
        "temperature": st.floats(0.2, 3),
        "top_k": st.integers(1, vocab + 3),
        "top_p": st.floats(0.01, 0.999),
        "min_p": st.floats(0.001, 1),
        "typical_p": st.floats(0.01, 0.999),
        "epsilon_cutoff": st.floats(1e-4, 0.9),
        "eta_cutoff": st.floats(1e-4, 0.9),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(some)), unique=True, max_size=6))
    params = {name: draw(some[name]) for name in some if name in chosen}
    if "min_tokens" in params:
        params["stop_ids"] = draw(st.lists(token, min_size=1, max_size=2))
    return logits, tokens, num_prompt, params


@given(case=cases())
@settings(max_examples=600, deadline=None)
def test_equal_to_transformers_in_the_documented_order(
    case: tuple[Logits, list[int], int, dict[str, Any]],
) -> None:
    logits, tokens, num_prompt, params = case
    ids, scores = torch.tensor([tokens]), torch.from_numpy(logits.copy())[None]
    for processor in edits(params, num_prompt):
        scores = processor(ids, scores)
    if torch.isneginf(scores).all():  # nothing is left: there is no distribution to compare
        ours = process(logits, tokens, num_prompt, **params)
        assert np.isneginf(ours).all()
        return
    scores = warper("temperature", params.get("temperature", 1.0))(ids, scores)
    cuts = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    applied = {name: value for name, value in params.items() if name not in cuts}
    ours = process(logits, tokens, num_prompt, **applied)
    np.testing.assert_allclose(ours, scores[0].numpy(), rtol=1e-6, atol=1e-6)
    for name in cuts:
        if name in params:
            # transformers cuts what we left: a token at the edge of one cut changes all cuts that follow.
            before, applied[name] = ours, params[name]
            ours = process(logits, tokens, num_prompt, **applied)
            theirs = warper(name, params[name])(ids, torch.from_numpy(before.copy())[None])[0].numpy()
            assert (ours > -np.inf).any()
            differ = np.isneginf(ours) != np.isneginf(theirs)
            assert not (differ & ~at_the_edge(name, params[name], before)).any(), (name, params[name])
            both = ~differ & ~np.isneginf(ours)
            np.testing.assert_array_equal(ours[both], before[both])


@pytest.mark.parametrize("deviation", [0.1, 0.75, 1.5, 2.5, 4.0, 8.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_cuts_of_a_large_vocabulary(deviation: float, min_p: float) -> None:
    """Flat and peaked rows as large as GPT-2's: top-p keeps the smallest set that reaches it."""
    logits = np.random.default_rng(3).normal(0, deviation, 50_257).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = process(logits, [], 0, top_p=top_p, min_p=min_p) > -np.inf
        heavy = p >= min_p * p.max() * (1 + 1e-6)
        assert kept.any() and not (kept & (p < min_p * p.max() * (1 - 1e-6))).any()
        least = p[kept].min()
        assert p[p > least].sum() < top_p + EDGE
        assert p[kept].sum() > top_p - EDGE or not (heavy & ~kept).any()
    kept = process(logits, [], 0, min_p=0.3) > -np.inf
    assert (kept == (p >= 0.3 * p.max()))[np.abs(p / p.max() - 0.3) > 1e-5].all()
