"""Convolutions whose filters (rows of the kernel) or input channels (columns) belong to units.

One product forward. Backward, with r of the filters and s of the input channels open: an input
gradient from r to s channels, a weight gradient of r filters. Products on a few channels more or
less take the same time, so the open channels are filled up, see :func:`carried`.

Shapes: N images, I input channels, C filters, maps of H x W.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.double_backward import refuse_double_backward
from mat.layers.gate import Gate, GatedPart, Index, length, put, take
from mat.layers.linear import Way, bias_gradient, compute_dtype, home
from mat.layers.site import Operation, Shares, Site, compact_of, stand_in, with_compact
from mat.units import IntArray

BLOCK = 16  # channels that a product runs in
SHARE = 0.75  # of the channels: above it gathering costs more than it saves

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation


def carried(count: int, total: int) -> int:
    """Channels that a backward pass runs: whole blocks, or all where gathering does not pay.

    Args:
        count: Channels that it needs.
        total: Channels that there are.
    """
    filled = -(-count // BLOCK) * BLOCK
    return filled if filled <= SHARE * total else total


def carriers(gate: Gate, owner: IntArray) -> Index:
    """Index of the channels that a backward pass runs: the open ones first; None for all."""
    return gate.widen(owner, carried(gate.divide(owner)[2], len(owner)))


def geometry(module: nn.Conv2d) -> Geometry | None:
    """How a convolution moves over its input; None if it pads unevenly or not with zeros."""
    stride: Any = module.stride
    dilation: Any = module.dilation
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        return None
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            return None
        padding = tuple(r // 2 for r in reach)
    elif padding == "valid":
        padding = (0, 0)
    return stride, padding, dilation


class ConvolutionSite(Site):
    """A convolution without groups whose filters or input channels belong to units.

    Args:
        module: The convolution; :func:`geometry` knows it.
        weight: The gate's share of its kernel, by rows (filters) or by columns (input channels).
        bias: The gate's share of its bias, or None.
        below: In ``cut``: the gate whose units make the input, and the owner of each input channel.
    """

    module: nn.Conv2d

    def __init__(
        self,
        module: nn.Conv2d,
        weight: GatedPart,
        bias: GatedPart | None = None,
        below: tuple[Gate, IntArray] | None = None,
    ) -> None:
        super().__init__(module, weight.gate, below and below[0])
        self.weight, self.bias, self.below = weight, bias, below

    def way(self, executed: bool = True) -> Way:
        """What is differentiated, with the gates as they stand.

        Args:
            executed: Indices are :func:`carriers`; else of the open channels alone.
        """
        part, through, into = self.weight, None, None
        rows, columns = (part, None) if part.dim == 0 else (None, part)

        def index(gate: Gate, owner: IntArray) -> Index:
            return carriers(gate, owner) if executed else gate.divide(owner)[0]

        if part.gate.mode == "cut":
            own = index(part.gate, part.part.owner)
            through, into = (own, None) if rows is not None else (None, own)
        if self.below is not None and self.below[0].mode == "cut":
            into = index(*self.below)
        return Way(rows, columns, self.bias, through, into)

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; weight gradients are filled up in both modes."""
        way, filters = self.way(executed), self.module.out_channels
        shares = way.shares(self.module.weight)
        if executed and way.rows is not None:
            run = Fraction(carried(way.rows.count, filters), filters)
            return replace(shares, weight_grad=run)
        return shares

    def gated(self, x: Tensor) -> Tensor:
        """(N, I, H, W) to (N, C, H', W')."""
        way, moves = self.way(), geometry(self.module)
        assert moves is not None
        weight, bias = self.module.weight, self.module.bias
        values, compact = _Convolution.apply(
            x,
            compact_of(x, way.into),
            home(self.weight, weight),
            None if bias is None else home(self.bias, bias),
            weight.detach(),
            None if bias is None else bias.detach(),
            way,
            moves,
        )
        return with_compact(values, compact, way.through)


