"""Finding units: every module is shown to the finders, and what nobody claims is named as left out.

A finder is a generator ``finder(place)`` of :class:`mat.units.UnitLayer`; :func:`finder` registers one,
also for modules of your own.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mat.layers.convolution import ConvolutionSite, geometry
from mat.layers.gate import Gate, GatedPart
from mat.layers.linear import LinearSite
from mat.units import IntArray, MakeSite, Part, Unit, UnitLayer, Units, by_hand

Finder = Callable[["Place"], Iterator[UnitLayer]]
FINDERS: list[Finder] = []
BUILT_IN = ("attention", "feedforward", "experts", "convolutions", "sequential")


def finder(function: Finder) -> Finder:
    """Register a finder: it is shown every module, and yields the layers of units that start there."""
    FINDERS.append(function)
    return function


@dataclass(frozen=True)
class Place:
    """One module, and where it is.

    Attributes:
        model: The whole model.
        path: The module's path in it.
        module: The module.
        groups: Wanted number of groups in a feed-forward layer; None: as many as heads.
        head_output: Whether heads own their columns of the output projection.
    """

    model: nn.Module
    path: str
    module: nn.Module
    groups: int | None = None
    head_output: bool = True

    def under(self, name: str) -> str:
        """The path of something below the module; ``../`` leads out of it."""
        path = self.path
        while name.startswith("../"):
            path, name = path.rpartition(".")[0], name[3:]
        return f"{path}.{name}" if path else name

    def linear(self, name: str) -> nn.Linear | None:
        """The plain linear layer of a name below the module, if there is one that trains."""
        try:
            found = self.model.get_submodule(self.under(name))
        except AttributeError:
            return None
        # Subclasses (quantised, with adapters) compute something else.
        plain = type(found) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return found if plain and found.weight.requires_grad else None  # type: ignore[return-value]

    def parts(self, name: str, owner: IntArray, dim: int) -> list[Part]:
        """The parts of a linear layer's weight, and by rows of its bias."""
        linear = self.linear(name)
        assert linear is not None
        found = [Part(self.under(f"{name}.weight"), dim, owner)]
        if dim == 0 and linear.bias is not None:
            found.append(Part(self.under(f"{name}.bias"), 0, owner))
        return found


def linear_site(layer: str, path: str, owner: IntArray | None = None) -> tuple[str, MakeSite]:
    """The site of a linear layer.

    Args:
        layer: Name of the unit layer.
        path: The linear layer's path.
        owner: If its weight is nobody's, but its input comes from the layer's units: whose each column is.
    """

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> LinearSite:
        gate = gate_of(layer)
        assert gate is not None and isinstance(module, nn.Linear)
        weight, bias = part_of(gate, f"{path}.weight"), part_of(gate, f"{path}.bias")
        return LinearSite(module, weight, bias, None if owner is None else (gate, owner))

    return path, make


def convolution_site(layer: str, path: str, below: UnitLayer | None = None) -> tuple[str, MakeSite]:
    """The site of a convolution whose kernel belongs to units.

    Args:
        layer: Name of the unit layer.
        path: The convolution's path.
        below: The filters that make its input channels, if nothing else does.
    """

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> ConvolutionSite:
        gate = gate_of(layer)
        assert gate is not None and isinstance(module, nn.Conv2d)
        weight, bias = gate.parts[f"{path}.weight"], part_of(gate, f"{path}.bias")
        source = None if below is None else gate_of(below.name)
        fed = None if source is None or below is None else (source, np.arange(below.n_units))
        return ConvolutionSite(module, weight, bias, fed)

    return path, make


def unfit(module: nn.Conv2d) -> str | None:
    """Why a convolution has no site, if it has none."""
    if module.groups > 1:
        return "it is grouped (or depthwise): each filter sees few channels, skipping some saves nothing"
    if geometry(module) is None:
        return "it does not pad evenly with zeros"
    return None


def part_of(gate: Gate, parameter: str) -> GatedPart | None:
    """A gate's share of a parameter, if it has one."""
    return gate.parts.get(parameter)


def find_units(
    model: nn.Module,
    *,
    units: Sequence[Unit] | None = None,
    groups: int | None = None,
    head_output: bool = True,
) -> Units:
    """The units of a model, as a table.

    Args:
        model: Any model with known layers: transformers' BERT, ViT, Llama and Switch families, Mixtral,
            torchvision's VGG and ResNet, ``nn.TransformerEncoderLayer``, a Sequential of linear layers.
        units: Units named by hand, instead of searching.
        groups: Groups per feed-forward layer; as many as the model has heads when None.
        head_output: Whether heads own their columns of the output projection.

    Returns:
        The units; ``left_out`` names every Linear and Conv2d without units, and why.

    Raises:
        ValueError: If nothing known is found.
    """
    if units is not None:
        layers = by_hand(model, units)
        for layer in layers:
            layer.sites += sites_by_hand(model, layer)
        return Units(layers, {})
    for name in BUILT_IN:
        importlib.import_module(f"mat.adapters.{name}")
    layers = []
    for path, module in model.named_modules():
        place = Place(model, path, module, groups, head_output)
        for find in FINDERS:
            layers += find(place)
    if not layers:
        raise ValueError(
            f"no units are found in {type(model).__name__}: name them by hand, as in "
            "mat.attach_(model, config, units=[mat.Unit('a', mat.rows('layer.weight', 0, 64)), ...])"
        )
    return Units(layers, _left_out(model, layers))


def sites_by_hand(model: nn.Module, layer: UnitLayer) -> Iterator[tuple[str, MakeSite]]:
    """Sites of the linear layers and convolutions whose weights belong to units named by hand."""
    for part in layer.parts:
        path, _, name = part.parameter.rpartition(".")
        module = model.get_submodule(path)
        if name == "weight" and type(module) is nn.Linear:
            yield linear_site(layer.name, path)
        elif name == "weight" and type(module) is nn.Conv2d and unfit(module) is None:
            yield convolution_site(layer.name, path)


def _left_out(model: nn.Module, layers: list[UnitLayer]) -> dict[str, str]:
    """Why Linear and Conv2d layers have no units."""
    owned = {part.parameter for layer in layers for part in layer.parts}
    reasons: dict[str, str] = {}
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or f"{path}.weight" in owned:
            continue
        if not module.weight.requires_grad:
            reasons[path] = "its weights are frozen (requires_grad is False)"
        elif uses[id(module.weight)] > 1:
            reasons[path] = "its weights are tied to another layer's"
        elif type(module) not in (nn.Linear, nn.Conv2d):
            reasons[path] = f"it is a {type(module).__name__}, not a plain layer"
        elif isinstance(module, nn.Conv2d) and (reason := unfit(module)) is not None:
            reasons[path] = reason
        else:
            reasons[path] = "no known layer of units has it: it belongs to the rest"
    return reasons


def count_heads(model: nn.Module) -> int | None:
    """Number of heads that a configuration of transformers names."""
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "n_heads", "num_heads"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
