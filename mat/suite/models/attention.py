"""Scaled dot-product attention for short sequences, rotary embedding included.

On CUDA PyTorch's fused kernel runs. On a CPU that kernel spends most of a small BERT's step in its
backward (128 tokens, heads of 32: 40 % of the whole step), where batched products and one saved
softmax are several times faster.

Shapes: B sequences, T tokens, H heads, K head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mat.layers.double_backward import refuse_double_backward


def rotary_table(length: int, head_width: int) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al. 2021), (2, T, K / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K / 2) of (..., T, K) by angles (T, K / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(qkv: Tensor, table: Tensor | None) -> Tensor:
    """Attention of every token to every token of its sequence.

    Args:
        qkv: (B, T, H, 3, K) queries, keys and values.
        table: Rotary table (2, >= T, K / 2) to rotate queries and keys by, or None.

    Returns:
        Context (B, T, H, K), contiguous.
    """
    if table is not None:
        table = table[:, : qkv.shape[1]].to(qkv.dtype)
    if qkv.device.type == "cpu":
        context: Tensor = _Attention.apply(qkv, table)
        return context
    q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (B, H, T, K) each
    if table is not None:
        q, k = rotate(q, *table), rotate(k, *table)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def attention_matrices(qkv: Tensor, table: Tensor | None) -> Tensor:
    """The attention matrices (B, H, T, T) of the same arguments, without gradients."""
    if table is not None:
        table = table[:, : qkv.shape[1]].to(qkv.dtype)
    probabilities = _attend(qkv.detach(), table)[2]  # (B H, T, T)
    return probabilities.view(qkv.shape[0], qkv.shape[2], *probabilities.shape[1:])


def _attend(qkv: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Context (B, T, H, K), rotated q, k, v (3, B, H, T, K) and probabilities (B H, T, T)."""
    parts = qkv.permute(3, 0, 2, 1, 4)  # (3, B, H, T, K)
    with torch.autocast(qkv.device.type, enabled=False):
        if table is None:
            packed = parts.contiguous()
        else:
            packed = qkv.new_empty(parts.shape)
            packed[:2] = rotate(parts[:2], *table)
            packed[2] = parts[2]
        q, k, v = packed.flatten(1, 2).unbind(0)  # (B H, T, K) each
        scores = torch.bmm(q, k.mT).mul_(q.shape[2] ** -0.5)
        probabilities = scores.softmax(-1)
        context = torch.bmm(probabilities, v).view(parts.shape[1:])  # (B, H, T, K)
    return context.transpose(1, 2).contiguous(), packed, probabilities


class _Attention(torch.autograd.Function):
    """``_attend`` with its backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor | None) -> Tensor:
        context, packed, probabilities = _attend(qkv, table)
        ctx.save_for_backward(packed, probabilities)
        ctx.table = table
        return context

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed, p = ctx.saved_tensors
        q, k, v = packed.flatten(1, 2).unbind(0)  # (B H, T, K) each
        with torch.autocast(packed.device.type, enabled=False):
            d_context = gradient.to(packed.dtype).transpose(1, 2).reshape(q.shape)
            d_packed = torch.empty_like(packed)
            d_q, d_k, d_v = d_packed.flatten(1, 2).unbind(0)
            torch.bmm(p.mT, d_context, out=d_v)
            d_p = torch.bmm(d_context, v.mT)  # (B H, T, T)
            d_scores = torch._softmax_backward_data(d_p, p, -1, packed.dtype)
            d_scores.mul_(q.shape[2] ** -0.5)
            torch.bmm(d_scores, k, out=d_q)
            torch.bmm(d_scores.mT, q, out=d_k)
            if ctx.table is not None:
                cos, sin = ctx.table
                d_packed[:2] = rotate(d_packed[:2], cos, -sin)
            return d_packed.permute(1, 3, 2, 0, 4), None  # (B, T, H, 3, K)
