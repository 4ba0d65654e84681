"""The mNTK estimator on ordinary models against explicit Jacobians in float64."""

import copy
from typing import Any

import jacobians
import numpy as np
import pytest
import torch
from jacobians import CASES, Case, assert_equal, estimate, reference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mat import kernels, ntk
from mat.taps import Tape
from mat.units import Part, UnitLayer, Units

REDUCTIONS: list[tuple[ntk.Reduction, int]] = [("full", 1), ("sum", 1), ("loss", 1), ("random", 3)]


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


def test_the_signs_are_those_of_the_kernels() -> None:
    case, _, units = reference("irregular")
    reducer = ntk.Reducer("random", 3, 7, 4)
    signs = reducer.signs(case.model(case.batch), 4)
    assert torch.equal(signs, weights(case, units[0].shape, "random", 3))


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


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS: list[dict[str, Tensor]] = [
    {},
    {"attn_mask": torch.ones(4, 5).triu(2).bool()},
    {"attn_mask": torch.randn(6, 4, 5).double(), "key_padding_mask": -2.0 * PADDING.double()},
    {"key_padding_mask": PADDING},
]


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "+".join(masks) or "none")
@pytest.mark.parametrize("batch_first", [True, False])
def test_recorded_attention_gives_the_outputs_of_the_module(
    masks: dict[str, Tensor], batch_first: bool
) -> None:
    module = nn.MultiheadAttention(6, 3, batch_first=batch_first).double().eval()
    units = Units([UnitLayer("heads", "", 3, [Part.even("out_proj.weight", 1, 3, 6)])])
    query, key = torch.randn(2, 4, 6).double(), torch.randn(2, 5, 6).double()
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    expected = module(query, key, key, **masks, need_weights=False)[0]
    with Tape(module, units) as tape:
        tape.begin(2)
        result = module(query, key, key, **masks)[0]
        assert len(tape.taps) == 1
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


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
