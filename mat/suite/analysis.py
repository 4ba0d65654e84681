"""What the figures look at inside a run: observers that measure a copy of the model.

``analysis=[attention,kernels,descent]`` in the configuration names them; each writes one tidy table
into the run folder. They get a copy of the model in eval mode, with open gates and without
autocast, and the probe batch, so that a run gives the same numbers with and without them. They are
no part of a method: their FLOPs and seconds are not counted.

``attention``  effective rank of every head's attention matrix (Figure 1);
``kernels``    top eigenvalue of every unit's mNTK; whole spectrum of every layer's mNTK (all its
               parameters, its units' and its own rest's) and of the layers' sum (Figures 1,
               3, 4, 5);
``descent``    eq. (2): what the top eigenvalue predicts of a unit's loss drop, and the drop of one
               small step.

Kernels come from m stacked random projections of the outputs (``mat.ntk``, reduction
``random``): their trace is unbiased, their top eigenvalue too large by a factor that depends on the
spectrum, from about 1 where one eigenvalue holds the trace to about k / m where all are equal (k
outputs a sample).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mat import ntk
from mat.gates import Gates, detach_
from mat.layers.gate import GatedPart
from mat.reduction import Reducer
from mat.suite.interface import Batch, Model
from mat.suite.models.bert import Attention
from mat.units import REST, Part, Units

SAMPLES = 4  # descent: of the probe, as every unit costs a forward pass
# Descent: share of the loss that the step is to take off, to first order and over all units.
STEP = 1e-4


@dataclass(frozen=True)
class Scene:
    """What an observer looks at.

    Attributes:
        model: A copy of the model: eval mode, no gates.
        units: Its units, gated or not.
        probe: The probe batch, n samples.
        projections: m.
        seed: Seed of the projections; the same at every record.
        memory_bytes: Bound on the working memory of Gram products.
    """

    model: Model
    units: Units
    probe: Batch
    projections: int
    seed: int
    memory_bytes: int


def scene(
    model: Model, units: Units, probe: Batch, projections: int, seed: int, memory_bytes: int
) -> Scene:
    """A scene of a model in training, which is left alone."""
    twin = copy.deepcopy(model).eval()
    detach_(twin)
    return Scene(twin, units, probe, projections, seed, memory_bytes)


# --- distance from initialisation, eq. (3): logged with every run


def unit_values(gates: Gates) -> list[tuple[GatedPart, Tensor]]:
    """A copy of everything that units own."""
    return [(part, part.parameter.detach().clone()) for part in gates.parts()]


@torch.no_grad()
def distances(gates: Gates, start: Sequence[tuple[GatedPart, Tensor]]) -> NDArray[np.float64]:
    """Distance ||theta - theta_0|| of every unit from its values at the start, (N,)."""
    squares = {id(gate): torch.zeros(gate.n_units, dtype=torch.float64) for gate in gates.layers}
    for part, then in start:
        change = (part.parameter - then).square().to("cpu", torch.float64)
        squares[id(part.gate)] += _by_unit(change, part.part, part.gate.n_units)
    return torch.cat([squares[id(gate)] for gate in gates.layers]).sqrt().numpy()


def _by_unit(values: Tensor, part: Part, units: int) -> Tensor:
    """Sums of a parameter-shaped tensor over what each unit owns, (U,)."""
    rows = values.transpose(0, part.dim).flatten(1).sum(1) if values.dim() > 1 else values
    owner = torch.from_numpy(part.owner).to(rows.device)
    owned = owner != REST
    return rows.new_zeros(units).index_add_(0, owner[owned], rows[owned])


# --- Figure 1: effective rank of attention


def effective_rank(matrices: Tensor) -> Tensor:
    """Effective rank (Roy and Vetterli 2007): exp of the entropy of the singular values' shares.

    Args:
        matrices: (..., a, b), not all zero.

    Returns:
        (...) from 1 to min(a, b): r for a matrix of r equal singular values.
    """
    values = torch.linalg.svdvals(matrices)
    share = values / values.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


@torch.no_grad()
def attention(scene: Scene) -> pd.DataFrame:
    """Effective rank of every head's attention matrix, averaged over the probe."""
    ranks: list[Tensor] = []

    def watch(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Attention)
        ranks.append(effective_rank(layer.probabilities(arguments[0])).mean(0))

    layers = [module for module in scene.model.modules() if isinstance(module, Attention)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        scene.model(scene.probe)
    finally:
        for handle in handles:
            handle.remove()
    return _unit_rows(scene.units.of_kinds(["heads"]), effective_rank=torch.cat(ranks))


# --- Figures 1, 3, 4, 5: kernels of units and layers


def layers_of(scene: Scene) -> list[str]:
    """Paths of the layers of Figure 3: the entries of a list of blocks, or else the unit layers."""
    for path, module in scene.model.named_modules():
        if isinstance(module, nn.ModuleList):
            return [f"{path}.{i}" for i in range(len(module))]
    return [layer.name for layer in scene.units.layers]


def _estimate(scene: Scene, rest: bool) -> ntk.Mntk:
    return ntk.estimate(
        scene.model,
        scene.probe,
        scene.units,
        samples=scene.probe.samples,
        reduction="random",
        projections=scene.projections,
        seed=scene.seed,
        memory_bytes=scene.memory_bytes,
        kernels=True,
        rest=rest,
    )


def eigenvalues(scene: Scene) -> pd.DataFrame:
    """Eigenvalues: columns scope, kind, layer, unit, rank, eigenvalue, trace.

    Rows are, by scope: ``unit``: the top eigenvalue (rank 1) of each unit's kernel; ``layer``: all
    eigenvalues of each layer's; ``network``: all of the layers' sum, which leaves out embeddings
    and output head.
    """
    result = _estimate(scene, rest=True)
    assert result.kernels is not None
    trace = result.kernels.diagonal(dim1=1, dim2=2).sum(1)
    top = torch.from_numpy(result.lambda_max)
    tables = [_unit_rows(scene.units, eigenvalue=top, trace=trace).assign(scope="unit", rank=1)]
    blocks = [scene.model.get_submodule(path) for path in layers_of(scene)]
    layers = [result.kernel_of(scene.model, block).double() for block in blocks]
    scopes = [("layer", i, kernel) for i, kernel in enumerate(layers)]
    for scope, i, kernel in (*scopes, ("network", -1, torch.stack(layers).sum(0))):
        values = torch.linalg.eigvalsh(kernel).clamp_min(0).flip(0).cpu().numpy()
        place = {"scope": scope, "kind": "all", "layer": i, "unit": -1}
        rank = np.arange(1, len(values) + 1)
        columns = {"rank": rank, "eigenvalue": values, "trace": values.sum()}
        tables.append(pd.DataFrame({**place, **columns}))
    order = ["scope", "kind", "layer", "unit", "rank", "eigenvalue", "trace"]
    return pd.concat(tables, ignore_index=True)[order]


# --- eq. (2)


def descent(scene: Scene) -> pd.DataFrame:
    """Eq. (2) by unit: the loss drop of a gradient step of size eta on the unit alone, over eta.

    In float64. To first order that is ||g||² = sum_i lambda_i (u_i . r)² with g the unit's loss
    gradient, lambda_i and u_i the eigenpairs of its mNTK and r the gradient of the loss with
    respect to the outputs (for cross-entropy the softmax minus the targets, in the place of eq.
    (2)'s y). ``predicted`` is the sum's first term, computed as (v . g)² with v the top right
    singular vector of the unit's projected Jacobian A: v . g = u . A g / sqrt(lambda), and A g is
    how the step changes the projected outputs.

    Returns:
        Columns kind, layer, unit, lambda_max, predicted, first_order (||g||²), measured, eta.
    """
    probe = scene.probe.split(-(-scene.probe.samples // SAMPLES))[0]  # of text: numbers of tokens
    scene = replace(scene, model=copy.deepcopy(scene.model).double(), probe=probe)
    model, units = scene.model, scene.units
    outputs = model(probe)
    loss = model.loss_of_outputs(outputs, probe)
    names = [part.parameter for layer in units.layers for part in layer.parts]
    parameters = [model.get_parameter(name) for name in names]
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    squares = []
    for layer in units.layers:
        each = (_by_unit(gradient[p.parameter].square(), p, layer.n_units) for p in layer.parts)
        squares.append(torch.stack(list(each)).sum(0))
    first_order = torch.cat(squares)
    eta = float(STEP * loss.detach() / first_order.sum())
    kernels = _estimate(scene, rest=False).kernels
    assert kernels is not None
    top, vectors = torch.linalg.eigh(kernels)
    reducer = Reducer("random", scene.projections, scene.seed, probe.samples)
    vectors_of = reducer.cotangents(outputs, probe, outputs, 0, probe.samples)
    signs = torch.stack([vector.view(probe.samples, -1) for vector, _ in vectors_of])  # (m, n, k)
    signs /= scene.projections**0.5
    measured: list[Tensor] = []
    along: list[Tensor] = []
    with torch.no_grad():
        for layer in units.layers:
            for unit in range(layer.n_units):
                before = [model.get_parameter(p.parameter).clone() for p in layer.parts]
                for part in layer.parts:
                    rows = torch.from_numpy(np.flatnonzero(part.owner == unit))
                    step = gradient[part.parameter].index_select(part.dim, rows)
                    model.get_parameter(part.parameter).index_add_(part.dim, rows, step, alpha=-eta)
                after = model(probe)
                measured.append((loss - model.loss_of_outputs(after, probe)) / eta)
                change = ((outputs - after) / eta).view(probe.samples, -1)
                projected = (signs * change).sum(2).flatten()  # A g
                along.append(vectors[len(along), :, -1] @ projected)
                for part, value in zip(layer.parts, before, strict=True):
                    model.get_parameter(part.parameter).copy_(value)
    return _unit_rows(
        units,
        lambda_max=top[:, -1],
        predicted=torch.stack(along).square() / top[:, -1].clamp_min(1e-300),
        first_order=first_order,
        measured=torch.stack(measured),
        eta=torch.full_like(first_order, eta),
    )


def _unit_rows(units: Units, **columns: Tensor) -> pd.DataFrame:
    """A table with a row per unit."""
    where = {"kind": units.kind, "layer": units.layer, "unit": units.unit}
    numbers = {n: c.detach().to("cpu", torch.float64).numpy() for n, c in columns.items()}
    return pd.DataFrame({**where, **numbers})


OBSERVERS: dict[str, Callable[[Scene], pd.DataFrame]] = {
    "attention": attention,
    "kernels": eigenvalues,
    "descent": descent,
}
