"""What stands between convolutions and keeps channels apart: batch norm, ReLU, max pooling.

In ``cut`` these run backward on the channels that carry a gradient alone. A batch norm's affine
pair belongs to the filters before it; frozen filters are still normalised by the batch and go on
updating running statistics.

Shapes: maps (N, C, H, W), of which k channels carry a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.convolution import (
    carriers,
    gathered_channels,
    memory_format,
    spread_channels,
    take_channels,
)
from mat.layers.double_backward import refuse_double_backward
from mat.layers.gate import Gate, GatedPart, Index, length, take
from mat.layers.linear import home
from mat.layers.site import Site, compact_of, note_of, stand_in, with_compact
from mat.units import IntArray


class NormSite(Site):
    """The batch norm behind a convolution.

    Args:
        module: The batch norm.
        gate: The gate of the filters.
        owner: (C,) whose each channel is.
        weight, bias: The gate's shares of its affine pair, or None.
    """

    module: nn.BatchNorm2d

    def __init__(
        self,
        module: nn.BatchNorm2d,
        gate: Gate,
        owner: IntArray,
        weight: GatedPart | None,
        bias: GatedPart | None,
    ) -> None:
        super().__init__(module, gate)
        self.gate, self.owner, self.weight, self.bias = gate, owner, weight, bias

    def gated(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W), normalised."""
        norm = self.module
        through = carriers(self.gate, self.owner) if self.gate.mode == "cut" else None
        momentum = norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        by_batch = norm.training or norm.running_mean is None
        running: tuple[Tensor | None, Tensor | None] = norm.running_mean, norm.running_var
        if norm.training and not norm.track_running_stats:
            running = None, None
        options = by_batch, momentum or 0.0, norm.eps
        weight, bias = norm.weight, norm.bias
        values, compact = _Norm.apply(
            x,
            compact_of(x, through),
            None if weight is None else home(self.weight, weight),
            None if bias is None else home(self.bias, bias),
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
            (self.weight, self.bias),
            through,
            running,
            options,
        )
        return with_compact(values, compact, through)


class _Norm(torch.autograd.Function):
    """``F.batch_norm``, and a backward of some channels, and of the affine pairs that train.

    Inputs: x, its stand-in or None, homes and values of gain and shift, their parts, the channels,
    running statistics, options. Outputs: values, stand-in (N, k, H, W) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compact: Tensor | None,
        gain_home: Tensor | None,
        shift_home: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        parts: tuple[GatedPart | None, GatedPart | None],
        through: Index,
        running: tuple[Tensor | None, Tensor | None],
        options: tuple[bool, float, float],
    ) -> tuple[Tensor, Tensor | None]:
        by_batch, momentum, eps = options
        y, mean, inverse = torch.native_batch_norm(
            x, gain, shift, *running, by_batch, momentum, eps
        )
        ctx.through, ctx.parts, ctx.options = through, parts, options
        ctx.homes, ctx.compact, ctx.total = (gain_home, shift_home), compact is not None, x.shape[1]
        fixed = (None, None) if by_batch else running
        saved = (mean, inverse) if by_batch else (None, None)
        ctx.save_for_backward(
            take_channels(x, through),
            *(None if each is None else take(each, through, 0) for each in (gain, *fixed, *saved)),
        )
        ctx.set_materialize_grads(False)
        return y, None if through is None else stand_in(y, length(through, y.shape[1]), 1)

    @staticmethod
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, gain, *statistics = ctx.saved_tensors
        g = gathered_channels(dense, compact, ctx.through)  # (N, k, H, W)
        if g is None:
            return (None,) * 10
        by_batch, _, eps = ctx.options
        d_x: Tensor | None = g
        sums: list[Tensor | None] = [g.new_zeros(0), g.new_zeros(0)]
        if g.shape[1]:
            mask = [any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]]
            d_x, *sums = torch.ops.aten.native_batch_norm_backward(
                g.to(x.dtype), x, gain, *statistics, by_batch, eps, mask
            )
        affine: list[Tensor | None] = [None, None]
        for i, (part, total, own) in enumerate(zip(ctx.parts, sums, ctx.homes, strict=True)):
            if ctx.needs_input_grad[2 + i] and total is not None:
                assert part is not None and own is not None
                kept = part.active if ctx.through is None else slice(0, part.count)
                affine[i] = part.deliver(take(total, kept, 0), own)
        if ctx.compact or d_x is None:
            return None, d_x, *affine, *[None] * 6
        return spread_channels(d_x, ctx.through, ctx.total), None, *affine, *[None] * 6


class ChannelSite(Site):
    """A module that passes stand-ins on; it runs untouched where there is none."""

    def untouched(self, *inputs: Any) -> bool:
        """Whether the input has no stand-in."""
        return note_of(inputs[0]) is None or not torch.is_grad_enabled()


class ReluSite(ChannelSite):
    """A ReLU behind a gated layer."""

    module: nn.ReLU

    def gated(self, x: Tensor) -> Tensor:
        """Maps to maps, in place where the module works in place."""
        note = note_of(x)
        assert note is not None
        values, compact = _Relu.apply(x, note.stand_in, note.index, self.module.inplace)
        return with_compact(values, compact, note.index)


class _Relu(torch.autograd.Function):
    """Inputs: x, its stand-in (N, k, H, W), the channels, whether x is overwritten."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compact: Tensor, index: Index, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.index = index
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(take_channels(y, index))
        return y, stand_in(y, length(index, y.shape[1]), 1)

    @staticmethod
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        g = gathered_channels(dense, compact, ctx.index)
        if g is None or not g.shape[1]:
            return None, g, None, None
        return None, torch.ops.aten.threshold_backward(g, y, 0), None, None


class PoolSite(ChannelSite):
    """A max pool behind a gated layer."""

    module: nn.MaxPool2d

    def gated(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H', W')."""
        note = note_of(x)
        assert note is not None
        pool = self.module
        options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        values, compact = _Pool.apply(x, note.stand_in, note.index, options)
        return with_compact(values, compact, note.index)


class _Pool(torch.autograd.Function):
    """Inputs: x, its stand-in (N, k, H, W), the channels, the pool's options."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compact: Tensor, index: Index, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        y, places = F.max_pool2d(x, *options, return_indices=True)
        ctx.index, ctx.options = index, options
        ctx.shape, ctx.format = (
            (x.shape[0], length(index, x.shape[1]), *x.shape[2:]),
            memory_format(x),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(take_channels(places, index))
        return y, stand_in(y, length(index, y.shape[1]), 1)

    @staticmethod
    @refuse_double_backward
    def backward(
        ctx: Any, dense: Tensor | None, compact: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        g = gathered_channels(dense, compact, ctx.index)
        if g is None:
            return (None,) * 4
        like = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=ctx.format)
        if g.shape[1]:
            pair = [
                (o, o) if isinstance(o, int) and not isinstance(o, bool) else o for o in ctx.options
            ]
            like = torch.ops.aten.max_pool2d_with_indices_backward(g, like, *pair, places)
        return None, like, None, None
