"""Linear layers: rows of a weight belong to units, or columns, or the input comes from units.

One product forward. Backward, with N positions, r of the output rows and s of the input columns
open: an input gradient of N x r x s, a weight gradient of N x r x I (rows) or N x O x s (columns).
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.double_backward import refuse_double_backward
from mat.layers.gate import Gate, GatedPart, Index, length, spread, take
from mat.layers.site import (
    Operation,
    Shares,
    Site,
    compact_of,
    gathered,
    rows_of,
    stand_in,
    with_compact,
)


@dataclass(frozen=True)
class Way:
    """What of a linear layer is differentiated.

    Attributes:
        rows: Gate's share of the weight's rows, or None.
        columns: Gate's share of the weight's columns, or None.
        bias: Gate's share of the bias, or None.
        through: Output rows that a gradient comes back through.
        into: Input columns that receive a gradient.
    """

    rows: GatedPart | None
    columns: GatedPart | None
    bias: GatedPart | None
    through: Index
    into: Index

    @property
    def silent(self) -> bool:
        """Whether the input gets no gradient: no row trains, and nobody waits for zeros.

        Data-parallel training waits for a gradient of every parameter, those below included; with
        compact gradients parameters that only frozen units read get none, and are left alone.
        """
        rows = self.rows
        return self.through is not None and rows is not None and rows.compact and not rows.count

    def shares(self, weight: Tensor) -> Shares:
        """What the backward of a product with a weight (O, I, ...) runs of it."""
        outputs, inputs = weight.shape[:2]
        passed = Fraction(length(self.through, outputs), outputs)
        received = Fraction(length(self.into, inputs), inputs)
        part = self.rows or self.columns
        trained = Fraction(1) if part is None else Fraction(part.count, weight.shape[part.dim])
        return Shares(input_grad=passed * received, weight_grad=trained)


class LinearSite(Site):
    """A linear layer: rows or columns of its weight belong to units, or its input comes from them.

    Args:
        module: The linear layer.
        weight: The gate's share of its weight, by rows or by columns, or None.
        bias: The gate's share of its bias, or None.
        below: In ``cut``: the gate whose units make the input, and the owner of each input column.
    """

    module: nn.Linear

    def __init__(
        self,
        module: nn.Linear,
        weight: GatedPart | None,
        bias: GatedPart | None = None,
        below: tuple[Gate, Any] | None = None,
    ) -> None:
        super().__init__(module, weight.gate if weight else None, below and below[0])
        self.weight, self.bias, self.below = weight, bias, below

    def way(self) -> Way:
        """What is differentiated, with the gates as they stand."""
        part = self.weight
        by_rows = part is not None and part.dim == 0
        rows, columns = (part, None) if by_rows else (None, part)
        through = rows.active if rows is not None and rows.gate.mode == "cut" else None
        into: Index = None
        if columns is not None and columns.gate.mode == "cut":
            into = columns.active
        elif self.below is not None and self.below[0].mode == "cut":
            into = self.below[0].divide(self.below[1])[0]
        return Way(rows, columns, self.bias, through, into)

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; there is no padding."""
        return self.way().shares(self.module.weight)

    def gated(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return product(x, self.module.weight, self.module.bias, self.way())


def product(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """``F.linear``, of which a way is differentiated: x (..., I), weight (O, I) to (..., O)."""
    values, compact = _Linear.apply(
        x,
        compact_of(x, way.into),
        home(way.rows or way.columns, weight),
        None if bias is None else home(way.bias, bias),
        weight.detach(),
        None if bias is None else bias.detach(),
        way,
    )
    return with_compact(values, compact, way.through)


def by_rows(weight: GatedPart, bias: GatedPart | None) -> Way:
    """The way of a layer whose rows belong to units."""
    cut = weight.gate.mode == "cut"
    return Way(weight, None, bias, weight.active if cut else None, None)


def home(part: GatedPart | None, weight: Tensor) -> Tensor:
    """What autograd differentiates in a weight's place."""
    return weight if part is None else part.home(weight)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision that a product of x runs in: autocast's where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Linear(torch.autograd.Function):
    """``F.linear``, and a backward of what :class:`Way` names.

    Inputs: x (..., I), its stand-in (..., s) or None, the homes of the gradients of weight and
    bias, weight (O, I), bias (O,) or None, the way. Outputs: values (..., O), stand-in (..., r) or
    None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compact: Tensor | None,
        weight_home: Tensor,
        bias_home: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        way: Way,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        y = F.linear(rows_of(x), weight, None if bias is None else bias.to(dtype))
        # No view of y: an activation may work on it in place.
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        part = way.rows or way.columns
        kept = None
        if part is None or part.count:
            kept = take(x, None if way.columns is None else way.columns.active, x.dim() - 1)
        ctx.way, ctx.homes, ctx.shape, ctx.compact = way, (weight_home, bias_home), x.shape, compact
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, weight)
        if way.through is None:
            return y, None
        assert way.rows is not None
        return y, stand_in(y, way.rows.count)

    @staticmethod
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        way: Way = ctx.way
        weight_home, bias_home = ctx.homes
        wants_x, wants_compact, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        g = gathered(dense, compact, way.through)  # (N, r)
        if g is None:
            return (None,) * 7
        g = g.to(weight.dtype)
        d_x = d_compact = d_weight = d_bias = None
        if (wants_x or wants_compact) and not way.silent:
            into = take(take(weight, way.through, 0), way.into, 1)  # (r, s)
            d = (g @ into).view(*ctx.shape[:-1], -1)
            if ctx.compact is not None:
                d_compact = d
            else:
                d_x = spread(d, way.into, d.dim() - 1, ctx.shape[-1])
        if wants_weight:
            d_weight = weight_gradient(g, x, way, weight_home)
        if wants_bias:
            d_bias = bias_gradient(g.sum(0), way.bias, way.through, bias_home)
        return d_x, d_compact, d_weight, d_bias, None, None, None


def weight_gradient(g: Tensor, x: Tensor | None, way: Way, home: Tensor) -> Tensor:
    """Gradient of a weight for its home, from that of the output (N, r) and the kept input."""
    part = way.rows or way.columns
    if part is None:
        assert x is not None
        return g.T @ rows_of(x)
    if x is None:
        return part.deliver(g.new_zeros(0, *part.rest_shape), home)
    x = rows_of(x)
    if way.rows is None:
        return part.deliver(x.T @ g, home)  # (k, O)
    return part.deliver(trained(g, part, way.through).T @ x, home)  # (k, I)


def bias_gradient(total: Tensor, part: GatedPart | None, through: Index, home: Tensor) -> Tensor:
    """Gradient of a bias for its home, from the sums (r,) over the output rows ``through``."""
    if part is None:
        return spread(total, through, 0, len(home))
    if part.active is not through:  # the bias is divided otherwise than the weight
        total = take(spread(total, through, 0, len(part.part.owner)), part.active, 0)
    return part.deliver(total, home)


def trained(g: Tensor, part: GatedPart, through: Index) -> Tensor:
    """The columns of an output's gradient whose rows of the weight train."""
    return take(g, part.active, 1) if through is None else g
