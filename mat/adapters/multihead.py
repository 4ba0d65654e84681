"""Heads of ``nn.MultiheadAttention``, also within torch's encoder and decoder layers."""

from collections.abc import Callable, Iterator

import numpy as np
from torch import nn

from mat.adapters.find import Place, finder, linear_site, part_of
from mat.layers.gate import Gate
from mat.layers.multihead import MultiheadSite
from mat.units import Part, UnitLayer


@finder
def multihead(place: Place) -> Iterator[UnitLayer]:
    """The heads of an attention module with stacked queries, keys and values."""
    module = place.module
    if type(module) is not nn.MultiheadAttention or module.in_proj_weight is None:
        return
    if module.bias_k is not None or module.add_zero_attn or not place.trains(module.in_proj_weight):
        return
    if place.linear("out_proj") is None:
        return
    heads, width = module.num_heads, module.embed_dim
    weight, bias = place.under("in_proj_weight"), place.under("in_proj_bias")
    parts = [Part.even(weight, 0, heads, 3 * width, blocks=3)]
    if module.in_proj_bias is not None:
        parts.append(Part.even(bias, 0, heads, 3 * width, blocks=3))
    owner = np.repeat(np.arange(heads), width // heads)
    if place.head_output:
        parts += place.parts("out_proj", owner, 1)
    below = None if place.head_output else (place.path, owner)

    def core(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> MultiheadSite:
        gate = gate_of(place.path)
        assert gate is not None and isinstance(module, nn.MultiheadAttention)
        return MultiheadSite(module, gate, gate.parts[weight], part_of(gate, bias))

    sites = [linear_site(place.path, place.under("out_proj"), below), (place.path, core)]
    yield UnitLayer("heads", place.path, heads, parts, sites)
