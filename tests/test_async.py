"""``astream``: coroutines of one event loop, of many, tasks that are cancelled, and loops that go away."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pyengine import LLM, ClosedError, InternalError, RequestError, SamplingParams, StreamDelta

from .waiting import paused, wait_until, wait_until_idle

PARAMS = SamplingParams(max_tokens=30, seed=3, logprobs=1, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(checkpoint("gelu"), max_num_seqs=8, max_queue_size=4)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Any:
    yield
    wait_until_idle(llm)
    assert not llm._thread.names and not llm._thread._open


async def collect(llm: LLM, prompt: list[int], params: SamplingParams = PARAMS) -> list[StreamDelta]:
    return [delta async for delta in llm.astream(prompt, params)]


def tokens(deltas: list[StreamDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_many_coroutines_of_one_loop(llm: LLM) -> None:
    """More of them than run and wait: the others wait outside."""
    prompts = [[number % 7 + 1] * (number % 40 + 1) for number in range(40)]
    expected = [output.outputs[0] for output in llm.generate(prompts, PARAMS)]

    async def main() -> list[list[StreamDelta]]:
        return await asyncio.gather(*(collect(llm, prompt) for prompt in prompts))

    for deltas, whole in zip(asyncio.run(main()), expected, strict=True):
        assert tokens(deltas) == whole.token_ids
        assert deltas[-1].output is not None and deltas[-1].output.outputs == [whole]


def test_many_loops_and_threads(llm: LLM) -> None:
    expected = [llm.generate([number + 1], PARAMS)[0].outputs[0].token_ids for number in range(8)]
    results: dict[int, list[list[int]]] = {}

    def loop(number: int) -> None:
        async def main() -> list[list[StreamDelta]]:
            return await asyncio.gather(*(collect(llm, [number + 1]) for _ in range(4)))

        results[number] = [tokens(deltas) for deltas in asyncio.run(main())]

    threads = [threading.Thread(target=loop, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    others = [llm.generate([number + 1], PARAMS)[0].outputs[0].token_ids for number in range(8)]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert others == expected
    assert [results[number] for number in range(8)] == [[each] * 4 for each in expected]


def test_cancelling_a_task_ends_its_request_only(llm: LLM) -> None:
    expected = llm.generate([1], LONG)[0].outputs[0].token_ids
    aborted = llm.stats().aborted

    async def main() -> list[StreamDelta]:
        cancelled = [asyncio.create_task(collect(llm, [2], LONG)) for _ in range(20)]
        kept = asyncio.create_task(collect(llm, [1], LONG))
        with paused(llm):
            await asyncio.sleep(0.02)
            for task in cancelled:
                task.cancel()
            results = await asyncio.gather(*cancelled, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return await kept

    assert tokens(asyncio.run(main())) == expected
    wait_until_idle(llm)
    assert llm.stats().aborted == aborted + 20


def test_leaving_early(llm: LLM) -> None:
    async def main() -> None:
        async with aclosing(llm.astream([1], LONG)) as deltas:
            async for _ in deltas:
                break
        deltas = llm.astream([1], LONG)
        await anext(deltas)
        await deltas.aclose()
        never_begun = llm.astream([1], LONG)
        await never_begun.aclose()
        left = llm.astream([1], LONG)  # asyncio.run closes it
        await anext(left)

    asyncio.run(main())
    wait_until_idle(llm)


def test_abort(llm: LLM) -> None:
    async def main() -> list[StreamDelta]:
        deltas = []
        with paused(llm):
            stream = llm.astream([1], LONG, request_id="mine", priority=1)
            first = asyncio.create_task(anext(stream))
            while "mine" not in llm._thread.names:
                await asyncio.sleep(0.001)
            llm.abort("mine")
        deltas.append(await first)
        deltas += [delta async for delta in stream]
        return deltas

    assert asyncio.run(main())[-1].finish_reason == "abort"


def test_errors(llm: LLM, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="token 0"):
        llm.astream([-1])
    with pytest.raises(RequestError, match="one prompt"):
        llm.astream([[1], [2]])  # type: ignore[list-item]

    def fail(*_: object) -> None:
        raise InternalError("as the test asked")

    monkeypatch.setattr(llm._engine.scheduler, "schedule", fail)
    with pytest.raises(InternalError, match="as the test asked"):
        asyncio.run(collect(llm, [1]))
    monkeypatch.undo()
    closed = LLM(checkpoint("gelu"))

    async def close() -> None:
        with paused(closed, after=1):
            stream = closed.astream([1], LONG)
            await anext(stream)
            closed._thread.stop()
        closed.close()
        async for _ in stream:
            pass

    with pytest.raises(ClosedError):
        asyncio.run(close())


def test_a_loop_that_goes_away_ends_its_requests(llm: LLM) -> None:
    """It is closed with a generator suspended; nobody closes that, the engine notices."""
    loop = asyncio.new_event_loop()
    stream = llm.astream([1], LONG)
    with paused(llm):
        first = loop.create_task(stream.__anext__())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
    wait_until_idle(llm)
    assert llm.stats().failed > 0
    first._log_destroy_pending = False  # type: ignore[attr-defined]
    del first, stream
    gc.collect()


def test_only_astream_imports_asyncio() -> None:
    code = (
        "import sys, pyengine\n"
        "llm = pyengine.LLM()\n"
        "list(llm.stream('The old house', pyengine.SamplingParams(max_tokens=3)))\n"
        "print('asyncio' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_event_loops_that_are_over_are_forgotten(llm: LLM) -> None:
    """Also those that end while the engine still has something to tell them."""

    async def leave() -> weakref.ref[asyncio.AbstractEventLoop]:
        async for _ in llm.astream([3] * 4, SamplingParams(max_tokens=20, ignore_eos=True)):
            break
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(leave()) for _ in range(20)]
    wait_until_idle(llm)

    def are_forgotten() -> bool:
        gc.collect()  # does nothing while another thread collects
        return not any(loop() for loop in loops)

    wait_until(are_forgotten)
