"""One LLM, many callers: whatever other threads do, callbacks that raise, what the engine says of itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine import (
    LLM,
    ClosedError,
    RequestError,
    SamplingParams,
)

from .waiting import in_threads, paused, wait_until, wait_until_idle

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, seed=0)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, seed=0)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(checkpoint("gelu"), seed=1, max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Any:
    yield
    wait_until_idle(llm)
    assert not llm._thread.names and not llm._thread._open


@dataclass(frozen=True)
class Call:
    """What one thread asks for."""

    kind: str
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    priority: int
    stop_after: int  # deltas; a stream that is closed early

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, n=self.n, seed=3, logprobs=1, ignore_eos=True)

    def result(self, llm: LLM) -> Any:
        prompt = list(self.prompt)
        if self.kind == "generate":
            outputs = llm.generate([prompt, prompt[::-1]], self.params, priority=[self.priority, 0])
            return [output.outputs for output in outputs]
        if self.kind == "score":
            texts = [prompt + [1, 2], (prompt * 40)[:300]]
            return llm.score(texts, top_logprobs=2, priority=self.priority)
        if self.kind == "choose":
            return llm.choose(prompt, [[1], [2, 3], [4]], priority=self.priority)
        deltas = []
        for delta in llm.stream(prompt, self.params, priority=self.priority):
            delta.output, delta.request_id = None, ""
            deltas.append(delta)
            if len(deltas) == self.stop_after:
                break
        return sorted(deltas, key=lambda delta: delta.index) if self.stop_after > 60 else deltas[:1]


calls = st.lists(
    st.builds(
        Call,
        kind=st.sampled_from(["generate", "stream", "score", "choose"]),
        prompt=st.lists(st.integers(5, 7), min_size=1, max_size=40).map(tuple),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        stop_after=st.sampled_from([1, 5, 100, 100]),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_other_threads_do(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    block = 2 * 2 * 2 * 32 * 16 * (4 if dtype == "float32" else 2)  # layers, k and v, heads, head_dim, tokens
    crowded = LLM(
        checkpoint("gelu"),
        dtype=dtype,
        kv_cache_memory=14 * block,
        max_num_seqs=4,
        max_num_batched_tokens=30,
        max_queue_size=3,
    )
    alone = LLM(checkpoint("gelu"), dtype=dtype, num_threads=1, enable_prefix_caching=False)

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(calls)
    def check(trace: list[Call]) -> None:
        results = in_threads(*(lambda call=call: call.result(crowded) for call in trace))
        for call, result in zip(trace, results, strict=True):
            assert result == call.result(alone), call
        wait_until_idle(crowded)
        assert crowded.stats().failed_steps == 0

    check()


def test_stats(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), max_num_seqs=1)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.prefix_hit_rate) == (0, 0, 0, 0.0)
    assert stats.kv_blocks == llm.num_kv_blocks and stats.kv_blocks_used == 0
    prompt = [1] * 40
    llm.generate(prompt, GREEDY)
    llm.generate(prompt, GREEDY)
    llm.score([2] * 20)
    stats = llm.stats()
    assert (stats.new_tokens, stats.scored_tokens, stats.prompt_tokens) == (60, 19, 40 + 8 + 19)
    assert stats.prefix_hit_tokens == 32 and stats.prefix_lookup_tokens == 80 + 19
    assert stats.finished == 3 and stats.steps == 61 and 0 < stats.busy_time < 60
    assert stats.new_tokens_per_second > 0 and stats.prompt_tokens_per_second > 0
    later: list[Any] = []
    with paused(llm, after=1):
        first = llm.stream([1], LONG)
        next(first)
        threads = [
            threading.Thread(target=lambda: later.append(llm.stream([1], LONG, priority=1))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(llm._thread._open) == 3)
        stats = llm.stats()
        assert (stats.running, stats.waiting) == (1, 2) and stats.kv_blocks_used > 0
        first.close()
        for thread in threads:  # they enter the queue when the engine looks into its inbox again
            assert thread.is_alive()
    for thread in threads:
        thread.join(60)
    for stream in later:
        stream.close()
    wait_until_idle(llm)
    stats = llm.stats()
    assert stats.running == stats.waiting == 0 and stats.aborted >= 1 and stats.aborted + stats.finished == 6


def test_repr_and_context_manager(checkpoint: Callable[[str], Path]) -> None:
    with LLM(checkpoint("gelu"), num_threads=1) as llm:
        llm.generate([1], GREEDY)
        assert repr(llm).startswith(f"LLM({str(checkpoint('gelu'))!r}, device='cpu', dtype='float32'")
        assert "closed" not in repr(llm)
    assert repr(llm).endswith(", closed)")
    for call in (
        lambda: llm.generate([1], GREEDY),
        lambda: llm.stream([1], GREEDY),
        lambda: llm.score([1, 2]),
        lambda: llm.choose([1], [[2], [3]]),
    ):
        with pytest.raises(ClosedError):
            call()
    assert llm.generate([]) == [] and llm.stats().finished == 1


@pytest.mark.parametrize("callback", ["on_output", "progress"])
def test_a_callback_that_raises_ends_its_call_only(llm: LLM, callback: str) -> None:
    expected = llm.generate([5], LONG)[0].outputs
    threads: set[int] = set()

    class Stop(Exception):
        pass

    def raises(*_: object) -> None:
        threads.add(threading.get_ident())
        raise Stop

    def bad() -> int:
        with pytest.raises(Stop):
            llm.generate([[1]] * 10, GREEDY, **{callback: raises})  # type: ignore[arg-type]
        return threading.get_ident()

    ident, *results = in_threads(bad, *[lambda: llm.generate([5], LONG)[0].outputs] * 3)
    assert results == [expected] * 3 and threads == {ident}
    with pytest.raises(Stop):
        llm.score([[1, 2]] * 10, **{callback: raises})  # type: ignore[call-overload]


def test_progress_and_outputs_of_scores(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    counts: list[tuple[int, int, int]] = []
    texts = [[1, 2, 3], [4] * 200, [5]]
    scores = llm.score(
        texts,
        progress=lambda *count: counts.append(count),
        on_output=lambda index, score: seen.append(index),
    )
    assert seen == [0, 1, 2] and counts[-1] == (3, 3, 2 + 199)
    assert scores == [llm.score(text) for text in texts]
    llm.score(texts, progress=True)
    assert capsys.readouterr().err.endswith("\r3/3 texts, 201 tokens\n")


@pytest.mark.parametrize("priority", [True, 1.5, "high", 2**31, [0, 1], None])
def test_priorities_are_checked(llm: LLM, priority: Any) -> None:
    for call in (
        lambda: llm.generate([[1]], GREEDY, priority=priority),
        lambda: llm.stream([1], GREEDY, priority=priority),
        lambda: llm.score([1, 2], priority=priority),
    ):
        with pytest.raises(RequestError, match="priorit"):
            call()
