"""Optimisers that do not know units, kept honest by hooks around their step."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import mat
from mat.gates import Gates


def lion(parameters: Any) -> Optimizer:
    made: Optimizer = pytest.importorskip("lion_pytorch").Lion(
        parameters, lr=0.01, weight_decay=0.1
    )
    return made


OPTIMISERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Lion": lion,
}
ACTIVE = np.array([True, False, False, False, True, False])


def attached(guard: Callable[[Any], Optimizer], early: bool = False) -> tuple[Gates, Optimizer]:
    """Gates of a small network, and an optimiser made before or after attaching."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model.double()
    optimiser = guard(model.parameters()) if early else None
    gates = mat.attach_(model, mat.MATConfig(groups=3, mode="exact", log=False))
    optimiser = optimiser or guard(model.parameters())
    gates.guard(optimiser)
    gates.guard(optimiser)  # once more changes nothing
    return gates, optimiser


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
    loss: Tensor = (model(x) - 1).square().mean()
    return loss


def train(gates: Gates, optimiser: Optimizer, steps: range) -> None:
    for step in steps:
        optimiser.zero_grad()
        loss_of(gates.model, step).backward()
        optimiser.step()
    optimiser.zero_grad()


def frozen_values(gates: Gates, optimiser: Optimizer) -> list[Tensor]:
    """Every frozen slice of a parameter, and of its state."""
    values = []
    for part in gates.parts():
        assert isinstance(part.frozen, slice | Tensor)
        tensors = [part.parameter, *optimiser.state[part.parameter].values()]
        values += [
            t[part.frozen].detach().clone() for t in tensors if t.shape == part.parameter.shape
        ]
    return values


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_fifty_frozen_steps_change_no_bit(name: str, early: bool) -> None:
    gates, optimiser = attached(OPTIMISERS[name], early)
    train(gates, optimiser, range(3))
    gates.set_active(ACTIVE)
    frozen, whole = frozen_values(gates, optimiser), [p.clone() for p in gates.model.parameters()]
    train(gates, optimiser, range(3, 53))
    after = frozen_values(gates, optimiser)
    assert len(after) >= 2 * len(list(gates.parts()))
    assert all(torch.equal(a, b) for a, b in zip(after, frozen, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gates.model.parameters(), whole, strict=True))


def test_state_made_while_frozen_is_zero_there() -> None:
    gates, optimiser = attached(OPTIMISERS["SGD"])
    gates.set_active(ACTIVE)
    train(gates, optimiser, range(1))
    momentum = optimiser.state[gates.model[0].weight]["momentum_buffer"]
    assert not momentum[2:].any() and momentum[:2].any()


