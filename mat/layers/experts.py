"""Mixtures of experts: a unit is a whole expert, a module of its own or a row of stacked weights.

No product is written here: the model's own code runs on the tokens of active experts and, apart
from them, on those of frozen ones: in ``cut`` without gradients, in ``exact`` with weights that
need none. So derivatives of any order are autograd's. The router learns from all experts in both
modes: its gradient needs their forward values only.

Shapes: N tokens, D width, K experts per token, S = N * K pairs of a token and an expert, E experts.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mat.layers.gate import Gate, GatedPart, take
from mat.layers.site import Operation, Shares, Site
from mat.units import IntArray

# From names of weight and bias (or None) in the module, number of the expert, rows of the input
# (n, I) and of the product (n, O), and the numbers of their tokens (n,), to the product that the
# module goes on with.
Record = Callable[[str, str | None, int, Tensor, Tensor, Tensor], Tensor]


class ExpertSite(Site):
    """One expert that is a module of its own.

    Args:
        module: The expert.
        gate: The gate of all experts of the layer.
        unit: Which of them it is.
    """

    def __init__(self, module: nn.Module, gate: Gate, unit: int) -> None:
        super().__init__(module, gate)
        self.gate, self.unit = gate, unit

    def gated(self, *inputs: Any, **named: Any) -> Any:
        """What the expert computes."""
        if self.gate.active[self.unit]:
            return self.original(*inputs, **named)
        if self.gate.mode == "cut":
            with torch.no_grad():
                return self.original(*inputs, **named)
        weights = {name: weight.detach() for name, weight in self.module.named_parameters()}
        return call_with(self, weights, *inputs, **named)

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`."""
        return expert_shares(self.gate, [self.unit])


class MixtureSite(Site):
    """The module that sends tokens to experts that are modules of their own.

    It may send none to an expert, or run it without gradients; all the same the gradients of frozen
    experts are zeros, as those of frozen slices are everywhere.

    Args:
        module: The module.
        gate: The gate of its experts.
        parts: The gate's shares of all their parameters, by name in the module.
    """

    def __init__(self, module: nn.Module, gate: Gate, parts: dict[str, GatedPart]) -> None:
        super().__init__(module, gate)
        self.parts = parts

    def gated(self, *inputs: Any, **named: Any) -> Any:
        """What the module computes: a tensor, or a tuple that starts with one."""
        result = self.original(*inputs, **named)
        frozen = {name: part for name, part in self.parts.items() if not part.count}
        if isinstance(result, tuple):
            return reaching(result[0], self.module, frozen), *result[1:]
        return reaching(result, self.module, frozen)


