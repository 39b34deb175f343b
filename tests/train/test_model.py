"""Dropout of the reference model; the model itself is compared with `transformers` in test_run.py."""

from __future__ import annotations

import pytest
import torch

from pyengine.train.model import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_p(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 1001, requires_grad=True)  # not a multiple of four elements
    y = Dropout(p)(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    for dim in (0, 1):  # as many in every row and column: a pattern of the drawn bits would show here
        part = kept.float().mean(dim)
        assert (part - (1 - p)).abs().max().item() < 6 * (p * (1 - p) / x.shape[dim]) ** 0.5
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)


def test_dropout_depends_on_the_seed_and_rests_in_evaluation() -> None:
    x, dropout = torch.randn(7, 5), Dropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x
