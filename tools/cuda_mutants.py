"""Plants faults in the CUDA kernels, one at a time, and sees that the tests on the simulator find each.

    python tools/cuda_mutants.py                  all of them, in a copy of the sources; about ten minutes
    python tools/cuda_mutants.py barrier wait     those whose names hold one of these words
    python tools/cuda_mutants.py --list

A fault is killed if one of the tests test_cuda_sim, _ops, _quantized, _sampling and _model fails, crashes or
does not end. Exit status 1 if one survives. Needs CMake, Ninja and a C++ compiler; no CUDA.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_cuda_sim", "test_cuda_ops", "test_cuda_quantized", "test_cuda_sampling", "test_cuda_model")
_TIMEOUT = 600  # seconds of one test program


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # below csrc/
    old: str  # occurs once in the file
    new: str
    sanitized: bool = False  # only AddressSanitizer sees it: what lies beyond a buffer is read, and not used


_DENSE, _ATTENTION, _ROWS = "cuda/dense.cu", "cuda/attention.cu", "cuda/elementwise.cu"
_DENSE_ROWS = "cuda/dense_rows.cu"
_QUANTIZED, _READING = "cuda/dense_quantized.cu", "cuda/quantized.cuh"
_SCAN, _CHOOSE = "cuda/sampling.cu", "cuda/choose.cu"
MUTANTS = (
    Mutant("gemm: no wait for asynchronous copies", _DENSE, "    copy_async_wait<kStages - 2>();\n", ""),
    Mutant(
        "gemm: waits for one group too few",
        _DENSE,
        "copy_async_wait<kStages - 2>",
        "copy_async_wait<kStages - 1>",
    ),
    Mutant(
        "gemm: no barrier before the tile is read",
        _DENSE,
        "    __syncthreads();  // the tile is there, and nobody reads the one that is overwritten next\n",
        "",
    ),
    Mutant("gemm: unmasked tail of k", _DENSE, " && k0 + at < k;", ";"),
    Mutant(
        "gemm: reads the next stage",
        _DENSE,
        "tiles + step % kStages * kStage;\n    const T* const ws",
        "tiles + (step + 1) % kStages * kStage;\n    const T* const ws",
    ),
    Mutant(
        "gemm: wrong lane for a row of the result",
        _DENSE,
        "staged[(lane / 4 + e / 2 * 8)",
        "staged[(lane % 4 + e / 2 * 8)",
    ),
    Mutant(
        "gemm: wrong lane for a fragment of the weights",
        _DENSE,
        "warp_column + j * 16 + lane / 16 * 8 + lane % 8",
        "warp_column + j * 16 + lane / 8 % 2 * 8 + lane % 8",
    ),
    Mutant(
        "gemm_f32: no barrier after loading",
        _DENSE,
        "    __syncthreads();\n#pragma unroll\n    for (int d = 0; d < kDepth",
        "#pragma unroll\n    for (int d = 0; d < kDepth",
    ),
    Mutant(
        "gemm_f32: no barrier before loading again",
        _DENSE,
        "    __syncthreads();\n    if ((k0 + kDepth)",
        "    if ((k0 + kDepth)",
    ),
    Mutant("gemm_f32: the last chain is lost", _DENSE, " || k0 + kDepth >= k)", ")"),
    Mutant(
        "dense_rows: a word of the weights in another's place",
        _DENSE_ROWS,
        "{upper.x, lower.x, upper.y, lower.y}",
        "{upper.x, lower.x, upper.z, lower.y}",
    ),
    Mutant(
        "dense_rows: unmasked tail of k", _DENSE_ROWS, "in_k = k0 + t * 8 < k;  // k", "in_k = true;  // k"
    ),
    Mutant(
        "dense_rows: weights of the next chunk, too early",
        _DENSE_ROWS,
        "fetch(weights[u], k0 + kAhead * kStep);",
        "fetch(weights[u], k0 + kStep);",
    ),
    Mutant(
        "dense_rows: no barrier before the warps' sums are added",
        _DENSE_ROWS,
        "  __syncthreads();\n  if (!has_column) return;",
        "  if (!has_column) return;",
    ),
    Mutant(
        "dense_rows: wrong lane for a row of the result",
        _DENSE_ROWS,
        "8 * j + 2 * t + e % 2",
        "8 * j + t + e % 2",
    ),
    Mutant("dense_rows: the last warp's sum is lost", _DENSE_ROWS, "v < kParts; ++v", "v < kParts - 1; ++v"),
    Mutant(
        "dense_rows: no barrier between the sums of two warps",
        _DENSE_ROWS,
        "    __syncthreads();\n    if (warp < kParts)",
        "    if (warp < kParts)",
    ),
    Mutant(
        "dense_rows: no barrier after the norm",
        _DENSE_ROWS,
        "    }\n    __syncthreads();\n  }\n  const T* rows_of_x",
        "    }\n  }\n  const T* rows_of_x",
    ),
    Mutant(
        "dense_rows: never waits for the kernel before",
        _DENSE_ROWS,
        "  start_after_previous();\n",
        "",
    ),
    Mutant(
        "dense: keys and values change places",
        "cuda/dense.cuh",
        "is_value ? cache.values : cache.keys",
        "is_value ? cache.keys : cache.values",
    ),
    Mutant(
        "cuBLASLt: the residual is overwritten",
        "cuda/blas.cu",
        "result.output == Output::add ? 1.0f : 0.0f",
        "0.0f",
    ),
    Mutant(
        "cuBLASLt: a bias of another type",
        "cuda/blas.cu",
        "result.output == Output::act ? layer.bias_act : layer.bias",
        "layer.bias",
    ),
    Mutant("gemv: every value twice", _DENSE, "i < k; i += 256)", "i < k; i += 128)"),
    Mutant("gemv: a row too far", _DENSE, "(r < m ? r : m - 1) * k", "(r < m ? r : m) * k", sanitized=True),
    Mutant("dense: the residual is overwritten", "cuda/dense.cuh", "[i] += y;", "[i] = y;"),
    Mutant(
        "few_quantized: every piece twice",
        _QUANTIZED,
        "begin += kAhead * kFewWarps",
        "begin += kFewWarps",
    ),
    Mutant(
        "few_quantized: the weights of the piece before",
        _QUANTIZED,
        "load_weights(slot, begin + (slot + kAhead) * kFewWarps)",
        "load_weights(slot, begin + slot * kFewWarps)",
    ),
    Mutant(
        "few_quantized: no barrier before the sums are added",
        _QUANTIZED,
        "    __syncthreads();\n    if (!is_there) return;",
        "    if (!is_there) return;",
    ),
    Mutant("few_quantized: unmasked tail of k", _QUANTIZED, "row < m && k < w.k", "row < m"),
    Mutant(
        "few_quantized: rows of the result exchanged",
        _QUANTIZED,
        "[8 * i + 2 * t + e % 2][g + e / 2 * 8]",
        "[8 * i + 2 * t + e / 2][g + e % 2 * 8]",
    ),
    Mutant("quantized_f32: unmasked tail of k", _QUANTIZED, "      if (k >= w.k) continue;\n", ""),
    Mutant(
        "quantized_f32: a lane's columns exchanged",
        _QUANTIZED,
        "[g + 8 * h] = total",
        "[g + 8 - 8 * h] = total",
    ),
    Mutant(
        "many_quantized: no wait for asynchronous copies",
        _QUANTIZED,
        "    copy_async_wait<kStages - 2>();\n",
        "",
    ),
    Mutant(
        "many_quantized: no barrier before the stage is read",
        _QUANTIZED,
        "    __syncthreads();  // the stage is there, and nobody reads the one that is overwritten next\n",
        "",
    ),
    Mutant(
        "many_quantized: no barrier before stages are overwritten with sums",
        _QUANTIZED,
        "  __syncthreads();  // nobody reads a stage any more\n",
        "",
    ),
    Mutant("many_quantized: unmasked tail of k", _QUANTIZED, "row * k_end, k < k_end)", "row * k_end, true)"),
    Mutant(
        "many_quantized: halves of odd rows are not exchanged",
        _QUANTIZED,
        "((4 * j + t) ^ swap)",
        "(4 * j + t)",
    ),
    Mutant(
        "many_quantized: sums are read before the warp has written them",
        _QUANTIZED,
        "    __syncwarp();\n    if (column >= n) continue;",
        "    if (column >= n) continue;",
    ),
    Mutant(
        "fragments: pairs of the wrong product",
        _QUANTIZED,
        "a[i / 2][i % 2 * 2 + h]",
        "a[i % 2][i / 2 * 2 + h]",
    ),
    Mutant("int8: bfloat16 has seven bits", _READING, "0x43804380u ^ (two & 0x00800080u)", "0x43004300u"),
    Mutant(
        "int4: the zero point of the other column", _READING, "groups_ >> (16 * j + 8)", "groups_ >> 16 * j"
    ),
    Mutant(
        "int4: the multiplier for the zero point",
        _READING,
        "small_float(group >> 4 & 15u)",
        "small_float(group & 15u)",
    ),
    Mutant(
        "arrange: nibbles as in the file",
        "cuda/quantized.cu",
        "k < 4 ? 8 * k : 8 * (k - 4) + 4",
        "4 * k",
    ),
    Mutant(
        "arrange: groups of the other half", "cuda/quantized.cu", "piece[g + 8]} << 8", "piece[g + 16]} << 8"
    ),
    Mutant(
        "embed_quantized: the other column", "cuda/quantized.cu", "column < 8 ? half", "column >= 8 ? half"
    ),
    Mutant(
        "dense: rows that are added to are overwritten",
        "cuda/dense.cuh",
        "sums[r] = to[r * n] + activate",
        "sums[r] = activate",
    ),
    Mutant(
        "attention: block table off by one",
        _ATTENTION,
        "table[token / kBlockTokens] *",
        "table[(token + 1) / kBlockTokens] *",
    ),
    Mutant(
        "attention: heads of another block",
        "cuda/types.h",
        "slot / kBlockTokens} * n_head + head)",
        "slot / kBlockTokens} + head * n_head)",
    ),
    Mutant(
        "decode: a key too many",
        _ATTENTION,
        "kDecodeSegment ? newest + 1 : kDecodeSegment",
        "kDecodeSegment ? newest + 2 : kDecodeSegment",
    ),
    Mutant(
        "decode: the token's own key and value are never read",
        _ATTENTION,
        "  read_both([&](int j) { return j == newest; });\n",
        "",
    ),
    Mutant(
        "decode: no barrier after the query",
        _ATTENTION,
        "* scale;\n  }\n  __syncthreads();\n",
        "* scale;\n  }\n",
    ),
    Mutant(
        "decode: no barrier before the groups are added",
        _ATTENTION,
        "  __syncthreads();\n  float* result = partial;",
        "  float* result = partial;",
    ),
    Mutant(
        "decode: the scale of the values is that of the keys",
        _ATTENTION,
        "scale_of<KV>(cache.value_scales, cache.row",
        "scale_of<KV>(cache.key_scales, cache.row",
    ),
    Mutant("merge: one segment too few", _ATTENTION, "/ kDecodeSegment + 1;", "/ kDecodeSegment;"),
    Mutant(
        "prefill_f32: no barrier before the tile is overwritten",
        _ATTENTION,
        "    __syncthreads();  // nobody reads the tile before any more\n",
        "",
    ),
    Mutant(
        "prefill_f32: weights are read before the warp has written them",
        _ATTENTION,
        "    __syncwarp();\n",
        "",
    ),
    Mutant(
        "prefill_f32: sees its future",
        _ATTENTION,
        "key0 + lane <= position[i]",
        "key0 + lane <= position[i] + 1",
    ),
    Mutant("prefill: sees not itself", _ATTENTION, "key <= position[r]", "key < position[r]"),
    Mutant("prefill: no wait for the values", _ATTENTION, "    copy_async_wait<1>();\n", ""),
    Mutant(
        "prefill: no barrier before the values are read",
        _ATTENTION,
        "    __syncthreads();  // values are there\n",
        "",
    ),
    Mutant(
        "prefill: no barrier before the keys are overwritten",
        _ATTENTION,
        "    __syncthreads();  // nobody reads these keys any more\n",
        "",
    ),
    Mutant(
        "prefill: unmasked tail of the keys",
        _ATTENTION,
        "const bool valid = key0 + j < num_keys;",
        "const bool valid = true;",
    ),
    Mutant(
        "prefill: rows of the sum are not shrunk",
        _ATTENTION,
        "sum[r] = sum[r] * shrink + part;",
        "sum[r] = sum[r] + part;",
    ),
    Mutant(
        "prefill: transposed values in the wrong lanes",
        _ATTENTION,
        "j * 16 + lane / 8 % 2 * 8 + lane % 8",
        "j * 16 + lane / 16 * 8 + lane % 8",
    ),
    Mutant(
        "prefill: scales of the tile of keys before",
        _ATTENTION,
        "*= key_scales[key0 / kTileKeys % 2][key]",
        "*= key_scales[0][key]",
    ),
    Mutant(
        "write_kv: the next slot",
        _ATTENTION,
        "slot = tokens.slots[t];",
        "slot = tokens.slots[t] ^ 1;",
    ),
    Mutant("write_kv: a channel of int8 in another's byte", _ATTENTION, "<< (i % 4 * 8);", "<< (i % 2 * 8);"),
    Mutant(
        "block_max: scratch is overwritten while it is read",
        "cuda/device.h",
        "best = fmaxf(best, scratch[i]);\n  __syncthreads();\n",
        "best = fmaxf(best, scratch[i]);\n",
    ),
    Mutant("layer_norm: eps is left out", "cuda/norm.cuh", "sqrtf(variance + norm.eps)", "sqrtf(variance)"),
    Mutant(
        "embed: the position of the block, not of the token",
        _ROWS,
        "int64_t{positions[t]} * channels",
        "t * channels",
    ),
    Mutant(
        "convert_weight: no barrier",
        _ROWS,
        "  __syncthreads();\n  for (int i = y; i < 32; i += 8) {\n    if (n0",
        "  for (int i = y; i < 32; i += 8) {\n    if (n0",
    ),
    Mutant(
        "copy_blocks: source and target swapped",
        _ROWS,
        "blocks + block_words * pairs[2 * blockIdx.x];\n  uint4* to",
        "blocks + block_words * pairs[2 * blockIdx.x + 1];\n  uint4* to",
    ),
    Mutant(
        "scan: no barrier between biases and penalties",
        _SCAN,
        "    tile[at] = x;\n  }\n  __syncthreads();\n",
        "    tile[at] = x;\n  }\n",
    ),
    Mutant("scan: the second bias of a token begins anew", _SCAN, "row_biases[e - 1].id == id)", "false)"),
    Mutant("scan: the mask of the next token", _SCAN, "[id / 32] >> id % 32", "[id / 32] >> (id + 1) % 32"),
    Mutant(
        "scan: the last logits of the row before",
        _SCAN,
        "return first + at >= 0 && first + at < vocab_size;",
        "return first + at < vocab_size;",
    ),
    Mutant(
        "sampling: outcomes are read before they are there",
        _SCAN,
        "  stream.wait();\n  std::memcpy(plan.outcomes",
        "  std::memcpy(plan.outcomes",
    ),
    Mutant("choose: carries are lost", _CHOOSE, "(measure >> 32) + carry;", "(measure >> 32);"),
    Mutant(
        "choose: no barrier before the histogram is read",
        _CHOOSE,
        "    __syncthreads();\n    auto measure_of",
        "    auto measure_of",
    ),
    Mutant("choose: equals of a nucleus are all kept", _CHOOSE, " || (x == tie && id > tie_id)", ""),
    Mutant(
        "choose: the farthest are typical", _CHOOSE, "key = -kept.distance(x);", "key = kept.distance(x);"
    ),
    Mutant(
        "choose: the last one is not listed", _CHOOSE, "(x == key && id > last)", "(x == key && id >= last)"
    ),
    Mutant(
        "choose: rows of Mirostat are drawn twice",
        _CHOOSE,
        "  if (uses_mirostat && plans[r].draft >= 0) return;\n",
        "",
    ),
    Mutant(
        "draw: a lane's own weights count as before it", _CHOOSE, "before + until - own;", "before + until;"
    ),
    Mutant("draw: the random number of the next position", _CHOOSE, "plan.position,", "plan.position + 1,"),
    Mutant(
        "choose: never waits for the kernel before",
        _CHOOSE,
        "  start_after_previous();\n",
        "",
    ),
    Mutant(
        "mma: wrong lane",
        "cuda/tensor_core.h",
        "const int row = g + (i % 2) * 8, k = 2 * t + (i / 2) * 8;",
        "const int row = g + (i / 2) * 8, k = 2 * t + (i % 2) * 8;",
    ),
    Mutant(
        "model: contexts of whole segments lose the last",
        "cuda/model.cu",
        "kDecodeSegment < longest)",
        "kDecodeSegment < longest - 1)",
    ),
    Mutant(
        "model: logits are read before they are there",
        "cuda/model.cu",
        "  stream_.download(host_logits_.data(), out, bytes);\n  stream_.wait();\n",
        "  stream_.download(host_logits_.data(), out, bytes);\n",
    ),
    Mutant(
        "model: a graph of fewer segments is run",
        "cuda/model.cu",
        "c.tokens == step.tokens.count && c.segments == step.plan.segments",
        "c.tokens == step.tokens.count",
    ),
)


class Tree:
    """A copy of the sources, built once; a mutant builds one file again."""

    def __init__(self, directory: Path, sanitize: str) -> None:
        self._source, self._build = directory / "source", directory / "build"
        self._source.mkdir(parents=True)
        shutil.copy2(ROOT / "CMakeLists.txt", self._source)
        shutil.copytree(ROOT / "csrc", self._source / "csrc")
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DPYENGINE_PYTHON=OFF", "-DPYENGINE_TESTS=ON"]
        options += [f"-DPYENGINE_SANITIZE={sanitize}"]
        self._run("cmake", "-S", str(self._source), "-B", str(self._build), "-G", "Ninja", *options)
        self._compile()

    @staticmethod
    def _run(*command: str) -> None:
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        done = subprocess.run(command, stdout=pipe, stderr=both, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}:\n{done.stdout}")

    def _compile(self) -> None:
        self._run("cmake", "--build", str(self._build), "--target", *TESTS)

    def killer(self, mutant: Mutant | None) -> str | None:
        """The first complaint of the tests; None: they passed."""
        original = ""
        if mutant is not None:
            path = self._source / "csrc" / mutant.file
            original = path.read_text(encoding="utf-8")
            path.write_text(mutated(original, mutant), encoding="utf-8")
        try:
            self._compile()
            return next(filter(None, map(self._complaint, TESTS)), None)
        finally:
            if mutant is not None:
                path.write_text(original, encoding="utf-8")

    def _complaint(self, test: str) -> str | None:
        environment = {**os.environ, "PYENGINE_TEST_FAIL_FAST": "1"}
        try:
            done = subprocess.run(
                [str(self._build / "tests" / test)],
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{test} does not end"
        if done.returncode == 0:
            return None
        lines = [line.strip() for line in done.stdout.splitlines()]
        failed = next((i for i, line in enumerate(lines) if line.startswith("FAIL")), None)
        if failed is None:
            return f"{test} ends with status {done.returncode}"
        return f"{test}, {lines[failed].split()[1]}: {' '.join(lines[failed + 1 :]).rpartition('/')[2]}"


def mutated(source: str, mutant: Mutant) -> str:
    if source.count(mutant.old) != 1:
        found = source.count(mutant.old)
        raise ValueError(f"{mutant.name}: {mutant.file} holds {found} times {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of these")
    parser.add_argument("--list", action="store_true", help="print their names")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.words or any(word in m.name for word in arguments.words)]
    if arguments.list:
        print("\n".join(mutant.name for mutant in chosen))
        return
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        for sanitize in ("", "address,undefined"):
            planted = [mutant for mutant in chosen if mutant.sanitized == bool(sanitize)]
            if not planted:
                continue
            tree = Tree(Path(directory) / (sanitize or "plain"), sanitize)
            complaint = tree.killer(None)
            if complaint is not None:
                sys.exit(f"the tests fail without a fault: {complaint}")
            for mutant in planted:
                start = time.monotonic()
                complaint = tree.killer(mutant)
                survivors += complaint is None
                outcome = "SURVIVES" if complaint is None else f"killed by {complaint[:110]}"
                print(f"{mutant.name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
