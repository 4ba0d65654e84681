"""What needs a CUDA device (``pytest -m gpu``, ``make gpu-check``): the same numbers as on the CPU, and a whole run."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import small
from tiny import tiny_batch, tiny_bert

from mat import engine, gram, ntk
from mat.attention import attention, rotary_table
from mat.units import unit_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("sizes", [(3, 5, 2, 7, 9), (32, 128, 4, 96, 128), (64, 64, 12, 64, 768)], ids=str)
def test_triton_equals_pytorch(sizes: tuple[int, ...]) -> None:
    gram_triton = pytest.importorskip("mat.gram_triton")
    n, t, u, p, q = sizes
    a = torch.randn(n, t, u, p, device=DEVICE).bfloat16()
    b = torch.randn(n, t, q, device=DEVICE).bfloat16()
    found = gram_triton.gram(a, b)
    expected = gram.unit_gram([(a.double(), b.double())], False, 2**30)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-13 * float(expected.max()))
    assert torch.equal(found, gram_triton.gram(a, b)), "the same call gave other bits"


def test_triton_is_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_triton = pytest.importorskip("mat.gram_triton")
    calls, plain = [], gram_triton.gram
    monkeypatch.setattr(gram_triton, "gram", lambda a, b: calls.append(a.shape) or plain(a, b))
    model = tiny_bert(dtype=torch.float32, length=64, width=48, ffn_hidden=48).to(DEVICE)  # 16 rows of a unit
    batch = tiny_batch(length=64).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        ntk.estimate(model, batch)
    assert len(calls) == sum(len(layer.products) for layer in unit_layers(model))


@pytest.mark.parametrize("reduction, projections", [("random", 1), ("random", 3), ("sum", 1), ("loss", 1)])
def test_estimator_equals_the_cpu(reduction: ntk.Reduction, projections: int) -> None:
    """In float32, and in bf16 autocast within its eight bits."""
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch(samples=4)
    expected = ntk.estimate(model, batch, reduction=reduction, projections=projections)
    there = copy.deepcopy(model).to(DEVICE)
    found = ntk.estimate(there, batch.to(DEVICE), reduction=reduction, projections=projections)
    np.testing.assert_allclose(found.lambda_max, expected.lambda_max, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        rough = ntk.estimate(there, batch.to(DEVICE), reduction=reduction, projections=projections)
    np.testing.assert_allclose(rough.lambda_max, expected.lambda_max, rtol=0.1)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_equals_the_cpu(rotary: bool) -> None:
    qkv = torch.randn(2, 7, 3, 3, 8)
    table = rotary_table(7, 8) if rotary else None
    here, there = qkv.clone().requires_grad_(), qkv.to(DEVICE).requires_grad_()
    expected = attention(here, table)
    found = attention(there, None if table is None else table.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    expected.backward(weight)
    found.backward(weight.to(DEVICE))
    assert here.grad is not None and there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_a_mat_run_trains(mode: str, cache: Path, tmp_path: Path) -> None:
    """A whole run in bf16 autocast: selections with units frozen, and a falling loss."""
    overrides = ("method=mat", f"selection.mode={mode}", "hardware.device=cuda", "hardware.precision=bfloat16")
    summary = engine.run(small(cache, *overrides, steps=60), tmp_path / "run")
    assert summary is not None and summary["selections"] > 2 and summary["active_share"] < 1
    assert summary["best_validation_loss"] < np.log(256)
