"""Kernels of all units from the taps of a probe, product by product, and their top eigenvalues."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mat import gram
from mat.products import Group, Product, Tap
from mat.units import Units

KRYLOV = 32  # dimensions of the spaces of Lanczos
DENSE = 128  # kernels of more rows get their top eigenvalue by Lanczos, unless all are wanted


@dataclass(frozen=True)
class Shape:
    """Sizes of one Gram contraction, as :func:`mat.gram.unit_gram` takes them.

    Attributes:
        samples: n of the forward pass.
        positions: n T rows of the product's output.
        units: U.
        p: Width of the per-unit factor.
        q: Width of the shared factor.
        bias: Whether there is one.
        routed: Whether samples have unequally many rows: those that are sent to an expert.
    """

    samples: int
    positions: int
    units: int
    p: int
    q: int
    bias: bool
    routed: bool

    def flops(self, rows: int, memory_bytes: int) -> int:
        """FLOPs of kernels with so many rows."""
        sizes = self.units, self.p, self.q, self.bias
        if self.routed:
            return gram.routed_flops(rows, rows * self.positions // self.samples, *sizes)
        return gram.unit_flops(rows, self.positions // self.samples, *sizes, memory_bytes)


def shapes_of(taps: Sequence[Tap]) -> list[Shape]:
    """The contractions that the taps of a forward pass lead to."""
    positions: Counter[Product] = Counter()
    for tap in taps:
        positions[tap.product] += tap.positions
    return [
        Shape(
            taps[0].samples, count, group.count, group.each,
            product.shared, product.bias, product.routed,
        )
        for product, count in positions.items()
        for group in product.groups
    ]  # fmt: skip


class Kernels:
    """Adds up the kernels of all products of all units.

    Args:
        units: The units.
        memory_bytes: Bound on the working memory of a contraction.
    """

    def __init__(self, units: Units, memory_bytes: int) -> None:
        self.units, self.memory_bytes = units, memory_bytes
        self._samples: list[int] = []  # by batch
        self._taps: dict[Product, dict[int, list[Tap]]] = {}  # uses by batch
        self._awaited: Counter[Product] = Counter()
        self._total: Tensor | None = None

    def add(self, taps: Sequence[Tap]) -> None:
        """Take in the taps of a batch."""
        batch = len(self._samples)
        self._samples.append(taps[0].samples)
        for tap in taps:
            self._taps.setdefault(tap.product, {}).setdefault(batch, []).append(tap)

    def await_last(self, taps: Sequence[Tap]) -> None:
        """Contract every product as soon as the coming backward pass has brought its gradient.

        What a product kept is given up then: the factors of all layers are never there at once.
        """
        self._awaited.update(tap.product for tap in taps)

    def arrived(self, tap: Tap) -> None:
        """A backward pass has brought a gradient."""
        if self._awaited[tap.product]:
            self._awaited[tap.product] -= 1
            if not self._awaited[tap.product]:
                self._contract(tap.product)

    def total(self) -> Tensor:
        """(units, r, r) in the order of the table, projection-major; the factors are given up.

        Raises:
            ValueError: If the outputs do not depend on a product.
        """
        for product in list(self._taps):
            self._contract(product)
        assert self._total is not None
        return self._total

    @torch.no_grad()
    def _contract(self, product: Product) -> None:
        batches = self._taps.pop(product)
        slots: list[list[tuple[Tensor, ...]]] = []  # [projection][batch], pairs of factors
        for uses in batches.values():
            known, gradients = zip(*(tap.factors() for tap in uses), strict=True)
            counts = {len(per_projection) for per_projection in gradients}
            if len(counts) > 1 or 0 in counts:
                raise ValueError(f"the outputs do not depend on all that {product.path} computes")
            slots = slots or [[] for _ in gradients[0]]
            # A layer that is used twice adds up over its positions.
            x = known[0] if len(uses) == 1 else torch.cat(known, 1)
            for slot, several in zip(slots, zip(*gradients, strict=True), strict=True):
                g = several[0] if len(uses) == 1 else torch.cat(several, 1)
                pair = (x, g) if product.columns else (g, x)
                slot.append(pair if uses[0].sizes is None else (*pair, uses[0].sizes))
        if product.routed:
            pairs = [pair for slot in slots for pair in self._with_missing(slot, batches)]
            values = [gram.routed_gram(pairs, product.bias, self.memory_bytes)]
        else:
            pairs = _equally_long([pair for slot in slots for pair in slot])
            values = [
                gram.unit_gram(
                    [(group.of(a), b) for a, b in pairs], product.bias, self.memory_bytes
                )
                for group in product.groups
            ]
        for group, value in zip(product.groups, values, strict=True):
            self._add(group, value)
        for uses in batches.values():
            for tap in uses:
                tap.release()

    def _with_missing(
        self, slot: list[tuple[Tensor, ...]], batches: Collection[int]
    ) -> list[tuple[Tensor, ...]]:
        """An expert's factors by batch, with empty ones where no token was sent to it."""
        a, b, sizes = slot[0]
        there = dict(zip(batches, slot, strict=True))
        return [
            there.get(batch, (a[:0], b[:0], sizes.new_zeros(1, n)))
            for batch, n in enumerate(self._samples)
        ]

    def _add(self, group: Group, values: Tensor) -> None:
        if self._total is None:
            self._total = values.new_zeros(len(self.units), *values.shape[1:])
        if isinstance(group.units, Tensor):
            self._total.index_add_(0, group.units, values)
        else:
            self._total[group.units] += values


