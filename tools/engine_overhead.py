#!/usr/bin/env python3
"""Time what the engine adds to the model: Python per step, and what a cached prefix saves.

Python per step is everything between the end of one ``Model.step`` and the beginning of the next, while 1, 8,
32 and 64 requests stream text with stop strings: sampled tokens are handed out, made into text, searched for
stop strings and delivered, and the next step is scheduled and built. Only steps in which every sequence
generates count. A line ``a + b x sequences`` is fitted to the medians. Beside it stands the processor time
that the callers' own threads take per step, sending their requests included: it passes while the model runs.

The time to the first token is that of a long prompt whose first tokens are cached, against a prompt of the
same length that is new.

    tools/engine_overhead.py                                    both, on the bundled model
    tools/engine_overhead.py --model path/to/gpt2 --prompt-tokens 900 --cached-tokens 880 --json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine import LLM, PyEngineError, SamplingParams  # noqa: E402
from pyengine.bench.workloads import token_ids  # noqa: E402

STOP = ["\n\nQuestion:", "<|end|>", "@@@"]  # they never come, but their beginnings do
PROMPT = "The old house at the end of the road"


class TimedModel:
    """A model that notes when each of its steps begins and ends, and how many sequences and tokens it has."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.steps: list[tuple[float, float, int, int]] = []

    def step(self, kv: Any, sampler: Any, batch: Any, *more: Any) -> Any:
        begin = time.perf_counter()
        result = self._model.step(kv, sampler, batch, *more)
        self.steps.append((begin, time.perf_counter(), batch.num_seqs, batch.num_tokens))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


Requests = list[tuple[str, SamplingParams]]


