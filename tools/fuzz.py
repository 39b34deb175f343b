"""Fuzz the readers of checkpoint files, for as long as you like.

    python tools/fuzz.py --seconds 600
    python tools/fuzz.py --seconds 60 safetensors tokenizer_json

Inputs start from tests/hardening/corpus and are mutated (tests/hardening/fuzzing.py). Each target runs in a
process of its own, with its memory and the time of an input limited. What ends it, raises anything but a
PyEngineError, or takes too long is a finding: the input is written to the corpus, where the tests run it from
then on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hardening import fuzzing

_SECONDS_PER_INPUT = 10
_MEMORY = 3 << 30  # bytes of address space beyond what importing takes


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGESIZE") + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {_SECONDS_PER_INPUT} seconds")


def _fuzz(name: str, seed: int, seconds: float, directory: Path) -> None:
    """Mutates and runs until the time is over or something is found; the last input is in ``directory``."""
    runner = fuzzing.Runner(name, directory)
    seeds = fuzzing.seeds(name)
    runner(seeds[0])  # imports what the target needs
    faulthandler.register(signal.SIGUSR1)
    _limit_memory()
    signal.signal(signal.SIGALRM, _too_long)
    random, current = Random(seed), directory / "input"
    end, count, accepted = time.monotonic() + seconds, 0, 0
    pool = list(seeds)
    while time.monotonic() < end:
        data = fuzzing.mutate(random, random.choice(pool), seeds, runner.target.form)
        current.write_bytes(data)
        signal.alarm(_SECONDS_PER_INPUT)
        try:
            error = runner(data)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        finally:
            signal.alarm(0)
        count += 1
        if error is None:  # what is accepted is worth changing further
            accepted += 1
            pool.append(data)
            if len(pool) > 200:
                pool[random.randrange(len(seeds), len(pool))] = pool.pop()
    print(f"{name}: {count} inputs, {accepted} accepted", flush=True)
    os._exit(0)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(fuzzing.TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together [60]")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFFFF)
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(fuzzing.TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    names = arguments.targets or list(fuzzing.TARGETS)
    print(f"seed {arguments.seed}")
    processes = multiprocessing.get_context("fork")
    found = 0
    for name in names:
        directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
        share = arguments.seconds / len(names)
        worker = processes.Process(target=_fuzz, args=(name, arguments.seed, share, directory))
        worker.start()
        worker.join(share + 3 * _SECONDS_PER_INPUT)
        if worker.is_alive():  # stuck where no Python runs
            worker.kill()
            worker.join()
        if worker.exitcode != 0:
            data = (directory / "input").read_bytes()
            kept = fuzzing.CORPUS / name / hashlib.sha256(data).hexdigest()[:12]
            kept.write_bytes(data)
            found += 1
            print(f"{name}: FOUND (exit status {worker.exitcode}): {kept}", flush=True)
        shutil.rmtree(directory)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
