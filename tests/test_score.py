"""Scores against transformers, on the bundled model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from pyengine import LLM, RequestError
from pyengine.model.checkpoint import resolve

TEXT = "The Captain came upon the deck, and looked a while at the sea. It was gray, and he was glad of it."
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@functools.cache
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(
        resolve(None), attn_implementation="eager", dtype=torch.float32
    ).eval()


def expected(ids: list[int]) -> list[float]:
    """Log-probabilities of ids[1:]."""
    with torch.no_grad():
        logits = reference()(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def encode(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def test_text(llm: LLM) -> None:
    score = llm.score(TEXT)
    ids = encode(llm, TEXT)
    assert score.token_ids == ids and score.text == TEXT and score.num_context_tokens == 0
    assert score.logprobs[0] is None
    assert score.logprobs[1:] == pytest.approx(expected(ids), abs=TOLERANCE)
    assert score.num_scored == len(ids) - 1
    total = sum(expected(ids))
    assert score.total_logprob == pytest.approx(total, abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-total / (len(ids) - 1)), rel=1e-4)
    assert llm.tokenizer is not None
    characters = len(TEXT) - len(llm.tokenizer.decode(ids[:1]))
    assert score.num_characters == characters
    assert score.bits_per_character == pytest.approx(-total / math.log(2) / characters, rel=1e-4)
    assert [llm.tokenizer.id_to_piece(token) for token in ids] == score.tokens


def test_bos_in_front_gives_the_first_token_a_probability(llm: LLM) -> None:
    score = llm.score(TEXT, add_bos=True)
    ids = encode(llm, TEXT)
    assert score.token_ids == ids and score.num_context_tokens == 1 and score.num_characters == len(TEXT)
    assert score.logprobs == pytest.approx(expected([0, *ids]), abs=TOLERANCE)
    assert llm.score([0, *ids], add_bos=True) == llm.score([0, *ids]), "no second BOS"


def test_lists_and_ids(llm: LLM) -> None:
    texts = [TEXT[:40], TEXT, TEXT[:41]]
    assert llm.score(texts) == [llm.score(text) for text in texts]
    assert llm.score(encode(llm, TEXT)).logprobs == llm.score(TEXT).logprobs
    assert llm.score(texts, [" a", " b", " c"]) == [
        llm.score(text, choice) for text, choice in zip(texts, [" a", " b", " c"], strict=True)
    ]


@pytest.mark.parametrize("stride", [None, 100, 511])
def test_text_longer_than_the_context(llm: LLM, stride: int | None) -> None:
    ids = encode(llm, (TEXT + "\n") * 40)
    assert len(ids) > 1000
    score = llm.score(ids, stride=stride)
    assert score.num_scored == len(ids) - 1
    window, step = 512, stride or 256
    values: list[float] = []
    while len(values) < len(ids) - 1:
        scored = len(values) + 1
        begin = max(0, scored - (window - step))
        if begin + window >= len(ids):
            begin = len(ids) - window
        values += expected(ids[begin : begin + window])[scored - begin - 1 :]
    assert score.logprobs[1:] == pytest.approx(values, abs=TOLERANCE)


def test_continuation(llm: LLM) -> None:
    score = llm.score("The Captain came upon the", " deck, and looked")
    whole = encode(llm, "The Captain came upon the deck, and looked")
    context = len(encode(llm, "The Captain came upon the"))
    assert (score.num_context_tokens, score.token_ids) == (context, whole[context:])
    assert score.logprobs == pytest.approx(expected(whole)[context - 1 :], abs=TOLERANCE)
    assert score.text == " deck, and looked" and score.num_characters == len(" deck, and looked")


def test_tokens_that_joining_changes_are_scored_with_the_continuation(llm: LLM) -> None:
    """A space at the end of the text becomes part of the next word's token."""
    joined = llm.score("The Captain came upon the ", "deck")
    apart = llm.score("The Captain came upon the", " deck")
    assert joined.token_ids == apart.token_ids and joined.logprobs == apart.logprobs
    assert joined.text == "deck" and joined.num_characters == len(" deck")


def test_continuation_of_token_ids(llm: LLM) -> None:
    text, continuation = encode(llm, "The Captain"), encode(llm, " came upon")
    by_ids = llm.score(text, continuation)
    assert by_ids.logprobs == llm.score("The Captain", " came upon").logprobs
    assert llm.score(text, " came upon").logprobs == by_ids.logprobs


def test_continuation_of_nothing_follows_bos(llm: LLM) -> None:
    score = llm.score("", "The Captain")
    ids = encode(llm, "The Captain")
    assert score.token_ids == ids and score.num_context_tokens == 1
    assert score.logprobs == pytest.approx(expected([0, *ids]), abs=TOLERANCE)
    empty: list[int] = []
    assert llm.score([empty], ["The Captain"]) == [score]


def test_continuation_of_a_text_longer_than_the_context(llm: LLM) -> None:
    ids = encode(llm, (TEXT + "\n") * 30)
    score = llm.score(ids[:700], ids[700:705])
    assert score.logprobs == pytest.approx(expected(ids[705 - 512 : 705])[-5:], abs=TOLERANCE)


