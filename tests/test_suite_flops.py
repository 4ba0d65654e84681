"""The ledger of the suite's models against torch's counter, and against figures worked by hand."""

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from gradients import attach
from short_runs import composed
from small_models import tiny_batch, tiny_bert, tiny_images, tiny_switch, tiny_vgg
from torchvision.models.vgg import cfgs

from mat import find_units, flops, ntk
from mat.flops import Flops, Ledger
from mat.layers import convolution
from mat.suite.compose import resolve
from mat.suite.data.images import ImageBatch
from mat.suite.models import build

MODELS: dict[str, Any] = {
    "bert": lambda: tiny_bert(ffn_hidden=21),
    "switch": lambda: tiny_switch(switch_every=2, ffn_hidden=21, capacity_factor=0.6),
    "switch roomy": lambda: tiny_switch(ffn_hidden=21, capacity_factor=3.0),
    "vgg": lambda: tiny_vgg(stages=((6, 6), (9, 7))),
}


def made(name: str, mode: str = "cut") -> tuple[Any, Any, Any, Ledger]:
    """A model in training mode, its batch, its gates and the ledger that the engine would use."""
    model = MODELS[name]().train()
    batch: Any = tiny_images() if name == "vgg" else tiny_batch(samples=5)

    def loss() -> torch.Tensor:
        value, extra = model.loss(batch), model.auxiliary_loss()
        return value if extra is None else value + extra

    gates = attach(model, mode)
    for part in gates.parts():
        part.compact = True  # as the suite's optimisers ask
    ledger = Ledger(model, loss, ("decoder",))
    return loss, batch, gates, ledger


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_training_step_equals_the_counter(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For gates that end the backward pass in different places."""
    monkeypatch.setattr(convolution, "BLOCK", 2)
    loss, _, gates, ledger = made(name, mode)
    units = gates.units
    for active in (
        units.unit >= 0, units.unit < 0, units.unit == 1, units.unit % 2 == 0,
        units.layer == units.layer.max(), units.layer == 0, np.arange(len(units)) % 3 == 0,
    ):  # fmt: skip
        gates.set_active(active)
        with flops.flop_counter() as forward:
            value = loss()
        with flops.flop_counter() as backward:
            value.backward()
        gates.model.zero_grad()
        for part in gates.parts():
            part.clear()
        executed, needed = ledger.step(), ledger.step(executed=False)
        vocabulary = executed.vocabulary // 3
        assert forward.get_total_flops() == executed.forward + vocabulary
        assert backward.get_total_flops() == executed.backward + 2 * vocabulary
        assert all(a <= b for a, b in zip(astuple(needed), astuple(executed), strict=True))


@pytest.mark.parametrize("reduction, passes", [("random", 3), ("loss", 1)])
@pytest.mark.parametrize("name", MODELS)
def test_estimate_equals_the_counter(name: str, reduction: ntk.Reduction, passes: int) -> None:
    """Known before the estimate, whatever the gates and the routing."""
    _, batch, gates, _ = made(name)
    gates.set_active(gates.units.unit == 1)
    for memory in (2**25, 1):
        wanted = flops.estimate(
            gates.model, batch, passes=passes, memory_bytes=memory, vocabulary=("decoder",)
        )
        with flops.flop_counter() as counter:
            ntk.estimate(
                gates.model, batch, reduction=reduction, projections=passes,
                memory_bytes=memory, loss=gates.model.loss_of_outputs,
            )  # fmt: skip
        assert counter.get_total_flops() == wanted.everything
        assert wanted.figure == wanted.overhead


def test_padding_of_a_layer_of_experts_by_hand() -> None:
    """30 tokens, 3 experts of two 12 x 21 products, factor 3: 30 slots each, 10 tokens needed."""
    differences = {}
    for count in (0, 1):
        _, _, gates, ledger = made("switch roomy")
        gates.set_active((gates.units.kind == "experts") & (gates.units.unit < count))
        differences[count] = [ledger.step(executed=e) for e in (True, False)]
    slot, layers = 2 * 2 * 12 * 21, 2
    executed, needed = (
        differences[1][i].weight_grad - differences[0][i].weight_grad for i in (0, 1)
    )
    assert (executed, needed) == (layers * 30 * slot, layers * 10 * slot)
    assert differences[0][0].forward - differences[0][1].forward == layers * (90 - 30) * slot


def test_a_dense_epoch_of_vgg16_on_50_000_images() -> None:
    """paper.md section 5: 0.0938 PFLOP executed; three times forward is 0.0940 (images need
    none)."""
    config = resolve(
        composed("model=vgg16", "dataset=cifar10", "selection=filters", "train=images")
    )
    with torch.device("meta"):
        model = build(config, 10)
        batch = ImageBatch(torch.empty(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    units = find_units(model)
    assert [layer.n_units for layer in units.layers] == [n for n in cfgs["D"] if n != "M"]
    assert len(units) == 4224
    step = Ledger(model, lambda: model.loss(batch)).step()
    assert step.figure * 50_000 / 1e15 == pytest.approx(0.0938, abs=5e-5)
    assert 3 * step.forward * 50_000 / 1e15 == pytest.approx(0.0940, abs=5e-5)
    # What conf/train/images.yaml says of its epochs.
    assert config.train.pflops / (step.figure * 45_000 / 1e15) == pytest.approx(202, abs=0.5)
    assert step == Flops(step.forward, step.input_grad, step.weight_grad)
