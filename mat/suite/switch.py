"""Switch Transformer (Fedus et al. 2022): BERT's encoder with experts; heads and experts are units (paper section 5).

The router sends every token to its most probable expert (of equals the first) and scales that expert's output by the
probability. In training an expert takes at most C = ceil(capacity factor * N / E) of a batch's N tokens, in token
order; a token beyond that is dropped: the layer adds nothing to it, and the residual connection carries it on. In
evaluation and for the mNTK estimator nothing is dropped, so that routing is a function of the token alone.

The router belongs to the rest. It trains on the load-balancing loss, the z-loss (Zoph et al. 2022) and the scaled
outputs of all experts, frozen ones included: its gradient needs their forward values only.

Shapes: B sequences, T tokens, N = B * T, D width, F hidden neurons, E experts, C slots per expert, a active experts.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.suite.bert import MaskedEncoder, initial_weight
from mat.suite.config import SwitchConfig
from mat.suite.interface import Flops
from mat.suite.units import BackwardMode, UnitLayer

CACHE_BYTES = 4 * 2**20  # of one weight of the experts that a CPU computes at once


@dataclass(frozen=True)
class Slots:
    """Which token stands in which of the experts' slots; the shapes do not depend on the routing.

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
    """Tokens take the slots of their experts in token order; no operation waits for the device.

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
    token = order[(start[:, None] + column).clamp(max=len(tokens) - 1)]
    kept = place < capacity
    return Slots(token, column < load[:, None], torch.where(kept, expert * capacity + place, 0), kept)


class Experts(UnitLayer):
    """Feed-forward experts behind a router that sends every token to one of them.

    Every expert is two linear layers with biases around a GELU, stored as ``nn.Linear`` does: (E, F, D) and (E, D, F).

    Args:
        config: Width, hidden neurons per expert, experts, capacity factor and the two losses' coefficients.
    """

    routed = True
    in_weight: nn.Parameter
    in_bias: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__("experts", config.experts)
        self.config = config
        width, hidden = config.width, config.ffn_hidden
        self.add_product("in_weight", initial_weight(config.experts, hidden, width, width=width), "in_bias")
        self.add_product("out_weight", initial_weight(config.experts, width, hidden, width=width), "out_bias")
        self.router = nn.Parameter(initial_weight(config.experts, width, width=width))
        self.auxiliary: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None  # probabilities (N, E) and loads (E,) of the last training step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "auxiliary": None}  # the last step's graph is no part of a copy

    def capacity(self, tokens: int) -> int:
        """C: slots per expert in training."""
        return min(tokens, math.ceil(self.config.capacity_factor * tokens / self.n_units))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), differentiable through the active experts and the router."""
        flat = x.flatten(0, 1)
        gate, expert, load = self._route(flat)
        if self.tape is not None or not (self.training or torch.is_grad_enabled()):
            return self._all_tokens(flat, gate, expert, x.shape[0]).view_as(x)
        capacity = self.capacity(len(flat)) if self.training else int(load.max())
        dense = self.n_active == self.n_units
        leaves = list(self.unit_parameters().values()) if dense else self.active_leaves()
        order = None
        if not dense:
            order = torch.cat([self.active_index(x.device), self.frozen_index(x.device)])
            expert, load = order.argsort()[expert], load[order]
        y: Tensor = _Experts.apply(flat, gate, self, order, fill_slots(expert, load, capacity), *leaves)
        return y.view_as(x)

    def chunks(self, device: torch.device) -> list[slice]:
        """Experts that are computed at once, as places in an order with the active ones first, those apart.

        All at once on a GPU; on a CPU so many that their weights and activations stay in its cache.
        """
        bytes_per_expert = 2 * self.config.width * self.config.ffn_hidden
        most = self.n_units if device.type == "cuda" else max(1, CACHE_BYTES // bytes_per_expert)
        bounds = [*range(0, self.n_active, most), *range(self.n_active, self.n_units, most), self.n_units]
        return [slice(start, end) for start, end in pairwise(bounds)]

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probability of each token's expert (N,), the expert (N,) and the experts' loads (E,), in float32."""
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(exact), self.router.to(exact))
            probabilities = logits.softmax(-1)
            expert = logits.argmax(-1)
            load = (expert[:, None] == torch.arange(self.n_units, device=x.device)).sum(0)
            if self.training:
                balance = self.n_units * (load.to(exact) / len(x) * probabilities.mean(0)).sum()
                z = logits.logsumexp(-1).square().mean()
                self.auxiliary = self.config.balance_loss * balance + self.config.z_loss * z
                self._seen = probabilities.detach(), load
        return probabilities.gather(1, expert[:, None]).squeeze(1), expert, load

    def _all_tokens(self, x: Tensor, gate: Tensor, expert: Tensor, samples: int) -> Tensor:
        """Every token through its expert, expert by expert, with the estimator's taps; x (N, D)."""
        order = expert.argsort(stable=True)
        sample = torch.arange(len(x), device=x.device) // (len(x) // samples)
        sizes = torch.bincount(expert * samples + sample, minlength=self.n_units * samples).view(-1, samples)
        loads = sizes.sum(1).tolist()

        def product(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.cat(
                [F.linear(r, w, b) for r, w, b in zip(torch.split(rows, loads), weight, bias, strict=True)]
            )

        rows = x[order]
        z = self.tap("in_weight", rows, True, product(rows, self.in_weight, self.in_bias), sizes)
        hidden = F.gelu(z)
        y = self.tap("out_weight", hidden, True, product(hidden, self.out_weight, self.out_bias), sizes)
        return (y * gate[order, None])[order.argsort()]

    def step_flops(self, samples: int, length: int, n_active: int, mode: BackwardMode, padded: bool = True) -> Flops:
        """Experts compute all their C slots; without padding every expert has its even share of the tokens, up to C.

        The router's products are counted here too.
        """
        tokens = samples * length
        router, expert = 2 * tokens * self.n_units * self.config.width, self._expert_flops()

        def rows(experts: int) -> int:
            slots = experts * self.capacity(tokens)
            return slots if padded else min(slots, experts * tokens // self.n_units)

        return Flops(
            forward=router + rows(self.n_units) * expert,
            input_grad=router + rows(n_active if mode == "cut" else self.n_units) * expert,
            weight_grad=router + rows(n_active) * expert,
        )

    def probe_flops(self, samples: int, length: int, first: bool) -> tuple[int, int]:
        """No padding and no drops: every token runs through one expert."""
        tokens = samples * length
        router, expert = 2 * tokens * self.n_units * self.config.width, tokens * self._expert_flops()
        return router + expert, expert // 2 if first else router + expert

    def _expert_flops(self) -> int:
        """Both products of one row of one expert."""
        return 4 * self.config.width * self.config.ffn_hidden

    def monitors(self) -> dict[str, Tensor]:
        """The last training forward's largest expert load and dropped share of the tokens, and mean router entropy."""
        if self._seen is None:
            return {}
        probabilities, load = self._seen
        tokens = len(probabilities)
        return {
            "expert_load": load.max() / tokens,
            "drop_rate": (load - self.capacity(tokens)).clamp(min=0).sum() / tokens,
            "router_entropy": torch.special.entr(probabilities).sum(-1).mean(),
        }


class _Experts(torch.autograd.Function):
    """All experts forward; backward for the active ones (``cut``) or, but for weights, for all (``exact``).

    Products over the slots of a few experts at a time. In ``cut`` nothing of a frozen expert is kept but its output,
    for the router. Inputs: x (N, D), gate (N,), the layer, its experts with the active ones first (None: all are
    active), their slots in that order, the active experts' rows of all four parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, layer: Experts, order: Tensor | None, slots: Slots, *leaves: Tensor
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        chunks = layer.chunks(x.device)
        x = x.to(dtype)
        out = x.new_empty(*slots.token.shape, x.shape[1])  # (E, C, D)
        kept: list[Tensor] = []  # of every chunk that is propagated: pre-activations, weights, inputs of both if active
        for chunk in chunks:
            w_in, b_in, w_out, b_out = (_rows(p, order, chunk, dtype) for p in layer.unit_parameters().values())
            rows = _gather(x, slots.token[chunk])
            z = torch.bmm(rows, w_in.mT).add_(b_in[:, None])
            hidden = F.gelu(z)
            out[chunk] = torch.bmm(hidden, w_out.mT).add_(b_out[:, None])
            if chunk.start < layer.n_active:
                kept += z, w_in, w_out, rows, hidden
            elif layer.mode == "exact":
                kept += z, w_in, w_out
        y = out.flatten(0, 1).index_select(0, slots.row).mul_((gate * slots.kept)[:, None])  # (N, D)
        ctx.chunks, ctx.n_active, ctx.mode, ctx.slots = chunks, layer.n_active, layer.mode, slots
        ctx.leaves = [(leaf.shape, leaf.dtype) for leaf in leaves]
        ctx.save_for_backward(gate, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, y, *kept = ctx.saved_tensors
        slots: Slots = ctx.slots
        d_gate = gradient.to(gate.dtype).mul(y).sum(-1).div_(gate)  # y is the expert's output times the gate
        if not kept:
            return None, d_gate, *[None] * 7
        gradient = gradient.to(y.dtype)
        propagated = ctx.n_active if ctx.mode == "cut" else len(slots.token)
        trains = ctx.n_active > 0 and any(ctx.needs_input_grad[5:])  # the leaves, unless requires_grad is off
        d_rows = y.new_empty(propagated, slots.token.shape[1], y.shape[1])
        d_leaves = [y.new_empty(shape, dtype=dtype) for shape, dtype in ctx.leaves]
        saved = iter(kept)
        for chunk in ctx.chunks:
            if chunk.start >= propagated:
                break
            z, w_in, w_out = next(saved), next(saved), next(saved)
            g = _gather(gradient, slots.token[chunk])
            g.mul_((gate[slots.token[chunk]] * slots.filled[chunk])[..., None])  # (c, C, D), zero at empty slots
            d_z = torch.ops.aten.gelu_backward(torch.bmm(g, w_out), z)
            d_rows[chunk] = torch.bmm(d_z, w_in)
            if chunk.start < ctx.n_active:
                rows, hidden = next(saved), next(saved)
                if not trains:
                    continue
                found = torch.bmm(d_z.mT, rows), d_z.sum(1), torch.bmm(g.mT, hidden), g.sum(1)
                for leaf, value in zip(d_leaves, found, strict=True):
                    leaf[chunk] = value
        stands = slots.kept & (slots.row < propagated * slots.token.shape[1])
        d_x = d_rows.flatten(0, 1).index_select(0, slots.row.where(stands, 0)).mul_(stands[:, None])
        return d_x, d_gate, None, None, None, *(d_leaves if trains else [None] * 4)


def _gather(x: Tensor, token: Tensor) -> Tensor:
    """Rows of x (N, D) by number (c, C), as (c, C, D)."""
    return x.index_select(0, token.flatten()).view(*token.shape, -1)


def _rows(parameter: Tensor, order: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a parameter: those of a chunk of all experts, or of an order of them.

    On a CPU without a copy, but for the type, if they follow one another: a chunk is often a single expert there.
    """
    if order is None:
        return parameter[chunk].to(dtype)
    experts = order[chunk]
    if not experts.is_cuda and int(experts[-1] - experts[0]) == len(experts) - 1:
        return parameter[int(experts[0]) : int(experts[-1]) + 1].to(dtype)
    return parameter.index_select(0, experts).to(dtype)


class Switch(MaskedEncoder):
    """BERT's encoder with a switch layer in place of every ``switch_every``-th feed-forward layer.

    It is made as :class:`MaskedEncoder` is, from a :class:`mat.suite.config.SwitchConfig`.
    """

    @property
    def switch_layers(self) -> list[Experts]:
        """The switch layers in forward order."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, Experts)]

    def feed_forward(self, layer: int) -> UnitLayer:
        """Experts in every ``switch_every``-th block: with 2 in the second, fourth, ..."""
        config = cast(SwitchConfig, self.config)
        return Experts(config) if (layer + 1) % config.switch_every == 0 else super().feed_forward(layer)

    def auxiliary_loss(self) -> Tensor | None:
        """Load-balancing and z-loss of the last training forward, summed over the switch layers; given once."""
        losses = [layer.auxiliary for layer in self.switch_layers if layer.auxiliary is not None]
        for layer in self.switch_layers:
            layer.auxiliary = None  # it would keep the step's graph alive
        return torch.stack(losses).sum() if losses else None

    def monitors(self) -> dict[str, Tensor]:
        """Largest load of any expert, share of dropped tokens and router entropy in nats (means over switch layers)."""
        found = [layer.monitors() for layer in self.switch_layers]
        columns = {name: torch.stack([layer[name] for layer in found]) for name in found[0]}
        return {name: v.max() if name == "expert_load" else v.mean() for name, v in columns.items()}
