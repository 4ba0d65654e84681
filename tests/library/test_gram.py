"""Gram products of per-sample gradients, their memory, and their top eigenvalues."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mat import gram, ntk
from mat.kernels import krylov
from mat.units import Part, UnitLayer, Units

FACTORS = [(3, 5, 4, 6, 7), (4, 1, 1, 3, 2), (1, 6, 2, 1, 5), (6, 2, 3, 8, 8)]  # N, T, U, p, q


def factors_of(n: int, t: int, u: int, p: int, q: int, **options: Any) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    per_unit = torch.randn(n, t, u, p, generator=random, dtype=torch.float64)
    shared = torch.randn(n, t, q, generator=random, dtype=torch.float64)
    return per_unit.to(**options), shared.to(**options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("units, rows", [(1, 1), (2, 2), (100, 100)])
@pytest.mark.parametrize("contraction", ["gradients", "pairs"])
@pytest.mark.parametrize("sizes", FACTORS, ids=str)
def test_both_contractions_equal_naive_gradients(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, ...],
    contraction: Any,
    units: int,
    rows: int,
    bias: bool,
) -> None:
    n, _, u, p, _ = sizes
    per_unit, shared = factors_of(*sizes)
    chunk = min(rows, p if contraction == "gradients" else n)
    chosen = gram.Plan(contraction, 0, min(units, u), chunk)
    monkeypatch.setattr(gram, "plan", lambda *_: chosen)
    half = n // 2
    parts = [(per_unit[:half], shared[:half]), (per_unit[half:], shared[half:])]
    found = gram.unit_gram(parts[not half :], bias, memory_bytes=0)
    for v in range(u):
        rows_of = []
        for i in range(n):
            gradient = (per_unit[i, :, v].T @ shared[i]).flatten()
            of_bias = per_unit[i, :, v].sum(0)
            rows_of.append(torch.cat([gradient, of_bias]) if bias else gradient)
        flat = torch.stack(rows_of)
        torch.testing.assert_close(found[v], flat @ flat.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_bytes", [1, 2**20])
def test_routed_rows_equal_naive_gradients(memory_bytes: int, bias: bool) -> None:
    """Two units, three samples; the second unit has no row of the first sample."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[2, 1, 3], [0, 4, 1]])
    a = torch.randn(11, 5, generator=random, dtype=torch.float64)
    b = torch.randn(11, 4, generator=random, dtype=torch.float64)
    found = gram.routed_gram([(a, b, sizes)], bias, memory_bytes)
    counts = sizes.flatten().tolist()
    gradients = [
        torch.cat([(x.T @ y).flatten(), x.sum(0)]) if bias else (x.T @ y).flatten()
        for x, y in zip(a.split(counts), b.split(counts), strict=True)
    ]
    for u in range(2):
        flat = torch.stack(gradients[3 * u : 3 * u + 3])
        torch.testing.assert_close(found[u], flat @ flat.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sizes, contraction", [((2, 50, 1, 3, 2), "gradients"), ((2, 2, 1, 50, 60), "pairs")]
)
def test_the_cheaper_contraction_is_chosen(sizes: tuple[int, ...], contraction: str) -> None:
    n, t, u, p, q = sizes
    cost = {"gradients": 2 * n * u * p * q * (t + n), "pairs": 2 * n * n * t * t * (u * p + q)}
    chosen = gram.plan(n, t, u, p, q, memory_bytes=2**30)
    assert (chosen.contraction, chosen.flops) == (contraction, cost[contraction])
    assert cost[contraction] == min(cost.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 40, 2, 6, 7), (3, 2, 2, 30, 30)], ids=["gradients", "pairs"])
