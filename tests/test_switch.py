"""The switch layer against a loop over tokens, in float64; routing, gates, mNTK and ledger of the whole model."""

import copy
import itertools
from dataclasses import astuple
from pathlib import Path
from typing import Any
from unittest import mock

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mat.suite.bert import FeedForward
from mat.suite.optim import UnitAdamW
from mat.suite.switch import Experts, Switch, fill_slots
from mat.suite.units import BackwardMode, UnitIndex, UnitLayer, unit_layers
from short_runs import SWITCH, composed, events, one_sentence, small
from test_units import (
    active_gradients,
    active_rows,
    assert_same_gradients,
    frozen_units,
    named_layers,
    set_gates,
)
from tiny import shapes, tiny_batch, tiny_switch
from torch import Tensor, nn

from mat import gram
from mat.suite import engine, flops, ntk, switch
from mat.suite.compose import resolve
from mat.suite.config import MethodConfig, SelectionConfig, SwitchConfig
from mat.suite.errors import UserError
from mat.suite.interface import Flops
from mat.suite.methods import Method

WIDTH, HIDDEN = 5, 7


def layer_of(
    experts: int, factor: float = 1.0, seed: int = 0, skew: float = 0.0, dtype: torch.dtype = torch.float64
) -> Experts:
    """A layer with all parameters random; ``skew`` makes its first expert popular."""
    random = torch.Generator().manual_seed(seed)
    config = SwitchConfig(
        name="one", layers=1, width=WIDTH, heads=1, ffn_hidden=HIDDEN, ffn_groups=1, positions="rotary", norm="pre",
        experts=experts, capacity_factor=factor,
    )  # fmt: skip
    layer = Experts(config).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        layer.router[0] += skew
    return layer


