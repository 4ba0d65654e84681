"""Models and batches small enough for references that loop over everything."""

import itertools
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from mat.suite.bert import Bert
from mat.suite.config import BertConfig, HardwareConfig, SwitchConfig, VggConfig
from mat.suite.data.images import ImageBatch
from mat.suite.data.masking import MaskedBatch
from mat.suite.switch import Switch
from mat.suite.units import unit_layers
from mat.suite.vgg import Vgg

VOCABULARY, LENGTH, MASKED = 11, 6, 2
Model = TypeVar("Model", Bert, Switch)


def tiny_config(
    *, layers: int = 2, width: int = 12, heads: int = 3, ffn_hidden: int = 12, ffn_groups: int = 3,
    positions: str = "rotary", norm: str = "pre", dropout: float = 0.0,
) -> BertConfig:  # fmt: skip
    """Two layers with three heads of width 4 and three feed-forward groups of 4 neurons."""
    return BertConfig(
        name="tiny", layers=layers, width=width, heads=heads, ffn_hidden=ffn_hidden, ffn_groups=ffn_groups,
        positions=positions, norm=norm, dropout=dropout,
    )  # fmt: skip


def tiny_bert(
    *, vocabulary: int = VOCABULARY, length: int = LENGTH, seed: int = 0, dtype: torch.dtype = torch.float64,
    **config: object,
) -> Bert:  # fmt: skip
    """A BERT of :func:`tiny_config` in which every parameter is random and large enough to matter.

    Args:
        vocabulary: V.
        length: Longest sequence T.
        seed: Seed of the parameters; the global random state is left alone.
        dtype: Of parameters and buffers.
        config: Arguments of :func:`tiny_config`.
    """
    return _randomised(Bert, tiny_config(**config), vocabulary, length, seed, dtype)  # type: ignore[arg-type]


def _randomised(
    cls: type[Model], config: BertConfig, vocabulary: int = VOCABULARY, length: int = LENGTH, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Model:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config, vocabulary, length)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
                if name.endswith("norm.weight"):
                    parameter += 1
    return model.to(dtype)


def tiny_switch(*, experts: int = 3, capacity_factor: float = 3.0, switch_every: int = 1, **options: Any) -> Switch:
    """A Switch of :func:`tiny_config`'s sizes, with all parameters random; by default no expert can be too full.

    Args:
        experts: E.
        capacity_factor: In training.
        switch_every: Which blocks have experts.
        options: As of :func:`tiny_bert`.
    """
    sizes = {k: options.pop(k) for k in list(options) if k not in ("vocabulary", "length", "seed", "dtype")}
    config = SwitchConfig(
        **asdict(tiny_config(**sizes)) | {"family": "switch"}, experts=experts, capacity_factor=capacity_factor,
        switch_every=switch_every,
    )  # fmt: skip
    return _randomised(Switch, config, **options)


def tiny_batch(
    *, samples: int = 4, length: int = LENGTH, masked: int = MASKED, vocabulary: int = VOCABULARY, seed: int = 0
) -> MaskedBatch:
    """Random tokens with the same number of masked positions in every sample."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (samples, length), generator=random)
    chosen = torch.rand(samples, length, generator=random).argsort(1)[:, :masked].sort(1).values
    positions = (chosen + torch.arange(samples)[:, None] * length).flatten()
    targets = torch.randint(vocabulary, (samples * masked,), generator=random)
    return MaskedBatch(tokens, targets, positions)


def tiny_vgg(
    *, stages: tuple[tuple[int, ...], ...] = ((4, 6), (5, 7)), classes: int = 3, channels: int = 2, size: int = 6,
    block: int = 2, gather: float = 0.8, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> Vgg:  # fmt: skip
    """Four layers, 22 filters, in which every parameter is random and large enough to matter."""
    hardware = HardwareConfig(device="cpu", precision="float32", gather_block=block, gather_share=gather)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Vgg(VggConfig("tiny", stages=[list(s) for s in stages]), classes, channels, size, hardware)
        with torch.no_grad():
            for layer in unit_layers(model):
                for parameter in layer.parameters():
                    parameter += 0.3 * torch.randn_like(parameter)
            model.classifier.weight.normal_()
    return model.to(dtype)


def tiny_images(
    *, samples: int = 5, channels: int = 2, size: int = 6, classes: int = 3, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ImageBatch:  # fmt: skip
    """Random images and classes."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, channels, size, size, generator=random, dtype=torch.float64).to(dtype)
    return ImageBatch(images, torch.randint(classes, (samples,), generator=random))


def shapes(**axes: tuple[object, ...]) -> list[dict[str, object]]:
    """All combinations of the axes' values, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