def test_gram_products_are_float32(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """bf16 factors are exact; ``gradients`` forms gradients in their 8 bits, then float32."""
    per_unit, shared = factors_of(*sizes, dtype=dtype)
    found = gram.unit_gram([(per_unit, shared)], True, memory_bytes=2**20)
    expected = gram.unit_gram([(per_unit.double(), shared.double())], True, memory_bytes=2**20)
    assert found.dtype == torch.float32
    n, t, u, p, q = sizes
    formed = gram.plan(n, t, u, p, q, memory_bytes=2**20).contraction == "gradients"
    rtol = 2**-7 if formed and dtype == torch.bfloat16 else 1e-5
    atol = rtol * float(expected.max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


# --- memory


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive at once in tensors made within."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
                self.bytes = max(self.bytes, sum(self.live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [2, 40])
@pytest.mark.parametrize(
    "sizes", [(64, 2, 4, 16, 64), (64, 16, 4, 32, 256)], ids=["pairs", "gradients"]
)
def test_working_memory_stays_under_the_bound(
    sizes: tuple[int, ...], divisor: int, dtype: torch.dtype
) -> None:
    """Beside it there are the Gram matrices and two copies of the factors at most."""
    n, t, u, p, q = sizes
    needed = {"pairs": 4 * n * n * t * t * (2 * u + 1), "gradients": 4 * n * u * p * q}  # at once
    memory_bytes = needed[gram.plan(n, t, u, p, q, 2**30).contraction] // divisor
    beside = 4 * u * n * n + 2 * 4 * n * t * (u * p + q)
    per_unit, shared = torch.ones(n, t, u, p, dtype=dtype), torch.ones(n, t, q, dtype=dtype)
    with PeakMemory() as peak:
        gram.unit_gram([(per_unit, shared)], False, memory_bytes)
    used = peak.bytes - beside
    assert peak.bytes > 0 and used <= memory_bytes, f"{used / memory_bytes:.2f} of the bound"


@pytest.mark.parametrize("itemsize", [4, 8])
def test_a_plan_knows_how_large_numbers_are(itemsize: int) -> None:
    """Chunks of float64 are half as large under the same bound."""
    chosen = gram.plan(64, 16, 4, 32, 256, 2**20, itemsize)
    assert chosen.contraction == "gradients"
    assert chosen.units * chosen.rows == 2**20 // (2 * itemsize * 64 * 256)


def deep_net(depth: int, width: int, units: int, tanhs: int = 1) -> tuple[nn.Module, Units]:
    """Linear layers in a row, each with units, and activations behind each."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), *[nn.Tanh() for _ in range(tanhs)]]
    parts = [Part.even(f"{(1 + tanhs) * i}.weight", 0, units, width) for i in range(depth)]
    table = Units([UnitLayer("ffn", part.parameter, units, [part]) for part in parts])
    return nn.Sequential(*layers), table


def test_kernels_are_not_copied() -> None:
    """Where they need the most memory there are one layer's beside them, and the factors."""
    model, units = deep_net(depth=6, width=4, units=2)
    with PeakMemory() as peak:
        found = ntk.estimate(model, torch.randn(4, 4), units, projections=100, kernels=True)
    assert found.kernels is not None
    assert 0 < peak.bytes < 2 * found.kernels.nbytes


def test_factors_of_all_layers_are_never_there_at_once() -> None:
    """A layer gives up its factors as soon as the last backward pass has reached it."""
    model, units = deep_net(depth=10, width=64, units=2)
    x = torch.randn(4, 512, 64)
    with PeakMemory() as peak:
        ntk.estimate(model, x, units, memory_bytes=2**20)
    assert 0 < peak.bytes < (10 + 6) * x.nbytes, "of both factors there are 20"


def test_activations_of_one_batch_are_alive_at_a_time() -> None:
    """Of four batches there is one graph, and of the others the factors only."""
    model, units = deep_net(depth=8, width=32, units=2, tanhs=5)
    x = torch.randn(32, 64, 32)
    peaks = {}
    for parts in (1, 4):
        with PeakMemory() as peak:
            ntk.estimate(model, list(x.chunk(parts)), units, memory_bytes=2**16)
        peaks[parts] = peak.bytes / x.nbytes
    factors, activations = 2 * 8, 5 * 8
    assert peaks[1] > activations
    assert peaks[4] < factors + activations / 4, peaks


# --- eigenvalues


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_lanczos_finds_the_top_eigenvalue(dtype: torch.dtype, rtol: float) -> None:
    """A decaying spectrum, a dominating value, low rank, the identity, and zero."""
    random = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(200, 200, generator=random, dtype=torch.float64)).Q
    decaying = (0.9 ** torch.arange(200)).double()
    spectra = [
        decaying,
        torch.cat([torch.tensor([50.0]), decaying[1:]]),
        (torch.arange(200) < 3).double() * decaying,
        torch.ones(200),
        torch.zeros(200),
    ]
    kernels = torch.stack([rows * values.double() @ rows.T for values in spectra]).to(dtype)
    found = torch.linalg.eigvalsh(krylov(kernels))[:, -1]
    expected = torch.tensor([1.0, 50.0, 1.0, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def test_large_kernels_have_the_eigenvalues_of_their_spectrum() -> None:
    """Rounded by neither Lanczos nor the caller's autocast."""
    model, units = deep_net(depth=2, width=6, units=3)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = ntk.estimate(model, x, units, projections=33, kernels=True, rest=True)
    assert found.kernels is not None and found.rest is not None
    top = torch.linalg.eigvalsh(found.kernels.double())[:, -1]
    torch.testing.assert_close(torch.from_numpy(found.lambda_max), top, rtol=1e-5, atol=0)
    for name, kernel in found.rest.items():  # a bf16 product would round every entry to 8 bits
        assert not torch.equal(kernel, kernel.bfloat16().float()), name
