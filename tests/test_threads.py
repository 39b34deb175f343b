"""One LLM, many callers: threads, the bounded queue, callbacks that raise, shutting down, and threads that
die.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine import LLM, ClosedError, InternalError, PyEngineError, RequestError, SamplingParams
from pyengine.engine.generation import Generation
from pyengine.engine.request import Request
from pyengine.engine.scoring import Scoring

from .waiting import blocks_in_use, paused, wait_until, wait_until_idle

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


def in_threads(*works: Callable[[], object]) -> list[Any]:
    """The results of functions that run at the same time, or what they raised."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller hangs"
    return results


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


def test_nothing_runs_before_the_first_request(checkpoint: Callable[[str], Path]) -> None:
    def engine_threads() -> int:
        return sum(thread.name == "pyengine-engine" for thread in threading.enumerate())

    before = engine_threads()
    idle = LLM(checkpoint("gelu"))
    assert engine_threads() == before
    idle.close()
    idle.close()
    with pytest.raises(ClosedError, match="closed: make a new one"):
        idle.generate([1], GREEDY)
    assert engine_threads() == before


def test_the_queue_is_bounded(checkpoint: Callable[[str], Path]) -> None:
    """With one place to run and two to wait, the fourth stream waits until there is room, the urgent one
    first.
    """
    llm = LLM(checkpoint("gelu"), max_num_seqs=1, max_queue_size=2)
    with pytest.raises(PyEngineError, match="max_queue_size"):
        LLM(checkpoint("gelu"), max_queue_size=0)
    entered: list[int] = []  # priorities of requests as they enter the queue
    add = llm._engine.add

    def watched(request: Request) -> None:
        entered.append(request.priority)
        add(request)

    llm._engine.add = watched  # type: ignore[method-assign]

    def enter(priority: int) -> None:
        assert len(list(llm.stream([2], GREEDY, priority=priority))) == 30

    with paused(llm, after=1):
        first = llm.stream([1], LONG)
        next(first)
        threads = [threading.Thread(target=enter, args=(priority,)) for priority in (0, 0, 1, 0)]
        for number, thread in enumerate(threads, 2):
            thread.start()
            wait_until(lambda number=number: len(llm._thread._open) == number)  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert len(list(first)) == 149
    assert entered == [0, 0, 0, 0, 1]
    assert llm.stats().waiting == 0
    outputs = llm.generate([[3]] * 20, GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    wait_until_idle(llm)


def test_the_queue_never_holds_more(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), max_num_seqs=2, max_queue_size=3)
    engine, seen = llm._engine, []
    step = type(engine).step

    def watched() -> int:
        seen.append(len(engine.scheduler.waiting))
        return step(engine)

    engine.step = watched  # type: ignore[method-assign]
    llm.generate([[number] for number in range(40)], GREEDY)
    assert max(seen) == 3


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
        assert repr(llm).startswith(f"LLM({str(checkpoint('gelu'))!r}, dtype='float32'")
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


def test_closing_ends_every_caller(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"), max_num_seqs=2, max_queue_size=1)
    with paused(llm, after=1):
        begun = llm.stream([1], LONG)
        next(begun)
        workers: list[Callable[[], object]] = [
            lambda: llm.generate([[2]] * 3, LONG),
            lambda: list(llm.stream([3], LONG)),
            lambda: llm.score([[1] * 600] * 5),
            lambda: llm.choose([1], [[2], [3], [4]]),
        ]
        started = threading.Thread(target=lambda: results.extend(in_threads(*workers)))
        results: list[Any] = []
        started.start()
        wait_until(lambda: len(llm._thread._open) >= 12)
        llm._thread.stop()  # before the engine goes on, so that nobody is finished first
    llm.close()
    started.join(60)
    assert len(results) == 4
    for result in results:
        assert isinstance(result, ClosedError) and "was ended, because its LLM is closed" in str(result)
    with pytest.raises(ClosedError):
        list(begun)
    assert blocks_in_use(llm) == 0 and not llm._thread._open


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


def test_a_long_list_to_score_does_not_keep_others_waiting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[number % 300] * 150 for number in range(400)]
    ended: list[type] = []
    count = llm._engine.counters.count_request

    def watched(request: Request) -> None:
        ended.append(type(request))
        count(request)

    monkeypatch.setattr(llm._engine.counters, "count_request", watched)
    with paused(llm, after=2):
        threads = [threading.Thread(target=llm.score, args=(texts,))]
        threads[0].start()
        wait_until(lambda: llm.stats().scored_tokens > 0)
        threads.append(threading.Thread(target=llm.generate, args=([1], GREEDY), kwargs={"priority": -1}))
        threads[1].start()
        wait_until(lambda: any(isinstance(one, Generation) for one in list(llm._thread._open.values())))
    for thread in threads:
        thread.join(60)
    assert len(ended) == 401 and ended[-1] is Scoring and ended.index(Generation) < 300


