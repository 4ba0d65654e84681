"""Units named by hand, against dense models that detach what frozen rows put out."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dense import CLASSES, attached, expected, gradients
from torch import Tensor, nn

import mat
from mat.layers.gate import BackwardMode


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3),
        nn.Flatten(),
    )  # fmt: skip


R, C = mat.rows, mat.cols
HAND: dict[str, tuple[list[mat.Unit], dict[int, slice]]] = {  # units; outputs that are detached
    "rows and columns": (
        [
            mat.Unit("active", R("0.weight", 0, 5), R("0.bias", 0, 5), C("2.weight", 0, 5)),
            mat.Unit("frozen", R("0.weight", 5, 9), R("0.bias", 5, 9), C("2.weight", 5, 9)),
        ],
        {0: slice(5, 9)},
    ),
    "rows without bias": (
        [mat.Unit("active", R("0.weight", 2, 7)), mat.Unit("frozen", R("0.weight", 8, 12))],
        {0: slice(8, 12)},
    ),
    "bias of other rows": (
        [
            mat.Unit("active", R("2.weight", 0, 4), R("2.bias", 0, 3)),
            mat.Unit("frozen", R("2.weight", 4, 8), R("2.bias", 3, 8)),
        ],
        {2: slice(4, 8)},
    ),
    "a bias alone": (
        [mat.Unit("active", R("0.bias", 0, 5)), mat.Unit("frozen", R("0.bias", 5, 12))],
        {},
    ),
    "a norm alone": (
        [mat.Unit("active", R("3.weight", 0, 5)), mat.Unit("frozen", R("3.weight", 5, 8))],
        {},
    ),
}


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("hand", HAND)
@pytest.mark.parametrize("kind", [perceptron, convolutions])
def test_units_by_hand_equal_the_reference(
    kind: Callable[[], Any], hand: str, mode: BackwardMode
) -> None:
    model = kind()
    x = torch.randn(4, 6) if kind is perceptron else torch.randn(4, 3, 7, 7)
    dense, untouched = copy.deepcopy(model), copy.deepcopy(model)
    units, cuts = HAND[hand]
    gates = attached(model, mode, lambda _: np.array([True, False]), units)
    for number, frozen in cuts.items() if mode == "cut" else ():

        def cut(_: nn.Module, __: Any, y: Tensor, frozen: slice = frozen) -> Tensor:
            mask = torch.zeros(y.shape[1], dtype=torch.bool)
            mask[frozen] = True
            return torch.where(mask.view(-1, *[1] * (y.dim() - 2)), y.detach(), y)

        dense[number].register_forward_hook(cut)
    found, wanted = gradients(model, x), expected(gates, dense, x)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-14, msg=key)
    plain = gradients(untouched, x)
    assert any(not torch.equal(plain[key], found[key]) for key in found)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("kind", "weight", "by"),
    [(attention, "self_attn.out_proj.weight", C), (tied, "0.weight", R)],
)
def test_uncalled_and_tied_weights_get_zero_gradients(
    kind: Callable[[], nn.Module], weight: str, by: Callable[..., Any]
) -> None:
    model, x = kind(), torch.randn(2, 3, 8)
    model(x).square().mean().backward()
    wanted = model.get_parameter(weight).grad.clone()
    wanted[(slice(None), slice(4, 8)) if by is C else slice(4, 8)] = 0
    model.zero_grad()
    units = [mat.Unit("active", by(weight, 0, 4)), mat.Unit("frozen", by(weight, 4, 8))]
    attached(model, "exact", lambda _: np.array([True, False]), units)
    model(x).square().mean().backward()
    torch.testing.assert_close(model.get_parameter(weight).grad, wanted)


def test_units_of_frozen_weights_are_refused_by_name() -> None:
    model = perceptron()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight is frozen"):
        mat.find_units(model, units=[mat.Unit("a", mat.rows("0.weight", 0, 3))])
