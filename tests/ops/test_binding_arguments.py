"""Every argument of every binding with values of every wrong kind: an exception or a result, never a crash.

Which of them are errors, and what these say, is in test_refusals.py and test_extension.py. Here no value may
reach a kernel that it does not fit; a build with AddressSanitizer sees what a lucky run does not.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyengine import _C
from pyengine._C import ops
from pyengine.errors import InternalError, PyEngineError
from tests.test_extension import CONFIG, kv_cache, weights


def int32(*values: int) -> array[int]:
    return array("i", values)


def misaligned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    data = np.frombuffer(b"\0" + values.tobytes() + b"\0" * 8, values.dtype, values.size, offset=1)
    return data.reshape(values.shape)


F32 = np.arange(16, dtype=np.float32).reshape(2, 8)
VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    3,
    65,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1.5,
    -1.0,
    math.nan,
    math.inf,
    1e300,
    True,
    "",
    "x",
    "é\0",
    "float16",
    "float32",
    "\ud800",
    b"abc",
    [],
    [1],
    [-1],
    [2**31],
    ["a"],
    [None],
    [[1]],
    {},
    {"a": 1},
    {"a": (b"", "float32", [0])},
    (),
    object(),
    int,
    range(3),
    memoryview(b"abcd"),
    bytearray(8),
    lambda: None,
    array("i"),
    int32(-1),
    int32(0),
    int32(1),
    int32(0, 1),
    int32(2**31 - 1),
    int32(0, 1, 2),
    int32(5, 4, 3),
    array("I", [2**32 - 1]),
    array("f", [1.0]),
    array("q", [1]),
    array("b", [1] * 4),
    np.array([0, 1], ">i4"),
    np.array([0, 1], np.int64),
    np.array(1, np.int32),
    np.arange(4, dtype=np.int32).reshape(2, 2),
    np.arange(8, dtype=np.int32)[::2],
    misaligned(np.array([0, 1], np.int32)),
    F32,
    F32[0],
    F32[:1],
    F32[:0],
    F32[:, :0],
    F32[:, :3],
    F32.T,
    F32[:, ::2],
    F32.astype(">f4"),
    F32.astype(np.float64),
    F32.astype(np.uint16),
    F32.astype(np.float16),
    F32.astype(np.int32),
    F32[None],
    np.float32(1),
    np.array(1, np.float32),
    np.asfortranarray(F32),
    misaligned(F32),
    np.full((2, 8), np.nan, np.float32),
    np.array(["a"], object),
    np.zeros(0, np.float32),
]


def prompt() -> _C.Batch:
    return _C.Batch(int32(1, 2), int32(0, 1), int32(0, 2), int32(2), int32(0))


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Name -> a callable and arguments with which it works."""
    ctx = _C.ExecContext(2)
    kv, sampler, batch, manager = kv_cache(), _C.Sampler(2), prompt(), _C.BlockManager(8)
    small = _C.KVCache(1, 2, 4, 3, "float32")
    model = _C.Model(ctx, CONFIG, weights(), "float32")
    (held,) = manager.allocate(1)
    x, gain, w, square = (
        F32,
        np.ones(8, np.float32),
        np.ones((8, 24), np.float32),
        np.ones((8, 8), np.float32),
    )
    bias = np.zeros(24, np.float32)
    tokens = int32(*range(40))
    return {
        "Batch": (
            _C.Batch,
            {
                "token_ids": int32(1, 2),
                "positions": int32(0, 1),
                "query_start": int32(0, 2),
                "context_len": int32(2),
                "block_table": int32(0),
                "block_copies": None,
            },
        ),
        "ExecContext": (_C.ExecContext, {"num_threads": 1, "isa": "baseline"}),
        "KVCache": (
            _C.KVCache,
            {"n_layer": 1, "n_head": 2, "head_dim": 4, "num_blocks": 2, "dtype": "float32"},
        ),
        "KVCache.bytes_per_block": (
            _C.KVCache.bytes_per_block,
            {"n_layer": 1, "n_head": 2, "head_dim": 4, "dtype": "float32"},
        ),
        "BlockManager": (_C.BlockManager, {"num_blocks": 4, "enable_prefix_caching": True}),
        "match": (manager.match, {"token_ids": tokens}),
        "allocate": (lambda count: manager.free(manager.allocate(count)), {"count": 2}),
        "fork": (manager.fork, {"blocks": [held]}),
        "free": (_C.BlockManager(8).free, {"blocks": []}),
        "make_writable": (manager.make_writable, {"block": held}),
        "publish": (_C.BlockManager(8).publish, {"token_ids": int32(1), "blocks": []}),
        "reference_count": (manager.reference_count, {"block": held}),
        "Sampler": (_C.Sampler, {"num_slots": 2}),
        "Model": (  # its configuration and weights have tests of their own
            lambda ctx, dtype: _C.Model(ctx, CONFIG, weights(), dtype),
            {"ctx": _C.ExecContext(1), "dtype": "float32"},
        ),
        "step": (
            model.step,
            {
                "kv": kv,
                "sampler": sampler,
                "batch": batch,
                "request_slot": int32(0),
                "score_rows": int32(0),
                "targets": int32(2),
                "top_n": 1,
            },
        ),
        "forward": (model.forward, {"kv": kv, "batch": batch, "rows": int32(1)}),
        "sample": (
            sampler.sample,
            {"ctx": ctx, "logits": F32, "slots": int32(0, 1), "positions": int32(1, 2)},
        ),
        "FileView": (_C.FileView, {"mapping": b"abc", "fd": 0, "path": "x"}),
        "embed": (ops.embed, {"ctx": ctx, "batch": batch, "wte": np.ones((4, 8), np.float32), "wpe": F32}),
        "layer_norm": (
            ops.layer_norm,
            {
                "ctx": ctx,
                "x": x,
                "gain": gain,
                "bias": gain,
                "eps": 1e-5,
                "rows": int32(1),
                "out_dtype": "float32",
            },
        ),
        "linear": (
            ops.linear,
            {
                "ctx": ctx,
                "x": x,
                "w": w,
                "bias": bias,
                "activation": "relu",
                "layout": "in_out",
                "out_dtype": "float32",
            },
        ),
        "linear_residual": (
            ops.linear_residual,
            {"ctx": ctx, "x": x, "w": square, "bias": gain, "residual": x, "layout": "in_out"},
        ),
        "qkv": (
            ops.qkv,
            {"ctx": ctx, "x": x, "w": w, "bias": bias, "batch": batch, "kv": small, "layer": 0},
        ),
        "attention": (
            ops.attention,
            {
                "ctx": ctx,
                "q": x,
                "batch": batch,
                "kv": small,
                "layer": 0,
                "scale": 1.0,
                "out_dtype": "float32",
            },
        ),
        "score_rows": (
            ops.score_rows,
            {"ctx": ctx, "x": x, "head": square, "targets": int32(1, 2), "top_n": 2},
        ),
        "copy_blocks": (ops.copy_blocks, {"ctx": ctx, "kv": small, "layer": 0, "pairs": int32(0, 1)}),
        "convert": (ops.convert, {"ctx": ctx, "src": x, "src_dtype": "float32", "dst_dtype": "bfloat16"}),
        "read_block": (ops.read_block, {"kv": small, "layer": 0, "block": 1}),
    }