def skipping(name: str, counts_every_step: bool) -> tuple[Tensor, Tensor]:
    """A unit's weight after freezing and thawing, and by hand with the frozen steps left out."""
    gates, optimiser = attached(OPTIMISERS[name])
    weight = gates.model[0].weight
    train(gates, optimiser, range(2))
    row, state = weight[2].detach().clone(), optimiser.state[weight]
    kept = {key: value[2].clone() for key, value in state.items() if value.dim()}
    gates.set_active(ACTIVE)
    train(gates, optimiser, range(2, 7))
    gates.set_active(np.ones(6, bool))
    loss_of(gates.model, 7).backward()
    g = weight.grad[2].clone()  # type: ignore[index]
    optimiser.step()
    if name == "SGD":
        return weight[2], row - 0.01 * (0.9 * kept["momentum_buffer"] + g + 0.1 * row)
    steps = 8 if counts_every_step else 3
    m = 0.9 * kept["exp_avg"] + 0.1 * g
    v = 0.999 * kept["exp_avg_sq"] + 0.001 * g * g
    move = (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
    return weight[2], row * (1 - 0.01 * 0.1) - 0.01 * move


def test_thawed_unit_of_sgd_goes_on_where_it_stopped() -> None:
    found, wanted = skipping("SGD", counts_every_step=True)
    assert torch.allclose(found, wanted, rtol=1e-13)


def test_thawed_unit_of_adamw_has_the_tensors_step_count() -> None:
    found, wanted = skipping("AdamW", counts_every_step=True)
    assert torch.allclose(found, wanted, rtol=1e-12)
    found, wanted = skipping("AdamW", counts_every_step=False)
    assert not torch.allclose(found, wanted, rtol=1e-3)  # mat.AdamW counts per unit


def test_scheduler_scaler_and_clipping_work_as_ever() -> None:
    gates, optimiser = attached(OPTIMISERS["AdamW"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(gates, optimiser, range(1))
    gates.set_active(ACTIVE)
    frozen = frozen_values(gates, optimiser)
    for step in range(3):
        scaler.scale(loss_of(gates.model, step)).backward()
        scaler.unscale_(optimiser)
        grads = [p.grad for p in gates.model.parameters()]
        own = torch.stack([g.norm() for g in grads if g is not None]).norm()
        clipped = torch.nn.utils.clip_grad_norm_(gates.model.parameters(), 0.01)
        assert torch.allclose(clipped, own) and own > 0.01
        scaler.step(optimiser)
        scaler.update()
        schedule.step()
        optimiser.zero_grad()
    assert optimiser.param_groups[0]["lr"] < 0.01
    assert all(
        torch.equal(a, b) for a, b in zip(frozen_values(gates, optimiser), frozen, strict=True)
    )


def test_restored_optimiser_stays_guarded() -> None:
    gates, optimiser = attached(OPTIMISERS["AdamW"])
    train(gates, optimiser, range(2))
    gates.set_active(ACTIVE)
    optimiser.load_state_dict(optimiser.state_dict())
    frozen = frozen_values(gates, optimiser)
    train(gates, optimiser, range(2, 5))
    assert all(
        torch.equal(a, b) for a, b in zip(frozen_values(gates, optimiser), frozen, strict=True)
    )


def test_optimisers_that_know_units_are_left_alone() -> None:
    _, optimiser = attached(mat.AdamW)
    assert not optimiser._optimizer_step_pre_hooks


def test_detached_model_trains_whole_again() -> None:
    gates, optimiser = attached(OPTIMISERS["SGD"])
    gates.set_active(np.zeros(6, bool))
    mat.detach_(gates.model)
    before = gates.model[0].weight.clone()
    train(gates, optimiser, range(1))
    assert not (gates.model[0].weight == before).all(1).any()


class Rebinding(SGD):
    """Puts a new tensor in the place of its state at every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["sum"] = parameter.grad + state.get("sum", 0) + 1
            parameter.sub_(state["sum"], alpha=0.01)


OTHERS = {"rebinding": Rebinding, "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01)}


@pytest.mark.filterwarnings("ignore:the optimiser's state")
@pytest.mark.parametrize("name", OTHERS)
def test_state_that_is_rebound_or_by_row_stays(name: str) -> None:
    gates, optimiser = attached(OTHERS[name])
    train(gates, optimiser, range(2))
    gates.set_active(ACTIVE)

    def frozen() -> list[Tensor]:
        pairs = ((p, optimiser.state[p.parameter]) for p in gates.parts())
        return [
            value[part.frozen].clone()
            for part, state in pairs
            for value in (part.parameter.detach(), *state.values())
            if value.dim() and len(value) == len(part.parameter)
        ]

    before = frozen()
    train(gates, optimiser, range(2, 4))
    assert len(before) == 8 and all(map(torch.equal, frozen(), before))


def test_state_of_no_unit_is_named_once() -> None:
    gates, optimiser = attached(OTHERS["Adafactor"])
    gates.set_active(ACTIVE)
    with pytest.warns(UserWarning, match="'col_var' is not kept by unit") as said:
        train(gates, optimiser, range(3))
    assert len(said) == 1


def test_optimisers_of_other_parameters_are_refused() -> None:
    gates, _ = attached(OPTIMISERS["SGD"])
    with pytest.raises(ValueError, match="optimiser has none of the units' parameters"):
        gates.guard(SGD(nn.Linear(2, 2).parameters()))
    gates.model[0].weight = nn.Parameter(gates.model[0].weight.detach())  # as FSDP does
    with pytest.raises(ValueError, match=r"0.weight was replaced .* FSDP is not supported"):
        gates.guard(SGD(gates.model.parameters()))


def test_guarding_ends_blocks_of_an_earlier_optimiser() -> None:
    gates, earlier = attached(lambda p: mat.AdamW(p, compact=True))
    gates.set_active(ACTIVE)
    earlier.zero_grad()
    loss_of(gates.model, 0).backward()
    optimiser = SGD(gates.model.parameters(), lr=0.1)
    gates.guard(optimiser)
    before = gates.model[0].weight.clone()
    train(gates, optimiser, range(1))
    assert (gates.model[0].weight != before).any(1).tolist() == [True, True] + [False] * 4


def test_optimisers_wrapped_by_accelerate_are_guarded() -> None:
    gates, _ = attached(OPTIMISERS["AdamW"])
    other = AdamW(gates.model.parameters())
    wrapped: Any = SimpleNamespace(optimizer=other)
    gates.guard(wrapped)
    assert other._optimizer_step_pre_hooks