class _Convolution(torch.autograd.Function):
    """``F.conv2d``, and a backward of what :class:`Way` names.

    Inputs: x (N, I, H, W), its stand-in (N, s, H, W) or None, the homes of the gradients of kernel
    and bias, kernel (C, I, h, w), bias (C,) or None, the way, the geometry. Outputs: values
    (N, C, H', W'), stand-in (N, r, H', W') or None.
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
        moves: Geometry,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        y = F.conv2d(x, weight, None if bias is None else bias.to(dtype), *moves)
        part = way.rows or way.columns
        assert part is not None
        kept = None  # where nothing of the kernel trains
        if part.count:
            kept = take_channels(x, None if way.columns is None else part.active)
        ctx.way, ctx.moves, ctx.compact = way, moves, compact is not None
        ctx.homes = weight_home, bias_home
        ctx.shape, ctx.format = x.shape, memory_format(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, weight)
        return y, None if way.through is None else stand_in(y, length(way.through, y.shape[1]), 1)

    @staticmethod
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        way: Way = ctx.way
        wants_x, wants_compact, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        g = gathered_channels(dense, compact, way.through)  # (N, r, H', W')
        if g is None:
            return (None,) * 8
        g = g.to(weight.dtype)
        d_x = d_compact = None
        if (wants_x or wants_compact) and g.shape[1]:
            kernel = take_channels(passing(weight, way), way.into)  # (r, s, h, w)
            shape = (ctx.shape[0], kernel.shape[1], *ctx.shape[2:])
            like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=ctx.format)
            d = like
            if kernel.shape[1]:  # else nothing below wants a gradient
                d = product(g, like, kernel, ctx.moves, [True, False, False])[0]
            if ctx.compact:
                d_compact = d
            else:
                d_x = spread_channels(d, way.into, ctx.shape[1])
        d_weight, d_bias = parameter_gradients(ctx, g, x, weight, wants_weight, wants_bias)
        return d_x, d_compact, d_weight, d_bias, None, None, None, None


def is_cut(part: GatedPart) -> bool:
    """Whether nothing flows back through the frozen rows of a part."""
    return part.gate.mode == "cut"


def passing(weight: Tensor, way: Way) -> Tensor:
    """The filters that pass a gradient on (r, I, h, w), with zeros for those that only fill up."""
    part = way.rows
    if part is None or part.whole or not is_cut(part):
        return weight
    if way.through is None:
        zeroed = torch.zeros_like(weight)
        put(zeroed, part.active, 0, take(weight, part.active, 0))
        return zeroed
    filters = take_filters(weight, way.through)
    if len(filters) > part.count:  # a copy then, since those that fill up stand apart
        filters[part.count :] = 0
    return filters


def parameter_gradients(
    ctx: Any, g: Tensor, x: Tensor | None, weight: Tensor, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of kernel and bias for their homes, from that of the output (N, r, H', W')."""
    way: Way = ctx.way
    weight_home, bias_home = ctx.homes
    part = way.rows or way.columns
    assert part is not None
    open_rows = None if way.rows is None else way.rows.active
    rows = way.through
    if way.rows is not None and rows is None:
        rows = carriers(way.rows.gate, way.rows.part.owner)
        few = take_channels(g, rows)
    else:
        few = g
    # Of the filters that were run: those that train.
    trained = slice(0, part.count) if rows is not None else open_rows
    total = d_weight = None
    if x is not None and (wants_weight or wants_bias):
        shape = (few.shape[1], x.shape[1], *weight.shape[2:])
        like = torch.empty(
            shape, dtype=g.dtype, device=g.device, memory_format=memory_format(weight)
        )
        _, d_weight, total = product(few, x, like, ctx.moves, [False, wants_weight, wants_bias])
    if wants_weight:
        if d_weight is None:
            block = g.new_zeros(0, *part.rest_shape)
        else:
            block = take(d_weight, trained, 0) if way.columns is None else d_weight.transpose(0, 1)
        d_weight = part.deliver(block, weight_home)
    if not wants_bias:
        return d_weight, None
    of_rest = way.bias is None or (way.rows is not None and way.bias.active is not open_rows)
    if of_rest and way.rows is not None and not is_cut(way.rows):
        total, open_rows = g.sum((0, 2, 3)), None  # every filter's
    else:
        total = few.sum((0, 2, 3)) if total is None else total
        total = take(total, trained, 0)
    return d_weight, bias_gradient(total, way.bias, open_rows, bias_home)


def product(
    g: Tensor, x: Tensor, weight: Tensor, moves: Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, kernel and bias; the mask says which are formed."""
    stride, padding, dilation = moves
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], 1, mask
    )
    return gradients


# --- channels of maps (N, C, H, W)


def memory_format(maps: Tensor) -> torch.memory_format:
    """How maps lie in memory."""
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not maps.is_contiguous() else torch.contiguous_format


def take_channels(maps: Tensor, index: Index) -> Tensor:
    """Some channels, packed, in the maps' memory format."""
    if index is None:
        return maps
    form = memory_format(maps)
    if isinstance(index, Tensor) and form is torch.channels_last:
        stored = maps.permute(0, 2, 3, 1)  # (N, H, W, C)
        chosen = torch.gather(stored, 3, index.expand(*stored.shape[:3], -1))  # (N, H, W, k)
        return chosen.permute(0, 3, 1, 2)
    return take(maps, index, 1).contiguous(memory_format=form)


def take_filters(kernel: Tensor, index: Index) -> Tensor:
    """Some filters (k, I, h, w), in the kernel's memory format."""
    if memory_format(kernel) is torch.channels_last:
        return take(kernel.permute(0, 2, 3, 1), index, 0).permute(0, 3, 1, 2)
    return take(kernel, index, 0)


def spread_channels(maps: Tensor, index: Index, total: int) -> Tensor:
    """Maps of some channels among zeros for the others, in the same memory format."""
    if index is None:
        return maps
    shape = (maps.shape[0], total, *maps.shape[2:])
    every = torch.empty(
        shape, dtype=maps.dtype, device=maps.device, memory_format=memory_format(maps)
    )
    put(every.zero_(), index, 1, maps)
    return every


def gathered_channels(dense: Tensor | None, compact: Tensor | None, index: Index) -> Tensor | None:
    """The gradient of some channels, from that of the values, of the stand-in, or both."""
    part = None if dense is None else take_channels(dense, index)
    if compact is None:
        return part
    return compact if part is None else part + compact
