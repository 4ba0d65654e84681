"""The mNTK estimator against an explicit Jacobian, one sample and one output at a time, in float64."""

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import naive
import numpy as np
import pytest
import torch
from mat.suite.bert import Bert
from mat.suite.units import UnitIndex, UnitLayer, unit_layers
from tiny import MASKED, VOCABULARY, tiny_batch, tiny_bert
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mat import gram
from mat.suite import ntk
from mat.suite.data.masking import MaskedBatch
from mat.suite.interface import UnitModel

SAMPLES, OUTPUTS = 4, MASKED * VOCABULARY
FORMS = [("pre", "rotary"), ("post", "learned")]
REDUCTIONS: list[tuple[ntk.Reduction, int]] = [("full", 1), ("sum", 1), ("loss", 1), ("random", 1), ("random", 3)]


@functools.cache
def model_of(norm: str, positions: str) -> Bert:
    return tiny_bert(norm=norm, positions=positions)


@functools.cache
def jacobian_of(norm: str, positions: str) -> dict[str, Tensor]:
    return naive.jacobian(model_of(norm, positions), tiny_batch(samples=SAMPLES))


def index_of(model: nn.Module, kinds: Sequence[str] | None = None) -> UnitIndex:
    return UnitIndex(unit_layers(model), kinds)


def estimate(model: UnitModel, batch: MaskedBatch | None = None, **options: Any) -> ntk.Mntk:
    """With spectrum and kernels."""
    batch = tiny_batch(samples=SAMPLES) if batch is None else batch
    return ntk.estimate(model, batch, index_of(model), spectrum=True, kernels=True, **options)


