"""The engine's thread: how it starts, how it ends, and that nobody waits for one that is gone."""

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
from pathlib import Path
from typing import Any

import pytest

from pyengine import (
    LLM,
    ClosedError,
    InternalError,
    OutOfMemory,
    SamplingParams,
)

from .waiting import blocks_in_use, in_threads, paused, wait_until

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, seed=0)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, seed=0)


def test_nothing_runs_before_the_first_request(checkpoint: Callable[[str], Path]) -> None:
    def engine_threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "pyengine-engine"}

    before = engine_threads()  # of engines that earlier tests dropped: they may end at any moment
    idle = LLM(checkpoint("gelu"))
    assert engine_threads() <= before
    idle.close()
    idle.close()
    with pytest.raises(ClosedError, match="closed: make a new one"):
        idle.generate([1], GREEDY)
    assert engine_threads() <= before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("can't start new thread")])
@pytest.mark.parametrize("has_started", [True, False])
def test_starting_the_thread_is_interrupted(
    interruption: Any, has_started: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(checkpoint("gelu"))
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if has_started:
            start(thread)
            started.append(thread)
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        expected = KeyboardInterrupt if interruption is KeyboardInterrupt else OutOfMemory
        with pytest.raises(expected):
            llm.stream([1], GREEDY)
    for thread in started:  # whose thread it is not any more
        thread.join(30)
        assert not thread.is_alive()
    assert len(llm.generate([1], GREEDY)[0].outputs[0].token_ids) == 30
    llm.close()


def test_an_engine_that_cannot_give_up_strands_nobody(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread dies in a step at whose end a request had ended."""
    llm = LLM(checkpoint("gelu"))
    engine, step = llm._engine, llm._engine.step

    def dies() -> int:
        wait_until(lambda: engine.counters.steps > 0 or len(llm._thread._open) == 3)
        ran = step()
        if engine.counters.finished == 2:
            monkeypatch.setattr(engine.scheduler, "release", lambda seq: 1 / 0)
            raise SystemExit
        return ran

    monkeypatch.setattr(engine, "step", dies)
    results = in_threads(
        lambda: llm.generate([1], GREEDY), lambda: llm.score([1] * 20), lambda: list(llm.stream([1], LONG))
    )
    assert results[0][0].finished and results[1].num_scored == 19
    assert isinstance(results[2], InternalError)


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

    def is_freed() -> bool:
        gc.collect()  # does nothing while another thread collects
        return engine() is None

    wait_until(is_freed)


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


def test_the_interpreter_waits_until_a_dropped_engine_is_destroyed() -> None:
    process = script("""
        import time
        from pyengine import LLM, SamplingParams
        from pyengine.engine import thread

        class Slow:
            def __del__(self):
                time.sleep(0.3)
                print("destroyed", flush=True)

        llm = LLM()
        llm.generate("The", SamplingParams(max_tokens=2))
        llm._engine.last = Slow()
        del llm
        while thread._running:  # its thread has nothing left to do but to drop the engine
            time.sleep(0.001)
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split()) == (0, ["destroyed"]), err


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

        def on_output(index, output):
            ended.append(output)
            if index == 0:
                print("ready", flush=True)

        try:
            llm.generate(["Once"] * 1000, long, on_output=on_output)
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
