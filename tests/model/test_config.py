"""GPT2Config against transformers' own, and against configurations that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from transformers.activations import ACT2FN

from pyengine.errors import ConfigError, PyEngineError
from pyengine.model.config import ACTIVATIONS, GPT2Config

SHARED_FIELDS = (
    "vocab_size n_positions n_embd n_layer n_head activation_function layer_norm_epsilon scale_attn_weights "
    "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn tie_word_embeddings bos_token_id eos_token_id"
).split()
TINY = {"vocab_size": 31, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPT2Config.from_dict({}), transformers.GPT2Config()
    assert {f: getattr(ours, f) for f in SHARED_FIELDS} == {f: getattr(theirs, f) for f in SHARED_FIELDS}
    assert theirs.n_inner is None
    assert ours.n_inner == 4 * 768
    assert ours == GPT2Config()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_inner": 17},
        {"n_inner": None},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"bos_token_id": 3, "eos_token_id": 4},
        {"bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": [4, 5]},
        {"dtype": "bfloat16"},
        {"id2label": {0: "a"}, "task_specific_params": {"x": {"y": 1}}},
    ],
    ids=str,
)
def test_reads_what_transformers_saves(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = transformers.GPT2Config(**{**TINY, "bos_token_id": 1, "eos_token_id": 2, **fields})
    theirs.save_pretrained(tmp_path)
    ours = GPT2Config.from_file(tmp_path)
    assert ours == GPT2Config.from_file(tmp_path / "config.json")
    for field in SHARED_FIELDS:
        expected = getattr(theirs, field)
        assert getattr(ours, field) == (tuple(expected) if isinstance(expected, list) else expected), field
    assert ours.n_inner == (theirs.n_inner or 4 * theirs.n_embd)
    assert ours.torch_dtype == fields.get("dtype")


@pytest.mark.parametrize(
    "data",
    [
        {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 9},
        {"n_embd": 36, "hidden_size": 24},  # transformers lets the alias win, in either order
        {"hidden_size": 24, "n_embd": 36},
        {"n_ctx": 77, "n_positions": 8},
    ],
    ids=str,
)
def test_aliases_as_in_transformers(data: dict[str, Any]) -> None:
    ours, theirs = GPT2Config.from_dict(data), transformers.GPT2Config.from_dict(data)
    for field in ("n_embd", "n_layer", "n_head", "n_positions"):
        assert getattr(ours, field) == getattr(theirs, field)


def test_n_ctx_stands_in_for_n_positions_of_old_files() -> None:
    assert GPT2Config.from_dict({"n_ctx": 77}).n_positions == 77
    assert GPT2Config.from_dict({"n_ctx": None}).n_positions == 1024


def test_torch_dtype_under_both_names() -> None:
    assert GPT2Config.from_dict({"torch_dtype": "float16"}).torch_dtype == "float16"
    assert GPT2Config.from_dict({"dtype": "bfloat16"}).torch_dtype == "bfloat16"


def test_token_ids_outside_the_vocabulary_are_dropped() -> None:
    config = GPT2Config.from_dict({"vocab_size": 100})  # 50256 by default, as in many fine-tuned models
    assert config.bos_token_id is None
    assert config.eos_token_id is None
    assert config.eos_token_ids == ()
    config = GPT2Config.from_dict({"vocab_size": 100, "eos_token_id": [99, 100, -1]})
    assert config.eos_token_id == (99,)
    assert config.eos_token_ids == (99,)
    assert GPT2Config.from_dict({"eos_token_id": 7}).eos_token_ids == (7,)
    assert GPT2Config.from_dict({"eos_token_id": []}).eos_token_id is None


KERNELS = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_same_functions(name: str) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    y = ACT2FN[name](x)
    matching = [kernel for kernel, f in KERNELS.items() if torch.allclose(f(x), y, rtol=0, atol=1e-9)]
    assert matching == [ACTIVATIONS[name]]
    assert GPT2Config(activation_function=name).activation == ACTIVATIONS[name]


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"n_inner": 7}, {"n_layer": 11}], ids=str
)
def test_shapes_and_parameters_are_those_of_the_model(fields: dict[str, Any]) -> None:
    data = {**TINY, **fields}
    ours = GPT2Config.from_dict(data)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**data))
    shapes = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}
    assert ours.weight_shapes() == shapes
    assert ours.num_parameters() == model.num_parameters()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert ours.weight_bytes("float32") == 4 * model.num_parameters()
    assert ours.weight_bytes("bfloat16") == 2 * model.num_parameters() + 2 * vectors
    assert ours.head_dim == ours.n_embd // ours.n_head


def test_gpt2_has_124_million_parameters() -> None:
    assert GPT2Config().num_parameters() == 124_439_808


def test_kernel_config() -> None:
    config = GPT2Config.from_dict({**TINY, "activation_function": "swish", "layer_norm_epsilon": 1})
    assert config.kernel_config() == {
        **TINY,
        "n_inner": 48,
        "activation": "silu",
        "layer_norm_epsilon": 1.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    assert isinstance(config.kernel_config()["layer_norm_epsilon"], float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_bytes_per_token(dtype: str) -> None:
    pytest.importorskip("pyengine._C", reason="the extension is not built")
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    # head_dim 64 needs no padding: keys and values of every layer and channel
    assert GPT2Config().kv_bytes_per_token(dtype) == 2 * 12 * 768 * itemsize


def test_weight_bytes_of_an_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'int3'.*float32"):
        GPT2Config().weight_bytes("int3")


# (config.json, field and value that the message must name)
MALFORMED: list[tuple[Any, list[str]]] = [
    ({"n_embd": 0}, ["n_embd is 0", "from 1 to"]),
    ({"n_embd": -768}, ["n_embd is -768"]),
    ({"n_embd": 768.0}, ["n_embd is 768.0"]),
    ({"n_embd": "768"}, ["n_embd is '768'"]),
    ({"n_embd": None}, ["n_embd is None"]),
    ({"n_embd": [768]}, ["n_embd is [768]"]),
    ({"n_layer": True}, ["n_layer is True"]),
    ({"n_layer": 0}, ["n_layer is 0"]),
    ({"n_layer": 10**9}, ["n_layer is 1000000000", "from 1 to 10000"]),
    ({"n_head": 7}, ["n_embd is 768", "n_head is 7", "multiple"]),
    ({"n_head": 0}, ["n_head is 0"]),
    ({"num_attention_heads": 0}, ["n_head is 0"]),
    ({"n_positions": 0}, ["n_positions is 0"]),
    ({"n_positions": 2**40}, ["n_positions is 1099511627776"]),
    ({"n_ctx": "long"}, ["n_positions is 'long'"]),
    ({"vocab_size": 2**31}, ["vocab_size is 2147483648"]),
    ({"vocab_size": 2**31 - 1, "n_embd": 2**20, "n_head": 1}, ["vocab_size 2147483647", "parameters"]),
    ({"n_layer": 10_000, "n_embd": 2**18, "n_head": 1}, ["n_layer 10000", "parameters"]),
    ({"n_inner": 0}, ["n_inner is 0"]),
    ({"n_inner": 3072.5}, ["n_inner is 3072.5"]),
    ({"n_inner": 10**400}, ["n_inner is 1000"]),
    ({"activation_function": "tanh"}, ["activation_function is 'tanh'", "gelu_new", "silu"]),
    ({"activation_function": "quick_gelu"}, ["'quick_gelu'"]),
    ({"activation_function": None}, ["activation_function is None"]),
    ({"activation_function": ["gelu"]}, ["activation_function is ['gelu']"]),
    ({"layer_norm_epsilon": float("nan")}, ["layer_norm_epsilon is nan"]),
    ({"layer_norm_epsilon": float("inf")}, ["layer_norm_epsilon is inf"]),
    ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon is 0"]),
    ({"layer_norm_epsilon": -1e-5}, ["layer_norm_epsilon is -1e-05"]),
    ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon is '1e-5'"]),
    ({"layer_norm_epsilon": True}, ["layer_norm_epsilon is True"]),
    ({"scale_attn_weights": 1}, ["scale_attn_weights is 1", "true or false"]),
    ({"scale_attn_by_inverse_layer_idx": "no"}, ["scale_attn_by_inverse_layer_idx is 'no'"]),
    ({"reorder_and_upcast_attn": None}, ["reorder_and_upcast_attn is None"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'"]),
    ({"bos_token_id": "x"}, ["bos_token_id is 'x'"]),
    ({"bos_token_id": [1]}, ["bos_token_id is [1]"]),
    ({"eos_token_id": 1.5}, ["eos_token_id is 1.5"]),
    ({"eos_token_id": True}, ["eos_token_id is True"]),
    ({"eos_token_id": [1, None]}, ["eos_token_id is [1, None]"]),
    ({"torch_dtype": 16}, ["torch_dtype is 16"]),
    ({"model_type": "llama"}, ["model_type is 'llama'", "gpt2"]),
    ({"model_type": "gpt_neox"}, ["model_type is 'gpt_neox'"]),
    ({"model_type": None}, ["model_type is None"]),
    ({"add_cross_attention": True}, ["add_cross_attention is True"]),
    ({"is_encoder_decoder": True}, ["is_encoder_decoder is True"]),
    ({"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
    ({"quantization_config": {"load_in_8bit": True}}, ["quantization_config"]),
    (b"[]", ["must hold a JSON object", "[]"]),
    (b"null", ["must hold a JSON object", "None"]),
    (b"", ["not valid JSON"]),
    (b'{"n_embd": }', ["not valid JSON", "line 1 column 12"]),
    (b'{"n_embd": 768', ["not valid JSON"]),
    (b"\xff{}", ["not UTF-8", "byte 0"]),
    (b'{"a":' + b"[" * 100_000, ["not valid JSON"]),
    (b'{"n_embd": 1' + b"0" * 5000 + b"}", ["not valid JSON"]),
]


@pytest.mark.parametrize(("content", "fragments"), MALFORMED, ids=lambda v: str(v)[:60])
def test_malformed_config_is_refused_with_its_fault_named(
    content: Any, fragments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_file(path)
    for fragment in [str(path), *fragments]:
        assert fragment in str(error.value)
    assert len(str(error.value)) < 600


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        GPT2Config.from_file(tmp_path / "config.json")


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"n_layer": 3}')
    assert GPT2Config.from_file(tmp_path).n_layer == 3


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    [*GPT2Config.__dataclass_fields__, "hidden_size", "n_ctx", "dtype", "add_cross_attention", "pruned_heads"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(field_names, values, max_size=4))
def test_any_values_give_a_config_or_a_config_error(data: dict[str, Any]) -> None:
    try:
        config = GPT2Config.from_dict(data)
    except PyEngineError as e:
        assert isinstance(e, ConfigError)
        return
    assert 0 < config.num_parameters() <= 2**40
    assert config.n_embd == config.n_head * config.head_dim