def unit_jacobians(model: nn.Module, jacobian: dict[str, Tensor]) -> list[Tensor]:
    """(n, k, p) of every unit in the order of the index."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, UnitLayer)]
    return [naive.unit_jacobian(jacobian, name, u) for name, layer in layers for u in range(layer.n_units)]


def weights(model: UnitModel, reduction: ntk.Reduction, projections: int, seed: int) -> Tensor:
    """What multiplies the outputs in each projection, (projections, n, k)."""
    if reduction == "full":
        return torch.eye(OUTPUTS, dtype=torch.float64)[:, None].expand(-1, SAMPLES, -1)
    if reduction == "sum":
        return torch.full((1, SAMPLES, OUTPUTS), OUTPUTS**-0.5, dtype=torch.float64)
    if reduction == "loss":  # d mean cross-entropy / d logits = (softmax - one-hot) / P
        batch = tiny_batch(samples=SAMPLES)
        one_hot = torch.eye(VOCABULARY, dtype=torch.float64)[batch.targets]
        return ((torch.softmax(model(batch).detach(), -1) - one_hot) / len(one_hot)).view(1, SAMPLES, OUTPUTS)
    return torch.stack([torch.stack([signs(seed, j, i) for i in range(SAMPLES)]) for j in range(projections)])


def signs(seed: int, projection: int, sample: int) -> Tensor:
    """(k,) random signs, the bits of a generator of their own."""
    stream = np.random.default_rng([seed, projection, sample]).bytes(-(-OUTPUTS // 8))
    bits = "".join(f"{byte:08b}" for byte in stream)[:OUTPUTS]
    return torch.tensor([2.0 * int(bit) - 1 for bit in bits], dtype=torch.float64)


def kernel(jacobian: Tensor, weight: Tensor) -> Tensor:
    """(rows, rows) of a Jacobian (n, k, p) whose outputs are reduced by (m, n, k); rows are projection-major."""
    rows = torch.stack([torch.stack([w[i] @ jacobian[i] for i in range(len(jacobian))]) for w in weight])
    return rows.flatten(0, 1) @ rows.flatten(0, 1).T


def full_kernel(jacobian: Tensor) -> Tensor:
    """(nk, nk), rows output-major as in the estimator."""
    flat = jacobian.transpose(0, 1).flatten(0, 1)
    return flat @ flat.T


# --- against the naive reference


@pytest.mark.parametrize("norm, positions", FORMS)
@pytest.mark.parametrize("reduction, projections", REDUCTIONS)
def test_equals_the_naive_kernels(reduction: ntk.Reduction, projections: int, norm: str, positions: str) -> None:
    model = model_of(norm, positions)
    found = estimate(model, reduction=reduction, projections=projections, seed=7)
    weight = weights(model, reduction, projections, seed=7)
    expected = torch.stack([kernel(j, weight) for j in unit_jacobians(model, jacobian_of(norm, positions))])
    if reduction == "random":
        expected /= projections
    assert found.kernels is not None and found.spectrum is not None
    torch.testing.assert_close(found.kernels, expected, rtol=1e-10, atol=1e-10)
    eigenvalues = torch.linalg.eigvalsh(expected)
    torch.testing.assert_close(torch.from_numpy(found.lambda_max), eigenvalues[:, -1], rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.from_numpy(found.spectrum), eigenvalues.clamp_min(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(found.squared_norm), expected.sum((1, 2)), rtol=1e-9, atol=1e-9)
    assert (found.samples, found.outputs, found.reduction) == (SAMPLES, OUTPUTS, reduction)
    assert found.projections == (projections if reduction == "random" else 1)


def test_loss_reduction_gives_the_norm_of_each_units_gradient() -> None:
    model, batch = tiny_bert(), tiny_batch()
    found = estimate(model, batch, reduction="loss")
    model.loss(batch).backward()
    expected = [
        sum(float(p.grad[u].square().sum()) for p in layer.unit_parameters().values() if p.grad is not None)
        for layer in unit_layers(model) for u in range(layer.n_units)
    ]  # fmt: skip
    np.testing.assert_allclose(found.squared_norm, expected, rtol=1e-10)


def test_heads_alone_have_the_rows_of_all_units() -> None:
    model, batch = tiny_bert(), tiny_batch()
    every, heads = index_of(model), index_of(model, ["heads"])
    found = ntk.estimate(model, batch, heads, reduction="random", projections=2)
    expected = ntk.estimate(model, batch, every, reduction="random", projections=2).lambda_max
    assert len(found.lambda_max) == len(heads) == 6
    np.testing.assert_allclose(found.lambda_max, expected[every.kind == "heads"], rtol=1e-12)


# --- identities


@pytest.mark.parametrize("norm, positions", FORMS)
def test_unit_kernels_and_the_rest_add_up_to_the_full_ntk(norm: str, positions: str) -> None:
    """And so lambda of the largest unit <= lambda of the full NTK <= the sum of all lambdas, the rest's included."""
    model, jacobian = model_of(norm, positions), jacobian_of(norm, positions)
    found = estimate(model, reduction="full")
    gated = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, UnitLayer) for p in m.unit_parameters()}
    rest = sum(full_kernel(j.flatten(2)) for name, j in jacobian.items() if name not in gated)
    full = full_kernel(torch.cat([j.flatten(2) for j in jacobian.values()], -1))
    assert found.kernels is not None and isinstance(rest, Tensor) and gated < jacobian.keys()
    torch.testing.assert_close(found.kernels.sum(0) + rest, full, rtol=1e-10, atol=1e-10)
    top = float(torch.linalg.eigvalsh(full)[-1])
    of_rest = float(torch.linalg.eigvalsh(rest)[-1])
    assert found.lambda_max.max() <= top <= found.lambda_max.sum() + of_rest


def test_both_orders_of_the_jacobian_share_lambda_max() -> None:
    model = model_of(*FORMS[0])
    found = estimate(model, reduction="full").lambda_max
    flat = [j.flatten(0, 1) for j in unit_jacobians(model, jacobian_of(*FORMS[0]))]
    np.testing.assert_allclose(found, [float(torch.linalg.eigvalsh(j.T @ j)[-1]) for j in flat], rtol=1e-10)


