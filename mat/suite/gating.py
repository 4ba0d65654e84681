"""Where the suite's own models have units: the attention core of BERT and Switch, and experts.

Their linear layers, feed-forward networks and convolutions are found as any model's are.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mat.adapters.feedforward import Form, feed_forward
from mat.adapters.find import Place, finder, linear_site
from mat.layers.attention import core_shares
from mat.layers.double_backward import refuse_double_backward
from mat.layers.experts import Record, block
from mat.layers.gate import Gate, Index, put, take
from mat.layers.site import (
    Operation,
    Shares,
    Site,
    compact_of,
    gathered,
    stand_in,
    with_compact,
)
from mat.suite.models.bert import Attention, FeedForward
from mat.suite.models.switch import Backward, Experts, expert_mlp
from mat.units import Part, UnitLayer


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

    below = None if place.head_output else (place.path, owner_out)
    sites = [
        linear_site(place.path, place.under("qkv")),
        linear_site(place.path, place.under("out"), below),
        (place.path, core),
    ]
    yield UnitLayer("heads", place.path, units, parts, sites)


@finder
def groups(place: Place) -> Iterator[UnitLayer]:
    """The groups of hidden neurons of a feed-forward layer."""
    if isinstance(place.module, FeedForward):
        layer = feed_forward(place, Form(("up",), "activation", "down"))
        assert layer is not None
        yield layer


class CoreSite(Site):
    """The attention core: in ``cut`` active heads run with gradients, frozen ones without."""

    module: Attention

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        super().__init__(module, gate, method="core")
        self.gate = gate

    def gated(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 D) to context (B, T, D)."""
        if self.gate.mode == "exact":
            return cast(Tensor, self.original(qkv))
        width = self.module.head_width
        active, frozen, count = self.gate.units(3 * width)
        columns, others, context = self.gate.units(width)
        moving = qkv[..., :0]
        if count:
            moving = self.original(_Select.apply(qkv, compact_of(qkv, active), active))
        with torch.no_grad():
            still = self.original(take(qkv, frozen, 2))
        values, compact = _Join.apply(moving, still, columns, others, context)
        return with_compact(values, compact, columns)

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`."""
        return core_shares(self.gate)


class _Select(torch.autograd.Function):
    """Columns of x (..., C) as (..., k), whose gradient goes to the stand-in if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compact: Tensor | None, index: Index) -> Tensor:
        ctx.index, ctx.shape, ctx.compact = index, x.shape, compact is not None
        return take(x, index, x.dim() - 1).contiguous()

    @staticmethod
    @refuse_double_backward
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
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g = gathered(dense, compact, ctx.active)
        return None if g is None else g.view(ctx.shape), None, None, None, None


STACKED = ("in_weight", "in_bias", "out_weight", "out_bias")


@finder
def experts(place: Place) -> Iterator[UnitLayer]:
    """The experts of a layer: rows of its four stacked parameters."""
    if not isinstance(place.module, Experts):
        return
    count = place.module.experts
    parts = [Part(place.under(name), 0, np.arange(count)) for name in STACKED]

    def core(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> ExpertsSite:
        gate = gate_of(place.path)
        assert gate is not None
        return ExpertsSite(module, gate, place.under(""))

    recording = place.path, record_experts
    yield UnitLayer("experts", place.path, count, parts, [(place.path, core)], recording=recording)


class ExpertsSite(Site):
    """The experts' products: in ``cut`` those of frozen ones run without gradients."""

    module: Experts

    def __init__(self, module: nn.Module, gate: Gate, prefix: str) -> None:
        super().__init__(module, gate, method="core")
        self.gate = gate
        self.parts = [gate.parts[f"{prefix}{name}"] for name in STACKED]

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; empty slots are not needed, with tokens spread evenly."""
        if operation.weight:
            return Shares()  # the router's
        tokens, count = math.prod(operation.shape[:-1]), self.gate.n_units  # of x (B, T, D)
        capacity = self.module.capacity(tokens)

        def share(experts: int) -> Fraction:
            slots = experts * capacity
            used = slots if executed else min(slots, experts * tokens // count)
            return Fraction(used, count * capacity)

        trains, every = share(self.gate.n_active), share(count)
        return Shares(every, trains if self.gate.mode == "cut" else every, trains)

    def gated(self, rows: Tensor) -> Tensor:
        """Rows (E, C, D) through their experts."""
        active, frozen, _ = self.gate.units()
        weights = self.module.stacked()
        blocks = [block(part, weight) for part, weight in zip(self.parts, weights, strict=True)]
        exact = self.gate.mode == "exact"
        return expert_mlp(rows, weights, Backward(active, frozen, exact, tuple(blocks)))


def record_experts(module: Experts, record: Record, x: Tensor) -> Tensor:
    """What the layer computes, (B, T, D) to (B, T, D), for the estimator: no token is dropped."""
    return module.without_drops(x, record)
