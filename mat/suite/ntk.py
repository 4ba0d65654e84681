"""Top eigenvalues of the modular neural tangent kernels of all units, from one forward pass (paper section 1).

The mNTK of unit l is ``Theta_l = J_l J_l^T`` with ``J_l = d f / d theta_l`` of the network's outputs f: n samples with
k outputs each make it nk x nk; the kernels of all parameters add up to the NTK (eq. 1). Outputs are reduced before they
are differentiated, explicitly and by name:

``full``    all k outputs, k backward passes: the exact kernel (nk x nk). For tests and small models.
``random``  m projections of each sample's outputs on random signs, stacked: (nm x nm) / m. Its trace is an unbiased
            estimate of the exact trace; its top eigenvalue over-estimates by a factor that depends on the unit's
            spectrum: about 1 where one eigenvalue holds the trace, about k / m where all are equal (m < k).
``sum``     the sum of each sample's outputs over sqrt(k): (n x n). Cheap and a poor ranking; for comparison.
``loss``    the gradient of each sample's part of the mean loss: (n x n). Not an NTK; gives unit gradient norms.

One forward pass records each unit layer's factors (``mat.suite.units.Tap``), one backward pass per projection gives the
gradients of all layers' outputs (no weight gradient is formed by autograd), and each layer's Gram matrices are
batched products (``mat.gram``). The estimator is pure: parameters, gradients, buffers, random state and train or
eval mode are as before. Works in the caller's autocast context.

It needs nothing else of the suite. ``model`` is any module with unit layers whose ``forward(batch)`` gives outputs with
rows grouped by sample (``loss_of_outputs`` for ``loss`` only); ``batch`` is anything with ``samples``, their number
(``split`` for ``rest`` only)::

    class Model(UnitModel):
        def __init__(self):
            super().__init__()
            self.hidden = FeedForward(width=16, hidden=64, groups=8)  # 8 units, from mat.suite.bert
            self.out = nn.Linear(16, 10)

        def forward(self, batch):  # batch.x: (n, 1, 16), one position per sample
            return self.out(self.hidden(batch.x)[:, 0])

    found = ntk.estimate(model, batch, reduction="random", projections=4, spectrum=True)
    found.lambda_max  # (8,); found.index.kind, .layer and .unit say which unit a row is
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mat import gram
from mat.suite.interface import UnitModel
from mat.suite.units import Tap, Tape, UnitIndex, unit_layers

Reduction = Literal["random", "sum", "full", "loss"]
MEMORY_BYTES = 32 * 2**20
KRYLOV = 32  # dimensions of the spaces of Lanczos
DENSE = 128  # kernels of more rows get their top eigenvalue by Lanczos, unless the spectrum is wanted


@dataclass(frozen=True)
class Mntk:
    """Result of :func:`estimate` or :class:`Online`, one row per unit in the order of ``index``.

    Attributes:
        lambda_max: (units,) top eigenvalues.
        squared_norm: (units,) sum of all kernel entries; for ``loss`` the squared norm of the unit's gradient.
        spectrum: (units, r) all eigenvalues, ascending, or None. r = n m, n, n k, n by reduction.
        kernels: (units, r, r) or None; rows are projection-major (projection or output j, then sample i).
        rest: Kernel (r, r) of every parameter that is no measured unit's, by name, or None.
        index: Which unit a row is.
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
    index: UnitIndex
    samples: int
    outputs: int
    reduction: Reduction
    projections: int
    seed: int

    def kernel_of(self, model: nn.Module, part: nn.Module) -> Tensor:
        """Kernel (r, r) of all parameters of a part of the model: its units' and its own rest's, added (eq. 1).

        Args:
            model: The model that was measured.
            part: One of its modules, such as a block; the model itself for the whole NTK.

        Raises:
            ValueError: If the result was made without ``kernels`` or ``rest``.
        """
        if self.kernels is None or self.rest is None:
            raise ValueError("the kernel of a part needs an estimate with kernels=True and rest=True")
        modules, parameters = set(map(id, part.modules())), set(map(id, part.parameters()))
        total = torch.zeros_like(self.kernels[0])
        for layer, rows in self.index.slices():
            if id(layer) in modules:
                total += self.kernels[rows].sum(0)
        for name, kernel in self.rest.items():
            if id(model.get_parameter(name)) in parameters:
                total += kernel
        return total


