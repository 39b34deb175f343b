"""Tables of what ``tools/cuda_bench.py`` measured, beside what the GPU allows.

The roofline of a kernel is the larger of its bytes over the bandwidth of a large copy and its operations over
the rate of cuBLAS's large product in the same dtype, both measured in the same run; that of a workload is the
sum of its steps' rooflines, each of which reads all weights, and the keys and values of its sequences.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

MODELS = {  # channels, heads, layers
    "tiny": (32, 2, 2),
    "124M": (768, 12, 12),
    "1.5B": (1600, 25, 48),
}
_VOCAB = 50257
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

NCU_METRICS = {  # NVIDIA's name: ours
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
}
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


@dataclass(frozen=True)
class Limits:
    """Of the GPU, as measured; infinite where nobody measured."""

    bandwidth: float = float("inf")  # bytes per second
    flops: dict[str, float] = field(default_factory=dict)  # per second, by dtype

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Limits:
        bandwidth, flops = float("inf"), {}
        for row in rows:
            if row.get("kernel") == "copy":
                bandwidth = row["bytes"] / row["us"] * 1e6
            elif row.get("kernel") == "matmul":
                flops[row["dtype"]] = row["flops_per_s"]
        return cls(bandwidth, flops)

    def seconds(self, size: float, flops: float, dtype: str) -> float:
        """The least time of something that moves ``size`` bytes."""
        return max(size / self.bandwidth, flops / self.flops.get(dtype, float("inf")))

    def __str__(self) -> str:
        rates = [f"{name} {rate / 1e12:,.0f} TFLOP/s" for name, rate in self.flops.items()]
        return ", ".join([f"copy {self.bandwidth / 1e9:,.0f} GB/s", *rates])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of cells, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def _dense_layer(row: Row) -> str:
    how = "" if row["by"] == "pyengine" else f", {row['by']}"
    return row["layer"] + (how if row["weights"] == row["dtype"] else f", {row['weights']}")


# Of a kernel's rows in a table: the label, and the column.
_AXES: dict[str, tuple[Callable[[Row], str], Callable[[Row], str]]] = {
    "dense": (_dense_layer, lambda r: f"{r['rows']} rows"),
    "dense_of_norm": (_dense_layer, lambda r: f"{r['rows']} rows"),
    "decode_attention": (
        lambda r: f"{_SHORT.get(r['kv'], r['kv'])} KV, {r['sequences']} sequences",
        lambda r: f"{r['context']} keys",
    ),
    "prefill_attention": (
        lambda r: f"{_SHORT.get(r['kv'], r['kv'])} KV",
        lambda r: f"{r['sequences']}x{r['fresh']} of {r['context']}",
    ),
    "write_kv": (
        lambda r: f"{_SHORT.get(r['kv'], r['kv'])} KV",
        lambda r: f"{r['sequences']}x{r['fresh']}",
    ),
    "layer_norm": (lambda r: "", lambda r: f"{r['rows']} rows"),
    "embed": (lambda r: r["weights"], lambda r: f"{r['rows']} rows"),
    "copy_blocks": (lambda r: "", lambda r: f"{r['blocks']} blocks"),
    "sampling": (lambda r: r["controls"], lambda r: f"{r['rows']} rows"),
    "convert_weight": (lambda r: "", lambda r: f"from {r['from']}"),
    "arrange_integers": (lambda r: "", lambda r: r["weights"]),
}
_MEASURED = {"us", "us_min", "sets", "bytes", "flops", "engine", "by", "peak_mib"}


def _case(row: Row) -> tuple[tuple[str, Any], ...]:
    """What a row measures, whoever did."""
    return tuple(sorted((key, value) for key, value in row.items() if key not in _MEASURED))


def kernel_tables(rows: Sequence[Row], dtype: str) -> Iterator[str]:
    """A table per kernel, model and dtype (that one, or all)."""
    limits = Limits.of(rows)
    peers = {_case(row): row["us"] for row in rows if row.get("engine") == "torch"}
    own = [row for row in rows if row.get("kernel") in _AXES and "engine" not in row]
    own = [row for row in own if dtype in ("all", row["dtype"])]
    if own:
        yield f"kernels: microseconds, share of the roofline, PyTorch's time / this one's ({limits})"

    def cell(row: Row) -> str:
        floor = limits.seconds(row["bytes"], row["flops"], row["dtype"]) * 1e6
        peer = peers.get(_case(row))
        return f"{row['us']:.1f} {floor / row['us']:.0%} " + (
            "-" if peer is None else f"{peer / row['us']:.2f}"
        )

    for kernel, model, of_dtype in dict.fromkeys((r["kernel"], r["model"], r["dtype"]) for r in own):
        label, column = _AXES[kernel]
        cells = {
            (label(row), column(row)): cell(row)
            for row in own
            if (row["kernel"], row["model"], row["dtype"]) == (kernel, model, of_dtype)
        }
        labels, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        lines = [[f"{kernel}, {model} {_SHORT[of_dtype]}", *columns]]
        lines += [[f"  {name}", *(cells.get((name, c), "") for c in columns)] for name in labels]
        yield aligned(lines)


def _step_seconds(model: str, limits: Limits, fresh: Sequence[int], context: Sequence[int]) -> float:
    """Roofline in float16 of a step: ``fresh`` new tokens of each sequence, ``context`` after them."""
    channels, _, layers = MODELS[model]
    inner, head = 12 * layers * channels**2, _VOCAB * channels
    pairs = sum(f * (c - f) + f * (f + 1) / 2 for f, c in zip(fresh, context, strict=True))
    flops = 2 * inner * sum(fresh) + 2 * head * len(fresh) + 4 * channels * layers * pairs
    size = 2 * (inner + head) + 4 * channels * layers * sum(context)
    return limits.seconds(size, flops, "float16")


def roofline_rate(model: str, workload: str, limits: Limits) -> float | None:
    """Tokens per second that the GPU allows; None where the schedule decides (mixed)."""
    if workload not in ("decode", "prefill", "batch"):
        return None
    sequences, prompt, new = {"decode": (1, 16, 128), "prefill": (1, 512, 1), "batch": (32, 64, 64)}[workload]
    first = _step_seconds(model, limits, [prompt] * sequences, [prompt] * sequences)
    rest = sum(_step_seconds(model, limits, [1] * sequences, [prompt + i] * sequences) for i in range(1, new))
    if workload == "prefill":
        return prompt / first
    return (new - 1) / rest if workload == "decode" else sequences * new / (first + rest)


def workload_table(rows: Sequence[Row]) -> str:
    """Engines side by side; the memory is the most that the process took of the GPU."""
    limits = Limits.of(rows)
    measured = [row for row in rows if "workload" in row]
    engines = list(dict.fromkeys(row["engine"] for row in measured))
    lines = [["float16: tokens/s", *engines, *(f"/ {e}" for e in engines[1:]), "roofline", "MiB"]]
    for model, workload in dict.fromkeys((row["model"], row["workload"]) for row in measured):
        of = {r["engine"]: r for r in measured if (r["model"], r["workload"]) == (model, workload)}
        own, rate = of.get(engines[0]), roofline_rate(model, workload, limits)
        line = [f"{model} {workload}"]
        for engine in engines:
            r = of.get(engine)
            line.append(f"{r['tok_per_s_median']:,.0f} ({r['min']:,.0f}-{r['max']:,.0f})" if r else "")
        for engine in engines[1:]:
            r = of.get(engine)
            line.append(f"{own['tok_per_s_median'] / r['tok_per_s_median']:.2f}" if own and r else "")
        line.append("" if rate is None or rate == float("inf") else f"{rate:,.0f}")
        line.append(" / ".join(str(of[e].get("peak_mib") or "-") if e in of else "-" for e in engines))
        lines.append(line)
    return aligned(lines)


def read_ncu(report: str) -> list[Row]:
    """Launches of ``ncu --csv --page raw``, those of the same kernel and grid together."""
    begin = report.find('"ID"')
    if begin < 0:
        return []
    launches = list(csv.DictReader(io.StringIO(report[begin:])))
    units, groups = launches[0], dict[tuple[str, str], list[Row]]()
    for launch in launches[1:]:
        plain = re.sub(r"<unnamed>::|\(anonymous namespace\)::|\(\w+\)", "", launch["Kernel Name"])
        found = re.search(r"(\w+(?:<[^(]*>)?)(?:\(|$)", plain)
        name = found[1] if found else plain
        row: Row = {}
        for metric, ours in NCU_METRICS.items():
            value = float((launch.get(metric) or "nan").replace(",", ""))
            row[ours] = value * _MICROSECONDS.get(units.get(metric, ""), 1.0) if ours == "us" else value
        groups.setdefault((name, launch["Grid Size"]), []).append(row)
    return [
        {"ncu": name, "grid": grid, "launches": len(group)}
        | {ours: round(statistics.median(r[ours] for r in group), 2) for ours in NCU_METRICS.values()}
        for (name, grid), group in groups.items()
    ]


def ncu_table(rows: Sequence[Row]) -> str:
    lines = [["ncu: kernel, grid", "launches", "us", "DRAM %", "SM %", "warps %"]]
    for r in rows:
        cells = (f"{r[name]:.1f}" for name in NCU_METRICS.values())
        lines.append([f"{r['model']} {r['ncu']} {r['grid']}", str(r["launches"]), *cells])
    return aligned(lines)


def tables(rows: Sequence[Row], dtype: str) -> Iterator[str]:
    """Everything there is; of the kernels those of ``dtype``, or "all"."""
    yield from kernel_tables(rows, dtype)
    if any("workload" in row for row in rows):
        yield workload_table(rows)
    profiled = [row for row in rows if "ncu" in row]
    if profiled:
        yield ncu_table(profiled)
