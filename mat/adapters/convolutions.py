"""Filters: convolutions in a Sequential, and in torchvision's VGG and ResNet.

A unit is a filter: its kernel row, bias, and affine pair of the batch norm right behind it. A
convolution whose input comes from the filters of another one, with nothing between that mixes
channels, needs an input gradient at the active filters alone; behind a residual join it needs all.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from torch import nn

from mat.adapters.find import ELEMENTWISE, Place, convolution_site, finder, part_of, unfit
from mat.layers.channelwise import NormSite, PoolSite, ReluSite
from mat.layers.gate import Gate
from mat.units import IntArray, MakeSite, Part, UnitLayer

# Keep channels apart, too; a gradient goes back through them densely.
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout2d)
RESNET = "torchvision.models.resnet"
BRANCHES = {  # in the order that a module of torchvision's ResNet runs them
    "BasicBlock": ("conv1", "bn1", "relu", "conv2", "bn2"),
    "Bottleneck": ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"),
    "ResNet": ("conv1", "bn1", "relu", "maxpool"),
}


@finder
def filters(place: Place) -> Iterator[UnitLayer]:
    """The filters of the convolutions that follow each other in a module."""
    yield from in_chain(list(chain(place)), place.tied)


def chain(place: Place) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what runs one after the other in a place, if that is known."""
    parent = place.model.get_submodule(place.path.rpartition(".")[0]) if place.path else None
    if is_sequential(place.module):
        if parent is None or not is_sequential(parent):
            yield from leaves(place.path, place.module)
        return
    for kind in type(place.module).__mro__:
        same_forward = getattr(kind, "forward", None) is type(place.module).forward
        if kind.__module__ == RESNET and same_forward:
            for name in BRANCHES.get(kind.__name__, ()):
                yield from leaves(place.under(name), getattr(place.module, name))


def is_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in nested Sequentials, in order."""
    if not is_sequential(module):
        yield path, module
        return
    for name, child in module._modules.items():
        assert child is not None
        yield from leaves(f"{path}.{name}" if path else name, child)


def in_chain(modules: list[tuple[str, nn.Module]], tied: frozenset[int]) -> list[UnitLayer]:
    """The layers of filters among modules that run one after the other.

    Args:
        modules: Path and module, in order.
        tied: Ids of the parameters that several modules use.
    """
    layers: list[UnitLayer] = []
    feeding: UnitLayer | None = None  # whose filters make the channels at hand
    before: nn.Module | None = None
    carrying: set[int] = set()
    uses = Counter(id(module) for _, module in modules)
    for path, module in modules:
        alone = uses[id(module)] == 1 and id(getattr(module, "weight", None)) not in tied
        if type(module) is nn.Conv2d:
            below, feeding = feeding, None
            if alone and module.weight.requires_grad and unfit(module) is None:
                feeding = UnitLayer("filters", path, module.out_channels, [])
                claim_filters(feeding, path, module)
                feeding.sites.append(convolution_site(path, path, below))
                layers.append(feeding)
        elif feeding is None:
            continue
        elif type(module) is nn.BatchNorm2d and type(before) is nn.Conv2d and alone:
            claim_filters(feeding, path, module)
            feeding.sites.append(norm_site(path, feeding))
        elif type(module) in (nn.ReLU, nn.MaxPool2d) and not getattr(module, "return_indices", 0):
            if id(module) not in carrying:
                feeding.sites.append((path, channel_site))
            carrying.add(id(module))
        elif not isinstance(module, (*ELEMENTWISE, *POOLS)):
            feeding = None
        before = module
    return layers


def claim_filters(layer: UnitLayer, path: str, module: nn.Module) -> None:
    """Give each filter its row of a module's parameters."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            layer.parts.append(Part(f"{path}.{name}", 0, channel_owner(layer)))


def channel_owner(layer: UnitLayer) -> IntArray:
    """(C,) the owner of each channel: the filter of the same number."""
    return np.arange(layer.n_units)


def norm_site(path: str, layer: UnitLayer) -> tuple[str, MakeSite]:
    """What makes the site of a batch norm."""

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> NormSite:
        gate = gate_of(layer.name)
        assert gate is not None and isinstance(module, nn.BatchNorm2d)
        pair = part_of(gate, f"{path}.weight"), part_of(gate, f"{path}.bias")
        return NormSite(module, gate, channel_owner(layer), *pair)

    return path, make


def channel_site(module: nn.Module, _: Callable[[str], Gate | None]) -> ReluSite | PoolSite:
    """The site of a ReLU or max pool."""
    return ReluSite(module) if isinstance(module, nn.ReLU) else PoolSite(module)
