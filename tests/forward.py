"""Driving ``_C.Model.forward`` without the engine: any ragged batches, any chunks, any threads."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.model.checkpoint import load_checkpoint
from pyengine.model.config import GPT2Config
from pyengine.model.quantization import METHODS
from pyengine.model.quantize import quantize_weights

Step = Sequence[tuple[int, int]]  # (sequence, new tokens of it), in the order of the batch


class Runner:
    """A model on its own threads, and forward passes over lists of sequences. dtype: also "int8", "int4"."""

    def __init__(
        self,
        directory: Path,
        dtype: str = "float32",
        threads: int = 1,
        isa: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        checkpoint = load_checkpoint(directory)
        self.config: GPT2Config = checkpoint.config
        self.kv_dtype = kv_dtype or ("float32" if dtype in METHODS else dtype)
        self.context = _C.ExecContext(threads, isa)
        weights: Mapping[str, tuple[Any, str, Sequence[int]]] = checkpoint.weights()
        if dtype in METHODS:
            weights, dtype = quantize_weights(self.context, checkpoint, dtype), "float32"
        self.model = _C.Model(self.context, self.config.kernel_config(), weights, dtype)

    def kv_cache(self, num_blocks: int) -> _C.KVCache:
        config = self.config
        return _C.KVCache(config.n_layer, config.n_head, config.head_dim, num_blocks, self.kv_dtype)

    def logits(
        self, sequences: Sequence[Sequence[int]], steps: Sequence[Step] | None = None, seed: int = 0
    ) -> list[npt.NDArray[np.float32]]:
        """Logits (T_i, V) of each sequence, run as ``steps`` say; without them all whole, in one batch.

        The physical blocks of the sequences are shuffled among each other (``seed``), and one is left free.
        """
        steps = steps or [[(i, len(sequence)) for i, sequence in enumerate(sequences)]]
        tables = block_tables([len(sequence) for sequence in sequences], seed)
        kv = self.kv_cache(sum(map(len, tables)) + 1)
        done = [0] * len(sequences)
        parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in sequences]
        for step in steps:
            chunks = [(i, done[i], done[i] + count) for i, count in step]
            logits = self.model.forward(kv, make_batch(sequences, tables, chunks))
            row = 0
            for i, begin, end in chunks:
                parts[i].append(logits[row : row + end - begin].copy())
                row += end - begin
                done[i] = end
        return [np.concatenate(part) for part in parts]

    def score(
        self,
        kv: _C.KVCache,
        batch: _C.Batch,
        rows: Sequence[int],
        targets: Sequence[int],
        top_n: int = 0,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Log-probabilities (R,) of ``targets`` after ``rows``; ids and values (R, top_n) of the best tokens.
        """
        nobody = array("i", [-1] * batch.num_seqs)
        rows, targets = array("i", rows), array("i", targets)
        result = self.model.step(kv, _C.Sampler(1), batch, nobody, rows, targets, top_n)
        ids = [[token for token, _ in best] for best in result.score_tops]
        values = [[value for _, value in best] for best in result.score_tops]
        return np.array(result.scores, np.float32), np.array(ids, np.int32), np.array(values, np.float32)


def block_tables(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Physical blocks for sequences of these lengths: all different, in random order."""
    counts = [-(-length // _C.BLOCK_TOKENS) for length in lengths]
    blocks = iter(np.random.default_rng(seed).permutation(sum(counts) + 1).tolist())
    return [[next(blocks) for _ in range(count)] for count in counts]


def make_batch(
    sequences: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    chunks: Sequence[tuple[int, int, int]],
) -> _C.Batch:
    """The batch that computes tokens [begin, end) of each sequence i, for (i, begin, end) in ``chunks``."""
    token_ids, positions = array("i"), array("i")
    query_start, context_len, block_table = array("i", [0]), array("i"), array("i")
    width = max(len(tables[i]) for i, _, _ in chunks)
    for i, begin, end in chunks:
        token_ids.extend(sequences[i][begin:end])
        positions.extend(range(begin, end))
        query_start.append(len(token_ids))
        context_len.append(end)
        block_table.extend([*tables[i], *[0] * (width - len(tables[i]))])
    return _C.Batch(token_ids, positions, query_start, context_len, block_table)


@functools.cache
def cached_runner(
    directory: Path,
    dtype: str = "float32",
    threads: int = 1,
    isa: str | None = None,
    kv_dtype: str | None = None,
) -> Runner:
    """One Runner per set of arguments and process: hypothesis asks for the same ones again and again."""
    return Runner(directory, dtype, threads, isa, kv_dtype)
