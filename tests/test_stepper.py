"""What a stepper captures and replays; here a replay runs the step again, as a CPU can."""

from typing import Any

import numpy as np
import pytest
import torch
from small_models import tiny_batch, tiny_bert
from torch import nn

import mat
import mat.suite.gating
from mat.optim import SGD, AdamW, UnitOptimiser
from mat.suite.stepper import GRAPHS, Outcome, Stepper


class Played:
    """Stands for a captured graph."""

    def __init__(self, stepper: Stepper, batch: Any) -> None:
        self.stepper, self.calls = stepper, list[int]()

    def replay(self, batch: Any) -> Outcome:
        self.calls.append(batch.samples)
        return self.stepper._compute(batch, self.stepper._lr)


def attached() -> tuple[Any, mat.Gates]:
    model = tiny_bert()
    units = mat.find_units(model, groups=3)
    return model, mat.attach_(model, mat.MATConfig(log=False), units)


@pytest.fixture
def stepper(monkeypatch: pytest.MonkeyPatch) -> Stepper:
    monkeypatch.setattr(Stepper, "_capture", lambda self, batch: Played(self, batch))
    model, gates = attached()
    optimiser = AdamW(model.parameters(), compact=True)
    return Stepper(model, gates, optimiser, torch.enable_grad, 1.0, graphs=True)


def first(gates: mat.Gates, count: int) -> np.ndarray:
    """The first so many units of every layer."""
    return gates.units.unit < count


def test_the_first_step_is_launched_the_second_captured(stepper: Stepper) -> None:
    key = stepper.key(tiny_batch())
    stepper.step(tiny_batch(), 0.1)
    assert stepper._graphs == {key: None}
    for _ in range(3):
        stepper.step(tiny_batch(), 0.1)
    assert stepper._graphs[key].calls == [4, 4, 4]  # type: ignore[union-attr]


def test_gates_and_shapes_have_graphs_and_the_oldest_go(stepper: Stepper) -> None:
    keys = []
    for active, samples in ((3, 4), (3, 2), (1, 4), (1, 2), (2, 4)):
        stepper.gates.set_active(first(stepper.gates, active))
        keys.append(stepper.key(tiny_batch(samples=samples)))
        for _ in range(2):
            stepper.step(tiny_batch(samples=samples), 0.1)
    assert len(set(keys)) == 5 and list(stepper._graphs) == keys[-GRAPHS:]


def test_a_watched_step_is_launched(stepper: Stepper) -> None:
    for _ in range(3):
        stepper.step(tiny_batch(), 0.1, capture=False)
    assert not stepper._graphs


def test_a_step_leaves_no_gradient_behind(stepper: Stepper) -> None:
    """So that the active set may change, and a replay starts from nothing."""
    stepper.gates.set_active(first(stepper.gates, 1))
    stepper.step(tiny_batch(), 0.1)
    assert not stepper.optimiser.gradients()


def test_accumulated_parts_are_the_same_step() -> None:
    results = []
    for parts in (1, 2, 3):
        model, gates = attached()
        gates.set_active(first(gates, 2))
        optimiser = SGD(model.parameters(), compact=True)
        made = Stepper(model, gates, optimiser, torch.enable_grad, 0.5, accumulation=parts)
        reading = made.step(tiny_batch(samples=5), 0.1).read()
        results.append((reading, [p.detach() for p in model.parameters()]))
    for reading, parameters in results[1:]:
        assert (reading.loss, reading.norm) == pytest.approx(
            (results[0][0].loss, results[0][0].norm), rel=1e-12
        )
        torch.testing.assert_close(parameters, results[0][1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize("rule", [SGD, AdamW])
def test_a_rate_on_the_device_is_the_same_one(rule: type[UnitOptimiser], active: int) -> None:
    """Updates and the drift of frozen units; float32 is what the tensor has."""
    results = []
    for lr in (0.125, torch.tensor(0.125)):
        model, gates = attached()
        optimiser = rule(model.parameters(), compact=True)  # type: ignore[call-arg,arg-type]
        for step in range(3):
            gates.set_active(first(gates, active if step else 3))
            model.loss(tiny_batch(seed=step)).backward()
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.drift()
            optimiser.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [SGD, AdamW])
def test_nothing_to_train_is_no_step(rule: type[UnitOptimiser]) -> None:
    model: nn.Module = tiny_bert()
    before = [p.detach().clone() for p in model.parameters()]
    rule(model.parameters(), compact=True).step()  # type: ignore[call-arg,arg-type]
    assert all(map(torch.equal, before, model.parameters()))