def stream_in_threads(llm: LLM, requests: Requests) -> float:
    """Runs them; the callers' processor time in seconds, like those below."""
    times = []

    def consume(prompt: str, params: SamplingParams) -> None:
        for _ in llm.stream(prompt, params):
            pass
        times.append(time.thread_time())

    threads = [threading.Thread(target=consume, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(times)


def stream_in_a_loop(llm: LLM, requests: Requests) -> float:
    async def consume(prompt: str, params: SamplingParams) -> None:
        async for _ in llm.astream(prompt, params):
            pass

    async def consume_all() -> None:
        await asyncio.gather(*(consume(*request) for request in requests))

    begin = time.thread_time()
    asyncio.run(consume_all())
    return time.thread_time() - begin


def generate(llm: LLM, requests: Requests) -> float:
    begin = time.thread_time()
    llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    return time.thread_time() - begin


_CALLERS = {"threads": stream_in_threads, "asyncio": stream_in_a_loop, "generate": generate}


def python_per_step(
    llm: LLM, timed: TimedModel, callers: str, sequences: int, new_tokens: int
) -> tuple[list[float], float]:
    """Microseconds between steps while ``sequences`` requests generate; of the callers' threads per step."""
    timed.steps.clear()

    def request(number: int) -> tuple[str, SamplingParams]:
        params = SamplingParams(max_tokens=new_tokens, seed=number, ignore_eos=True, stop=STOP)
        return f"{number}. {PROMPT}", params

    callers_time = _CALLERS[callers](llm, [request(number) for number in range(sequences)])
    steps = timed.steps
    pairs = zip(steps, steps[1:], strict=False)
    gaps = [
        (after[0] - before[1]) * 1e6
        for before, after in pairs
        if before[2:] == after[2:] == (sequences, sequences)
    ]
    return gaps, callers_time * 1e6 / len(steps)


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """a and b of y = a + b x, by least squares."""
    mean_x = statistics.mean(x for x, _ in points)
    mean_y = statistics.mean(y for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def ttft(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds to the first token, and how many tokens of the prompt were cached."""
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    assert output.metrics.ttft is not None
    return output.metrics.ttft * 1e3, output.metrics.cached_tokens


def prefix_rows(llm: LLM, prompt_tokens: int, cached_tokens: int, repeats: int) -> dict[str, Any]:
    rows = token_ids(repeats + 1, prompt_tokens, llm.config.vocab_size)
    first = rows.pop()
    ttft(llm, first)
    cold, cached, hits = [], [], []
    for row in rows:
        cold.append(ttft(llm, row)[0])
        ms, hit = ttft(llm, first[:cached_tokens] + row[cached_tokens:])
        cached.append(ms)
        hits.append(hit)
    ratios = [b / a for a, b in zip(cold, cached, strict=True)]
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": min(hits),
        "cold_ms": spread(cold),
        "cached_ms": spread(cached),
        "ratio": {name: round(value, 4) for name, value in spread(ratios, 4).items()},
    }


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory with a tokenizer (default: the bundled model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument(
        "--callers",
        choices=list(_CALLERS),
        default="asyncio",
        help="who waits for the text: a thread for each stream, one event loop for all of them, or one "
        "call of generate without streaming (default %(default)s)",
    )
    parser.add_argument("--sequences", default="1,8,32,64", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=300, help="of each stream (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, help="default: 90 %% of the context")
    parser.add_argument("--cached-tokens", type=int, help="default: the prompt less its last 20 tokens")
    parser.add_argument("--repeats", type=int, default=7, help="prompts to time (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    return parser.parse_args()


def main() -> None:
    args = parse()
    counts = [int(word) for word in args.sequences.split(",")]
    llm = LLM(args.model, dtype=args.dtype, num_threads=args.threads, max_num_seqs=max(*counts, 64))
    timed = TimedModel(llm._engine.core.model)
    llm._engine.core = dataclasses.replace(llm._engine.core, model=timed)
    python_per_step(llm, timed, args.callers, min(counts), 20)  # imports and first allocations
    rows = []
    for sequences in counts:
        gaps, callers_us = python_per_step(llm, timed, args.callers, sequences, args.new_tokens)
        if not gaps:
            sys.exit(f"engine_overhead: the {sequences} streams never ran together: raise --new-tokens")
        steps = [(end - begin) * 1e6 for begin, end, *size in timed.steps if size == [sequences, sequences]]
        row = {
            "callers": args.callers,
            "sequences": sequences,
            "steps": len(gaps),
            "mean_us": round(statistics.mean(gaps), 1),
        }
        row |= {f"{name}_us": value for name, value in spread(gaps).items()}
        row |= {"callers_us": round(callers_us, 1), "bound_us": 100 + 5 * sequences}
        row["model_us"] = round(statistics.median(steps), 1)
        rows.append(row)
    line = None  # constant and slope, microseconds
    if len(set(counts)) > 1:
        line = fit([(row["sequences"], row["median_us"]) for row in rows])
    prompt = args.prompt_tokens or llm.max_model_len * 9 // 10
    cached = args.cached_tokens if args.cached_tokens is not None else prompt - 20
    prefix = prefix_rows(llm, prompt, cached, args.repeats)

    if args.json:
        for row in rows:
            print(json.dumps({"measure": "python_per_step", **row}))
        if line is not None:
            constant, slope = round(line[0], 1), round(line[1], 2)
            print(json.dumps({"measure": "fit", "constant_us": constant, "slope_us": slope}))
        print(json.dumps({"measure": "ttft", **prefix}))
        return
    print(f"Python per step, microseconds; callers: {args.callers}")
    print(
        f"{'sequences':>10}{'median':>9}{'mean':>9}{'least':>9}{'most':>9}{'callers':>9}{'steps':>7}"
        f"{'the step itself':>17}"
    )
    for row in rows:
        names = ("median_us", "mean_us", "min_us", "max_us", "callers_us")
        cells = [f"{row[name]:>9.1f}" for name in names]
        print(f"{row['sequences']:>10}{''.join(cells)}{row['steps']:>7}{row['model_us']:>17.1f}")
    if line is not None:
        print(f"fitted to the medians: {line[0]:.1f} + {line[1]:.2f} x sequences")
    print(
        f"\ntime to the first token of {prompt} tokens: cold {prefix['cold_ms']['median']:.1f} ms, with "
        f"{prefix['cached_tokens']} of them cached {prefix['cached_ms']['median']:.1f} ms; ratio "
        f"{prefix['ratio']['median']:.3f} ({prefix['ratio']['min']:.3f}-{prefix['ratio']['max']:.3f})"
    )


if __name__ == "__main__":
    try:
        main()
    except PyEngineError as error:
        sys.exit(f"engine_overhead: {error}")
