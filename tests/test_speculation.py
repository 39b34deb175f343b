"""``speculative_config`` through an ``LLM``: the same texts, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyengine import LLM, ConfigError, RequestOutput, SamplingParams, StructuredOutputsParams
from pyengine.bench import replay
from pyengine.engine.draft_model import DraftModel

CONFIGS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5},
    "suffix": {"method": "suffix"},
    "model": {"model": "bundled"},
}
WORDS = ["The king", "Once upon", "It was", "She said", "No man", "Come, sir", "I have", "What", "And", "O"]
PROMPTS = [f"{one} {two.lower()}" for one in WORDS for two in WORDS] * 2
MIXES: list[dict[str, Any]] = [
    {},
    {"top_k": 20, "logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "top_p": 0.8},
    {"no_repeat_ngram_size": 3, "min_p": 0.05, "bad_words": ["the", "of"]},
    {"mirostat": 2, "mirostat_tau": 3.0, "logprobs": 0},
    {"stop": ["e ", ".\n"], "min_tokens": 5, "prompt_logprobs": 1},
    {"temperature": 0.3, "typical_p": 0.9, "eta_cutoff": 0.01, "n": 2},
    {"logits_processors": [lambda ids, logits: logits * 0.5]},
]



@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(max_model_len=256)


@pytest.fixture(scope="module", params=CONFIGS)
def drafting(request: pytest.FixtureRequest, plain: LLM) -> Iterator[LLM]:
    config = CONFIGS[request.param]
    if "model" in config:
        config = {"model": plain.path, "num_speculative_tokens": 3}
    with LLM(max_model_len=256, speculative_config=config, max_num_seqs=24) as llm:
        yield llm


def told(outputs: list[RequestOutput]) -> list[Any]:
    return [(one.outputs, one.prompt_logprobs) for one in outputs]


@pytest.fixture(scope="module")
def expected(plain: LLM) -> dict[str, list[Any]]:
    return {
        "greedy": told(plain.generate(PROMPTS, SamplingParams(temperature=0, seed=0, max_tokens=16))),
        "sampled": told(plain.generate(PROMPTS, sampled())),
    }


def sampled() -> list[SamplingParams]:
    return [
        SamplingParams(seed=number, max_tokens=16, **MIXES[number % len(MIXES)])
        for number in range(len(PROMPTS))
    ]


def test_texts_are_those_without(drafting: LLM, expected: dict[str, list[Any]]) -> None:
    """200 prompts, greedy and with every control."""
    before = drafting.stats()
    outputs = drafting.generate(PROMPTS, SamplingParams(temperature=0, seed=0, max_tokens=16))
    assert told(outputs) == expected["greedy"]
    assert told(drafting.generate(PROMPTS, sampled())) == expected["sampled"]
    stats = drafting.stats()
    assert stats.draft_tokens > before.draft_tokens and 0 < stats.acceptance_rate <= 1
    assert sum(one.metrics.draft_tokens for one in outputs) <= stats.draft_tokens
    assert all(one.metrics.accepted_tokens <= one.metrics.draft_tokens for one in outputs)


def test_streams_and_lone_requests(plain: LLM, drafting: LLM) -> None:
    params = SamplingParams(seed=5, temperature=0.4, max_tokens=120, stop=["Gutenberg"])
    (alone,) = plain.generate("The King. The King. The", params)
    deltas = list(drafting.stream("The King. The King. The", params))
    assert "".join(delta.text for delta in deltas) == alone.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == alone.outputs[0].token_ids
    (again,) = drafting.generate("The King. The King. The", params)
    assert again.outputs == alone.outputs
    assert again.metrics.draft_tokens > 0


@pytest.mark.parametrize("seed", range(3))
def test_constrained_texts(plain: LLM, drafting: LLM, seed: int) -> None:
    pytest.importorskip("llguidance", reason="constrained text needs llguidance")
    for wanted in (
        StructuredOutputsParams(regex=r"(\d{3}-){8}[ab]{40}"),
        StructuredOutputsParams(choice=["yes", "no, no, no, no, no, no", "perhaps"]),
        StructuredOutputsParams(json={"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 6}),
    ):
        params = SamplingParams(structured_outputs=wanted, seed=seed, max_tokens=80, temperature=0.7)
        prompts = ["123-123-123-123-123-", '["one", "two", "one", "two", ']
        assert told(drafting.generate(prompts, params)) == told(plain.generate(prompts, params))


def test_processors_get_no_drafts(drafting: LLM) -> None:
    seen = []

    def processor(ids: Any, logits: Any) -> None:
        seen.append(len(ids))

    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logits_processors=[processor])
    (output,) = drafting.generate("The King. The King. The", params)
    assert output.metrics.draft_tokens == 0
    assert seen == list(range(seen[0], seen[0] + 30))


def test_another_vocabulary_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary of \d+, and the model .* one of \d+"):
        LLM(speculative_config={"model": str(checkpoint("gelu"))})


def test_a_quantised_draft_model(plain: LLM) -> None:
    config = {"model": plain.path, "quantization": "int8"}
    params = SamplingParams(seed=1, max_tokens=30)
    with LLM(max_model_len=128, speculative_config=config) as llm:
        assert told(llm.generate(PROMPTS[:5], params)) == told(plain.generate(PROMPTS[:5], params))
        assert llm.stats().acceptance_rate > 0.3
    with pytest.raises(ConfigError, match="int2"):
        LLM(speculative_config={**config, "quantization": "int2"})


def test_replayed_texts_are_what_comes(drafting: LLM) -> None:
    """A random text is guessed by nobody, so drafters do not see what follows; a repeated one is."""
    stream, vocabulary = random.Random(1), drafting.config.vocab_size
    rarely = [stream.randrange(vocabulary) for _ in range(120)]
    often = rarely[:12] * 10
    speculator = drafting._engine.speculator
    assert speculator is not None
    shares = []
    for text in (rarely, often):
        speculator.drafter.forget()
        metrics, steps = replay.run(drafting, replay.Replay(text[:20], text[20:]))  # checks what has come
        assert metrics.new_tokens == 100 and steps == 99 - metrics.accepted_tokens
        shares.append(metrics.accepted_tokens / 99)
    assert shares[0] < 0.05
    assert shares[1] > 0.6 or isinstance(speculator.drafter, DraftModel)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ngram", "speculative_config='ngram': must be a dict"),
        ({}, "method=None: must be one of ngram, suffix, draft_model"),
        ({"method": "eagle"}, "method='eagle'"),
        ({"method": "draft_model"}, 'needs a "model"'),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens=0: must be .* 1 to 256"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens=True"),
        ({"method": "ngram", "prompt_lookup_max": 65}, "prompt_lookup_max=65: must be .* 1 to 64"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, "prompt_lookup_min=4 is more"),
        ({"method": "suffix", "prompt_lookup_max": 3}, "prompt_lookup_max=3: method 'suffix' has the fields"),
    ],
)
def test_what_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(speculative_config=config)
