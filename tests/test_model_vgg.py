"""VGG of the suite against torchvision and a loop over filters."""

import pytest
import references
import torch
from short_runs import composed
from small_models import tiny_images, tiny_vgg
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from mat.suite.compose import resolve
from mat.suite.models.vgg import Vgg

MEAN, VAR = "running_mean", "running_var"


def full_vgg16() -> Vgg:
    images = ("dataset=digits", "dataset.size=32", "dataset.channels=3")
    choices = ("model=vgg16", "selection=filters", "train=images")
    return Vgg(resolve(composed(*choices, *images)).model, 10, 3, 32)


def test_features_take_torchvisions_weights_and_equal_it() -> None:
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"], batch_norm=True).double()  # vgg16_bn().features
    for module in theirs:
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    ours = full_vgg16().double()
    ours.features.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):  # the second pass reads the statistics that the first one moved
        found, expected = (f.train(training)(images) for f in (ours.features, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_statistics_equal_a_loop_over_filters(training: bool) -> None:
    model, batch = tiny_vgg().train(training), tiny_images()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.get_buffer(MEAN).normal_()
        norm.get_buffer(VAR).uniform_(0.5, 2)
    before = {n: (m.get_buffer(MEAN).clone(), m.get_buffer(VAR).clone()) for n, m in norms.items()}
    p = dict(model.named_parameters())
    stages, given = ((4, 6), (5, 7)), None if training else before
    expected, statistics = references.filters(p, stages, batch.inputs, (), given)
    torch.testing.assert_close(model(batch), expected, rtol=1e-9, atol=1e-9)
    for (name, norm), size in zip(norms.items(), (6, 6, 3, 3), strict=True):
        mean, variance = before[name]
        if training:
            count = batch.samples * size**2
            mean = 0.9 * mean + 0.1 * statistics[name][0]
            variance = 0.9 * variance + 0.1 * statistics[name][1] * count / (count - 1)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size, channels", [(8, 1), (7, 3), (1, 2)])
def test_images_of_any_size_train(size: int, channels: int) -> None:
    model = tiny_vgg(stages=((4, 6), (6,), (6,), (6, 4), (4,)), size=size, channels=channels)
    batch = tiny_images(size=size, channels=channels)
    loss = model.loss(batch)
    loss.backward()
    assert model(batch).shape == (5, 3) and bool(torch.isfinite(loss))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_weights_lie_with_channels_last() -> None:
    model = tiny_vgg()
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_initial_weights_are_kaimings() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = full_vgg16()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            wanted = (2 / (9 * parameter.shape[0])) ** 0.5
        elif name == "classifier.weight":
            wanted = 0.01
        else:
            module = model.get_submodule(name.rpartition(".")[0])
            one = float(isinstance(module, nn.BatchNorm2d) and name.endswith("weight"))
            assert torch.equal(parameter, torch.full_like(parameter, one)), name
            continue
        assert float(parameter.detach().std()) == pytest.approx(wanted, rel=0.05), name


def test_metrics_are_the_accuracy() -> None:
    model, batch = tiny_vgg(), tiny_images()
    outputs = nn.functional.one_hot(batch.targets, 3).double()
    outputs[0] = outputs[0].roll(1)
    assert float(model.metrics(outputs, batch)["accuracy"]) == pytest.approx(0.8)
    assert model.best_by == "accuracy"