def inputs(samples: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Tokens (B, T, D), which want gradients and have a positive mean, and a gradient of the output."""
    random = torch.Generator().manual_seed(seed + 1)
    x, g = torch.randn(2, samples, length, WIDTH, generator=random, dtype=dtype)
    return (x + 0.5).requires_grad_(), g


def gate(layer: UnitLayer, active: list[int], mode: BackwardMode) -> None:
    layer.set_active(np.isin(np.arange(layer.n_units), active), mode)


def reference(layer: Experts, x: Tensor, g: Tensor, frozen: set[naive.Unit], drops: bool = True) -> dict[str, Tensor]:
    """Output and gradients by the loop over tokens, of a dense layer but for detached frozen experts."""
    p = {f"l.{n}": q.detach().clone().requires_grad_() for n, q in layer.named_parameters()}
    x = x.detach().clone().requires_grad_()
    tokens = x.flatten(0, 1)
    capacity = -int(-layer.config.capacity_factor * len(tokens) // layer.n_units) if drops else None
    y = naive.experts(tokens, p, "l", capacity, frozen).view_as(x)
    found = torch.autograd.grad(y, [x, *p.values()], g, materialize_grads=True)
    return {"y": y.detach(), "x": found[0], **dict(zip((n[2:] for n in p), found[1:], strict=True))}


def assert_close(found: Tensor, wanted: Tensor, what: str = "", tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def assert_equals_reference(layer: Experts, x: Tensor, g: Tensor, drops: bool = True) -> None:
    """Output, input gradient, the router's and the active experts'; none for frozen ones."""
    frozen = {("l", int(e)) for e in np.flatnonzero(~layer.active)} if layer.mode == "cut" else set()
    wanted = reference(layer, x, g, frozen, drops)
    layer.clear_gradient()
    layer.router.grad = x.grad = None
    y = layer(x)
    y.backward(g)
    assert x.grad is not None and layer.router.grad is not None
    assert_close(y, wanted["y"], "output")
    assert_close(x.grad, wanted["x"], "input")
    assert_close(layer.router.grad, wanted["router"], "router")
    for name, parameter in layer.unit_parameters().items():
        found = layer.gradient(name)
        if layer.n_active:
            assert found is not None
            assert_close(found, wanted[name][torch.from_numpy(layer.active)], name)
        else:
            assert found is None
        assert layer.n_active == layer.n_units or parameter.grad is None


# --- the layer against the loop over tokens


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("at_once", [1, 2 * WIDTH * HIDDEN * 2, 2**20], ids=["one", "two", "all at once"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_outputs_and_gradients_equal_the_reference(mode: BackwardMode, at_once: int, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 5))
    factor = data.draw(st.sampled_from([0.3, 0.75, 1.0, 1.25, 2.0, float(experts)]))
    samples, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    seed, skew = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 2.0]))
    active = data.draw(st.sets(st.integers(0, experts - 1)))
    layer = layer_of(experts, factor, seed, skew)
    gate(layer, sorted(active), mode)
    with mock.patch.object(switch, "CACHE_BYTES", at_once):
        assert_equals_reference(layer, *inputs(samples, length, seed))


@pytest.mark.parametrize("active", [[], [0], [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_evaluation_drops_nothing_and_gates_stay(mode: BackwardMode, active: list[int]) -> None:
    layer = layer_of(4, 0.5, skew=2.0).eval()
    gate(layer, active, mode)
    x, g = inputs(3, 7)
    assert_equals_reference(layer, x, g, drops=False)
    wanted = reference(layer, x, g, set(), drops=False)["y"]
    with torch.no_grad():
        assert_close(layer(x), wanted)


def test_tokens_beyond_capacity_are_dropped_in_token_order() -> None:
    """Every token goes to expert 1, which has 3 slots: the first three get its output, the others nothing."""
    layer = layer_of(4, 1.0)
    x, _ = inputs(2, 6)
    with torch.no_grad():
        layer.router.zero_()
        layer.router[1] = 100 * x[0, 0]
        x[:] = x[0, 0] * torch.arange(1, 13).view(2, 6, 1)
    y = layer(x)
    assert layer.capacity(12) == 3
    assert (y.flatten(0, 1).abs().sum(-1) > 0).tolist() == [True] * 3 + [False] * 9
    assert_close(y, reference(layer, x, torch.ones_like(x), set())["y"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expert=st.lists(st.integers(0, 4), min_size=1, max_size=30), capacity=st.integers(1, 12))
def test_no_token_is_lost_or_doubled(expert: list[int], capacity: int) -> None:
    load = torch.bincount(torch.tensor(expert), minlength=5)
    slots = fill_slots(torch.tensor(expert), load, capacity)
    held = {e: slots.token[e][slots.filled[e]].tolist() for e in range(5)}
    assert held == {e: [t for t, of in enumerate(expert) if of == e][:capacity] for e in range(5)}
    for token, (kept, row) in enumerate(zip(slots.kept.tolist(), slots.row.tolist(), strict=True)):
        assert kept == (token in held[expert[token]])
        assert row == (expert[token] * capacity + held[expert[token]].index(token) if kept else 0)
    assert slots.token.shape == (5, capacity) and int(slots.token.max()) < len(expert)


def test_equal_probabilities_go_to_the_first_expert() -> None:
    layer = layer_of(4, 4.0)
    with torch.no_grad():
        layer.router[2] = layer.router[1]
        layer.router[0] = layer.router[3] = layer.router[1] - 1.0  # never best where the mean is positive
    x, _ = inputs(1, 9)
    x = x.abs()
    layer(x)
    assert layer._seen is not None and layer._seen[1].tolist() == [0, 9, 0, 0]
    with torch.no_grad():
        layer.router.zero_()
    layer(x)
    assert layer._seen[1].tolist() == [9, 0, 0, 0]


def test_a_single_expert_is_a_dense_feed_forward_layer() -> None:
    """Its probability is 1 and its capacity all tokens; values and gradients."""
    layer, dense = layer_of(1), FeedForward(WIDTH, HIDDEN, 1).double()
    with torch.no_grad():
        for name, value in (("in_weight", layer.in_weight), ("in_bias", layer.in_bias)):
            dense.get_parameter(name).copy_(value)
        dense.out_weight.copy_(layer.out_weight.mT)
    x, g = inputs(2, 5)
    twin = x.detach().clone().requires_grad_()
    y, other = layer(x), dense(twin) + layer.out_bias[0].detach()
    y.backward(g)
    other.backward(g)
    assert_close(y, other)
    assert x.grad is not None and twin.grad is not None and layer.in_weight.grad is not None
    assert_close(x.grad, twin.grad)
    assert_close(layer.in_weight.grad, dense.in_weight.grad)
    assert_close(layer.out_weight.grad.mT, dense.out_weight.grad)


def unused_expert(layer: Experts) -> Tensor:
    """Inputs (2, 6, D) that expert 2 gets none of."""
    with torch.no_grad():
        layer.router[2] = -10.0
    return inputs(2, 6)[0].detach().abs().requires_grad_()


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(mode: BackwardMode) -> None:
    layer = layer_of(4, 4.0)
    x = unused_expert(layer)
    for active in ([0, 1, 2, 3], [1, 2]):
        gate(layer, active, mode)
        layer.clear_gradient()
        layer(x).sum().backward()
        for name in layer.unit_parameters():
            gradient = layer.gradient(name)
            assert gradient is not None and not gradient[active.index(2)].any(), name
            assert gradient[active.index(1)].any(), name


@pytest.mark.parametrize("active", [[], [1], [0, 2, 3]], ids=str)
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_the_router_learns_as_if_nothing_were_frozen(mode: BackwardMode, active: list[int]) -> None:
    """To rounding, given the same gradient of the output: it needs the experts' forward values only."""
    found = []
    for units in ([0, 1, 2, 3], active):
        layer = layer_of(4, 0.75)
        x, g = inputs(2, 6)
        gate(layer, units, mode)
        layer(x.detach()).backward(g)
        found.append(layer.router.grad)
    assert found[0] is not None and found[1] is not None
    assert_close(found[1], found[0], tolerance=1e-14)


def test_weights_that_want_no_gradient_cost_none() -> None:
    layer = layer_of(4, 0.75)
    x, g = inputs(2, 6)
    products = {}
    for wanted in (True, False):
        for parameter in layer.unit_parameters().values():
            parameter.requires_grad_(wanted)
        y = layer(x)
        x.grad = None
        with flops.flop_counter() as counter:
            y.backward(g)
        products[wanted] = counter.get_total_flops(), x.grad
    cost = layer.step_flops(2, 6, 4, "cut")
    router = 2 * 12 * 4 * WIDTH
    assert products[True][0] - products[False][0] == cost.weight_grad - router
    assert torch.equal(products[True][1], products[False][1])


# --- losses and monitors


def losses_of(layer: Experts, x: Tensor) -> tuple[Tensor, Tensor, list[list[float]], list[int]]:
    """Load-balancing and z-loss by their definitions, the probabilities and the loads."""
    tokens, experts = x.flatten(0, 1), layer.n_units
    logits = [layer.router @ token for token in tokens]
    probabilities = [torch.softmax(row, 0) for row in logits]
    loads = [sum(int(row.argmax()) == e for row in probabilities) for e in range(experts)]
    balance = experts * sum(
        loads[e] / len(tokens) * sum(row[e] for row in probabilities) / len(tokens) for e in range(experts)
    )
    z = sum(torch.log(row.exp().sum()) ** 2 for row in logits) / len(tokens)
    return torch.as_tensor(balance), torch.as_tensor(z), [row.tolist() for row in probabilities], loads


def test_losses_and_their_gradients_equal_their_definitions() -> None:
    layer = layer_of(3, 0.75)
    x, _ = inputs(2, 7)
    layer(x)
    assert layer.auxiliary is not None
    balance, z, _, _ = losses_of(layer, x)
    wanted = 0.01 * balance + 0.001 * z
    assert_close(layer.auxiliary, wanted)
    for of in (layer.router, x):
        found, expected = (torch.autograd.grad(loss, of, retain_graph=True)[0] for loss in (layer.auxiliary, wanted))
        assert_close(found, expected)


def test_a_router_that_prefers_nobody_has_the_smallest_load_balancing_loss() -> None:
    layer = layer_of(4)
    with torch.no_grad():
        layer.router.zero_()
    layer(inputs(2, 6)[0])
    wanted = 0.01 * 1.0 + 0.001 * np.log(4) ** 2
    assert layer.auxiliary is not None and float(layer.auxiliary) == pytest.approx(wanted, rel=1e-12)


def test_monitors_are_largest_load_dropped_share_and_entropy() -> None:
    model = tiny_switch(capacity_factor=0.75)
    assert model.monitors() == {} and model.auxiliary_loss() is None
    seen: list[tuple[Experts, Tensor]] = []
    for layer in model.switch_layers:
        layer.register_forward_hook(lambda module, args, _: seen.append((module, args[0].detach())))
    model(tiny_batch())
    found, loads, drops, entropies, extra = model.monitors(), [], [], [], 0.0
    for layer, x in seen:
        balance, z, probabilities, load = losses_of(layer, x)
        capacity, tokens = layer.capacity(sum(load)), sum(load)
        loads.append(max(load) / tokens)
        drops.append(sum(max(0, n - capacity) for n in load) / tokens)
        entropies.append(float(np.mean([-np.dot(row, np.log(row)) for row in probabilities])))
        extra += float(0.01 * balance + 0.001 * z)
    assert len(seen) == 2 and sum(drops) > 0
    assert found["expert_load"] == pytest.approx(max(loads))
    assert found["drop_rate"] == pytest.approx(np.mean(drops))
    assert found["router_entropy"] == pytest.approx(np.mean(entropies))
    auxiliary = model.auxiliary_loss()
    assert auxiliary is not None and float(auxiliary) == pytest.approx(extra)
    model.eval()(tiny_batch(seed=1))
    assert model.monitors() == found, "evaluation is no training forward"


# --- the whole model


def last_of_each(*counts: int) -> list[bool]:
    """The last so many of the three units of every layer."""
    return [unit >= 3 - count for count in counts for unit in range(3)]


def without_gaps(model: nn.Module, dense: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Active experts without a token have a gradient of zero."""
    unit_names = [
        f"{prefix}.{name}" for prefix, layer in named_layers(model).items() for name in layer.unit_parameters()
    ]
    return dense | {n: torch.zeros_like(model.get_parameter(n)) for n in unit_names if dense[n] is None}


COUNTS = [(3, 3, 3, 3), (0, 0, 0, 0), (1, 2, 3, 1), (2, 0, 0, 1)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("case", shapes(mode=("cut", "exact"), norm=("pre", "post"), switch_every=(1, 2)), ids=str)
def test_gradients_of_the_model_equal_the_reference(case: dict[str, Any], counts: tuple[int, ...]) -> None:
    mode = case["mode"]
    model, batch = tiny_switch(norm=case["norm"], switch_every=case["switch_every"]), tiny_batch()
    set_gates(model, last_of_each(*counts), mode)
    model.loss(batch).backward()
    dense = naive.gradients(model, batch, frozen_units(model) if mode == "cut" else ())
    assert_same_gradients(active_gradients(model), active_rows(model, without_gaps(model, dense)), rtol=1e-9)


def test_newly_active_experts_train_and_frozen_ones_stay_bit_identical() -> None:
    model = tiny_switch(capacity_factor=1.0)
    optimiser = UnitAdamW(model, (0.9, 0.98), 1e-6, 0.1)

    def steps(count: int) -> dict[str, Tensor]:
        before = copy.deepcopy(model.state_dict())
        for seed in range(count):
            optimiser.clear()
            loss, extra = model.loss(tiny_batch(seed=seed)), model.auxiliary_loss()
            assert extra is not None
            (loss + extra).backward()
            optimiser.step(1e-3)
        return before

    for active in ([0], [2], [0, 1, 2], []):
        for layer in model.switch_layers:
            gate(layer, active, "cut")
        before = steps(5)
        for i, layer in enumerate(model.switch_layers):
            for name, parameter in layer.unit_parameters().items():
                old = before[f"blocks.{i}.ffn.{name}"]
                moved = [u for u in range(3) if not parameter[u].equal(old[u])]
                assert moved == active, f"{name}: {moved}"
            assert not layer.router.equal(before[f"blocks.{i}.ffn.router"])


def test_accumulation_equals_the_full_batch_where_nothing_is_dropped() -> None:
    model, batch = tiny_switch(), tiny_batch(samples=6)
    set_gates(model, last_of_each(*COUNTS[2]), "cut")
    model.loss(batch).backward()
    wanted = {n: None if g is None else g.clone() for n, g in active_gradients(model).items()}
    UnitAdamW(model, (0.9, 0.98), 1e-6, 0.1).clear()
    for part in batch.split(3):
        (model.loss(part) / 3).backward()
    assert_same_gradients(active_gradients(model), wanted, rtol=1e-9)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_bfloat16_autocast(mode: BackwardMode) -> None:
    """Gradients are float32 and within 5 % of the float64 ones' norm; routing is float32 (no token goes elsewhere)."""
    layer, exact = layer_of(4, 0.75, dtype=torch.float32), layer_of(4, 0.75)
    (x, g), (wide, wide_g) = inputs(3, 9, dtype=torch.float32), inputs(3, 9)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), layer.parameters(), strict=True):
            p.copy_(q)
        wide.copy_(x)
        wide_g.copy_(g)
    for each in (layer, exact):
        gate(each, [1, 3], mode)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(g)
    exact(wide).backward(wide_g)
    assert y.dtype == torch.bfloat16 and layer._seen is not None and exact._seen is not None
    assert layer._seen[0].dtype == torch.float32 and layer._seen[1].equal(exact._seen[1])
    pairs = [(x.grad, wide.grad), (layer.router.grad, exact.router.grad)]
    pairs += [(layer.gradient(n), exact.gradient(n)) for n in layer.unit_parameters()]
    for found, wanted in pairs:
        assert found is not None and wanted is not None and found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_copy_after_a_step_has_no_graph() -> None:
    model = tiny_switch()
    model.loss(tiny_batch())
    assert copy.deepcopy(model).auxiliary_loss() is None and model.auxiliary_loss() is not None


