"""Gates on the suite's models against dense references that detach what frozen units put out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import references
import small_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mat
import mat.suite.gating  # the finders of our own layers
from mat.policy import MATConfig

Frozen = set[tuple[str, int]]
MODELS: dict[str, Callable[[], Any]] = {
    "bert pre": lambda: small_models.tiny_bert(),
    "bert post": lambda: small_models.tiny_bert(norm="post", positions="learned"),
    "switch": lambda: small_models.tiny_switch(switch_every=2),
    "vgg": lambda: small_models.tiny_vgg(),
}
OPEN: dict[str, Callable[[Any], Any]] = {
    "a third": lambda units: np.random.default_rng(0).random(len(units)) < 1 / 3,
    "first of each": lambda units: units.unit == 0,
    "upper layers": lambda units: units.layer >= units.layer.max() / 2,
    "lower layers": lambda units: units.layer < units.layer.max() / 2,
    "none": lambda units: np.zeros(len(units), bool),
}


def dense_gradients(model: nn.Module, batch: Any, frozen: Frozen) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy for every parameter; zeros where there is none."""
    p = {n: q.detach().clone().requires_grad_() for n, q in model.named_parameters()}
    if isinstance(batch, small_models.ImageBatch):
        outputs, _ = references.filters(p, ((4, 6), (5, 7)), batch.inputs, frozen)
    else:
        config: Any = model.config
        outputs = references.logits(p, config, batch, frozen)
    loss = F.cross_entropy(outputs, batch.targets)
    found = torch.autograd.grad(loss, list(p.values()), materialize_grads=True)
    return dict(zip(p, found, strict=True))


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("which", OPEN)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_dense_reference(name: str, which: str, mode: Any) -> None:
    model = MODELS[name]()
    batch: Any = small_models.tiny_images() if name == "vgg" else small_models.tiny_batch()
    gates = mat.attach_(model, MATConfig(share=0.5, mode=mode))
    active = OPEN[which](gates.units)
    gates.set_active(active)
    model.loss(batch).backward()
    frozen: Frozen = set()
    layers = list(gates.units.slices())
    if mode == "cut":
        for layer, rows in layers:
            frozen |= {(layer.name, int(u)) for u in np.flatnonzero(~active[rows])}
    wanted = dense_gradients(model, batch, frozen)
    for layer, rows in layers:
        for part in layer.parts:
            closed = (part.owner >= 0) & ~active[rows][part.owner]
            wanted[part.parameter].index_fill_(
                part.dim, torch.from_numpy(np.flatnonzero(closed)), 0
            )
    for parameter_name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            gradient,
            wanted[parameter_name],
            rtol=1e-9,
            atol=1e-11,
            msg=lambda m, n=parameter_name: f"{n}: {m}",
        )
