"""Gradients of a gated model, and what a dense model says that they are."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mat
from mat.gates import Gates
from mat.layers.gate import BackwardMode
from mat.units import BoolArray, Units

CLASSES = 5
Choice = Callable[[Units], BoolArray]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the mean cross-entropy; zeros where there is none."""
    model.zero_grad()
    F.cross_entropy(model(x).float(), torch.arange(len(x)) % CLASSES).backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def expected(gates: Gates, dense: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Dense gradients, zeros in frozen slices."""
    wanted = gradients(dense, x)
    for part in gates.parts():
        mask = torch.from_numpy(part.gate.active[part.part.owner] | (part.part.owner < 0))
        wanted[part.part.parameter].movedim(part.dim, 0)[~mask] = 0
    return wanted


def attached(model: nn.Module, mode: BackwardMode, choice: Choice, units: Any = None) -> Gates:
    gates = mat.attach_(model, mat.MATConfig(mode=mode), units=units)
    gates.set_active(choice(gates.units))
    return gates
