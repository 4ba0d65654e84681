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
from mat.units import Part, UnitLayer


@finder
def stacked(place: Place) -> Iterator[UnitLayer]:
    """Experts whose parameters all have one row per expert (Mixtral and most later mixtures)."""
    module: Any = place.module
    # What transformers' use_experts_implementation notes on a layer of experts.
    if not hasattr(module, "has_gate") or getattr(module, "_is_expert_parallel", False):
        return
    names = [name for name, _ in module.named_parameters()]
    count = module.num_experts
    if all(p.requires_grad and p.shape[0] == count for p in module.parameters()):
        parts = [Part(place.under(name), 0, np.arange(count)) for name in names]
        site = place.path, _site(place, names, StackedSite)
        yield UnitLayer(
            "experts", place.path, count, parts, [site], recording=(place.path, record_stacked)
        )


@finder
def separate(place: Place) -> Iterator[UnitLayer]:
    """Experts in a ModuleDict or ModuleList called ``experts`` (Switch Transformers)."""
    module, (outside, _, name) = place.module, place.path.rpartition(".")
    experts = list(module.named_children())
    if (
        name != "experts"
        or not isinstance(module, nn.ModuleDict | nn.ModuleList)
        or len(experts) < 2
    ):
        return
    parts: list[Part] = []
    for unit, (child, expert) in enumerate(experts):
        for path, parameter in expert.named_parameters():
            if place.linear(f"{child}.{path.rpartition('.')[0]}") is None:
                return
            owner = np.full(len(parameter), unit)
            parts.append(Part(place.under(f"{child}.{path}"), 0, owner))
    runs = type(module).forward not in (nn.ModuleDict.forward, nn.ModuleList.forward)
    around = place.path if runs else outside  # where the forward that calls the experts is
    names = [part.parameter.removeprefix(f"{around}.") for part in parts]
    sites = [(place.under(child), _expert(place, unit)) for unit, (child, _) in enumerate(experts)]
    sites.append((around, _site(place, names, MixtureSite, around)))
    recording = (place.path, record_separate) if runs else None
    yield UnitLayer("experts", place.path, len(experts), parts, sites, recording=recording)


def _site(place: Place, names: list[str], cls: Any, around: str | None = None) -> Any:
    """What makes the site of a module with all experts below it, their parameters by name in it."""
    start = place.path if around is None else around

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> Any:
        gate = gate_of(place.path)
        assert gate is not None
        return cls(module, gate, {name: gate.parts[f"{start}.{name}"] for name in names})

    return make


def _expert(place: Place, unit: int) -> Any:
    """What makes the site of one expert."""

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> ExpertSite:
        gate = gate_of(place.path)
        assert gate is not None
        return ExpertSite(module, gate, unit)

    return make
