"""What the mNTK estimator leaves as it was, what it refuses, and estimates off training steps."""

from typing import Any

import jacobians
import numpy as np
import pytest
import torch
from jacobians import Case, assert_equal, estimate, mean_square, reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mat
from mat import ntk
from mat.units import Part, UnitLayer, Units

REDUCTIONS: list[ntk.Reduction] = ["full", "sum", "loss", "random"]


# --- the model stays as it was


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "versions": {n: p._version for n, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
        "active": model._gates.active.copy() if hasattr(model, "_gates") else None,
        "random": torch.get_rng_state(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_unchanged(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_unchanged(before[key], after[key], f"{where} {key}")
    elif isinstance(before, Tensor | np.ndarray):
        assert (before == after).all(), where
    else:
        assert before == after, where


@pytest.mark.parametrize("name", ["bert", "filters", "sequence_first", "mixtral"])
def test_the_estimator_is_pure(name: str) -> None:
    """In the middle of training: gradients, gates partly closed, modes and requires_grad mixed."""
    case = jacobians.build(name)
    gated = name in ("bert", "mixtral")
    if gated:
        gates = mat.attach_(case.model, units=case.units)
        gates.set_active(np.arange(len(case.units)) % 2 == 0)
    case.model.train()
    next(case.model.children()).eval()
    for parameter in list(case.model.parameters())[-2:]:
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)
    before = everything(case.model)
    for reduction in REDUCTIONS:
        estimate(case, reduction=reduction, projections=2, rest=name == "filters")
    with pytest.raises(ValueError, match="cannot be split evenly"):
        estimate(case, output=lambda result: torch.zeros(7, 1))
    assert_unchanged(before, everything(case.model))


def test_the_estimate_depends_on_neither_gates_nor_mode() -> None:
    case = jacobians.build("bert")
    expected = estimate(case).lambda_max
    gates = mat.attach_(case.model, units=case.units)
    gates.set_active(np.zeros(len(case.units), bool))
    for mode in (True, False):
        case.model.train(mode)
        with torch.no_grad():
            result = ntk.estimate(case.model, case.batch, seed=7)  # units: those attached
        np.testing.assert_array_equal(result.lambda_max, expected)


def test_bfloat16_autocast_keeps_the_eigenvalues() -> None:
    """8 bits a value: within 5 % of float64; kernels are float32."""
    case = jacobians.build("bert")
    expected = estimate(case, projections=4).lambda_max
    case.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        result = estimate(case, projections=4)
    np.testing.assert_allclose(result.lambda_max, expected, rtol=0.05)
    assert result.kernels is not None and result.kernels.dtype == torch.float32


# --- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_unit_that_is_not_finite_is_named(value: float) -> None:
    case = jacobians.build("irregular")
    with torch.no_grad():
        case.model[2].weight[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"units 0\.weight wide has values that are not"):
        estimate(case)


def test_a_layer_that_is_not_reached_is_named() -> None:
    case = jacobians.build("reused")
    case.model.forward = lambda x: case.model.layer(x).mean(1)
    estimate(case)
    case.model.forward = lambda x: (x * case.model.layer.bias).mean(1)
    with pytest.raises(ValueError, match=r"layer\.weight met no input"):
        estimate(case)
    case.model.forward = lambda x: (case.model.layer(x) * 0).detach() + x
    with pytest.raises(ValueError, match="outputs do not depend on"):
        estimate(case)


def test_kinds_of_layers_without_a_record_are_named() -> None:
    norm = nn.Sequential(nn.LayerNorm(4))
    units = Units([UnitLayer("parts", "0", 2, [Part.even("0.weight", 0, 2, 4)])])
    with pytest.raises(ValueError, match=r"0\.weight cannot be measured: its module, a LayerNorm"):
        ntk.estimate(norm, torch.zeros(2, 4), units)
    with pytest.raises(ValueError, match=r"another model's: this has no 0\.weight"):
        ntk.estimate(nn.Linear(4, 4), torch.zeros(2, 4), units)


def test_samples_that_cannot_be_told_apart_are_refused() -> None:
    """Positions first, and as many positions as samples."""
    layer = nn.TransformerEncoderLayer(4, 1, 4)
    units = Units([UnitLayer("ffn", "", 2, [Part.even("linear1.weight", 0, 2, 4)])])
    for length in (3, 6):
        x = torch.randn(length, 3, 4)
        options: dict[str, Any] = {"output": lambda y: y.mean(0), "samples": 3}
        if length == 3:
            with pytest.raises(ValueError, match="3 samples cannot be told apart"):
                ntk.estimate(layer, x, units, **options)
        else:
            assert ntk.estimate(layer, x, units, **options).samples == 3
    with pytest.raises(ValueError, match="give samples="):
        ntk.estimate(layer, "text", units)


class Spoiling(nn.Module):
    """Changes the input of its layer after the use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.layer(x)
        x.mul_(2)
        return y


def test_work_in_place_on_an_input_is_refused() -> None:
    units = Units([UnitLayer("ffn", "", 2, [Part.even("layer.weight", 0, 2, 4)])])
    with pytest.raises(ValueError, match="the input of layer is changed in place after its use"):
        ntk.estimate(Spoiling(), torch.randn(2, 4), units)


def test_senseless_wishes_are_refused_in_a_sentence() -> None:
    case, _, _ = reference("irregular")
    with pytest.raises(ValueError, match="wanted one of random, sum, full, loss"):
        estimate(case, reduction="mean")
    with pytest.raises(ValueError, match="projections=0"):
        estimate(case, projections=0)
    with pytest.raises(ValueError, match="needs loss="):
        estimate(case, reduction="loss", loss=None)
    with pytest.raises(ValueError, match="pick the outputs by output="):
        estimate(case, output=lambda result: "text")


# --- online


@pytest.mark.parametrize("name", ["irregular", "stacked_experts", "llama"])
def test_online_equals_the_loss_reduction_and_leaves_the_step(name: str) -> None:
    """Kernels of a step without dropout; its gradients are bitwise those of a plain step."""
    case, plain = jacobians.build(name), jacobians.build(name)

    def step(case: Case) -> None:
        result = case.model(**case.batch) if name == "llama" else case.model(case.batch)
        mean_square(result if case.output is None else case.output(result), None).backward()

    with ntk.Online(case.model, case.units) as online:
        step(case)
    step(plain)
    for p, q in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    result = online.result(kernels=True)
    assert_equal(result.kernels, estimate(plain, reduction="loss").kernels)
    assert (result.samples, result.reduction) == (len(case.singles), "loss")


def test_online_takes_micro_batches_for_one_step() -> None:
    case, _, _ = reference("irregular")
    with ntk.Online(case.model, case.units) as online:
        for part in case.batch.split(2):
            (mean_square(case.model(part), None) / 2).backward()
    expected = estimate(case, reduction="loss").kernels
    assert_equal(online.result(kernels=True).kernels, expected)


class Checkpointed(nn.Module):
    """Runs its inner model with gradient checkpointing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


def test_online_counts_a_recomputed_layer_once() -> None:
    case, _, _ = reference("irregular")
    parts = case.units.layers[0].parts
    inner = [Part(f"inner.{part.parameter}", part.dim, part.owner) for part in parts]
    units = Units([UnitLayer("units", "inner", case.units.layers[0].n_units, inner)])
    model = Checkpointed(case.model)
    with ntk.Online(model, units) as online:
        mean_square(model(case.batch), None).backward()
    expected = estimate(case, reduction="loss").kernels
    assert expected is not None
    assert_equal(online.result(kernels=True).kernels, expected[: len(units)])


def test_online_refuses_what_it_cannot_measure() -> None:
    case = jacobians.build("bert")
    with ntk.Online(case.model, case.units) as online:
        case.model(**case.batch)
    with pytest.raises(ValueError, match="needs the backward pass"):
        online.result()
    mat.attach_(case.model, units=case.units).set_active(np.arange(len(case.units)) > 0)
    with pytest.raises(ValueError, match="all units are active"), ntk.Online(case.model):
        pass
    filters = jacobians.build("filters")
    with pytest.raises(ValueError, match="batch norm"), ntk.Online(filters.model, filters.units):
        pass
