"""AdamW and SGD that know units (paper section 5, "Frozen unit"): what is frozen costs nothing.

A frozen unit is not handed over: no gradient, no momentum, no decay, parameters and state stay
bit-identical until it trains again, when its update equals that of a unit that skipped those steps.
They work on any model, attached before or after they are made, or not at all.

With ``compact=True`` gradients of gated parameters are blocks of their active rows and no full-size
gradient is made. ``p.grad`` of a gated parameter is then None: clip with
:meth:`UnitOptimiser.clip_grad_norm_`, since torch's function (and a GradScaler) would not see them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mat.layers.gate import GatedPart, Index, put, take

Given = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class UnitOptimiser(torch.optim.Optimizer):
    """What both share: gradients by part, clipping, and drifting (multirate).

    Args:
        params: Parameters or groups of them, as for any torch optimiser.
        defaults: Options of the groups.
        compact: Gradients of gated parameters are blocks, see the module's docstring.
    """

    def __init__(self, params: Given, defaults: dict[str, Any], compact: bool = False) -> None:
        self.compact = compact
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle."""
        return {**super().__getstate__(), "compact": self.compact}

    def parts(self) -> Iterable[tuple[dict[str, Any], nn.Parameter, GatedPart | None]]:
        """Every parameter with its group, and what a gate has of it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                part: GatedPart | None = getattr(parameter, "_gated", None)
                if part is not None:
                    part.compact = self.compact
                yield group, parameter, part

    def gradients(self) -> list[Tensor]:
        """All gradients there are; of gated parameters those of the active rows."""
        every = (p.grad if part is None else part.gradient() for _, p, part in self.parts())
        return [gradient for gradient in every if gradient is not None]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale the gradients of active units and the rest down to a norm.

        Args:
            max_norm: Bound on their norm; None for no bound.

        Returns:
            The norm before, a scalar tensor.
        """
        gradients = self.gradients()
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            stored = [g for _, p, part in self.parts() if (g := _stored(p, part)) is not None]
            torch._foreach_mul_(stored, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, blocks included."""
        super().zero_grad(set_to_none)
        for _, _, part in self.parts():
            if part is not None:
                part.clear()

    @torch.no_grad()
    def drift(self) -> None:
        """Let frozen units repeat their last update's direction at the present rate (multirate).

        Vlaar and Leimkuhler (ICML 2022, algorithm 1). A unit that never trained does not move.
        """
        for group, parameter, part in self.parts():
            if part is None or part.whole or not self.state[parameter]:
                continue
            moved = take(parameter, part.frozen, part.dim).clone()
            self._drift(moved, group, self.state[parameter], part)
            put(parameter, part.frozen, part.dim, moved)

    def _note_use(self) -> None:
        """Blocks are not to be added to after a step."""
        for _, _, part in self.parts():
            if part is not None:
                part.used = part.block is not None

    def _drift(
        self, moved: Tensor, group: dict[str, Any], state: dict[str, Tensor], part: GatedPart
    ) -> None:
        raise NotImplementedError


def _stored(parameter: nn.Parameter, part: GatedPart | None) -> Tensor | None:
    """The tensor that a parameter's gradient is stored in."""
    if part is not None and part.block is not None:
        return part.block
    return parameter.grad


@dataclass
class _Rows:
    """A parameter and its state as the kernel takes them: whole, or by run of active rows."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class AdamW(UnitOptimiser):
    """AdamW with a step count per unit: torch's fused kernel updates every run of active rows.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate; a scalar tensor for a CUDA graph.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        compact: See the module's docstring.
    """

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        compact: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "fused": True,
        }
        super().__init__(params, defaults, compact)
        self._views: dict[int, tuple[tuple[int, ...], _Rows]] = {}
        self._even: dict[int, tuple[tuple[int, ...], bool]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._views, self._even = {}, {}  # those of other parameters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update everything that has a gradient, in its active rows."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        afterwards: list[Callable[[], object]] = []
        lists: dict[int, _Rows] = {}
        for group, parameter, part in self.parts():
            gradient = parameter.grad if part is None else part.gradient()
            if gradient is None or (part is not None and part.count == 0):
                continue
            rows = self._rows(parameter, part, gradient, afterwards, group["lr"])
            into = lists.setdefault(id(group), _Rows([], [], [], [], []))
            for name, values in vars(rows).items():
                getattr(into, name).extend(values)
        for group in self.param_groups:
            if id(group) in lists:
                rows = lists[id(group)]
                adamw(
                    rows.parameters, rows.gradients, rows.exp_avgs, rows.exp_avg_sqs, [],
                    rows.steps, fused=True, amsgrad=False, beta1=group["betas"][0],
                    beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                    weight_decay=group["weight_decay"], maximize=False,
                )  # fmt: skip
        for finish in afterwards:
            finish()
        self._note_use()
        for _, kept in self._views.values():
            kept.gradients = []  # their memory is the next step's
        return loss

    def _state(self, parameter: nn.Parameter, part: GatedPart | None) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            shape = () if part is None else (len(part.runs),)
            state["step"] = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        elif part is not None and state["step"].shape != (len(part.runs),):
            # Attached after some steps, or divided otherwise before.
            state["step"] = state["step"].max().expand(len(part.runs)).clone()
        elif part is None and state["step"].dim():  # detached
            state["step"] = state["step"].max()
        return state

    def _rows(
        self,
        parameter: nn.Parameter,
        part: GatedPart | None,
        gradient: Tensor,
        afterwards: list[Callable[[], object]],
        lr: float | Tensor,
    ) -> _Rows:
        """What the kernel updates of a parameter; ``afterwards`` writes gathered rows back."""
        state = self._state(parameter, part)
        moments = state["exp_avg"], state["exp_avg_sq"]
        tensors = parameter.detach(), *moments
        if part is None:
            gradient = _laid_out(gradient, parameter)
            return _Rows(*([t] for t in (tensors[0], gradient, *moments, state["step"])))
        step = state["step"]
        # Not in a CUDA graph (the rate is a tensor), which may be replayed when counts differ.
        alike = all(moment.stride() == parameter.stride() for moment in moments)
        alike = alike and part.whole and not isinstance(lr, Tensor)
        if alike and self._is_even(parameter, part, step):
            gradient = _laid_out(gradient.transpose(0, part.dim), parameter)
            afterwards.append(lambda: step.copy_(step[0].clone()))
            return _Rows(*([t] for t in (tensors[0], gradient, *moments, step[0])))
        key = (part.gate.version, *(t.data_ptr() for t in (*tensors, step)))
        kept = self._views.get(id(parameter))
        if (kept is None or kept[0] != key) and part.dim == 0 and _rows_are_packed(tensors):
            views = [[t[a:b] for _, a, b in part.active_runs] for t in tensors]
            rows = _Rows(views[0], [], views[1], views[2], _steps(state["step"], part))
            kept = self._views[id(parameter)] = key, rows
        if kept is not None and kept[0] == key:
            runs = torch.split(gradient, part.run_lengths)
            kept[1].gradients = list(map(_laid_out, runs, kept[1].parameters))
            return kept[1]
        whole = [t.transpose(0, part.dim) for t in tensors]  # rows first
        blocks = [take(t, part.active, 0).contiguous() for t in whole]

        def finish() -> None:
            for target, block in zip(tensors, blocks, strict=True):
                put(target, part.active, part.dim, block.transpose(0, part.dim))

        afterwards.append(finish)
        split = [list(torch.split(t, part.run_lengths)) for t in (*blocks, gradient.contiguous())]
        return _Rows(split[0], split[3], split[1], split[2], _steps(state["step"], part))

    def _is_even(self, parameter: nn.Parameter, part: GatedPart, step: Tensor) -> bool:
        """Whether all runs took equally many steps; asked once while the active set stands."""
        key = part.gate.version, step.data_ptr()
        kept = self._even.get(id(parameter))
        if kept is None or kept[0] != key:
            kept = self._even[id(parameter)] = key, bool((step == step[0]).all())
        return kept[1]

    def _drift(
        self, moved: Tensor, group: dict[str, Any], state: dict[str, Tensor], part: GatedPart
    ) -> None:
        """Along ``m / (sqrt(v) + eps)`` with bias correction, decay included."""
        (b1, b2), lr, index, dim = group["betas"], group["lr"], part.frozen, part.dim
        steps = part.per_row(state["step"])  # one per row, along the divided axis
        steps = take(steps, index, 0).view([-1 if d == dim else 1 for d in range(moved.dim())])
        taken = steps.clamp_min(1)
        direction = take(state["exp_avg"], index, dim) / (1 - b1**taken)
        spread = take(state["exp_avg_sq"], index, dim) / (1 - b2**taken)
        direction = direction.div_(spread.sqrt_().add_(group["eps"]))
        if group["weight_decay"]:
            moved.mul_(torch.where(steps > 0, 1 - lr * group["weight_decay"], 1.0))
        moved.sub_(direction * lr)


def _rows_are_packed(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie alike in memory, every row in one piece: the kernel walks memory."""
    first = tensors[0]
    alike = all(t.stride() == first.stride() for t in tensors)
    return alike and first.stride(0) * len(first) == first.numel()


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient that lies in memory as what it updates."""
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


def _steps(step: Tensor, part: GatedPart) -> list[Tensor]:
    each = step.unbind(0)
    return [each[i] for i, _, _ in part.active_runs]


class SGD(UnitOptimiser):
    """Stochastic gradient descent with momentum; decay is part of the gradient, as in torch.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate; a scalar tensor for a CUDA graph.
        momentum: Decay rate of the momentum.
        weight_decay: Weight decay.
        compact: See the module's docstring.
    """

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        compact: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, compact
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update everything that has a gradient, in its active rows."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        self._note_use()
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        """A few list operations over all parameters of a group."""
        # Tensors, and where their active rows are.
        places: list[tuple[list[Tensor], Index, int]] = []
        lists: tuple[list[Tensor], ...] = ([], [], [])  # parameters, momenta, gradients
        for parameter in group["params"]:
            part: GatedPart | None = getattr(parameter, "_gated", None)
            gradient = parameter.grad if part is None else part.gradient()
            if gradient is None or (part is not None and part.count == 0):
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            index, dim = (None, 0) if part is None else (part.active, part.dim)
            tensors = [parameter.detach(), state["momentum_buffer"]]
            places.append((tensors, index, dim))
            if part is not None:
                gradient = gradient.transpose(0, dim)
            rows = (*(take(t, index, dim) for t in tensors), gradient)
            for target, tensor in zip(lists, rows, strict=True):
                target.append(tensor)
        parameters, momenta, gradients = lists
        if not parameters:
            return
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        descend(parameters, momenta, group["lr"])
        for i, (tensors, index, dim) in enumerate(places):
            if isinstance(index, Tensor):  # otherwise they were views
                put(tensors[0], index, dim, parameters[i])
                put(tensors[1], index, dim, momenta[i])

    def _drift(
        self, moved: Tensor, group: dict[str, Any], state: dict[str, Tensor], part: GatedPart
    ) -> None:
        """Along the momentum, which holds the decay."""
        descend([moved], [take(state["momentum_buffer"], part.frozen, part.dim)], group["lr"])


def descend(tensors: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """Move tensors against their directions, times the learning rate."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(tensors, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(tensors, directions, alpha=-lr)
