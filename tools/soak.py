"""Many threads and event loops ask one LLM for random things and give up at random, for minutes.

    python tools/soak.py --threads 200 --minutes 5

Every result is compared with that of the same request alone, on another LLM without a prefix cache: equal to
the bit, or a beginning of it where the caller gave up. At the end nothing may be left: no request, no block,
no name. A caller that gets nothing for a minute is stuck; memory that keeps growing is a leak. Both end the
run with status 1.

Under ThreadSanitizer, with an extension built for it (CPython is not instrumented, but its locks are seen):

    cmake -S . -B build/tsan-python -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYENGINE_SANITIZE=thread \\
        -DPYENGINE_TESTS=OFF -DPYENGINE_OUTPUT_DIR=$PWD/build/tsan-python/out
    cmake --build build/tsan-python
    LD_PRELOAD=$(gcc -print-file-name=libtsan.so) \\
        python tools/soak.py --extension build/tsan-python/out --patience 600
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXT = "The Captain came upon the deck, and looked a while at the sea. It was gray, and he was glad of it. "
GROWTH = 1.15  # of resident memory, from a third of the time to the end


def use_extension(directory: Path) -> None:
    """Take ``pyengine._C`` from a directory of its own."""
    (file,) = directory.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("pyengine._C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyengine._C"] = module
    spec.loader.exec_module(module)


class Request:
    """Something to ask for, and what the answer is."""

    def __init__(self, number: int, alone: Any) -> None:
        from pyengine import SamplingParams

        rng = random.Random(number)
        begin = rng.choice([0, 0, 0, 1, 7])
        self.prompt = (TEXT * 4)[begin : begin + rng.randint(1, 300)]
        self.params = SamplingParams(
            max_tokens=rng.randint(1, 40),
            n=rng.choice([1, 1, 1, 3]),
            temperature=rng.choice([0.7, 1.0]),
            seed=number,
            logprobs=rng.choice([None, 2]),
            stop=rng.choice([None, ["sea", "zzz"]]),
        )
        self.outputs = alone.generate(self.prompt, self.params)[0].outputs
        self.score = alone.score(self.prompt * 2, add_bos=True, top_logprobs=1)
        self.choices = alone.choose(self.prompt, [" deck", " sea and", " xylophone"])


class Wrong(Exception):
    pass


def require(ok: bool, what: object) -> None:
    if not ok:
        raise Wrong(repr(what))


class Soak:
    def __init__(self, llm: Any, requests: list[Request], seed: int, patience: float) -> None:
        self.llm, self.requests, self.seed, self.patience = llm, requests, seed, patience
        self.stop = threading.Event()
        self.last: dict[int, float] = {}  # when each caller last got something
        self.done = self.given_up = 0
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()

    def caller(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        works: list[Callable[[random.Random, Request], bool]] = [
            self.generate,
            self.stream,
            self.abort,
            self.score,
            self.choose,
            self.loop,
        ]
        try:
            while not self.stop.is_set():
                whole = rng.choice(works)(rng, rng.choice(self.requests))
                with self._lock:
                    self.done += 1
                    self.given_up += not whole
                self.last[number] = time.monotonic()
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()
        finally:
            self.last.pop(number, None)

    def generate(self, rng: random.Random, one: Request) -> bool:
        class GaveUp(Exception):
            pass

        def give_up(*_: object) -> None:
            raise GaveUp

        callback = give_up if rng.random() < 0.2 else None
        prompts = [one.prompt] * rng.randint(1, 3)
        try:
            outputs = self.llm.generate(prompts, one.params, priority=rng.randint(0, 2), on_output=callback)
        except GaveUp:
            return False
        for output in outputs:
            require(output.outputs == one.outputs, (one.outputs, output))
        return True

    def stream(self, rng: random.Random, one: Request) -> bool:
        limit = rng.choice([0, 3, 10**6, 10**6])
        tokens: dict[int, list[int]] = {}
        with closing(self.llm.stream(one.prompt, one.params, priority=rng.randint(0, 2))) as deltas:
            for count, delta in enumerate(deltas):
                tokens.setdefault(delta.index, []).extend(delta.token_ids)
                if count >= limit:
                    break
        return self.check_tokens(one, tokens, limit == 10**6)

    def abort(self, rng: random.Random, one: Request) -> bool:
        name = f"caller {threading.get_ident()}"
        deltas = self.llm.stream(one.prompt, one.params, request_id=name)
        timer = threading.Timer(rng.random() * 0.2, self.llm.abort, (name,))
        timer.start()
        tokens: dict[int, list[int]] = {}
        aborted = False
        for delta in deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
            aborted |= delta.finish_reason == "abort"
        timer.cancel()
        timer.join()
        return self.check_tokens(one, tokens, not aborted)

    def check_tokens(self, one: Request, tokens: dict[int, list[int]], whole: bool) -> bool:
        for completion in one.outputs:
            got = tokens.get(completion.index, [])
            known = len(completion.token_ids) if whole else len(got)
            require(got == completion.token_ids[:known], (completion, got))
        return whole

    def score(self, rng: random.Random, one: Request) -> bool:
        count = rng.randint(1, 3)
        scores = self.llm.score([one.prompt * 2] * count, add_bos=True, top_logprobs=1)
        require(scores == [one.score] * count, one.score)
        return True

    def choose(self, rng: random.Random, one: Request) -> bool:
        choices = self.llm.choose(one.prompt, [" deck", " sea and", " xylophone"])
        require(choices == one.choices, (one.choices, choices))
        return True

    def loop(self, rng: random.Random, one: Request) -> bool:
        """Several streams in an event loop, some of which are cancelled."""

        async def collect() -> dict[int, list[int]]:
            tokens: dict[int, list[int]] = {}
            async with aclosing(self.llm.astream(one.prompt, one.params)) as deltas:
                async for delta in deltas:
                    tokens.setdefault(delta.index, []).extend(delta.token_ids)
            return tokens

        async def main() -> bool:
            tasks = [asyncio.create_task(collect()) for _ in range(3)]
            cancelled = rng.random() < 0.5
            if cancelled:
                await asyncio.sleep(rng.random() * 0.1)
                tasks[0].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, dict):
                    self.check_tokens(one, result, True)
                elif not isinstance(result, asyncio.CancelledError):
                    raise result
            return not cancelled

        return asyncio.run(main())

    def run(self, threads: int, seconds: float) -> list[str]:
        """What went wrong."""
        begin = time.monotonic()
        self.last = dict.fromkeys(range(threads), begin)
        callers = [threading.Thread(target=self.caller, args=(n,), daemon=True) for n in range(threads)]
        for caller in callers:
            caller.start()
        memory: list[tuple[float, int]] = []
        next_line = begin
        while not self.stop.wait(0.5):
            now = time.monotonic()
            memory.append((now - begin, resident()))
            if now >= next_line:
                next_line = now + 10
                stats = self.llm.stats()
                done = f"{self.done} requests, {self.given_up} given up"
                now_there = f"{stats.running} running, {stats.waiting} waiting"
                so_far = f"{stats.preemptions} preemptions, {stats.prefix_hit_rate:.0%} cached"
                size = f"{memory[-1][1] / 2**20:.0f} MiB"
                print(f"{now - begin:5.0f} s  {done}, {now_there}, {so_far}, {size}", flush=True)
            stuck = [number for number, last in list(self.last.items()) if now - last > self.patience]
            if stuck:
                faulthandler.dump_traceback(all_threads=True)
                return [f"callers {stuck} have got nothing for {self.patience:.0f} s: {self.llm.stats()}"]
            if now - begin > seconds:
                self.stop.set()
        problems = [f"{type(error).__name__}: {error}" for error in self.errors]
        end = time.monotonic() + self.patience
        for caller in callers:
            caller.join(max(0.0, end - time.monotonic()))
        if any(caller.is_alive() for caller in callers):
            faulthandler.dump_traceback(all_threads=True)
            problems.append("callers do not come to an end")
        return problems + self.left_behind() + growth(memory)

    def left_behind(self) -> list[str]:
        engine, thread = self.llm._engine, self.llm._thread
        end = time.monotonic() + 10
        while (engine.requests or thread._open) and time.monotonic() < end:
            time.sleep(0.01)
        engine.core.manager.check_invariants()
        stats = self.llm.stats()
        left = {
            "requests": len(engine.requests),
            "callers to be told": len(thread._open),
            "names": len(thread.names),
            "blocks in use": stats.kv_blocks_used,
            "failed requests": stats.failed,
            "failed steps": stats.failed_steps,
        }
        print(stats)
        return [f"{count} {what}" for what, count in left.items() if count]


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def growth(memory: list[tuple[float, int]]) -> list[str]:
    third = [size for _, size in memory[len(memory) // 3 : len(memory) * 2 // 3]]
    last = [size for _, size in memory[len(memory) * 2 // 3 :]]
    if not third or not last:
        return []
    before, after = sum(third) / len(third), sum(last) / len(last)
    print(f"memory: {before / 2**20:.1f} MiB in the second third, {after / 2**20:.1f} MiB in the last")
    return [f"memory grew from {before:.0f} to {after:.0f} bytes"] if after > before * GROWTH else []


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--threads", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", help="a checkpoint; the bundled model without it")
    parser.add_argument("--kv-cache-memory", default="24MiB", help="so little that requests are preempted")
    parser.add_argument("--requests", type=int, default=40, help="different ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds without anything: stuck")
    parser.add_argument("--extension", type=Path, help="directory of the extension module to test")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.extension is not None:
        use_extension(arguments.extension)
    from pyengine import LLM

    alone = LLM(arguments.model, enable_prefix_caching=False)
    requests = [Request(number, alone) for number in range(arguments.requests)]
    alone.close()
    llm = LLM(
        arguments.model,
        kv_cache_memory=arguments.kv_cache_memory,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        max_queue_size=50,
    )
    print(f"{len(requests)} requests, {llm}", flush=True)
    soak = Soak(llm, requests, arguments.seed, arguments.patience)
    problems = soak.run(arguments.threads, arguments.minutes * 60)
    for problem in problems:
        print("WRONG:", problem, file=sys.stderr)
    llm.close()
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