def test_fewer_active_experts_keep_fewer_activations() -> None:
    layer = layer_of(4, 1.0)
    kept = []
    for count in (4, 2, 1, 0):
        gate(layer, list(range(count)), "cut")
        shapes_seen: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=shapes_seen: s.append(tuple(t.shape)) or t, lambda t: t
        ):
            layer(inputs(2, 6)[0])
        kept.append(sum(shape[0] for shape in shapes_seen if shape[1:] == (layer.capacity(12), HIDDEN)))
    assert kept == [8, 4, 2, 0]  # two activations of HIDDEN neurons per active expert


def test_size_of_the_papers_model() -> None:
    """85 M weights of the blocks act on a token, as in BERT-base; a block has 8 experts."""
    config = resolve(composed("model=switch", "selection=experts")).model
    with torch.device("meta"):
        model = Switch(config, 100, 128)
    weights: dict[str, int] = {"heads": 0, "experts": 0}
    for layer in unit_layers(model):
        weights[layer.kind] += sum(p.numel() for p in layer.unit_parameters().values() if p.dim() == 3)
    assert weights["heads"] + weights["experts"] // 8 == 12 * 12 * 768**2 == 84_934_656
    assert weights["experts"] // 8 == 12 * 8 * 768**2


# --- mNTK


