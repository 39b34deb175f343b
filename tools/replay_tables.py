#!/usr/bin/env python3
"""Speed of speculation on tables, logs and the like, made at random from a seed.

Each text is replayed as ``pyengine-cli bench --replay`` does it. Fields are as in such files: counters
count, clocks go on, measurements walk, names and states come from lists, some more often than others; the
last, "noise", has fields without any such order, each drawn from its whole range.

    tools/replay_tables.py --model path/to/gpt2 --dtype bfloat16 --threads 2
    tools/replay_tables.py --kinds sensors,log --seeds 1,2,3 --json
    tools/replay_tables.py --show sql
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine import LLM, PyEngineError  # noqa: E402
from pyengine.bench import replay  # noqa: E402

PEOPLE = "Alice Bruno Carla Deniz Emil Fatima Goran Hanna Ivan Julia Kofi Lena Marco Nadia Otto Priya".split()
FAMILIES = (
    "Adler Baker Costa Dubois Evans Fischer Garcia Hansen Ito Jansen Kim Lopez Meyer Novak Okafor".split()
)
CITIES = "Berlin,Lisbon,Oslo,Vienna,Prague,Dublin,Madrid,Athens,Warsaw,Helsinki".split(",")
GOODS = {
    "Wireless mouse": 24.9, "USB-C cable": 9.5, "Desk lamp": 39.0, "Notebook A5": 4.25, "Water bottle": 17.8,
    "Office chair": 189.0, "Monitor 27in": 249.0, "Keyboard": 64.5,
}  # fmt: skip


def sensors(rng: random.Random) -> str:
    """CSV: one reading of one of four sensors a minute."""
    lines, now = ["timestamp,sensor,temperature,humidity,status"], datetime(2024, 3, 5, 8, 0)
    values = {f"sensor-{n}": [rng.uniform(18, 24), rng.uniform(35, 60)] for n in range(1, 5)}
    for number in range(200):
        name = f"sensor-{number % 4 + 1}"
        values[name] = [values[name][0] + rng.gauss(0, 0.15), values[name][1] + rng.gauss(0, 0.4)]
        warmth, damp = values[name]
        state = rng.choices(["ok", "warn", "offline"], [95, 4, 1])[0]
        lines.append(f"{now:%Y-%m-%dT%H:%M:%S}Z,{name},{warmth:.2f},{damp:.1f},{state}")
        now += timedelta(minutes=1)
    return "\n".join(lines) + "\n"


def sales(rng: random.Random) -> str:
    """CSV: orders of a shop in the order of their days."""
    lines, day = ["order_id,date,customer,city,product,quantity,unit_price,total"], date(2024, 1, 2)
    customers = [(f"{rng.choice(PEOPLE)} {rng.choice(FAMILIES)}", rng.choice(CITIES)) for _ in range(25)]
    for number in range(10_230, 10_430):
        day += timedelta(days=rng.random() < 0.3)
        (customer, city), (product, price) = rng.choice(customers), rng.choice(list(GOODS.items()))
        count = rng.choices([1, 2, 3, 4, 10], [60, 20, 8, 4, 3])[0]
        lines.append(f"{number},{day},{customer},{city},{product},{count},{price:.2f},{price * count:.2f}")
    return "\n".join(lines) + "\n"


def markdown(rng: random.Random) -> str:
    """A Markdown table of experiments: settings that were combined, and what came out."""
    lines = ["| run | model | dataset | lr | batch | epochs | accuracy | f1 | minutes |"]
    lines.append("|---:|---|---|---:|---:|---:|---:|---:|---:|")
    number = 0
    for model in ("resnet18", "resnet50", "vit-small", "vit-base"):
        for dataset in ("cifar10", "cifar100", "imagenet-mini"):
            for rate in ("0.1", "0.03", "0.01"):
                for batch in (128, 256):
                    number += 1
                    score = rng.uniform(0.7, 0.95)
                    lines.append(
                        f"| {number} | {model} | {dataset} | {rate} | {batch} | 30 | {score:.3f} "
                        f"| {score - rng.uniform(0, 0.03):.3f} | {rng.randint(20, 95)} |"
                    )
    return "\n".join(lines) + "\n"


def log(rng: random.Random) -> str:
    """Lines of a server's log."""
    lines, now = [], datetime(2024, 6, 11, 9, 14, 2)
    for _ in range(200):
        now += timedelta(milliseconds=int(rng.expovariate(1 / 700)))
        stamp = f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d}"
        path = rng.choice(["/api/v1/users", "/api/v1/orders", "/api/v1/items", "/health"])
        kind = rng.choices(range(3), [80, 15, 5])[0]
        if kind == 0:
            address = f"10.0.{rng.randint(0, 3)}.{rng.randint(2, 250)}"
            status = rng.choices([200, 201, 404, 500], [85, 8, 5, 2])[0]
            took = max(1, int(rng.lognormvariate(2.7, 0.6)))
            lines.append(f'{stamp} INFO  [http] {address} "GET {path} HTTP/1.1" {status} {took} ms')
        elif kind == 1:
            lines.append(f"{stamp} DEBUG [db] query took {rng.randint(1, 40)} ms, {rng.randint(0, 99)} rows")
        else:
            lines.append(f"{stamp} WARN  [cache] miss for key user:{rng.randint(1000, 9999)}, loading")
    return "\n".join(lines) + "\n"