@pytest.mark.parametrize("reduction, projections", REDUCTIONS)
def test_kernels_are_symmetric_and_positive_semi_definite(reduction: ntk.Reduction, projections: int) -> None:
    found = estimate(model_of(*FORMS[0]), reduction=reduction, projections=projections)
    assert found.kernels is not None
    torch.testing.assert_close(found.kernels, found.kernels.mT, rtol=0, atol=1e-10)
    lowest = torch.linalg.eigvalsh(found.kernels)[:, 0]
    assert (lowest > -1e-12 * torch.from_numpy(found.lambda_max)).all(), f"lowest eigenvalues {lowest.tolist()}"


class Scaled(UnitModel):
    """A model whose outputs are multiplied by c."""

    def __init__(self, model: Bert, c: float) -> None:
        super().__init__()
        self.model, self.c = model, c

    def forward(self, batch: MaskedBatch) -> Tensor:
        return self.c * self.model(batch)


@pytest.mark.parametrize("reduction", ["full", "sum", "random"])
def test_scaling_the_outputs_by_c_scales_lambda_by_c_squared(reduction: ntk.Reduction) -> None:
    model = model_of(*FORMS[0])
    expected = estimate(model, reduction=reduction).lambda_max
    np.testing.assert_allclose(estimate(Scaled(model, -3), reduction=reduction).lambda_max, 9 * expected, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["full", "sum", "loss"])
def test_permuting_the_samples_changes_nothing(reduction: ntk.Reduction) -> None:
    """Lambda stays and the kernels' rows move along; random signs belong to places, so they are no part of this."""
    model, batch = model_of(*FORMS[0]), tiny_batch(samples=SAMPLES)
    order = [2, 0, 3, 1]
    parts = [batch.split(SAMPLES)[i] for i in order]
    permuted = MaskedBatch(
        torch.cat([p.inputs for p in parts]),
        torch.cat([p.targets for p in parts]),
        torch.cat([p.positions + i * batch.length for i, p in enumerate(parts)]),
    )
    found, expected = estimate(model, permuted, reduction=reduction), estimate(model, batch, reduction=reduction)
    np.testing.assert_allclose(found.lambda_max, expected.lambda_max, rtol=1e-10)
    assert found.kernels is not None and expected.kernels is not None
    rows = torch.arange(expected.kernels.shape[1]).view(-1, SAMPLES)[:, order].flatten()
    torch.testing.assert_close(found.kernels, expected.kernels[:, rows][:, :, rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_bytes", [1, 1000, 10_000])
@pytest.mark.parametrize("reduction, projections", REDUCTIONS)
def test_chunking_changes_nothing(reduction: ntk.Reduction, projections: int, memory_bytes: int) -> None:
    model = model_of(*FORMS[0])
    options: dict[str, Any] = {"reduction": reduction, "projections": projections}
    found, expected = estimate(model, memory_bytes=memory_bytes, **options), estimate(model, **options)
    torch.testing.assert_close(found.kernels, expected.kernels, rtol=1e-12, atol=1e-12)


def test_random_projections_have_the_exact_trace_on_average() -> None:
    """The mean over 400 projections is within four standard errors of the exact trace, for every unit."""
    model = model_of(*FORMS[0])
    exact = estimate(model, reduction="full").kernels
    assert exact is not None
    expected = exact.diagonal(dim1=1, dim2=2).sum(1)
    traces = []
    for seed in range(20):
        kernels = estimate(model, reduction="random", projections=20, seed=seed).kernels
        assert kernels is not None
        traces.append(kernels.diagonal(dim1=1, dim2=2).sum(1))
    found = torch.stack(traces)  # (seeds, units)
    error = (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5)
    assert (error < 4).all(), f"standard errors off: {error.tolist()}"


def test_more_projections_bring_lambda_down_to_the_exact_one() -> None:
    """The stack over-estimates on average, the less the more there are (averaged kernels would go below instead)."""
    model = model_of(*FORMS[0])
    exact = estimate(model, reduction="full").lambda_max
    ratios = []
    for projections in (1, 3, 24):
        found = [estimate(model, projections=projections, seed=seed).lambda_max for seed in range(20)]
        ratios.append(float(np.mean(np.array(found) / exact)))
    assert ratios[0] > 1.2 and ratios[0] > ratios[1] > ratios[2], ratios
    assert abs(ratios[2] - 1) < 0.15, ratios


def test_same_seed_same_signs() -> None:
    model = model_of(*FORMS[0])
    first, again, other = (estimate(model, seed=s).lambda_max for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-3)


# --- Gram products

FACTORS = [(3, 5, 4, 6, 7), (4, 1, 1, 3, 2), (1, 6, 2, 1, 5), (6, 2, 3, 8, 8)]  # N, T, U, p, q


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("units, rows", [(1, 1), (2, 2), (100, 100)])
@pytest.mark.parametrize("contraction", ["gradients", "pairs"])
@pytest.mark.parametrize("sizes", FACTORS, ids=str)
def test_both_contractions_equal_the_gram_matrix_of_naive_gradients(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], contraction: Any, units: int, rows: int, bias: bool
) -> None:
    n, t, u, p, q = sizes
    random = torch.Generator().manual_seed(0)
    per_unit = torch.randn(n, t, u, p, generator=random, dtype=torch.float64)
    shared = torch.randn(n, t, q, generator=random, dtype=torch.float64)
    chunks = gram.Plan(contraction, 0, min(units, u), min(rows, p if contraction == "gradients" else n))
    monkeypatch.setattr(gram, "plan", lambda *args: chunks)
    found = gram.unit_gram([(per_unit, shared)], bias, memory_bytes=0)
    for v in range(u):
        gradients = [(per_unit[i, :, v].T @ shared[i]).flatten() for i in range(n)]
        flat = torch.stack([torch.cat([g, per_unit[i, :, v].sum(0)]) if bias else g for i, g in enumerate(gradients)])
        torch.testing.assert_close(found[v], flat @ flat.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes, contraction", [((2, 50, 1, 3, 2), "gradients"), ((2, 2, 1, 50, 60), "pairs")])
def test_the_cheaper_contraction_is_chosen(sizes: tuple[int, ...], contraction: str) -> None:
    n, t, u, p, q = sizes
    cost = {"gradients": 2 * n * u * p * q * (t + n), "pairs": 2 * n * n * t * t * (u * p + q)}
    chosen = gram.plan(*sizes, memory_bytes=2**30)
    assert (chosen.contraction, chosen.flops) == (contraction, cost[contraction])
    assert cost[contraction] == min(cost.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 40, 2, 6, 7), (3, 2, 2, 30, 30)], ids=["gradients", "pairs"])