@pytest.fixture(scope="module")
def measured() -> tuple[Switch, Any, dict[str, Tensor]]:
    """A Switch with an expert that no token of the probe visits, the probe and the naive Jacobian."""
    model, batch = tiny_switch(capacity_factor=0.5), tiny_batch()
    with torch.no_grad():
        norm = model.blocks[0].ffn_norm  # type: ignore[union-attr]
        model.switch_layers[0].router[1] = -100 * norm.bias  # type: ignore[union-attr,operator]
        norm.bias.mul_(10)  # type: ignore[union-attr,operator]
    return model, batch, naive.jacobian(model, batch)


def unit_jacobians(model: Switch, jacobian: dict[str, Tensor]) -> list[Tensor]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, UnitLayer)]
    return [naive.unit_jacobian(jacobian, n, u) for n, m in layers for u in range(m.n_units)]


@pytest.mark.parametrize("memory_bytes", [1, 2000, 2**25])
def test_mntk_equals_the_naive_jacobian(measured: Any, memory_bytes: int) -> None:
    model, batch, jacobian = measured
    found = ntk.estimate(model.train(), batch, reduction="full", kernels=True, memory_bytes=memory_bytes)
    flat = [j.transpose(0, 1).flatten(0, 1) for j in unit_jacobians(model, jacobian)]
    assert found.kernels is not None
    assert_close(found.kernels, torch.stack([j @ j.T for j in flat]), tolerance=1e-9)
    unused = (found.index.kind == "experts") & (found.index.layer == 0) & (found.index.unit == 1)
    assert found.lambda_max[unused].tolist() == [0.0] and (found.lambda_max[~unused] > 0).all()


