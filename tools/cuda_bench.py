#!/usr/bin/env python3
"""Everything about CUDA that needs a GPU, in one call: build, tests, time of every kernel, workloads.

    python tools/cuda_bench.py --out DIRECTORY                  all of it, in about four minutes
    python tools/cuda_bench.py --only build,kernels --out ...   some steps
    python tools/cuda_bench.py --show DIRECTORY --dtype float32     tables of an earlier run again

build      cmake --preset cuda-tests: extension, libpyengine_cuda.so, test programs, kernels_bench
tests      the C++ tests (test_gpu_...), and pytest tests/cuda, on the GPU
kernels    kernels_bench, and PyTorch's kernels at the same shapes
workloads  pyengine-cli bench, and ``generate`` of transformers with SDPA, in float16 on random checkpoints
ncu        (only if named) the kernels of decode steps under NVIDIA's profiler: time, DRAM, multiprocessors

A step that fails or takes too long does not stop the others. Writes results.jsonl and a log of each step to
--out, and prints a table per step; without PyTorch, its columns are empty. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import cuda_tables  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-tests"
STEPS = ("build", "tests", "kernels", "workloads")
_PEERS = str(ROOT / "tools" / "cuda_peers.py")

Row = dict[str, Any]


class Session:
    """Runs the programs of the steps one after the other, keeps what they say, and knows the time left."""

    def __init__(self, out: Path, seconds: float) -> None:
        self._out, self._end = out, time.monotonic() + seconds
        self._memory = DeviceMemory()
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("", encoding="utf-8")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # cmake, ninja
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PATH": path}

    def record(self, row: Row) -> None:
        with (self._out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def run(
        self, step: str, name: str, command: Sequence[str], limit: float, environment: Row | None = None
    ) -> list[Row]:
        """The JSON lines that a program printed; all it said goes to the step's log. A line of its outcome is
        printed, with the end of the log where it failed."""
        limit = min(limit, self._end - time.monotonic())
        start = time.monotonic()
        said, status = "", "no time left"
        if limit > 1:
            with self._memory.watched():
                said, status = self._wait(command, limit, self.environment | (environment or {}))
        outcome = {
            "step": step,
            "name": name,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
        }
        self.record({"outcome": outcome})
        with (self._out / f"{step}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{said}\n{name}: {status}\n\n")
        print(f"{step:<10}{name:<34}{status:<14}{outcome['seconds']:>6.1f} s", flush=True)
        if status != "ok":
            self.failed.append(name)
            print("\n".join("    " + line[-200:] for line in said.splitlines()[-25:]), flush=True)
        rows = json_lines(said)
        for row in rows:
            row["peak_mib"] = self._memory.peak_mib()
        return rows

    def ran(self, *arguments: Any) -> bool:
        """As ``run``: whether it succeeded."""
        failed = len(self.failed)
        self.run(*arguments)
        return len(self.failed) == failed

    @staticmethod
    def _wait(command: Sequence[str], limit: float, environment: Row) -> tuple[str, str]:
        try:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return str(error), "not started"
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return said, f"over {limit:.0f} s"
        return said, "ok" if process.returncode == 0 else f"exit {process.returncode}"


class DeviceMemory:
    """The largest use of GPU 0's memory while a program runs, by NVIDIA's management library, if there is
    one for Python (PyPI: nvidia-ml-py)."""

    def __init__(self) -> None:
        self._peak = self._before = 0
        self._used: Callable[[], int] | None = None
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            device = nvml.nvmlDeviceGetHandleByIndex(0)
            nvml.nvmlDeviceGetMemoryInfo(device)
            self._used = lambda: int(nvml.nvmlDeviceGetMemoryInfo(device).used)
        except Exception:  # no library, no driver, or a driver that does not tell
            pass

    def peak_mib(self) -> int | None:
        """Of the last program, above what was used before it."""
        return None if self._used is None else max(0, self._peak - self._before) >> 20

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        used = self._used
        if used is None:
            yield
            return
        over = threading.Event()
        self._peak = self._before = used()

        def poll() -> None:
            while not over.wait(0.1):
                self._peak = max(self._peak, used())

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def json_lines(text: str) -> list[Row]:
    rows = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # the program was ended while it wrote
    return rows


def gpu_program(session: Session, step: str, name: str, *arguments: str) -> list[Row]:
    """Runs one of build/cuda-tests/gpu, with PyPI's cuBLASLt, as pyengine/cuda.py has it, or the system's."""
    found = Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib/libcublasLt.so*")
    libraries = [*(str(file.parent) for file in found), "/usr/local/cuda/lib64"]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    return session.run(step, name, [str(BUILD / "gpu" / name), *arguments], 90, environment)


def build(session: Session, args: argparse.Namespace) -> list[Row]:
    configure = ["cmake", "--preset", "cuda-tests", f"-DPython_EXECUTABLE={sys.executable}"]
    if args.architectures:
        configure.append(f"-DPYENGINE_CUDA_ARCHITECTURES={args.architectures}")
    compile_all = ["cmake", "--build", "--preset", "cuda-tests"]
    if not session.ran("build", "configure", configure, 60):  # without Python's headers, say
        session.run("build", "configure without Python", [*configure, "-DPYENGINE_PYTHON=OFF"], 60)
        compile_all += ["--target", "pyengine_gpu_programs"]
    session.run("build", "compile", compile_all, 300)
    return []


def tests(session: Session, args: argparse.Namespace) -> list[Row]:
    built = sorted(path.name for path in (BUILD / "gpu").glob("test_gpu_*"))
    if not built:
        session.failed.append("C++ tests: not built")
    for name in built:
        gpu_program(session, "tests", name)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "--max-worker-restart", "2", "tests/cuda"]
    command += ["-p", "no:cacheprovider"]
    session.run("tests", "tests/cuda", command, 150, {"PYENGINE_TEST_GPU": "1"})
    return []


def kernels(session: Session, args: argparse.Namespace) -> list[Row]:
    chosen = ["--models", args.models, *(["--dtypes", args.dtypes] if args.dtypes else [])]
    rows = gpu_program(session, "kernels", "kernels_bench", *chosen)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        if rows and not args.alone:
            rows += session.run("kernels", "PyTorch", [sys.executable, _PEERS, "kernels", file.name], 90)
    return rows


def checkpoint(session: Session, step: str, model: str, directory: str) -> bool:
    make = [sys.executable, _PEERS, "checkpoint", model, directory]
    return session.ran(step, f"{model}: checkpoint", make, 60)


def workloads(session: Session, args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    common = ["--workload", args.workload, "--repeats", str(args.repeats)]
    python = [sys.executable]
    with tempfile.TemporaryDirectory() as directory:
        made = [
            (model, str(Path(directory) / model))
            for model in args.models.split(",")
            if checkpoint(session, "workloads", model, str(Path(directory) / model))
        ]

        def run(engine: str, command: list[str], limit: float) -> None:
            for model, path in made:
                found = session.run("workloads", f"{model}: {engine}", [*command, path], limit)
                rows.extend({**row, "model": model, "engine": engine} for row in found)

        own = [*python, "-m", "pyengine", "bench", "--device", "cuda", "--json", *common, "--model"]
        run("pyengine", own, 90)
        for method in filter(None, args.quantization.split(",")):
            run(f"pyengine {method}", [*own[:-1], "--quantization", method, own[-1]], 90)
        if not args.alone:
            run("transformers", [*python, _PEERS, "workloads", *common], 150)
        if args.static_cache:
            run("transformers static", [*python, _PEERS, "workloads", "--static-cache", *common], 240)
    return rows


def ncu(session: Session, args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    metrics = ",".join(cuda_tables.NCU_METRICS)
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as directory:
            if not checkpoint(session, "ncu", model, directory):
                continue
            report = Path(directory) / "report.csv"
            command = ["ncu", "--clock-control", "none", "--metrics", metrics, "--csv", "--page", "raw"]
            command += ["--log-file", str(report), sys.executable, "-m", "pyengine", "generate"]
            command += ["--device", "cuda", "--model", directory, "--kv-cache-memory", "64MiB"]
            prompt = ",".join(map(str, range(16)))
            command += ["--ids", "--json", "--temperature", "0", "--max-tokens", "3", "--ignore-eos", prompt]
            session.run("ncu", model, command, 120)
            if report.is_file():
                found = cuda_tables.read_ncu(report.read_text(encoding="utf-8", errors="replace"))
                rows += [{**row, "model": model} for row in found]
    return rows


_RUN = {"build": build, "tests": tests, "kernels": kernels, "workloads": workloads, "ncu": ncu}


def show(rows: list[Row], args: argparse.Namespace) -> None:
    for table in cuda_tables.tables(rows, args.dtype):
        print("\n" + table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda_bench", metavar="DIRECTORY")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--models", default="124M,1.5B", help="default: %(default)s")
    parser.add_argument("--workload", default="decode,prefill,batch,mixed", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of each workload (default %(default)s)")
    parser.add_argument("--dtypes", help="of the kernels (default: all)")
    parser.add_argument("--dtype", default="float16", help="that tables show (default %(default)s), or all")
    parser.add_argument("--alone", action="store_true", help="without PyTorch's kernels and transformers")
    parser.add_argument(
        "--static-cache", action="store_true", help="also generate with a static cache, compiled"
    )
    parser.add_argument("--quantization", default="", help="also pyengine so, e.g. int8,int4")
    parser.add_argument("--architectures", help="to build for, e.g. 90 (default: this machine's)")
    parser.add_argument("--seconds", type=float, default=540, help="for all steps (default %(default)s)")
    parser.add_argument("--show", type=Path, metavar="DIRECTORY", help="only print an earlier run's tables")
    args = parser.parse_args()
    args.steps = args.only.split(",")
    for step in args.steps:
        if step not in _RUN:
            parser.error(f"--only {step}: there are {', '.join(_RUN)}")
    return args


def main() -> None:
    args = parse()
    if args.show is not None:
        show(json_lines((args.show / "results.jsonl").read_text(encoding="utf-8")), args)
        return
    session = Session(args.out, args.seconds)
    rows: list[Row] = []
    for step in args.steps:
        try:
            found = _RUN[step](session, args)
        except Exception as error:  # the next step may fare better
            print(f"{step}: {error!r}", flush=True)
            session.failed.append(step)
            continue
        for row in found:
            session.record(row)
            rows.append(row)
    show(rows, args)
    if session.failed:
        sys.exit(f"failed: {', '.join(session.failed)}")


if __name__ == "__main__":
    main()