class StackedSite(Site):
    """Experts with stacked weights: ``forward(x, index, weights)`` of transformers' expert layers.

    The forward is called with one expert per row and weight one, for the pairs of active experts
    and for those of frozen ones: whatever implementation the model has chosen computes them.

    Args:
        module: The expert layer.
        gate: The gate of its experts.
        parts: The gate's shares of the stacked weights (E, ...), by name in the module.
    """

    def __init__(self, module: nn.Module, gate: Gate, parts: dict[str, GatedPart]) -> None:
        super().__init__(module, gate)
        self.gate, self.parts = gate, parts

    def gated(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens (N, D), their experts (N, K) and the experts' weights (N, K) to (N, D)."""
        expert = index.flatten()  # (S,)
        moves = torch.from_numpy(self.gate.active).to(x.device)[expert]
        order = moves.argsort(descending=True, stable=True)  # pairs of active experts first
        count = int(moves.sum())
        outputs = []
        for pairs, moving in ((order[:count], True), (order[count:], False)):
            if len(pairs):
                one = weights.new_ones(len(pairs), 1)
                rows = x.index_select(0, pairs // index.shape[1])  # (s, D)
                outputs.append(self._run(moving, rows, expert[pairs, None], one))
        every = torch.cat(outputs).index_select(0, order.argsort())  # (S, D)
        y: Tensor = (every.view(*index.shape, -1) * weights[..., None]).sum(1).to(x.dtype)  # (N, D)
        return y if count else reaching(y, self.module, self.parts)

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`; an implementation that hides who computes counts all alike."""
        rows = operation.stacked or (1,) * self.gate.n_units
        return expert_shares(self.gate, np.repeat(np.arange(self.gate.n_units), rows))

    def _run(self, moving: bool, *inputs: Tensor) -> Any:
        """The experts' outputs; gradients reach the weights if the pairs are of active experts."""
        tensors = {name: getattr(self.module, name) for name in self.parts}
        if moving:
            weights = {name: stacked(part, tensors[name]) for name, part in self.parts.items()}
            return call_with(self, weights, *inputs)
        with torch.set_grad_enabled(self.gate.mode == "exact"):
            return call_with(self, {name: w.detach() for name, w in tensors.items()}, *inputs)


def expert_shares(gate: Gate, units: Sequence[int] | IntArray) -> Shares:
    """What runs of a product of a frozen or active expert for each of its rows.

    Args:
        gate: The gate of the experts.
        units: (rows,) the expert of each.
    """
    active = gate.active[units]
    trains = Fraction(int(active.sum()), len(active)) if len(active) else Fraction(1)
    return Shares(input_grad=trains if gate.mode == "cut" else Fraction(1), weight_grad=trains)


class _Own(nn.Module):
    """A module whose forward is the one that a site stands in for."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.module, self.run = site.module, site.original

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(*inputs, **named)


def call_with(site: Site, weights: dict[str, Tensor], *inputs: Any, **named: Any) -> Any:
    """A module's own forward with other tensors in the place of its parameters."""
    own = {f"module.{name}": weight for name, weight in weights.items()}
    result: Any = functional_call(_Own(site), own, inputs, named)
    return result


def reaching(y: Tensor, module: nn.Module, parts: dict[str, GatedPart]) -> Tensor:
    """The same values; a backward pass through them gives the parts' parameters zero gradients.

    Args:
        y: Any tensor.
        module: The module that has the parameters.
        parts: By name in the module.
    """
    tensors: list[Any] = [reduce(getattr, name.split("."), module) for name in parts]
    shares = list(parts.values())
    homes = [part.home(tensor) for part, tensor in zip(shares, tensors, strict=True)]
    result: Tensor = _Reaching.apply(y, shares, *homes)
    return result


class _Reaching(torch.autograd.Function):
    """Identity of the first input; zeros for the homes of parts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, parts: Sequence[GatedPart], *homes: Tensor) -> Tensor:
        ctx.parts, ctx.homes = parts, homes
        ctx.set_materialize_grads(False)  # nothing flows down where nothing comes
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = (
            part.deliver(home.new_zeros(part.count, *part.rest_shape), home)
            for part, home in zip(ctx.parts, ctx.homes, strict=True)
        )
        return gradient, None, *zeros


def stacked(part: GatedPart, weight: Tensor) -> Tensor:
    """A stacked weight (E, ...) that passes its active rows' gradient to the part's home."""
    home = part.home(weight)
    if home is weight:
        return weight
    values: Tensor = _Stacked.apply(home, weight.detach(), part)
    return values


def block(part: GatedPart, weight: Tensor) -> Tensor:
    """A stand-in for the rows (a, ...) of active experts, without memory or meaningful values.

    Give it the gradient of those rows of a stacked weight, and it goes to the weight's home.
    """
    home = part.home(weight)
    if home is not weight:
        return home
    empty = weight.detach().new_zeros(()).expand(part.count, *weight.shape[1:])
    result: Tensor = _Stacked.apply(home, empty, part)
    return result


class _Stacked(torch.autograd.Function):
    """Rows of all experts or of the active ones, whose gradient goes to the home of their part."""

    @staticmethod
    def forward(ctx: Any, home: Tensor, values: Tensor, part: GatedPart) -> Tensor:
        ctx.home, ctx.part = home, part
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        part: GatedPart = ctx.part
        every = len(gradient) == len(part.part.owner)
        block = take(gradient, part.active, 0).contiguous() if every else gradient
        return part.deliver(block, ctx.home), None, None


def record_stacked(
    module: Any, record: Record, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What a layer of stacked experts computes, showing every expert's products to the estimator.

    Args:
        module: The layer, attached or not.
        record: Called with each product of each expert that has tokens.
        x: (N, D).
        index: (N, K) experts of each token.
        weights: (N, K).
    """

    def product(name: str, unit: int, rows: Tensor, token: Tensor) -> Tensor:
        weight = getattr(module, name)[unit]
        y = rows @ (weight if module.is_transposed else weight.T)
        bias = f"{name}_bias" if module.has_bias else None
        if bias is not None:
            y = y + getattr(module, bias)[unit]
        return record(name, bias, unit, rows, y, token)

    y = torch.zeros_like(x)
    for unit in range(module.num_experts):
        token, place = torch.where(index == unit)
        if not len(token):
            continue
        if module.has_gate:
            hidden = module._apply_gate(product("gate_up_proj", unit, x[token], token))
        else:
            hidden = module.act_fn(product("up_proj", unit, x[token], token))
        rows = product("down_proj", unit, hidden, token)
        if module.has_post_expert_norm:
            rows = module.post_expert_norm(rows)
        y = y.index_add(0, token, (rows * weights[token, place, None]).to(y.dtype))
    return y


def record_separate(
    module: nn.ModuleDict, record: Record, x: Tensor, selected: Tensor, weights: Tensor
) -> Tensor:
    """The same of experts that are modules of their own, linear layers of which each is a product.

    Args:
        module: The experts, attached or not.
        record: Called with each product of each expert that has tokens.
        x: (N, D).
        selected: (N, 1, E) nonzero at each token's expert.
        weights: (N, 1).
    """

    def hook(path: str, linear: nn.Linear, unit: int, token: Tensor) -> Callable[..., Tensor]:
        weight, bias = f"{path}.weight", None if linear.bias is None else f"{path}.bias"
        return lambda _, inputs, rows: record(weight, bias, unit, inputs[0], rows, token)

    y = torch.zeros_like(x)
    for unit, (child, expert) in enumerate(module.items()):
        token = selected[:, 0, unit].nonzero()[:, 0]
        if not len(token):
            continue
        hooks = [
            linear.register_forward_hook(hook(path, linear, unit, token))
            for path, linear in expert.named_modules(prefix=child)
            if isinstance(linear, nn.Linear)
        ]
        try:
            rows = expert(x[token])
        finally:
            for handle in hooks:
                handle.remove()
        y = y.index_add(0, token, (rows * weights[token]).to(y.dtype))
    return y