def jsonl(rng: random.Random) -> str:
    """JSON lines: events of users."""
    lines, now = [], 1_718_000_000
    for number in range(1, 200):
        now += rng.randint(1, 90)
        event = {
            "id": number,
            "ts": now,
            "user": {
                "id": rng.randint(1, 40),
                "country": rng.choices(["DE", "FR", "US", "JP"], [5, 2, 2, 1])[0],
            },
            "event": rng.choices(["page_view", "click", "purchase", "logout"], [6, 3, 1, 1])[0],
            "duration_ms": int(rng.lognormvariate(6, 0.8)),
            "ok": rng.random() < 0.97,
        }
        lines.append(json.dumps(event))
    return "\n".join(lines) + "\n"


def sql(rng: random.Random) -> str:
    """INSERT statements for employees."""
    lines, hired = [], date(2015, 1, 5)
    for number in range(1, 150):
        hired += timedelta(days=rng.randint(1, 20))
        person, family = rng.choice(PEOPLE), rng.choice(FAMILIES)
        job, pay = rng.choice([("Engineer", 62), ("Analyst", 51), ("Manager", 75), ("Designer", 55)])
        salary = (pay + rng.randint(0, 20)) * 1000
        lines.append(
            "INSERT INTO employees (id, name, email, job, city, hired, salary) VALUES "
            f"({number}, '{person} {family}', '{person.lower()}.{family.lower()}@example.com', '{job}', "
            f"'{rng.choice(CITIES)}', '{hired}', {salary});"
        )
    return "\n".join(lines) + "\n"


def listing(rng: random.Random) -> str:
    """What ``ls -l`` prints: columns of numbers, right-aligned."""
    lines, now = ["total 2048"], datetime(2024, 2, 3, 7, 0)
    for number in range(1, 180):
        now += timedelta(minutes=rng.randint(1, 600))
        size = int(rng.lognormvariate(9, 1.5))
        name = rng.choice(["report", "image", "backup"])
        extension = {"report": "pdf", "image": "png", "backup": "tar.gz"}[name]
        lines.append(f"-rw-r--r-- 1 anna staff {size:>8} {now:%b %d %H:%M} {name}_{number:03d}.{extension}")
    return "\n".join(lines) + "\n"


def statement(rng: random.Random) -> str:
    """A bank statement as TSV, with a balance that follows."""
    lines, day, balance = ["date\tdescription\tamount\tbalance"], date(2023, 9, 1), 325_000
    for _ in range(200):
        day += timedelta(days=rng.choice([0, 0, 1, 1, 2]))
        what, low, high = rng.choice(
            [("Grocery store", 800, 9000), ("Train ticket", 290, 290), ("Coffee", 320, 480),
             ("Rent", 95_000, 95_000), ("Salary", -280_000, -280_000), ("Pharmacy", 500, 4000)]
        )  # fmt: skip
        amount = -rng.randint(low, high)
        balance += amount
        lines.append(f"{day}\t{what}\t{amount / 100:.2f}\t{balance / 100:.2f}")
    return "\n".join(lines) + "\n"


def noise(rng: random.Random) -> str:
    """CSV without any order: each field is drawn from its whole range."""
    lines = ["id,customer,amount,date"]
    for _ in range(250):
        day = date(2000, 1, 1) + timedelta(days=rng.randrange(9000))
        lines.append(f"{rng.randrange(100_000)},C{rng.randrange(10_000)},{rng.uniform(0, 1000):.2f},{day}")
    return "\n".join(lines) + "\n"


KINDS: dict[str, Callable[[random.Random], str]] = {
    one.__name__: one for one in (sensors, sales, markdown, log, jsonl, sql, listing, statement, noise)
}


def text_of(kind: str, seed: int) -> str:
    return KINDS[kind](random.Random(seed))


def measure(llm: LLM, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    found = replay.of_text(llm, text_of(kind, seed), args.prompt_tokens, args.new_tokens, kind)
    replay.measure(llm, found, args.repeats)
    return replay.as_row(found, llm, args.method, kind, 0.0) | {"seed": seed}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--method", choices=["ngram", "suffix"], default="ngram", help="default: %(default)s")
    parser.add_argument("--kinds", help=f"some of {','.join(KINDS)} (default: all)")
    parser.add_argument(
        "--seeds", default="1", help="of the texts, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines, with the keys of bench --replay"
    )
    parser.add_argument("--show", choices=list(KINDS), help="print the first text of a kind, and end")
    args = parser.parse_args()
    args.kinds = args.kinds.split(",") if args.kinds else list(KINDS)
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    return args


def main() -> None:
    args = parse()
    if args.show:
        print(text_of(args.show, args.seeds[0]), end="")
        return
    llm = LLM(
        args.model,
        dtype=args.dtype,
        num_threads=args.threads,
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config={"method": args.method},
    )
    if not args.json:
        print(f"{llm.path.name}, {llm.dtype}, {llm.num_threads} threads, {args.method}")
        print(f"{'text':<11}{'without':>9}{'ratio':>7}   least to most{'right':>9}{'drafts a step':>15}")
    for kind in args.kinds:
        for seed in args.seeds:
            row = measure(llm, kind, seed, args)
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            right = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.0%}"
            print(
                f"{kind:<11}{row['plain_tok_per_s_median']:>9.1f}{row['ratio_median']:>7.2f}"
                f"   {row['ratio_min']:.2f} to {row['ratio_max']:.2f}{right:>11}"
                f"{row['mean_draft_length']:>15.1f}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except PyEngineError as error:
        sys.exit(f"replay_tables: {error}")
