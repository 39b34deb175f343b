"""Tables of ``bench`` for people. Imports rich, so it is imported only where they are shown."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pyengine.bench.workloads import RATES

_WIDTH = 110  # in files and pipes


def show(rows: list[dict[str, Any]], title: str) -> None:
    """``rows`` as ``bench --json`` prints them, with their profiles if they have any."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    first = rows[0]
    threads = f"{first['threads']} thread" + ("s" if first["threads"] > 1 else "")
    console.print(f"{title}: weights {first['dtype']}, keys and values {first['kv_dtype']}, {threads}")
    limits = ""
    if "gb_per_s_limit" in first:
        limits = f"limits: {first['gb_per_s_limit']:.1f} GB/s, {first['gflop_per_s_limit']:,.0f} GFLOP/s; "
    cached = sum(row["cached_tokens"] for row in rows)
    console.print(f"{limits}loaded in {first['load_s']:.2f} s; {cached} tokens from the prefix cache")
    console.print(_rates(rows))
    for row in rows:
        if "profile" in row:
            console.print(_profile(row))


def show_replay(row: dict[str, Any], title: str) -> None:
    """What ``bench --replay --json`` prints."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    threads = f"{row['threads']} thread" + ("s" if row["threads"] > 1 else "")
    console.print(f"{title}: weights {row['dtype']}, keys and values {row['kv_dtype']}, {threads}")
    console.print(
        f"{row['file']}: {row['prompt_tokens']} prompt tokens, {row['new_tokens']} new ones", soft_wrap=True
    )
    table = _table()
    table.add_column("speculation")
    for name in ("tokens/s", "min", "max"):
        table.add_column(name, justify="right")
    rates = ("tok_per_s_median", "min", "max")
    for name, keys in (("none", [f"plain_{key}" for key in rates]), (row["method"], rates)):
        table.add_row(name, *(f"{row[key]:,.1f}" for key in keys))
    table.add_row("ratio", *(f"{row[f'ratio_{key}']:.2f}" for key in ("median", "min", "max")))
    console.print(table)
    share = "" if row["acceptance_rate"] is None else f", {row['acceptance_rate']:.1%} of them right"
    drafts, tokens = row["mean_draft_length"], row["tokens_per_step"]
    console.print(f"{drafts:.2f} drafts a step{share}; {tokens:.2f} tokens a step")


def _table(title: str | None = None) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )


def _rates(rows: list[dict[str, Any]]) -> Table:
    table = _table()
    table.add_column("workload")
    limited = "gb_per_s_limit" in rows[0]
    for name in ("tokens/s", "min", "max", *(("GB/s", "of limit", "GFLOP/s", "of limit") if limited else ())):
        table.add_column(name, justify="right")
    table.add_column("tokens/s: what is counted")
    for row in rows:
        table.add_row(
            row["workload"],
            f"{row['tok_per_s_median']:,.1f}",
            f"{row['min']:,.1f}",
            f"{row['max']:,.1f}",
            *(_of_limits(row) if limited else ()),
            RATES[row["rate"]],
        )
    return table


def _of_limits(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['gb_per_s']:.1f}",
        f"{row['gb_per_s'] / row['gb_per_s_limit']:.0%}",
        f"{row['gflop_per_s']:,.1f}",
        f"{row['gflop_per_s'] / row['gflop_per_s_limit']:.0%}",
    ]


def _profile(row: dict[str, Any]) -> Table:
    table = _table(f"{row['workload']}: where the time of one run goes")
    table.add_column("part")
    for name in ("calls", "ms", "share", "MB", "GFLOP", "GB/s", "GFLOP/s"):
        table.add_column(name, justify="right")
    table.add_column("limited by")
    table.add_column("of limit", justify="right")
    for part in row["profile"]:
        share = part["share_of_limit"]
        table.add_row(
            part["part"],
            str(part["calls"]),
            f"{part['ms']:.2f}",
            f"{part['share']:.1%}",
            f"{part['bytes'] / 1e6:,.1f}",
            f"{part['operations'] / 1e9:,.2f}",
            f"{part['gb_per_s']:.1f}",
            f"{part['gflop_per_s']:,.1f}",
            part["limit"] or "",
            "" if share is None else f"{share:.0%}",
        )
    return table
