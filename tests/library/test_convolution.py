"""Gates on convolutions and their batch norms, against dense models that detach frozen filters."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import CLASSES, Choice, attached, expected, gradients
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnext50_32x4d, vgg11_bn
from torchvision.models.resnet import BasicBlock, Bottleneck

import mat
from mat.layers.convolution import carried
from mat.layers.gate import BackwardMode
from mat.units import BoolArray, Units


def chain(
    norm: bool = True, inplace: bool = True, between: tuple[nn.Module, ...] = ()
) -> nn.Module:
    """Four convolutions as in VGG, wide enough that a third of their filters is gathered."""
    layers: list[nn.Module] = []
    inputs = 3
    for filters, pool in ((32, False), (64, True), (96, False), (40, True)):
        layers.append(nn.Conv2d(inputs, filters, 3, padding=1))
        layers += [nn.BatchNorm2d(filters)] * norm
        layers.append(nn.ReLU(inplace=inplace))
        layers += [nn.MaxPool2d(2)] * pool
        inputs = filters
        layers += between if filters == 64 else ()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, CLASSES))


def odd() -> nn.Module:
    """Strides, dilation, padding by name; without bias, momentum, affine pair or statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, stride=2, padding=(1, 2), bias=False),
        nn.BatchNorm2d(48, momentum=None),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3, padding="same", dilation=2),
        nn.BatchNorm2d(64, affine=False),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Sequential(
            nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64, track_running_stats=False), nn.SiLU()
        ),
        nn.Conv2d(64, 48, (3, 1)),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def resnet(block: Any) -> nn.Module:
    """A stem and two blocks of torchvision's; the first has a stride and a downsampled shortcut."""
    width = 24 * block.expansion
    shortcut = nn.Sequential(nn.Conv2d(16, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        block(16, 24, 2, shortcut),
        block(width, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vgg": chain,
    "vgg without batch norm": lambda: chain(norm=False),
    "vgg with fresh activations": lambda: chain(inplace=False),
    "vgg with other modules": lambda: chain(
        between=(nn.AvgPool2d(1), nn.Identity(), nn.BatchNorm2d(64), nn.GroupNorm(4, 64), nn.Tanh())
    ),
    "vgg channels last": lambda: chain().to(memory_format=torch.channels_last),
    "vgg evaluating": lambda: chain().eval(),
    "odd": odd,
    "resnet of basic blocks": lambda: resnet(BasicBlock),
    "resnet of bottlenecks": lambda: resnet(Bottleneck),
    "resnet evaluating": lambda: resnet(Bottleneck).eval(),
}
CHOICES: dict[str, Choice] = {
    "a third": lambda units: np.random.default_rng(0).random(len(units)) < 1 / 3,
    "most": lambda units: np.random.default_rng(0).random(len(units)) < 0.9,
    "one run of each layer": lambda units: (units.unit >= 8) & (units.unit < 24),
    "every other layer": lambda units: (units.layer % 2 == 1) & (units.unit % 3 == 0),
    "none": lambda units: np.zeros(len(units), bool),
}


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch for it, in the model's memory format."""
    model = MODELS[name]()
    x = torch.randn(4, 3, 10, 10)
    if "last" in name:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        copy.deepcopy(model)(x) if name != "odd" else model(x)  # gives the lazy layer its shape
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model, x


def detached(model: nn.Module, units: Units, active: BoolArray, mode: BackwardMode) -> nn.Module:
    """A dense copy; in ``cut`` the maps of frozen filters are detached behind their last module."""
    dense = copy.deepcopy(model)
    if mode == "exact":
        return dense
    for layer, rows in units.slices():
        mask = torch.from_numpy(active[rows]).view(1, -1, 1, 1)
        norm = [
            path for path, _ in layer.sites if isinstance(dense.get_submodule(path), nn.BatchNorm2d)
        ]
        last = dense.get_submodule((norm or [layer.name])[0])

        def cut(_: nn.Module, __: Any, maps: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask, maps, maps.detach())

        last.register_forward_hook(cut)
    return dense


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_detached_maps(name: str, choice: str, mode: BackwardMode) -> None:
    model, x = made(name)
    dense = copy.deepcopy(model)
    gates = attached(model, mode, CHOICES[choice])
    dense = detached(dense, gates.units, gates.active, mode)
    found, wanted = gradients(model, x), expected(gates, dense, x)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-13, msg=key)
    for (key, mine), theirs in zip(model.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(mine, theirs), key
    if choice == "a third":
        assert all(part.parameter.grad is not None for part in gates.parts())


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["vgg", "resnet of basic blocks"])
def test_all_active_trains_bitwise_as_untouched(name: str, mode: BackwardMode) -> None:
    model, x = made(name)
    plain = copy.deepcopy(model)
    attached(model, mode, lambda units: np.ones(len(units), bool))
    for each in (model, plain):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(20):
            gradients(each, x)
            optimiser.step()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_autocast_keeps_the_gradient(mode: BackwardMode) -> None:
    torch.set_default_dtype(torch.float32)
    model, x = made("vgg channels last")
    dense = copy.deepcopy(model)
    gates = attached(model, mode, CHOICES["a third"])
    dense = detached(dense, gates.units, gates.active, mode)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = gradients(model, x), expected(gates, dense, x)
    flat, want = (torch.cat([g[k].flatten() for k in wanted]) for g in (found, wanted))
    assert flat.dtype == torch.float32
    assert float((flat - want).norm() / want.norm()) < 0.05  # bf16 keeps 8 bits of every factor


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_compact_gradients_are_the_active_blocks(mode: BackwardMode) -> None:
    model, x = made("vgg channels last")
    gates = attached(model, mode, CHOICES["a third"])
    full = gradients(model, x)
    model.zero_grad()
    for part in gates.parts():
        part.compact = True
    F.cross_entropy(model(x), torch.arange(len(x)) % CLASSES).backward()
    for part in gates.parts():
        assert part.parameter.grad is None and part.block is not None
        mask = torch.from_numpy(part.gate.active[part.part.owner])
        torch.testing.assert_close(part.block, full[part.part.parameter][mask])


class Spy(TorchDispatchMode):
    """Notes channels of every backward product (output's, input's, weights or input) and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, str]] = []
        self.norms: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "convolution_backward" in name:
            mask = args[10]
            self.products.append((args[0].shape[1], args[1].shape[1], "xw"[mask[1]]))
        if "batch_norm_backward" in name:
            self.norms.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def third(units: Units) -> BoolArray:
    """A third of every layer, spread out: 11 of 32, 22 of 64, 32 of 96, 14 of 40 filters."""
    return units.unit % 3 == 0


def test_cut_runs_no_dense_product() -> None:
    model, x = made("vgg")
    attached(model, "cut", third)
    with Spy() as spy:
        gradients(model, x)
    sizes = [(16, 3), (32, 16), (32, 32), (16, 32)]  # carried channels: output's, input's
    images = [3, 32, 64, 96]  # the weight gradient needs all input channels
    wanted = {(out, below, "x") for out, below in sizes[1:]}
    assert set(spy.products) == wanted | {
        (out, inputs, "w") for (out, _), inputs in zip(sizes, images, strict=True)
    }
    assert spy.norms == [16, 32, 32, 16]


def test_exact_runs_weight_products_of_carried_filters() -> None:
    model, x = made("vgg")
    attached(model, "exact", third)
    with Spy() as spy:
        gradients(model, x)
    weights = sorted(product[:2] for product in spy.products if product[2] == "w")
    assert weights == [(16, 3), (16, 96), (32, 32), (32, 64)]


@pytest.mark.parametrize("name", ["vgg", "resnet of bottlenecks"])
def test_inside_a_block_gradients_stay_narrow(name: str) -> None:
    model, x = made(name)
    attached(model, "cut", third)
    with Spy() as spy:
        gradients(model, x)
    dense = {module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert not {out for out, *_ in spy.products} & dense - {16, 32}


def test_no_active_filter_costs_no_backward() -> None:
    model, x = made("vgg")
    attached(model, "cut", CHOICES["none"])
    with Spy() as spy:
        gradients(model, x)
    assert not spy.products and not spy.norms


def test_few_filters_are_filled_up_to_blocks() -> None:
    counts = [carried(count, 64) for count in (0, 1, 16, 17, 48, 49, 64)]
    assert counts == [0, 16, 16, 32, 48, 64, 64]
    assert carried(1, 20) == 20  # a block would be more than three quarters


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_a_second_derivative_is_refused(mode: BackwardMode) -> None:
    model, x = made("vgg")
    attached(model, mode, CHOICES["a third"])
    weight = model.get_parameter("0.weight")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_backward_uses_the_weights_of_the_forward(mode: BackwardMode) -> None:
    model, x = made("vgg")
    dense = copy.deepcopy(model)
    gates = attached(model, mode, CHOICES["a third"])
    dense = detached(dense, gates.units, gates.active, mode)
    found = []
    for each in (model, dense):
        halves = {n: (p.detach() / 2).requires_grad_() for n, p in each.named_parameters()}
        out = functional_call(each, halves, (x,))
        out.square().sum().backward()
        found.append(halves["0.weight"].grad)
    mask = torch.from_numpy(gates.active[:32])
    torch.testing.assert_close(found[0][mask], found[1][mask])  # type: ignore[index]
    assert not found[0][~mask].any()  # type: ignore[index]


def test_attach_and_detach_leave_the_model_as_it_was() -> None:
    model, x = made("resnet of basic blocks")
    keys, wanted = list(model.state_dict()), gradients(model, x)
    model.zero_grad()
    attached(model, "cut", CHOICES["a third"])
    assert list(model.state_dict()) == keys
    mat.detach_(model)
    assert list(model.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.load_state_dict(model.state_dict())
    for key, value in gradients(model, x).items():
        assert torch.equal(value, wanted[key]), key


def test_filters_of_torchvision_own_their_batch_norm() -> None:
    with torch.device("meta"):
        units = mat.find_units(vgg11_bn()).of_kinds(["filters"])
    assert [layer.n_units for layer in units.layers] == [64, 128, 256, 256, 512, 512, 512, 512]
    names = [part.parameter.partition(".")[2] for part in units.layers[1].parts]
    assert names == ["4.weight", "4.bias", "5.weight", "5.bias"]


def test_the_stem_of_a_resnet_carries_through_its_pool() -> None:
    with torch.device("meta"):
        units = mat.find_units(resnet18())
    assert [path for path, _ in units.layers[0].sites] == ["conv1", "bn1", "relu", "maxpool"]
    assert len(units.layers) == 20  # 17 convolutions and three shortcuts


def test_grouped_convolutions_are_left_out_with_the_reason() -> None:
    with torch.device("meta"):
        units = mat.find_units(resnext50_32x4d())
    assert "grouped" in units.left_out["layer1.0.conv2"]
    assert "layer1.0.conv1" in {layer.name for layer in units.layers}


def test_a_convolution_that_runs_twice_has_no_units() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    twice = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.ReLU(), shared)
    assert [layer.name for layer in mat.find_units(twice).layers] == ["0"]