def estimate(
    model: UnitModel,
    batch: Any,
    index: UnitIndex | None = None,
    *,
    reduction: Reduction = "random",
    projections: int = 1,
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
    spectrum: bool = False,
    kernels: bool = False,
    rest: bool = False,
) -> Mntk:
    """Top eigenvalue of the mNTK of every unit.

    Memory: autograd keeps one batch at a time; of all batches the estimator keeps the factors (every unit layer's
    inputs, and m gradients of its outputs); ``memory_bytes`` for the products of a layer, beside copies of its factors,
    which for filters are what each sees at every position (nine times the layer's inputs); 4 units r² bytes of kernels,
    and as many again while eigenvalues are computed densely (``spectrum``, or r up to ``DENSE``).

    Args:
        model: A model with unit layers.
        batch: The probe, n samples, or a sequence of batches that make it up: the result is the same. What a model
            holds fixed (statistics of batch norm) comes from all of them, in a forward pass of its own.
        index: The units wanted; all when omitted.
        reduction: How the outputs are reduced, see the module's docstring.
        projections: m, for ``random`` only.
        seed: Seed of the random signs. A sign depends on the seed, the projection and the sample's number in the
            probe only: more samples or projections add signs and change none.
        memory_bytes: Bound on the working memory of the Gram products.
        spectrum: Return all eigenvalues.
        kernels: Return the kernels.
        rest: Return the kernels of all other parameters, by name: a loop over samples and projections that keeps
            their r gradients, for small probes.

    Returns:
        Eigenvalues and what they were computed from.

    Raises:
        FloatingPointError: If a unit's kernel has a value that is not finite; the message names the unit.
        ValueError: If there is nothing to measure, outputs cannot be split evenly into samples, the reduction is not
            known, or the model cannot fix its constants over several batches.
    """
    index = _checked(UnitIndex(unit_layers(model)) if index is None else index)
    batches = list(batch) if isinstance(batch, Sequence) else [batch]
    reducer = Reducer(reduction, projections, seed, sum(part.samples for part in batches))
    products, of_rest = _Products(index, memory_bytes), None
    with _probing(model, index) as tape:
        first = 0
        if len(batches) > 1:
            model.fix_constants(batches)
        fixed = len(tape.constants)
        for position, part in enumerate(batches, 1):
            tape.taps.clear()
            outputs = model(part)
            if len(batches) > 1 and len(tape.constants) > fixed:
                raise ValueError("a layer's constants depend on all batches: the model must have fix_constants()")
            count = reducer.outputs_per_sample(outputs, part.samples)
            taps = tape.taps.copy()
            products.check(taps)
            gradients: list[list[Tensor]] = [[] for _ in taps]
            for cotangent, last in reducer.cotangents(model, part, outputs, first):
                if last and position == len(batches):
                    ends = [tap.output for tap in taps if tap.output.is_leaf]  # reached through all other taps
                    products.listen(taps, gradients)
                    tape.taps.clear()
                    torch.autograd.grad(outputs, ends, cotangent)
                    break
                found = torch.autograd.grad(outputs, [t.output for t in taps], cotangent, retain_graph=not last)
                for slot, gradient in zip(gradients, found, strict=True):
                    slot.append(gradient)
            else:
                products.add(taps, gradients)
            first += part.samples
            del outputs, taps, gradients, cotangent
        tape.taps.clear()
        if rest:
            of_rest = _rest_kernels(model, batches, index, tape, reducer)
    m = projections if reduction == "random" else 1
    stacked = products.kernels().div_(m)
    return Mntk(
        *_eigenvalues(stacked, index, spectrum), stacked if kernels else None, of_rest, index, first, count, reduction,
        m, seed,
    )  # fmt: skip


