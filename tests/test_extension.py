"""The extension module as a citizen of Python: imports, buffers, ownership, forks, threads, memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyengine import _C, errors
from pyengine.model.config import GPT2Config

CONFIG: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_inner": 40,
    "n_positions": 64,
    "vocab_size": 50,
    "activation": "gelu_tanh",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def weights() -> dict[str, tuple[Any, str, tuple[int, ...]]]:
    c, inner = CONFIG["n_embd"], CONFIG["n_inner"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (CONFIG["vocab_size"], c),
        "wpe.weight": (CONFIG["n_positions"], c),
    }
    for i in range(CONFIG["n_layer"]):
        for name, n_in, n_out in [("attn.c_attn", c, 3 * c), ("attn.c_proj", c, c)] + [
            ("mlp.c_fc", c, inner),
            ("mlp.c_proj", inner, c),
        ]:
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (c,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (c,)
    random = np.random.default_rng(0)
    return {
        name: (random.normal(0, 0.5, shape).astype(np.float32), "float32", shape)
        for name, shape in shapes.items()
    }


def int32(*values: int) -> array[int]:
    return array("i", values)


def prompt(*tokens: int) -> _C.Batch:
    """One sequence from its start, in block 0."""
    n = len(tokens)
    return _C.Batch(int32(*tokens), int32(*range(n)), int32(0, n), int32(n), int32(0))


def kv_cache() -> _C.KVCache:
    return _C.KVCache(CONFIG["n_layer"], CONFIG["n_head"], CONFIG["n_embd"] // CONFIG["n_head"], 4, "float32")


def test_importing_and_stepping_needs_no_numpy() -> None:
    code = "import sys, pyengine._C; assert not {'numpy', 'torch'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_keeps_its_weights_alive() -> None:
    tensors = weights()
    expected_model = _C.Model(_C.ExecContext(1), CONFIG, tensors, "float32")
    expected = expected_model.forward(kv_cache(), prompt(1, 2, 3))
    copies = {name: (data.copy(), dtype, shape) for name, (data, dtype, shape) in weights().items()}
    model = _C.Model(_C.ExecContext(1), CONFIG, copies, "float32")
    del copies
    gc.collect()
    _ = [np.full(10_000, np.nan, np.float32) for _ in range(50)]  # would land where freed weights lay
    assert np.array_equal(model.forward(kv_cache(), prompt(1, 2, 3)), expected)
    assert (model.vocab_size, model.dtype) == (50, "float32")


def test_any_contiguous_buffer_is_taken() -> None:
    tensors = weights()
    as_bytes = {name: (data.tobytes(), dtype, list(shape)) for name, (data, dtype, shape) in tensors.items()}
    expected = _C.Model(_C.ExecContext(1), CONFIG, tensors, "float32").forward(kv_cache(), prompt(4, 5))
    model = _C.Model(_C.ExecContext(1), CONFIG, as_bytes, "float32")
    batch = _C.Batch(
        np.array([4, 5], np.int32), memoryview(int32(0, 1)), int32(0, 2), int32(2), np.zeros(1, np.int32)
    )
    assert np.array_equal(model.forward(kv_cache(), batch), expected)
    assert np.array_equal(model.forward(kv_cache(), batch, rows=int32(1)), expected[1:])
    with pytest.raises(TypeError, match="token_ids must hold int32"):
        _C.Batch(np.array([4, 5]), int32(0, 1), int32(0, 2), int32(2), int32(0))
    with pytest.raises(TypeError, match="positions must be a C-contiguous buffer"):
        _C.Batch(int32(4), np.arange(4, dtype=np.int32)[::2], int32(0, 2), int32(2), int32(0))


def test_configuration_errors_name_the_field() -> None:
    context = _C.ExecContext(1)
    missing = {name: value for name, value in CONFIG.items() if name != "n_inner"}
    with pytest.raises(errors.ConfigError, match="n_inner is missing"):
        _C.Model(context, missing, weights(), "float32")
    with pytest.raises(errors.ConfigError, match="n_layer is '2'"):
        _C.Model(context, {**CONFIG, "n_layer": "2"}, weights(), "float32")
    with pytest.raises(errors.ConfigError, match="activation is 'swish'"):
        _C.Model(context, {**CONFIG, "activation": "swish"}, weights(), "float32")
    with pytest.raises(errors.ConfigError, match="dtype is 'int8'"):
        _C.Model(context, CONFIG, weights(), "int8")
    with pytest.raises(errors.ConfigError, match="baseline"):
        _C.ExecContext(1, "mmx")
    tensors = weights()
    tensors["h.1.ln_2.bias"] = (np.zeros(15, np.float32), "float32", (15,))
    with pytest.raises(errors.CheckpointError, match=r"'h\.1\.ln_2\.bias' has shape \(15\).*\(16\)"):
        _C.Model(context, CONFIG, tensors, "float32")


@pytest.mark.parametrize("head_dim", [256, 257])
def test_heads_have_a_largest_size(head_dim: int) -> None:
    """One whose sums did not fit the kernel's stack would crash the process."""
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=256, n_layer=1, n_head=1, n_inner=4)
    assert _C.MAX_HEAD_DIM == 256
    q = np.ones((3, head_dim), np.float32)
    if head_dim > _C.MAX_HEAD_DIM:
        with pytest.raises(errors.ConfigError, match="head_dim is 257"):
            _C.KVCache(1, 1, head_dim, 1, "float32")
        with pytest.raises(errors.ConfigError, match="257 channels.*at most 256"):
            replace(config, n_embd=head_dim)
        with pytest.raises(errors.ConfigError, match="257 channels.*at most 256"):
            _C.Model(_C.ExecContext(1), {**config.kernel_config(), "n_embd": head_dim}, weights(), "float32")
        return
    for isa in _C.available_isas():
        context, kv = _C.ExecContext(1, isa), _C.KVCache(1, 1, head_dim, 1, "float32")
        w = np.concatenate([np.eye(head_dim, dtype=np.float32)] * 3, axis=1)
        _C.ops.qkv(context, q, w, np.zeros(3 * head_dim, np.float32), prompt(1, 2, 3), kv, 0)
        assert np.array_equal(_C.ops.attention(context, q, prompt(1, 2, 3), kv, 0, 1.0), q)


