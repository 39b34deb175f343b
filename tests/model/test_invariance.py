"""A request's logits do not depend, in any bit, on its batch, on how its prompt is cut, or on threads.

Each sequence alone, in one piece, on one thread is what everything else must equal. Contexts cross the
64-key pieces of attention and the 16-token blocks of the cache, "wide" the 256-k blocks of the reduction.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine import _C
from tests.forward import Step, block_tables, cached_runner, make_batch

MODELS = ["head_dim_8", "head_dim_20", "head_dim_odd", "no_scale", "head_dim_80", "wide"]
# Of the weights, and of the KV cache.
PRECISIONS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("int8", "bfloat16"),
    ("int4", "int8"),
]
CONTEXT = 160  # n_positions of these models


@dataclass(frozen=True)
class Schedule:
    """Sequences, given by length and seed of their tokens, and the steps that compute them."""

    lengths: tuple[int, ...]
    steps: tuple[Step, ...]
    seed: int
    threads: int


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Up to four sequences; each step takes some of them, in any order, some tokens further."""
    lengths = tuple(draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4)))
    left = list(lengths)
    steps: list[Step] = []
    while any(left):
        running = [i for i, n in enumerate(left) if n]
        chosen = draw(st.permutations(running))[: draw(st.integers(1, len(running)))]
        step = []
        for i in chosen:
            size = draw(st.one_of(st.just(1), st.integers(1, left[i]), st.just(left[i])))
            step.append((i, size))
            left[i] -= size
        steps.append(step)
        if len(steps) > 40:  # enough decode steps; the rest in one go
            steps.append([(i, n) for i, n in enumerate(left) if n])
            break
    return Schedule(
        lengths, tuple(s for s in steps if s), draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    )


def sequences_of(schedule: Schedule, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(schedule.seed)
    return [rng.integers(vocab_size, size=n).tolist() for n in schedule.lengths]


def bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return x.view(np.uint32)


@pytest.mark.parametrize(("dtype", "kv_dtype"), PRECISIONS, ids=[f"{w}-kv-{kv}" for w, kv in PRECISIONS])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules())
def test_logits_do_not_depend_on_the_schedule(
    name: str, dtype: str, kv_dtype: str, checkpoint: Callable[[str], Path], schedule: Schedule
) -> None:
    open_runner = functools.partial(cached_runner, checkpoint(name), dtype, kv_dtype=kv_dtype)
    alone, together = open_runner(threads=1), open_runner(threads=schedule.threads)
    sequences = sequences_of(schedule, alone.config.vocab_size)
    results = together.logits(sequences, schedule.steps, schedule.seed)
    for sequence, logits in zip(sequences, results, strict=True):
        (expected,) = alone.logits([sequence])
        assert np.array_equal(bits(logits), bits(expected))


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_on_every_instruction_set(dtype: str, isa: str, checkpoint: Callable[[str], Path]) -> None:
    alone = cached_runner(checkpoint("wide"), dtype, 1, isa)
    together = cached_runner(checkpoint("wide"), dtype, 2, isa)
    rng = np.random.default_rng(3)
    lengths = (1, 70, 150, 64)
    sequences = [rng.integers(alone.config.vocab_size, size=n).tolist() for n in lengths]
    steps: list[Step] = [
        [(1, 3), (2, 90)],
        [(2, 1), (0, 1), (1, 61), (3, 17)],
        [(3, 47), (1, 1), (2, 59)],
        [(1, 5)],
    ]
    for sequence, logits in zip(sequences, together.logits(sequences, steps, seed=5), strict=True):
        assert np.array_equal(bits(logits), bits(alone.logits([sequence])[0]))


@pytest.mark.parametrize("name", ["head_dim_8", "wide"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_selected_rows_and_scores_equal_the_whole(
    dtype: str, name: str, checkpoint: Callable[[str], Path]
) -> None:
    """``forward`` with rows and scored rows take another way to the head; rows must not notice."""
    runner = cached_runner(checkpoint(name), dtype, 2)
    vocab_size = runner.config.vocab_size
    rng = np.random.default_rng(4)
    sequences = [rng.integers(vocab_size, size=n).tolist() for n in (33, 100, 1)]
    tables = block_tables([len(s) for s in sequences], seed=2)
    batch = make_batch(sequences, tables, [(i, 0, len(s)) for i, s in enumerate(sequences)])
    kv = runner.kv_cache(sum(map(len, tables)) + 1)
    whole = runner.model.forward(kv, batch)

    rows = [0, 32, 33, 132, 133]
    assert np.array_equal(bits(runner.model.forward(kv, batch, array("i", rows))), bits(whole[rows]))
    shuffled = [133, 0, 33, 33]  # in any order, and more than once
    assert np.array_equal(bits(runner.model.forward(kv, batch, array("i", shuffled))), bits(whole[shuffled]))

    targets = rng.integers(vocab_size, size=len(rows)).tolist()
    logprobs, top_ids, top_logprobs = runner.score(kv, batch, rows, targets, 5)
    expected = whole[rows].astype(np.float64)
    expected -= np.log(np.exp(expected - expected.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= whole[rows].max(1, keepdims=True)
    assert np.allclose(logprobs, expected[np.arange(len(rows)), targets], rtol=2e-6, atol=2e-6)
    assert np.array_equal(top_ids, np.argsort(-whole[rows], axis=1, kind="stable")[:, :5])
    assert np.allclose(top_logprobs, np.take_along_axis(expected, top_ids, 1), rtol=2e-6, atol=2e-6)
    for i, row in enumerate(rows):  # one row at a time: the same bits
        one = runner.score(kv, batch, [row], [targets[i]], 5)
        assert bits(one[0])[0] == bits(logprobs)[i]
        assert np.array_equal(bits(one[2])[0], bits(top_logprobs)[i])
