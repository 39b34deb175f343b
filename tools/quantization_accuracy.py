"""What quantising costs in accuracy: perplexity and divergence from float32 on texts.

    python tools/quantization_accuracy.py TEXT... [--model DIR] [--tokens N] [--outliers]

Per text, N tokens [all] are cut into windows of the model's context that start afresh. For int8 and int4
weights and each type of KV cache the table has the change of the perplexity of all texts together, and the
mean Kullback-Leibler divergence of the next token's distribution from that of float32 weights, in nats.
--outliers first makes 4 random channels of each layer norm in a layer 32 times as large, and the rows that
read them 32 times as small: the same function in float32.
"""

from __future__ import annotations

import argparse
import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.model.checkpoint import Checkpoint, load_checkpoint
from pyengine.model.quantize import quantize_weights
from pyengine.model.tokenizer import load_tokenizer

Weights = Mapping[str, tuple[Any, str, Sequence[int]]]
LogProbs = npt.NDArray[np.float32]

OUTLIERS = 4  # channels of each layer norm
OUTLIER_SCALE = np.float32(32)


class Accuracy(NamedTuple):
    perplexity: float
    divergence: float  # mean nats from the reference; 0 for itself


def windows(checkpoint: Checkpoint, texts: Sequence[str], tokens: int | None) -> list[list[int]]:
    """BOS and the tokens of each text, cut to the context; what does not fill a window is left out."""
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    if tokenizer is None:
        raise SystemExit(f"{checkpoint.path} has no tokenizer")
    size, bos = checkpoint.config.n_positions - 1, checkpoint.config.bos_token_id or 0
    result = []
    for text in texts:
        ids = tokenizer.encode(text)[:tokens]
        result += [[bos, *ids[i : i + size]] for i in range(0, len(ids) - size + 1, size)]
    return result


def with_outliers(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The same function in float32, with 4 channels of every layer's norms 32 times as large."""
    rng = np.random.default_rng(seed)
    tensors = dict(checkpoint.tensors)

    def scale(name: str, rows: npt.NDArray[np.int64], factor: np.float32) -> None:
        tensor = tensors[name]
        entry = (tensor.data, tensor.dtype, tensor.shape)
        buffer, _, shape = _C.to_float32(_C.ExecContext(1), entry)
        values = np.frombuffer(memoryview(buffer), np.float32).reshape(shape).copy()
        values[rows] *= factor
        data = memoryview(values.tobytes())
        tensors[name] = tensor._replace(dtype="float32", data=data)

    for i in range(checkpoint.config.n_layer):
        for norm, dense in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            rows = rng.choice(checkpoint.config.n_embd, OUTLIERS, replace=False)
            scale(f"h.{i}.{norm}.weight", rows, OUTLIER_SCALE)
            scale(f"h.{i}.{norm}.bias", rows, OUTLIER_SCALE)
            scale(f"h.{i}.{dense}.weight", rows, 1 / OUTLIER_SCALE)
    return Checkpoint(**{**checkpoint.__dict__, "tensors": tensors})


def log_probs(
    context: _C.ExecContext,
    checkpoint: Checkpoint,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    kv_dtype: str,
) -> Iterator[LogProbs]:
    """Log-probabilities (T - 1, V) of every next token of each sequence."""
    config = checkpoint.config
    model = _C.Model(context, config.kernel_config(), weights, "float32")
    blocks = -(-config.n_positions // _C.BLOCK_TOKENS)
    kv = _C.KVCache(config.n_layer, config.n_head, config.head_dim, blocks, kv_dtype)
    table = array("i", range(blocks))
    for ids in sequences:
        n = len(ids)
        batch = _C.Batch(array("i", ids), array("i", range(n)), array("i", [0, n]), array("i", [n]), table)
        logits = model.forward(kv, batch)[:-1]
        logits -= logits.max(1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(1, keepdims=True))


def accuracy(
    context: _C.ExecContext,
    checkpoint: Checkpoint,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    kv_dtype: str = "float32",
) -> Accuracy:
    """Of ``weights`` against the float32 weights and KV cache of ``checkpoint``."""
    reference = log_probs(context, checkpoint, checkpoint.weights(), sequences, "float32")
    loss = divergence = 0.0
    count = 0
    ours = log_probs(context, checkpoint, weights, sequences, kv_dtype)
    for ids, p, q in zip(sequences, reference, ours, strict=True):
        loss -= float(q[np.arange(len(q)), ids[1:]].sum(dtype=np.float64))
        divergence += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        count += len(q)
    return Accuracy(math.exp(loss / count), divergence / count)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--model", help="checkpoint [the bundled model]")
    parser.add_argument("--tokens", type=int, help="tokens of each text [all]")
    parser.add_argument("--outliers", action="store_true")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.model)
    if args.outliers:
        checkpoint = with_outliers(checkpoint)
    texts = [path.read_text(encoding="utf-8") for path in args.texts]
    sequences = windows(checkpoint, texts, args.tokens)
    if not sequences:
        raise SystemExit(f"the texts are shorter than the context, {checkpoint.config.n_positions} tokens")
    context = _C.ExecContext()
    exact = accuracy(context, checkpoint, checkpoint.weights(), sequences)
    scored = sum(len(ids) - 1 for ids in sequences)
    print(f"float32 weights and KV: perplexity {exact.perplexity:.3f} over {scored} tokens")
    print("| weights | KV | perplexity | KL, nats |\n|---|---|---|---|")
    for method in ("int8", "int4"):
        weights = quantize_weights(context, checkpoint, method)
        for kv_dtype in ("float32", "bfloat16", "int8"):
            found = accuracy(context, checkpoint, weights, sequences, kv_dtype)
            change = 100 * (found.perplexity / exact.perplexity - 1)
            print(f"| {method} | {kv_dtype} | {change:+.3f} % | {found.divergence:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
