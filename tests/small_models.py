"""Models and batches of the suite, small enough for references that loop over everything."""

import itertools
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn

from mat.suite.config import BertConfig, SwitchConfig, VggConfig
from mat.suite.data.images import ImageBatch
from mat.suite.data.masking import MaskedBatch
from mat.suite.models.bert import Bert
from mat.suite.models.switch import Switch
from mat.suite.models.vgg import Vgg

VOCABULARY, LENGTH, MASKED = 11, 6, 2
Made = TypeVar("Made", bound=nn.Module)


def tiny_config(
    *, layers: int = 2, width: int = 12, heads: int = 3, ffn_hidden: int = 12, ffn_groups: int = 3,
    positions: str = "rotary", norm: str = "pre", dropout: float = 0.0,
) -> BertConfig:  # fmt: skip
    """Two layers with three heads of width 4 and three feed-forward groups of 4 neurons."""
    return BertConfig(
        name="tiny", layers=layers, width=width, heads=heads, ffn_hidden=ffn_hidden,
        ffn_groups=ffn_groups, positions=positions, norm=norm, dropout=dropout,
    )  # fmt: skip


def tiny_bert(
    *, vocabulary: int = VOCABULARY, length: int = LENGTH, seed: int = 0,
    dtype: torch.dtype = torch.float64, **config: Any,
) -> Bert:  # fmt: skip
    """A BERT of :func:`tiny_config` in which every parameter is random and large enough to matter.

    Args:
        vocabulary: V.
        length: Longest sequence T.
        seed: Seed of the parameters; the global random state is left alone.
        dtype: Of parameters and buffers.
        config: Arguments of :func:`tiny_config`.
    """
    return randomised(Bert(tiny_config(**config), vocabulary, length), seed).to(dtype)


def tiny_switch(
    *, experts: int = 3, capacity_factor: float = 3.0, switch_every: int = 1,
    vocabulary: int = VOCABULARY, length: int = LENGTH, seed: int = 0,
    dtype: torch.dtype = torch.float64, **sizes: Any,
) -> Switch:  # fmt: skip
    """A Switch of :func:`tiny_config`'s sizes; by default no expert can be too full.

    Args:
        experts: E.
        capacity_factor: In training.
        switch_every: Which blocks have experts.
        vocabulary, length, seed, dtype: As of :func:`tiny_bert`.
        sizes: Arguments of :func:`tiny_config`.
    """
    config = SwitchConfig(
        **asdict(tiny_config(**sizes)) | {"family": "switch"}, experts=experts,
        capacity_factor=capacity_factor, switch_every=switch_every,
    )  # fmt: skip
    return randomised(Switch(config, vocabulary, length), seed).to(dtype)


def randomised(model: Made, seed: int) -> Made:
    """The model with parameters that are all random; factors of norms around 1."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
            if name.endswith("norm.weight"):
                parameter += 1
    return model


def tiny_batch(
    *, samples: int = 4, length: int = LENGTH, masked: int = MASKED, vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> MaskedBatch:  # fmt: skip
    """Random tokens with the same number of masked positions in every sample."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (samples, length), generator=random)
    chosen = torch.rand(samples, length, generator=random).argsort(1)[:, :masked].sort(1).values
    positions = (chosen + torch.arange(samples)[:, None] * length).flatten()
    targets = torch.randint(vocabulary, (samples * masked,), generator=random)
    return MaskedBatch(tokens, targets, positions)


def tiny_vgg(
    *, stages: tuple[tuple[int, ...], ...] = ((4, 6), (5, 7)), classes: int = 3, channels: int = 2,
    size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> Vgg:  # fmt: skip
    """Four layers, 22 filters, in which every parameter is random and large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = VggConfig("tiny", stages=[list(s) for s in stages])
        model = Vgg(config, classes, channels, size)
        with torch.no_grad():
            for parameter in model.features.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            model.classifier.weight.normal_()
    return model.to(dtype)


def tiny_images(
    *, samples: int = 5, channels: int = 2, size: int = 6, classes: int = 3, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ImageBatch:  # fmt: skip
    """Random images and classes."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, channels, size, size, generator=random, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=random)
    return ImageBatch(images.to(dtype), labels)


def shapes(**axes: tuple[object, ...]) -> list[dict[str, object]]:
    """All combinations of the axes' values, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
