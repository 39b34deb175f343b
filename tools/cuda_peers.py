#!/usr/bin/env python3
"""What ``tools/cuda_bench.py`` compares with, in processes of its own: PyTorch's kernels, ``transformers``.

    tools/cuda_peers.py checkpoint 124M DIRECTORY    a GPT-2 of that size with random weights, float16
    tools/cuda_peers.py kernels ROWS.jsonl           PyTorch's kernels at the shapes of kernels_bench's rows
    tools/cuda_peers.py workloads DIRECTORY          the workloads of pyengine-cli bench by ``generate``

Prints JSON lines. Kernels are timed as csrc/cuda/bench does it: a captured graph of many launches that take
turns over as many sets of operands as exceed the caches. ``generate`` runs in float16 with SDPA attention,
greedily, batches as they are; the requests of "mixed" are padded on the left to the longest prompt and all
run to the largest number of new tokens, of which only those asked for count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyengine.bench.workloads import Workload, named  # noqa: E402
from tools.cuda_tables import MODELS  # noqa: E402

_BEYOND_CACHES, _MOST_SETS = 512 << 20, 128  # bytes; as in csrc/cuda/bench

Launch = Callable[[], object]


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def make_checkpoint(size: str, directory: str, device: str) -> None:
    """Weights as ``transformers`` initialises them, and GPT-2's context and vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    channels, heads, layers = MODELS[size]
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(n_embd=channels, n_head=heads, n_layer=layers))
    model.half().save_pretrained(directory)


def operands(row: dict[str, Any], device: str) -> tuple[Launch, int] | None:
    """PyTorch's way to compute a row, on random operands, and their bytes; None where there is none."""
    dtype = getattr(torch, row["dtype"])

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * 0.05

    def made(launch: Launch, *tensors: torch.Tensor) -> tuple[Launch, int]:
        return launch, sum(t.numel() * t.element_size() for t in tensors)

    kernel = row["kernel"]
    if kernel == "dense" and row["by"] == "pyengine" and row["weights"] == row["dtype"]:
        x, w, b = random(row["rows"], row["k"]), random(row["n"], row["k"]), random(row["n"])
        bias = None if row["layer"] == "head" else b
        out_bytes = random(1).element_size() * row["rows"] * row["n"]
        launch, size = made(lambda: F.linear(x, w, bias), x, w)
        return launch, size + out_bytes
    if kernel in ("decode_attention", "prefill_attention"):
        fresh, context = row["fresh"], row["context"]
        if row["kv"] != row["dtype"] or 1 < fresh < context:
            return None
        heads = (row["sequences"], row["heads"])
        q = random(*heads, fresh, row["head_dim"])
        k, v = (random(*heads, context, row["head_dim"]) for _ in range(2))
        return made(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=fresh > 1), q, q, k, v)
    if kernel == "layer_norm":
        x, channels = random(row["rows"], row["channels"]), row["channels"]
        gain, bias = random(channels), random(channels)
        return made(lambda: F.layer_norm(x, (channels,), gain, bias, 1e-5), x, x)
    if kernel == "embed" and row["weights"] == row["dtype"]:
        wte, wpe = random(50257, row["channels"]), random(1024, row["channels"])
        ids = torch.randint(50257, (row["rows"],), device=device)
        positions = torch.arange(row["rows"], device=device) % 1024
        return made(lambda: F.embedding(ids, wte) + F.embedding(positions, wpe), wte, wpe)
    return None


def replay_us(launches: list[Launch]) -> float:
    """Median microseconds of a launch, many of which are replayed as a graph."""
    cuda: Any = torch.cuda  # of whose classes not all are typed
    stream = cuda.Stream()
    start, stop = (cuda.Event(enable_timing=True) for _ in range(2))

    def microseconds(work: Launch) -> float:
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    with cuda.stream(stream):
        launches[0]()  # libraries load before the capture
        stream.synchronize()
    once = microseconds(launches[-1])
    count = min(int(min(max(10e3 / once, 1), 128)), max(len(launches), 64))
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=stream):
        for i in range(count):
            launches[i % len(launches)]()
    microseconds(graph.replay)
    first = microseconds(graph.replay)
    repeats = int(min(max(20e3 / max(first, 1.0), 5), 30))
    return statistics.median(microseconds(graph.replay) for _ in range(repeats)) / count


def time_row(row: dict[str, Any]) -> float | None:
    launches: list[Launch] = []
    used = 0
    while used < _BEYOND_CACHES and len(launches) < _MOST_SETS:
        made = operands(row, "cuda")
        if made is None:
            return None
        launches.append(made[0])
        used += made[1]
    return replay_us(launches)


def peak_flops(dtype: torch.dtype) -> float:
    """Of a product of matrices of 8192 x 8192, by cuBLAS; float32 without TF32."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / (replay_us([lambda: a @ b]) * 1e-6)


def time_kernels(file: str) -> None:
    with torch.inference_mode():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            show({"kernel": "matmul", "dtype": name, "flops_per_s": round(peak_flops(dtype))})
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            us = time_row(row) if "dtype" in row else None
            if us is not None:
                show({**row, "us": round(us, 3), "engine": "torch"})


class Generator:
    """``transformers`` on a checkpoint; ``run``: seconds to the first token, and of the whole workload."""

    def __init__(self, directory: str, device: str, static_cache: bool = False) -> None:
        from transformers import GPT2LMHeadModel

        self._device = device
        model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float16, attn_implementation="sdpa")
        self._model = model.to(device).eval()
        self._model.generation_config.eos_token_id = None  # no request ends early, and nothing looks for it
        self._model.generation_config.pad_token_id = 0
        self._more = {"cache_implementation": "static"} if static_cache else {}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds of one call; tokens are copied to the host, as those of pyengine are."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        self._synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **self._more
            )
        assert out.cpu().shape == (len(prompts), longest + new_tokens)
        self._synchronize()
        return time.perf_counter() - start

    def run(self, workload: Workload) -> tuple[float, float]:
        first = 0.0 if workload.rate == "total" else self.generate(workload.prompts, 1)
        if workload.rate == "prefill":
            return first, first
        return first, self.generate(workload.prompts, max(workload.new_tokens))

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def time_workloads(directory: str, names: list[str], repeats: int, device: str, static_cache: bool) -> None:
    generator = Generator(directory, device, static_cache)
    for name in names:
        workload = named(name, generator._model.config.vocab_size)
        generator.run(workload)
        rates = [workload.tokens_per_second(*generator.run(workload)) for _ in range(repeats)]
        row: dict[str, Any] = {"engine": "transformers", "dtype": "f16", "workload": name}
        row |= {"tok_per_s_median": round(statistics.median(rates), 1)}
        show(row | {"min": round(min(rates), 1), "max": round(max(rates), 1), "device": device})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint")
    checkpoint.add_argument("size", choices=list(MODELS))
    checkpoint.add_argument("directory")
    kernels = commands.add_parser("kernels")
    kernels.add_argument("rows")
    workloads = commands.add_parser("workloads")
    workloads.add_argument("directory")
    workloads.add_argument("--workload", default="decode,prefill,batch,mixed")
    workloads.add_argument("--repeats", type=int, default=3)
    workloads.add_argument("--static-cache", action="store_true", help="compiled by torch.compile, too")
    for command in (checkpoint, workloads):
        command.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.command == "checkpoint":
        make_checkpoint(args.size, args.directory, args.device)
    elif args.command == "kernels":
        time_kernels(args.rows)
    else:
        names = args.workload.split(",")
        time_workloads(args.directory, names, args.repeats, args.device, args.static_cache)


if __name__ == "__main__":
    main()
