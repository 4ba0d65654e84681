"""Any torch optimiser on a gated model: hooks around its step keep frozen slices bit-identical.

An optimiser that does not know units updates whole tensors: zero gradients still decay weights and
move along old momentum. So before a step the frozen slices of every gated parameter and of its
state are copied, and after it written back. ``mat.AdamW`` and ``mat.SGD`` skip that work instead.

A step count that an optimiser keeps per tensor counts every step, also those that a unit skipped:
after thawing, Adam's bias correction is that of the tensor (1 to the last digit after some thousand
steps). ``mat.AdamW`` counts per unit.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mat.layers.gate import GatedPart, put, take
from mat.optim import UnitOptimiser


def guard(optimiser: torch.optim.Optimizer) -> None:
    """Install the hooks; once is enough.

    State of a parameter's shape is guarded, and state that has a number per unit's row (its size
    along the divided axis, 1 along the others). A warning names tensors of any other shape.

    Args:
        optimiser: Made before or after attaching. Ours, which know units, are left as they are.
    """
    if isinstance(optimiser, UnitOptimiser) or getattr(optimiser, "_guarded", False):
        return
    for _, part in _gated(optimiser):  # an earlier optimiser may have asked for blocks
        part.clear()
        part.compact = False
    saved: dict[tuple[int, str], Tensor] = {}
    warned: set[str] = set()

    def before(*_: Any) -> None:
        saved.clear()
        for key, part, tensor in _guarded(optimiser, warned):
            saved[key] = take(tensor, part.frozen, part.dim).clone()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for key, part, tensor in _guarded(optimiser, warned):  # a step may put others in place
            frozen = saved.get(key)
            if frozen is None:  # state that this step made: none of it is frozen units'
                frozen = torch.zeros_like(take(tensor, part.frozen, part.dim))
            put(tensor, part.frozen, part.dim, frozen)
        saved.clear()

    optimiser.register_step_pre_hook(before)
    optimiser.register_step_post_hook(after)
    optimiser._guarded = True  # type: ignore[attr-defined]


def _gated(optimiser: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, GatedPart]]:
    """The optimiser's parameters of which units own something."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            part: GatedPart | None = getattr(parameter, "_gated", None)
            if part is not None:
                yield parameter, part


def _guarded(
    optimiser: torch.optim.Optimizer, warned: set[str]
) -> Iterator[tuple[tuple[int, str], GatedPart, Tensor]]:
    """Parameters with frozen slices, and their state: what must not change in them, with a key."""
    for parameter, part in _gated(optimiser):
        if part.whole:
            continue
        yield (id(parameter), ""), part, parameter
        per_row = [n if d == part.dim else 1 for d, n in enumerate(parameter.shape)]
        for name, value in optimiser.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape == parameter.shape or list(value.shape) == per_row:
                yield (id(parameter), name), part, value
            elif name not in warned:
                warned.add(name)
                warnings.warn(
                    f"the optimiser's state {name!r} is not kept by unit: steps that a unit skips "
                    "change it, too",
                    stacklevel=3,
                )
