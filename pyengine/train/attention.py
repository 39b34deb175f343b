"""Causal self-attention for training: torch's fused one, or products over pieces of the queries.

torch's fused backward on a CPU multiplies bfloat16 matrices at a fraction of the rate of its own ``bmm``
(which uses AMX). In bfloat16 the pieces take 60 % of its time at 512 tokens, a fifth at 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 128  # queries: keys after a piece are left out, so that few masked scores are computed


class _PiecewiseAttention(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v; q, k, v and the result are (N, T, D). Keeps N T^2 / 2 weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        tokens = q.shape[1]
        weights = []
        for begin in range(0, tokens, _PIECE):
            end = min(begin + _PIECE, tokens)
            scores = torch.bmm(q[:, begin:end] * scale, k[:, :end].transpose(1, 2))
            scores[:, :, begin:] += scores.new_full((end - begin, end - begin), -math.inf).triu(1)
            weights.append(torch.softmax(scores, -1))
            out[:, begin:end] = torch.bmm(weights[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        begin = 0
        for weight in weights:
            end = weight.shape[2]
            piece = grad[:, begin:end]
            dv[:, :end] += torch.bmm(weight.transpose(1, 2), piece)
            dweight = torch.bmm(piece, v[:, :end].transpose(1, 2))
            dscores = torch._softmax_backward_data(dweight, weight, -1, weight.dtype).mul_(ctx.scale)
            dq[:, begin:end] = torch.bmm(dscores, k[:, :end])
            dk[:, :end] += torch.bmm(dscores.transpose(1, 2), q[:, begin:end])
            begin = end
        return dq, dk, dv, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention weights of each token over itself and those before it, times ``v``; all (B, H, T, D)."""
    piecewise = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if piecewise and torch.is_grad_enabled() and q.requires_grad:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        apply: Callable[..., Tensor] = _PiecewiseAttention.apply
        return apply(*flat, scale).view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
