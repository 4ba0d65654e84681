"""Top eigenvalues of the modular neural tangent kernels of all units, from one forward pass (paper section 1).

The mNTK of unit l is ``Theta_l = J_l J_l^T`` with ``J_l = d f / d theta_l`` of the network's outputs f: n samples with
k outputs each make it nk x nk. Outputs are reduced before they are differentiated, explicitly and by name:

``full``    all k outputs, k backward passes: the exact kernel (nk x nk). For tests and small models.
``random``  m projections of each sample's outputs on random signs, stacked: (nm x nm) / m. Its trace is an unbiased
            estimate of the exact trace; its top eigenvalue over-estimates by a factor that units share.
``sum``     the sum of each sample's outputs over sqrt(k): (n x n). Cheap and a poor ranking; for comparison.
``loss``    the gradient of each sample's part of the mean loss: (n x n). Not an NTK; gives unit gradient norms.

One forward pass records each unit layer's factors (``mat.units.Tap``), one backward pass per projection gives the
gradients of all layers' outputs (no weight gradient is formed by autograd), and each layer's Gram matrices are
batched products (``mat.gram``). The estimator is pure: parameters, gradients, buffers, random state and train or
eval mode are as before. Works in the caller's autocast context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mat import gram
from mat.interface import Batch, UnitModel
from mat.units import Tap, Tape, UnitIndex, unit_layers

Reduction = Literal["random", "sum", "full", "loss"]


@dataclass(frozen=True)
class Mntk:
    """Result of :func:`estimate`, one row per unit in the order of the ``UnitIndex``.

    Attributes:
        lambda_max: (units,) top eigenvalues.
        squared_norm: (units,) sum of all kernel entries; for ``loss`` the squared norm of the unit's gradient.
        spectrum: (units, r) all eigenvalues, ascending, or None. r = n m, n, n k, n by reduction.
        kernels: (units, r, r) or None; rows are projection-major (projection or output j, then sample i).
        samples: n.
        outputs: k.
        reduction: How outputs were reduced.
        projections: m (1 unless ``random``).
    """

    lambda_max: NDArray[np.float64]
    squared_norm: NDArray[np.float64]
    spectrum: NDArray[np.float64] | None
    kernels: Tensor | None
    samples: int
    outputs: int
    reduction: Reduction
    projections: int


def estimate(
    model: UnitModel,
    batch: Batch,
    index: UnitIndex,
    *,
    reduction: Reduction = "random",
    projections: int = 1,
    seed: int = 0,
    memory_bytes: int = 512 * 2**20,
    spectrum: bool = False,
    kernels: bool = False,
) -> Mntk:
    """Top eigenvalue of the mNTK of every unit.

    Args:
        model: A model with unit layers.
        batch: The probe, n samples.
        index: The units wanted.
        reduction: How the outputs are reduced, see the module's docstring.
        projections: m, for ``random`` only.
        seed: Seed of the random signs; the same seed and shapes give the same signs.
        memory_bytes: Bound on the working memory of the Gram products. Beside it the estimator keeps the factors:
            for every unit layer its inputs and m gradients of its outputs.
        spectrum: Return all eigenvalues.
        kernels: Return the kernels.

    Returns:
        Eigenvalues and what they were computed from.

    Raises:
        FloatingPointError: If a kernel has a value that is not finite.
        ValueError: If outputs cannot be split evenly into samples.
    """
    with _probing(model) as tape:
        outputs = model(batch)
        rows = outputs.shape[0] // batch.samples
        if rows * batch.samples != outputs.shape[0]:
            raise ValueError(f"{outputs.shape[0]} output rows cannot be split evenly into {batch.samples} samples")
        count = rows * outputs[0].numel()
        layers = set(map(id, index.layers))
        taps = [tap for tap in tape.taps if id(tap.layer) in layers]
        cotangents = _cotangents(model, batch, outputs, reduction, projections, seed)
        gradients: list[list[Tensor]] = [[] for _ in taps]
        for j, cotangent in enumerate(cotangents):
            last = j == len(cotangents) - 1
            found = torch.autograd.grad(outputs, [t.output for t in taps], cotangent, retain_graph=not last)
            for slot, gradient in zip(gradients, found, strict=True):
                slot.append(gradient)
        del outputs
    grams: dict[int, Tensor] = {}
    with torch.no_grad():
        for tap, found_for_tap in zip(taps, gradients, strict=True):
            value = _tap_gram(tap, found_for_tap, memory_bytes)
            grams[id(tap.layer)] = grams[id(tap.layer)] + value if id(tap.layer) in grams else value
            found_for_tap.clear()
        stacked = torch.cat([grams[id(layer)] for layer in index.layers])
        if reduction == "random":
            stacked /= len(cotangents)
        if not bool(torch.isfinite(stacked).all()):
            raise FloatingPointError("the mNTK has values that are not finite: the model has diverged.")
        eigenvalues = torch.linalg.eigvalsh(stacked).clamp_min(0).to("cpu", torch.float64).numpy()
        squared_norm = stacked.sum((1, 2)).clamp_min(0).to("cpu", torch.float64).numpy()
    return Mntk(
        lambda_max=eigenvalues[:, -1].copy(),
        squared_norm=squared_norm,
        spectrum=eigenvalues if spectrum else None,
        kernels=stacked if kernels else None,
        samples=batch.samples,
        outputs=count,
        reduction=reduction,
        projections=len(cotangents) if reduction == "random" else 1,
    )


def flops(taps: list[tuple[int, int, int, int, bool]], samples: int, memory_bytes: int) -> int:
    """FLOPs of the Gram products of one estimate.

    Args:
        taps: (T, U, p, q, bias) of every product, as the unit layers declare them.
        samples: Stacked samples N.
        memory_bytes: The bound that :func:`estimate` is given.

    Returns:
        Matrix-product FLOPs.
    """
    total = 0
    for tokens, units, p, q, bias in taps:
        total += gram.plan(samples, tokens, units, p, q, memory_bytes).flops
        total += 2 * samples * samples * units * p if bias else 0
    return total


@contextmanager
def _probing(model: UnitModel) -> Iterator[Tape]:
    """Eval mode, no parameter gradients, a tape in every unit layer; everything restored at the end."""
    tape = Tape()
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


def _cotangents(
    model: UnitModel, batch: Batch, outputs: Tensor, reduction: Reduction, projections: int, seed: int
) -> list[Tensor]:
    """One vector per backward pass, each of the outputs' shape."""
    if reduction == "loss":
        leaf = outputs.detach().requires_grad_()
        loss = model.loss_of_outputs(leaf, batch)
        return list(torch.autograd.grad(loss, leaf))
    if reduction == "full":
        per_sample = outputs.view(batch.samples, -1)
        unit = torch.eye(per_sample.shape[1], dtype=outputs.dtype, device=outputs.device)
        return [row.expand_as(per_sample).reshape(outputs.shape) for row in unit]
    if reduction == "sum":
        count = outputs.numel() // batch.samples
        return [torch.full_like(outputs, count**-0.5)]
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same signs
    shape = (projections, *outputs.shape)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return list(signs.to(outputs.device).to(outputs.dtype))


def _tap_gram(tap: Tap, gradients: list[Tensor], memory_bytes: int) -> Tensor:
    """Gram matrices of one product with all projections stacked, (U, N, N) with N = m n."""
    gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
    known = tap.factor()
    known = known.repeat(len(gradients), *[1] * (known.dim() - 1)) if len(gradients) > 1 else known
    per_unit, shared = (gradient, known) if tap.known_is_shared else (known, gradient)
    return gram.unit_gram(per_unit, shared, tap.bias is not None, memory_bytes)
