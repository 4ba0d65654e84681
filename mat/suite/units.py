"""Units and gates: layers whose parameters have the unit as first axis, and backward only through active units.

A *unit* is what the paper calls a module: an attention head, a feed-forward group, an expert, a filter.
``UnitLayer`` stores every gated parameter unit-major, so "unit u of this parameter" is always ``p[u]``.
A gate is a boolean vector over the layer's units and a backward mode (paper section 5):

``cut``    nothing flows back through a frozen unit: its part of the forward pass runs without gradients, keeps no
           activations and costs no backward at all;
``exact``  only the weight gradients of frozen units are skipped, so active units receive the dense gradient.

Gradients of the active units land where the optimiser finds them (``UnitLayer.gradient``): in ``p.grad`` when all
units are active, else in a compact block with one row per active unit. Frozen units never get a gradient tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mat.suite.interface import Flops

BackwardMode = Literal["cut", "exact"]
UnitTensors = dict[str, Tensor]
BoolArray = NDArray[np.bool_]


@dataclass
class Tap:
    """One product inside a unit layer, as the mNTK estimator needs it.

    The gradient of ``weight[u]`` for one sample is ``per_unit[:, u].T @ shared``, summed over the sample's
    positions. One of the two factors is known in the forward pass; the other is the gradient of ``output``.

    Attributes:
        layer: The layer that recorded it.
        weight: Name of the unit parameter, (U, p, q).
        known: The forward factor: ``shared`` (n, T, q), or ``per_unit`` (n, T, U, p).
        known_is_shared: Which of the two factors ``known`` is.
        output: Tensor whose gradient is the other factor.
        sizes: (U, n) positions of each unit in each sample, for layers that send every position to one unit; else
            None. The factors are then (N, q) and (N, p) of all N = n T positions, sorted by unit, then by sample.
    """

    layer: "UnitLayer"
    weight: str
    known: Tensor
    known_is_shared: bool
    output: Tensor
    sizes: Tensor | None = None


@dataclass
class Tape:
    """What the unit layers recorded during one forward pass, in forward order.

    Attributes:
        layers: Ids of the layers that record.
        taps: The products.
        constants: What layers fixed at the tape's first pass (statistics of batch norm), by the layer's id.
    """

    layers: frozenset[int]
    taps: list[Tap] = field(default_factory=list)
    constants: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def record(self, tap: Tap) -> None:
        """Take in one product."""
        self.taps.append(tap)


@dataclass
class _Block:
    """Rows of one parameter, gathered; valid while the parameter's version counter stands."""

    rows: Tensor
    version: int