@pytest.mark.parametrize("isa", [*_C.available_isas(), "", "nonsense"])
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    code = "from pyengine._C import ExecContext as E; print(E(1).isa, E(1, 'baseline').isa)"
    environment = {**os.environ, "PYENGINE_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if isa == "nonsense":
        assert "ConfigError" in done.stderr
        assert '"nonsense" does not exist' in done.stderr
    else:
        names = done.stdout.split()
        assert names[0] == isa if isa else names[0] in _C.available_isas()
        assert names[1] == "baseline"


def test_requests_errors_are_python_classes() -> None:
    model = _C.Model(_C.ExecContext(1), CONFIG, weights(), "float32")
    with pytest.raises(errors.RequestError, match="token id 50"):
        model.forward(kv_cache(), prompt(50))
    with pytest.raises(errors.RequestError, match="request_slot has 2 entries"):
        model.step(kv_cache(), _C.Sampler(2), prompt(1), int32(0, 1))
    with pytest.raises(errors.RequestError, match="top_n is 65"):
        model.step(kv_cache(), _C.Sampler(1), prompt(1), int32(-1), int32(0), int32(0), 65)
    with pytest.raises(errors.RequestError, match="1 score_rows, but 2 targets"):
        model.step(kv_cache(), _C.Sampler(1), prompt(1), int32(-1), int32(0), int32(0, 1))
    with pytest.raises(errors.RequestError, match="target token -1"):
        model.step(kv_cache(), _C.Sampler(1), prompt(1), int32(-1), int32(0), int32(-1))
    with pytest.raises(errors.RequestError, match="row 1 does not exist"):
        model.step(kv_cache(), _C.Sampler(1), prompt(1), int32(-1), int32(1), int32(0))
    assert issubclass(errors.RequestError, errors.PyEngineError)


def test_scores_agree_with_logits() -> None:
    model = _C.Model(_C.ExecContext(2), CONFIG, weights(), "float32")
    batch = prompt(*range(10))
    logits = model.forward(kv_cache(), batch).astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    result = model.step(
        kv_cache(), _C.Sampler(1), batch, int32(-1), int32(*range(9)), int32(*range(1, 10)), 3
    )
    ids = [[token for token, _ in best] for best in result.score_tops]
    top = [[value for _, value in best] for best in result.score_tops]
    assert np.allclose(result.scores, exact[np.arange(9), np.arange(1, 10)], atol=2e-5)
    assert np.array_equal(ids, np.argsort(-exact[:9], kind="stable")[:, :3])
    assert np.allclose(top, -np.sort(-exact[:9])[:, :3], atol=2e-5)


def test_threads_of_python_take_turns() -> None:
    """Ten threads on one model and one context: every one gets the result of running alone."""
    model = _C.Model(_C.ExecContext(2), CONFIG, weights(), "float32")
    expected = [model.forward(kv_cache(), prompt(i, i + 1)) for i in range(10)]
    wrong: list[int] = []

    def work(i: int) -> None:
        kv = kv_cache()
        for _ in range(30):
            if not np.array_equal(model.forward(kv, prompt(i, i + 1)), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os
from pyengine import _C
from tests.test_extension import *
context = _C.ExecContext(2)
model = _C.Model(context, CONFIG, weights(), "float32")
model.forward(kv_cache(), prompt(1, 2))
child = os.fork()
if child == 0:
    try:
        model.forward(kv_cache(), prompt(1, 2))
    except errors.InternalError as e:
        fresh = _C.Model(_C.ExecContext(2), CONFIG, weights(), "float32")  # in the child all is well
        fresh.forward(kv_cache(), prompt(1, 2))
        os._exit(0 if "create the LLM in the child process" in str(e) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
model.forward(kv_cache(), prompt(1, 2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_use_after_fork_is_a_clear_error() -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, cwd=root, timeout=60)


MEMORY = """
import os
from array import array
from pyengine import _C
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
import tests.test_extension as t
model = _C.Model(_C.ExecContext(1), t.CONFIG, t.weights(), "float32")
sampler = _C.Sampler(1)
model.step(t.kv_cache(), sampler, t.prompt(1, 2), array("i", [0]))
before = resident()
kv = _C.KVCache(2, 2, 8, 2_000_000, "float32")
assert kv.num_blocks * kv.block_bytes > 10_000_000_000
sizes, flags = [], []
for line in open("/proc/self/smaps"):
    if line.startswith("Size:"):
        sizes.append(int(line.split()[1]))
    elif line.startswith("VmFlags:"):
        flags.append(line.split())
if len(flags) == len(sizes) and os.path.exists("/sys/kernel/mm/transparent_hugepage"):
    [cache] = [f for size, f in zip(sizes, flags) if size > 10_000_000]
    assert "nh" in cache, cache  # no huge pages: with them each layer of a request would touch 2 MB
model.step(kv, sampler, t.prompt(1, 2), array("i", [0]))
grown = resident() - before
assert grown < 16_000_000, grown
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_large_cache_costs_what_is_used_of_it() -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", MEMORY], check=True, cwd=root, timeout=60)
