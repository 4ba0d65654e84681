"""Switch Transformer (Fedus et al. 2022): BERT's encoder with experts for feed-forward layers.

The router sends every token to its most probable expert (of equals the first) and scales that
expert's output by the probability. In training an expert takes at most
C = ceil(capacity factor * N / E) of a batch's N tokens, in token order; a token beyond that is
dropped: the layer adds nothing to it, and the residual connection carries it on. In evaluation
nothing is dropped, so routing is a function of the token alone.

The router learns from the scaled outputs of all experts, the load-balancing loss, and the z-loss
(Zoph et al. 2022).

Shapes: B sequences, T tokens, N = B * T, D width, F hidden neurons, E experts, C slots per expert.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.double_backward import refuse_double_backward
from mat.layers.experts import Record
from mat.layers.gate import Index, put, take
from mat.suite.config import SwitchConfig
from mat.suite.models.bert import MaskedEncoder, initial_weight, linear

CACHE_BYTES = 4 * 2**20  # of one weight of the experts that a CPU computes at once


@dataclass(frozen=True)
class Slots:
    """Which token stands in which of the experts' slots; no shape depends on the routing.

    Attributes:
        token: (E, C) number of the slot's token; at an empty slot that of any token.
        filled: (E, C) whether the slot has a token.
        row: (N,) number of the token's slot in the flattened E * C; 0 for a dropped token.
        kept: (N,) whether the token has a slot.
    """

    token: Tensor
    filled: Tensor
    row: Tensor
    kept: Tensor


def fill_slots(expert: Tensor, load: Tensor, capacity: int) -> Slots:
    """Tokens take the slots of their experts in token order; nothing waits for the device.

    Args:
        expert: (N,) every token's expert.
        load: (E,) tokens per expert.
        capacity: C.

    Returns:
        The slots.
    """
    tokens = torch.arange(len(expert), device=expert.device)
    order = expert.argsort(stable=True)
    start = load.cumsum(0) - load
    place = torch.empty_like(order)  # among the tokens of the same expert
    place[order] = tokens - start[expert[order]]
    column = torch.arange(capacity, device=expert.device)
    token = order[(start[:, None] + column).clamp(max=len(tokens) - 1)]  # (E, C)
    kept = place < capacity
    row = torch.where(kept, expert * capacity + place, 0)
    return Slots(token, column < load[:, None], row, kept)


class Experts(nn.Module):
    """Feed-forward experts behind a router that sends every token to one of them.

    An expert is two linear layers around a GELU; those of all experts are stacked, each stored as
    ``nn.Linear`` stores it.

    Args:
        config: Width, hidden neurons of an expert, number of experts, capacity factor, and the
            coefficients of the two losses.
    """

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.config, self.experts = config, config.experts
        experts, width, hidden = config.experts, config.width, config.ffn_hidden
        self.in_weight = nn.Parameter(initial_weight(experts, hidden, width, width=width))
        self.in_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.out_weight = nn.Parameter(initial_weight(experts, width, hidden, width=width))
        self.out_bias = nn.Parameter(torch.zeros(experts, width))
        self.router = linear(initial_weight(experts, width, width=width), bias=False)
        self.auxiliary: Tensor | None = None  # losses of the last training forward
        self._routed: tuple[Tensor, Tensor] | None = None  # its probabilities (N, E), loads (E,)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "auxiliary": None}  # its graph is no part of a copy

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if not self.training:
            return self.without_drops(x)
        tokens = x.flatten(0, 1)  # (N, D)
        probability, expert, load = self.route(tokens)
        slots = fill_slots(expert, load, self.capacity(len(tokens)))
        rows = cast(Tensor, _Dispatch.apply(tokens, slots))  # (E, C, D)
        return cast(Tensor, _Combine.apply(self.core(rows), probability, slots)).view_as(x)

    def without_drops(self, x: Tensor, record: Record | None = None) -> Tensor:
        """The same with every token through its expert, one expert after the other.

        Args:
            x: (B, T, D).
            record: Shown every product of every expert that has tokens, see
                :data:`mat.layers.experts.Record`.
        """
        tokens = x.flatten(0, 1)  # (N, D)
        probability, expert, _ = self.route(tokens)
        y = torch.zeros_like(tokens)
        for unit in range(self.experts):
            token = (expert == unit).nonzero()[:, 0]

            def product(rows: Tensor, name: str, unit: int = unit, token: Tensor = token) -> Tensor:
                weight, bias = f"{name}_weight", f"{name}_bias"
                z = F.linear(rows, getattr(self, weight)[unit], getattr(self, bias)[unit])
                return z if record is None else record(weight, bias, unit, rows, z, token)

            if len(token):
                rows = product(F.gelu(product(tokens[token], "in")), "out")  # (n, D)
                y = y.index_add(0, token, (rows * probability[token, None]).to(y.dtype))
        return y.view_as(x)

    def capacity(self, tokens: int) -> int:
        """C: slots per expert in training."""
        return min(tokens, math.ceil(self.config.capacity_factor * tokens / self.experts))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens (N, D) go, in float32 at least.

        Returns:
            Probability of each token's expert (N,), the expert (N,), tokens per expert (E,).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            precise = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(precise), self.router.weight.to(precise))  # (N, E)
            probabilities = logits.softmax(-1)
            expert = logits.argmax(-1)
            load = (expert[:, None] == torch.arange(self.experts, device=tokens.device)).sum(0)
            if self.training:
                share = load.to(precise) / len(tokens)
                balance = self.experts * (share * probabilities.mean(0)).sum()
                z = logits.logsumexp(-1).square().mean()
                self.auxiliary = self.config.balance_loss * balance + self.config.z_loss * z
                self._routed = probabilities.detach(), load
        return probabilities.gather(1, expert[:, None]).squeeze(1), expert, load

    def core(self, rows: Tensor) -> Tensor:
        """Rows (E, C, D) through their experts."""
        return expert_mlp(rows, self.stacked())

    def stacked(self) -> tuple[nn.Parameter, ...]:
        """Weights (E, F, D) and biases (E, F) of the first layers, and those of the second."""
        return self.in_weight, self.in_bias, self.out_weight, self.out_bias

    def monitors(self) -> dict[str, Tensor]:
        """Of the last training forward: largest load and dropped tokens, as shares of all tokens,
        and the router's mean entropy in nats.
        """
        if self._routed is None:
            return {}
        probabilities, load = self._routed
        tokens = len(probabilities)
        return {
            "expert_load": load.max() / tokens,
            "drop_rate": (load - self.capacity(tokens)).clamp(min=0).sum() / tokens,
            "router_entropy": torch.special.entr(probabilities).sum(-1).mean(),
        }


@dataclass(frozen=True)
class Backward:
    """What of the experts' products is differentiated; all of it by default.

    Attributes:
        active: Which experts' weights get gradients.
        frozen: The others.
        exact: Whether rows of frozen experts get gradients, too.
        blocks: What gets the gradients of the active experts' weights (a, ...), one per parameter;
            None: the parameters.
    """

    active: Index = None
    frozen: Index = field(default_factory=lambda: slice(0, 0))
    exact: bool = True
    blocks: tuple[Tensor, ...] | None = None


def expert_mlp(
    rows: Tensor,
    parameters: Sequence[Tensor],
    backward: Backward = Backward(),
) -> Tensor:
    """Rows (E, C, D) through their experts, at least one row each.

    All at once on a GPU; on a CPU so many that their weights and activations stay in its cache.

    Args:
        rows: (E, C, D).
        parameters: Weight and bias of both layers, stacked.
        backward: What is differentiated.
    """
    blocks = parameters if backward.blocks is None else backward.blocks
    values = (each.detach() for each in parameters)
    return cast(Tensor, _ExpertMlp.apply(rows, backward, *blocks, *values))


class _ExpertMlp(torch.autograd.Function):
    """See :func:`expert_mlp`: differentiated by autograd, batched products copy their gradients.

    Inputs: rows (E, C, D), what is differentiated, what gets the gradients of the four parameters,
    their values.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, backward: Backward, *tensors: Tensor) -> Tensor:
        blocks, parameters = tensors[:4], tensors[4:]
        outputs = torch.empty_like(rows)
        size = parameters[0][0].numel()
        most = len(rows) if rows.is_cuda else max(1, CACHE_BYTES // (2 * size))
        ctx.active = _runs(backward.active, len(rows), most)
        frozen = _runs(backward.frozen, len(rows), most)
        ctx.frozen = frozen if backward.exact else []
        ctx.covers = backward.exact or not frozen  # every row gets a gradient
        kept: list[Tensor] = []
        for at, run in enumerate(ctx.active + frozen):
            w_in, b_in, w_out, b_out = (take(each, run, 0).to(rows.dtype) for each in parameters)
            z = torch.bmm(take(rows, run, 0), w_in.mT).add_(b_in[:, None])  # (c, C, F)
            hidden = F.gelu(z)
            put(outputs, run, 0, torch.bmm(hidden, w_out.mT).add_(b_out[:, None]))
            if any(ctx.needs_input_grad):
                if at < len(ctx.active):
                    kept += z, w_in, w_out, hidden
                elif backward.exact:
                    kept += z, w_in, w_out
        ctx.blocks = [(each.shape, each.dtype) for each in blocks]
        ctx.save_for_backward(rows if ctx.active else rows[:0], *kept)
        return outputs

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        saved = iter(kept)
        trains = any(ctx.needs_input_grad[2:6])
        d_blocks: list[Any] = [gradient.new_empty(s, dtype=d) for s, d in ctx.blocks if trains]
        nothing = [None] * 4
        if not kept:
            return None, None, *(d_blocks or nothing), *nothing
        d_rows = torch.empty_like(gradient) if ctx.covers else torch.zeros_like(gradient)
        first = 0
        for at, run in enumerate(ctx.active + ctx.frozen):
            z, w_in, w_out = next(saved), next(saved), next(saved)
            g = take(gradient, run, 0)  # (c, C, D)
            d_z = torch.ops.aten.gelu_backward(torch.bmm(g, w_out), z)
            put(d_rows, run, 0, torch.bmm(d_z, w_in))
            if at < len(ctx.active):
                hidden, last = next(saved), first + len(z)
                if trains:
                    d_in, d_out = torch.bmm(d_z.mT, take(rows, run, 0)), torch.bmm(g.mT, hidden)
                    found = d_in, d_z.sum(1), d_out, g.sum(1)
                    for block, part in zip(d_blocks, found, strict=True):
                        block[first:last] = part
                first = last
        return d_rows, None, *(d_blocks or nothing), *nothing


def _runs(experts: Index, count: int, most: int) -> list[slice | Tensor]:
    """Some of the experts, so many at a time; on a CPU as slices, which copy nothing."""
    if isinstance(experts, Tensor) and experts.is_cuda:  # the host waits for no numbers
        return [experts] if len(experts) else []
    numbers = np.arange(count)
    numbers = numbers[experts.numpy() if isinstance(experts, Tensor) else experts or slice(None)]
    gaps = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [
        slice(int(run[i]), int(run[min(i + most, len(run)) - 1]) + 1)
        for run in np.split(numbers, gaps)
        for i in range(0, len(run), most)
    ]


class _Dispatch(torch.autograd.Function):
    """Tokens (N, D) to the experts' slots (E, C, D); the backward gathers, too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Slots) -> Tensor:
        device = tokens.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        ctx.slots = slots
        return _gather(tokens.to(autocast or tokens.dtype), slots.token)

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        slots: Slots = ctx.slots
        gradient = gradient.flatten(0, 1).index_select(0, slots.row)  # (N, D)
        return gradient.mul_(slots.kept[:, None]), None


class _Combine(torch.autograd.Function):
    """Experts' outputs (E, C, D) times the tokens' probabilities (N,) to tokens (N, D)."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, probability: Tensor, slots: Slots) -> Tensor:
        y = outputs.flatten(0, 1).index_select(0, slots.row)
        y.mul_((probability * slots.kept)[:, None])
        ctx.slots = slots
        ctx.save_for_backward(y, probability)
        return y

    @staticmethod
    @refuse_double_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        y, probability = ctx.saved_tensors
        slots: Slots = ctx.slots
        d_probability = gradient.to(probability.dtype).mul(y).sum(-1).div_(probability)
        d_outputs = _gather(gradient.to(y.dtype), slots.token)
        d_outputs.mul_((probability[slots.token] * slots.filled)[..., None])  # zero where empty
        return d_outputs, d_probability, None


def _gather(rows: Tensor, number: Tensor) -> Tensor:
    """Rows (N, D) by number (E, C), as (E, C, D)."""
    return rows.index_select(0, number.flatten()).view(*number.shape, -1)


class Switch(MaskedEncoder):
    """BERT's encoder with experts in place of every ``switch_every``-th feed-forward layer.

    It is made as :class:`MaskedEncoder` is, from a :class:`mat.suite.config.SwitchConfig`.
    """

    @property
    def switch_layers(self) -> list[Experts]:
        """The layers of experts in forward order."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, Experts)]

    def feed_forward(self, number: int) -> nn.Module:
        """Experts in every ``switch_every``-th block: with 2 in the second, fourth, ..."""
        config = cast(SwitchConfig, self.config)
        every = config.switch_every
        return Experts(config) if (number + 1) % every == 0 else super().feed_forward(number)

    def auxiliary_loss(self) -> Tensor | None:
        """Load-balancing and z-loss of the last training forward, summed over layers; once."""
        losses = [layer.auxiliary for layer in self.switch_layers if layer.auxiliary is not None]
        for layer in self.switch_layers:
            layer.auxiliary = None  # it would keep the step's graph alive
        return torch.stack(losses).sum() if losses else None

    def monitors(self) -> dict[str, Tensor]:
        """Largest load of any expert, and means over layers of the other two."""
        layers = [layer.monitors() for layer in self.switch_layers]
        columns = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return {n: v.max() if n == "expert_load" else v.mean() for n, v in columns.items()}
