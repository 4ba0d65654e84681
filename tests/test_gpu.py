"""What needs a CUDA device (``make gpu-check``): the CPU's numbers, and whole runs."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import attach, gated_gradients
from short_runs import SWITCH, VGG, events, small
from small_models import tiny_batch, tiny_bert, tiny_images, tiny_switch, tiny_vgg

import mat
from mat import gram, ntk
from mat.suite import engine
from mat.suite.models.attention import attention, rotary_table
from mat.suite.stepper import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize(
    "sizes", [(3, 5, 2, 7, 9), (32, 128, 4, 96, 128), (64, 64, 12, 64, 768)], ids=str
)
def test_triton_equals_pytorch(sizes: tuple[int, ...]) -> None:
    gram_triton = pytest.importorskip("mat.gram_triton")
    n, t, u, p, q = sizes
    a = torch.randn(n, t, u, p, device=DEVICE).bfloat16()
    b = torch.randn(n, t, q, device=DEVICE).bfloat16()
    found = gram_triton.gram(a, b)
    expected = gram.unit_gram([(a.double(), b.double())], False, 2**30)
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=2**-13 * float(expected.max())
    )
    assert torch.equal(found, gram_triton.gram(a, b)), "the same call gave other bits"


def test_triton_is_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_triton = pytest.importorskip("mat.gram_triton")
    calls, plain = [], gram_triton.gram
    monkeypatch.setattr(gram_triton, "gram", lambda a, b: calls.append(a.shape) or plain(a, b))
    # Units of 16 rows.
    model = tiny_bert(dtype=torch.float32, length=64, width=48, ffn_hidden=48).to(DEVICE)
    batch = tiny_batch(length=64).to(DEVICE)
    units = mat.find_units(model, groups=3)
    with torch.autocast("cuda", torch.bfloat16):
        ntk.estimate(model, batch, units)
    assert len(calls) == sum(
        part.parameter.endswith("weight") for layer in units.layers for part in layer.parts
    )


@pytest.mark.parametrize(
    "reduction, projections", [("random", 1), ("random", 3), ("sum", 1), ("loss", 1)]
)
def test_estimator_equals_the_cpu(reduction: ntk.Reduction, projections: int) -> None:
    """In float32, and in bf16 autocast within its eight bits."""
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch(samples=4)
    options: dict[str, Any] = {"reduction": reduction, "projections": projections}
    options |= {"units": mat.find_units(model, groups=3), "loss": model.loss_of_outputs}
    expected = ntk.estimate(model, batch, **options)
    there = copy.deepcopy(model).to(DEVICE)
    found = ntk.estimate(there, batch.to(DEVICE), **options)
    np.testing.assert_allclose(found.lambda_max, expected.lambda_max, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        rough = ntk.estimate(there, batch.to(DEVICE), **options)
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


@pytest.mark.parametrize("active", [0, 1, 2, 99], ids=["none", "one", "two", "all"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("family", ["bert", "switch", "vgg"])
def test_gate_gradients_equal_the_dense_reference(family: str, mode: str, active: int) -> None:
    """In float64: heads, groups, experts and filters against loops over units on the CPU."""
    model = {"bert": tiny_bert, "switch": tiny_switch, "vgg": tiny_vgg}[family]()
    batch: Any = tiny_images() if family == "vgg" else tiny_batch()
    gates = attach(model, mode)
    gates.set_active(gates.units.unit < active)
    expected = gated_gradients(model, gates, batch)
    there = copy.deepcopy(model).to(DEVICE)
    moved: mat.Gates = there._gates  # type: ignore[assignment]
    moved.set_active(gates.units.unit < 0)
    moved.set_active(gates.units.unit < active)
    there.loss(batch.to(DEVICE)).backward()
    for name, parameter in there.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            found.cpu(), expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("memory_bytes", [300, 2**20])
def test_routed_gram_equals_the_cpu(memory_bytes: int) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = [
        torch.tensor([[2, 0, 3], [0, 0, 0], [1, 4, 2]]),
        torch.tensor([[1, 5], [3, 0], [2, 1]]),
    ]
    factors = [
        (*(torch.randn(int(s.sum()), w, generator=random, dtype=torch.float64) for w in (4, 5)), s)
        for s in sizes
    ]
    expected = gram.routed_gram(factors, True, memory_bytes)
    found = gram.routed_gram(
        [tuple(t.to(DEVICE) for t in triple) for triple in factors], True, memory_bytes
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["switch", "vgg"])
def test_kernels_of_experts_and_filters_equal_the_cpu(family: str) -> None:
    model = {"switch": tiny_switch, "vgg": tiny_vgg}[family]()
    batch: Any = tiny_images() if family == "vgg" else tiny_batch()
    units = mat.find_units(model, groups=3)
    expected = ntk.estimate(model, batch, units, projections=2, kernels=True).kernels
    there = copy.deepcopy(model).to(DEVICE)
    found = ntk.estimate(there, batch.to(DEVICE), units, projections=2, kernels=True).kernels
    assert expected is not None and found is not None
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-8 * float(expected.max()))


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_a_mat_run_trains(mode: str, cache: Path, tmp_path: Path) -> None:
    """A whole run in bf16 autocast: selections with units frozen, and a falling loss."""
    overrides = (
        "method=mat",
        f"selection.mode={mode}",
        "hardware.device=cuda",
        "hardware.precision=bfloat16",
    )
    summary = engine.run(small(cache, *overrides, steps=60), tmp_path / "run")
    assert summary is not None and summary["selections"] > 2 and summary["active_share"] < 1
    assert summary["best_validation_loss"] < np.log(256)


RUNS = {
    "bert": ("text", ("train.accumulation=2", "model.dropout=0.1")),
    "switch": ("text", SWITCH),
    "vgg": ("image", VGG),
}


@pytest.mark.parametrize("method", ["baseline", "mat", "multirate"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("family", RUNS)
def test_replayed_steps_are_the_launched_ones(
    family: str,
    mode: str,
    method: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole run, selections and short batches included, with and without graphs."""
    modality, overrides = RUNS[family]
    captured: list[object] = []
    plain = Stepper._capture
    monkeypatch.setattr(
        Stepper, "_capture", lambda self, batch: captured.append(batch) or plain(self, batch)
    )
    seen: dict[bool, list[dict[str, float]]] = {}
    for graphs in (True, False):
        config = small(
            cache, *overrides, f"method={method}", f"selection.mode={mode}", "hardware.device=cuda",
            f"hardware.graphs={graphs}", "train.log_steps=1", steps=200, modality=modality,
        )  # fmt: skip
        assert engine.run(config, tmp_path / str(graphs)) is not None
        seen[graphs] = [
            {
                name: value
                for name, value in event.items()
                if isinstance(value, float) and "seconds" not in name
            }
            for event in events(tmp_path / str(graphs))
            if event["event"] in ("train", "evaluation", "test")
        ]
        assert bool(captured) == graphs and len(captured) < len(seen[graphs]) / 3
        captured.clear()
    for replayed, launched in zip(seen[True], seen[False], strict=True):
        assert replayed.keys() == launched.keys()
        for name, value in launched.items():  # of counts a single sample may fall to the other side
            counted = name in ("accuracy", "drop_rate", "expert_load")
            assert replayed[name] == pytest.approx(
                value, rel=1e-4, abs=0.02 if counted else 1e-9
            ), name