@pytest.mark.parametrize("reduction, projections", [("random", 1), ("random", 3), ("sum", 1), ("loss", 1)])
def test_a_probe_in_several_batches_changes_nothing(measured: Any, reduction: ntk.Reduction, projections: int) -> None:
    model, batch, _ = measured
    options: dict[str, Any] = {"reduction": reduction, "projections": projections, "kernels": True}
    whole = ntk.estimate(model, batch, **options).kernels
    parts = ntk.estimate(model, batch.split(3), **options).kernels
    assert whole is not None and parts is not None
    assert_close(parts, whole, tolerance=1e-10)


def test_sum_reduction_equals_the_naive_jacobian(measured: Any) -> None:
    model, batch, jacobian = measured
    found = ntk.estimate(model, batch, reduction="sum").lambda_max
    rows = [j.sum(1) / j.shape[1] ** 0.5 for j in unit_jacobians(model, jacobian)]
    np.testing.assert_allclose(found, [float(torch.linalg.eigvalsh(r @ r.T)[-1]) for r in rows], rtol=1e-9, atol=1e-12)


def test_experts_alone_have_the_rows_of_all_units_and_gates_do_not_matter(measured: Any) -> None:
    model, batch, _ = measured
    every = ntk.estimate(model, batch)
    model = copy.deepcopy(model)
    set_gates(model, last_of_each(1, 0, 2, 1), "cut")
    found = ntk.estimate(model, batch, UnitIndex(unit_layers(model), ["experts"]))
    assert_close(*(torch.from_numpy(v) for v in (found.lambda_max, every.lambda_max[every.index.kind == "experts"])))


