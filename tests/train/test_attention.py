"""Attention over pieces of the queries, with its gradients, against torch's own in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyengine.train.attention import causal_attention


@pytest.mark.parametrize("tokens", [1, 64, 128, 129, 300])
def test_pieces_give_the_whole(tokens: int) -> None:
    torch.manual_seed(tokens)
    inputs = [torch.randn(2, 3, tokens, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    weight = torch.randn(2, 3, tokens, 16)
    ours = causal_attention(inputs[0], inputs[1], inputs[2], 0.3)
    theirs = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True, scale=0.3)
    torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02)
    (ours.float() * weight).sum().backward()
    (theirs * weight).sum().backward()
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None and y.grad is not None
        error = (x.grad.float() - y.grad).norm() / y.grad.norm().clamp(min=1.0)
        assert error < 0.02  # bfloat16 keeps 8 bits


def test_the_function_is_chosen_by_what_is_asked() -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    for dtype, piecewise in ((torch.float32, False), (torch.bfloat16, True)):
        y = x.to(dtype)
        result = causal_attention(y, y, y, 1.0)
        names, node = "", result.grad_fn
        while node is not None and node.next_functions:
            names, node = names + node.name(), node.next_functions[0][0]
        assert ("Piecewise" in names) == piecewise
        with torch.no_grad():
            plain = causal_attention(y, y, y, 1.0)
        torch.testing.assert_close(plain, result.detach(), rtol=0.02, atol=0.02)
