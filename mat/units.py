"""Units: sets of slices of a model's own parameters (paper section 1, "modules").

A *unit* is an attention head, a group of hidden neurons, an expert or a filter. It owns rows or
columns of ordinary parameters; nothing is copied, renamed or reshaped. Units that stand beside each
other in one part of the network form a :class:`UnitLayer`; all layers together are :class:`Units`,
a flat table in which row r is one unit.

Units of known models are found (``mat.adapters``); all others are named by hand::

    units = [
        Unit("low", rows("0.weight", 0, 64), rows("0.bias", 0, 64), cols("2.weight", 0, 64)),
        Unit("high", rows("0.weight", 64, 128), rows("0.bias", 64, 128), cols("2.weight", 64, 128)),
    ]
    gates = mat.attach_(model, config, units=units)
"""

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mat.tables import units_table

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# From a module, and the gate of a layer by the layer's name (None: not gated), to its site.
MakeSite = Callable[[nn.Module, Callable[[str], Any]], Any]
REST = -1  # owner of the rows that belong to no unit: they always train


@dataclass(frozen=True)
class Slice:
    """Rows (``dim`` 0) or columns (``dim`` 1) ``start`` to ``stop`` of a parameter."""

    parameter: str
    dim: int
    start: int
    stop: int


def rows(parameter: str, start: int, stop: int) -> Slice:
    """Rows ``start`` to ``stop`` of a parameter, by its name in the model."""
    return Slice(parameter, 0, start, stop)


def cols(parameter: str, start: int, stop: int) -> Slice:
    """Columns ``start`` to ``stop`` of a parameter, by its name in the model."""
    return Slice(parameter, 1, start, stop)


class Unit:
    """A unit named by hand.

    Args:
        name: What tables call it.
        slices: What it owns, see :func:`rows` and :func:`cols`.
        kind: Units of a kind are compared with each other (eq. 4, scope ``kind``).
    """

    def __init__(self, name: str, *slices: Slice, kind: str = "units") -> None:
        if not slices:
            raise ValueError(f"unit {name!r} owns nothing: give it rows(...) or cols(...)")
        self.name, self.slices, self.kind = name, slices, kind


