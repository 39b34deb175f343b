"""The reference model against `transformers`: equal in float64 on every randomised checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from pyengine.train.model import GPT2, ModelConfig
from tests.checkpoints import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_in_float64(name: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(name)
    theirs = GPT2LMHeadModel.from_pretrained(
        directory,
        attn_implementation="eager",
        dtype=torch.float64,
        reorder_and_upcast_attn=False,  # which would compute the scores in float32
    ).eval()
    ours = GPT2.from_checkpoint(directory, torch.float64)
    ids = torch.randint(ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_export_and_import_are_inverse(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2(
        ModelConfig(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3, tie_word_embeddings=tied)
    )
    model.save_checkpoint(tmp_path)
    ids = torch.randint(61, (1, 16))
    with torch.no_grad():
        expected = model.eval()(ids)
        assert torch.equal(GPT2.from_checkpoint(tmp_path)(ids), expected)
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.allclose(theirs(ids).logits, expected, rtol=0, atol=1e-6)


def test_names_without_the_prefix_load() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=61, n_positions=16, n_embd=24, n_layer=1, n_head=3)
    model, other = GPT2(config), GPT2(config)
    other.from_huggingface({n.removeprefix("transformer."): v for n, v in model.to_huggingface().items()})
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids), other(ids))


def test_initialisation_scales_residual_projections() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    parameters = {n.removeprefix("transformer.h.3."): p for n, p in model.named_parameters()}
    assert parameters["mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters["mlp.c_proj.weight"].std().item() == pytest.approx(
        0.02 / 4, rel=0.05
    )  # sqrt(2 * 8) = 4
    assert not parameters["attn.c_attn.bias"].any()