def test_gram_products_are_float32(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """bf16 factors are exact inputs; ``gradients`` forms gradients in their precision (8 bits), then float32."""
    n, t, u, p, q = sizes
    random = torch.Generator().manual_seed(0)
    per_unit = torch.randn(n, t, u, p, generator=random).to(dtype)
    shared = torch.randn(n, t, q, generator=random).to(dtype)
    found = gram.unit_gram([(per_unit, shared)], True, memory_bytes=2**20)
    expected = gram.unit_gram([(per_unit.double(), shared.double())], True, memory_bytes=2**20)
    assert found.dtype == torch.float32
    formed_in_bf16 = dtype == torch.bfloat16 and gram.plan(*sizes, memory_bytes=2**20).contraction == "gradients"
    rtol = 2**-7 if formed_in_bf16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rtol * float(expected.max()))


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive at once in tensors made within."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
                self.bytes = max(self.bytes, sum(self.live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [2, 5, 40])
@pytest.mark.parametrize("sizes", [(64, 2, 4, 16, 64), (64, 16, 4, 32, 256)], ids=["pairs", "gradients"])
def test_working_memory_stays_under_the_bound(sizes: tuple[int, ...], divisor: int, dtype: torch.dtype) -> None:
    """Beside it there are the Gram matrices and copies of the factors, two of them at most in float32."""
    n, t, u, p, q = sizes
    needed = {"pairs": 4 * n * n * t * t * (2 * u + 1), "gradients": 4 * n * u * p * q}  # in one chunk
    memory_bytes = needed[gram.plan(*sizes, memory_bytes=2**30).contraction] // divisor
    beside = 4 * u * n * n + 2 * 4 * n * t * (u * p + q)
    per_unit, shared = torch.ones(n, t, u, p, dtype=dtype), torch.ones(n, t, q, dtype=dtype)
    with PeakMemory() as peak:
        gram.unit_gram([(per_unit, shared)], False, memory_bytes)
    used = peak.bytes - beside
    assert peak.bytes > 0 and used <= memory_bytes, f"{used / memory_bytes:.2f} of the bound"


@pytest.mark.parametrize("itemsize", [4, 8])
def test_a_plan_knows_how_large_numbers_are(itemsize: int) -> None:
    """Chunks of float64 are half as large under the same bound."""
    sizes, bound = (64, 16, 4, 32, 256), 2**20
    chosen = gram.plan(*sizes, bound, itemsize)
    assert chosen.contraction == "gradients"
    assert chosen.units * chosen.rows == bound // (2 * itemsize * 64 * 256)


def test_kernels_are_not_copied() -> None:
    """Where they are what needs memory: beside them there are one layer's at a time, and the factors."""
    model, batch = model_of(*FORMS[0]), tiny_batch(samples=SAMPLES)
    with PeakMemory() as peak:
        found = ntk.estimate(model, batch, projections=100, memory_bytes=2**20, kernels=True)
    assert found.kernels is not None
    assert peak.bytes < 2 * found.kernels.nbytes, f"{peak.bytes / found.kernels.nbytes:.2f} times the kernels"
    few = found.kernels[:, :100, :100].clone()
    with PeakMemory() as peak:
        ntk._eigenvalues(few, found.index, spectrum=True)
    assert 0 < peak.bytes < 1.1 * few.nbytes, "LAPACK works on a copy, and nothing else does"


@pytest.mark.parametrize("norm, positions", FORMS)
def test_bfloat16_autocast_keeps_the_eigenvalues(norm: str, positions: str) -> None:
    """8 bits a value: within 5 % of float64, far below the spread between units."""
    exact = model_of(norm, positions)
    model = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = estimate(model, reduction="random", projections=4)
    expected = estimate(exact, reduction="random", projections=4).lambda_max
    np.testing.assert_allclose(found.lambda_max, expected, rtol=0.05)
    assert found.kernels is not None and found.kernels.dtype == torch.float32


# --- purity


def everything(model: nn.Module) -> dict[str, Any]:
    """All that the estimator must leave as it was."""
    layers = unit_layers(model)
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "versions": {n: p._version for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "gates": [(layer.mode, layer.active.tolist(), layer.tape) for layer in layers],
        "unit gradients": [layer.gradient(n) for layer in layers for n in layer.unit_parameters()],
        "random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_unchanged(before[key], after[key], f"{where} {key}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, list) and before and isinstance(before[0], Tensor | None):
        for b, a in zip(before, after, strict=True):
            assert_unchanged(b, a, where)
    else:
        assert before == after, where


@pytest.fixture
def used_model() -> Bert:
    """In the middle of training: gates partly closed, gradients around, modes and requires_grad mixed."""
    model = tiny_bert(dropout=0.5)
    half_frozen(model)
    model.loss(tiny_batch(seed=1)).backward()
    model.train()
    model.blocks[0].eval()
    model.tokens.requires_grad_(False)
    return model


def half_frozen(model: nn.Module) -> None:
    for i, layer in enumerate(unit_layers(model)):
        layer.set_active(np.arange(layer.n_units) < i, "exact" if i % 2 else "cut")


@pytest.mark.parametrize("reduction, projections", REDUCTIONS)
def test_the_estimator_is_pure(used_model: Bert, reduction: ntk.Reduction, projections: int) -> None:
    before = everything(used_model)
    estimate(used_model, reduction=reduction, projections=projections)
    assert_unchanged(before, everything(used_model))


def test_the_estimator_is_pure_when_it_fails(used_model: Bert) -> None:
    before = everything(used_model)
    uneven = tiny_batch(samples=SAMPLES)
    uneven.positions = uneven.positions[:-1]
    with pytest.raises(ValueError, match="7 output rows cannot be split evenly into 4 samples"):
        estimate(used_model, uneven)
    assert_unchanged(before, everything(used_model))


def closed(model: Bert) -> None:
    for layer in unit_layers(model):
        layer.set_active(np.zeros(layer.n_units, bool), "cut")


@pytest.mark.parametrize("change", [half_frozen, closed, nn.Module.train, lambda m: m.requires_grad_(False)])
def test_the_estimate_depends_on_nothing_but_the_function(change: Callable[[Bert], Any]) -> None:
    """Not on gates, dropout, train or eval mode, nor on which parameters want gradients."""
    model = tiny_bert(dropout=0.5).eval()
    expected = estimate(model).lambda_max
    change(model)
    np.testing.assert_array_equal(estimate(model).lambda_max, expected)
    with torch.no_grad():
        np.testing.assert_array_equal(estimate(model).lambda_max, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    model = tiny_bert()
    with torch.no_grad():
        unit_layers(model)[1].get_parameter("in_weight")[0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        estimate(model)


def test_the_first_unit_that_is_not_finite_is_named() -> None:
    """A NaN that only one unit's kernel sees: its bias's gradient is fine, its own weight's is not."""
    model = tiny_bert()
    index = index_of(model)
    found = estimate(model).kernels
    assert found is not None
    found[3, 0, 1] = float("nan")
    row = f"{index.kind[3]} layer {index.layer[3]} unit {index.unit[3]}"
    with pytest.raises(FloatingPointError, match=f"{row} has values that are not finite .as those of 0 other"):
        ntk._eigenvalues(found, index, spectrum=False)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_lanczos_finds_the_top_eigenvalue_of_large_kernels(dtype: torch.dtype, rtol: float) -> None:
    """A decaying spectrum, a dominating value, low rank, the identity, and zero."""
    random = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(200, 200, generator=random, dtype=torch.float64)).Q
    decaying = (0.9 ** torch.arange(200)).double()
    spectra = [decaying, torch.cat([torch.tensor([50.0]), decaying[1:]]), (torch.arange(200) < 3).double() * decaying]
    spectra += [torch.ones(200), torch.zeros(200)]
    kernels = torch.stack([rows * values.double() @ rows.T for values in spectra]).to(dtype)
    found = torch.linalg.eigvalsh(ntk._krylov(kernels))[:, -1]
    expected = torch.tensor([1.0, 50.0, 1.0, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def test_large_kernels_have_the_eigenvalues_of_their_spectrum() -> None:
    model = model_of(*FORMS[0])
    index = index_of(model)
    options: dict[str, Any] = {"reduction": "random", "projections": ntk.DENSE // SAMPLES + 1}
    found = ntk.estimate(model, tiny_batch(samples=SAMPLES), index, **options).lambda_max
    expected = ntk.estimate(model, tiny_batch(samples=SAMPLES), index, spectrum=True, **options).lambda_max
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_autocast_rounds_no_eigenvalue_and_no_kernel_of_the_rest() -> None:
    """Products of gradients and all that follows them are float32, whatever the caller's context."""
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch(samples=SAMPLES)
    options: dict[str, Any] = {"reduction": "random", "projections": ntk.DENSE // SAMPLES + 1, "rest": True}
    with torch.autocast("cpu", torch.bfloat16):
        found = ntk.estimate(model, batch, kernels=True, **options)
    assert found.kernels is not None and found.rest is not None
    expected = torch.linalg.eigvalsh(found.kernels.double())[:, -1]
    np.testing.assert_allclose(found.lambda_max, expected.numpy(), rtol=1e-5)
    for name, kernel in found.rest.items():  # a bf16 product would round every entry to eight bits
        assert not torch.equal(kernel, kernel.bfloat16().float()) or not kernel.any(), name


# --- probes in several batches


@pytest.mark.parametrize("sizes", [(4, 4), (1, 5, 2)], ids=str)
@pytest.mark.parametrize("reduction, projections", REDUCTIONS)
def test_several_batches_equal_one(reduction: ntk.Reduction, projections: int, sizes: tuple[int, ...]) -> None:
    model, probe = model_of(*FORMS[0]), tiny_batch(samples=8)
    parts = [probe.take(rows) for rows in torch.arange(8).split(list(sizes))]
    expected = estimate(model, probe, reduction=reduction, projections=projections, rest=True)
    found = ntk.estimate(
        model, parts, reduction=reduction, projections=projections, spectrum=True, kernels=True, rest=True
    )
    torch.testing.assert_close(found.kernels, expected.kernels, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.rest, expected.rest, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.squared_norm, expected.squared_norm, rtol=1e-9)
    assert found.samples == 8 and found.outputs == expected.outputs


def test_the_same_batch_may_come_twice() -> None:
    """As samples of their own, with signs of their own."""
    model, probe = model_of(*FORMS[0]), tiny_batch(samples=2)
    rows = torch.tensor([0, 1, 0, 1])
    expected = estimate(model, probe.take(rows), projections=2).kernels
    found = ntk.estimate(model, [probe, probe], projections=2, kernels=True).kernels
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_activations_of_one_batch_are_alive_at_a_time() -> None:
    """Peak memory of four batches: one batch's graph, and of the others the factors only."""
    model = tiny_bert(length=32, dtype=torch.float32)
    probe = tiny_batch(samples=32, length=32)
    peaks = {}
    for parts in (1, 4):
        with PeakMemory() as peak:
            ntk.estimate(model, probe.split(parts))
        peaks[parts] = peak.bytes
    factors = 4 * 32 * 32 * sum(  # inputs and output gradients of every product, float32
        layer.n_units * p + q for layer in unit_layers(model) for p, q, _ in layer.product_shapes()
    )  # fmt: skip
    assert peaks[4] <= factors + (peaks[1] - factors) / 2, f"{peaks} beside {factors} of factors"


def test_more_samples_and_projections_add_signs_and_change_none() -> None:
    model, probe = model_of(*FORMS[0]), tiny_batch(samples=8)
    large = estimate(model, probe, projections=3, seed=5).kernels
    small = estimate(model, probe.split(2)[0], projections=2, seed=5).kernels
    assert large is not None and small is not None
    rows = torch.tensor([j * 8 + i for j in range(2) for i in range(4)])
    torch.testing.assert_close(3 * large[:, rows][:, :, rows], 2 * small, rtol=1e-10, atol=1e-12)


# --- the rest, and whole parts of a model


@pytest.mark.parametrize("kinds", [None, ["heads"]])
@pytest.mark.parametrize("norm, positions", FORMS)
@pytest.mark.parametrize("reduction, projections", [("full", 1), ("random", 2), ("loss", 1)])
def test_kernels_of_parts_equal_the_naive_ones(
    reduction: ntk.Reduction, projections: int, norm: str, positions: str, kinds: list[str] | None
) -> None:
    """A parameter, a whole block with its norms and biases, and the whole model (eq. 1)."""
    model, jacobian = model_of(norm, positions), jacobian_of(norm, positions)
    found = ntk.estimate(
        model, tiny_batch(samples=SAMPLES), index_of(model, kinds), reduction=reduction, projections=projections,
        kernels=True, rest=True,
    )  # fmt: skip
    weight = weights(model, reduction, projections, seed=0) / (projections**0.5 if reduction == "random" else 1)

    def expected(prefix: str) -> Tensor:
        columns = [j.flatten(2) for name, j in jacobian.items() if name.startswith(prefix)]
        return kernel(torch.cat(columns, -1), weight)

    for part, prefix in ((model, ""), (model.blocks[1], "blocks.1."), (model.transform_norm, "transform_norm.")):
        torch.testing.assert_close(found.kernel_of(model, part), expected(prefix), rtol=1e-9, atol=1e-9)
    assert found.rest is not None
    torch.testing.assert_close(found.rest["tokens"], expected("tokens"), rtol=1e-9, atol=1e-9)


def test_kernels_of_parts_want_kernels_and_rest() -> None:
    model = model_of(*FORMS[0])
    with pytest.raises(ValueError, match="kernels=True and rest=True"):
        estimate(model).kernel_of(model, model)


# --- online


def test_online_equals_the_loss_reduction_and_leaves_the_step_as_it_is() -> None:
    """Kernels of a step without dropout are those of ``loss``; its gradients are bitwise those of a plain step."""
    model, plain, batch = tiny_bert(), tiny_bert(), tiny_batch(samples=6)
    with ntk.Online(model) as online:
        model.train()
        model.loss(batch).backward()
    found = online.result(spectrum=True, kernels=True)
    plain.train()
    plain.loss(batch).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name
    expected = estimate(plain, batch, reduction="loss")
    torch.testing.assert_close(found.kernels, expected.kernels, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.lambda_max, expected.lambda_max, rtol=1e-10)
    assert (found.samples, found.reduction) == (6, "loss")
    assert all(layer.tape is None for layer in unit_layers(model))


def test_online_takes_micro_batches_for_one_step() -> None:
    model, batch = tiny_bert(), tiny_batch(samples=6)
    with ntk.Online(model, index_of(model, ["ffn"])) as online:
        for part in batch.split(3):
            (model.loss(part) / 3).backward()
    expected = ntk.estimate(model, batch, index_of(model, ["ffn"]), reduction="loss", kernels=True)
    torch.testing.assert_close(online.result(kernels=True).kernels, expected.kernels, rtol=1e-10, atol=1e-14)


def test_online_refuses_frozen_units_and_a_missing_backward_pass() -> None:
    model = tiny_bert()
    with ntk.Online(model) as online:
        model.loss(tiny_batch())
    with pytest.raises(ValueError, match="needs the backward pass"):
        online.result()
    half_frozen(model)
    with pytest.raises(ValueError, match="all units are active"), ntk.Online(model):
        pass


# --- a model of the user's own


class Points:
    """A batch of vectors, (n, 1, d): one position per sample."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.samples = x, len(x)


class Neurons(UnitLayer):
    """tanh(W x + b) whose units are groups of neurons."""

    def __init__(self, width: int, groups: int, size: int) -> None:
        super().__init__("neurons", groups)
        self.add_product("weight", torch.randn(groups, size, width), "bias")
        self.add_product("out_weight", torch.randn(groups, size, width))

    def compute(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        z = torch.einsum("ntq,upq->ntup", x, w["weight"]) + w["bias"]
        h = torch.tanh(self.tap("weight", x, True, z))
        return self.tap("out_weight", h, False, torch.einsum("ntup,upq->ntq", h, w["out_weight"]))


class Twice(UnitModel):
    """The same layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Neurons(width=3, groups=2, size=4)

    def forward(self, batch: Points) -> Tensor:
        return self.layer(self.layer(batch.x))[:, 0]


def test_a_model_of_the_users_own_whose_layer_is_used_twice() -> None:
    model, batch = Twice().double(), Points(torch.randn(5, 1, 3, dtype=torch.float64))
    found = ntk.estimate(model, batch, reduction="full", kernels=True)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in model(batch).flatten()]
    for u in range(2):
        flat = torch.stack([torch.cat([g[u].flatten() for g in row]) for row in rows]).view(5, 3, -1)  # (n, k, p)
        torch.testing.assert_close(found.kernels[u], full_kernel(flat), rtol=1e-10, atol=1e-10)
    assert found.index.kind.tolist() == ["neurons"] * 2 and found.outputs == 3


def test_senseless_wishes_are_refused_in_a_sentence() -> None:
    model, batch = tiny_bert(), tiny_batch()
    with pytest.raises(ValueError, match="no unit to measure"):
        ntk.estimate(model, batch, index_of(model, ["experts"]))
    with pytest.raises(ValueError, match="wanted one of random, sum, full, loss"):
        ntk.estimate(model, batch, reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="projections=0"):
        ntk.estimate(model, batch, projections=0)
    silent = Twice().double()
    silent.layer.compute = lambda x, w: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a layer of neurons recorded no product"):
        ntk.estimate(silent, Points(torch.zeros(2, 1, 3, dtype=torch.float64)))
