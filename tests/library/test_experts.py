"""Experts as units in transformers' mixtures, against dense references in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mat

pytest.importorskip("transformers")
from mixtures import (
    ALL,
    EXPERTS,
    OldMixture,
    attach,
    build,
    clear_frozen,
    close,
    containers,
    cut_reference,
    detach_columns,
    gradients,
    routed,
    some,
)


@pytest.mark.parametrize("name", ALL)
def test_all_experts_active_is_the_model_bitwise(name: str) -> None:
    model, batch = build(name)
    loss, wanted = gradients(model, batch)
    attach(model, np.ones((2, EXPERTS), bool), "cut")
    again, found = gradients(model, batch)
    assert loss == again
    for key, value in wanted.items():
        assert (value is None) == (found[key] is None)
        assert value is None or torch.equal(value, found[key])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("active", ["half", "none", "one layer"])
def test_cut_equals_frozen_outputs_detached(name: str, active: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    chosen[0] &= active == "half"
    chosen[1] &= active != "none"
    restore = cut_reference(model, chosen)
    loss, wanted = gradients(model, batch)
    restore()
    attach(model, chosen, "cut")
    again, found = gradients(model, batch)
    assert again == pytest.approx(
        loss, rel=1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-5
    )
    close(found, wanted)


@pytest.mark.parametrize("name", ALL)
def test_exact_gives_active_experts_the_dense_gradient(name: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    _, wanted = gradients(model, batch)
    gates = attach(model, chosen, "exact")
    clear_frozen(gates, wanted)
    _, found = gradients(model, batch)
    close(found, wanted)


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager", "mixtral batched_mm"])
def test_backward_computes_active_experts_only(name: str, mode: str) -> None:
    """Products are counted: two per row of an active expert (one of input gradients if frozen)."""
    model, _ = build(name)
    chosen = some(2)
    attach(model, chosen, mode)
    _, module = next(iter(containers(model)))
    x, inputs, expert = routed(module)
    counts = np.bincount(expert, minlength=EXPERTS)
    y = module(x, *inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    active, frozen = counts[chosen[0]].sum(), counts[~chosen[0]].sum()
    weights = sum(p.numel() for p in module.parameters()) // EXPERTS
    products = 2 * active + (frozen if mode == "exact" else 0)
    assert counter.get_total_flops() == 2 * weights * products


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_frozen_parameters_always_get_zeros(name: str, mode: str) -> None:
    """Also those of experts without tokens and of whole layers; only untouched code gives None."""
    model, _ = build(name)
    for chosen in (np.arange(EXPERTS) >= 2, np.zeros(EXPERTS, bool)):
        gates = attach(model, np.stack([chosen, chosen]), mode)
        _, module = next(iter(containers(model)))
        x, inputs, _ = routed(module, used=2)
        module(x, *inputs).sum().backward()
        for part in gates.layers[0].parts.values():
            gradient = part.parameter.grad
            if gradient is None:
                assert part.count and name == "switch eager"
            else:
                assert gradient.shape == part.parameter.shape
                assert not gradient[part.frozen if part.count else slice(None)].any()
        assert inputs[1].grad is not None and inputs[1].grad.all()
        model.zero_grad()
        mat.detach_(model)


@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_compact_gradients_are_blocks_of_active_experts(name: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    gates = attach(model, chosen, "cut")
    _, dense = gradients(model, batch)
    for part in gates.parts():
        part.compact = True
    model(**batch).loss.backward()
    for part in gates.parts():
        whole, block = dense[part.part.parameter], part.gradient()
        if whole is None:
            assert block is None
        elif part.count:
            assert part.whole or part.parameter.grad is None
            torch.testing.assert_close(block, whole if part.whole else whole[part.active])


@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_second_derivatives_equal_those_of_the_reference(name: str) -> None:
    model, _ = build(name)
    chosen = some(2)
    module = next(iter(containers(model)))[1]
    x, inputs, _ = routed(module)

    def second(variables: list[Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(module(x, *inputs).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, inputs[1], *variables])

    gates = attach(model, chosen, "cut")
    parts = [part for part in gates.layers[0].parts.values() if part.count]
    for compact in (False, True):
        for part in parts:
            part.compact = compact
        found = second([part.home(part.parameter) for part in parts])
        gates.detach()
        restore = cut_reference(model, chosen)
        wanted = second([part.parameter for part in parts])
        restore()
        for part, new, old in zip(parts, found[2:], wanted[2:], strict=True):
            whole = part.whole or not compact
            torch.testing.assert_close(new, old if whole else old[part.active])
        torch.testing.assert_close(found[:2], wanted[:2])
        gates = attach(model, chosen, "cut")
        parts = [part for part in gates.layers[0].parts.values() if part.count]


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager eager", "mixtral batched_mm sdpa"])
def test_heads_groups_and_experts_of_a_whole_model_together(name: str, mode: str) -> None:
    family, implementation, *attention = name.split()
    model, batch = build(f"{family} {implementation}", *attention)
    gates = mat.attach_(model, mat.MATConfig(share=0.5))
    again, bitwise = gradients(model, batch)
    mat.detach_(model)
    loss, wanted = gradients(model, batch)
    assert again == loss
    assert all(v is None or torch.equal(v, bitwise[n]) for n, v in wanted.items())  # type: ignore[arg-type]

    random = np.random.default_rng(3)
    sizes = [layer.n_units for layer in gates.units.layers]
    active = np.concatenate([random.permutation(np.arange(n) < n // 2) for n in sizes])
    experts = active[gates.units.kind == "experts"].reshape(2, EXPERTS)
    if mode == "cut":
        restore = cut_reference(model, experts)
        handles = detach_columns(model, gates, active)
        loss, wanted = gradients(model, batch)
        restore()
        for handle in handles:
            handle.remove()
    gates = mat.attach_(model, mat.MATConfig(share=0.5, mode=mode))
    gates.set_active(active)
    clear_frozen(gates, wanted)
    again, found = gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-12)
    close(found, wanted)


@pytest.mark.parametrize("name", ["switch eager", "mixtral grouped_mm", "gpt_oss eager"])
def test_recorded_products_give_every_samples_weight_gradients(name: str) -> None:
    """Two samples; the sum of both is the dense gradient, each is that of its tokens alone."""
    model, _ = build(name)
    model = model.double()
    layer = next(la for la in mat.find_units(model).layers if la.kind == "experts")
    assert layer.recording is not None
    path, function = layer.recording
    module: Any = model.get_submodule(path)
    x, inputs, _ = routed(module)
    products = []

    def record(
        weight: str, bias: str | None, unit: int, rows: Tensor, y: Tensor, token: Tensor
    ) -> Tensor:
        products.append((weight, bias, unit, rows, y, token))
        return y

    y = function(module, record, x, *inputs)
    cotangent = torch.randn_like(y)
    taps = torch.autograd.grad(y, [product[4] for product in products], cotangent)
    for tokens in (torch.arange(11) < 6, torch.arange(11) >= 6, torch.ones(11, dtype=torch.bool)):
        restore = cut_reference(module, np.ones((1, EXPERTS), bool))
        dense = module(x, *inputs)
        restore()
        torch.testing.assert_close(y, dense)
        model.zero_grad()
        (dense * cotangent)[tokens].sum().backward()
        totals = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        for (weight, bias, unit, rows, _, token), d in zip(products, taps, strict=True):
            mine = tokens[token]
            whole = weight not in ("gate_up_proj", "down_proj")
            product = d[mine].T @ rows[mine]
            target = totals[weight] if whole else totals[weight][unit]
            target += product.T if getattr(module, "is_transposed", False) else product
            if bias is not None:
                totals[bias][unit] += d[mine].sum(0)
        close(totals, {n: p.grad for n, p in module.named_parameters()})


@pytest.mark.parametrize("active", [[1, 0, 1, 0], [0, 0, 0, 0]])
def test_a_block_that_calls_a_list_of_experts_itself(active: list[int]) -> None:
    torch.manual_seed(0)
    model, x = OldMixture().double(), torch.randn(9, 6, dtype=torch.float64)
    model(x, active)[0].square().sum().backward()
    wanted = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    model.zero_grad()
    attach(model, np.array(active, bool), "cut")
    model(x)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model: Any
    model, batch = build(name)
    attach(model.train(), some(2), "cut")
    _, wanted = gradients(model, batch)
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    _, found = gradients(model, batch)
    close(found, wanted)
    assert {n for n, g in found.items() if g is None} == {n for n, g in wanted.items() if g is None}