class Online:
    """The kernels of per-sample loss gradients (``loss``) from a training step's own backward pass.

    Everything that the step computes is used; the Gram products are all that comes on top, and the factors (every unit
    layer's inputs and output gradients) stay in memory until :meth:`result`::

        with ntk.Online(model) as online:
            model.loss(batch).backward()
        found = online.result()

    All units must be active in that step: a ``cut`` step has no factors of frozen units, and a method that froze units
    by what it could not measure would never wake them. Several forward and backward passes (accumulation) count as one
    step of all their samples. Unlike a probe, a training batch brings other samples at every call, its dropout, and
    auxiliary losses; the gradients are used up by the step as always.

    Args:
        model: The model that trains.
        index: The units wanted; all when omitted.

    Raises:
        ValueError: On entering, if a unit layer has frozen units; in ``result``, if a product got no gradient.
    """

    def __init__(self, model: nn.Module, index: UnitIndex | None = None) -> None:
        self.model = model
        self.index = _checked(UnitIndex(unit_layers(model)) if index is None else index)
        self._tapes: list[_ListeningTape] = []

    def __enter__(self) -> "Online":
        layers = unit_layers(self.model)
        if any(layer.n_active < layer.n_units for layer in layers):
            raise ValueError("an online estimate needs a step in which all units are active: set_active to all first")

        def begin(*_: Any) -> None:  # a pass of its own for every micro-batch
            self._tapes.append(_ListeningTape(frozenset(map(id, self.index.layers))))
            for layer in layers:
                layer.tape = self._tapes[-1]

        self._hook = self.model.register_forward_pre_hook(begin)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()
        for layer in unit_layers(self.model):
            layer.tape = None

    def result(self, memory_bytes: int = MEMORY_BYTES, spectrum: bool = False, kernels: bool = False) -> Mntk:
        """What the step showed, see :class:`Mntk`; ``outputs`` is 1, a sample's loss."""
        products = _Products(self.index, memory_bytes)
        for tape in self._tapes:
            products.check(tape.taps)
            gradients = [tape.gradients[id(tap)] for tap in tape.taps]
            if not all(gradients):
                raise ValueError("an online estimate needs the backward pass of every forward pass made within it")
            products.add(tape.taps, gradients)
        stacked = products.kernels()
        eigenvalues = _eigenvalues(stacked, self.index, spectrum)
        return Mntk(
            *eigenvalues, stacked if kernels else None, None, self.index, stacked.shape[1], 1, "loss", 1, 0
        )  # fmt: skip


def eigenvalue_flops(units: int, rows: int) -> int:
    """FLOPs of the matrix products behind the top eigenvalues of kernels (units, rows, rows)."""
    if rows <= DENSE:
        return 0
    orthogonal = sum(8 * rows * i for i in range(1, KRYLOV))
    return units * (2 * rows * rows * (2 * KRYLOV - 1) + orthogonal + 2 * rows * KRYLOV**2)


def _checked(index: UnitIndex) -> UnitIndex:
    if not len(index):
        raise ValueError("there is no unit to measure: the model has no unit layer of the wanted kinds")
    return index


class _ListeningTape(Tape):
    """Also keeps the gradients that a later backward pass brings."""

    def __init__(self, layers: frozenset[int]) -> None:
        super().__init__(layers)
        self.gradients: dict[int, list[Tensor]] = {}

    def record(self, tap: Tap) -> None:
        found: list[Tensor] = []
        tap.output.register_hook(found.append)  # type: ignore[no-untyped-call]
        kept = replace(tap, output=tap.known)  # the output itself would keep the graph alive
        self.taps.append(kept)
        self.gradients[id(kept)] = found


@contextmanager
def _probing(model: nn.Module, index: UnitIndex) -> Iterator[Tape]:
    """Eval mode, no parameter gradients, a tape in every unit layer; everything restored at the end."""
    tape = Tape(frozenset(map(id, index.layers)))
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = unit_layers(model)
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        for layer in layers:
            layer.tape = tape
        with torch.enable_grad():
            yield tape
    finally:
        for layer in layers:
            layer.tape = None
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
        for module, value in training.items():
            module.training = value


