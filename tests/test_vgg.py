"""VGG: filter gates, their ledger and the estimator against naive references, and the features against torchvision."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import naive
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from short_runs import composed
from test_units import active_gradients, active_rows, assert_same_gradients, frozen_units, set_gates
from tiny import tiny_images, tiny_vgg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vgg import cfgs, make_layers

from mat.suite import flops, ntk
from mat.suite.compose import resolve
from mat.suite.config import Config
from mat.suite.data.images import ImageBatch
from mat.suite.interface import Flops, UnitModel
from mat.suite.models import build
from mat.suite.optim import UnitSGD
from mat.suite.units import BackwardMode, UnitIndex, unit_layers
from mat.suite.vgg import Maps, Vgg

COUNTS = (4, 6, 5, 7)  # filters of tiny_vgg's layers
N_UNITS = sum(COUNTS)
MODES: tuple[BackwardMode, ...] = ("cut", "exact")


def first_of_each(*counts: int) -> list[bool]:
    """The first so many filters of every layer."""
    return [u < n for units, n in zip(COUNTS, counts, strict=True) for u in range(units)]


ACTIVE = {
    "none": first_of_each(0, 0, 0, 0),
    "all": first_of_each(4, 6, 5, 7),
    "one": [i == 12 for i in range(N_UNITS)],
    "bottom closed": first_of_each(0, 0, 2, 3),
    "middle closed": first_of_each(4, 0, 2, 3),
    "top closed": first_of_each(1, 2, 3, 0),
    "open between": first_of_each(2, 6, 1, 7),
    "a third of each": [i % 3 == 0 for i in range(N_UNITS)],
}


# --- gates


@settings(max_examples=15, deadline=None, derandomize=True)
@given(active=st.lists(st.booleans(), min_size=N_UNITS, max_size=N_UNITS), modes=st.tuples(*[st.booleans()] * 4))
@example(active=ACTIVE["none"], modes=(True,) * 4)
@example(active=ACTIVE["all"], modes=(True,) * 4)
@example(active=ACTIVE["one"], modes=(True,) * 4)
@example(active=ACTIVE["one"], modes=(False,) * 4)
@example(active=ACTIVE["bottom closed"], modes=(False,) * 4)
@example(active=ACTIVE["middle closed"], modes=(True,) * 4)
@example(active=ACTIVE["top closed"], modes=(True, True, True, False))
@example(active=ACTIVE["open between"], modes=(True, True, False, False))
@pytest.mark.parametrize(
    "gather", [(1, 1.0), (2, 0.8), (4, 1.0), (1, 0.0)], ids=["exact fit", "padded", "coarse", "dense"]
)
def test_gradients_and_statistics_equal_the_reference(
    gather: tuple[int, float], active: list[bool], modes: tuple[bool, ...]
) -> None:
    """Per layer ``cut``: as if frozen filters' outputs were detached. ``exact``: the dense gradients."""
    model, batch = tiny_vgg(block=gather[0], gather=gather[1]), tiny_images()
    set_gates(model, active)
    for layer, cut in zip(unit_layers(model), modes, strict=True):
        layer.set_active(layer.active, "cut" if cut else "exact")
    cuts = {f"features.{i}" for i, cut in enumerate(modes) if cut}
    detached = {(name, u) for name, u in frozen_units(model) if name in cuts}
    loss = model.loss(batch)
    loss.backward()
    expected = naive.filter_gradients(model, batch, detached)
    assert_same_gradients(active_gradients(model), active_rows(model, expected), rtol=1e-9)
    assert all(layer.get_parameter(n).grad is None for layer in unit_layers(model) for n in layer.unit_parameters()
               if layer.n_active < layer.n_units)  # fmt: skip
    p = dict(model.named_parameters())
    logits, statistics = naive.filters(p, batch.inputs, naive.pools_of(model))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch.targets), rtol=1e-12, atol=0)
    for layer, (mean, variance), size in zip(unit_layers(model), statistics, (6, 6, 3, 3), strict=True):
        count = batch.samples * size**2  # frozen filters too keep their running statistics
        torch.testing.assert_close(layer.mean, 0.1 * mean, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(layer.variance, 0.9 + 0.1 * variance * count / (count - 1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_evaluation_mode(mode: BackwardMode) -> None:
    """Running statistics then normalise; they do not move, and the gates work as in training."""
    model, batch = tiny_vgg(), tiny_images()
    for layer in unit_layers(model):
        layer.mean.normal_()
        layer.variance.uniform_(0.5, 2)
    model.eval()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    set_gates(model, ACTIVE["a third of each"], mode)
    model.loss(batch).backward()
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    statistics = [(layer.mean, layer.variance) for layer in unit_layers(model)]
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    frozen = frozen_units(model) if mode == "cut" else ()
    logits, _ = naive.filters(p, batch.inputs, naive.pools_of(model), frozen, statistics)
    loss = nn.functional.cross_entropy(logits, batch.targets)
    expected = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    assert_same_gradients(active_gradients(model), active_rows(model, expected), rtol=1e-9)


def convolutions(model: Vgg, batch: ImageBatch) -> list[tuple[str, int, int]]:
    """What the backward ran: (input or weight gradient, filters, input channels)."""
    seen: list[tuple[str, int, int]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._overloadpacket is torch.ops.aten.convolution_backward:
                gradient, x, weight, mask = args[0], args[1], args[2], args[-1]
                assert gradient.shape[1] == weight.shape[0] and x.shape[1] == weight.shape[1]
                seen.extend(
                    (name, *weight.shape[:2]) for name, on in zip(("input", "weight"), mask, strict=False) if on
                )
            return func(*args, **(kwargs or {}))

    loss = model.loss(batch)
    with Spy():
        loss.backward()
    return seen


def test_no_product_has_dense_rows_at_a_third_active() -> None:
    model = tiny_vgg(stages=((12, 15), (18, 12)), block=2)
    third = [u < units // 3 for units in (12, 15, 18, 12) for u in range(units)]
    set_gates(model, third, "cut")
    forms = [(4, 2), (6, 4), (6, 6), (4, 6)]  # filters and carrying channels below, 5 padded to 6
    inputs = [("input", *form) for form in forms[1:]]
    assert sorted(convolutions(model, tiny_images())) == sorted(
        [*inputs, ("weight", 4, 2), ("weight", 6, 12), ("weight", 6, 15), ("weight", 4, 18)]
    )
    set_gates(model, third, "exact")
    found = convolutions(model, tiny_images())
    assert sorted(rows for name, rows, _ in found if name == "weight") == [4, 4, 6, 6]
    assert sorted(rows for name, rows, _ in found if name == "input") == [12, 15, 18]


@pytest.mark.parametrize("mode", MODES)
def test_the_backward_ends_below_the_lowest_active_filter(mode: BackwardMode) -> None:
    model = tiny_vgg()
    set_gates(model, first_of_each(0, 0, 2, 3), mode)
    assert [name for name, *_ in convolutions(model, tiny_images())].count("input") == 1
    set_gates(model, first_of_each(0, 0, 0, 0), mode)
    assert convolutions(model, tiny_images()) == []


def kept_bytes(model: Vgg, batch: ImageBatch) -> int:
    """Bytes of all storages that autograd keeps between the forward and the backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(batch)
    del loss
    return sum(storages.values())


def test_cut_keeps_less_the_fewer_filters_are_active() -> None:
    model, batch = tiny_vgg(stages=((12, 12), (12, 12)), block=1), tiny_images(samples=40)
    sizes = []
    for share in (1, 2 / 3, 1 / 3, 0):
        set_gates(model, [u < round(12 * share) for _ in range(4) for u in range(12)], "cut")
        sizes.append(kept_bytes(model, batch))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sizes[2] < 0.6 * sizes[0] and sizes[3] < 0.02 * sizes[0]


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_accumulated_gradients_are_the_sum_of_the_parts(mode: BackwardMode) -> None:
    """Every part is normalised by its own statistics."""
    model, batch = tiny_vgg(), tiny_images(samples=6)
    set_gates(model, ACTIVE["a third of each"], mode)
    frozen = frozen_units(model) if mode == "cut" else ()
    parts = [naive.filter_gradients(model, part, frozen) for part in batch.split(2)]
    expected = {n: sum(p[n] for p in parts) / 2 for n in parts[0]}  # type: ignore[misc]
    for part in batch.split(2):
        (model.loss(part) / 2).backward()
    assert_same_gradients(active_gradients(model), active_rows(model, expected), rtol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_bfloat16_autocast(mode: BackwardMode) -> None:
    """Gradients are float32 and as near to the float64 ones as the dense path's are, with twice its error allowed."""
    batch, errors = tiny_images(samples=16), []
    for gated in (True, False):
        model = tiny_vgg(dtype=torch.float32)
        set_gates(model, first_of_each(4, 6, 2, 4), mode if gated else "cut")
        if not gated:
            set_gates(model, ACTIVE["all"])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ImageBatch(batch.inputs.float(), batch.targets))
        loss.backward()
        found = active_gradients(model)
        exact = copy.deepcopy(model).double()
        frozen = frozen_units(model) if mode == "cut" else ()
        expected = active_rows(exact, naive.filter_gradients(exact, batch, frozen))
        names = [n for n in expected if not n.endswith("bias")]  # a bias before batch norm has none but rounding
        assert all(found[n].dtype == torch.float32 for n in names)  # type: ignore[union-attr]
        flat, wanted = (torch.cat([g[n].double().flatten() for n in names]) for g in (found, expected))  # type: ignore[union-attr]
        errors.append(float((flat - wanted).norm() / wanted.norm()))
    assert errors[0] < 2 * errors[1] < 0.3, errors


def train(model: Vgg, steps: Iterable[int], optimiser: UnitSGD) -> None:
    for step in steps:
        optimiser.clear()
        model.loss(tiny_images(seed=step)).backward()
        optimiser.step(0.05)


@pytest.mark.parametrize("before", ["none", "all", "one"])
@pytest.mark.parametrize("after", ["all", "a third of each", "open between", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_active_filters_train_after_the_set_changed(mode: BackwardMode, before: str, after: str) -> None:
    model = tiny_vgg()
    optimiser = UnitSGD(model, 0.9, 5e-4)
    for case in (before, after):
        set_gates(model, ACTIVE[case], mode)
        start = copy.deepcopy(model)
        train(model, range(2), optimiser)
        moved: list[bool] = []
        for layer, old in zip(unit_layers(model), unit_layers(start), strict=True):
            pairs = [(p, old.get_parameter(n)) for n, p in layer.unit_parameters().items()]
            moved += [not layer.weight[u].equal(old.weight[u]) for u in range(layer.n_units)]
            assert all(p[u].equal(q[u]) for u in np.flatnonzero(~layer.active) for p, q in pairs)
            assert not layer.mean.equal(old.mean)
        starved = mode == "cut" and case == "one"  # the layer above it is closed
        assert moved == [a and not starved for a in ACTIVE[case]]


class Plain(nn.Module):
    """The same network of stock layers."""

    def __init__(self, model: Vgg, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in model.stages:
            for filters in stage:
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
                channels = filters
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = copy.deepcopy(model.classifier)
        self.to(model.classifier.weight.dtype, memory_format=torch.channels_last)
        self.load_state_dict(model.to_torchvision(), strict=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)))


def test_all_filters_active_equal_torch_bitwise() -> None:
    model = tiny_vgg()
    twin = Plain(model, 2)
    set_gates(model, ACTIVE["one"])
    set_gates(model, ACTIVE["all"])
    optimiser = UnitSGD(model, 0.9, 5e-4)
    groups = [
        {"params": [p for p in twin.parameters() if (p.dim() > 1) == decays], "weight_decay": 5e-4 * decays}
        for decays in (True, False)
    ]
    reference = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for step in range(20):
        batch = tiny_images(seed=step)
        optimiser.clear()
        model.loss(batch).backward()
        optimiser.step(0.05)
        reference.zero_grad()
        nn.functional.cross_entropy(twin(batch.inputs), batch.targets).backward()
        reference.step()
    state = {**model.to_torchvision(), **{f"classifier.{n}": p for n, p in model.classifier.named_parameters()}}
    differing = [n for n, t in twin.state_dict().items() if not n.endswith("tracked") and not t.equal(state[n])]
    assert not differing


@pytest.mark.parametrize("size, channels", [(8, 1), (7, 3), (1, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_any_image_size_trains(size: int, channels: int, mode: BackwardMode) -> None:
    stages = ((4, 6), (6,), (6,), (6, 4), (4,))
    model, batch = tiny_vgg(stages=stages, size=size, channels=channels), tiny_images(size=size, channels=channels)
    set_gates(model, [i % 2 == 0 for i in range(36)], mode)
    loss = model.loss(batch)
    loss.backward()
    assert model(batch).shape == (5, 3) and bool(torch.isfinite(loss))
    assert all(layer.gradient("weight") is not None for layer in unit_layers(model))
    if mode == "cut":
        assert step_flops(model, batch) == flops.training_step(model, batch)


def test_a_stand_in_has_no_memory_and_no_values() -> None:
    model = tiny_vgg()
    set_gates(model, ACTIVE["a third of each"], "cut")
    x = tiny_images().inputs
    maps = model.features[0](Maps(x, x))
    assert maps.carrier.requires_grad and not maps.values.requires_grad
    assert maps.carrier.untyped_storage().nbytes() == 8 and bool(maps.carrier.isnan().all())
    assert maps.carrier.shape == (5, len(maps.channels), 6, 6)


# --- the ledger


def step_flops(model: Vgg, batch: ImageBatch) -> Flops:
    """What torch's counter sees of a training step; the weight gradients' part of the backward is the ledger's."""
    with flops.flop_counter() as forward:
        loss = model.loss(batch)
    with flops.flop_counter() as backward:
        loss.backward()
    weight = flops.training_step(model, batch).weight_grad
    return Flops(forward.get_total_flops(), backward.get_total_flops() - weight, weight)


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("gather", [(1, 1.0), (2, 0.8), (1, 0.0)], ids=["exact fit", "padded", "dense"])
@pytest.mark.parametrize("mode", MODES)
def test_training_step_equals_the_counter(mode: BackwardMode, gather: tuple[int, float], active: str) -> None:
    model = tiny_vgg(block=gather[0], gather=gather[1])
    set_gates(model, ACTIVE[active], mode)
    for samples in (5, 2):
        batch = tiny_images(samples=samples)
        assert step_flops(model, batch) == flops.training_step(model, batch)
        needed = flops.training_step(model, batch, padded=False)
        executed = flops.training_step(model, batch)
        if gather == (1, 1.0) or active in ("none", "all"):
            assert needed == executed
        else:
            assert needed.figure <= executed.figure
        assert needed.forward == executed.forward


def test_a_layer_by_hand() -> None:
    """6 x 6 maps of 5 images, 4 filters on 2 channels and 6 on 4, one active in each, padded to two."""
    model, batch = tiny_vgg(stages=((4, 6),)), tiny_images()
    position = 2 * 5 * 36 * 9
    head = 2 * 5 * 6 * 3
    forward = position * (4 * 2 + 6 * 4) + head
    set_gates(model, [u == 0 for n in (4, 6) for u in range(n)], "cut")
    assert flops.training_step(model, batch) == Flops(
        forward, position * 2 * 2 + head, position * (2 * 2 + 2 * 4) + head
    )
    assert flops.training_step(model, batch, padded=False) == Flops(
        forward, position * 1 * 1 + head, position * (1 * 2 + 1 * 4) + head
    )
    set_gates(model, [u == 0 for n in (4, 6) for u in range(n)], "exact")
    assert flops.training_step(model, batch) == Flops(
        forward, position * 6 * 4 + head, position * (2 * 2 + 2 * 4) + head
    )


def full_vgg16(device: str) -> tuple[Vgg, Config]:
    """The model of ``model=vgg16``, and its configuration."""
    config = resolve(composed("model=vgg16", "dataset=cifar10", "selection=filters", "train=images"))
    with torch.device(device):
        return cast(Vgg, build(config, 10)), config


def test_a_dense_epoch_of_vgg16_on_50_000_images() -> None:
    """paper.md section 5: 0.0938 PFLOP executed (0.0940 = three times forward: the images want no gradient)."""
    model, config = full_vgg16("meta")
    assert [layer.n_units for layer in unit_layers(model)] == [n for n in cfgs["D"] if n != "M"]
    assert len(UnitIndex(unit_layers(model))) == 4224
    step = flops.training_step(model, ImageBatch(torch.empty(1, device="meta"), torch.empty(1, device="meta")))
    assert step.figure * 50_000 / 1e15 == pytest.approx(0.0938, abs=5e-5)
    assert 3 * step.forward * 50_000 / 1e15 == pytest.approx(0.0940, abs=5e-5)
    assert config.train.pflops / (step.figure * 45_000 / 1e15) == pytest.approx(202, abs=0.5)  # conf/train/images.yaml


# --- the estimator


def estimate(model: Vgg, batch: ImageBatch, **options: Any) -> ntk.Mntk:
    return ntk.estimate(model, batch, UnitIndex(unit_layers(model)), kernels=True, **options)


@pytest.mark.parametrize("memory_bytes", [2**29, 2000])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_kernels_equal_an_explicit_jacobian(training: bool, memory_bytes: int) -> None:
    """Statistics of the probe, as constants; whatever the running ones say and the gates do."""
    model, batch = tiny_vgg().train(training), tiny_images(samples=3)
    set_gates(model, ACTIVE["middle closed"], "cut")
    jacobian = naive.filter_jacobian(model, batch)
    before = copy.deepcopy(model.state_dict())
    found = estimate(model, batch, reduction="full", memory_bytes=memory_bytes)
    assert found.kernels is not None
    total = torch.zeros(9, 9, dtype=torch.float64)
    kernels = iter(found.kernels)
    for i, units in enumerate(COUNTS):
        for u in range(units):
            rows = naive.unit_jacobian(jacobian, f"features.{i}", u).transpose(0, 1).flatten(0, 1)  # outputs first
            torch.testing.assert_close(next(kernels), rows @ rows.T, rtol=1e-9, atol=1e-10)
            total += rows @ rows.T
    for name in ("classifier.weight", "classifier.bias"):
        rest = jacobian[name].flatten(2).transpose(0, 1).flatten(0, 1)
        total += rest @ rest.T
    largest = float(torch.linalg.eigvalsh(total)[-1])
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(total, flat @ flat.T, rtol=1e-9, atol=1e-9)
    assert found.lambda_max.max() <= largest
    assert model.training == training and all(t.equal(before[n]) for n, t in model.state_dict().items())
    assert not any(g is not None for g in active_gradients(model).values())


@pytest.mark.parametrize("reduction, projections", [("random", 1), ("random", 3), ("sum", 1), ("loss", 1), ("full", 1)])
@pytest.mark.parametrize("active", ["all", "middle closed"])
def test_estimate_equals_the_counter(reduction: ntk.Reduction, projections: int, active: str) -> None:
    model, batch = tiny_vgg(), tiny_images()
    set_gates(model, ACTIVE[active], "cut")
    with flops.flop_counter() as counter:
        estimate(model, batch, reduction=reduction, projections=projections)
    expected = flops.estimate(model, batch, unit_layers(model), reduction, projections, 512 * 2**20)
    assert counter.get_total_flops() == expected.everything == expected.overhead


def test_random_projections_are_the_full_kernel_projected() -> None:
    model, batch = tiny_vgg(), tiny_images(samples=3)
    full, found = (
        estimate(model, batch, reduction="full").kernels,
        estimate(model, batch, projections=2, seed=7).kernels,
    )
    assert full is not None and found is not None
    reducer = ntk.Reducer("random", 2, 7, 3)
    signs = torch.stack([s for s, _ in reducer.cotangents(model, batch, model(batch).detach(), 0)])  # (m, n, k)
    by_sample = full.view(-1, 3, 3, 3, 3)  # unit, output, sample, output, sample
    expected = torch.einsum("ukilj,mik,ojl->umioj", by_sample, signs, signs).reshape(-1, 6, 6) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["random", "full"])
def test_several_batches_equal_one(reduction: ntk.Reduction) -> None:
    """Statistics are those of the whole probe, however it is split."""
    model, batch = tiny_vgg(), tiny_images(samples=5)
    expected = estimate(model, batch, reduction=reduction, rest=True)
    found = estimate(model, batch.split(2), reduction=reduction, rest=True)
    torch.testing.assert_close(found.kernels, expected.kernels, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.rest, expected.rest, rtol=1e-9, atol=1e-10)


def test_a_model_that_cannot_fix_its_constants_takes_one_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_vgg(), tiny_images(samples=4)
    monkeypatch.setattr(Vgg, "fix_constants", UnitModel.fix_constants)
    estimate(model, batch)
    with pytest.raises(ValueError, match="fix_constants"):
        estimate(model, batch.split(2))


def test_all_kernels_add_up_to_the_whole_with_statistics_of_the_first_pass() -> None:
    """The rest's kernels run sample by sample, with the statistics that the first pass fixed."""
    model, batch = tiny_vgg(), tiny_images(samples=3)
    jacobian = naive.filter_jacobian(model, batch)
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2).transpose(0, 1).flatten(0, 1)
    found = estimate(model, batch, reduction="full", rest=True)
    torch.testing.assert_close(found.kernel_of(model, model), flat @ flat.T, rtol=1e-9, atol=1e-9)


def test_a_training_step_cannot_be_listened_to() -> None:
    """Its batch norm couples the samples, so there are no per-sample gradients to take."""
    model = tiny_vgg()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="couples the samples"), ntk.Online(model):
        model.loss(tiny_images())
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())


# --- torchvision


def test_features_equal_torchvision() -> None:
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"], batch_norm=True).to(memory_format=torch.channels_last)  # vgg16_bn().features
    for module in theirs:
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    ours, _ = full_vgg16("cpu")
    ours.load_torchvision(theirs.state_dict(prefix="features."))
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for training in (True, False):  # the second pass reads the running statistics that the first one moved
        found, expected = (f(images) for f in (ours.train(training).maps, theirs.train(training)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    state, wanted = ours.to_torchvision(), theirs.state_dict(prefix="features.")
    assert state.keys() == {n for n in wanted if not n.endswith("tracked")}
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)
    ours.load_torchvision(state)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_state_dict_that_does_not_fit_is_refused(fault: str) -> None:
    model = tiny_vgg()
    state = model.to_torchvision()
    if fault == "missing":
        del state["features.1.weight"]
    else:
        state["features.1.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"does not fit this model: features\.1\.weight"):
        model.load_torchvision(state)


def test_metrics_are_the_accuracy() -> None:
    model, batch = tiny_vgg(), tiny_images()
    outputs = nn.functional.one_hot(batch.targets, 3).double()
    outputs[0] = outputs[0].roll(1)
    assert float(model.metrics(outputs, batch)["accuracy"]) == pytest.approx(0.8)
    assert model.best_by == "accuracy" and model.outputs_per_sample(batch) == 3
