"""Gated steps as CUDA graphs: replayed they are the launched ones; nothing forbids a capture."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mat
import mat.suite.gating  # the finders of our own layers
from mat.layers.gate import BackwardMode
from mat.optim import UnitOptimiser
from mat.suite.stepper import Stepper
from tests.small_models import tiny_batch, tiny_bert, tiny_images, tiny_switch, tiny_vgg

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MODELS: dict[str, Callable[[], Any]] = {
    "bert": partial(tiny_bert, dtype=torch.float32),
    "switch": partial(tiny_switch, dtype=torch.float32, capacity_factor=1.1),
    "vgg": partial(tiny_vgg, dtype=torch.float32, stages=((64,), (64, 48))),
}
ADAMW = partial(mat.AdamW, weight_decay=0.1, compact=True)
SGD = partial(mat.SGD, momentum=0.9, weight_decay=0.1, compact=True)
Make = Callable[..., UnitOptimiser]
# Sets take turns, as multirate's do; a graph is captured when its set comes for the second time.
SETS = ("all", "odd", "even", "odd", "even", "none", "odd", "none", "even", "all", "odd", "none")


def chosen(gates: mat.Gates, which: str) -> np.ndarray:
    """A set by its name."""
    number = gates.units.unit
    even = number % 2 == 0
    return {"all": number >= 0, "even": even, "odd": ~even, "none": number < 0}[which]


class Training:
    """A model that is trained on one batch with sets that take turns."""

    def __init__(
        self, family: str, mode: BackwardMode, make: Make, device: str, graphs: bool, drifts: bool
    ) -> None:
        self.model = MODELS[family]().to(device)
        images = family == "vgg"
        batch = tiny_images(samples=16, dtype=torch.float32) if images else tiny_batch(samples=8)
        self.batch = batch.to(torch.device(device))
        self.gates = mat.attach_(self.model, mat.MATConfig(mode=mode, log=False))
        context = torch.enable_grad
        optimiser = make(self.model.parameters(), lr=1e-2)
        self.stepper = Stepper(
            self.model, self.gates, optimiser, context, 1.0, drifts=drifts, graphs=graphs
        )

    def step(self, which: str) -> list[float]:
        """Loss and gradient norm."""
        self.gates.set_active(chosen(self.gates, which))
        reading = self.stepper.step(self.batch, 1e-2).read()
        return [reading.loss, reading.norm]


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("drifts", [False, True], ids=["still", "drifting"])
@pytest.mark.parametrize("make", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("family", MODELS)
def test_captured_steps_equal_launched_ones(
    family: str, mode: BackwardMode, make: Make, drifts: bool
) -> None:
    replayed, launched = (Training(family, mode, make, "cuda", g, drifts) for g in (True, False))
    for which in SETS:
        a, b = replayed.step(which), launched.step(which)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6), which
    assert any(replayed.stepper._graphs.values()), "nothing was captured"
    for (name, a), b in zip(
        replayed.model.named_parameters(), launched.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_on_the_device_equal_the_cpu(family: str, mode: BackwardMode) -> None:
    """In float64, of every set; the CPU's are held against dense references elsewhere."""
    here = MODELS[family]().double()
    batch = tiny_images(samples=16) if family == "vgg" else tiny_batch(samples=8)
    there = copy.deepcopy(here).to("cuda")
    gates = [mat.attach_(m, mat.MATConfig(mode=mode, log=False)) for m in (here, there)]
    for which in ("all", "odd", "even", "none"):
        for model, own, device in zip((here, there), gates, ("cpu", "cuda"), strict=True):
            model.zero_grad()
            own.set_active(chosen(own, which))
            loss, extra = model.loss(batch.to(torch.device(device))), model.auxiliary_loss()
            (loss if extra is None else loss + extra).backward()
        for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
            expected, found = gradient(a), gradient(b)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=name)


def gradient(parameter: nn.Parameter) -> Tensor:
    """On the CPU; zeros for none."""
    return torch.zeros_like(parameter).cpu() if parameter.grad is None else parameter.grad.cpu()


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a CUDA graph cannot hold: numbers for the host, shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        aten = torch.ops.aten
        assert packet not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select), packet
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("family", MODELS)
def test_a_known_set_needs_nothing_of_the_host(
    family: str, mode: BackwardMode, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(family, mode, make, "cpu", False, drifts=True)
    for which in SETS:
        training.step(which)
    for which in ("odd", "even", "none"):
        training.gates.set_active(chosen(training.gates, which))
        with monkeypatch.context() as patch, Waits():
            patch.setattr(torch, "from_numpy", None)
            training.stepper._compute(training.batch, torch.tensor(1e-2))
