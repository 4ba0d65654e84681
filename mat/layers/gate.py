"""A gate: which units of one layer are active, and what of each parameter that makes trainable.

Two backward modes (paper section 5):

``cut``    nothing flows back through a frozen unit, and nothing of its backward is computed;
``exact``  only the weight gradients of frozen units are skipped: the others get the dense gradient.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mat.units import REST, BoolArray, IntArray, Part

BackwardMode = Literal["cut", "exact"]
Index = None | slice | Tensor  # of an axis: all of it, a run of it, or numbers
SETS = 16  # of a layer, whose indices are kept


def as_index(wanted: BoolArray, device: torch.device) -> Index:
    """The cheapest form of a mask: None where all is wanted, a slice where one run is."""
    numbers = np.flatnonzero(wanted)
    if len(numbers) == len(wanted):
        return None
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


def length(index: Index, size: int) -> int:
    """How much of an axis of a size an index takes."""
    if isinstance(index, slice):
        return int(index.stop - index.start)
    return size if index is None else len(index)


def take(tensor: Tensor, index: Index, dim: int) -> Tensor:
    """Part of a tensor along an axis; a view where it can be one."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    return tensor.index_select(dim, index)


def put(target: Tensor, index: Index, dim: int, source: Tensor) -> None:
    """Write into part of a tensor along an axis."""
    if isinstance(index, Tensor):
        target.index_copy_(dim, index, source)
    else:
        take(target, index, dim).copy_(source)


def spread(source: Tensor, index: Index, dim: int, size: int) -> Tensor:
    """A tensor with zeros beside the given part of an axis of a size."""
    if index is None:
        return source
    shape = list(source.shape)
    shape[dim] = size
    target = source.new_zeros(shape)
    put(target, index, dim, source)
    return target


class GatedPart:
    """What a gate's units own of one parameter, with the gate as it stands.

    The gradient of the active rows has two homes. ``p.grad`` with the parameter's shape and zeros
    in frozen rows is the usual one. With ``compact`` (an optimiser of ours asked for it) it is a
    block of the active rows alone, rows first whatever ``dim``, and no full-size gradient is made.

    Attributes:
        gate: Whose units they are.
        parameter: The model's parameter.
        part: The division.
        active: Index of the rows that train (those of no unit included).
        frozen: Index of the others.
        compact: Whether gradients are blocks.
        used: Whether the optimiser has taken a step along the block that there is.
    """

    def __init__(self, gate: "Gate", parameter: nn.Parameter, part: Part) -> None:
        self.gate, self.parameter, self.part = gate, parameter, part
        self.compact = self.used = False
        self._leaf: Tensor | None = None
        owner = part.owner
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
        # Runs of rows of one owner: (owner, start, stop).
        self.runs = [(int(owner[a]), a, b) for a, b in pairwise(edges)]
        self._run_of_row = torch.from_numpy(np.repeat(np.arange(len(self.runs)), np.diff(edges)))
        self.update()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.note()  # copying a parameter, or reading it from a file, loses its attributes

    def note(self) -> None:
        """Tell the parameter, so that optimisers find out."""
        self.parameter._gated = self  # type: ignore[attr-defined]

    @property
    def dim(self) -> int:
        """The axis that is divided."""
        return self.part.dim

    @property
    def whole(self) -> bool:
        """Whether every row trains."""
        return self.active is None

    @property
    def wanted(self) -> bool:
        """Whether it wants a gradient: one of zeros too, where that has the parameter's shape."""
        return self.count > 0 or not self.compact

    def update(self) -> None:
        """Follow the gate, and the parameter to its device."""
        self.active, self.frozen, self.count = self.gate.divide(self.part.owner)
        self._run_of_row = self._run_of_row.to(self.parameter.device)
        active = self.gate.active
        # Number, start and stop of every run that trains.
        self.active_runs = [
            (i, a, b) for i, (u, a, b) in enumerate(self.runs) if u == REST or active[u]
        ]
        self.run_lengths = [b - a for _, a, b in self.active_runs]
        self._leaf, self.used = None, False

    def home(self, weight: Tensor) -> Tensor:
        """What autograd differentiates in a forward pass that runs with ``weight``.

        Raises:
            RuntimeError: If the block of an earlier step is still there: torch would add to it.
        """
        if not self.compact or self.whole or weight is not self.parameter:
            return weight
        if self.used:
            raise RuntimeError(
                f"the gradient of {self.part.parameter} is that of an earlier step: with "
                "compact=True clear gradients with optimizer.zero_grad(), as model.zero_grad() "
                "does not see them"
            )
        if self._leaf is None:
            shape = (self.count, *self.rest_shape)
            nothing = weight.detach().new_zeros(()).expand(shape)
            self._leaf = nothing.requires_grad_(self.wanted)
        return self._leaf

    def deliver(self, block: Tensor, home: Tensor) -> Tensor:
        """The gradient of a home, given that of the active rows (rows first)."""
        rows = block.transpose(0, self.dim)
        if home is self._leaf:
            return block
        if self.whole:
            return rows
        full = torch.zeros_like(
            home
        )  # in the home's memory format, or autograd copies it once more
        put(full, self.active, self.dim, rows.to(full.dtype))
        return full

    def gradient(self) -> Tensor | None:
        """Gradient of the active rows, rows first, or None if there is none."""
        if self.block is not None:
            return self.block
        grad = self.parameter.grad
        return None if grad is None else take(grad, self.active, self.dim).transpose(0, self.dim)

    @property
    def block(self) -> Tensor | None:
        """The compact gradient, if there is one."""
        return None if self._leaf is None else self._leaf.grad

    def per_row(self, values: Tensor) -> Tensor:
        """Values of the runs (runs,) for every row of the divided axis, (size,)."""
        return values[self._run_of_row]

    def clear(self) -> None:
        """Forget the block."""
        self.used = False
        if self._leaf is not None:
            self._leaf.grad = None

    @property
    def rest_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        shape = list(self.parameter.shape)
        shape[0], shape[self.dim] = shape[self.dim], shape[0]
        return tuple(shape[1:])


