"""Modules without a gated backward (units by hand): frozen gradients are computed, then cleared."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mat.layers.gate import Gate, GatedPart, spread, take
from mat.layers.site import Site


class MaskedSite(Site):
    """A module that runs as ever; hooks on its parameters clear the gradients of frozen slices.

    Args:
        module: The module.
        gate: The gate of its units.
        parts: What they own of its parameters.
    """

    def __init__(self, module: nn.Module, gate: Gate, parts: Sequence[GatedPart]) -> None:
        super().__init__(module, gate)
        self.parts = tuple(parts)
        self.handles: list[Any] = []

    def attach(self) -> None:
        """Hook the parameters."""
        for part in self.parts:
            hook = part.parameter.register_hook(Clear(part))  # type: ignore[no-untyped-call]
            self.handles.append(hook)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.attach()  # a copied parameter has no hooks


class Clear:
    """Clears the gradient of frozen slices of a parameter.

    Args:
        part: What units own of it.
    """

    def __init__(self, part: GatedPart) -> None:
        self.part = part

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros in frozen slices."""
        part = self.part
        if part.whole or part.gate.transparent:
            return gradient
        kept = take(gradient, part.active, part.dim)
        return spread(kept, part.active, part.dim, gradient.shape[part.dim])