@pytest.mark.parametrize("priority", [True, 1.5, "high", 2**31, [0, 1], None])
def test_priorities_are_checked(llm: LLM, priority: Any) -> None:
    for call in (
        lambda: llm.generate([[1]], GREEDY, priority=priority),
        lambda: llm.stream([1], GREEDY, priority=priority),
        lambda: llm.score([1, 2], priority=priority),
    ):
        with pytest.raises(RequestError, match="priorit"):
            call()


def test_an_engine_thread_that_dies_fails_every_caller(checkpoint: Callable[[str], Path]) -> None:
    """SystemExit appears in the thread, as sys.exit() in a signal handler of an embedding program would."""
    llm = LLM(checkpoint("gelu"))
    gate = ExitStack()
    gate.enter_context(paused(llm, after=1))
    begun = llm.stream([1], LONG)
    next(begun)
    thread = llm._thread._thread
    assert thread is not None and thread.ident is not None

    def kill() -> None:
        wait_until(lambda: len(llm._thread._open) == 1 + 2 * 20 + 30)
        set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
        assert set_exception(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1  # type: ignore[arg-type]
        gate.close()

    results = in_threads(
        kill,
        *[lambda: llm.generate([[2]] * 20, LONG)] * 2,
        lambda: llm.score([[3] * 100] * 30),
        lambda: list(begun),
    )
    assert results[0] is None
    for result in results[1:]:
        assert isinstance(result, InternalError), result
    assert not thread.is_alive()
    with pytest.raises(InternalError, match="the thread of the engine died: SystemExit"):
        llm.generate([1], GREEDY)
    llm.close()


def test_a_dropped_llm_ends_its_thread_and_frees_its_memory(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(checkpoint("gelu"))
    llm.generate([1], GREEDY)
    thread, engine = llm._thread._thread, weakref.ref(llm._engine)
    assert thread is not None
    stream = llm.stream([1], LONG)
    next(stream)
    del llm
    gc.collect()
    assert len(list(stream)) == 149, "whoever has a stream keeps the LLM"
    assert len(list(LLM(checkpoint("gelu")).stream([1], LONG))) == 150
    del stream
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


def script(code: str, **popen: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **popen,
    )


@pytest.mark.parametrize(
    "waits", ["pass", "next(llm.stream(None, long))", "stream = llm.stream(None, long)", "thread.start()",
    "daemon.start()"],
)
def test_the_interpreter_ends_while_the_engine_runs(waits: str) -> None:
    process = script(f"""
        import threading
        from pyengine import LLM, PyEngineError, SamplingParams
        llm = LLM()
        long = SamplingParams(max_tokens=500, ignore_eos=True)
        llm.generate("The", SamplingParams(max_tokens=2))
        stream = llm.stream("The", long)
        print(next(stream).finish_reason)
        thread = threading.Thread(target=lambda: print(len(llm.generate(["a"] * 3, long))))
        daemon = threading.Thread(target=lambda: llm.generate(["a"] * 300, long), daemon=True)
        {waits}
    """)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == (["None", "3"] if waits == "thread.start()" else ["None"])
    assert "Fatal" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_one_caller_leaves_the_others(tmp_path: Path) -> None:
    process = script(
        """
        import threading
        from pyengine import LLM, SamplingParams
        llm = LLM(max_num_seqs=8)
        long = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, seed=0)
        expected = llm.generate("The old house", long)[0].outputs
        results, ended = [], []
        work = lambda: results.append(llm.generate("The old house", long)[0].outputs)
        thread = threading.Thread(target=work)
        thread.start()
        print("ready", flush=True)
        try:
            llm.generate(["Once"] * 1000, long, on_output=lambda index, output: ended.append(output))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        thread.join()
        assert results == [expected]
        assert len(ended) == 1000 and {o.outputs[0].finish_reason for o in ended} <= {"abort", "length"}
        assert "abort" == ended[-1].outputs[0].finish_reason
        assert llm._engine.core.manager.num_in_use == 0 and not llm._engine.requests
        assert llm.generate("The old house", long)[0].outputs == expected
        print("fine")
        """
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["interrupted", "fine"]
