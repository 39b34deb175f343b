"""Run workloads on an ``LLM`` and turn times and costs into rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyengine.bench.limits import Limits
from pyengine.bench.profile import PartTotals, Profile, profiled
from pyengine.bench.workloads import Workload
from pyengine.errors import RequestError

SHORT_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass
class Result:
    """Of one workload: a rate per repetition, and one profiled run more that is not timed."""

    workload: Workload
    rates: list[float] = field(default_factory=list)  # tokens per second
    seconds: list[float] = field(default_factory=list)  # that the rates refer to
    cached_tokens: int = 0
    cost: PartTotals = PartTotals()  # bytes and operations of the part of the run that is timed
    profile: Profile = Profile({})  # of the whole run
    profiled_seconds: float = 0.0


def run(llm: Any, workload: Workload, result: Result | None = None) -> tuple[float, float]:
    """Seconds until the first token, and of the whole workload; greedy, whatever tokens come.

    The first are those of a call for one token each, unless the workload has them from the same call; where
    the rate needs none (``total``), they are 0.
    """
    if workload.rate == "prefill":
        first, _ = _call(llm, workload, [1] * len(workload.prompts), result)
        return first, first
    first = 0.0
    if workload.rate == "decode" and not workload.own_ttft:
        first, _ = _call(llm, workload, [1] * len(workload.prompts), result)
    whole, ttft = _call(llm, workload, workload.new_tokens, result)
    return (ttft if workload.own_ttft else first), whole


def require_fits(llm: Any, workload: Workload) -> None:
    """RequestError where a request is longer than the context, and would end early."""
    longest = max(len(p) + new for p, new in zip(workload.prompts, workload.new_tokens, strict=True))
    if longest > llm.max_model_len:
        raise RequestError(
            f"workload {workload.name} has a request of {longest} tokens, prompt and new ones together, "
            f"but the context is {llm.max_model_len}: "
            "choose another --workload, or --prompt-tokens and --new-tokens"
        )


def _call(
    llm: Any, workload: Workload, new_tokens: Sequence[int], result: Result | None = None
) -> tuple[float, float]:
    """Seconds of one ``generate``, and until the first token of its first prompt."""
    from pyengine import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for new in new_tokens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params)
    seconds = time.perf_counter() - start
    if result is not None:
        result.cached_tokens += sum(output.metrics.cached_tokens for output in outputs)
    return seconds, outputs[0].metrics.ttft


def measure(
    llm: Any, workloads: Sequence[Workload], repeats: int, progress: Callable[[str], object] = lambda _: None
) -> list[Result]:
    """``repeats`` rates of each workload, after one run of each that does not count.

    The workloads take turns, so that all of them meet the same machine.
    """
    for workload in workloads:
        require_fits(llm, workload)
    results = [Result(workload) for workload in workloads]
    for turn in range(repeats + 1):
        for result in results:
            progress(f"{result.workload.name}, " + (f"{turn} of {repeats}" if turn else "warming up"))
            ttft, total = run(llm, result.workload, result)
            if turn == 0:
                continue
            rate = result.workload.rate
            result.rates.append(result.workload.tokens_per_second(ttft, total))
            result.seconds.append(ttft if rate == "prefill" else total - (ttft if rate == "decode" else 0))
    for result in results:
        progress(f"{result.workload.name}, cost")
        _take_profile(llm, result)
    return results


def _take_profile(llm: Any, result: Result) -> None:
    workload = result.workload
    start = time.perf_counter()
    result.profile = profiled(llm, lambda: _call(llm, workload, workload.new_tokens))
    result.profiled_seconds = time.perf_counter() - start
    result.cost = result.profile.total
    if workload.rate == "decode":
        first = profiled(llm, lambda: _call(llm, workload, [1] * len(workload.prompts))).total
        result.cost = PartTotals(
            result.cost.calls - first.calls,
            result.cost.seconds - first.seconds,
            result.cost.bytes - first.bytes,
            result.cost.operations - first.operations,
        )


def weights_of(llm: Any) -> str:
    """f32, bf16, int8 or int4."""
    return str(llm.quantization or SHORT_NAMES[llm.dtype])


def row_of(llm: Any, workload: str, rates: Sequence[float], load_s: float) -> dict[str, Any]:
    """What the rows of all workloads begin with."""
    return {
        "engine": "pyengine",
        "dtype": weights_of(llm),
        "workload": workload,
        "threads": llm.num_threads,
        "tok_per_s_median": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "load_s": round(load_s, 2),
        "device": llm.device,
    }


def as_row(result: Result, llm: Any, load_s: float, limits: Limits | None) -> dict[str, Any]:
    """What ``bench --json`` prints for a workload; ``docs/benchmarks.md`` lists the keys. Without ``limits``
    there is nothing of bytes and operations."""
    dtype = weights_of(llm)
    seconds = statistics.median(result.seconds)
    workload = result.workload
    row = row_of(llm, workload.name, result.rates, load_s) | {
        "rate": workload.rate,
        "sequences": len(workload.prompts),
        "prompt_tokens": workload.num_prompt_tokens,
        "new_tokens": sum(workload.new_tokens),
        "kv_dtype": SHORT_NAMES.get(llm.kv_cache_dtype, llm.kv_cache_dtype),
        "cached_tokens": result.cached_tokens,
    }
    if limits is None:
        return row
    return row | {
        "gb_per_s": round(result.cost.bytes / seconds / 1e9, 2),
        "gflop_per_s": round(result.cost.operations / seconds / 1e9, 1),
        "gb_per_s_limit": round(limits.bandwidth / 1e9, 2),
        "gflop_per_s_limit": round(limits.peak("head", dtype) / 1e9, 1),
    }


def profile_rows(result: Result, dtype: str, limits: Limits) -> list[dict[str, Any]]:
    """The parts of the profiled run in order of their time; the last row is what lies outside the steps."""
    wall = result.profiled_seconds
    rows = []
    for name, totals in sorted(result.profile.parts.items(), key=lambda item: -item[1].seconds):
        least, limit = limits.seconds(name, totals, dtype)
        rows.append(
            {
                "part": name,
                "calls": totals.calls,
                "ms": round(totals.seconds * 1e3, 3),
                "share": round(totals.seconds / wall, 4),
                "bytes": totals.bytes,
                "operations": totals.operations,
                "gb_per_s": round(totals.bytes / totals.seconds / 1e9, 2) if totals.seconds else 0.0,
                "gflop_per_s": round(totals.operations / totals.seconds / 1e9, 1) if totals.seconds else 0.0,
                "limit": limit if least else None,
                "share_of_limit": round(least / totals.seconds, 4) if least and totals.seconds else None,
            }
        )
    outside = wall - result.profile.total.seconds
    empty = dict.fromkeys(("bytes", "operations"), 0) | dict.fromkeys(("gb_per_s", "gflop_per_s"), 0.0)
    rows.append(
        {"part": "outside the steps", "calls": result.profile.steps, "ms": round(outside * 1e3, 3)}
        | {"share": round(outside / wall, 4), **empty, "limit": None, "share_of_limit": None}
    )
    return rows
