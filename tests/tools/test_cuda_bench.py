"""``tools/cuda_bench.py`` and its tables, without a GPU: what programs print is made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import cuda_bench, cuda_tables
from tools.cuda_tables import Limits, read_ncu, roofline_rate, tables

COPY = {"kernel": "copy", "us": 1000.0, "bytes": 2_000_000_000}  # 2 TB/s
MATMUL = {"kernel": "matmul", "dtype": "float16", "flops_per_s": 500e12}
DENSE = {"kernel": "dense", "model": "124M", "layer": "c_attn", "by": "pyengine", "rows": 1} | {
    "k": 768,
    "n": 2304,
    "weights": "float16",
    "dtype": "float16",
    "us": 4.0,
    "us_min": 3.9,
    "sets": 48,
    "bytes": 4_000_000,
    "flops": 4e6,
}
DECODE = {"kernel": "decode_attention", "model": "124M", "kv": "int8", "sequences": 8, "context": 512} | {
    "fresh": 1,
    "heads": 12,
    "head_dim": 64,
    "dtype": "float16",
    "us": 10.0,
    "bytes": 8_000_000,
    "flops": 1e6,
}
NCU = (
    '==PROF== Connected to process 1\n"ID","Kernel Name","Block Size","Grid Size",'
    '"gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"sm__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"sm__warps_active.avg.pct_of_peak_sustained_active"\n'
    '"","","","","ns","%","%","%"\n'
    '"0","void pyengine::cuda::<unnamed>::gemv_kernel<__half, (int)1>(const T1 *)","(128, 1, 1)",'
    '"(192, 1, 1)","3,000","80.5","20.0","50.0"\n'
    '"1","void pyengine::cuda::<unnamed>::gemv_kernel<__half, (int)1>(const T1 *)","(128, 1, 1)",'
    '"(192, 1, 1)","5000","70.5","30.0","60.0"\n'
    '"2","copy_blocks_kernel","(128, 1, 1)","(576, 1, 1)","7000","60","30","60"\n'
)


def test_kernels_beside_the_roofline_and_torch() -> None:
    bfloat16 = {**DENSE, "dtype": "bfloat16", "weights": "bfloat16", "us": 5.0}
    many = {**DENSE, "by": "cuBLASLt", "rows": 512, "us": 20.0, "flops": 5e9}
    int8 = {**DENSE, "weights": "int8", "us": 2.0, "bytes": 2_000_000}
    torch = {**DENSE, "engine": "torch", "us": 6.0, "peak_mib": 3}
    title, dense, decode = tables([COPY, DENSE, many, int8, bfloat16, DECODE, torch, MATMUL], "float16")
    assert "copy 2,000 GB/s, float16 500 TFLOP/s" in title
    assert [line.split() for line in dense.splitlines()] == [
        ["dense,", "124M", "f16", "1", "rows", "512", "rows"],
        ["c_attn", "4.0", "50%", "1.50"],
        ["c_attn,", "cuBLASLt", "20.0", "50%", "-"],
        ["c_attn,", "int8", "2.0", "50%", "-"],
    ]
    assert "512 keys" in decode and "int8 KV, 8 sequences" in decode and "10.0 40% -" in decode
    assert sum("bf16" in table for table in tables([COPY, DENSE, bfloat16], "all")) == 1


def test_workloads_beside_transformers() -> None:
    def row(engine: str, workload: str, rate: float) -> dict:
        rates = {"tok_per_s_median": rate, "min": rate - 1, "max": rate + 1}
        return {"engine": engine, "model": "124M", "workload": workload, "peak_mib": 900} | rates

    rows = [COPY, MATMUL, row("pyengine", "decode", 3000), row("pyengine", "mixed", 9000)]
    (table,) = tables([*rows, row("transformers", "decode", 200)], "float16")
    _, decode, mixed = (line.split() for line in table.splitlines())
    assert decode[:6] == ["124M", "decode", "3,000", "(2,999-3,001)", "200", "(199-201)"]
    assert decode[6] == "15.00" and decode[8:] == ["900", "/", "900"]
    assert 7900 < float(decode[7].replace(",", "")) < 8100  # 247 MB of weights at 2 TB/s
    assert mixed == ["124M", "mixed", "9,000", "(8,999-9,001)", "900", "/", "-"]


def test_rooflines_of_workloads() -> None:
    limits = Limits(2e12, {"float16": 500e12})
    decode = roofline_rate("124M", "decode", limits)
    batch, prefill = roofline_rate("124M", "batch", limits), roofline_rate("124M", "prefill", limits)
    assert decode is not None and batch is not None and prefill is not None
    assert 16 < batch / decode < 32 < prefill / decode < 512
    # A step of 512 tokens is arithmetic: twice 85 M weights for each, and the scores.
    assert prefill == pytest.approx(500e12 / (2 * 85e6 + 4 * 768 * 12 * 257), rel=0.01)
    assert roofline_rate("124M", "mixed", limits) is None


def test_launches_of_ncu() -> None:
    gemv, copy = read_ncu(NCU)
    assert (gemv["ncu"], gemv["launches"], gemv["us"], gemv["dram"]) == (
        "gemv_kernel<__half, 1>",
        2,
        4,
        75.5,
    )
    assert (copy["ncu"], copy["us"], copy["warps"]) == ("copy_blocks_kernel", 7, 60)
    assert read_ncu("==PROF== nothing was profiled\n") == []
    (table,) = tables([{**gemv, "model": "124M"}], "float16")
    assert "124M gemv_kernel<__half, 1> (192, 1, 1)" in table


def test_engines_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model's checkpoint is made once; quantised runs are engines of their own, in order."""
    ran: list[str] = []

    class Fake:
        def ran(self, step: str, name: str, command: list[str], limit: float) -> bool:
            ran.append(name)
            return "1.5B" not in name

        def run(self, step: str, name: str, command: list[str], limit: float) -> list[dict]:
            ran.append(name)
            assert ("--quantization" in command) == ("int8" in name)
            return [{"engine": "?", "workload": "decode"}]

    monkeypatch.setattr(sys, "argv", ["cuda_bench.py", "--quantization", "int8"])
    rows = cuda_bench.workloads(Fake(), cuda_bench.parse())  # type: ignore[arg-type]
    assert ran == ["124M: checkpoint", "1.5B: checkpoint"] + [
        f"124M: {engine}" for engine in ("pyengine", "pyengine int8", "transformers")
    ]
    assert [row["engine"] for row in rows] == ["pyengine", "pyengine int8", "transformers"]
    assert {row["model"] for row in rows} == {"124M"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_programs_fail_and_take_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = cuda_bench.Session(tmp_path, 60)
    rows = session.run(
        "kernels", "one", python("print('warming up'); print('{\"us\": 1}'); print('{\"us')"), 60
    )
    assert [row["us"] for row in rows] == [1] and session.failed == []
    rows = session.run(
        "kernels", "two", python("print('{\"us\": 2}'); import sys; sys.exit('out of luck')"), 60
    )
    assert [row["us"] for row in rows] == [2]
    hangs = "import time; print('{\"us\": 3}', flush=True); time.sleep(600)"
    rows = session.run("kernels", "three", python(hangs), 2)
    session.run("tests", "four", ["/nowhere/test_gpu_ops"], 60)
    assert session.failed == ["two", "three", "four"]
    said = capsys.readouterr().out
    assert "exit 1" in said and "out of luck" in said and "over 2 s" in said and "not started" in said
    assert "warming up" in (tmp_path / "kernels.log").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"]["name"] for line in lines] == ["one", "two", "three", "four"]
    late = cuda_bench.Session(tmp_path / "late", 0)
    late.run("build", "five", python(""), 60)
    assert late.failed == ["five"] and "no time left" in capsys.readouterr().out


def test_tables_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [COPY, DENSE, {"outcome": {"step": "kernels"}}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["cuda_bench.py", "--show", str(tmp_path)])
    cuda_bench.main()
    assert "c_attn" in capsys.readouterr().out


def test_the_kernels_that_are_timed_are_those_of_the_tables() -> None:
    source = (cuda_bench.ROOT / "csrc/cuda/bench/kernels_bench.cpp").read_text()
    for kernel in cuda_tables._AXES:
        assert f'"{kernel}"' in source