_CALLS = calls()
# FileView takes what it is told is mapped from a file, and closes nothing: any descriptor may be given.
_ALLOWED = (PyEngineError, TypeError, ValueError, OverflowError)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", _CALLS)
def test_an_argument_of_a_wrong_kind_is_no_crash(name: str) -> None:
    call, good = _CALLS[name]
    if name == "FileView":
        with open(os.devnull, "rb") as file:
            good = {**good, "fd": file.fileno(), "mapping": b""}
            call(**good)
            _every_value(call, good)
        return
    call(**good)
    _every_value(call, good)
    call(**good)  # nothing is broken


def _every_value(call: Callable[..., Any], good: dict[str, Any]) -> None:
    for argument in good:
        for value in VALUES:
            try:
                call(**{**good, argument: value})
            except InternalError as error:  # of the block manager, which is not for users
                assert "block" in str(error) or "count" in str(error), (argument, value)
            except _ALLOWED:
                pass


def test_configurations_of_the_model() -> None:
    """Every field of the configuration with every value; the weights stay what they are."""
    ctx, tensors = _C.ExecContext(1), weights()
    for field in CONFIG:
        for value in VALUES:
            try:
                _C.Model(ctx, {**CONFIG, field: value}, tensors, "float32")
            except _ALLOWED:
                pass
        without = {name: value for name, value in CONFIG.items() if name != field}
        with pytest.raises(PyEngineError, match=field):
            _C.Model(ctx, without, tensors, "float32")


def test_weights_of_the_model() -> None:
    """One weight in every wrong form: buffer, dtype, shape."""
    ctx, tensors = _C.ExecContext(1), weights()
    name = "h.1.mlp.c_fc.weight"
    data, dtype, shape = tensors[name]
    for value in VALUES:
        for entry in ((value, dtype, shape), (data, value, shape), (data, dtype, value), value):
            try:
                _C.Model(ctx, CONFIG, {**tensors, name: entry}, "float32")
            except _ALLOWED:
                pass


def test_batches_of_small_numbers() -> None:
    """Batches of which one array is arbitrary, slots and rows, too: refused, or consistent enough to run."""
    random = np.random.default_rng(0)
    model = _C.Model(_C.ExecContext(2), CONFIG, weights(), "float32")
    kv, sampler, ran = kv_cache(), _C.Sampler(2), 0
    numbers = [-1, 0, 1, 2, 3, 16, 49, 50, 63, 64, 2**31 - 1]

    def some(size: int) -> array[int]:
        return array("i", random.choice(numbers, size, p=[0.05, 0.4, 0.3, *[0.25 / 8] * 8]).tolist())

    for _ in range(2000):
        size, start = int(random.integers(1, 4)), int(random.integers(0, 3))
        arrays = [
            array("i", random.integers(0, 50, size).tolist()),
            array("i", range(start, start + size)),
            int32(0, size),
            int32(start + size),
            int32(0),
            None if random.random() < 0.5 else some(2),
        ]
        if random.random() < 0.6:
            arrays[int(random.integers(0, 5))] = some(int(random.integers(0, 4)))
        try:
            batch = _C.Batch(*arrays)  # type: ignore[arg-type]
            model.step(
                kv, sampler, batch, some(batch.num_seqs), some(1), some(1), int(random.integers(-1, 66))
            )
            ran += 1
        except PyEngineError:
            pass
    assert 20 < ran < 2000
