"""Products: weights that units own parts of, and the two factors of their gradients by sample.

The gradient of a weight for one sample is a product of two factors over the sample's positions:
the layer's input, which the forward pass knows, and the gradient of its output, which a backward
pass brings. Units own rows or columns of the weight, so one factor is divided among them ("per
unit") and the other is shared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.layers.gate import Index, take
from mat.units import REST, IntArray


@dataclass(frozen=True)
class Group:
    """Units that own equally many rows (columns) of a weight.

    Attributes:
        units: Their rows in the flat table.
        index: Which columns of the per-unit factor are theirs, unit by unit.
        count: Number of units u.
        each: Columns of a unit.
    """

    units: Index
    index: Index
    count: int
    each: int

    def of(self, factor: Tensor) -> Tensor:
        """(n, T, all) to (n, T, u, each); a view where the units follow one another."""
        return take(factor, self.index, 2).view(*factor.shape[:2], self.count, self.each)


def groups_of(owner: IntArray, first: int, device: torch.device) -> list[Group]:
    """The groups of a division.

    Args:
        owner: (size,) the unit of each column, or ``REST``.
        first: Row of unit 0 in the flat table.
        device: Where the factors are.
    """
    sizes = np.bincount(owner[owner != REST])
    order = np.argsort(owner, kind="stable")[np.count_nonzero(owner == REST) :]
    groups = []
    for each in np.unique(sizes[sizes > 0]):
        units = np.flatnonzero(sizes == each)
        columns = order[sizes[owner[order]] == each]
        rows, index = consecutive(first + units, device), consecutive(columns, device)
        groups.append(Group(rows, index, len(units), int(each)))
    return groups


def consecutive(numbers: IntArray, device: torch.device) -> Index:
    """A slice where the numbers follow one another, else the numbers."""
    if (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


@dataclass(frozen=True, eq=False)
class Product:
    """One weight, and its bias where the same units own it, as a product over positions.

    Attributes:
        path: Where it is, for messages.
        groups: The units.
        columns: Whether units own columns: the per-unit factor is then the input, else the
            gradient.
        shared: Width q of the shared factor.
        bias: Whether a bias belongs to it.
        routed: Whether it belongs to one expert, and sees only the rows that are sent there.
    """

    path: str
    groups: list[Group]
    columns: bool
    shared: int
    bias: bool
    routed: bool = False


@dataclass(frozen=True)
class Layout:
    """How inputs and outputs of a kind of layer become factors (n, T, .).

    Attributes:
        inputs: From an input and n.
        outputs: From an output, or its gradient, and n.
        channel: The axis of an output that rows of the weight make.
    """

    inputs: Callable[[Tensor, int], Tensor]
    outputs: Callable[[Tensor, int], Tensor]
    channel: int = -1


def _as_is(tensor: Tensor, samples: int) -> Tensor:
    return tensor


def _grouped(rows: Tensor, samples: int) -> Tensor:
    return rows.reshape(samples, -1, rows.shape[-1])  # (n, T, .)


ROUTED = Layout(_as_is, _as_is)
BY_SAMPLE = Layout(_grouped, _grouped)  # samples are the first axis, or blocks of it


@dataclass(eq=False)
class Tap:
    """One use of a product in a forward pass.

    Attributes:
        product: The product.
        layout: Of the layer.
        samples: n.
        positions: P rows of the output, n T unless routed.
        known: What went in.
        sizes: (1, n) rows of each sample, sorted by sample, of a routed product.
        gradients: Of what came out, one per backward pass.
    """

    product: Product
    layout: Layout
    samples: int
    positions: int
    known: Tensor
    sizes: Tensor | None = None
    gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.version = self.known._version

    def factors(self) -> tuple[Tensor, list[Tensor]]:
        """Input (n, T, .) and output gradients (n, T, .); of a routed product (P, .)."""
        if self.known._version != self.version:
            raise ValueError(f"the input of {self.product.path} is changed in place after its use")
        known = self.layout.inputs(self.known, self.samples)
        return known, [self.layout.outputs(g, self.samples) for g in self.gradients]

    def release(self) -> None:
        """Let go of the tensors."""
        self.known, self.version = self.known.new_empty(0), 0
        self.gradients.clear()


def convolution(module: nn.Conv2d) -> Layout:
    """The product of a convolution, over the positions of its output maps."""
    padding: list[int] = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def patches(x: Tensor, n: int) -> Tensor:
        """(n, I, H, W) to what a filter sees at every position, (n, T, I k k)."""
        x = F.pad(x, padding, mode) if any(padding) else x
        patches = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
        return patches.transpose(1, 2).reshape(n, -1, patches.shape[1])

    def positions(maps: Tensor, n: int) -> Tensor:
        """(n, C, H, W) to (n, T, C)."""
        return maps.flatten(2).transpose(1, 2).reshape(n, -1, maps.shape[1])

    return Layout(patches, positions, channel=1)
