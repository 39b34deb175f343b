"""The whole engine on a GPU, simulated or not: the tokens of the CPU back end, whatever runs beside them.

In float32 the two differ in the last bits, which changes no token of these requests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyengine import LLM, SamplingParams
from pyengine.outputs import RequestOutput

pytestmark = pytest.mark.usefixtures("gpu")

MAKE = {"max_model_len": 96, "num_threads": 1}
SHARED = [(7 * i) % 97 for i in range(33)]  # two blocks and a token that several prompts begin with
LONG = SamplingParams(temperature=0, max_tokens=36, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("head_dim_8")


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def both(directory: Path, run: Callable[[LLM], Any], **settings: Any) -> tuple[Any, Any]:
    """What ``run`` gives on the CPU and on the GPU."""
    with LLM(directory, **{**MAKE, **settings}) as cpu:
        expected = run(cpu)
    with LLM(directory, device="cuda", **{**MAKE, **settings}) as gpu:
        assert gpu.device == "cuda" and "device='cuda'" in repr(gpu)
        return expected, run(gpu)


def test_greedy_tokens_alone(directory: Path) -> None:
    expected, got = both(directory, lambda llm: tokens(llm.generate([5, 3, 9], GREEDY)))
    assert got == expected and len(got[0][0]) == 12


@functools.cache
def prompts() -> list[list[int]]:
    return [SHARED + [i, 3 * i, 50 - i] * (1 + i % 3) for i in range(4)] + [[1], [4] * 20]


def crowd(llm: LLM) -> tuple[list[list[list[int]]], int, int]:
    outputs = llm.generate(prompts(), LONG)
    stats = llm.stats()
    assert stats.failed_steps == 0
    return tokens(outputs), stats.preemptions, stats.prefix_hit_tokens


def test_batching_with_prefix_cache_and_preemption(directory: Path) -> None:
    # 11 blocks for six sequences of up to five: they take turns, in chunks of up to 24 tokens.
    block_bytes = 2 * 2 * 16 * 32 * 4
    settings = {
        "kv_cache_memory": 11 * block_bytes,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
    }
    (expected, *_), (got, preemptions, hits) = both(directory, crowd, **settings)
    assert preemptions > 0 and hits >= 32
    assert got == expected
    alone, _ = both(directory, lambda llm: [tokens(llm.generate(p, LONG))[0] for p in prompts()[:2]])
    assert got[:2] == alone


def test_sampling_and_log_probabilities(directory: Path) -> None:
    params = SamplingParams(
        n=3, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3, logprobs=2, max_tokens=8
    )

    def run(llm: LLM) -> list[RequestOutput]:
        return llm.generate([SHARED, [2, 4]], params)

    expected, got = both(directory, run)
    assert tokens(got) == tokens(expected)
    for a, b in zip(expected, got, strict=True):
        for one, other in zip(a.outputs, b.outputs, strict=True):
            assert other.cumulative_logprob == pytest.approx(one.cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        (SamplingParams(num_beams=3, max_tokens=8), {}),  # beams copy blocks on write
        (GREEDY, {"speculative_config": {"method": "ngram"}}),
    ],
)
def test_beams_and_speculation(directory: Path, params: SamplingParams, settings: dict[str, Any]) -> None:
    expected, got = both(
        directory, lambda llm: tokens(llm.generate([[3, 1, 3, 1, 3], SHARED], params)), **settings
    )
    assert got == expected


def test_a_draft_model_runs_on_the_gpu_too(directory: Path) -> None:
    config = {"model": str(directory), "num_speculative_tokens": 3}

    def run(llm: LLM) -> tuple[list[list[list[int]]], int]:
        return tokens(llm.generate([SHARED[:6]], GREEDY)), llm.stats().accepted_tokens

    (expected, _), (got, accepted) = both(directory, run, speculative_config=config)
    assert got == expected and accepted > 0


def test_scores(directory: Path) -> None:
    def run(llm: LLM) -> list[float]:
        scored = llm.score(SHARED * 4, top_logprobs=2)  # longer than max_model_len: in windows
        assert len(scored.logprobs) == 132 and scored.logprobs[0] is None
        assert scored.top_logprobs is not None
        best = [entry.logprob for top in scored.top_logprobs for entry in top or ()]
        assert len(best) == 2 * 131
        return [x for x in scored.logprobs if x is not None] + best

    expected, got = both(directory, run)
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "kv_cache_dtype", "found"),
    [
        ("float16_file", "auto", "auto", ("float16", "float16")),
        ("bfloat16_file", "auto", "int8", ("bfloat16", "int8")),
        ("gelu", "float16", "int8", ("float16", "int8")),
    ],
)
def test_reduced_precision_is_near(
    checkpoint: Callable[[str], Path], name: str, dtype: str, kv_cache_dtype: str, found: tuple[str, str]
) -> None:
    text = [(11 * i) % 300 for i in range(40)]
    exact = LLM(checkpoint(name), dtype="float32", num_threads=1).score(text).logprobs
    with LLM(
        checkpoint(name),
        device="cuda",
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        num_threads=1,
        max_num_seqs=2,
    ) as llm:
        assert (llm.dtype, llm.kv_cache_dtype) == found
        got = llm.score(text).logprobs
        first = tokens(llm.generate(text[:9], GREEDY))
        assert tokens(llm.generate(text[:9], GREEDY)) == first  # from a cold and from a cached prefix
    assert got[1:] == pytest.approx(exact[1:], abs=0.5)
    assert got != exact
