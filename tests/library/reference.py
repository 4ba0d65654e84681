"""Naive references: ordinary models in which frozen units' outputs are detached by hooks."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mat.units import BoolArray, Part, Units

Loss = Callable[[nn.Module], Tensor]


def frozen_mask(part: Part, active: BoolArray) -> Tensor:
    """(size,) True where a row or column of a part is a frozen unit's."""
    return torch.tensor([owner >= 0 and not active[owner] for owner in part.owner.tolist()])


def gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Gradient of every parameter by plain autograd; zeros where there is none."""
    model.zero_grad()
    loss(model).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def expected(
    model: nn.Module,
    loss: Loss,
    units: Units,
    active: BoolArray,
    mode: str,
    owned: Units | None = None,
) -> dict[str, Tensor]:
    """What an attached model's gradients must be.

    Args:
        model: An ordinary model; it is left alone.
        loss: From a model to a number.
        units: Say which outputs are a unit's.
        active: (N,) boolean.
        mode: ``cut`` detaches the outputs of frozen units, ``exact`` detaches nothing.
        owned: Say which parameters are a unit's, if not ``units``.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = NaiveMultihead(module)
    if mode == "cut":
        for layer, rows in units.slices():
            detach_outputs(model, layer.parts, active[rows])
    found = gradients(model, loss)
    for layer, rows in (owned or units).slices():
        for part in layer.parts:
            frozen = frozen_mask(part, active[rows])
            found[part.parameter].movedim(part.dim, 0)[frozen] = 0
    return found


def detach_outputs(model: nn.Module, parts: list[Part], active: BoolArray) -> None:
    """Hook a layer so that nothing flows back through its frozen units.

    Where units own columns of a matrix, its input is theirs; otherwise the output of their rows.
    """
    columns = [part for part in parts if part.dim == 1]
    weights = [part for part in parts if part.parameter.endswith("weight")]
    for part in columns or weights:
        module = model.get_submodule(part.parameter.rpartition(".")[0])
        frozen = frozen_mask(part, active)
        if columns:
            module.register_forward_pre_hook(lambda _, x, f=frozen: (stopped(x[0], f),))
        else:
            module.register_forward_hook(lambda _, x, y, f=frozen: stopped(y, f))


def stopped(x: Tensor, frozen: Tensor) -> Tensor:
    """The same values, with some columns detached."""
    return torch.where(frozen, x.detach(), x)


class NaiveMultihead:
    """``nn.MultiheadAttention`` head by head, so that hooks see its context."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, **_: object,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        module = self.module
        if not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        size, contexts, weights = module.head_dim, [], []
        for head in range(module.num_heads):
            projected = []
            for block, x in enumerate((query, key, value)):
                start = block * module.embed_dim + head * size
                weight = module.in_proj_weight[start : start + size]
                projected.append(x @ weight.T + module.in_proj_bias[start : start + size])
            q, k, v = projected
            scores = q @ k.transpose(1, 2) / size**0.5  # (B, T, S)
            for mask in (
                attn_mask,
                None if key_padding_mask is None else key_padding_mask[:, None],
            ):
                if mask is not None:
                    hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
                    scores = scores.masked_fill(hidden, float("-inf"))
            weights.append(scores.softmax(-1))
            contexts.append(weights[-1] @ v)
        out = module.out_proj(torch.cat(contexts, -1))
        mean = torch.stack(weights).mean(0) if need_weights else None
        return (out if module.batch_first else out.transpose(0, 1)), mean


def some_active(units: Units, seed: int = 0) -> BoolArray:
    """A third of the units at random; the first layer of every kind has none, the last has all."""
    active = np.random.default_rng(seed).random(len(units)) < 0.4
    for kind in set(units.kind.tolist()):
        layers = units.layer[units.kind == kind]
        active[(units.kind == kind) & (units.layer == 0)] = False
        if layers.max() > 1:
            active[(units.kind == kind) & (units.layer == layers.max())] = True
    return active
