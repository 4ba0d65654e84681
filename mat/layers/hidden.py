"""Hidden layers: the first matrices of a feed-forward network and its activation, as one layer.

Units are groups of hidden neurons: rows of the first matrix (with a gated activation: of both) with
their biases. The columns of the last matrix are ``mat.layers.linear``'s. In ``cut`` the activation
of frozen neurons is not differentiated, and nothing of them is kept.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.double_backward import refuse_double_backward
from mat.layers.gate import GatedPart, take
from mat.layers.linear import Way, bias_gradient, by_rows, compute_dtype, home, weight_gradient
from mat.layers.site import Operation, Shares, Site, gathered, rows_of, stand_in, with_compact

Activation = Callable[..., Tensor]


class HiddenSite(Site):
    """A module that computes ``activation(*(first(x) for first in firsts))``.

    The first matrices are not called as modules. Once one of them has hooks or another module in
    its place (LoRA), the module runs untouched, and a warning says so.

    Args:
        module: The module whose forward that is.
        firsts: Its first matrices, one or two.
        weights, biases: The gate's shares of them.
        activation: From their outputs (..., F) to the hidden neurons (..., F), elementwise.
        last: What the module does with the hidden neurons afterwards, if anything.
        method: The method that this is.
    """

    def __init__(
        self,
        module: nn.Module,
        firsts: Sequence[nn.Linear],
        weights: Sequence[GatedPart],
        biases: Sequence[GatedPart | None],
        activation: Activation,
        last: Callable[[Tensor], Tensor] | None = None,
        method: str = "forward",
    ) -> None:
        super().__init__(module, weights[0].gate, method=method)
        self.firsts, self.weights, self.biases = tuple(firsts), tuple(weights), tuple(biases)
        self.activation, self.last = activation, last
        self.names = [name for name, child in module.named_children() if child in self.firsts]
        self.warned = False

    def untouched(self, *inputs: Any) -> bool:
        """Whether the module runs as ever."""
        return super().untouched(*inputs) or self._changed()

    def _changed(self) -> bool:
        """Whether calling a first matrix does more than its product."""
        for name in self.names:
            first = getattr(self.module, name)
            hooks = first._forward_hooks, first._forward_pre_hooks, first._backward_hooks
            if first in self.firsts and not any(hooks) and "forward" not in vars(first):
                continue
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"{name} of a {type(self.module).__name__} has changed since MAT was attached: "
                    "its frozen units cost a whole backward pass; attach after LoRA and hooks",
                    stacklevel=2,
                )
            return True
        return False

    def ways(self) -> list[Way]:
        """What is differentiated of every first matrix, with the gate as it stands."""
        return [by_rows(*pair) for pair in zip(self.weights, self.biases, strict=True)]

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; the first matrices are alike."""
        return self.ways()[0].shares(self.firsts[0].weight)

    def gated(self, x: Tensor) -> Tensor:
        """(..., D) to the hidden neurons (..., F), or to what ``last`` makes of them."""
        homes, values, ways = [], [], self.ways()
        for first, weight, bias in zip(self.firsts, self.weights, self.biases, strict=True):
            homes += [home(weight, first.weight), home(bias, first.bias)]
            values += [first.weight.detach(), None if first.bias is None else first.bias.detach()]
        hidden, compact = _Hidden.apply(x, self.activation, ways, *homes, *values)
        hidden = with_compact(hidden, compact, ways[0].through)
        return hidden if self.last is None else self.last(hidden)


class _Hidden(torch.autograd.Function):
    """All neurons forward; backward through the active ones (``cut``), or all (``exact``).

    Inputs: x (..., D), activation, a way per first matrix, homes and values of weights and biases.
    Outputs: hidden neurons (..., F), stand-in (..., k) or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, ways: list[Way], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(x)
        x = x.to(dtype)
        homes, values = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        values = tuple(None if v is None else v.to(dtype) for v in values)
        pairs = zip(values[::2], values[1::2], strict=True)
        z = [F.linear(x, weight, bias) for weight, bias in pairs if weight is not None]
        hidden = activation(*z)
        index, part = ways[0].through, ways[0].rows
        assert part is not None
        ctx.ways, ctx.activation, ctx.homes = ways, activation, homes
        ctx.autocast = (
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *values[::2], *(take(each, index, each.dim() - 1) for each in z))
        return hidden, None if index is None else stand_in(hidden, part.count)

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, dense: Tensor | None, compact: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.ways)
        saved = ctx.saved_tensors  # once: checkpointing recomputes at every access
        x, weights, z = saved[0], saved[1 : 1 + count], saved[1 + count :]
        through = ctx.ways[0].through
        g = gathered(dense, compact, through)  # (N, r)
        if g is None:
            return (None,) * (3 + 4 * count)
        leaves = [rows_of(each.detach()).requires_grad_() for each in z]
        with torch.enable_grad(), torch.autocast(x.device.type, ctx.autocast[1], ctx.autocast[0]):
            # Views: trackers of modules, such as torch's FLOPs counter, cannot hook leaves here.
            hidden = ctx.activation(*(leaf.view_as(leaf) for leaf in leaves))
        d_z = torch.autograd.grad(hidden, leaves, g.to(hidden.dtype))
        d_x: Tensor | None = None
        grads: list[Tensor | None] = []
        for i, (way, weight, d) in enumerate(zip(ctx.ways, weights, d_z, strict=True)):
            if ctx.needs_input_grad[0] and not way.silent:
                down = d @ take(weight, through, 0)  # (N, D)
                d_x = down if d_x is None else d_x + down
            weight_home, bias_home = ctx.homes[2 * i : 2 * i + 2]
            wants_weight, wants_bias = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            kept = x if way.rows.count else None
            grads.append(weight_gradient(d, kept, way, weight_home) if wants_weight else None)
            grads.append(
                bias_gradient(d.sum(0), way.bias, through, bias_home) if wants_bias else None
            )
        if d_x is not None:
            d_x = d_x.view(x.shape)
        return d_x, None, None, *grads, *[None] * (2 * count)
