"""``nn.MultiheadAttention`` with frozen heads.

Shapes: B sequences, T queries, S keys, E width, H heads, K = E / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.attention import attend_apart, core_shares, of_heads
from mat.layers.gate import Gate, GatedPart, Index
from mat.layers.linear import by_rows, product
from mat.layers.site import Operation, Shares, Site
from mat.units import Part


class MultiheadSite(Site):
    """An attention module whose queries, keys and values are stacked in one matrix (3E, E).

    Args:
        module: The module.
        gate: The gate of its heads.
        weight: The gate's share of the stacked matrix.
        bias: Of its bias (3E,), if it has one.
    """

    module: nn.MultiheadAttention

    def __init__(
        self, module: nn.MultiheadAttention, gate: Gate, weight: GatedPart, bias: GatedPart | None
    ) -> None:
        super().__init__(module, gate)
        self.gate, self.weight, self.bias = gate, weight, bias

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; the output projection has a site of its own."""
        if operation.weight.endswith("in_proj_weight"):
            return by_rows(self.weight, self.bias).shares(self.module.in_proj_weight)
        return core_shares(self.gate)

    def gated(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (T, B, E), (B, T, E) or (T, E).

        ``is_causal`` is a hint that ``attn_mask`` is causal; the mask itself is used.
        """
        batched = query.dim() == 3
        swap = batched and not self.module.batch_first
        if query is key and key is value:
            x = self.batch_first(query)
            stacked = product(
                x,
                self.module.in_proj_weight,
                self.module.in_proj_bias,
                by_rows(self.weight, self.bias),
            )
            projected = list(stacked.chunk(3, -1))  # (B, T, E) each
        else:
            projected = self.project_apart(query, key, value)
        q, k, v = (  # (B, T, E) to (B, H, T, K)
            each.view(*each.shape[:2], self.gate.n_units, -1).transpose(1, 2) for each in projected
        )
        mask = merged(attn_mask, key_padding_mask, q)

        def attend(q: Tensor, k: Tensor, v: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
            own = of_heads(mask, index, self.gate.n_units)
            dropout = self.module.dropout if self.module.training else 0.0
            if not need_weights:
                context = F.scaled_dot_product_attention(q, k, v, own, dropout)
                return context.transpose(1, 2), None
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, h, T, S)
            weights = (scores if own is None else scores + own).softmax(-1)
            weights = F.dropout(weights, dropout)
            return (weights @ v).transpose(1, 2), weights

        context, weights = attend_apart(self.gate, attend, q, k, v)
        out = self.module.out_proj(context.flatten(2))  # (B, T, H, K) to (B, T, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if swap:
            out = out.transpose(0, 1)
        elif not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def batch_first(self, x: Tensor) -> Tensor:
        """(B, T, E)."""
        if x.dim() == 2:
            return x[None]
        return x if self.module.batch_first else x.transpose(0, 1)

    def project_apart(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values of different inputs, each by its third of the stacked matrix."""
        owner = self.weight.part.owner[: self.module.embed_dim]
        weights = self.module.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.bias is None else self.module.in_proj_bias.chunk(3)
        projected = []
        for x, weight, bias in zip(inputs, weights, biases, strict=True):
            rows = GatedPart(self.gate, self.weight.parameter, Part("", 0, owner))
            projected.append(product(self.batch_first(x), weight, bias, by_rows(rows, rows)))
        return projected


def merged(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores and broadcasts to (B, H, T, S).

    Args:
        attn_mask: (T, S) or (B H, T, S), boolean (True: hidden) or added.
        padding: (B, S) or (S,), likewise.
        q: (B, H, T, K).
    """
    masks = []
    if attn_mask is not None:
        every = attn_mask.dim() == 3
        masks.append(attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if every else attn_mask)
    if padding is not None:
        masks.append(padding.view(q.shape[0], 1, 1, -1))
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(q.dtype)
        for mask in masks
    ]
    return sum(added[1:], added[0]) if added else None