@dataclass
class Indices:
    """What :meth:`Gate.divide` and :meth:`Gate.widen` have found for one set, by division."""

    divided: dict[bytes, tuple[Index, Index, int]] = field(default_factory=dict)
    widened: dict[bytes, Index] = field(default_factory=dict)


class Gate:
    """The gate of one layer of units.

    Attributes:
        kind, name: Of the layer.
        active: (U,) boolean, a view of the flat vector of all gates.
        n_units, n_active: U, and how many of them train.
        mode: Backward mode.
        transparent: Whether the layer runs as if there were no gate (the estimator asks for it).
        parts: By the parameter's name in the model.
    """

    def __init__(self, kind: str, name: str, active: BoolArray, mode: BackwardMode) -> None:
        self.kind, self.name, self.active, self.mode = kind, name, active, mode
        self.n_units = self.n_active = len(active)
        self.version = 0  # counts changes of the set
        self.transparent = False
        self.parts: dict[str, GatedPart] = {}
        self.device = torch.device("cpu")
        self._indices = Indices()
        # Of the last sets. One that comes back copies nothing to the device again: while a CUDA
        # graph is captured, such a copy is an error.
        self._sets: dict[tuple[torch.device, bytes], Indices] = {}

    def add(self, parameter: nn.Parameter, part: Part) -> GatedPart:
        """Take in a part."""
        self.device = parameter.device
        self.parts[part.parameter] = GatedPart(self, parameter, part)
        self.parts[part.parameter].note()
        return self.parts[part.parameter]

    def divide(self, owner: IntArray) -> tuple[Index, Index, int]:
        """Index of the rows that train, of the others, and the number of the first.

        Args:
            owner: (size,) the unit of each row, or ``REST``. Equal divisions give the same objects.
        """
        key, divided = owner.tobytes(), self._indices.divided
        if key not in divided:
            mask = (owner == REST) | self.active[owner]
            pair = as_index(mask, self.device), as_index(~mask, self.device)
            divided[key] = *pair, int(mask.sum())
        return divided[key]

    def indices(self) -> list[Index]:
        """All indices in use."""
        divided = [index for pair in self._indices.divided.values() for index in pair[:2]]
        return divided + list(self._indices.widened.values())

    def widen(self, owner: IntArray, size: int) -> Index:
        """Index of ``size`` rows: first those that train, then as many others as it takes.

        Args:
            owner: See :meth:`divide`. Equal divisions give the same object.
            size: At least the number of rows that train.
        """
        active, _, count = self.divide(owner)
        if size == len(owner):
            return None
        if size == count:
            return active
        key, widened = owner.tobytes(), self._indices.widened
        if key not in widened:
            trains = (owner == REST) | self.active[owner]
            first, others = np.flatnonzero(trains), np.flatnonzero(~trains)[: size - count]
            widened[key] = torch.from_numpy(np.concatenate([first, others])).to(self.device)
        return widened[key]

    def update(self) -> None:
        """Follow the flat vector, and the parameters to their device."""
        self.version += 1
        self.n_active = int(self.active.sum())
        self.device = next(iter(self.parts.values())).parameter.device
        key = self.device, self.active.tobytes()
        self._indices = self._sets[key] = self._sets.pop(key, Indices())  # the newest last
        if len(self._sets) > SETS:
            del self._sets[next(iter(self._sets))]
        for part in self.parts.values():
            part.update()

    def follow(self) -> None:
        """Bring the indices to the device that the parameters are on now."""
        if next(iter(self.parts.values())).parameter.device != self.device:
            self.update()

    @property
    def open(self) -> bool:
        """Whether the layer runs untouched: all units train, or no gradient is wanted."""
        return self.transparent or self.n_active == self.n_units or not torch.is_grad_enabled()

    def units(self, each: int = 1) -> tuple[Index, Index, int]:
        """Index of the active units, of the frozen ones, and the number of the first.

        Args:
            each: Rows of a unit, where an axis has several (queries that share a key-value head).
        """
        return self.divide(np.repeat(np.arange(self.n_units), each))
