"""The mNTK estimator on ordinary models against explicit Jacobians in float64."""

import copy
import functools
from typing import Any

import jacobians
import numpy as np
import pytest
import torch
from jacobians import CASES, Case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mat
from mat import kernels, ntk
from mat.units import Part, UnitLayer, Units

REDUCTIONS: list[tuple[ntk.Reduction, int]] = [("full", 1), ("sum", 1), ("loss", 1), ("random", 3)]


@functools.cache
def reference(name: str) -> tuple[Case, dict[str, Tensor], list[Tensor]]:
    case = jacobians.build(name)
    found = jacobians.jacobian(case)
    return case, found, jacobians.unit_jacobians(case, found)


def mean_square(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().mean()


def weights(case: Case, shape: torch.Size, reduction: ntk.Reduction, m: int) -> Tensor:
    """What multiplies the outputs in each projection, (m, n, k)."""
    n, k = shape[:2]
    if reduction == "full":
        return torch.eye(k, dtype=torch.float64)[:, None].expand(-1, n, -1)
    if reduction == "sum":
        return torch.full((1, n, k), k**-0.5, dtype=torch.float64)
    if reduction == "loss":
        model = jacobians.evaluated(case)
        outputs = torch.stack([case.outputs(model, single) for single in case.singles])
        return 2 * outputs[None].detach() / (n * k)
    signs = []
    for j in range(m):
        for i in range(n):
            stream = np.random.default_rng([7, j, i]).bytes(-(-k // 8))
            bits = "".join(f"{byte:08b}" for byte in stream)[:k]
            signs.append(torch.tensor([2.0 * int(bit) - 1 for bit in bits], dtype=torch.float64))
    return torch.stack(signs).view(m, n, k)


def estimate(case: Case, **options: Any) -> ntk.Mntk:
    """With kernels and signs of seed 7."""
    settings = {"loss": mean_square, "kernels": True, "seed": 7, **case.options, **options}
    return ntk.estimate(case.model, settings.pop("batch", case.batch), case.units, **settings)


def assert_equal(a: Tensor | None, b: Tensor | None, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2 * rtol)


# --- against the explicit Jacobian


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction, m", REDUCTIONS)
def test_equals_the_explicit_jacobian(name: str, reduction: ntk.Reduction, m: int) -> None:
    case, _, units = reference(name)
    result = estimate(case, reduction=reduction, projections=m, spectrum=True)
    weight = weights(case, units[0].shape, reduction, m)
    expected = torch.stack([jacobians.kernel(j, weight) for j in units]) / m
    assert_equal(result.kernels, expected, case.rtol)
    top = torch.linalg.eigvalsh(expected)[:, -1]
    assert_equal(torch.from_numpy(result.lambda_max), top, case.rtol)
    assert_equal(torch.from_numpy(result.squared_norm), expected.sum((1, 2)), 10 * case.rtol)
    assert result.spectrum is not None
    np.testing.assert_allclose(result.spectrum[:, -1], result.lambda_max, rtol=1e-12)
    assert (result.samples, result.outputs) == units[0].shape[:2]
    assert (result.reduction, result.projections) == (reduction, m)


@pytest.mark.parametrize("name", CASES)
def test_all_kernels_add_up_to_the_full_ntk(name: str) -> None:
    """Eq. (1), and so the largest unit's lambda <= that of the NTK."""
    case, found, units = reference(name)
    result = estimate(case, reduction="full", rest=True)
    weight = weights(case, units[0].shape, "full", 1)
    full = torch.stack([jacobians.kernel(j.flatten(2), weight) for j in found.values()]).sum(0)
    assert_equal(result.kernel_of(case.model, case.model), full, case.rtol)
    assert result.lambda_max.max() <= float(torch.linalg.eigvalsh(full)[-1]) * (1 + 1e-6)


def test_a_block_has_the_kernel_of_its_parameters() -> None:
    case, found, units = reference("bert")
    result = estimate(case, reduction="random", projections=2, rest=True)
    weight = weights(case, units[0].shape, "random", 2) / 2**0.5
    layers = case.model.bert.encoder.layer
    columns = [j.flatten(2) for name, j in found.items() if ".layer.1." in name]
    expected = jacobians.kernel(torch.cat(columns, 2), weight)
    assert_equal(result.kernel_of(case.model, layers[1]), expected)
    with pytest.raises(ValueError, match="partly outside"):
        result.kernel_of(case.model, layers[1].attention.self)
    with pytest.raises(ValueError, match="needs an estimate with kernels and rest"):
        estimate(case).kernel_of(case.model, layers[1])


def test_loss_gives_the_norm_of_each_units_gradient() -> None:
    case, _, _ = reference("llama")
    result = estimate(case, reduction="loss")
    model = copy.deepcopy(case.model).eval()
    case.output(model(**case.batch)).square().mean().backward()
    expected = []
    for layer in case.units.layers:
        for u in range(layer.n_units):
            squares = []
            for part in layer.parts:
                own = torch.from_numpy(np.flatnonzero(part.owner == u))
                gradient = model.get_parameter(part.parameter).grad
                squares.append(float(gradient.index_select(part.dim, own).square().sum()))
            expected.append(sum(squares))
    np.testing.assert_allclose(result.squared_norm, expected, rtol=1e-9)


def test_the_models_own_loss_is_taken() -> None:
    case, _, _ = reference("bert")
    batch = case.batch | {"labels": torch.tensor([0, 2, 1])}
    result = estimate(case, batch=batch, reduction="loss", loss=None)

    def loss(outputs: Tensor, _: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])

    assert_equal(result.kernels, estimate(case, reduction="loss", loss=loss).kernels)


def test_random_projections_have_the_exact_trace_on_average() -> None:
    """Within four standard errors of 200 projections, for every unit."""
    case, _, units = reference("irregular")
    exact = torch.stack([j.square().sum() for j in units[:3]])  # the fourth has no randomness
    traces = []
    for seed in range(20):
        result = estimate(case, projections=10, seed=seed).kernels
        assert result is not None
        traces.append(result.diagonal(dim1=1, dim2=2).sum(1)[:3])
    found = torch.stack(traces)
    error = (found.mean(0) - exact).abs() / (found.std(0) / len(found) ** 0.5)
    assert (error < 4).all(), f"standard errors off: {error.tolist()}"


def test_more_samples_and_projections_add_signs_and_change_none() -> None:
    case, _, _ = reference("irregular")
    large = estimate(case, projections=3).kernels
    small = estimate(case, batch=case.batch[:2], projections=2).kernels
    assert large is not None and small is not None
    rows = torch.tensor([j * 4 + i for j in range(2) for i in range(2)])
    assert_equal(3 * large[:, rows][:, :, rows], 2 * small)


def test_cosine_scales_every_row_to_length_one() -> None:
    case, _, _ = reference("bert")
    plain, scaled = estimate(case), estimate(case, normalize="cosine")
    assert plain.kernels is not None
    length = plain.kernels.diagonal(dim1=1, dim2=2).sqrt()
    expected = plain.kernels / (length[:, :, None] * length[:, None, :])
    assert_equal(scaled.kernels, expected)
    top = torch.linalg.eigvalsh(expected)[:, -1]
    assert_equal(torch.from_numpy(scaled.lambda_max), top)
    np.testing.assert_array_equal(scaled.squared_norm, plain.squared_norm)
    with pytest.raises(ValueError, match="drop one"):
        estimate(case, normalize="cosine", rest=True)


@pytest.mark.parametrize("name", ["bert", "filters", "stacked_experts"])
def test_a_small_memory_bound_changes_nothing(name: str) -> None:
    case, _, _ = reference(name)
    expected = estimate(case, projections=2).kernels
    for memory_bytes in (1, 2000):
        assert_equal(estimate(case, projections=2, memory_bytes=memory_bytes).kernels, expected)


# --- probes


@pytest.mark.parametrize("name", ["irregular", "filters", "stacked_experts"])
@pytest.mark.parametrize("reduction, m", REDUCTIONS)
def test_several_batches_equal_one(name: str, reduction: ntk.Reduction, m: int) -> None:
    case, _, _ = reference(name)
    options: dict[str, Any] = {"reduction": reduction, "projections": m, "rest": True}
    expected = estimate(case, **options)
    result = estimate(case, batch=list(case.batch.split([1, len(case.batch) - 1])), **options)
    assert_equal(result.kernels, expected.kernels)
    torch.testing.assert_close(result.rest, expected.rest, rtol=1e-9, atol=1e-11)
    assert (result.samples, result.outputs) == (len(case.batch), expected.outputs)


def test_batches_may_have_different_lengths() -> None:
    """And samples different numbers of tokens: padding changes nothing."""
    case, _, _ = reference("bert")
    expected = estimate(case, projections=2).kernels
    assert_equal(estimate(case, batch=case.singles, projections=2).kernels, expected)


def test_batch_norm_wants_batches_of_one_shape() -> None:
    case, _, _ = reference("filters")
    with pytest.raises(ValueError, match="differ in the number of samples only"):
        estimate(case, batch=[case.batch, case.batch[:, :, :5]])


def test_rows_may_be_flat_and_grouped_by_sample() -> None:
    """(n T, q) inside, whatever the outputs are grouped as."""
    case, _, _ = reference("reused")

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = case.model.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1))

    parts = [Part.even(f"layer.{name}", 0, 2, 4) for name in ("weight", "bias")]
    units = Units([UnitLayer("neurons", "layer", 2, parts)])
    options: dict[str, Any] = {"reduction": "full", "kernels": True}
    flat = ntk.estimate(Flat(), case.batch, units, **options)
    linear = Units(
        [UnitLayer("neurons", "", 2, [Part(p.parameter[6:], 0, p.owner) for p in parts])]
    )
    deep = ntk.estimate(case.model.layer, (case.batch,), linear, **options)
    assert_equal(flat.kernels, deep.kernels)


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
    for reduction, m in REDUCTIONS:
        estimate(case, reduction=reduction, projections=m, rest=name == "filters")
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


