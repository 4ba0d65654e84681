"""Any torch optimiser on a gated model: hooks around its step keep frozen slices bit-identical.

An optimiser that does not know units updates whole tensors: zero gradients still decay weights and
move along old momentum. So before a step the frozen slices of every gated parameter and of its
state are copied, and after it written back. ``mat.AdamW`` and ``mat.SGD`` skip that work instead.

A step count that an optimiser keeps per tensor counts every step, also those that a unit skipped:
after thawing, Adam's bias correction is that of the tensor (1 to the last digit after some thousand
steps). ``mat.AdamW`` counts per unit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mat.layers.gate import GatedPart, put, take


def guard(optimiser: torch.optim.Optimizer) -> None:
    """Install the hooks; once is enough.

    Args:
        optimiser: Made before or after attaching.
    """
    if getattr(optimiser, "_guarded", False):
        return
    saved: dict[int, tuple[Tensor, GatedPart, Tensor]] = {}

    def before(*_: Any) -> None:
        saved.clear()
        for part, tensor in _gated_tensors(optimiser):
            saved[id(tensor)] = tensor, part, take(tensor, part.frozen, part.dim).clone()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for tensor, part, frozen in saved.values():
            put(tensor, part.frozen, part.dim, frozen)
        for part, tensor in _gated_tensors(optimiser):
            if (
                id(tensor) not in saved
            ):  # state made by this very step: none of it is the frozen units'
                nothing = torch.zeros_like(take(tensor, part.frozen, part.dim))
                put(tensor, part.frozen, part.dim, nothing)
        saved.clear()

    optimiser.register_step_pre_hook(before)
    optimiser.register_step_post_hook(after)
    optimiser._guarded = True  # type: ignore[attr-defined]


def _gated_tensors(optimiser: torch.optim.Optimizer) -> Iterator[tuple[GatedPart, Tensor]]:
    """Every parameter with frozen slices and its state: what must not change in them."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            part: GatedPart | None = getattr(parameter, "_gated", None)
            if part is None or part.whole:
                continue
            yield part, parameter
            for value in optimiser.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield part, value
