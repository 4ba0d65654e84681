"""Optimisers that touch active units only (paper section 5, "Frozen unit").

A frozen unit is simply not handed over: no gradient, no momentum, no weight decay, parameters and state bit-identical
until it is active again, when its update equals that of a unit that skipped those steps. Weight decay applies to
matrices, not to biases and norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mat.suite.config import TrainConfig
from mat.suite.units import UnitLayer, unit_layers


@dataclass
class Slot:
    """One parameter with its state; ``layer`` is None for parameters of the rest.

    Attributes:
        name: The parameter's name in the model.
        parameter: (U, ...) for unit parameters.
        layer: The unit layer it belongs to.
        local_name: Its name in that layer.
        state: The optimiser's tensors: moments like the parameter, step counts (U,) or ().
        decays: Whether weight decay applies.
    """

    name: str
    parameter: nn.Parameter
    layer: UnitLayer | None
    local_name: str
    state: dict[str, Tensor]
    decays: bool

    def gradient(self) -> Tensor | None:
        """Gradient, or the block of active rows of it."""
        return self.parameter.grad if self.layer is None else self.layer.gradient(self.local_name)


class UnitOptimiser(ABC):
    """What the optimisers share: a slot per parameter, clipping, state.

    Args:
        model: A model with unit layers.
        weight_decay: Decay of matrices.
    """

    moments: ClassVar[tuple[str, ...]]  # state tensors shaped like the parameter
    counts_steps: ClassVar[bool] = False  # whether there is a step count per unit

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        owner = {
            id(parameter): (layer, name)
            for layer in unit_layers(model)
            for name, parameter in layer.unit_parameters().items()
        }
        self.slots: list[Slot] = []
        for name, parameter in model.named_parameters():
            layer, local_name = owner.get(id(parameter), (None, name))
            state = {moment: torch.zeros_like(parameter) for moment in self.moments}
            if self.counts_steps:  # float32 as torch's kernel wants them
                state["steps"] = torch.zeros(() if layer is None else layer.n_units, device=parameter.device)
            decays = parameter.dim() - (layer is not None) >= 2
            self.slots.append(Slot(name, parameter, layer, local_name, state, decays))

    @abstractmethod
    def step(self, lr: float | Tensor) -> None:
        """Update every parameter that has a gradient, in its active units.

        Args:
            lr: Learning rate; a scalar tensor on the device for a CUDA graph, which would keep a number for good.
        """

    @abstractmethod
    def direction(self, slot: Slot, rows: Tensor) -> Tensor:
        """What the last update of some units moved along, per unit of learning rate, weight decay left out."""

    def gradients(self) -> list[Tensor]:
        """All gradients there are; of gated parameters the active rows."""
        return [g for g in (slot.gradient() for slot in self.slots) if g is not None]

    def clip(self, largest_norm: float | None) -> Tensor:
        """Scale the gradients (of active units and the rest) down to a norm, as ``clip_grad_norm_`` does.

        Args:
            largest_norm: Bound on the norm; None for no bound.

        Returns:
            The norm before, a scalar tensor.
        """
        gradients = self.gradients()
        norm = nn.utils.get_total_norm(gradients)
        if largest_norm is not None:
            torch._foreach_mul_(gradients, (largest_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear(self) -> None:
        """Forget all gradients."""
        for slot in self.slots:
            slot.parameter.grad = None
        for layer in {id(s.layer): s.layer for s in self.slots if s.layer is not None}.values():
            layer.clear_gradient()

    @torch.no_grad()
    def drift(self, layers: Sequence[UnitLayer], lr: float | Tensor) -> None:
        """Let frozen units repeat the direction of their last update at the present learning rate (multirate).

        The state stands since the unit's last gradient. A unit that has had none does not move.

        Args:
            layers: Layers whose frozen units drift.
            lr: Learning rate, as in :meth:`step`.
        """
        drifting = set(map(id, layers))
        for slot in self.slots:
            if slot.layer is None or id(slot.layer) not in drifting or slot.layer.n_active == slot.layer.n_units:
                continue
            rows = slot.layer.frozen_index(slot.parameter.device)
            moved = slot.parameter.detach()[rows]
            direction = self.direction(slot, rows)
            if slot.decays:
                moved.mul_(self._drift_decay(slot, rows, lr))
            _descend([moved], [direction], lr)
            slot.parameter.detach().index_copy_(0, rows, moved)

    def _drift_decay(self, slot: Slot, rows: Tensor, lr: float | Tensor) -> Tensor | float:
        """Factor by which decoupled weight decay shrinks drifting units."""
        return 1.0

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """State by parameter name."""
        return {slot.name: slot.state for slot in self.slots}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for slot in self.slots:
            for key, value in saved[slot.name].items():
                slot.state[key].copy_(value)


class UnitAdamW(UnitOptimiser):
    """AdamW with a step count per unit: torch's own kernel updates every unit's rows as a parameter of their own.

    Args:
        model: The model.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay of matrices.
    """

    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(model, weight_decay)
        self.betas, self.eps = betas, eps
        self._views: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        """See :meth:`UnitOptimiser.step`."""
        for decays in (True, False):
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            for slot in self.slots:
                gradient = slot.gradient()
                if gradient is None or slot.decays != decays:
                    continue
                tensors = (slot.parameter.detach(), *slot.state.values())
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

    def direction(self, slot: Slot, rows: Tensor) -> Tensor:
        """``m / (sqrt(v) + eps)`` with bias correction."""
        steps = slot.state["steps"][rows].clamp_min(1).view(-1, *[1] * (slot.parameter.dim() - 1))
        numerator = slot.state["exp_avg"][rows] / (1 - self.betas[0] ** steps)
        return numerator.div_((slot.state["exp_avg_sq"][rows] / (1 - self.betas[1] ** steps)).sqrt_().add_(self.eps))

    def _drift_decay(self, slot: Slot, rows: Tensor, lr: float | Tensor) -> Tensor:
        trained = slot.state["steps"][rows].view(-1, *[1] * (slot.parameter.dim() - 1)) > 0
        return torch.where(trained, 1 - lr * self.weight_decay, 1.0)

    def _unbind(self, slot: Slot, part: int, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of a tensor's units; made once, as storage never moves."""
        views = self._views.get((slot.name, part))
        if views is None or views[0].data_ptr() != tensor.data_ptr():
            views = self._views[slot.name, part] = tensor.unbind(0)
        return views


