"""Gates on the suite's layer of experts, whose forward always computes all slots."""

from unittest import mock

import numpy as np
import pytest
import torch
from small_models import randomised
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mat
from mat.suite import gating
from mat.suite.config import SwitchConfig
from mat.suite.models import switch
from mat.suite.models.switch import Experts

WIDTH, HIDDEN, EXPERTS = 6, 8, 4
SETS = {
    "one": [0, 0, 1, 0],
    "two apart": [1, 0, 1, 0],
    "three": [0, 1, 1, 1],
    "none": [0, 0, 0, 0],
    "all": [1, 1, 1, 1],
}


def layer_of(factor: float) -> tuple[Experts, Tensor, Tensor]:
    """A layer in training mode, tokens (B, T, D), and a gradient of its output."""
    config = SwitchConfig(
        name="one", layers=1, width=WIDTH, heads=1, ffn_hidden=HIDDEN, ffn_groups=1,
        positions="rotary", norm="pre", experts=EXPERTS, capacity_factor=factor,
    )  # fmt: skip
    layer = randomised(Experts(config), 0).double()
    with torch.no_grad():
        layer.router.weight *= 3
    x, g = torch.randn(
        2, 3, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return layer, x.requires_grad_(), g


def gradients(layer: Experts, x: Tensor, g: Tensor) -> dict[str, Tensor | None]:
    """Of the input and of all parameters, and the output."""
    y = layer(x)
    y.backward(g)
    found = {name: p.grad for name, p in layer.named_parameters()}
    found |= {"input": x.grad, "output": y.detach()}
    x.grad = None
    layer.zero_grad()
    return found


def attach(layer: Experts, active: list[int], mode: str) -> mat.Gates:
    assert gating.experts in mat.adapters.find.FINDERS
    gates = mat.attach_(layer, mat.MATConfig(share=0.5, mode=mode))  # type: ignore[arg-type]
    gates.set_active(np.array(active, bool))
    return gates


@pytest.mark.parametrize("factor", [0.5, 4.0])
@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_gradients_equal_the_dense_layers(mode: str, chosen: str, factor: float) -> None:
    """In ``cut`` with the outputs of frozen experts detached; tokens are dropped at 0.5."""
    layer, x, g = layer_of(factor)
    keep = torch.tensor(SETS[chosen], dtype=torch.bool)[:, None, None]
    if mode == "cut":
        dense = layer.core
        layer.core = lambda rows: torch.where(keep, y := dense(rows), y.detach())  # type: ignore
    wanted = gradients(layer, x, g)
    layer.__dict__.pop("core", None)
    attach(layer, SETS[chosen], mode)
    found = gradients(layer, x, g)
    for name in gating.STACKED:
        wanted[name][~keep[:, 0, 0]] = 0  # type: ignore[index]
    for name, value in wanted.items():
        if chosen == "all":
            assert torch.equal(found[name], value), name  # type: ignore[arg-type]
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_experts_by_number_equal_slices(mode: str) -> None:
    """A GPU computes all active experts at once, by their numbers."""
    layer, x, g = layer_of(1.0)
    attach(layer, SETS["two apart"], mode)
    wanted = gradients(layer, x, g)

    def numbers(experts: Tensor, count: int, most: int) -> list[Tensor]:
        return [experts]

    with mock.patch.object(switch, "_runs", numbers):
        found = gradients(layer, x, g)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=name)


def test_compact_gradients_are_blocks() -> None:
    chosen = "two apart"
    layer, x, g = layer_of(1.0)
    gates = attach(layer, SETS[chosen], "cut")
    wanted = gradients(layer, x, g)
    for part in gates.parts():
        part.compact = True
    layer(x).backward(g)
    for part in gates.parts():
        block = part.gradient()
        rows = torch.tensor(SETS[chosen], dtype=torch.bool)
        assert part.parameter.grad is None and block is not None
        assert torch.equal(block, wanted[part.part.parameter][rows])  # type: ignore[index]


def test_without_active_experts_there_are_no_compact_gradients() -> None:
    layer, x, g = layer_of(1.0)
    for part in attach(layer, SETS["none"], "cut").parts():
        part.compact = True
    layer(x).backward(g)
    assert all(layer.get_parameter(n).grad is None for n in gating.STACKED)
    assert all(part.gradient() is None for part in layer._gates.parts())  # type: ignore
    assert layer.router.weight.grad is not None


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_all_slots_run_forward_and_those_of_active_experts_back(mode: str) -> None:
    layer, x, g = layer_of(1.0)
    attach(layer, SETS["two apart"], mode)
    slots = layer.capacity(21)
    rows, router = 2 * slots * 2 * WIDTH * HIDDEN, 2 * 21 * EXPERTS * WIDTH
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert forward.get_total_flops() == EXPERTS * rows + router
    with FlopCounterMode(display=False) as backward:
        y.backward(g)
    inputs = 2 if mode == "cut" else EXPERTS
    assert backward.get_total_flops() == (inputs + 2) * rows + 2 * router


def test_what_the_estimator_records_drops_no_token() -> None:
    layer, x, g = layer_of(0.5)
    wanted = gradients(layer.eval(), x, g)
    products = []

    def record(weight, bias, unit, rows, y, token):  # type: ignore[no-untyped-def]
        products.append((weight, bias, unit, rows, y))
        return y

    layer, x, g = layer_of(0.5)
    y = gating.record_experts(layer, record, x)
    torch.testing.assert_close(y, wanted["output"])
    found = torch.autograd.grad(y, [product[-1] for product in products], g.view_as(y))
    totals = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for (weight, bias, unit, rows, _), d in zip(products, found, strict=True):
        totals[weight][unit] += d.T @ rows
        totals[bias][unit] += d.sum(0)
    for name in gating.STACKED:
        torch.testing.assert_close(totals[name], wanted[name])
