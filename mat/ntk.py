"""Top eigenvalues of the modular neural tangent kernels of all units (paper section 1).

The mNTK of unit l is ``Theta_l = J_l J_l^T`` with ``J_l = d f / d theta_l`` of the network's
outputs f: n samples with k outputs each make it nk x nk; the kernels of all parameters add up to
the NTK (eq. 1). Outputs are reduced before they are differentiated, explicitly and by name:

``full``    all k outputs, k backward passes: the exact kernel (nk x nk), for small models.
``random``  m projections of each sample's outputs on random signs, stacked: (nm x nm) / m. Its
            trace is an unbiased estimate of the exact trace; its top eigenvalue over-estimates by a
            factor that depends on the unit's spectrum: about 1 where one eigenvalue holds the
            trace, about k / m where all are equal (m < k).
``sum``     the sum of each sample's outputs over sqrt(k): (n x n). Cheap and a poor ranking.
``loss``    the gradient of each sample's part of the mean loss: (n x n). Not an NTK; gives the norm
            of each unit's gradient.

One forward pass records every layer's factors (``mat.taps``), one backward pass per projection
gives the gradients of all layers' outputs (autograd forms no weight gradient), and each layer's
Gram matrices are batched products (``mat.gram``). The model is afterwards what it was: parameters,
gradients, buffers, gates, random state, train or eval mode. It works in the caller's autocast::

    result = mat.ntk.estimate(model, batch, projections=4)
    result.lambda_max  # (units,); result.units says which unit a row is
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mat.adapters.experts
import mat.recorders  # noqa: F401 both register how modules are recorded
from mat.adapters import find_units
from mat.kernels import Kernels, Shape, eigenvalue_flops, eigenvalues, scaled_to_cosines, shapes_of
from mat.probe import joined, pick, run, samples_of, untouched
from mat.products import Tap
from mat.reduction import LossOfOutputs, Reducer, Reduction
from mat.taps import Tape
from mat.units import REST, IntArray, Units

MEMORY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Mntk:
    """Result of :func:`estimate` or :class:`Online`, one row per unit in the order of ``units``.

    Attributes:
        lambda_max: (units,) top eigenvalues.
        squared_norm: (units,) sum of all kernel entries before they are normalised; for ``loss``
            the squared norm of the unit's gradient.
        spectrum: (units, r) all eigenvalues, ascending, or None. r = n m, n, n k, n by reduction.
        kernels: (units, r, r) or None; rows are projection-major (projection or output, then
            sample).
        rest: Kernel (r, r) of what no measured unit owns of each parameter, by name, or None.
        units: Which unit a row is.
        samples: n.
        outputs: k.
        reduction: How outputs were reduced.
        projections: m (1 unless ``random``).
        seed: Seed of the random signs.
    """

    lambda_max: NDArray[np.float64]
    squared_norm: NDArray[np.float64]
    spectrum: NDArray[np.float64] | None
    kernels: Tensor | None
    rest: dict[str, Tensor] | None
    units: Units
    samples: int
    outputs: int
    reduction: Reduction
    projections: int
    seed: int

    def kernel_of(self, model: nn.Module, part: nn.Module) -> Tensor:
        """Kernel (r, r) of all parameters of a part of the model that train (eq. 1).

        Args:
            model: The model that was measured.
            part: One of its modules, such as a block; the model itself for the whole NTK.

        Raises:
            ValueError: If the result was made without ``kernels`` or ``rest``, or units lie partly
                in the part.
        """
        if self.kernels is None or self.rest is None:
            raise ValueError("the kernel of a part needs an estimate with kernels and rest")
        inside = set(map(id, part.parameters()))
        total = torch.zeros_like(self.kernels[0])
        for layer, rows in self.units.slices():
            own = [id(model.get_parameter(p.parameter)) in inside for p in layer.parts]
            if any(own) and not all(own):
                raise ValueError(f"the units of {layer.name} lie partly outside that part")
            if any(own):
                total += self.kernels[rows].sum(0)
        for name, kernel in self.rest.items():
            if id(model.get_parameter(name)) in inside:
                total += kernel
        return total


def estimate(
    model: nn.Module,
    batch: Any,
    units: Units | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
    loss: LossOfOutputs | None = None,
    samples: int | None = None,
    reduction: Reduction = "random",
    projections: int = 1,
    seed: int = 0,
    normalize: Literal["cosine"] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    spectrum: bool = False,
    kernels: bool = False,
    rest: bool = False,
) -> Mntk:
    """Top eigenvalue of the mNTK of every unit of a model, attached or not.

    Memory: autograd keeps one batch at a time; of all batches the estimator keeps the factors (each
    layer's input, and m gradients of its output); ``memory_bytes`` for the products of a layer,
    beside copies of its factors, which for filters are what each sees at every position; 4 units
    r² bytes of kernels, and as many again while eigenvalues are computed densely (``spectrum``, or
    r up to ``mat.kernels.DENSE``).

    Args:
        model: The model. Parameters with ``requires_grad`` off are left out.
        batch: The probe, n samples, or a list of batches that make it up: the result is the same,
            batch norm included. See ``mat.probe`` for its forms.
        units: The units; if None those the model is attached by, else what ``mat.find_units``
            finds.
        output: Picks the tensor to differentiate from what the model returns; else that itself, or
            its ``logits``. Its rows are grouped by sample.
        loss: For ``loss``: mean loss from (outputs, batch); else the result's own ``loss``.
        samples: n of each batch; else ``batch.samples``, or the first axis of its first tensor.
        reduction: How the outputs are reduced, see the module's docstring.
        projections: m, for ``random`` only.
        seed: Seed of the random signs. A sign depends on the seed, the projection and the sample's
            number in the probe only: more samples or projections add signs and change none.
        normalize: ``cosine``: each row scaled to length one, ``K_ij / sqrt(K_ii K_jj)``.
        memory_bytes: Bound on the working memory of the Gram products.
        spectrum: Return all eigenvalues.
        kernels: Return the kernels.
        rest: Return the kernels of all other parameters, by name: a backward pass per sample and
            projection whose r gradients are kept, for small probes.

    Returns:
        Eigenvalues and what they were computed from.

    Raises:
        FloatingPointError: If a unit's kernel has a value that is not finite; names the unit.
        ValueError: If there is nothing to measure, the forward pass misses a unit's parameter, or
            outputs or a layer's rows cannot be told apart by sample.
    """
    if rest and normalize is not None:
        raise ValueError("rest gives kernels that add up, and normalised ones do not: drop one")
    units = units_of(model, units)
    batches = batch if isinstance(batch, list) else [batch]
    counts = [samples_of(part) if samples is None else samples for part in batches]
    reducer = Reducer(reduction, projections, seed, sum(counts), loss)
    total = Kernels(units, memory_bytes)
    tape = Tape(model, units, total.arrived)
    rest_rows = _rest_rows(model, units) if rest else {}
    of_rest: dict[str, Tensor] | None = None
    m = projections if reduction == "random" else 1
    with untouched(model), tape:
        if len(batches) > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            tape.begin(sum(counts))
            with torch.no_grad():
                run(model, joined(batches))
        first = 0
        for part, n in zip(batches, counts, strict=True):
            tape.begin(n)
            result = run(model, part)
            outputs = pick(result, output)
            k = reducer.outputs_per_sample(outputs, n)
            tape.check()
            if not outputs.requires_grad:
                raise ValueError("the outputs do not depend on any unit")
            total.add(tape.taps)
            for cotangent, last in reducer.cotangents(result, part, outputs, first, n):
                if last and part is batches[-1] and first + n == sum(counts):
                    total.await_last(tape.taps)
                    tape.taps = []
                torch.autograd.grad(
                    outputs, tape.anchor, cotangent, retain_graph=not last, allow_unused=True
                )
            first += n
            del result, outputs, cotangent
        stacked = total.total().div_(m)
        if rest:
            tape.recording = False
            parts = list(zip(batches, counts, strict=True))
            of_rest = _rest_kernels(model, parts, rest_rows, tape, output, reducer)
            of_rest = {name: kernel / m for name, kernel in of_rest.items()}
    wanted = (normalize, spectrum, kernels)
    return _result(stacked, units, wanted, of_rest, first, k, reduction, m, seed)


class Online:
    """The kernels of per-sample loss gradients (``loss``) from a training step's own backward pass.

    Everything that the step computes is used; the Gram products are all that comes on top, and the
    factors (every layer's inputs and output gradients) stay in memory until :meth:`result`::

        with mat.ntk.Online(model) as online:
            loss_of(model(x), y).backward()
        result = online.result()

    All units must be active in that step: a ``cut`` step has no factors of frozen units. Several
    forward and backward passes (accumulation) count as one step of all their samples. Unlike a
    probe, a training batch brings other samples at every call, its dropout, and auxiliary losses.

    Args:
        model: The model that trains.
        units: As in :func:`estimate`.
        samples: n of each batch; else as in :func:`estimate`, from the model's arguments.

    Raises:
        ValueError: On entering, if units are frozen or batch norm couples the samples; in
            ``result``, if a forward pass had no backward pass.
    """

    def __init__(
        self, model: nn.Module, units: Units | None = None, *, samples: int | None = None
    ) -> None:
        self.model, self.units, self.samples = model, units_of(model, units), samples
        self._batches: list[list[Tap]] = []

    def __enter__(self) -> "Online":
        gates = getattr(self.model, "_gates", None)
        if gates is not None and not gates.active.all():
            raise ValueError(
                "an online estimate needs a step in which all units are active: set_active them all"
            )
        if any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            raise ValueError(
                "batch norm couples the samples of a training step: use mat.ntk.estimate"
            )
        tape = Tape(self.model, self.units)

        def begin(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            batch = inputs[0] if len(inputs) == 1 else inputs or named
            tape.begin(samples_of(batch) if self.samples is None else self.samples)
            self._batches.append(tape.taps)

        def end(*_: Any) -> None:
            tape.check()

        self._tape = tape.__enter__()
        self._hooks = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._tape.__exit__()

    def result(
        self,
        *,
        normalize: Literal["cosine"] | None = None,
        memory_bytes: int = MEMORY_BYTES,
        spectrum: bool = False,
        kernels: bool = False,
    ) -> Mntk:
        """What the step showed; ``outputs`` is 1, a sample's loss. See :func:`estimate`."""
        total = Kernels(self.units, memory_bytes)
        for taps in filter(None, self._batches):  # none of a pass without gradients
            if not all(tap.gradients for tap in taps):
                raise ValueError(
                    "an online estimate needs the backward pass of every forward pass within it"
                )
            total.add(taps)
        stacked = total.total()
        wanted = (normalize, spectrum, kernels)
        return _result(stacked, self.units, wanted, None, stacked.shape[1], 1, "loss", 1, 0)


def kernel_shapes(
    model: nn.Module, batch: Any, units: Units | None = None, *, samples: int | None = None
) -> list[Shape]:
    """The Gram contractions of an estimate on one batch, from a forward pass.

    The arguments are those of :func:`estimate`.
    """
    tape = Tape(model, units_of(model, units))
    with untouched(model), tape:
        tape.begin(samples_of(batch) if samples is None else samples)
        run(model, batch)
    return shapes_of(tape.taps)


def kernel_flops(
    shapes: Sequence[Shape], units: int, rows: int, memory_bytes: int = MEMORY_BYTES
) -> int:
    """FLOPs of all units' kernels and their top eigenvalues, as a FLOPs counter sees them.

    An estimate runs a forward pass and ``rows / n`` backward passes without weight gradients beside
    it; an online estimate adds these alone.

    Args:
        shapes: See :func:`kernel_shapes`.
        units: Number of units.
        rows: r of the kernels: n m, n, n k, n by reduction.
        memory_bytes: The bound, which decides the chunks.
    """
    products = sum(shape.flops(rows, memory_bytes) for shape in shapes)
    return products + eigenvalue_flops(units, rows)


def units_of(model: nn.Module, units: Units | None) -> Units:
    """The units given, those of an attached model, or what is found."""
    if units is None:
        gates = getattr(model, "_gates", None)
        units = find_units(model) if gates is None else gates.units
    return units


def _result(
    stacked: Tensor,
    units: Units,
    wanted: tuple[Literal["cosine"] | None, bool, bool],
    rest: dict[str, Tensor] | None,
    samples: int,
    outputs: int,
    reduction: Reduction,
    projections: int,
    seed: int,
) -> Mntk:
    """Eigenvalues of kernels; ``wanted`` are normalize, spectrum and kernels."""
    normalize, spectrum, kernels = wanted
    sums = stacked.sum((1, 2))
    if normalize is not None:
        stacked = scaled_to_cosines(stacked)
    spectra = eigenvalues(stacked, sums, units, spectrum)
    kept = stacked if kernels else None
    return Mntk(*spectra, kept, rest, units, samples, outputs, reduction, projections, seed)


def _rest_rows(model: nn.Module, units: Units) -> dict[str, tuple[int, IntArray] | None]:
    """What no unit owns of the parameters that train: an axis and places on it, or None for all."""
    parts = {id(model.get_parameter(p.parameter)): p for la in units.layers for p in la.parts}
    rest: dict[str, tuple[int, IntArray] | None] = {}
    for name, parameter in model.named_parameters():
        part = parts.get(id(parameter))
        if parameter.requires_grad and (part is None or (part.owner == REST).any()):
            rest[name] = None if part is None else (part.dim, np.flatnonzero(part.owner == REST))
    return rest


def _rest_kernels(
    model: nn.Module,
    batches: Sequence[tuple[Any, int]],
    rest: dict[str, tuple[int, IntArray] | None],
    tape: Tape,
    output: Callable[[Any], Tensor] | None,
    reducer: Reducer,
) -> dict[str, Tensor]:
    """Kernel (r, r) of every parameter's rest, one sample and one projection at a time."""
    parameters = {name: model.get_parameter(name).requires_grad_() for name in rest}
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in rest}  # [projection][sample]
    first = 0
    for batch, n in batches:
        tape.begin(n)
        result = run(model, batch)
        outputs = pick(result, output)
        vectors = reducer.cotangents(result, batch, outputs, first, n)
        for j, (cotangent, _) in enumerate(vectors):
            for i in range(n):
                of_sample = torch.zeros_like(cotangent)
                of_sample.view(n, -1)[i] = cotangent.view(n, -1)[i]
                gradients = torch.autograd.grad(
                    outputs, list(parameters.values()), of_sample,
                    retain_graph=True, materialize_grads=True,
                )  # fmt: skip
                for (name, where), gradient in zip(rest.items(), gradients, strict=True):
                    if where is not None:
                        places = torch.from_numpy(where[1]).to(gradient.device)
                        gradient = gradient.index_select(where[0], places)
                    slots = rows[name]
                    slots += [[] for _ in range(j + 1 - len(slots))]
                    slots[j].append(gradient.flatten())
        first += n
    kernels = {}
    for name, slots in rows.items():
        flat = torch.stack([gradient for slot in slots for gradient in slot])  # (r, parameters)
        with torch.autocast(flat.device.type, enabled=False):
            kernels[name] = flat @ flat.T
    return kernels
