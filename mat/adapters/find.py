"""Finding units: every module is shown to the finders, and what nobody claims is named as left out.

A finder is a generator ``finder(place)`` of :class:`mat.units.UnitLayer`; :func:`finder` registers
one, also for modules of your own.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from torch import Tensor, nn

from mat.layers.convolution import ConvolutionSite, geometry
from mat.layers.gate import Gate, GatedPart
from mat.layers.linear import LinearSite
from mat.layers.masked import MaskedSite
from mat.units import IntArray, MakeSite, Part, Unit, UnitLayer, Units, by_hand

Finder = Callable[["Place"], Iterator[UnitLayer]]
FINDERS: list[Finder] = []
BUILT_IN = ("attention", "multihead", "feedforward", "experts", "convolutions", "sequential")
# What keeps neurons (channels) apart, so that a frozen one's column needs no gradient.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.AlphaDropout, nn.Identity,
)  # fmt: skip


def finder(function: Finder) -> Finder:
    """Register a finder: it sees every module, and yields the layers of units that start there."""
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
        tied: Id of every parameter that several modules use.
        refused: Path of what a finder knows but must leave alone, and why; finders add to it.
    """

    model: nn.Module
    path: str
    module: nn.Module
    groups: int | None = None
    head_output: bool = True
    tied: frozenset[int] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)

    def under(self, name: str) -> str:
        """The path of something below the module; ``../`` leads out of it."""
        path = self.path
        while name.startswith("../"):
            path, name = path.rpartition(".")[0], name[3:]
        return f"{path}.{name}" if path else name

    def linear(self, name: str) -> nn.Linear | None:
        """The plain linear layer of a name below the module, if there is one that trains."""
        try:
            linear = self.model.get_submodule(self.under(name))
        except AttributeError:
            return None
        return linear if is_plain(linear) and self.trains(linear.weight) else None

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Note why the layers of some names get no units."""
        self.refused.update({self.under(name): reason for name in names})

    def trains(self, weight: Tensor) -> bool:
        """Whether a weight trains, for one module alone."""
        return weight.requires_grad and id(weight) not in self.tied

    def parts(self, name: str, owner: IntArray, dim: int) -> list[Part]:
        """The parts of a linear layer's weight, and by rows of its bias."""
        linear = self.linear(name)
        assert linear is not None
        parts = [Part(self.under(f"{name}.weight"), dim, owner)]
        if dim == 0 and linear.bias is not None:
            parts.append(Part(self.under(f"{name}.bias"), 0, owner))
        return parts


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes what ``nn.Linear`` does: no quantised or adapted weights."""
    plain = type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return plain and type(module.weight) is nn.Parameter


def linear_site(
    layer: str, path: str, below: tuple[str, IntArray] | None = None
) -> tuple[str, MakeSite]:
    """The site of a linear layer.

    Args:
        layer: Name of the unit layer that owns its weight, or makes its input.
        path: The linear layer's path.
        below: Name of the unit layer that makes its input, and the owner of each input column.
    """

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> LinearSite:
        gate = gate_of(layer)
        assert gate is not None and isinstance(module, nn.Linear)
        weight, bias = part_of(gate, f"{path}.weight"), part_of(gate, f"{path}.bias")
        source = None if below is None else gate_of(below[0])
        return LinearSite(
            module, weight, bias, None if below is None or source is None else (source, below[1])
        )

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
        return "it is grouped: its filters see few channels each, so skipping some saves nothing"
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
        model: Any model with known layers: transformers' BERT, ViT, Llama and Switch families,
            Mixtral, torchvision's VGG and ResNet, ``nn.TransformerEncoderLayer``, a Sequential of
            linear layers or convolutions.
        units: Units named by hand, instead of searching.
        groups: Groups per feed-forward layer; as many as the model has heads when None.
        head_output: Whether heads own their columns of the output projection.

    Returns:
        The units; ``left_out`` names every Linear and Conv2d without units, and why.

    Raises:
        ValueError: If nothing known is found.
    """
    if units is not None:
        return Units([with_sites(model, layer) for layer in by_hand(model, units)], {}, model)
    for name in BUILT_IN:
        importlib.import_module(f"mat.adapters.{name}")
    tied = _tied(model)
    layers: list[UnitLayer] = []
    owned: set[str] = set()
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        place = Place(model, path, module, groups, head_output, tied, refused)
        for layer in (layer for find in FINDERS for layer in find(place)):
            names = {part.parameter for part in layer.parts}
            if not names & owned:  # an expert's feed-forward layer is inside a unit already
                layers.append(layer)
                owned |= names
    left_out = _left_out(model, layers, tied, refused)
    if not layers:
        parameter = next((name for name, _ in model.named_parameters()), "layer.weight")
        reasons = Units([], left_out).left_out_in_words()
        raise ValueError(
            f"no units are found in {type(model).__name__}{reasons and f', left out: {reasons}'}; "
            "name them by hand, as in mat.attach_(model, config, "
            f"units=[mat.Unit('a', mat.rows('{parameter}', 0, 64)), ...])"
        )
    return Units(layers, left_out, model)