def test_an_expert_without_tokens_never_stops(measured: Any) -> None:
    model, batch, _ = measured
    index = UnitIndex(unit_layers(model), ["experts"])
    selection = SelectionConfig(units=["experts"], interval=0.05, mode="cut", share=1.0, beta=0.5)
    method = Method(MethodConfig(name="mat", policy="threshold", temporal=True), selection, index, 0)
    unused = (index.layer == 0) & (index.unit == 1)
    score = ntk.estimate(model, batch, index).lambda_max
    for change in (0.0, 0.1, 0.11, 0.12):
        method.select(score * (1 + change))
    assert method.state.stopped[~unused].all() and not method.state.stopped[unused].any()


def test_online_estimate_equals_the_probes_where_nothing_is_dropped() -> None:
    model, batch = tiny_switch(), tiny_batch()
    wanted = ntk.estimate(model, batch, reduction="loss").lambda_max
    with ntk.Online(model) as online:
        model.loss(batch).backward()
    np.testing.assert_allclose(online.result().lambda_max, wanted, rtol=1e-10)
    assert model.auxiliary_loss() is not None


# --- ledger


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("case", shapes(mode=("cut", "exact"), counts=COUNTS, switch_every=(1, 2)), ids=str)
def test_training_step_equals_the_counter(case: dict[str, Any], factor: float) -> None:
    model = tiny_switch(capacity_factor=factor, switch_every=case["switch_every"], ffn_hidden=21)
    set_gates(model, last_of_each(*case["counts"]), case["mode"])
    for samples in (5, 2):
        batch = tiny_batch(samples=samples)
        with flops.flop_counter() as forward:
            loss = model.loss(batch) + model.auxiliary_loss()
        with flops.flop_counter() as backward:
            loss.backward()
        wanted = flops.training_step(model, batch)
        needed = flops.training_step(model, batch, padded=False)
        assert all(a <= b for a, b in zip(astuple(needed), astuple(wanted), strict=True))
        vocabulary = wanted.vocabulary // 3
        assert forward.get_total_flops() == wanted.forward + vocabulary
        assert backward.get_total_flops() == wanted.input_grad + wanted.weight_grad + 2 * vocabulary


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_an_accumulated_step_equals_the_counter(parts: int) -> None:
    """Slots are rounded up in every part: of 30 tokens an expert takes 6, in two parts 4 and 3, in three 3, 3 and 2."""
    model, batch = tiny_switch(capacity_factor=1.0, experts=5, ffn_hidden=21), tiny_batch(samples=5)
    set_gates(model, [unit < active for n, active in ((3, 1), (5, 2), (3, 3), (5, 1)) for unit in range(n)], "cut")
    with flops.flop_counter() as counter:
        for part in batch.split(parts):
            (model.loss(part) + model.auxiliary_loss()).backward()
    assert counter.get_total_flops() == flops.training_step(model, batch, accumulation=parts).everything


