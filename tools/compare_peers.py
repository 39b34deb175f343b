#!/usr/bin/env python3
"""Compare pyengine with another engine, run by run in turn, and print the ratios with their spread.

Machines drift, so only neighbouring runs are comparable, and a pair during which other processes compute does
not count. The peer runs in an environment of its own, in a process that stays alive between runs, as pyengine
does here; a run of one follows a run of the other, and each pair gives a ratio. The peer's script is imported
there; it holds a function ``engine_NAME(dtype, model, threads)`` for each engine, which returns
``run(workload) -> (seconds to the first token, seconds in all)``, and ``rate(workload, ttft, total) -> tokens
per second``, for the workloads of ``pyengine-cli bench``.

    tools/compare_peers.py --peers-python peers-env/env/bin/python --peers-script peers.py \\
        --peer ov --peer-dtype f32 --peer-model peers-env/models/ov-fp32 \\
        --model path/to/gpt2 --dtype float32 --workload decode,prefill --pairs 7
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine import LLM, PyEngineError  # noqa: E402
from pyengine.bench import measure, workloads  # noqa: E402
from pyengine.bench.profile import context_of  # noqa: E402

# Runs in the peer's environment: a workload's name per line in, a JSON line out. The engine may print what it
# likes: its standard output is ours to take, so it gets standard error instead.
_SERVER = """
import importlib.util, json, os, sys
script, engine, dtype, model, threads = sys.argv[1:]
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
spec = importlib.util.spec_from_file_location("peers", script)
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)
run = getattr(peers, "engine_" + engine)(dtype, model, int(threads))
print(json.dumps({"ready": True}), file=answers)
for line in sys.stdin:
    workload = line.strip()
    print(json.dumps({"rate": peers.rate(workload, *run(workload))}), file=answers)
"""


class PeerError(Exception):
    """The peer's process ended, or never began."""


