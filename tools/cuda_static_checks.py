"""Compiles the CUDA kernels and checks what the compiler made of them against what their comments promise.

    python tools/cuda_static_checks.py                       for sm_80 and sm_90
    python tools/cuda_static_checks.py 75 86 89 100 120      for others

Each kernel has a budget in csrc/cuda, the longest pattern that matches its name:

    // Budget of gemm_f32_kernel: 256 threads, 80 registers, 8704 bytes shared; LDG.128 LDS.128
    // Budget of gemm_f32_kernel on 75: 256 threads, 96 registers, 8704 bytes shared

Registers and static shared memory must stay within it, nothing may be spilled, and each instruction named
after the semicolon must occur, with all parts of its name. Below 8.0 there are neither asynchronous copies
(LDGSTS) nor bfloat16 products. Needs nvcc, and cuobjdump with nvdisasm (PyPI: nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BUDGET = re.compile(
    r"// Budget of (?P<pattern>\w+(?:<.*>)?)(?: on (?P<on>\d+))?: "
    r"(?P<threads>\d+) threads, (?P<registers>\d+) registers"
    r"(?:, (?P<shared>\d+) bytes shared)?(?:; (?P<instructions>.+))?$",
    re.MULTILINE,
)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_FUNCTION = re.compile(r"^\s*Function : (\w+)", re.MULTILINE)
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
# Threads of a multiprocessor that are not 2048: CUDA C++ Programming Guide, "Technical Specifications".
_THREADS_OF = {75: 1024, 86: 1536, 89: 1536, 120: 1536}
_REGISTERS_OF_MULTIPROCESSOR = 65536


@dataclass(frozen=True)
class Budget:
    pattern: str
    architecture: int | None  # None: all that have no budget of their own
    threads: int
    registers: int
    shared: int
    instructions: tuple[str, ...]


@dataclass
class Kernel:
    name: str
    architecture: int
    registers: int = 0
    shared: int = 0  # bytes, those known at compile time
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, instruction: str) -> int:
        """Instructions that have all parts of this name: LDG.128 counts LDG.E.128."""
        parts = set(instruction.split("."))
        return sum(n for opcode, n in self.opcodes.items() if parts <= set(opcode.split(".")))

    def warps(self, threads: int) -> int:
        """Warps of a multiprocessor whose registers suffice for blocks of so many threads."""
        block = -(-self.registers // 8) * 8 * threads
        blocks = min(
            _REGISTERS_OF_MULTIPROCESSOR // block, _THREADS_OF.get(self.architecture, 2048) // threads
        )
        return blocks * threads // 32


def read_budgets(source: str) -> list[Budget]:
    found = [
        Budget(
            match["pattern"],
            int(match["on"]) if match["on"] else None,
            int(match["threads"]),
            int(match["registers"]),
            int(match["shared"] or 0),
            tuple((match["instructions"] or "").split()),
        )
        for match in _BUDGET.finditer(source)
    ]
    if len(found) != source.count("// Budget of "):
        raise ValueError("a budget is not written as the others are: see tools/cuda_static_checks.py")
    return found


def short_name(demangled: str) -> str:
    """``gemv_kernel<__half, 8>`` of a demangled signature."""
    name = re.sub(r"\(anonymous namespace\)::|pyengine::cuda::|^void ", "", demangled)
    return name.split("(")[0].strip()


def read_compiler_report(text: str, names: dict[str, str]) -> dict[str, Kernel]:
    """Kernels by mangled name, of what ``ptxas -v`` says. ``names``: mangled -> short."""
    kernels: dict[str, Kernel] = {}
    pieces = _ENTRY.split(text)[1:]
    for mangled, architecture, said in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        spills, used = _SPILLS.search(said), _USED.search(said)
        if spills is None or used is None:
            raise ValueError(f"ptxas says nothing of the registers of {mangled}")
        shared = _SHARED.search(said)
        kernels[mangled] = Kernel(
            names.get(mangled, mangled),
            int(architecture),
            registers=int(used[1]),
            shared=int(shared[1]) if shared else 0,
            stack=int(spills[1]),
            spills=int(spills[2]) + int(spills[3]),
        )
    return kernels


def read_instructions(sass: str, kernels: dict[str, Kernel]) -> None:
    """Adds the instructions that ``cuobjdump -sass`` lists."""
    pieces = _FUNCTION.split(sass)[1:]
    for mangled, body in zip(pieces[::2], pieces[1::2], strict=True):
        if mangled in kernels:
            kernels[mangled].opcodes.update(_OPCODE.findall(body))


def budget_of(kernel: Kernel, budgets: Iterable[Budget]) -> Budget | None:
    fits = [
        b
        for b in budgets
        if fnmatch.fnmatchcase(kernel.name, b.pattern) and b.architecture in (None, kernel.architecture)
    ]
    return max(fits, key=lambda b: (len(b.pattern), b.architecture is not None), default=None)


def faults(kernel: Kernel, budget: Budget | None) -> list[str]:
    """What is wrong with a kernel, in words."""
    where = f"{kernel.name} (sm_{kernel.architecture})"
    if budget is None:
        return [f"{where} has no budget: add one to its comment"]
    found = []
    if kernel.spills or kernel.stack:
        found.append(
            f"{where} spills: {kernel.stack} bytes of stack, {kernel.spills} bytes stored and loaded"
        )
    if kernel.registers > budget.registers:
        found.append(f"{where} takes {kernel.registers} registers, but its budget is {budget.registers}")
    if kernel.shared > budget.shared:
        found.append(
            f"{where} takes {kernel.shared} bytes of shared memory, but its budget is {budget.shared}"
        )
    for instruction in budget.instructions:
        if kernel.architecture < 80 and (instruction.startswith("LDGSTS") or "bfloat16" in kernel.name):
            continue
        if kernel.count(instruction) == 0:
            found.append(f"{where} has no {instruction}")
    return found


def find_tool(name: str, given: str | None) -> str:
    places: list[str | None] = [given] if given else [shutil.which(name)]
    places += map(str, Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    places.append(f"/usr/local/cuda/bin/{name}")
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    sys.exit(f"{name} was not found: install a CUDA toolkit, or PyPI's nvidia-cuda-{name}")


def compile_kernels(
    nvcc: str, cuobjdump: str, source: Path, architecture: int, directory: Path
) -> list[Kernel]:
    cubin = directory / f"{source.stem}.{architecture}.cubin"
    command = [nvcc, f"-arch=sm_{architecture}", "-cubin", "-std=c++17", "-O3", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode != 0:
        sys.exit(f"{source.name}, sm_{architecture}: {compiled.stderr}")
    mangled = _ENTRY.findall(compiled.stderr)
    if not mangled:
        return []
    text = "\n".join(name for name, _ in mangled)
    demangled = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    names = {m: short_name(d) for (m, _), d in zip(mangled, demangled.splitlines(), strict=True)}
    kernels = read_compiler_report(compiled.stderr, names)
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])  # it calls nvdisasm
    listed = subprocess.run(
        [cuobjdump, "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    if listed.returncode != 0:
        sys.exit(f"cuobjdump -sass {cubin.name}: {listed.stdout}{listed.stderr}")
    read_instructions(listed.stdout, kernels)
    return list(kernels.values())


def table(kernels: Iterable[Kernel], budgets: list[Budget]) -> str:
    """What each kernel takes, "of" what its budget allows; warps: of a multiprocessor, as registers allow."""
    rows = [("kernel", "sm", "registers", "shared", "spills", "warps", "HMMA", "128-bit loads")]
    for kernel in kernels:
        budget = budget_of(kernel, budgets)
        rows.append(
            (
                kernel.name,
                str(kernel.architecture),
                f"{kernel.registers} of {budget.registers if budget else '-'}",
                f"{kernel.shared} of {budget.shared if budget else '-'}",
                str(kernel.spills),
                str(kernel.warps(budget.threads)) if budget else "-",
                str(kernel.count("HMMA")),
                str(kernel.count("LDG.128") + kernel.count("LDGSTS.128")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="*", type=int, default=[80, 90], help="compute capabilities")
    parser.add_argument("--nvcc")
    parser.add_argument("--cuobjdump")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    nvcc, cuobjdump = find_tool("nvcc", arguments.nvcc), find_tool("cuobjdump", arguments.cuobjdump)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    budgets = read_budgets("".join(source.read_text(encoding="utf-8") for source in sources))
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as pool:
        work = [
            pool.submit(compile_kernels, nvcc, cuobjdump, source, architecture, Path(directory))
            for architecture in arguments.architectures
            for source in sources
        ]
        for done in work:
            kernels += done.result()
    kernels.sort(key=lambda kernel: (kernel.architecture, kernel.name))
    print(table(kernels, budgets))
    wrong = [fault for kernel in kernels for fault in faults(kernel, budget_of(kernel, budgets))]
    used = {budget for kernel in kernels if (budget := budget_of(kernel, budgets))}
    wrong += [
        f"no kernel has the budget of {b.pattern}"
        for b in budgets
        if b not in used and b.architecture in (None, *arguments.architectures)
    ]
    print(f"{len(kernels)} kernels on {', '.join(f'sm_{a}' for a in arguments.architectures)}", end="; ")
    print(f"{len(wrong)} faults" if wrong else "all within their budgets")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
