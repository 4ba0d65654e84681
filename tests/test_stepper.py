"""What a stepper captures and replays, with graphs that a CPU can play: a replay runs the step again."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_bert

from mat.suite.optim import UnitAdamW, UnitOptimiser, UnitSGD
from mat.suite.stepper import GRAPHS, Outcome, Stepper
from mat.suite.units import unit_layers


class Played:
    """Stands for a captured graph."""

    def __init__(self, stepper: Stepper, batch: Any) -> None:
        self.stepper, self.calls = stepper, list[int]()

    def replay(self, batch: Any) -> Outcome:
        self.calls.append(batch.samples)
        return self.stepper._compute(batch, self.stepper._lr)


@pytest.fixture
def stepper(monkeypatch: pytest.MonkeyPatch) -> Stepper:
    monkeypatch.setattr(Stepper, "_capture", lambda self, batch: Played(self, batch))
    model = tiny_bert()
    return Stepper(model, UnitAdamW(model, (0.9, 0.98), 1e-6, 0.01), torch.enable_grad, 1.0, graphs=True)


def gate(stepper: Stepper, active: int) -> None:
    """The first so many units of every layer."""
    for layer in unit_layers(stepper.model):
        layer.set_active(np.arange(layer.n_units) < active)


def test_the_first_step_is_launched_the_second_captured_and_the_others_replayed(stepper: Stepper) -> None:
    key = stepper.key(tiny_batch())
    stepper.step(tiny_batch(), 0.1)
    assert stepper._graphs == {key: None}
    for _ in range(3):
        stepper.step(tiny_batch(), 0.1)
    assert stepper._graphs[key].calls == [4, 4, 4]  # type: ignore[union-attr]


def test_gates_modes_and_shapes_have_graphs_of_their_own_and_the_oldest_go(stepper: Stepper) -> None:
    keys = []
    for active, samples in ((3, 4), (3, 2), (1, 4), (1, 2), (2, 4)):
        gate(stepper, active)
        keys.append(stepper.key(tiny_batch(samples=samples)))
        for _ in range(2):
            stepper.step(tiny_batch(samples=samples), 0.1)
    assert len(set(keys)) == 5 and list(stepper._graphs) == keys[-GRAPHS:]
    unit_layers(stepper.model)[0].set_active(np.arange(3) < 2, "exact")
    assert stepper.key(tiny_batch()) not in stepper._graphs


def test_a_watched_step_is_launched(stepper: Stepper) -> None:
    for _ in range(3):
        stepper.step(tiny_batch(), 0.1, capture=False)
    assert not stepper._graphs


def test_a_capture_leaves_no_gathered_rows_behind() -> None:
    """The next step launched by itself must gather anew: replays do not raise version counters."""
    model = tiny_bert()
    optimiser = UnitAdamW(model, (0.9, 0.98), 1e-6, 0.01)
    layer = unit_layers(model)[0]
    layer.set_active(np.array([True, False, False]))
    model.loss(tiny_batch()).backward()
    rows = [block.rows for block in layer._blocks.values()]
    optimiser.clear()
    assert all(r.grad is None for r in rows)
    index = layer.after_capture()
    assert not layer._blocks and [i.tolist() for i in index] == [[0], [1, 2]]


@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize("optimiser", [UnitSGD, UnitAdamW])
def test_a_learning_rate_on_the_device_is_the_same_one(optimiser: type[UnitOptimiser], active: int) -> None:
    """Updates and the drift of frozen units; float32 is what the tensor has."""
    results = []
    for lr in (0.125, torch.tensor(0.125)):
        model = tiny_bert()
        arguments = (0.9, 0.01) if optimiser is UnitSGD else ((0.9, 0.98), 1e-6, 0.01)
        made = optimiser(model, *arguments)  # type: ignore[arg-type]
        for step in range(3):
            for layer in unit_layers(model):
                layer.set_active(np.arange(layer.n_units) < (active if step else 3))
            made.clear()
            model.loss(tiny_batch(seed=step)).backward()
            made.step(lr)
            made.drift(unit_layers(model), lr)
        results.append([p.detach().clone() for p in model.parameters()])
    for number, tensor in zip(*results, strict=True):
        torch.testing.assert_close(tensor, number, rtol=1e-10, atol=1e-12)


def test_nothing_to_train_is_no_step() -> None:
    for optimiser in (UnitSGD(tiny_bert(), 0.9, 0.01), UnitAdamW(tiny_bert(), (0.9, 0.98), 1e-6, 0.01)):
        optimiser.step(0.1)
