"""The core of attention, from queries, keys and values to context, with frozen heads left out.

In ``cut`` active and frozen heads run apart, the frozen ones without gradients: any attention
kernel does. In ``exact`` the core is differentiated whole.

Shapes: B sequences, T queries, S keys, H query heads, G key-value heads (H when not grouped), K
head width. Units are key-value heads with the queries that share them.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mat.layers.double_backward import refuse_double_backward
from mat.layers.gate import Gate, Index, put, take
from mat.layers.site import Shares, of_this_set

# From q (B, h, T, K), k and v (B, g, S, K) and the index of the h heads to context (B, T, h, K),
# and attention weights (B, h, T, S) if the kernel has them.
Attend = Callable[[Tensor, Tensor, Tensor, Index], tuple[Tensor, Tensor | None]]


def attend_apart(
    gate: Gate, attend: Attend, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention that is differentiated through the active heads.

    Args:
        gate: The gate of the heads.
        attend: The attention kernel.
        q: (B, H, T, K).
        k: (B, G, S, K).
        v: (B, G, S, K).

    Returns:
        Context (B, T, H, K), and the attention weights (B, H, T, S) or None.
    """
    if gate.open or gate.mode == "exact":
        return attend(q, k, v, None)
    assert k.shape[1] == gate.n_units  # else some heads would be in neither part
    active, frozen, _ = gate.units()
    q_active, q_frozen, _ = gate.units(q.shape[1] // k.shape[1])
    with torch.no_grad():
        parts = take(q, q_frozen, 1), take(k, frozen, 1), take(v, frozen, 1)
        still, still_weights = attend(*parts, q_frozen)
    parts = take(q, q_active, 1), take(k, active, 1), take(v, active, 1)
    if gate.n_active:
        moving, weights = attend(*parts, q_active)
    else:  # nothing to attend with, but the projections' gradients are zeros rather than missing
        nothing = sum((part.sum((2, 3)) for part in parts[1:]), parts[0].sum((2, 3)))  # (B, 0)
        moving = nothing[:, None, :, None].expand(-1, q.shape[2], -1, q.shape[3])
        weights = still_weights
    heads = q_active, q_frozen, q.shape[1]
    context = _Join.apply(moving, still, *heads, 2)
    if still_weights is not None and gate.n_active:
        weights = _Join.apply(weights, still_weights, *heads, 1)
    joined: tuple[Tensor, Tensor | None] = of_this_set((context, weights), [gate])
    return joined


def core_shares(gate: Gate) -> Shares:
    """What the backward of :func:`attend_apart` runs of its products."""
    passed = gate.n_active if gate.mode == "cut" else gate.n_units
    return Shares(input_grad=Fraction(passed, gate.n_units))


def of_heads(bias: Tensor | None, index: Index, heads: int) -> Tensor | None:
    """The part of a mask or bias that is some heads'; it broadcasts to (B, H, T, S)."""
    if bias is None or bias.dim() != 4 or bias.shape[1] != heads or heads == 1:
        return bias
    return take(bias, index, 1)


class _Join(torch.autograd.Function):
    """Heads that are differentiated and heads that are not, in their order along an axis.

    Context (B, T, h, K) along axis 2, or attention weights (B, h, T, S) along axis 1.
    """

    @staticmethod
    def forward(
        ctx: Any, moving: Tensor, still: Tensor, active: Index, frozen: Index, heads: int, dim: int
    ) -> Tensor:
        ctx.active, ctx.dim = active, dim
        ctx.set_materialize_grads(False)
        assert moving.shape[dim] + still.shape[dim] == heads  # or memory would stay uninitialised
        shape = list(still.shape)
        shape[dim] = heads
        joined = still.new_empty(shape)
        put(joined, active, dim, moving.to(still.dtype))
        put(joined, frozen, dim, still)
        return joined

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        part = None if gradient is None else take(gradient, ctx.active, ctx.dim)
        return part, None, None, None, None, None