class UnitLayer(nn.Module):
    """A layer made of units whose contributions add up: ``forward(x) = sum over units of compute(x, unit)``.

    Subclasses register unit-major parameters with :meth:`add_unit_parameter` and implement :meth:`compute`, which
    must work for any subset of the units. Everything about gates lives here.

    Args:
        kind: Plural name of the units (``heads``, ``ffn``, ...), the key of ``selection.units``.
        n_units: Number of units U.
    """

    routed = False  # whether each position goes to one unit (see Tap.sizes)

    def __init__(self, kind: str, n_units: int) -> None:
        super().__init__()
        self.kind = kind
        self.n_units = n_units
        self.mode: BackwardMode = "cut"
        self.active: BoolArray = np.ones(n_units, dtype=bool)
        self.n_active = n_units
        self.tape: Tape | None = None
        self.products: dict[str, str | None] = {}
        self._unit_names: list[str] = []
        self._index = {True: torch.arange(n_units), False: torch.arange(0)}  # numbers of the active, of the frozen
        self._blocks: dict[tuple[str, bool], _Block] = {}

    def add_unit_parameter(self, name: str, value: Tensor) -> None:
        """Register a gated parameter of shape (U, ...)."""
        if value.shape[0] != self.n_units:
            raise ValueError(f"{name} has {value.shape[0]} rows for {self.n_units} units")
        self.register_parameter(name, nn.Parameter(value))
        self._unit_names.append(name)

    def add_product(self, weight: str, value: Tensor, bias: str | None = None) -> None:
        """Register a weight (U, p, q) that is one matrix product over tokens, with a zero bias (U, p) if named."""
        self.add_unit_parameter(weight, value)
        if bias is not None:
            self.add_unit_parameter(bias, torch.zeros(value.shape[:2]))
        self.products[weight] = bias

    def product_shapes(self) -> list[tuple[int, int, bool]]:
        """(p, q, has a bias) of every product, in forward order."""
        shapes = ((self.get_parameter(weight).shape, bias) for weight, bias in self.products.items())
        return [(shape[1], shape[2], bias is not None) for shape, bias in shapes]

    def inner_flops(self, tokens: int, length: int) -> int:
        """Forward FLOPs per unit of what lies between the products; its backward costs twice as much."""
        return 0

    def step_flops(self, samples: int, length: int, n_active: int, mode: BackwardMode, padded: bool = True) -> Flops:
        """A training step's FLOPs of this layer (paper section 5).

        Args:
            samples: Samples in the batch.
            length: Tokens per sample.
            n_active: Units that are back-propagated.
            mode: Backward mode.
            padded: Count padding too; there is none in matrix products over tokens.

        Returns:
            FLOPs by column.
        """
        tokens = samples * length
        products = sum(2 * tokens * p * q for p, q, _ in self.product_shapes())
        inner = self.inner_flops(tokens, length)
        propagated = n_active if mode == "cut" else self.n_units
        return Flops(
            forward=self.n_units * (products + inner),
            input_grad=propagated * (products + 2 * inner),
            weight_grad=n_active * products,
        )

    def tap_shapes(self, length: int) -> list[tuple[int, int, int, int, bool]]:
        """(T, U, p, q, has a bias) of every :class:`Tap`, in forward order."""
        return [(length, self.n_units, *shape) for shape in self.product_shapes()]

    def unfold(self, weight: str, factor: Tensor) -> Tensor:
        """The shared factor of a product, from what was recorded of it: smaller, in layers that override this."""
        return factor

    def probe_flops(self, samples: int, length: int, first: bool) -> tuple[int, int]:
        """FLOPs of this layer under the estimator's tape.

        Args:
            samples: Samples in the probe.
            length: Tokens per sample.
            first: Nothing below its first product wants a gradient.

        Returns:
            Of the forward pass, and of one backward pass without weight gradients.
        """
        step = self.step_flops(samples, length, self.n_units, "cut")
        p, q, _ = self.product_shapes()[0]
        return step.forward, step.input_grad - (self.n_units * 2 * samples * length * p * q if first else 0)

    def unit_parameters(self) -> dict[str, nn.Parameter]:
        """The gated parameters by name, each of shape (U, ...)."""
        return {name: self.get_parameter(name) for name in self._unit_names}

    def set_active(self, active: BoolArray, mode: BackwardMode | None = None) -> None:
        """Choose the units that are back-propagated from now on.

        Args:
            active: (U,) boolean. None active and all active are both fine.
            mode: Backward mode; the present one when omitted.

        Raises:
            ValueError: If the shape is not (U,).
        """
        active = np.asarray(active, dtype=bool)
        if active.shape != (self.n_units,):
            raise ValueError(f"active set of shape {active.shape} for {self.n_units} units")
        self.mode = mode or self.mode
        if bool((active == self.active).all()):
            return
        self.active, self.n_active = active.copy(), int(active.sum())
        self._blocks.clear()
        for side in (True, False):
            self._index[side] = torch.from_numpy(np.flatnonzero(active == side))

    def gradient(self, name: str) -> Tensor | None:
        """Gradient of the active units' rows of a parameter, (n_active, ...), or None if there is none."""
        if self.n_active == self.n_units:
            return self.get_parameter(name).grad
        block = self._blocks.get((name, True)) if self.n_active else None
        return None if block is None else block.rows.grad

    def clear_gradient(self) -> None:
        """Forget the gradients of all unit parameters."""
        for name, parameter in self.unit_parameters().items():
            parameter.grad = None
            if (name, True) in self._blocks:
                self._blocks[name, True].rows.grad = None

    def forward(self, x: Any) -> Any:
        """The layer's output, differentiable through the active units (see the module's docstring)."""
        if self.n_active == self.n_units or not torch.is_grad_enabled() or self.tape is not None:
            return self.compute(x, dict(self.unit_parameters()))
        if self.n_active == 0 and self.mode == "cut":
            with torch.no_grad():
                return self.compute(x, dict(self.unit_parameters()))
        return self.gated(x)

    def gated(self, x: Any) -> Any:
        """The forward with frozen units: here active and frozen units run apart and are added.

        A layer that runs all units at once and has a backward of its own for the active ones is faster.
        """
        with torch.set_grad_enabled(self.mode == "exact"):
            y = self.compute(x, self._rows(False))
        return y if self.n_active == 0 else y + self.compute(x, self._rows(True))

    def active_leaves(self) -> list[Tensor]:
        """The active units' rows of every unit parameter, as leaves whose gradients the optimiser reads."""
        return list(self._rows(True).values())

    def active_index(self, device: torch.device) -> Tensor:
        """(n_active,) numbers of the active units."""
        return self._numbers(True, device)

    def frozen_index(self, device: torch.device) -> Tensor:
        """(U - n_active,) numbers of the frozen units."""
        return self._numbers(False, device)

    def before_capture(self, device: torch.device) -> None:
        """Make ready for a CUDA graph: nothing is left to copy to the device, and rows will be gathered anew."""
        self._blocks.clear()
        for side in (True, False):
            self._numbers(side, device)

    def after_capture(self) -> list[Tensor]:
        """What a CUDA graph captured just now reads and did not make; it must live as long as the graph."""
        self._blocks.clear()  # they lie in the graph's memory, and every replay gathers them before it reads them
        return list(self._index.values())

    def compute(self, x: Any, w: UnitTensors) -> Any:
        """Contribution of the units whose rows are in ``w``, added up."""
        raise NotImplementedError

    def tap(
        self, weight: str, known: Tensor, known_is_shared: bool, output: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """Record one product for the estimator (see :class:`Tap`) and return the tensor to go on with."""
        if self.tape is None or id(self) not in self.tape.layers:
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.tape.record(Tap(self, weight, known.detach(), known_is_shared, output, sizes))
        return output

    def _numbers(self, active: bool, device: torch.device) -> Tensor:
        """Numbers of the active or of the frozen units, copied to a device once."""
        index = self._index[active]
        if index.device != device:
            index = self._index[active] = index.to(device)
        return index

    def _rows(self, active: bool) -> UnitTensors:
        """Rows of the active units (leaves that gather gradients) or of the frozen ones (no gradient)."""
        rows: UnitTensors = {}
        for name, parameter in self.unit_parameters().items():
            block = self._blocks.get((name, active))
            index = self._numbers(active, parameter.device)
            if block is None:
                gathered = parameter.detach().index_select(0, index)
                block = _Block(gathered.requires_grad_(active), parameter._version)
                self._blocks[name, active] = block
            elif block.version != parameter._version:  # same leaf, so that accumulated gradients stay with it
                torch.index_select(parameter.detach(), 0, index, out=block.rows.detach())
                block.version = parameter._version
            rows[name] = block.rows
        return rows


def unit_layers(model: nn.Module) -> list[UnitLayer]:
    """The model's unit layers in forward order."""
    return [module for module in model.modules() if isinstance(module, UnitLayer)]


class UnitIndex:
    """All units of a model as one flat table: row r is one unit, ``kind[r]``, ``layer[r]``, ``unit[r]``.

    Methods decide over flat arrays of length N; this class translates to and from layers. Layers whose kind is not
    in ``kinds`` belong to the rest: they have no rows and always train.

    Args:
        layers: Unit layers in forward order.
        kinds: Kinds to gate; all when omitted.
    """

    def __init__(self, layers: Sequence[UnitLayer], kinds: Sequence[str] | None = None) -> None:
        self.layers = [layer for layer in layers if kinds is None or layer.kind in kinds]
        counter: dict[str, int] = {}
        kind: list[str] = []
        depth: list[int] = []
        unit: list[int] = []
        for layer in self.layers:
            position = counter.get(layer.kind, 0)
            counter[layer.kind] = position + 1
            kind += [layer.kind] * layer.n_units
            depth += [position] * layer.n_units
            unit += range(layer.n_units)
        self.kind: NDArray[np.str_] = np.array(kind, dtype=str)
        self.layer: NDArray[np.int64] = np.array(depth, dtype=np.int64)
        self.unit: NDArray[np.int64] = np.array(unit, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.unit)

    def slices(self) -> Iterator[tuple[UnitLayer, slice]]:
        """Each layer with its rows in the flat table."""
        start = 0
        for layer in self.layers:
            yield layer, slice(start, start + layer.n_units)
            start += layer.n_units

    @property
    def active_share(self) -> float:
        """Share of the units whose gate is open."""
        return sum(layer.n_active for layer in self.layers) / max(1, len(self))

    def set_active(self, active: BoolArray, mode: BackwardMode) -> None:
        """Set every layer's gate.

        Args:
            active: (N,) boolean.
            mode: Backward mode.
        """
        for layer, rows in self.slices():
            layer.set_active(active[rows], mode)