@dataclass(frozen=True)
class Reducer:
    """How outputs become what is differentiated; ``samples`` is n of the whole probe."""

    reduction: Reduction
    projections: int
    seed: int
    samples: int

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction) or self.projections < 1 or self.samples < 1:
            raise ValueError(
                f"reduction={self.reduction!r}, projections={self.projections}, {self.samples} samples: wanted one of "
                f"{', '.join(get_args(Reduction))}, and at least one projection and one sample"
            )

    def outputs_per_sample(self, outputs: Tensor, samples: int) -> int:
        """The number k."""
        if outputs.shape[0] % samples:
            raise ValueError(f"{outputs.shape[0]} output rows cannot be split evenly into {samples} samples")
        return outputs.numel() // samples

    def cotangents(self, model: UnitModel, batch: Any, outputs: Tensor, first: int) -> Iterator[tuple[Tensor, bool]]:
        """One vector of the outputs' shape per backward pass, and whether it is the last one.

        ``first`` is the number of the batch's first sample in the probe.
        """
        samples, count = batch.samples, outputs.numel() // batch.samples
        if self.reduction == "loss":
            leaf = outputs.detach().requires_grad_()
            loss = model.loss_of_outputs(leaf, batch) * (samples / self.samples)
            yield torch.autograd.grad(loss, leaf)[0], True
        elif self.reduction == "sum":
            yield torch.full_like(outputs, count**-0.5), True
        elif self.reduction == "full":
            for j in range(count):
                vector = torch.zeros_like(outputs)
                vector.view(samples, count)[:, j] = 1
                yield vector, j == count - 1
        else:
            for j in range(self.projections):
                bits = np.stack([self._bits(j, i, count) for i in range(first, first + samples)])
                signs = torch.from_numpy(bits).to(outputs.device).to(outputs.dtype).mul_(2).sub_(1)
                yield signs.view(outputs.shape), j == self.projections - 1

    def _bits(self, projection: int, sample: int, count: int) -> NDArray[np.uint8]:
        """Random bits, made on the CPU so that every device sees the same."""
        random = np.random.default_rng([self.seed, projection, sample])
        return np.unpackbits(np.frombuffer(random.bytes(-(-count // 8)), np.uint8), count=count)


class _Products:
    """The factors of every product of the measured layers, gathered over batches, by layer and weight."""

    def __init__(self, index: UnitIndex, memory_bytes: int) -> None:
        self.index, self.memory_bytes = index, memory_bytes
        self._layers = {id(layer): (layer, rows) for layer, rows in index.slices()}
        self._kernels: Tensor | None = None
        self._awaited: Counter[tuple[int, str]] = Counter()
        self._factors: dict[tuple[int, str], list[list[tuple[Tensor, ...]]]] = {}  # [projection][batch]

    def check(self, taps: Sequence[Tap]) -> None:
        """Refuse a forward pass in which a measured layer recorded nothing."""
        for layer in self.index.layers:
            if not any(tap.layer is layer for tap in taps):
                raise ValueError(f"a layer of {layer.kind} recorded no product: its compute must call tap()")

    def add(self, taps: Sequence[Tap], gradients: Sequence[Sequence[Tensor]]) -> None:
        """Take in a batch: its measured taps and, for each, the gradients of its output by projection."""
        uses: dict[tuple[int, str], list[list[tuple[Tensor, ...]]]] = {}
        for tap, found in zip(taps, gradients, strict=True):
            sizes = () if tap.sizes is None else (tap.sizes,)
            pairs = [(*((g, tap.known) if tap.known_is_shared else (tap.known, g)), *sizes) for g in found]
            uses.setdefault((id(tap.layer), tap.weight), []).append(pairs)
        for key, several in uses.items():
            slots = self._factors.setdefault(key, [[] for _ in several[0]])
            for slot, same in zip(slots, zip(*several, strict=True), strict=True):
                if len(same) > 1 and len(same[0]) == 3:
                    raise ValueError("a layer with a router can be measured if it is used once in a forward pass")
                factors = zip(*same, strict=True)  # a layer used twice adds up over its positions
                slot.append(same[0] if len(same) == 1 else tuple(torch.cat(side, 1) for side in factors))

    def listen(self, taps: Sequence[Tap], gradients: Sequence[list[Tensor]]) -> None:
        """Contract every product as soon as the coming backward pass, the last one, has brought its gradient.

        What a product held is given up then, so that the factors of all layers are never there at once.
        """
        arrived: dict[tuple[int, str], list[tuple[Tap, list[Tensor]]]] = {}
        self._awaited.update((id(tap.layer), tap.weight) for tap in taps)

        def arrive(gradient: Tensor, tap: Tap, earlier: list[Tensor]) -> None:
            earlier.append(gradient)
            key = (id(tap.layer), tap.weight)
            uses = arrived.setdefault(key, [])
            uses.append((tap, earlier))
            self._awaited[key] -= 1
            if not self._awaited[key]:
                self.add([use for use, _ in uses], [found for _, found in arrived.pop(key)])
                for use, found in uses:
                    use.known = use.output = gradient.new_empty(0)
                    found.clear()
                self._contract(key)

        for tap, earlier in zip(taps, gradients, strict=True):
            tap.output.register_hook(partial(arrive, tap=tap, earlier=earlier))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _contract(self, key: tuple[int, str]) -> None:
        layer, rows = self._layers[key[0]]
        pairs = [pair for slot in self._factors.pop(key) for pair in slot]
        shared = {id(pair[1]): layer.unfold(key[1], pair[1]) for pair in pairs}  # one for all projections
        factors = [(pair[0], shared[id(pair[1])], *pair[2:]) for pair in pairs]
        contract = gram.routed_gram if layer.routed else gram.unit_gram
        value = contract(factors, layer.products[key[1]] is not None, self.memory_bytes)
        if self._kernels is None:
            self._kernels = value.new_zeros(len(self.index), *value.shape[1:])
        self._kernels[rows] += value

    def kernels(self) -> Tensor:
        """(units, r, r) in the order of the index, projection-major; the factors are given up."""
        if self._awaited.total():
            raise ValueError("the outputs do not depend on every product of the measured layers")
        for key in list(self._factors):
            self._contract(key)
        assert self._kernels is not None
        return self._kernels


def _eigenvalues(
    kernels: Tensor, index: UnitIndex, spectrum: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Top eigenvalues, sums of entries and, if wanted, all eigenvalues; one transfer to the host.

    Raises:
        FloatingPointError: If a value is not finite.
    """
    sums = kernels.sum((1, 2))
    finite = sums.isfinite()  # only if all entries are, and without a copy of them
    with torch.autocast(kernels.device.type, enabled=False):
        usable = kernels if spectrum or kernels.shape[1] <= DENSE else _krylov(kernels)
    usable.masked_fill_(~finite[:, None, None], 0)  # in place: kernels with such values are refused below
    eigenvalues = torch.linalg.eigvalsh(usable).clamp_min(0)
    packed = torch.column_stack([eigenvalues, sums.clamp_min(0), finite])
    values = packed.to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(values[:, -1] == 0)
    if len(bad):
        u = bad[0]
        raise FloatingPointError(
            f"the mNTK of {index.kind[u]} layer {index.layer[u]} unit {index.unit[u]} has values that are not finite "
            f"(as those of {len(bad) - 1} other units): the model has diverged."
        )
    return values[:, -3].copy(), values[:, -2].copy(), values[:, :-2] if spectrum else None


def _krylov(kernels: Tensor) -> Tensor:
    """Kernels (U, r, r) restricted to Krylov spaces of a random start, (U, 32, 32): their top eigenvalues agree.

    The largest eigenvalue dominates an mNTK's spectrum, and Lanczos finds such a one to rounding in a few steps, where
    ``eigvalsh`` of r rows would cost more than the rest of the estimate.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, kernels.shape[1], 1, generator=random, dtype=kernels.dtype).to(kernels.device)
    x = (x / x.norm()).expand(len(kernels), -1, -1)
    basis, scale = x, kernels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    for _ in range(KRYLOV - 1):
        x = kernels @ basis[:, :, -1:]
        for _ in range(2):  # twice is enough
            x = x - basis @ (basis.mT @ x)
        size = x.norm(dim=1, keepdim=True)
        found = size > 100 * torch.finfo(x.dtype).eps * scale  # else the space is complete: what is left is rounding
        basis = torch.cat([basis, torch.where(found, x / size, 0)], 2)
    restricted: Tensor = basis.mT @ (kernels @ basis)
    return restricted


def _rest_kernels(
    model: UnitModel, batches: Sequence[Any], index: UnitIndex, tape: Tape, reducer: Reducer
) -> dict[str, Tensor]:
    """Kernel (r, r) of every parameter that is no measured unit's, one sample and one projection at a time."""
    measured = {id(p) for layer in index.layers for p in layer.unit_parameters().values()}
    rest = {name: p.requires_grad_() for name, p in model.named_parameters() if id(p) not in measured}
    gradients: dict[str, list[list[Tensor]]] = {name: [] for name in rest}  # [sample][projection]
    samples = [sample for batch in batches for sample in batch.split(batch.samples)]
    for i, sample in enumerate(samples):
        tape.taps.clear()
        outputs = model(sample)
        for name in rest:
            gradients[name].append([])
        for cotangent, last in reducer.cotangents(model, sample, outputs, i):
            found = torch.autograd.grad(
                outputs, list(rest.values()), cotangent, retain_graph=not last, materialize_grads=True
            )
            for name, gradient in zip(rest, found, strict=True):
                gradients[name][-1].append(gradient.flatten())
    kernels = {}
    for name, rows in gradients.items():
        flat = torch.stack([gradient for projection in zip(*rows, strict=True) for gradient in projection])
        with torch.autocast(flat.device.type, enabled=False):
            kernels[name] = flat @ flat.T / (reducer.projections if reducer.reduction == "random" else 1)
    return kernels
