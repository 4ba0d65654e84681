"""Gates: attach MAT to a model in place, choose what trains, and take it off again.

The active set is one boolean vector over the table of units (``Gates.active``); every layer's gate
holds a view of its part. It changes between optimiser steps only. Parameters, names, hooks and
``requires_grad`` stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mat.adapters import find_units
from mat.guard import guard
from mat.layers.gate import Gate, GatedPart
from mat.layers.site import Site
from mat.policy import MATConfig, Policy
from mat.units import BoolArray, Unit, UnitLayer, Units


class Gates:
    """The gates of an attached model; made by :func:`attach_`.

    Args:
        model: The model.
        units: Its units.
        config: How they are chosen, and the backward mode.

    Attributes:
        units: The table of units.
        active: (N,) boolean: which units train now.
        layers: The gate of every layer.
        policy: Chooses at selections.
    """

    def __init__(self, model: nn.Module, units: Units, config: MATConfig) -> None:
        self.model, self.units, self.config = model, units, config
        self.active: BoolArray = np.ones(len(units), bool)
        self.policy = Policy(config, units)
        self.layers: list[Gate] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for layer, rows in units.slices():
            gate = Gate(layer.kind, layer.name, self.active[rows], config.mode)
            self.layers.append(gate)
            for part in layer.parts:
                parameter = parameters[part.parameter]
                parameter._gated = gate.add(parameter, part)  # type: ignore[attr-defined]
        gates = {gate.name: gate for gate in self.layers}
        self.sites: list[Site] = []
        self._hooks: list[RemovableHandle] = []
        for layer, gate in zip(units.layers, self.layers, strict=True):
            for path, make in layer.sites:
                self.sites.append(make(model.get_submodule(path), gates.get))
            self._mask_gradients(layer, gate)
        for site in self.sites:
            site.attach()
        model._gates = self  # type: ignore[assignment]

    def _mask_gradients(self, layer: UnitLayer, gate: Gate) -> None:
        """Zero the frozen slices of parameters that lie in none of the layer's sites."""
        for name, part in gate.parts.items():
            known = any(
                f"{name}.".startswith(f"{path}." if path else "") for path, _ in layer.sites
            )
            if not known and part.parameter.requires_grad:
                self._hooks.append(part.parameter.register_hook(part.mask))

    def parts(self) -> Iterator[GatedPart]:
        """Every gated part of a parameter."""
        for gate in self.layers:
            yield from gate.parts.values()

    def set_active(self, active: BoolArray | Sequence[bool]) -> None:
        """Choose the units that train from now on.

        Args:
            active: (N,) boolean. None active and all active are both fine.

        Raises:
            ValueError: If the shape is not (N,).
            RuntimeError: If gradients are pending: they belong to the present set.
        """
        wanted = np.asarray(active, bool)
        if wanted.shape != self.active.shape:
            raise ValueError(f"active set of shape {wanted.shape} for {len(self.active)} units")
        if (wanted == self.active).all():
            return
        for part in self.parts():
            pending = part.gradient()
            if pending is not None and bool(pending.any()):
                raise RuntimeError(
                    "the active set changes between optimiser steps: step and clear the gradients first"
                )
        for gate, (_, rows) in zip(self.layers, self.units.slices(), strict=True):
            if (wanted[rows] != self.active[rows]).any():
                self.active[rows] = wanted[rows]
                gate.update()

    @contextmanager
    def transparent(self) -> Iterator[None]:
        """Within, every layer runs as if nothing were gated."""
        for gate in self.layers:
            gate.transparent = True
        try:
            yield
        finally:
            for gate in self.layers:
                gate.transparent = False

    def guard(self, optimiser: torch.optim.Optimizer) -> None:
        """Keep frozen slices and their optimiser state bit-identical, see :mod:`mat.guard`."""
        guard(optimiser)

    def detach(self) -> None:
        """Give every module its own forward back."""
        for site in reversed(self.sites):
            site.detach()
        for hook in self._hooks:
            hook.remove()
        for part in self.parts():
            del part.parameter._gated  # type: ignore[attr-defined]
        del self.model._gates


def attach_(
    model: nn.Module, config: MATConfig | None = None, units: Sequence[Unit] | Units | None = None
) -> Gates:
    """Attach MAT to a model, in place.

    Args:
        model: Any model, see :func:`mat.find_units`.
        config: How units are chosen, and the backward mode.
        units: Units named by hand, or a table of them; what is found when None.

    Returns:
        The gates; all units are active.

    Raises:
        ValueError: If nothing is found, or the model is attached already.
    """
    config = config or MATConfig()
    if getattr(model, "_gates", None) is not None:
        raise ValueError("MAT is attached to this model already: mat.detach_(model) first")
    if not isinstance(units, Units):
        units = find_units(model, units=units, groups=config.groups, head_output=config.head_output)
    if config.units is not None:
        units = units.of_kinds(config.units)
    return Gates(model, units, config)


def detach_(model: nn.Module) -> None:
    """Make ordinary modules of an attached model again.

    Raises:
        ValueError: If it is not attached.
    """
    gates = getattr(model, "_gates", None)
    if gates is None:
        raise ValueError("MAT is not attached to this model")
    gates.detach()
