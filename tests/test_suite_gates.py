"""Gates on the suite's models against dense references that detach what frozen units put out."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from gradients import attach, gated_gradients
from torch import Tensor

from mat.suite.config import TrainConfig
from mat.suite.models import build_optimiser
from mat.units import BoolArray, Units

MODELS: dict[str, Callable[..., Any]] = {
    "bert pre": lambda **o: small_models.tiny_bert(**o),
    "bert post": lambda **o: small_models.tiny_bert(norm="post", positions="learned", **o),
    "switch": lambda **o: small_models.tiny_switch(switch_every=2, **o),
    "vgg": lambda **o: small_models.tiny_vgg(**o),
}
SETS: dict[str, Callable[[Units], BoolArray]] = {
    "a third": lambda units: np.random.default_rng(0).random(len(units)) < 1 / 3,
    "first of each": lambda units: units.unit == 0,
    "upper layers": lambda units: units.layer >= units.layer.max() / 2,
    "lower layers": lambda units: units.layer < units.layer.max() / 2,
    "none": lambda units: np.zeros(len(units), bool),
}


def batch_for(name: str, **options: Any) -> Any:
    images = name == "vgg"
    return small_models.tiny_images(**options) if images else small_models.tiny_batch(**options)


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_dense_reference(name: str, which: str, mode: str) -> None:
    model, batch = MODELS[name](), batch_for(name)
    gates = attach(model, mode)
    gates.set_active(SETS[which](gates.units))
    wanted = gated_gradients(model, gates, batch)
    model.loss(batch).backward()
    for parameter_name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            found, wanted[parameter_name], rtol=1e-9, atol=1e-11, msg=parameter_name
        )


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["bert pre", "bert post"])
def test_autocast_gradients_stay_within_bfloat16(name: str, mode: str) -> None:
    """They are float32, and within 5 % of the float64 ones' norm: bf16 keeps 8 bits."""
    model, batch = MODELS[name](dtype=torch.float32), batch_for(name)
    gates = attach(model, mode)
    gates.set_active(SETS["a third"](gates.units))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
    loss.backward()
    exact = copy.deepcopy(model).double()
    wanted = gated_gradients(exact, exact._gates, batch)
    pairs = [(p.grad, wanted[n]) for n, p in model.named_parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 for g, _ in pairs)
    found, expected = (torch.cat([pair[i].double().flatten() for pair in pairs]) for i in (0, 1))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def steps(model: Any, optimiser: Any, name: str, count: int) -> None:
    for seed in range(count):
        loss, extra = model.loss(batch_for(name, seed=seed)), model.auxiliary_loss()
        (loss if extra is None else loss + extra).backward()
        optimiser.clip_grad_norm_(1.0)
        optimiser.step()
        optimiser.zero_grad()


def recipe(name: str) -> TrainConfig:
    rule = "sgd" if name == "vgg" else "adamw"
    return TrainConfig(optimiser=rule, lr=0.01, pflops=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_units_keep_every_bit_and_active_ones_move(name: str, mode: str) -> None:
    """Parameters and state of the optimiser, whatever was active before."""
    model = MODELS[name]().train()
    gates = attach(model, mode)
    optimiser = build_optimiser(model, recipe(name))

    def values() -> list[list[Tensor]]:
        """Parameter and moments of every gated part."""
        kept = [[p.parameter, *optimiser.state[p.parameter].values()] for p in gates.parts()]
        return [[t.detach().clone() for t in tensors if t.dim() > 1] for tensors in kept]

    for which in ("first of each", "a third", "lower layers", "none"):
        gates.set_active(np.ones(len(gates.units), bool))
        steps(model, optimiser, name, 1)
        gates.set_active(SETS[which](gates.units))
        before, rest = values(), copy.deepcopy(dict(model.named_parameters()))
        steps(model, optimiser, name, 3)
        for part, old, new in zip(gates.parts(), before, values(), strict=True):
            owner = torch.from_numpy(part.part.owner)
            rows = torch.from_numpy(part.gate.active)[owner]
            for a, b in zip(old, new, strict=True):
                changed = (a != b).transpose(0, part.dim).flatten(1).any(1)
                assert not changed[~rows].any(), part.part.parameter
        ungated = {id(part.parameter) for part in gates.parts()}
        moved = [not p.equal(rest[n]) for n, p in model.named_parameters() if id(p) not in ungated]
        assert any(moved)
        for part in gates.parts():
            if part.gate.kind in ("heads", "ffn") and part.parameter.dim() == 2 and part.dim == 0:
                old = rest[part.part.parameter]
                changed = (old != part.parameter).any(1)
                active = torch.from_numpy(part.gate.active)[torch.from_numpy(part.part.owner)]
                assert torch.equal(changed, active), part.part.parameter


@pytest.mark.parametrize("name", MODELS)
def test_all_units_active_train_as_torchs_optimiser_does(name: str) -> None:
    """Bitwise, over ten steps, with groups that decay and groups that do not."""
    model = MODELS[name]().train()
    twin = copy.deepcopy(model)
    attach(model)
    optimiser, train = build_optimiser(model, recipe(name)), recipe(name)
    matrices = {n for n, p in twin.named_parameters() if p.dim() >= 2 and not n.endswith("bias")}
    groups = [
        {"params": [p for n, p in twin.named_parameters() if (n in matrices) == decays],
         "weight_decay": train.weight_decay * decays} for decays in (True, False)
    ]  # fmt: skip
    torchs: Any
    if name == "vgg":
        torchs = torch.optim.SGD(groups, train.lr, train.momentum)
    else:
        betas = train.betas[0], train.betas[1]
        torchs = torch.optim.AdamW(groups, train.lr, betas, train.eps, fused=True)
    for seed in range(10):
        batch = batch_for(name, seed=seed)
        model.loss(batch).backward()
        optimiser.step()
        optimiser.zero_grad()
        twin.loss(batch).backward()
        torchs.step()
        torchs.zero_grad()
    for (parameter_name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), parameter_name