def test_top_logprobs(llm: LLM) -> None:
    score = llm.score(TEXT, top_logprobs=3)
    assert score.logprobs == llm.score(TEXT).logprobs
    assert score.top_logprobs is not None and score.top_logprobs[0] is None
    ids = encode(llm, TEXT)
    with torch.no_grad():
        best = reference()(torch.tensor([ids])).logits[0].double().log_softmax(-1).topk(3)
    for row, values in zip(score.top_logprobs[1:], best.values.tolist(), strict=False):
        assert row is not None
        assert [entry.logprob for entry in row] == pytest.approx(values, abs=TOLERANCE)
        assert [entry.rank for entry in row] == [1, 2, 3]


def test_scores_do_not_depend_on_company(llm: LLM) -> None:
    texts = [TEXT[: 10 + 3 * i] for i in range(20)]
    tight = LLM(max_num_batched_tokens=7, enable_prefix_caching=False)
    assert tight.score(texts) == llm.score(texts)


def test_choose(llm: LLM) -> None:
    choices = [" sea", " xylophone", " deck", " sea shore"]
    ranked = llm.choose("He looked at the", choices)
    order = [choice.text for choice in ranked]
    assert order.index(" sea") < order.index(" sea shore"), "more of the same is never likelier"
    assert [choices[choice.index] for choice in ranked] == [choice.text for choice in ranked]
    for choice in ranked:
        context = encode(llm, "He looked at the")
        whole = encode(llm, "He looked at the" + (choice.text or ""))
        assert choice.logprob == pytest.approx(sum(expected(whole)[len(context) - 1 :]), abs=5e-4)
    weights = [math.exp(choice.logprob) for choice in ranked]
    assert [choice.probability for choice in ranked] == pytest.approx(
        [weight / sum(weights) for weight in weights], rel=1e-6
    )
    assert [choice.logprob for choice in ranked] == sorted((c.logprob for c in ranked), reverse=True)


def test_choices_are_compared_from_one_border(llm: LLM) -> None:
    """Where one choice changes the text's last token, that token counts in the probability of all."""
    ranked = {choice.text: choice.score for choice in llm.choose("He looked at the ", ["sea", "\n"])}
    assert ranked["sea"].num_context_tokens == ranked["\n"].num_context_tokens
    assert len(ranked["\n"].token_ids) == 2


@pytest.mark.parametrize("normalization", ["tokens", "characters"])
def test_length_normalization(llm: LLM, normalization: str) -> None:
    ranked = llm.choose(
        "He looked", [" at the sea and at the ship", " at"], length_normalization=normalization
    )
    means = []
    for choice in ranked:
        length = choice.score.num_scored if normalization == "tokens" else choice.score.num_characters
        assert length
        means.append(choice.logprob / length)
    assert means == sorted(means, reverse=True)
    assert ranked[0].probability == pytest.approx(1 / (1 + math.exp(means[1] - means[0])))


def test_one_choice(llm: LLM) -> None:
    (choice,) = llm.choose("He looked", [" at"])
    assert choice.probability == 1.0 and choice.index == 0


def test_one_token_cannot_be_scored_without_bos(llm: LLM) -> None:
    score = llm.score([5])
    assert score.logprobs == [None] and score.num_scored == 0
    assert math.isnan(score.perplexity) and score.bits_per_character is None


def test_without_a_tokenizer(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"))
    score = llm.score([1, 2, 3], top_logprobs=1)
    assert score.text is None and score.tokens == [] and score.num_characters is None
    assert score.bits_per_character is None and score.num_scored == 2
    assert [choice.index for choice in llm.choose([1, 2], [[3], [4, 5]])] in ([0, 1], [1, 0])
    with pytest.raises(RequestError, match="no tokenizer files"):
        llm.score("text")


def test_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="text is empty"):
        llm.score("")
    with pytest.raises(RequestError, match="adds no token"):
        llm.score("text", "")
    with pytest.raises(RequestError, match="choice 2 of 2 .* adds no token"):
        llm.choose("text", [" a", ""])
    with pytest.raises(RequestError, match="2 texts need a list of 2 continuations"):
        llm.score(["a b", "c d"], [" e"])
    with pytest.raises(RequestError, match="choices="):
        llm.choose("text", [])
    with pytest.raises(RequestError, match="choices='ab'"):
        llm.choose("text", "ab")
    with pytest.raises(RequestError, match="length_normalization='words'"):
        llm.choose("text", [" a"], length_normalization="words")
    for stride in (0, 512, True, 1.5):
        with pytest.raises(RequestError, match="stride="):
            llm.score(TEXT, stride=stride)  # type: ignore[arg-type]
    for top in (-1, 65, True):
        with pytest.raises(RequestError, match="top_logprobs="):
            llm.score(TEXT, top_logprobs=top)
    with pytest.raises(RequestError, match="token 1 of the prompt is 9999"):
        llm.score([1, 9999])
