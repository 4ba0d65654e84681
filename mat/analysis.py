"""What the paper's figures look at inside a run: observers that measure a copy of the model at every selection.

``analysis=[attention,kernels,descent]`` in the configuration names them; each writes one tidy table into the run
folder. They get a copy of the model in eval mode, with open gates and without autocast, and the probe batch, so that a
run gives the same numbers with and without them. They are no part of a method: their FLOPs and seconds are not counted.

``attention``  effective rank of every head's attention matrix (Figure 1);
``kernels``    top eigenvalue of every unit's mNTK; whole spectrum of every layer's mNTK (all its parameters, its units'
               and its own rest's) and of the layers' sum (Figures 1, 3, 4, 5);
``descent``    eq. (2): what the top eigenvalue predicts of a unit's loss drop, and the drop of one small step.

Kernels come from m stacked random projections of the outputs (``mat.ntk``, reduction ``random``): their trace is
unbiased, their top eigenvalue too large by a factor that the units share.
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

from mat import gram
from mat.interface import Batch, UnitModel
from mat.units import Tape, UnitIndex, UnitLayer, UnitTensors, unit_layers

SAMPLES = 4  # descent: of the probe, as every unit costs a forward pass
STEP = 1e-4  # descent: share of the loss that the step is to take off, to first order and over all units


@dataclass(frozen=True)
class Scene:
    """What an observer sees.

    Attributes:
        model: A copy of the model: eval mode, gates open.
        probe: The probe batch, n samples.
        projections: m.
        seed: Seed of the projections; the same at every selection.
        memory_bytes: Bound on the working memory of Gram products.
    """

    model: UnitModel
    probe: Batch
    projections: int
    seed: int
    memory_bytes: int = 512 * 2**20


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
        torch.stack([(v - then[k]).flatten(1).square().sum(1) for k, v in layer.unit_parameters().items()]).sum(0)
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


@dataclass(frozen=True)
class Kernels:
    """Gram matrices over r rows; rows are projection-major (projection j, then sample i).

    Attributes:
        units: By unit layer, (U, r, r).
        layers: Of each of the model's layers (:func:`layers_of`), all parameters, (L, r, r).
    """

    units: dict[UnitLayer, Tensor]
    layers: Tensor


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers in the sense of Figure 3: entries of its list of blocks, or else its unit layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(unit_layers(entry) for entry in module):
            return list(module)
    return list(unit_layers(model))


def kernels_of(seen: Scene, cotangents: Sequence[Tensor]) -> Kernels:
    """Kernels of all units and layers, one sample at a time.

    Args:
        seen: Model and probe of n samples.
        cotangents: m tensors of the outputs' shape (P, ...), by which the outputs are reduced.

    Returns:
        Kernels over r = m n rows.
    """
    model, samples = seen.model, seen.probe.samples
    units, layers = unit_layers(model), layers_of(model)
    gated = {id(p) for layer in units for p in layer.parameters()}
    rest = [[p for p in layer.parameters() if id(p) not in gated] for layer in layers]
    ends = np.cumsum([len(p) for p in rest]).tolist()
    flat = [p for parameters in rest for p in parameters]
    parts = [c.view(samples, -1, *c.shape[1:]) for c in cotangents]  # (n, P / n, ...)
    tape = Tape()
    known: list[list[Tensor]] = []  # by tap and sample
    found: list[list[list[Tensor]]] = []  # by sample, projection, and tap or parameter of the rest
    try:
        for layer in units:
            layer.tape = tape
        for i, sample in enumerate(seen.probe.split(samples)):
            tape.taps.clear()
            outputs = model(sample)
            wanted = [*(tap.output for tap in tape.taps), *flat]
            found.append([list(torch.autograd.grad(outputs, wanted, p[i], retain_graph=True)) for p in parts])
            known.append([tap.known for tap in tape.taps])
    finally:
        for layer in units:
            layer.tape = None
    taps, count = list(tape.taps), len(tape.taps)
    rows = [found[i][j] for j in range(len(parts)) for i in range(samples)]
    by_unit: dict[UnitLayer, Tensor] = {}
    with torch.no_grad():
        for k, tap in enumerate(taps):
            gradient = torch.cat([row[k] for row in rows])
            forward = torch.cat([known[i][k] for i in range(samples)] * len(parts))
            factors = (gradient, forward) if tap.known_is_shared else (forward, gradient)
            value = gram.unit_gram([factors], tap.bias is not None, seen.memory_bytes)
            by_unit[tap.layer] = by_unit[tap.layer] + value if tap.layer in by_unit else value
        whole = []
        for block, end, parameters in zip(layers, ends, rest, strict=True):
            total = torch.stack([by_unit[layer].sum(0) for layer in unit_layers(block)]).sum(0)
            for k in range(count + end - len(parameters), count + end):
                gradient = torch.stack([row[k].flatten() for row in rows])
                total = total + gradient @ gradient.T
            whole.append(total)
    return Kernels(by_unit, torch.stack(whole))


def projections(seen: Scene) -> list[Tensor]:
    """As many tensors of random signs over sqrt(m), of the outputs' shape; the trace stays unbiased."""
    with torch.no_grad():
        outputs = seen.model(seen.probe)
    generator = torch.Generator().manual_seed(seen.seed)  # on the CPU, so that every device sees the same signs
    signs = torch.randint(0, 2, (seen.projections, *outputs.shape), generator=generator).mul_(2).sub_(1)
    return list(signs.to(outputs.device).to(outputs.dtype) / seen.projections**0.5)


