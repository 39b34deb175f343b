"""The static checks of the CUDA kernels, on what nvcc 13 and cuobjdump print."""

from __future__ import annotations

import pytest

from tools.cuda_static_checks import (
    ROOT,
    budget_of,
    faults,
    read_budgets,
    read_compiler_report,
    read_instructions,
    short_name,
    table,
)

PTXAS = """
ptxas info    : Compiling entry function '_Z1aIfLi8EEv' for 'sm_80'
ptxas info    : Function properties for _Z1aIfLi8EEv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 6160 bytes smem, 416 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_75'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 33 registers, used 0 barriers, 416 bytes cmem[0]
"""
SASS = """
\t\tFunction : _Z1aIfLi8EEv
        /*0000*/                   LDG.E.128 R4, [R2.64] ;   /* 0x0000000402047981 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0020*/              @UP1 HMMA.16816.F32 R4, R8, R10, R4 ;
        /*12340*/                  LDG.E R4, [R2.64] ;
\t\tFunction : _Z1bv
        /*0000*/                   EXIT ;
"""
SOURCE = """
// Budget of a<*>: 128 threads, 60 registers, 6160 bytes shared; HMMA LDG.128 STG.128
// Budget of a<*, 8>: 128 threads, 64 registers, 6160 bytes shared; HMMA LDG.128 LDGSTS.128
// Budget of b: 64 threads, 16 registers
// Budget of b on 75: 64 threads, 32 registers; LDGSTS.128 HMMA
// Budget of b on 80: 64 threads, 8 registers
"""


def test_faults_are_found() -> None:
    kernels = read_compiler_report(PTXAS, {"_Z1aIfLi8EEv": "a<float, 8>", "_Z1bv": "b"})
    read_instructions(SASS, kernels)
    a, b = kernels["_Z1aIfLi8EEv"], kernels["_Z1bv"]
    assert (a.registers, a.shared, a.stack, a.spills, a.architecture) == (64, 6160, 8, 28, 80)
    assert (a.count("LDG.128"), a.count("LDG"), a.count("LDGSTS.128"), a.count("HMMA")) == (1, 2, 1, 1)
    budgets = read_budgets(SOURCE)
    assert faults(a, budget_of(a, budgets)) == [
        "a<float, 8> (sm_80) spills: 8 bytes of stack, 28 bytes stored and loaded"
    ]
    found = faults(a, budgets[0])
    assert [text.split(") ")[1].split(",")[0] for text in found[1:]] == [
        "takes 64 registers",
        "has no STG.128",
    ]
    # 7.5 has no asynchronous copies.
    assert faults(b, budget_of(b, budgets)) == [
        "b (sm_75) takes 33 registers, but its budget is 32",
        "b (sm_75) has no HMMA",
    ]
    assert faults(a, None) == ["a<float, 8> (sm_80) has no budget: add one to its comment"]
    assert "64 of 64" in table([a, b], budgets)


def test_occupancy() -> None:
    kernels = read_compiler_report(PTXAS, {})
    assert kernels["_Z1aIfLi8EEv"].warps(128) == 32  # 8 blocks of 128 x 64 registers
    assert kernels["_Z1bv"].warps(256) == 32  # 33 count as 40; no more than 1,024 threads on 7.5


def test_names_are_those_of_the_source() -> None:
    text = "void pyengine::cuda::(anonymous namespace)::gemv_kernel<__half, 8>(__half const*, int)"
    assert short_name(text) == "gemv_kernel<__half, 8>"


def test_every_kernel_has_a_budget_that_can_be_read() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert source.count("__global__") <= len(read_budgets(source))
    with pytest.raises(ValueError, match="not written as the others"):
        read_budgets(source + "\n// Budget of x: 3 registers\n")