class Peer:
    """Another engine in a process of its own."""

    def __init__(self, python: str, script: str, engine: str, dtype: str, model: str, threads: int) -> None:
        self._name = f"{engine} {dtype}"
        arguments = [python, "-c", _SERVER, script, engine, dtype, model, str(threads)]
        try:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise PeerError(f"--peers-python {python}: {error.strerror}") from error
        self.pid = self._process.pid
        self._answer()

    def rate(self, workload: str) -> float:
        """Tokens per second of one run."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(workload + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return float(self._answer()["rate"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise PeerError(f"{self._name}: its process ended with status {status}; its own words are above")
        return json.loads(line)


class Bystanders:
    """How much of the processors other processes take, from /proc (Linux)."""

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self._last = self._read()

    def share(self) -> float | None:
        """Since the last call: 0 is none of the machine, 1 all of it."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return None
        passed, busy, own = (new - old for new, old in zip(self._last, before, strict=True))
        return max(0.0, busy - own) / passed if passed > 0 else 0.0

    def wait(self, share: float, patience: float) -> None:
        """Until they take no more than ``share`` for a second, or ``patience`` seconds are over."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            self.share()
            time.sleep(1.0)
            found = self.share()
            if found is None or found <= share:
                return

    def _read(self) -> tuple[int, int, int] | None:
        """Ticks of all processors that have passed, that were used, and that our processes used."""
        try:
            user, nice, system, idle, wait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
            own = 0
            for process in self._processes:
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        except (OSError, ValueError):
            return None
        used = user + nice + system + sum(rest)
        return used + idle + wait, used, own


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def compare(
    llm: LLM, peer: Peer, workload: workloads.Workload, pairs: int, max_others: float, patience: float
) -> dict[str, Any]:
    """Rates of ``pairs`` pairs of runs, after one run of each that does not count, and their ratios.

    A pair during which others took more than ``max_others`` of the machine is repeated, until as many have
    been in vain as were wanted. ``patience``: seconds to wait for them before each pair.
    """

    def own_rate() -> float:
        return workload.tokens_per_second(*measure.run(llm, workload))

    own_rate(), peer.rate(workload.name)
    own: list[float] = []
    other: list[float] = []
    others: list[float] = []
    bystanders = Bystanders(os.getpid(), peer.pid)
    discarded = 0
    while len(own) < pairs:
        bystanders.wait(max_others, patience)
        bystanders.share()
        if len(own) % 2 == 0:  # who goes first changes, so that a drift favours nobody
            a = own_rate()
            b = peer.rate(workload.name)
        else:
            b = peer.rate(workload.name)
            a = own_rate()
        share = bystanders.share()
        if share is not None and share > max_others and discarded < pairs:
            discarded += 1
            continue
        own.append(a)
        other.append(b)
        others.append(share or 0.0)
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {
        "workload": workload.name,
        "ratio": spread(ratios),
        "pyengine": spread(own),
        "peer": spread(other),
        "others": round(max(others), 3),
        "discarded": discarded,
        "pairs": [[round(a, 2), round(b, 2)] for a, b in zip(own, other, strict=True)],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peer = parser.add_argument_group("the peer")
    peer.add_argument("--peers-python", required=True, help="the Python of its environment")
    peer.add_argument("--peers-script", required=True, help="the script that holds engine_NAME and rate")
    peer.add_argument("--peer", required=True, metavar="NAME", help="the engine: ov, hf, ct2, llama ...")
    peer.add_argument("--peer-dtype", required=True, help="as the script calls it: f32, bf16, int8, int4 ...")
    peer.add_argument("--peer-model", required=True, help="what the engine loads")
    own = parser.add_argument_group("pyengine")
    own.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    own.add_argument("--dtype", default="auto")
    own.add_argument("--quantization", choices=["int8", "int4"])
    own.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--workload", default=",".join(workloads.NAMES), help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=7, help="counted runs of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of both (default %(default)s)")
    parser.add_argument(
        "--max-others",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="repeat a pair while other processes take more of the machine (default %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long before a pair for other processes to finish (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON line per workload, not a table")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: at least 1")
    if not Path(args.peers_script).is_file():
        parser.error(f"--peers-script {args.peers_script}: no such file")
    args.names = args.workload.split(",")
    for name in args.names:
        if name not in workloads.NAMES:
            parser.error(f"--workload {name}: there are {', '.join(workloads.NAMES)}")
    return args


def show(rows: list[dict[str, Any]]) -> None:
    def cell(values: dict[str, float], digits: int) -> str:
        low, high = f"{values['min']:,.{digits}f}", f"{values['max']:,.{digits}f}"
        return f"{values['median']:,.{digits}f} ({low}-{high})"

    first = rows[0]
    print(f"tokens/s of {len(first['pairs'])} pairs, {first['threads']} threads: median (least-most)")
    peer = f"{first['peer_engine']} {first['peer_dtype']}"
    own = f"pyengine {first['dtype']}, KV {first['kv_dtype']}"
    print(f"{'workload':<10}{own:>32}{peer:>32}{'ratio':>22}{'others':>9}")
    for row in rows:
        line = f"{row['workload']:<10}{cell(row['pyengine'], 1):>32}{cell(row['peer'], 1):>32}"
        print(line + f"{cell(row['ratio'], 2):>22}{row['others']:>9.0%}")


def main() -> None:
    args = parse()
    settings = {"dtype": args.dtype, "kv_cache_dtype": args.kv_cache_dtype, "num_threads": args.threads}
    llm = LLM(args.model, quantization=args.quantization, enable_prefix_caching=False, **settings)
    chosen = [workloads.named(name, llm.config.vocab_size) for name in args.names]
    for workload in chosen:
        measure.require_fits(llm, workload)
    peer = Peer(
        args.peers_python, args.peers_script, args.peer, args.peer_dtype, args.peer_model, args.threads
    )
    about = {
        "dtype": measure.weights_of(llm),
        "kv_dtype": measure.SHORT_NAMES.get(llm.kv_cache_dtype, llm.kv_cache_dtype),
        "isa": context_of(llm).isa,
        "peer_engine": args.peer,
        "peer_dtype": args.peer_dtype,
        "threads": llm.num_threads,
    }
    rows = []
    try:
        for workload in chosen:
            rows.append({**about, **compare(llm, peer, workload, args.pairs, args.max_others, args.patience)})
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
    finally:
        peer.close()
    if not args.json:
        show(rows)


if __name__ == "__main__":
    try:
        main()
    except (PeerError, PyEngineError) as error:
        sys.exit(f"compare_peers: {error}")
