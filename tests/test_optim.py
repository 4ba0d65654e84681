"""SGD over units, against torch.optim and against units that are optimised alone (AdamW: test_units.py)."""

import copy

import numpy as np
import torch

from mat.suite.optim import UnitSGD
from mat.suite.units import unit_layers
from tests.test_units import ACTIVE, MATRICES, set_gates
from tests.tiny import tiny_batch, tiny_bert

MOMENTUM, DECAY, LR = 0.9, 0.05, 0.02


def test_all_units_active_equals_torch_bitwise() -> None:
    model = tiny_bert()
    twin = copy.deepcopy(model)
    optimiser = UnitSGD(model, MOMENTUM, DECAY)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if (n.split(".")[-1] in MATRICES) == decays],
         "weight_decay": DECAY * decays} for decays in (True, False)
    ]  # fmt: skip
    reference = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, foreach=False)
    for step in range(20):
        batch = tiny_batch(seed=step)
        optimiser.clear()
        model.loss(batch).backward()
        optimiser.step(LR)
        reference.zero_grad()
        twin.loss(batch).backward()
        reference.step()
    differing = [n for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True) if not p.equal(q)]
    assert not differing


def test_frozen_units_stay_and_thaw_as_if_they_had_skipped_the_steps() -> None:
    """Gradients are random; each unit's reference is torch's SGD over that unit alone, on its active steps alone."""
    model = tiny_bert()
    optimiser = UnitSGD(model, MOMENTUM, DECAY)
    random, chooser = torch.Generator().manual_seed(0), np.random.default_rng(0)
    lone = {
        (slot.name, u): torch.nn.Parameter(slot.parameter[u].detach().clone())
        for slot in optimiser.slots if slot.layer is not None for u in range(slot.layer.n_units)
    }  # fmt: skip
    decays = {slot.name: DECAY * slot.decays for slot in optimiser.slots}
    references = {k: torch.optim.SGD([p], LR, MOMENTUM, weight_decay=decays[k[0]]) for k, p in lone.items()}
    for _ in range(12):
        for layer in unit_layers(model):
            layer.set_active(chooser.random(layer.n_units) < 0.5, "cut")
        before = {s.name: (s.parameter.detach().clone(), s.state["momentum"].clone()) for s in optimiser.slots}
        optimiser.clear()
        model.loss(tiny_batch()).backward()
        for slot in optimiser.slots:
            gradient = slot.gradient()
            if slot.layer is None or gradient is None:
                continue
            gradient.copy_(torch.randn(gradient.shape, generator=random, dtype=gradient.dtype))
            for row, u in enumerate(np.flatnonzero(slot.layer.active)):
                lone[slot.name, u].grad = gradient[row].clone()
                references[slot.name, u].step()
        optimiser.step(LR)
        for slot in optimiser.slots:
            if slot.layer is not None:
                frozen = torch.from_numpy(~slot.layer.active)
                assert torch.equal(slot.parameter[frozen], before[slot.name][0][frozen])
                assert torch.equal(slot.state["momentum"][frozen], before[slot.name][1][frozen])
        for (name, u), parameter in lone.items():
            assert torch.equal(model.get_parameter(name)[u], parameter)


def test_no_bound_leaves_the_gradients_alone() -> None:
    model = tiny_bert()
    optimiser = UnitSGD(model, MOMENTUM, DECAY)
    model.loss(tiny_batch()).backward()
    before = [g.clone() for g in optimiser.gradients()]
    norm = optimiser.clip(None)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in before]).norm(), rtol=1e-14, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, optimiser.gradients(), strict=True))


def test_drift_repeats_the_momentum() -> None:
    model = tiny_bert()
    optimiser = UnitSGD(model, MOMENTUM, DECAY)
    model.loss(tiny_batch()).backward()
    optimiser.step(LR)
    set_gates(model, ACTIVE["none"])
    before = {s.name: s.parameter.detach().clone() for s in optimiser.slots}
    optimiser.drift(unit_layers(model), 0.5)
    for slot in optimiser.slots:
        moved = -0.5 * slot.state["momentum"] if slot.layer is not None else torch.zeros(())
        torch.testing.assert_close(slot.parameter.detach(), before[slot.name] + moved, rtol=1e-14, atol=0)
