"""Scaled dot-product attention for short sequences on a CPU, rotary embedding included.

PyTorch's fused attention is the right choice on CUDA. Its CPU kernel spends most of a small BERT's step in its
backward (128 tokens, heads of 32: 40 % of the whole step), where batched products and one saved softmax are several
times faster. Both paths are tested against the same float64 reference.

Shapes: B sequences, T tokens, H heads, K head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_table(length: int, head_width: int) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al. 2021), (2, T, K / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotary_part(rotary: Tensor | None, qkv: Tensor) -> Tensor | None:
    """The part of a table that a batch (B, T, H, 3, K) needs, in its precision."""
    return None if rotary is None else rotary[:, : qkv.shape[1]].to(qkv.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of (..., T, K) by angles (T, K/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(qkv: Tensor, rotary: Tensor | None) -> Tensor:
    """Attention of every token to every token of its sequence.

    Args:
        qkv: (B, T, H, 3, K) queries, keys and values.
        rotary: Table (2, >= T, K/2) to rotate queries and keys by, or None.

    Returns:
        Context (B, T, H, K), contiguous.
    """
    table = rotary_part(rotary, qkv)
    if qkv.device.type == "cpu":
        context: Tensor = _Attention.apply(qkv, table)
        return context
    q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
    if table is not None:
        q, k = _rotate(q, *table), _rotate(k, *table)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


class _Attention(torch.autograd.Function):
    """``attend`` with its backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor | None) -> Tensor:
        context, packed, probabilities = attend(qkv, table)
        ctx.save_for_backward(packed, probabilities)
        ctx.table = table
        return context

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed, probabilities = ctx.saved_tensors
        return attend_backward(gradient, packed, probabilities, ctx.table), None


def attend(qkv: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by batched products and one softmax, without autograd.

    Args:
        qkv: (B, T, H, 3, K).
        table: Rotary table (2, T, K/2) in the same precision, or None.

    Returns:
        Context (B, T, H, K), and what the backward needs: rotated q, k, v (3, B, H, T, K) and the
        probabilities (B, H, T, T).
    """
    batch, length, heads, _, width = qkv.shape
    with torch.autocast(qkv.device.type, enabled=False):
        if table is None:
            packed = qkv.permute(3, 0, 2, 1, 4).contiguous()
        else:
            packed = qkv.new_empty(3, batch, heads, length, width)
            parts = qkv.permute(3, 0, 2, 1, 4)
            packed[:2] = _rotate(parts[:2], *table)
            packed[2] = parts[2]
        q, k, v = packed.view(3, batch * heads, length, width).unbind(0)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(width**-0.5)
        probabilities = torch.softmax(scores, dim=-1)
        context = torch.bmm(probabilities, v).view(batch, heads, length, width)
    return context.transpose(1, 2).contiguous(), packed, probabilities.view(batch, heads, length, length)


def attend_backward(gradient: Tensor, packed: Tensor, probabilities: Tensor, table: Tensor | None) -> Tensor:
    """Gradient (B, T, H, 3, K) of ``attend``'s input, given that of its context (B, T, H, K); any subset of heads."""
    _, batch, heads, length, width = packed.shape
    q, k, v = packed.view(3, batch * heads, length, width).unbind(0)
    p = probabilities.view(batch * heads, length, length)
    with torch.autocast(packed.device.type, enabled=False):
        d_context = gradient.to(packed.dtype).transpose(1, 2).reshape(batch * heads, length, width)
        d_packed = torch.empty_like(packed)
        d_q, d_k, d_v = d_packed.view(3, batch * heads, length, width).unbind(0)
        torch.bmm(p.transpose(1, 2), d_context, out=d_v)
        d_probabilities = torch.bmm(d_context, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probabilities, p, -1, packed.dtype)
        d_scores.mul_(width**-0.5)
        torch.bmm(d_scores, k, out=d_q)
        torch.bmm(d_scores.transpose(1, 2), q, out=d_k)
        if table is not None:
            cos, sin = table
            d_packed[:2] = _rotate(d_packed[:2], cos, -sin)
        return d_packed.permute(1, 3, 2, 0, 4)
