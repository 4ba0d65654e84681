"""The benchmark compares equals: every peer finds the estimator's numbers, in float64."""

import numpy as np
import pytest
import torch

from benchmarks.peers import Contenders
from benchmarks.subjects import gates_of
from mat import ntk
from tests.small_models import tiny_batch, tiny_bert


@pytest.fixture(scope="module")
def contenders() -> Contenders:
    model = tiny_bert(norm="pre", positions="rotary")
    gates_of(model)
    return Contenders(model, tiny_batch(samples=4), bfloat16=False)


@pytest.mark.parametrize("name", ["vmap(grad)", "ntk tutorial", "BackPACK"])
def test_peers_find_the_same_kernels(contenders: Contenders, name: str) -> None:
    if name == "BackPACK":
        pytest.importorskip("backpack")
    ours = contenders.ours()
    torch.testing.assert_close(
        contenders.all()[name](), ours, rtol=1e-9, atol=1e-9 * float(ours.max())
    )


@pytest.mark.parametrize("unit", [0, 4])
def test_curvlinops_finds_the_exact_top_eigenvalue(contenders: Contenders, unit: int) -> None:
    pytest.importorskip("curvlinops")
    exact = ntk.estimate(contenders.model, contenders.batch, reduction="full").lambda_max
    found, products = contenders.curvlinops(unit, 1e-8)
    np.testing.assert_allclose(found, exact[unit], rtol=1e-6)
    assert products > 1
