"""Experts of transformers' mixtures: modules of their own, or rows of stacked weights."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import nn

from mat.adapters.find import Place, finder
from mat.layers.experts import (
    ExpertSite,
    MixtureSite,
    StackedSite,
    record_separate,
    record_stacked,
)
from mat.layers.gate import Gate
from mat.units import MakeSite, Part, UnitLayer


@finder
def stacked(place: Place) -> Iterator[UnitLayer]:
    """Experts whose parameters all have one row per expert (Mixtral and most later mixtures)."""
    module: Any = place.module
    # What transformers' use_experts_implementation notes on a layer of experts.
    if not hasattr(module, "has_gate") or getattr(module, "_is_expert_parallel", False):
        return
    count = module.num_experts
    if all(p.requires_grad and p.shape[0] == count for p in module.parameters()):
        names = {name: place.under(name) for name, _ in module.named_parameters()}
        parts = [Part(name, 0, np.arange(count)) for name in names.values()]
        sites = [(place.path, _site(place, names, StackedSite))]
        recording = place.path, record_stacked
        yield UnitLayer("experts", place.path, count, parts, sites, recording=recording)


@finder
def separate(place: Place) -> Iterator[UnitLayer]:
    """Experts in a ModuleDict or ModuleList called ``experts`` (Switch Transformers).

    Where that has no forward of its own, the module around it calls them (Mixtral before
    transformers 5).
    """
    module, (outside, _, name) = place.module, place.path.rpartition(".")
    experts = list(module.named_children())
    if name != "experts" or not isinstance(module, nn.ModuleDict | nn.ModuleList) or not experts:
        return
    parts: list[Part] = []
    for unit, (child, expert) in enumerate(experts):
        for path, parameter in expert.named_parameters():
            if place.linear(f"{child}.{path.rpartition('.')[0]}") is None:
                return
            owner = np.full(len(parameter), unit)
            parts.append(Part(place.under(f"{child}.{path}"), 0, owner))
    runs = type(module).forward not in (nn.ModuleDict.forward, nn.ModuleList.forward)
    around = place.path if runs else outside
    names = {part.parameter.removeprefix(f"{around}."): part.parameter for part in parts}
    sites = [(place.under(child), _expert(place, unit)) for unit, (child, _) in enumerate(experts)]
    sites.append((around, _site(place, names, MixtureSite)))
    recording = (place.path, record_separate) if runs else None
    yield UnitLayer("experts", place.path, len(experts), parts, sites, recording=recording)


def _site(place: Place, names: dict[str, str], cls: Any) -> MakeSite:
    """What makes the site of a module that has all experts.

    Args:
        place: Where the experts are.
        names: Of their parameters, in the module and in the model.
        cls: Class of the site.
    """

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> Any:
        gate = gate_of(place.path)
        assert gate is not None
        return cls(module, gate, {name: gate.parts[full] for name, full in names.items()})

    return make


def _expert(place: Place, unit: int) -> MakeSite:
    """What makes the site of one expert."""

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> ExpertSite:
        gate = gate_of(place.path)
        assert gate is not None
        return ExpertSite(module, gate, unit)

    return make
