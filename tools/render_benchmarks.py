#!/usr/bin/env python3
"""Tables and plots of the documentation from JSON lines of measurements.

Reads lines of ``pyengine-cli bench --json [--profile]`` and of ``tools/compare_peers.py --json``. Tables
replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in pages; plots are SVG files.
Pairs of the same comparison are pooled; of bench lines of the same workload and type the last one counts.
The table ``peers`` has all comparisons, ``peers_avx2`` those with that instruction set, and so on.

    tools/render_benchmarks.py docs/figures/*.jsonl --pages docs/*.md --plots docs/figures
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

DTYPES = ["f32", "bf16", "int8", "int4"]
WORKLOADS = ["decode", "prefill", "batch", "mixed"]
DTYPE_NAMES = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
PEER_NAMES = {"ov": "OpenVINO", "hf": "transformers", "ct2": "CTranslate2", "llama": "llama.cpp"}


def read(paths: Iterable[Path]) -> tuple[list[Row], list[Row]]:
    """Rows of bench, and of comparisons with their pairs pooled."""
    bench: dict[tuple[str, ...], Row] = {}
    compared: dict[tuple[str, ...], Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                sys.exit(f"render_benchmarks: {path}, line {number}: not JSON: {error}")
            if "pairs" in row:
                names = ("isa", "workload", "dtype", "kv_dtype", "peer_engine", "peer_dtype")
                key = tuple(row[name] for name in names)
                compared.setdefault(key, {**row, "pairs": []})["pairs"] += row["pairs"]
            elif row.get("engine") == "pyengine":
                bench[row["workload"], row["dtype"], row["kv_dtype"], str(row["threads"])] = row
    return list(bench.values()), list(compared.values())


def spread(values: list[float], digits: int) -> str:
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({low}–{high})"


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def order(row: Row) -> tuple[int, int]:
    workload = row["workload"]
    return (
        DTYPES.index(row["dtype"]) if row["dtype"] in DTYPES else len(DTYPES),
        WORKLOADS.index(workload) if workload in WORKLOADS else len(WORKLOADS),
    )


def table_of_peers(compared: list[Row]) -> str:
    rows = []
    for row in sorted(compared, key=order):
        own, other = [a for a, _ in row["pairs"]], [b for _, b in row["pairs"]]
        peer = f"{PEER_NAMES.get(row['peer_engine'], row['peer_engine'])} {row['peer_dtype']}"
        digits = 1 if row["workload"] == "decode" else 0
        ratio = spread([a / b for a, b in row["pairs"]], 2)
        cells = [DTYPE_NAMES.get(row["dtype"], row["dtype"]), row["kv_dtype"], row["workload"]]
        rows.append([*cells, spread(own, digits), peer, spread(other, digits), ratio, str(len(own))])
    head = ["weights", "KV", "workload", "pyengine, tokens/s", "peer", "peer, tokens/s", "ratio", "pairs"]
    return markdown(head, rows, left=3)


def table_of_speeds(bench: list[Row]) -> str:
    rows = []
    for row in sorted((row for row in bench if row["workload"] in WORKLOADS), key=order):
        rate = f"{row['tok_per_s_median']:,.1f} ({row['min']:,.1f}–{row['max']:,.1f})"
        memory = f"{row['gb_per_s']:.1f} ({row['gb_per_s'] / row['gb_per_s_limit']:.0%})"
        arithmetic = f"{row['gflop_per_s']:,.0f} ({row['gflop_per_s'] / row['gflop_per_s_limit']:.0%})"
        name = DTYPE_NAMES.get(row["dtype"], row["dtype"])
        rows.append([name, row["kv_dtype"], str(row["threads"]), row["workload"], rate, memory, arithmetic])
    head = ["weights", "KV", "threads", "workload", "tokens/s", "GB/s (of limit)", "GFLOP/s (of limit)"]
    return markdown(head, rows, left=4)


def tables_of_parts(bench: list[Row]) -> str:
    """The roofline: per step, what each part moves and computes, what that must take and what it takes."""
    blocks = []
    for row in sorted((row for row in bench if "profile" in row and row["workload"] in WORKLOADS), key=order):
        steps = row["profile"][-1]["calls"]
        total = sum(part["ms"] for part in row["profile"])
        title = f"### {row['workload']}, {DTYPE_NAMES.get(row['dtype'], row['dtype'])}"
        about = (
            f"Sequences: {row['sequences']}; prompt tokens in all: {row['prompt_tokens']}; new ones: "
            f"{row['new_tokens']}; {steps} steps of {total / steps:.2f} ms; KV {row['kv_dtype']}; "
            f"{row['threads']} threads; limits: {row['gb_per_s_limit']:.1f} GB/s and "
            f"{row['gflop_per_s_limit']:,.0f} GFLOP/s."
        )
        rows = []
        for part in row["profile"]:
            if part["share"] < 0.0005:
                continue
            rows.append(
                [
                    part["part"],
                    f"{part['calls'] / steps:.3g}",
                    f"{part['ms'] / steps * 1e3:,.0f}",
                    f"{part['share']:.1%}",
                    f"{part['bytes'] / steps / 1e6:,.2f}",
                    f"{part['operations'] / steps / 1e9:,.3f}",
                    f"{part['gb_per_s']:.1f}",
                    f"{part['gflop_per_s']:,.0f}",
                    part["limit"] or "",
                    "" if part["share_of_limit"] is None else f"{part['share_of_limit']:.0%}",
                ]
            )
        head = ["part", "calls", "µs", "share", "MB", "GFLOP", "GB/s", "GFLOP/s", "limit", "of limit"]
        blocks.append(f"{title}\n\n{about}\n\n{markdown(head, rows)}")
    return "\n\n".join(blocks)


def replace_tables(page: Path, tables: dict[str, str]) -> None:
    text = page.read_text()

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            sys.exit(f"render_benchmarks: {page}: there is no table {name!r}, only {', '.join(tables)}")
        return f"<!-- begin {name} -->\n{tables[name]}\n<!-- end {name} -->"

    page.write_text(re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", fill, text, flags=re.S))


def draw(bench: list[Row], directory: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyengine", "font.size": 9})
    from matplotlib import pyplot

    written = []

    def save(figure: Any, name: str) -> None:
        written.append(directory / name)
        figure.savefig(written[-1], metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)

    own = {"batch": r"(?:(\d+)x\()?64\+64\)?", "context": r"(\d+)\+32"}
    for name, pattern in own.items():
        figure, axes = pyplot.subplots(figsize=(6, 3.6))
        for dtype in DTYPES:
            found = ((re.fullmatch(pattern, row["workload"]), row) for row in bench if row["dtype"] == dtype)
            points = sorted((int(match[1] or 1), row) for match, row in found if match)
            if not points:
                continue
            x = [count for count, _ in points]
            if name == "batch":  # one sequence alone is reported without its prefill
                points = [(count, row) for count, row in points if row["rate"] == "total"]
                x = [count for count, _ in points]
            y = [row["tok_per_s_median"] for _, row in points]
            axes.plot(x, y, marker="o", label=DTYPE_NAMES[dtype])
            axes.fill_between(x, [r["min"] for _, r in points], [r["max"] for _, r in points], alpha=0.2)
        if name == "batch":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axes.set(xlabel="sequences, 64 prompt and 64 new tokens each", ylabel="new tokens/s, whole call")
        else:
            axes.set(
                xlabel="prompt tokens before 32 new ones, one sequence", ylabel="new tokens/s after the first"
            )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
            save(figure, f"speed-by-{name}.svg")
        else:
            pyplot.close(figure)

    profiled = [row for row in bench if "profile" in row]
    shown = [name for name in WORKLOADS[:3] if any(row["workload"] == name for row in profiled)]
    if shown:
        figure, panels = pyplot.subplots(len(shown), 1, figsize=(7, 1.6 * len(shown) + 0.8), squeeze=False)
        parts = ["qkv", "attention", "attn_proj", "mlp_fc", "mlp_proj", "head", "layer_norm", "sampling"]
        colours = dict(zip([*parts, "rest", "outside the steps"], (f"C{i}" for i in range(10)), strict=True))
        for axes, workload in zip(panels[:, 0], shown, strict=True):
            rows = sorted((row for row in profiled if row["workload"] == workload), key=order, reverse=True)
            for bar, row in enumerate(rows):
                steps, left = row["profile"][-1]["calls"], 0.0
                times = {part["part"]: part["ms"] / steps for part in row["profile"]}
                times["rest"] = sum(ms for part, ms in times.items() if part not in colours)
                for part, colour in colours.items():
                    axes.barh(
                        bar, times.get(part, 0), left=left, color=colour, label=part if bar == 0 else None
                    )
                    left += times.get(part, 0)
            axes.set_yticks(range(len(rows)), [DTYPE_NAMES[row["dtype"]] for row in rows])
            axes.set_title(f"{workload}: milliseconds of a step", loc="left", fontsize=9)
        panels[0, 0].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.25), fontsize=8)
        figure.tight_layout()
        save(figure, "step-by-part.svg")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of JSON lines")
    parser.add_argument("--pages", nargs="*", type=Path, default=[], help="pages whose tables are replaced")
    parser.add_argument("--plots", type=Path, help="directory for the plots; needs matplotlib")
    args = parser.parse_args()
    bench, compared = read(args.results)
    tables = {
        "peers": table_of_peers(compared),
        **{
            f"peers_{isa}": table_of_peers([row for row in compared if row["isa"] == isa])
            for isa in sorted({row["isa"] for row in compared})
        },
        "speeds": table_of_speeds(bench),
        "parts": tables_of_parts(bench),
    }
    for page in args.pages:
        replace_tables(page, tables)
    if args.plots is not None:
        for path in draw(bench, args.plots):
            print(path)


if __name__ == "__main__":
    main()
