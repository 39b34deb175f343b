"""The schedules of test_schedules.py on the real kernels: equality to the bit, log-probabilities included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.engine.engine import Core, Engine
from pyengine.model.checkpoint import load_checkpoint

from .helpers import MAX_MODEL_LEN, run
from .test_schedules import Arrival, arrivals, check_equal, play


@functools.cache
def model(directory: Path, dtype: str, threads: int) -> tuple[_C.Model, tuple[int, int, int]]:
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    made = _C.Model(_C.ExecContext(threads), config.kernel_config(), checkpoint.weights(), dtype)
    return made, (config.n_layer, config.n_head, config.head_dim)


def real_engine(
    directory: Path,
    dtype: str,
    kv_dtype: str,
    *,
    threads: int = 1,
    num_blocks: int = 64,
    budget: int = 1000,
    max_num_seqs: int = 8,
    prefix_caching: bool = True,
) -> Engine:
    made, shape = model(directory, dtype, threads)
    core = Core(
        model=made,
        kv=_C.KVCache(*shape, num_blocks, kv_dtype),
        sampler=_C.Sampler(max_num_seqs),
        manager=_C.BlockManager(num_blocks, prefix_caching),
        batch=_C.Batch,
    )
    return Engine(core, max_model_len=MAX_MODEL_LEN, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


@pytest.fixture(scope="module")
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("head_dim_20")


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8"), ("bfloat16", "float32")],
)
def test_tokens_and_logprobs_equal_those_alone(directory: Path, dtype: str, kv_dtype: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(
        trace=arrivals,
        num_blocks=st.integers(8, 40),
        budget=st.sampled_from([3, 7, 16, 33, 200]),
        max_num_seqs=st.integers(1, 8),
        prefix_caching=st.booleans(),
        threads=st.sampled_from([1, 2]),
    )
    def check(
        trace: list[Arrival],
        num_blocks: int,
        budget: int,
        max_num_seqs: int,
        prefix_caching: bool,
        threads: int,
    ) -> None:
        crowded = real_engine(
            directory,
            dtype,
            kv_dtype,
            threads=threads,
            num_blocks=num_blocks,
            budget=budget,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
        )
        requests = play(crowded, trace)
        for number, (arrival, one) in enumerate(zip(trace, requests, strict=True)):
            alone = arrival.request(number)
            run(real_engine(directory, dtype, kv_dtype), alone)
            check_equal(one, alone, arrival.abort_after is not None)

    check()
