"""AdamW that touches active units only, with a step count per unit (paper section 5, "Frozen unit").

Every unit's rows are updated by torch's own AdamW kernel as if they were a parameter of their own. A frozen unit is
simply not handed over: no gradient, no momentum, no weight decay, parameters and state bit-identical until it is
active again, when its update equals that of a unit that skipped those steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mat.units import BoolArray, UnitLayer, unit_layers


@dataclass
class Slot:
    """One parameter with its state; ``layer`` is None for parameters of the rest.

    Attributes:
        name: The parameter's name in the model.
        parameter: (U, ...) for unit parameters.
        layer: The unit layer it belongs to.
        local_name: Its name in that layer.
        exp_avg: First moment, like the parameter.
        exp_avg_sq: Second moment, like the parameter.
        steps: Step counts, (U,) or (), float32 as torch's kernel wants them.
        decays: Whether weight decay applies: to matrices, not to biases and norms.
    """

    name: str
    parameter: nn.Parameter
    layer: UnitLayer | None
    local_name: str
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    decays: bool

    def gradient(self) -> Tensor | None:
        """Gradient, or the block of active rows of it."""
        return self.parameter.grad if self.layer is None else self.layer.gradient(self.local_name)


class UnitAdamW:
    """AdamW over a model with unit layers.

    Args:
        model: The model.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay of matrices.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        owner = {
            id(parameter): (layer, name)
            for layer in unit_layers(model)
            for name, parameter in layer.unit_parameters().items()
        }
        self.slots: list[Slot] = []
        for name, parameter in model.named_parameters():
            layer, local_name = owner.get(id(parameter), (None, name))
            unit_axes = 0 if layer is None else 1
            shape = () if layer is None else (layer.n_units,)
            self.slots.append(
                Slot(
                    name, parameter, layer, local_name, torch.zeros_like(parameter), torch.zeros_like(parameter),
                    torch.zeros(shape, device=parameter.device), parameter.dim() - unit_axes >= 2,
                )
            )  # fmt: skip
        self._views: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def gradients(self) -> list[Tensor]:
        """All gradients there are; of gated parameters the active rows."""
        return [g for g in (slot.gradient() for slot in self.slots) if g is not None]

    def clip(self, largest_norm: float) -> Tensor:
        """Scale the gradients (of active units and the rest) down to a norm, as ``clip_grad_norm_`` does.

        Args:
            largest_norm: Bound on the norm.

        Returns:
            The norm before, a scalar tensor.
        """
        gradients = self.gradients()
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (largest_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear(self) -> None:
        """Forget all gradients."""
        for slot in self.slots:
            slot.parameter.grad = None
        for layer in {id(s.layer): s.layer for s in self.slots if s.layer is not None}.values():
            layer.clear_gradient()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, unit by unit.

        Args:
            lr: Learning rate.
        """
        for decays in (True, False):
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            for slot in self.slots:
                gradient = slot.gradient()
                if gradient is None or slot.decays != decays:
                    continue
                tensors = (slot.parameter.detach(), slot.exp_avg, slot.exp_avg_sq, slot.steps)
                if slot.layer is None:
                    rows: Iterable[Any] = [(*tensors, gradient)]
                else:
                    active = np.flatnonzero(slot.layer.active)
                    unbound = [self._unbind(slot, part, tensor) for part, tensor in enumerate(tensors)]
                    rows = ((*(u[i] for u in unbound), g) for i, g in zip(active, gradient.unbind(0), strict=True))
                torch.autograd.graph.increment_version(slot.parameter)  # the fused kernel does not; gates rely on it
                for row in rows:
                    for target, tensor in zip(lists, row, strict=True):
                        target.append(tensor)
            parameters, exp_avgs, exp_avg_sqs, steps, gradients = lists
            if parameters:
                adamw(
                    parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False,
                    beta1=self.betas[0], beta2=self.betas[1], lr=lr,
                    weight_decay=self.weight_decay if decays else 0.0, eps=self.eps, maximize=False,
                )  # fmt: skip

    @torch.no_grad()
    def drift(self, layers: Iterable[tuple[UnitLayer, BoolArray]], lr: float) -> None:
        """Let units repeat the direction of their last update at the present learning rate (multirate).

        The direction of AdamW is ``m / (sqrt(v) + eps)`` with bias correction, plus the decay; m and v stand since the
        unit's last gradient. A unit that has had none does not move.

        Args:
            layers: Layers with the units that drift.
            lr: Learning rate.
        """
        drifting = {id(layer): torch.from_numpy(np.flatnonzero(units)) for layer, units in layers}
        for slot in self.slots:
            rows = drifting.get(id(slot.layer))
            if rows is None or len(rows) == 0:
                continue
            rows = rows.to(slot.parameter.device)
            shape = (-1, *[1] * (slot.parameter.dim() - 1))
            steps = slot.steps[rows].clamp_min(1).view(shape)
            numerator = slot.exp_avg[rows] / (1 - self.betas[0] ** steps)
            denominator = (slot.exp_avg_sq[rows] / (1 - self.betas[1] ** steps)).sqrt_().add_(self.eps)
            moved = slot.parameter.detach()[rows]
            if slot.decays:
                moved.mul_(torch.where(slot.steps[rows].view(shape) > 0, 1 - lr * self.weight_decay, 1.0))
            slot.parameter.detach().index_copy_(0, rows, moved.addcdiv_(numerator, denominator, value=-lr))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """State by parameter name."""
        return {s.name: {"exp_avg": s.exp_avg, "exp_avg_sq": s.exp_avg_sq, "steps": s.steps} for s in self.slots}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for slot in self.slots:
            for key, value in saved[slot.name].items():
                getattr(slot, key).copy_(value)

    def _unbind(self, slot: Slot, part: int, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of a tensor's units; made once, as storage never moves."""
        views = self._views.get((slot.name, part))
        if views is None or views[0].data_ptr() != tensor.data_ptr():
            views = self._views[slot.name, part] = tensor.unbind(0)
        return views
