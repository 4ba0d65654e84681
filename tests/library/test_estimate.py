"""The mNTK estimator on ordinary models against explicit Jacobians in float64."""

import functools
from typing import Any

import jacobians
import numpy as np
import pytest
import torch
from jacobians import CASES, Case
from torch import Tensor

from mat import ntk

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
    n, k = shape
    if reduction == "full":
        return torch.eye(k, dtype=torch.float64)[:, None].expand(-1, n, -1)
    if reduction == "sum":
        return torch.full((1, n, k), k**-0.5, dtype=torch.float64)
    if reduction == "loss":
        with torch.no_grad():
            outputs = torch.stack([case.outputs(case.model.eval(), s) for s in case.singles])
        return 2 * outputs[None] / (n * k)
    signs = []
    for j in range(m):
        for i in range(n):
            stream = np.random.default_rng([7, j, i]).bytes(-(-k // 8))
            bits = "".join(f"{byte:08b}" for byte in stream)[:k]
            signs.append(torch.tensor([2.0 * int(bit) - 1 for bit in bits], dtype=torch.float64))
    return torch.stack(signs).view(m, n, k)


def estimate(case: Case, **options: Any) -> ntk.Mntk:
    return ntk.estimate(
        case.model, options.pop("batch", case.batch), case.units, **case.options,
        loss=mean_square, kernels=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction, m", REDUCTIONS)
def test_equals_the_explicit_jacobian(name: str, reduction: ntk.Reduction, m: int) -> None:
    if reduction in ("sum", "loss") and name == "filters":
        pytest.skip("its reference fixes statistics: the other reductions say it all")
    case, _, units = reference(name)
    found = estimate(case, reduction=reduction, projections=m, seed=7, spectrum=True)
    weight = weights(case, units[0].shape[:2], reduction, m)
    expected = torch.stack([jacobians.kernel(j, weight) for j in units]) / (m if m > 1 else 1)
    assert found.kernels is not None and found.spectrum is not None
    torch.testing.assert_close(found.kernels, expected, rtol=1e-9, atol=1e-11)
    top = torch.linalg.eigvalsh(expected)[:, -1]
    torch.testing.assert_close(torch.from_numpy(found.lambda_max), top, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.spectrum[:, -1], found.lambda_max, rtol=1e-12)
    np.testing.assert_allclose(found.squared_norm, expected.sum((1, 2)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_all_kernels_add_up_to_the_full_ntk(name: str) -> None:
    """Eq. (1), and so the largest unit's lambda <= that of the NTK."""
    case, found, units = reference(name)
    result = estimate(case, reduction="full", rest=True)
    weight = weights(case, units[0].shape[:2], "full", 1)
    full = sum(jacobians.kernel(j.flatten(2), weight) for j in found.values())
    assert isinstance(full, Tensor)
    torch.testing.assert_close(
        result.kernel_of(case.model, case.model), full, rtol=1e-9, atol=1e-10
    )
    assert result.lambda_max.max() <= float(torch.linalg.eigvalsh(full)[-1]) * (1 + 1e-12)
