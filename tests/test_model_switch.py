"""Layers of experts against a loop over tokens and against transformers; losses and monitors."""

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from short_runs import composed
from small_models import randomised, shapes, tiny_batch, tiny_switch
from torch import Tensor

from mat.suite.compose import resolve
from mat.suite.config import SwitchConfig
from mat.suite.models import switch
from mat.suite.models.bert import FeedForward
from mat.suite.models.switch import Experts, Switch, fill_slots

WIDTH, HIDDEN = 5, 7


def layer_of(experts: int, factor: float = 1.0, seed: int = 0, skew: float = 0.0) -> Experts:
    """A layer with all parameters random; ``skew`` makes its first expert popular."""
    config = SwitchConfig(
        name="one", layers=1, width=WIDTH, heads=1, ffn_hidden=HIDDEN, ffn_groups=1,
        positions="rotary", norm="pre", experts=experts, capacity_factor=factor,
    )  # fmt: skip
    layer = randomised(Experts(config), seed).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter /= 0.3
        layer.router.weight[0] += skew
    return layer


def inputs(samples: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (B, T, D) that want gradients, with a positive mean, and a gradient of the output."""
    random = torch.Generator().manual_seed(seed + 1)
    x, g = torch.randn(2, samples, length, WIDTH, generator=random, dtype=torch.float64)
    return (x + 0.5).requires_grad_(), g


def assert_close(found: Tensor, wanted: Tensor, what: str = "") -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def assert_equals_reference(layer: Experts, x: Tensor, g: Tensor, drops: bool = True) -> None:
    """Output and all gradients."""
    parameters = dict(layer.named_parameters())
    y = layer(x)
    found = torch.autograd.grad(y, [x, *parameters.values()], g)
    tokens = x.flatten(0, 1)
    capacity = layer.capacity(len(tokens)) if drops else None
    p = {f"l.{name}": parameter for name, parameter in parameters.items()}
    expected = references.experts(tokens, p, "l", capacity).view_as(x)
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g, materialize_grads=True)
    assert_close(y, expected, "output")
    for name, a, b in zip(["input", *parameters], found, wanted, strict=True):
        assert_close(a, b, name)


# --- the layer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize(
    "at_once", [1, 4 * WIDTH * HIDDEN, 2**20], ids=["one", "two", "all at once"]
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(at_once: int, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 5))
    factor = data.draw(st.sampled_from([0.3, 0.75, 1.0, 1.25, 2.0, float(experts)]))
    samples, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    seed, skew = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 2.0]))
    layer = layer_of(experts, factor, seed, skew)
    with mock.patch.object(switch, "CACHE_BYTES", at_once):
        assert_equals_reference(layer, *inputs(samples, length, seed))


def test_capacity_is_the_factor_times_an_even_share() -> None:
    layer = layer_of(4, 1.1)
    assert [layer.capacity(tokens) for tokens in (1, 4, 12, 40)] == [1, 2, 4, 11]


def test_evaluation_drops_nothing() -> None:
    layer = layer_of(4, 0.5, skew=2.0).eval()
    assert_equals_reference(layer, *inputs(3, 7), drops=False)


def test_tokens_beyond_capacity_are_dropped_in_token_order() -> None:
    """Every token goes to expert 1, which has 3 slots: the first three get its output."""
    layer = layer_of(4, 1.0)
    x, _ = inputs(2, 6)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] = 100 * x[0, 0]
        x[:] = x[0, 0] * torch.arange(1, 13).view(2, 6, 1)
    y = layer(x)
    assert layer.capacity(12) == 3
    assert (y.flatten(0, 1).abs().sum(-1) > 0).tolist() == [True] * 3 + [False] * 9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expert=st.lists(st.integers(0, 4), min_size=1, max_size=30), capacity=st.integers(1, 12))
def test_no_token_is_lost_or_doubled(expert: list[int], capacity: int) -> None:
    load = torch.bincount(torch.tensor(expert), minlength=5)
    slots = fill_slots(torch.tensor(expert), load, capacity)
    held = {e: slots.token[e][slots.filled[e]].tolist() for e in range(5)}
    assert held == {e: [t for t, of in enumerate(expert) if of == e][:capacity] for e in range(5)}
    for token, (kept, row) in enumerate(zip(slots.kept.tolist(), slots.row.tolist(), strict=True)):
        assert kept == (token in held[expert[token]])
        wanted = expert[token] * capacity + held[expert[token]].index(token) if kept else 0
        assert row == wanted
    assert slots.token.shape == (5, capacity) and int(slots.token.max()) < len(expert)


def test_of_equal_experts_the_first_is_chosen() -> None:
    layer = layer_of(4, 4.0)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = layer.router.weight[3] = -1.0
    _, expert, load = layer.route(inputs(1, 9)[0].abs().flatten(0, 1))
    assert expert.tolist() == [1] * 9 and load.tolist() == [0, 9, 0, 0]


def test_a_single_expert_is_a_feed_forward_layer() -> None:
    """Its probability is 1 and its capacity all tokens; values and gradients."""
    layer, dense = layer_of(1), FeedForward(WIDTH, HIDDEN).double()
    pairs = {
        "in_weight": dense.up.weight, "in_bias": dense.up.bias,
        "out_weight": dense.down.weight, "out_bias": dense.down.bias,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(layer.get_parameter(name)[0])
    x, g = inputs(2, 5)
    y, other = layer(x), dense(x)
    assert_close(y, other)
    found = torch.autograd.grad(y, [x, *(layer.get_parameter(name) for name in pairs)], g)
    wanted = torch.autograd.grad(other, [x, *pairs.values()], g)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.view_as(b), b)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    layer = layer_of(4, 4.0)
    with torch.no_grad():
        layer.router.weight[2] = -10.0
    layer(inputs(2, 6)[0].abs()).sum().backward()
    for name in ("in_weight", "in_bias", "out_weight", "out_bias"):
        gradient = layer.get_parameter(name).grad
        assert gradient is not None and not gradient[2].any() and gradient[1].any(), name


def test_weights_that_want_no_gradient_get_none() -> None:
    layer = layer_of(4, 0.75)
    x, g = inputs(2, 6)
    (wanted,) = torch.autograd.grad(layer(x), x, g)
    layer.requires_grad_(False)
    layer(x).backward(g)
    assert x.grad is not None and torch.equal(x.grad, wanted)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_second_derivative_of_experts_is_refused() -> None:
    layer = layer_of(2, 2.0)
    x, _ = inputs(1, 4)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_experts_equal_those_of_transformers() -> None:
    """Routing, capacity and outputs of the reference implementation, given the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = transformers.SwitchTransformersConfig(
        d_model=WIDTH, d_ff=HIDDEN, num_experts=4, expert_capacity=64, router_jitter_noise=0.0,
        dropout_rate=0.0, dense_act_fn="gelu", router_dtype="float32",
    )  # fmt: skip
    theirs = SwitchTransformersSparseMLP(config).eval()
    layer = layer_of(4, 4.0).float()
    with torch.no_grad():
        layer.in_bias.zero_()  # theirs have none
        layer.out_bias.zero_()
        theirs.router.classifier.weight.copy_(layer.router.weight)
        for e in range(4):
            expert = theirs.experts[f"expert_{e}"]
            expert.wi.weight.copy_(layer.in_weight[e])
            expert.wo.weight.copy_(layer.out_weight[e])
    x = inputs(3, 7)[0].detach().float()
    expected = theirs(x)
    expected = expected if isinstance(expected, Tensor) else expected[0]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_is_close(training: bool) -> None:
    """The router stays in float32; experts lose 2^-8 a value, a few times over two products."""
    layer = layer_of(4, 1.0).train(training)
    x, g = inputs(4, 16)
    names = dict(layer.named_parameters())
    wanted = torch.autograd.grad(layer(x), [x, *names.values()], g)
    half = copy.deepcopy(layer).float()
    small = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = half(small)
    found = torch.autograd.grad(y, [small, *half.parameters()], g.to(y.dtype))
    for name, a, b in zip(["input", *names], found, wanted, strict=True):
        assert a.dtype == torch.float32
        error = (a.double() - b).norm() / b.norm()
        assert error < 0.03, f"{name}: relative error {float(error):.2e}"


# --- losses and monitors


def losses_of(layer: Experts, x: Tensor) -> tuple[Tensor, Tensor, list[list[float]], list[int]]:
    """Load-balancing and z-loss by their definitions, the probabilities and the loads."""
    tokens, experts = x.flatten(0, 1), layer.experts
    logits = [layer.router.weight @ token for token in tokens]
    rows = [torch.softmax(row, 0) for row in logits]
    loads = [sum(int(row.argmax()) == e for row in rows) for e in range(experts)]
    means = [torch.stack([row[e] for row in rows]).mean() for e in range(experts)]
    balance = experts * torch.stack([loads[e] / len(rows) * means[e] for e in range(experts)]).sum()
    z = torch.stack([torch.log(row.exp().sum()) ** 2 for row in logits]).mean()
    return balance, z, [row.tolist() for row in rows], loads


def test_losses_and_their_gradients_equal_their_definitions() -> None:
    layer = layer_of(3, 0.75)
    x, _ = inputs(2, 7)
    layer(x)
    assert layer.auxiliary is not None
    balance, z, _, _ = losses_of(layer, x)
    wanted = 0.01 * balance + 0.001 * z
    assert_close(layer.auxiliary, wanted)
    of = [layer.router.weight, x]
    for a, b in zip(
        *(torch.autograd.grad(loss, of) for loss in (layer.auxiliary, wanted)), strict=True
    ):
        assert_close(a, b)


def test_a_router_without_preference_has_the_smallest_balancing_loss() -> None:
    layer = layer_of(4)
    torch.nn.init.zeros_(layer.router.weight)
    layer(inputs(2, 6)[0])
    wanted = 0.01 * 1.0 + 0.001 * np.log(4) ** 2
    assert layer.auxiliary is not None
    assert layer.auxiliary.item() == pytest.approx(wanted, rel=1e-12)


def test_monitors_are_largest_load_dropped_share_and_entropy() -> None:
    model = tiny_switch(capacity_factor=0.75)
    seen: list[tuple[Experts, Tensor]] = []
    for layer in model.switch_layers:
        assert layer.monitors() == {}
        layer.register_forward_hook(lambda module, args, _: seen.append((module, args[0].detach())))
    model(tiny_batch())
    found, loads, drops, entropies, extra = model.monitors(), [], [], [], 0.0
    for layer, x in seen:
        balance, z, probabilities, load = losses_of(layer, x)
        capacity, tokens = layer.capacity(sum(load)), sum(load)
        loads.append(max(load) / tokens)
        drops.append(sum(max(0, n - capacity) for n in load) / tokens)
        entropies.append(float(np.mean([-np.dot(row, np.log(row)) for row in probabilities])))
        extra += (0.01 * balance + 0.001 * z).item()
    assert len(seen) == 2 and sum(drops) > 0
    assert float(found["expert_load"]) == pytest.approx(max(loads))
    assert float(found["drop_rate"]) == pytest.approx(np.mean(drops))
    assert float(found["router_entropy"]) == pytest.approx(np.mean(entropies))
    auxiliary = model.auxiliary_loss()
    assert auxiliary is not None and auxiliary.item() == pytest.approx(extra)
    assert model.auxiliary_loss() is None, "it is given once"
    model.eval()(tiny_batch(seed=1))
    assert model.monitors() == found, "evaluation is no training forward"


# --- the model


@pytest.mark.parametrize("case", shapes(norm=("pre", "post"), switch_every=(1, 2)), ids=str)
def test_logits_equal_a_loop_over_units_and_tokens(case: dict[str, Any]) -> None:
    model, batch = tiny_switch(**case, positions="learned").eval(), tiny_batch()
    expected = references.logits(dict(model.named_parameters()), model.config, batch)
    assert_close(model(batch), expected)


def test_a_copy_after_a_step_has_no_graph() -> None:
    model = tiny_switch()
    model(tiny_batch())
    assert copy.deepcopy(model).auxiliary_loss() is None
    assert model.auxiliary_loss() is not None


def test_size_of_the_papers_model() -> None:
    """85 M weights of the blocks act on a token, as in BERT-base; a block has 8 experts."""
    config = resolve(composed("model=switch", "selection=experts")).model
    with torch.device("meta"):
        model = Switch(config, 100, 128)
    names = dict(model.blocks.named_parameters())
    heads = sum(p.numel() for n, p in names.items() if "attention." in n and p.dim() == 2)
    experts = sum(p.numel() for p in names.values() if p.dim() == 3)
    assert heads + experts // 8 == 12 * 12 * 768**2 == 84_934_656
    assert experts // 8 == 12 * 8 * 768**2