def _equally_long(pairs: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Factors (n, T, .) of batches whose T differ: zeros add nothing to a gradient."""
    longest = max(a.shape[1] for a, _ in pairs)
    if all(a.shape[1] == longest for a, _ in pairs):
        return pairs
    return [tuple(F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in pair) for pair in pairs]


def scaled_to_cosines(kernels: Tensor) -> Tensor:
    """``K_ij / sqrt(K_ii K_jj)``, in place; rows of no length stay zero."""
    length = kernels.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()  # (U, r)
    scale = torch.where(length > 0, 1 / length, 0)
    return kernels.mul_(scale[:, :, None]).mul_(scale[:, None, :])


def eigenvalues(
    kernels: Tensor, sums: Tensor, units: Units, spectrum: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Top eigenvalues, sums and, if wanted, all eigenvalues; one transfer to the host.

    Args:
        kernels: (U, r, r).
        sums: (U,) of their entries.
        units: Which unit each is.
        spectrum: Whether all eigenvalues are wanted.

    Raises:
        FloatingPointError: If a value is not finite; the message names the unit.
    """
    finite = sums.isfinite()  # only if all entries are, and without a copy of them
    with torch.autocast(kernels.device.type, enabled=False):
        usable = kernels if spectrum or kernels.shape[1] <= DENSE else krylov(kernels)
    usable.masked_fill_(~finite[:, None, None], 0)  # such kernels are refused below
    values = torch.linalg.eigvalsh(usable).clamp_min(0)
    packed = torch.column_stack([values, sums.clamp_min(0), finite])
    table = packed.to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(table[:, -1] == 0)
    if len(bad):
        raise FloatingPointError(
            f"the mNTK of {units.name(int(bad[0]))} has values that are not finite (as those of "
            f"{len(bad) - 1} other units): the model has diverged."
        )
    return table[:, -3].copy(), table[:, -2].copy(), table[:, :-2] if spectrum else None


def krylov(kernels: Tensor) -> Tensor:
    """Kernels (U, r, r) restricted to Krylov spaces of a random start, (U, 32, 32).

    Their top eigenvalues agree: the largest one dominates the spectrum of an mNTK, and Lanczos
    finds such a one to rounding in a few steps, where ``eigvalsh`` of r rows would cost more than
    the rest of the estimate.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, kernels.shape[1], 1, generator=random, dtype=kernels.dtype)
    x = x.to(kernels.device)
    x = (x / x.norm()).expand(len(kernels), -1, -1)
    basis, trace = x, kernels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    for _ in range(KRYLOV - 1):
        x = kernels @ basis[:, :, -1:]
        for _ in range(2):  # twice is enough
            x = x - basis @ (basis.mT @ x)
        size = x.norm(dim=1, keepdim=True)
        # Else the space is complete, and what is left is rounding.
        grows = size > 100 * torch.finfo(x.dtype).eps * trace
        basis = torch.cat([basis, torch.where(grows, x / size, 0)], 2)
    restricted: Tensor = basis.mT @ (kernels @ basis)
    return restricted


def eigenvalue_flops(units: int, rows: int) -> int:
    """FLOPs of the matrix products behind the top eigenvalues of kernels (units, rows, rows)."""
    if rows <= DENSE:
        return 0
    orthogonal = sum(8 * rows * i for i in range(1, KRYLOV))
    return units * (2 * rows * rows * (2 * KRYLOV - 1) + orthogonal + 2 * rows * KRYLOV**2)
