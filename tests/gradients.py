"""Gradients and Jacobians of the suite's models by the references, and which units they freeze."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import references
import torch
import torch.nn.functional as F
from small_models import ImageBatch
from torch import Tensor, nn

import mat
import mat.suite.gating
from mat.units import REST, UnitLayer

Frozen = set[tuple[str, int]]
STAGES = ((4, 6), (5, 7))  # of tiny_vgg


def attach(model: Any, mode: Any = "cut", kinds: Any = None) -> mat.Gates:
    """As the engine attaches a model."""
    config = getattr(model, "config", None)
    units = mat.find_units(model, groups=getattr(config, "ffn_groups", None))
    units = units if kinds is None else units.of_kinds(kinds)
    return mat.attach_(model, mat.MATConfig(mode=mode, log=False), units)


def frozen_units(gates: mat.Gates) -> Frozen:
    """Layer and number of every frozen unit."""
    return {
        (layer.name, int(u))
        for layer, rows in gates.units.slices()
        for u in np.flatnonzero(~gates.active[rows])
    }


def outputs(model: Any, p: Mapping[str, Tensor], batch: Any, frozen: Frozen) -> Tensor:
    """Of a model by its reference, for parameters by name."""
    if isinstance(batch, ImageBatch):
        return references.filters(p, STAGES, batch.inputs, frozen)[0]
    return references.logits(p, model.config, batch, frozen)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as leaves of their own."""
    return {n: q.detach().clone().requires_grad_() for n, q in model.named_parameters()}


def gradients(model: nn.Module, batch: Any, frozen: Frozen) -> dict[str, Tensor]:
    """Of the mean cross-entropy, by parameter; zeros where there is none."""
    p = copied(model)
    loss = F.cross_entropy(outputs(model, p, batch, frozen), batch.targets)
    found = torch.autograd.grad(loss, list(p.values()), materialize_grads=True)
    return dict(zip(p, found, strict=True))


def gated_gradients(model: nn.Module, gates: mat.Gates, batch: Any) -> dict[str, Tensor]:
    """What an attached model should give: zeros in what frozen units own."""
    cut = gates.config.mode == "cut"
    found = gradients(model, batch, frozen_units(gates) if cut else set())
    for part in gates.parts():
        owner = part.part.owner
        closed = np.flatnonzero((owner != REST) & ~part.gate.active[owner])
        found[part.part.parameter].index_fill_(part.dim, torch.from_numpy(closed), 0)
    return found


def jacobian(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """d outputs / d parameter, (n, k, *parameter.shape), by sample and output.

    The statistics of batch norm are constants, those of the whole batch (paper section 5).
    """
    p = copied(model)
    images = isinstance(batch, ImageBatch)
    statistics = references.filters(p, STAGES, batch.inputs)[1] if images else None
    rows = []
    for sample in batch.split(batch.samples):
        if images:
            found, _ = references.filters(p, STAGES, sample.inputs, (), statistics)
        else:
            found = outputs(model, p, sample, set())
        of_outputs = [
            torch.autograd.grad(o, list(p.values()), retain_graph=True, materialize_grads=True)
            for o in found.flatten()
        ]
        rows.append(of_outputs)
    return {
        name: torch.stack([torch.stack([output[i] for output in sample]) for sample in rows])
        for i, name in enumerate(p)
    }


def unit_jacobian(found: Mapping[str, Tensor], layer: UnitLayer, u: int) -> Tensor:
    """Columns of one unit's parameters, (n, k, p)."""
    columns = []
    for part in layer.parts:
        own = torch.from_numpy(np.flatnonzero(part.owner == u))
        columns.append(found[part.parameter].index_select(part.dim + 2, own).flatten(2))
    return torch.cat(columns, -1)