def with_sites(model: nn.Module, layer: UnitLayer) -> UnitLayer:
    """A layer named by hand, with a site for every module whose parameters it owns.

    Raises:
        ValueError: If a parameter does not train.
    """
    owned, tied = {part.parameter for part in layer.parts}, _tied(model)
    for name in sorted(owned):
        if not model.get_parameter(name).requires_grad:
            raise ValueError(
                f"{name} is frozen (requires_grad is False): name units of parameters that train"
            )
    for path in dict.fromkeys(part.parameter.rpartition(".")[0] for part in layer.parts):
        module = model.get_submodule(path)
        around = model.get_submodule(path.rpartition(".")[0])
        # A bias alone has no product that could be skipped. Attention of torch calls no output
        # projection, and of a weight with several uses each adds to the gradient.
        gated = (
            f"{path}.weight" in owned
            and id(module.weight) not in tied
            and not isinstance(around, nn.MultiheadAttention)
        )
        if gated and is_plain(module):
            layer.sites.append(linear_site(layer.name, path))
        elif gated and type(module) is nn.Conv2d and unfit(module) is None:
            layer.sites.append(convolution_site(layer.name, path))
        else:
            layer.sites.append(masked_site(layer.name, path))
    return layer


def masked_site(layer: str, path: str) -> tuple[str, MakeSite]:
    """The site of a module that no gated backward is known for."""

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> MaskedSite:
        gate = gate_of(layer)
        assert gate is not None
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        return MaskedSite(module, gate, [p for p in gate.parts.values() if id(p.parameter) in own])

    return path, make


def _tied(model: nn.Module) -> frozenset[int]:
    """Id of every parameter that several modules use."""
    uses = Counter(
        id(parameter)
        for module in model.modules()  # each once: a module under two names is one module
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    return frozenset(key for key, count in uses.items() if count > 1)


def _left_out(
    model: nn.Module, layers: list[UnitLayer], tied: frozenset[int], refused: dict[str, str]
) -> dict[str, str]:
    """Why Linear and Conv2d layers have no units."""
    owned = {part.parameter for layer in layers for part in layer.parts}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or f"{path}.weight" in owned:
            continue
        if type(module) not in (nn.Linear, nn.Conv2d) and not is_plain(module):
            reasons[path] = f"it is a {type(module).__name__}, not a plain layer"
        elif isinstance(module, nn.Conv2d) and (reason := unfit(module)) is not None:
            reasons[path] = reason
        elif not module.weight.requires_grad:
            reasons[path] = "its weights are frozen (requires_grad is False)"
        elif id(module.weight) in tied:
            reasons[path] = "its weights are tied to another layer's"
        else:
            rest = "no known layer of units has it: it belongs to the rest"
            reasons[path] = refused.get(path, rest)
    return reasons


def count_heads(model: nn.Module, module: nn.Module) -> int | None:
    """Number of heads of the attention in a module, or that the model's configuration names."""
    for place in (getattr(module, "self_attn", None), getattr(model, "config", None)):
        for name in ("num_attention_heads", "n_heads", "num_heads"):
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None