def kernels(seen: Scene) -> pd.DataFrame:
    """Eigenvalues: columns scope, kind, layer, unit, rank, eigenvalue, trace.

    Rows are, by scope: ``unit``: the top eigenvalue (rank 1) of each unit's kernel; ``layer``: all eigenvalues of each
    layer's; ``network``: all of the layers' sum, which leaves out embeddings and output head.
    """
    found = kernels_of(seen, projections(seen))
    stacked = torch.cat(list(found.units.values()))
    top = torch.linalg.eigvalsh(stacked)[:, -1]
    trace = stacked.diagonal(dim1=1, dim2=2).sum(1)
    tables = [_unit_rows(list(found.units), eigenvalue=top, trace=trace).assign(scope="unit", rank=1)]
    scopes = [("layer", i, kernel) for i, kernel in enumerate(found.layers)]
    for scope, i, kernel in (*scopes, ("network", -1, found.layers.sum(0))):
        values = torch.linalg.eigvalsh(kernel.double()).clamp_min(0).flip(0).cpu().numpy()
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
    the top right singular vector of the unit's projected Jacobian.

    Returns:
        Columns kind, layer, unit, lambda_max, predicted, first_order (||g||²), measured, eta.
    """
    model, probe = copy.deepcopy(seen.model).double(), seen.probe.split(-(-seen.probe.samples // SAMPLES))[0]
    seen = replace(seen, model=model, probe=probe)
    random = projections(seen)
    outputs = model(probe)
    loss = model.loss_of_outputs(outputs, probe)
    residual = torch.autograd.grad(loss, outputs, retain_graph=True)
    layers = unit_layers(model)
    names = [(layer, name) for layer in layers for name in layer.unit_parameters()]
    gradients = torch.autograd.grad(loss, [layer.get_parameter(name) for layer, name in names])
    found = kernels_of(seen, [*random, *residual])
    stacked = torch.cat(list(found.units.values()))
    r = stacked.shape[1] - probe.samples
    top, vectors = torch.linalg.eigh(stacked[:, :r, :r])
    along = (vectors[:, :, -1] * stacked[:, :r, r:].sum(2)).sum(1)  # u . A g, with A the projected Jacobian
    first_order = stacked[:, r:, r:].sum((1, 2))
    eta = float(STEP * loss.detach() / first_order.sum())
    measured: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            own = [(name, g) for (of, name), g in zip(names, gradients, strict=True) if of is layer]
            mine = [(layer.get_parameter(name), g) for name, g in own]
            for unit in range(layer.n_units):
                before = [parameter[unit].clone() for parameter, _ in mine]
                for parameter, gradient in mine:
                    parameter[unit] -= eta * gradient[unit]
                measured.append((loss - model.loss(probe)) / eta)
                for (parameter, _), value in zip(mine, before, strict=True):
                    parameter[unit] = value
    return _unit_rows(
        layers, lambda_max=top[:, -1], predicted=along.square() / top[:, -1].clamp_min(1e-300),
        first_order=first_order, measured=torch.stack(measured), eta=torch.full_like(along, eta),
    )  # fmt: skip


def _unit_rows(layers: Sequence[UnitLayer], **columns: Tensor) -> pd.DataFrame:
    """A table with a row per unit of these layers."""
    index = UnitIndex(layers)
    numbers = {name: column.detach().to("cpu", torch.float64).numpy() for name, column in columns.items()}
    return pd.DataFrame({"kind": index.kind, "layer": index.layer, "unit": index.unit, **numbers})


OBSERVERS: dict[str, Callable[[Scene], pd.DataFrame]] = {
    "attention": attention, "kernels": kernels, "descent": descent,
}  # fmt: skip
