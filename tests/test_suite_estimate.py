"""The estimator on the suite's models against explicit Jacobians in float64."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradients import attach, jacobian, unit_jacobian
from small_models import tiny_batch, tiny_bert, tiny_images, tiny_switch, tiny_vgg
from torch import Tensor

import mat
from mat import ntk
from mat.suite.config import MethodConfig, SelectionConfig
from mat.suite.methods import Method


def switch_with_an_unused_expert() -> Any:
    """No token of the probe goes to expert 1 of the first layer; two tokens fit into an expert."""
    model = tiny_switch(capacity_factor=0.5)
    with torch.no_grad():
        norm = model.get_submodule("blocks.0.ffn_norm")
        model.get_parameter("blocks.0.ffn.router.weight")[1] = -100 * norm.bias
        norm.bias.mul_(10)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "bert": tiny_bert,
    "bert post": lambda: tiny_bert(norm="post", positions="learned"),
    "switch": switch_with_an_unused_expert,
    "vgg": tiny_vgg,
}
Measured = tuple[Any, Any, mat.Gates, dict[str, Tensor]]


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest) -> Measured:
    """A model with a third of its units active, its probe and its Jacobian."""
    model = MODELS[request.param]()
    batch: Any = tiny_images(samples=3) if request.param == "vgg" else tiny_batch(samples=3)
    gates = attach(model)
    gates.set_active(np.arange(len(gates.units)) % 3 == 0)
    return model, batch, gates, jacobian(model, batch)


def rows(measured: Measured, weight: Tensor) -> list[Tensor]:
    """Jacobians (r, p) of all units, for weights (m, n, k) of the outputs; projections first."""
    _, _, gates, found = measured
    columns = [unit_jacobian(found, la, u) for la in gates.units.layers for u in range(la.n_units)]
    return [torch.einsum("mnk,nkp->mnp", weight, j).flatten(0, 1) for j in columns]


@pytest.mark.parametrize("memory_bytes", [2000, 2**25])
def test_kernels_equal_the_explicit_jacobian(measured: Measured, memory_bytes: int) -> None:
    """Whatever the gates say; statistics of batch norm are constants, and no token is dropped."""
    model, batch, _, found = measured
    result = ntk.estimate(
        model, batch, reduction="full", rest=True, kernels=True, memory_bytes=memory_bytes
    )
    k = next(iter(found.values())).shape[1]
    weight = torch.eye(k, dtype=torch.float64)[:, None].expand(-1, batch.samples, -1)
    expected = torch.stack([j @ j.T for j in rows(measured, weight)])
    torch.testing.assert_close(result.kernels, expected, rtol=1e-9, atol=1e-9)
    flat = torch.cat([j.flatten(2) for j in found.values()], 2).transpose(0, 1).flatten(0, 1)
    total = result.kernel_of(model, model)
    torch.testing.assert_close(total, flat @ flat.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reduction, m", [("random", 2), ("sum", 1), ("loss", 1)])
def test_a_probe_in_several_batches_changes_nothing(
    measured: Measured, reduction: ntk.Reduction, m: int
) -> None:
    model, batch, _, _ = measured
    options: dict[str, Any] = {"loss": model.loss_of_outputs, "kernels": True}
    options |= {"reduction": reduction, "projections": m}
    whole = ntk.estimate(model, batch, **options).kernels
    parts = ntk.estimate(model, batch.split(2), **options).kernels
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-10)


def test_random_projections_are_the_full_kernel_projected(measured: Measured) -> None:
    model, batch, _, _ = measured
    result = ntk.estimate(model, batch, projections=2, seed=7, kernels=True)
    reducer, outputs = ntk.Reducer("random", 2, 7, batch.samples), model.eval()(batch).detach()
    vectors = reducer.cotangents(outputs, batch, outputs, 0, batch.samples)
    signs = torch.stack([vector.view(batch.samples, -1) for vector, _ in vectors])  # (m, n, k)
    expected = torch.stack([j @ j.T / 2 for j in rows(measured, signs)])
    torch.testing.assert_close(result.kernels, expected, rtol=1e-9, atol=1e-9)


def test_an_estimate_leaves_the_model_as_it_was(measured: Measured) -> None:
    model, batch, gates, _ = measured
    before, active = copy.deepcopy(model.train().state_dict()), gates.active.copy()
    ntk.estimate(model, batch)
    assert model.training and (gates.active == active).all()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_expert_without_tokens_never_stops() -> None:
    model, batch = switch_with_an_unused_expert(), tiny_batch()
    units = attach(model, kinds=["experts"]).units
    selection = SelectionConfig(units=["experts"], interval=0.05, mode="cut", share=1.0, beta=0.5)
    given = MethodConfig(name="mat", policy="threshold", temporal=True)
    method = Method(given, selection, units, 0)
    score = ntk.estimate(model, batch, units).lambda_max
    unused = score == 0
    assert unused[1] and not unused.all()
    for change in (0.0, 0.1, 0.11, 0.12):
        method.select(score * (1 + change))
    assert method.state.stopped[~unused].all() and not method.state.stopped[unused].any()


def test_a_training_step_of_batch_norm_cannot_be_listened_to() -> None:
    model = tiny_vgg()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="couples the samples"), ntk.Online(model):
        model.loss(tiny_images())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