@dataclass(frozen=True)
class Part:
    """What a layer's units own of one parameter.

    Attributes:
        parameter: The parameter's name in the model.
        dim: The axis that is divided among the units: 0 rows, 1 columns.
        owner: (size of that axis,) number of the unit that owns each row, or ``REST``.
    """

    parameter: str
    dim: int
    owner: IntArray

    def fingerprint(self) -> str:
        """Equal for equal divisions."""
        return f"{zlib.crc32(np.ascontiguousarray(self.owner, np.int64).tobytes()):08x}"

    @classmethod
    def even(cls, parameter: str, dim: int, n_units: int, size: int, blocks: int = 1) -> "Part":
        """Equal consecutive blocks; with ``blocks`` several such divisions one after the other.

        Args:
            parameter: The parameter's name.
            dim: The axis.
            n_units: U.
            size: Length of the axis, divisible by ``n_units * blocks``.
            blocks: 3 for a matrix of queries, keys and values stacked.

        Raises:
            ValueError: If the axis cannot be divided evenly.
        """
        if size % (n_units * blocks):
            raise ValueError(f"{parameter} has {size} rows, not divisible among {n_units} units")
        each = np.repeat(np.arange(n_units), size // (n_units * blocks))
        return cls(parameter, dim, np.tile(each, blocks))


@dataclass
class UnitLayer:
    """Units side by side: the heads of one attention, the filters of one convolution.

    Attributes:
        kind: ``heads``, ``ffn``, ``experts``, ``filters``, or a name given by hand.
        name: Where it is: the path of a module, or by hand of the first parameter.
        n_units: U.
        parts: What the units own.
        sites: Path of every module that runs differently while some units are frozen, and what
            makes its :class:`mat.layers.site.Site`.
        unit_names: Names of the units; numbers where empty.
        recording: For experts: path of the module that sends rows to them, and what the estimator
            runs in place of its forward, see :func:`mat.layers.experts.record_stacked`.
    """

    kind: str
    name: str
    n_units: int
    parts: list[Part]
    sites: list[tuple[str, "MakeSite"]] = field(default_factory=list)
    unit_names: list[str] = field(default_factory=list)
    recording: tuple[str, Callable[..., Any]] | None = None

    def parameters_of_a_unit(self, shapes: Mapping[str, Sequence[int]]) -> IntArray:
        """(U,) how many parameters each unit owns, given the shapes of the model's parameters."""
        total = np.zeros(self.n_units, np.int64)
        for part in self.parts:
            count = math.prod(shapes[part.parameter]) // len(part.owner)
            owned = part.owner[part.owner != REST]
            total += np.bincount(owned, minlength=self.n_units) * count
        return total


class Units:
    """All units of a model as one flat table: row r is ``kind[r]``, ``layer[r]``, ``unit[r]``.

    Attributes:
        layers: The layers in forward order.
        kind: (N,) kind of every unit.
        layer: (N,) number of its layer among those of its kind.
        unit: (N,) number of the unit in its layer.
        left_out: Path of every Linear and Conv2d without units, and why it has none.
        shapes: Shape of every parameter, by name; empty if made without the model.
        products: Size of every weight that multiplies activations, by name; likewise.
    """

    def __init__(
        self,
        layers: Sequence[UnitLayer],
        left_out: dict[str, str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.left_out = left_out or {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.products: dict[str, int] = {}
        for path, module in () if model is None else model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                self.shapes[name] = tuple(parameter.shape)
                if parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                    self.products[name] = parameter.numel()
        self._set(layers)

    def _set(self, layers: Sequence[UnitLayer]) -> None:
        """Lay the units of some layers out as the table."""
        self.layers = list(layers)
        counter: dict[str, int] = {}
        depth: list[int] = []
        for layer in self.layers:
            depth.append(counter.get(layer.kind, 0))
            counter[layer.kind] = depth[-1] + 1
        sizes = [layer.n_units for layer in self.layers]
        self.kind: NDArray[np.str_] = np.repeat(np.array([la.kind for la in layers], str), sizes)
        self.layer: IntArray = np.repeat(np.array(depth, np.int64), sizes)
        self.unit: IntArray = np.concatenate([np.arange(n) for n in sizes] or [np.arange(0)])
        _refuse_overlaps(self.layers)

    def __len__(self) -> int:
        return len(self.unit)

    def __repr__(self) -> str:
        return units_table(self)

    def slices(self) -> Iterator[tuple[UnitLayer, slice]]:
        """Each layer with its rows of the flat table."""
        start = 0
        for layer in self.layers:
            yield layer, slice(start, start + layer.n_units)
            start += layer.n_units

    def name(self, row: int) -> str:
        """What a message calls the unit of a row."""
        for layer, where in self.slices():
            if where.start <= row < where.stop:
                given = layer.unit_names
                own = given[row - where.start] if given else f"unit {row - where.start}"
                return f"{layer.kind} {layer.name} {own}"
        raise IndexError(row)

    def of_kinds(self, kinds: Sequence[str]) -> "Units":
        """The units of some kinds; the others belong to the rest.

        Raises:
            ValueError: If there is no unit of one of the kinds.
        """
        for kind in kinds:
            if kind not in self.kind:
                raise ValueError(
                    f"there are no {kind}: the model has {sorted(set(self.kind.tolist()))}"
                )
        chosen = copy.copy(self)
        chosen._set([layer for layer in self.layers if layer.kind in kinds])
        return chosen

    def left_out_in_words(self) -> str:
        """How many layers have no units, by reason."""
        reasons: dict[str, list[str]] = {}
        for path, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(path)
        return "; ".join(
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({reason})"
            for reason, paths in reasons.items()
        )


def by_hand(model: nn.Module, units: Sequence[Unit]) -> list[UnitLayer]:
    """Layers of units named by hand: units that own slices of the same parameter are one layer.

    Args:
        model: The model.
        units: Its units.

    Raises:
        ValueError: If a parameter does not exist, a slice lies outside it, or two units overlap.
    """
    parameters = dict(model.named_parameters())
    groups: list[list[Unit]] = []
    for unit in units:
        for piece in unit.slices:
            if piece.parameter not in parameters:
                raise ValueError(
                    f"unit {unit.name!r}: the model has no parameter {piece.parameter}"
                )
            size = parameters[piece.parameter].shape[piece.dim]
            if not 0 <= piece.start < piece.stop <= size:
                raise ValueError(
                    f"unit {unit.name!r}: {piece.start} to {piece.stop} is no part of the {size} "
                    f"along axis {piece.dim} of {piece.parameter}"
                )
        mine = {piece.parameter for piece in unit.slices}
        touching = [g for g in groups if any(mine & {p.parameter for p in u.slices} for u in g)]
        for group in touching:
            groups.remove(group)
        groups.append([u for group in touching for u in group] + [unit])
    given = list(units)
    ordered = sorted((sorted(g, key=given.index) for g in groups), key=lambda g: given.index(g[0]))
    return [_layer_by_hand(parameters, group) for group in ordered]


def _layer_by_hand(parameters: dict[str, nn.Parameter], group: list[Unit]) -> UnitLayer:
    parts: dict[str, Part] = {}
    for number, unit in enumerate(group):
        for piece in unit.slices:
            size = parameters[piece.parameter].shape[piece.dim]
            new = Part(piece.parameter, piece.dim, np.full(size, REST, np.int64))
            part = parts.setdefault(piece.parameter, new)
            if part.dim != piece.dim:
                raise ValueError(f"{piece.parameter} is divided by rows and by columns: choose one")
            taken = part.owner[piece.start : piece.stop]
            if (taken != REST).any():
                other = group[int(taken[taken != REST][0])]
                raise ValueError(
                    f"units {other.name!r} and {unit.name!r} overlap in {piece.parameter}"
                )
            taken[:] = number
    kinds = sorted({unit.kind for unit in group})
    if len(kinds) > 1:
        raise ValueError(
            f"units that share a parameter must be of one kind, not {', '.join(kinds)}"
        )
    first = group[0].slices[0].parameter  # of no other layer: a name for this one
    return UnitLayer(
        kinds[0], first, len(group), list(parts.values()), unit_names=[unit.name for unit in group]
    )


def _refuse_overlaps(layers: Sequence[UnitLayer]) -> None:
    owners: dict[str, str] = {}
    for layer in layers:
        for part in layer.parts:
            if owners.setdefault(part.parameter, layer.name) != layer.name:
                raise ValueError(
                    f"{part.parameter} belongs to units of {owners[part.parameter]} "
                    f"and of {layer.name}"
                )
