"""Where the suite's own models have units: the attention core of BERT and Switch, and experts.

Their linear layers, feed-forward networks and convolutions are found as any model's are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mat.adapters.find import Place, finder, linear_site
from mat.layers.gate import Gate, Index, put, take
from mat.layers.site import Site, compact_of, gathered, stand_in, with_compact
from mat.suite.models.bert import Attention
from mat.units import UnitLayer


@finder
def heads(place: Place) -> Iterator[UnitLayer]:
    """The heads of an attention layer: rows of queries, keys and values, columns of the output."""
    if not isinstance(place.module, Attention):
        return
    units, width = place.module.heads, place.module.head_width
    owner_qkv = np.repeat(np.arange(units), 3 * width)
    owner_out = np.repeat(np.arange(units), width)
    parts = place.parts("qkv", owner_qkv, 0)
    if place.head_output:
        parts += place.parts("out", owner_out, 1)

    def core(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> CoreSite:
        gate = gate_of(place.path)
        assert gate is not None
        return CoreSite(module, gate)

    below = None if place.head_output else owner_out
    sites = [
        linear_site(place.path, place.under("qkv")),
        linear_site(place.path, place.under("out"), below),
        (place.path, core),
    ]
    yield UnitLayer("heads", place.path, units, parts, sites)


class CoreSite(Site):
    """The attention core: in ``cut`` active heads run with gradients, frozen ones without."""

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        super().__init__(module, gate, method="core")
        self.gate = gate

    def gated(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 D) to context (B, T, D)."""
        if self.gate.mode == "exact":
            return self.original(qkv)
        width = self.module.head_width
        active, frozen, count = self.gate.units(3 * width)
        columns, others, context = self.gate.units(width)
        if not count:
            moving = qkv[..., :0]
        else:
            moving = self.original(_Select.apply(qkv, compact_of(qkv, active), active))
        with torch.no_grad():
            still = self.original(take(qkv, frozen, 2))
        values, compact = _Join.apply(moving, still, columns, others, context)
        return with_compact(values, compact, columns)


class _Select(torch.autograd.Function):
    """Columns of x (..., C) as (..., k), whose gradient goes to the stand-in if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compact: Tensor | None, index: Index) -> Tensor:
        ctx.index, ctx.shape, ctx.compact = index, x.shape, compact is not None
        return take(x, index, x.dim() - 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compact:
            return None, gradient, None
        whole = gradient.new_zeros(ctx.shape)
        put(whole, ctx.index, whole.dim() - 1, gradient)
        return whole, None, None


class _Join(torch.autograd.Function):
    """Columns that are differentiated and columns that are not, in their order, and a stand-in."""

    @staticmethod
    def forward(
        ctx: Any, moving: Tensor, still: Tensor, active: Index, frozen: Index, count: int
    ) -> tuple[Tensor, Tensor]:
        ctx.active, ctx.shape = active, moving.shape
        ctx.set_materialize_grads(False)
        joined = still.new_empty(*still.shape[:-1], still.shape[-1] + count)
        if count:
            put(joined, active, joined.dim() - 1, moving)
        put(joined, frozen, joined.dim() - 1, still)
        return joined, stand_in(joined, count)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g = gathered(dense, compact, ctx.active)
        return None if g is None else g.view(ctx.shape), None, None, None, None