def test_parameters_that_do_not_train_are_left_out() -> None:
    case = jacobians.build("irregular")
    _, found, _ = reference("irregular")
    case.model[0].weight.requires_grad_(False)
    kept = dict(found)
    kept["0.weight"] = torch.zeros_like(found["0.weight"])
    units = jacobians.unit_jacobians(case, kept)
    weight = weights(case, units[0].shape, "full", 1)
    expected = torch.stack([jacobians.kernel(j, weight) for j in units])
    assert_equal(estimate(case, reduction="full").kernels, expected)
    case.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no unit to measure"):
        estimate(case)


def test_bfloat16_autocast_keeps_the_eigenvalues() -> None:
    """8 bits a value: within 5 % of float64; kernels are float32."""
    case = jacobians.build("bert")
    expected = estimate(case, projections=4).lambda_max
    case.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        result = estimate(case, projections=4)
    np.testing.assert_allclose(result.lambda_max, expected, rtol=0.05)
    assert result.kernels is not None and result.kernels.dtype == torch.float32


# --- what it costs


@pytest.mark.parametrize("m", [1, 50])  # the second with Lanczos
@pytest.mark.parametrize("name", ["irregular", "bert", "filters", "stacked_experts"])
def test_flops_are_what_a_counter_sees(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an estimate counts, without its forward and backward passes."""
    case, _, _ = reference(name)
    shapes = ntk.kernel_shapes(case.model, case.batch, case.units, samples=case.samples)
    with counter() as whole:
        estimate(case, projections=m)

    def nothing(self: kernels.Kernels, product: Any) -> None:
        self._add(product.groups[0], torch.ones(product.groups[0].count, 1, 1))

    monkeypatch.setattr(kernels.Kernels, "_contract", nothing)
    with counter() as passes:
        estimate(case, projections=m)
    expected = ntk.kernel_flops(shapes, len(case.units), m * len(case.singles))
    assert whole.get_total_flops() - passes.get_total_flops() == expected > 0


def counter() -> FlopCounterMode:
    def batched(_: Any, a: Any, b: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
        return int(2 * a[0] * a[1] * a[2] * b[2])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: batched})


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
