"""What the paper's figures look at inside a run: observers that measure a copy of the model at every record.

``analysis=[attention,kernels,descent]`` in the configuration names them; each writes one tidy table into the run
folder. They get a copy of the model in eval mode, with open gates and without autocast, and the probe batch, so that a
run gives the same numbers with and without them. They are no part of a method: their FLOPs and seconds are not counted.

``attention``  effective rank of every head's attention matrix (Figure 1);
``kernels``    top eigenvalue of every unit's mNTK; whole spectrum of every layer's mNTK (all its parameters, its units'
               and its own rest's) and of the layers' sum (Figures 1, 3, 4, 5);
``descent``    eq. (2): what the top eigenvalue predicts of a unit's loss drop, and the drop of one small step.

Kernels come from m stacked random projections of the outputs (``mat.suite.ntk``, reduction ``random``): their trace is
unbiased, their top eigenvalue too large by a factor that depends on the spectrum, from about 1 where one eigenvalue
holds the trace to about k / m where all are equal (k outputs a sample).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mat.suite import ntk
from mat.suite.interface import Batch, UnitModel
from mat.suite.units import UnitIndex, UnitLayer, UnitTensors, unit_layers

SAMPLES = 4  # descent: of the probe, as every unit costs a forward pass
STEP = 1e-4  # descent: share of the loss that the step is to take off, to first order and over all units


@dataclass(frozen=True)
class Scene:
    """What an observer sees.

    Attributes:
        model: A copy of the model: eval mode, gates open.
        probe: The probe batch, n samples.
        projections: m.
        seed: Seed of the projections; the same at every record.
        memory_bytes: Bound on the working memory of Gram products.
    """

    model: UnitModel
    probe: Batch
    projections: int
    seed: int
    memory_bytes: int


def scene(model: UnitModel, probe: Batch, projections: int, seed: int, memory_bytes: int) -> Scene:
    """A scene of a model in training, which is left alone."""
    seen = copy.deepcopy(model).eval()
    for layer in unit_layers(seen):
        layer.set_active(np.ones(layer.n_units, dtype=bool))
        layer.clear_gradient()
    return Scene(seen, probe, projections, seed, memory_bytes)


# --- distance from initialisation, eq. (3): logged with every run


def unit_values(index: UnitIndex) -> list[UnitTensors]:
    """A copy of all unit parameters, by layer."""
    return [{k: v.detach().clone() for k, v in layer.unit_parameters().items()} for layer in index.layers]


@torch.no_grad()
def distances(index: UnitIndex, start: Sequence[UnitTensors]) -> NDArray[np.float64]:
    """Distance ||theta - theta_0|| of every unit from its values at the start, (N,)."""
    squares = [
        torch.stack(
            [(v - then[k]).view(layer.n_units, -1).square().sum(1) for k, v in layer.unit_parameters().items()]
        ).sum(0)
        for layer, then in zip(index.layers, start, strict=True)
    ]
    return torch.cat(squares).sqrt().to("cpu", torch.float64).numpy()


# --- Figure 1: effective rank of attention


def effective_rank(matrices: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the singular values over their sum (Roy and Vetterli 2007).

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
def attention(seen: Scene) -> pd.DataFrame:
    """Effective rank of every head's attention matrix, averaged over the probe: kind, layer, unit, effective_rank."""
    layers = [layer for layer in unit_layers(seen.model) if layer.kind == "heads"]
    ranks: dict[nn.Module, Tensor] = {}

    def watch(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        ranks[layer] = effective_rank(layer.probabilities(arguments[0])).mean(0)

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        seen.model(seen.probe)
    finally:
        for handle in handles:
            handle.remove()
    return _unit_rows(layers, effective_rank=torch.cat([ranks[layer] for layer in layers]))


# --- Figures 1, 3, 4, 5: kernels of units and layers


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers in the sense of Figure 3: entries of its list of blocks, or else its unit layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(unit_layers(entry) for entry in module):
            return list(module)
    return list(unit_layers(model))


def _estimate(seen: Scene, rest: bool) -> ntk.Mntk:
    return ntk.estimate(
        seen.model, seen.probe, reduction="random", projections=seen.projections, seed=seen.seed,
        memory_bytes=seen.memory_bytes, kernels=True, rest=rest,
    )  # fmt: skip


def eigenvalues(seen: Scene) -> pd.DataFrame:
    """Eigenvalues: columns scope, kind, layer, unit, rank, eigenvalue, trace.

    Rows are, by scope: ``unit``: the top eigenvalue (rank 1) of each unit's kernel; ``layer``: all eigenvalues of each
    layer's; ``network``: all of the layers' sum, which leaves out embeddings and output head.
    """
    found = _estimate(seen, rest=True)
    assert found.kernels is not None
    trace = found.kernels.diagonal(dim1=1, dim2=2).sum(1)
    units = _unit_rows(unit_layers(seen.model), eigenvalue=torch.from_numpy(found.lambda_max), trace=trace)
    tables = [units.assign(scope="unit", rank=1)]
    layers = [found.kernel_of(seen.model, layer).detach().double() for layer in layers_of(seen.model)]
    scopes = [("layer", i, kernel) for i, kernel in enumerate(layers)]
    for scope, i, kernel in (*scopes, ("network", -1, torch.stack(layers).sum(0))):
        values = torch.linalg.eigvalsh(kernel).clamp_min(0).flip(0).cpu().numpy()
        rank = np.arange(1, len(values) + 1)
        tables.append(pd.DataFrame({"scope": scope, "kind": "all", "layer": i, "unit": -1, "rank": rank,
                                    "eigenvalue": values, "trace": values.sum()}))  # fmt: skip
    return pd.concat(tables, ignore_index=True)[["scope", "kind", "layer", "unit", "rank", "eigenvalue", "trace"]]


# --- eq. (2)


def descent(seen: Scene) -> pd.DataFrame:
    """Eq. (2) by unit: the loss drop of a gradient step of size eta on the unit alone, over eta, in float64.

    To first order that is ||g||² = sum_i lambda_i (u_i . r)² with g the unit's loss gradient, lambda_i and u_i the
    eigenpairs of its mNTK and r the gradient of the loss with respect to the outputs (for cross-entropy the softmax
    minus the targets, in the place of eq. (2)'s y). ``predicted`` is the sum's first term, computed as (v . g)² with v
    the top right singular vector of the unit's projected Jacobian A: v . g = u . A g / sqrt(lambda), and A g is how the
    step changes the projected outputs.

    Returns:
        Columns kind, layer, unit, lambda_max, predicted, first_order (||g||²), measured, eta.
    """
    probe = seen.probe.split(-(-seen.probe.samples // SAMPLES))[0]
    seen = replace(seen, model=copy.deepcopy(seen.model).double(), probe=probe)
    model, layers = seen.model, unit_layers(seen.model)
    outputs = model(probe)
    loss = model.loss_of_outputs(outputs, probe)
    parameters = [p for layer in layers for p in layer.unit_parameters().values()]
    gradient = dict(zip(map(id, parameters), torch.autograd.grad(loss, parameters), strict=True))
    squares = [[g.flatten(1).square().sum(1) for g in (gradient[id(p)] for p in layer.unit_parameters().values())]
               for layer in layers]  # fmt: skip
    first_order = torch.cat([torch.stack(of_layer).sum(0) for of_layer in squares])
    eta = float(STEP * loss.detach() / first_order.sum())
    found = _estimate(seen, rest=False).kernels
    assert found is not None
    top, vectors = torch.linalg.eigh(found)
    reducer = ntk.Reducer("random", seen.projections, seen.seed, probe.samples)
    signs = torch.stack([c for c, _ in reducer.cotangents(model, probe, outputs, 0)]) / seen.projections**0.5
    signs = signs.view(seen.projections, probe.samples, -1)  # (m, n, k)
    measured: list[Tensor] = []
    along: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            mine = list(layer.unit_parameters().values())
            for unit in range(layer.n_units):
                before = [parameter[unit].clone() for parameter in mine]
                for parameter in mine:
                    parameter[unit] -= eta * gradient[id(parameter)][unit]
                after = model(probe)
                measured.append((loss - model.loss_of_outputs(after, probe)) / eta)
                changed = (signs * ((outputs - after) / eta).view(probe.samples, -1)).sum(2).flatten()  # A g
                along.append(vectors[len(along), :, -1] @ changed)
                for parameter, value in zip(mine, before, strict=True):
                    parameter[unit] = value
    return _unit_rows(
        layers, lambda_max=top[:, -1], predicted=torch.stack(along).square() / top[:, -1].clamp_min(1e-300),
        first_order=first_order, measured=torch.stack(measured), eta=torch.full_like(first_order, eta),
    )  # fmt: skip


def _unit_rows(layers: Sequence[UnitLayer], **columns: Tensor) -> pd.DataFrame:
    """A table with a row per unit of these layers."""
    index = UnitIndex(layers)
    numbers = {name: column.detach().to("cpu", torch.float64).numpy() for name, column in columns.items()}
    return pd.DataFrame({"kind": index.kind, "layer": index.layer, "unit": index.unit, **numbers})


OBSERVERS: dict[str, Callable[[Scene], pd.DataFrame]] = {
    "attention": attention, "kernels": eigenvalues, "descent": descent,
}  # fmt: skip