@pytest.mark.parametrize("kinds", [None, ("experts",), ("heads",)], ids=str)
@pytest.mark.parametrize("reduction, projections", [("random", 1), ("random", 3), ("full", 1), ("loss", 1)])
@pytest.mark.parametrize("switch_every", [1, 2])
def test_estimate_equals_the_counter(switch_every: int, reduction: Any, projections: int, kinds: Any) -> None:
    """Known before the estimate, whatever the routing will be."""
    model, batch = tiny_switch(switch_every=switch_every, ffn_hidden=21), tiny_batch(samples=3)
    index = UnitIndex(unit_layers(model), kinds)
    for memory_bytes in (2**25,) if reduction == "full" else (2**25, 1):
        wanted = flops.estimate(model, batch, index.layers, reduction, projections, memory_bytes)
        with flops.flop_counter() as counter:
            ntk.estimate(model, batch, index, reduction=reduction, projections=projections, memory_bytes=memory_bytes)
        assert counter.get_total_flops() == wanted.everything


def test_layer_by_hand() -> None:
    """4 experts of two 5 x 7 products, 12 tokens, factor 1.25: 4 slots each; 3 tokens each without padding."""
    layer = layer_of(4, 1.25)
    router, slot = 2 * 12 * 4 * 5, 2 * 2 * 5 * 7
    assert layer.step_flops(2, 6, 1, "cut") == Flops(router + 16 * slot, router + 4 * slot, router + 4 * slot)
    assert layer.step_flops(2, 6, 1, "exact") == Flops(router + 16 * slot, router + 16 * slot, router + 4 * slot)
    assert layer.step_flops(2, 6, 1, "cut", padded=False) == Flops(
        router + 12 * slot, router + 3 * slot, router + 3 * slot
    )
    assert layer_of(4, 0.5).step_flops(2, 6, 1, "cut", padded=False) == Flops(  # 2 slots each
        router + 8 * slot, router + 2 * slot, router + 2 * slot
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_bytes", [1, 300, 2**20])
def test_routed_gram_equals_the_naive_gradients_and_its_formula(memory_bytes: int, bias: bool) -> None:
    sizes = [torch.tensor([[2, 0, 3], [0, 0, 0], [1, 4, 2]]), torch.tensor([[1, 5], [3, 0], [2, 1]])]
    random = torch.Generator().manual_seed(0)
    factors = [
        (*(torch.randn(int(s.sum()), w, generator=random, dtype=torch.float64) for w in (4, 5)), s) for s in sizes
    ]
    with flops.flop_counter() as counter:
        found = gram.routed_gram(factors, bias, memory_bytes)
    assert counter.get_total_flops() == 2 * 24 * 4 * 5 + gram.routed_flops(5, 0, 3, 4, 5, bias)
    for u in range(3):
        rows = []
        for a, b, s in factors:
            ends = [0, *itertools.accumulate(s.flatten().tolist())]
            for i in range(s.shape[1]):
                part = slice(ends[u * s.shape[1] + i], ends[u * s.shape[1] + i + 1])
                gradient = (a[part].T @ b[part]).flatten()
                rows.append(torch.cat([gradient, a[part].sum(0)]) if bias else gradient)
        flat = torch.stack(rows)
        assert_close(found[u], flat @ flat.T)


# --- configuration and run


@pytest.mark.parametrize(
    "override, part",
    [
        ("model.experts=0", "model.experts=0"),
        ("model.capacity_factor=0", "(0, 8]"),
        ("model.capacity_factor=9", "(0, 8]"),
        ("model.switch_every=5", "[1, 4]"),
        ("model.balance_loss=-1", "model.balance_loss=-1"),
        ("model.z_loss=-1", "model.z_loss=-1"),
        ("model.heads=3", "does not divide"),
        ("selection.reduction=online", "which its forward pass couples: choose random"),
        ("selection.units=[ffn]", "model.switch_every=2"),
        ("selection.units=[expert]", "did you mean experts?"),
    ],
)
def test_senseless_values_are_refused_in_one_sentence(override: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(composed("model=switch_mini", "selection=experts_mini", override))
    assert part in str(caught.value) and one_sentence(str(caught.value)), caught.value


@pytest.mark.parametrize("method", ["baseline", "mat"])
def test_a_run_logs_what_the_router_does(method: str, tmp_path: Path, cache: Path) -> None:
    config = small(cache, *SWITCH, f"method={method}")
    summary = engine.run(config, tmp_path / "run")
    assert summary is not None and summary["steps"] > 10
    logged = events(tmp_path / "run", "train")
    assert logged and all(1 / 4 <= e["expert_load"] <= 1 and 0 <= e["drop_rate"] < 1 for e in logged)
    assert all(0 < e["router_entropy"] <= np.log(4) + 1e-6 for e in logged)


@pytest.mark.parametrize("experts, copied", [([1], False), ([1, 2], False), ([0, 2], True)])
def test_experts_that_follow_one_another_are_not_copied(experts: list[int], copied: bool) -> None:
    parameter = torch.randn(4, 3)
    rows = switch._rows(parameter, torch.tensor(experts), slice(0, len(experts)), torch.float32)
    assert torch.equal(rows, parameter[experts])
    assert (rows.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()) is copied