class UnitSGD(UnitOptimiser):
    """Stochastic gradient descent with momentum; decay is part of the gradient, as in torch.

    Args:
        model: The model.
        momentum: Decay rate of the momentum.
        weight_decay: Decay of matrices.
    """

    moments = ("momentum",)

    def __init__(self, model: nn.Module, momentum: float, weight_decay: float) -> None:
        super().__init__(model, weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        """See :meth:`UnitOptimiser.step`."""
        trained = [(slot, g) for slot in self.slots if (g := slot.gradient()) is not None]
        if not trained:
            return
        rows = [_active_rows(slot) for slot, _ in trained]
        parameters = [slot.parameter.detach() for slot, _ in trained]
        momenta = [slot.state["momentum"] for slot, _ in trained]
        moved, moving = (
            [t if r is None else t[r] for t, r in zip(tensors, rows, strict=True)] for tensors in (parameters, momenta)
        )
        gradients = [
            gradient.add(parameter, alpha=self.weight_decay) if slot.decays else gradient
            for (slot, gradient), parameter in zip(trained, moved, strict=True)
        ]
        torch._foreach_mul_(moving, self.momentum)
        torch._foreach_add_(moving, gradients)
        _descend(moved, moving, lr)
        for tensors, parts in ((parameters, moved), (momenta, moving)):
            for tensor, part, r in zip(tensors, parts, rows, strict=True):
                if r is not None:
                    tensor.index_copy_(0, r, part)

    def direction(self, slot: Slot, rows: Tensor) -> Tensor:
        """The momentum, which holds the decay."""
        return slot.state["momentum"][rows]


def _active_rows(slot: Slot) -> Tensor | None:
    """Numbers of the rows that a gradient is for; None for all."""
    if slot.layer is None or slot.layer.n_active == slot.layer.n_units:
        return None
    return slot.layer.active_index(slot.parameter.device)


def _descend(tensors: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """Move tensors against their directions, times the learning rate."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(tensors, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(tensors, directions, alpha=-lr)


def build_optimiser(model: nn.Module, train: TrainConfig) -> UnitOptimiser:
    """The optimiser that a recipe names."""
    if train.optimiser == "sgd":
        return UnitSGD(model, train.momentum, train.weight_decay)
    return UnitAdamW(model, (train.betas[0], train.betas[1]), train.eps, train.weight_decay)
