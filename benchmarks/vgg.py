"""VGG16: the dense step against torchvision's, data loading, every layer and the whole over active shares, gathering.

    python -m benchmarks.vgg [dense] [loading] [layers] [sampled] [gathering]

The whole model over active shares in ``cut`` and ``exact`` is a subject of ``benchmarks.gates``.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torchvision.models.vgg import make_layers

from benchmarks.harness import RESULTS, Row, medians, row, set_share, write
from mat import flops
from mat.config import HardwareConfig, ImageConfig, TrainConfig, VggConfig
from mat.data.images import ImageBatch, Images
from mat.optim import build_optimiser
from mat.units import BackwardMode, unit_layers
from mat.vgg import FilterLayer, Maps, Vgg

FULL = [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3]
STAGES = {"vgg16": FULL, "vgg16_mini": [[filters // 2 for filters in stage] for stage in FULL]}
REPEATS = {"vgg16": 9, "vgg16_mini": 21}
RECIPE = TrainConfig(pflops=1, batch=128, lr=1e-3, optimiser="sgd", weight_decay=5e-4, clip=None)
SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)
MODES: tuple[BackwardMode, ...] = ("cut", "exact", "sampled")


def pictures(samples: int = RECIPE.batch) -> ImageBatch:
    """Random images of CIFAR-10's size."""
    images = torch.randn(samples, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return ImageBatch(images, torch.randint(10, (samples,)))


def vgg(size: str, block: int = 16, gather: float = 0.75) -> Vgg:
    hardware = HardwareConfig(device="cpu", precision="bfloat16", gather_block=block, gather_share=gather)
    return Vgg(VggConfig(size, stages=STAGES[size]), 10, 3, 32, hardware)


def our_step(model: Vgg, batch: ImageBatch, share: float, mode: BackwardMode) -> Callable[[], None]:
    """A training step with the gates as a share and mode say."""
    optimiser = build_optimiser(model, RECIPE)

    def step() -> None:
        set_share(model, share, mode)
        model.train()
        optimiser.clear()
        with torch.autocast(batch.inputs.device.type, torch.bfloat16):
            loss = model.loss(batch)
        loss.backward()
        optimiser.step(RECIPE.lr)

    return step


def their_step(size: str, batch: ImageBatch) -> Callable[[], None]:
    """The same step as a plain loop over torchvision's layers, channels-last, with a CIFAR head."""
    plan: list[Any] = [filters for stage in STAGES[size] for filters in (*stage, "M")]
    head = nn.Linear(STAGES[size][-1][-1], 10)
    model = nn.Sequential(make_layers(plan, batch_norm=True), nn.Flatten(), head).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=5e-4)

    def step() -> None:
        model.train()
        optimiser.zero_grad()
        with torch.autocast(batch.inputs.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(batch.inputs).float(), batch.targets)
        loss.backward()
        optimiser.step()

    return step


def dense() -> list[Row]:
    """Our dense step against torchvision's."""
    batch, rows = pictures(), []
    for size in STAGES:
        steps = [our_step(vgg(size), batch, 1.0, "cut"), their_step(size, batch)]
        ours, other = medians(steps, REPEATS[size])
        rows.append(row(f"{size}: dense step against torchvision", ours, other, 1.0))
    return rows


def loading() -> list[Row]:
    """A step's batch, cropped, mirrored and normalised, from a cache of CIFAR-10's size, against the dense step."""
    random, rows, step = np.random.default_rng(0), [], itertools.count()
    pixels = {"train": random.integers(0, 256, (45_000, 32, 32, 3), np.uint8)}
    config = ImageConfig(name="random", source_size=32, size=32, classes=10, validation=5_000)
    data = Images(config, 0, pixels, {"train": random.integers(0, 10, 45_000)})
    for size in STAGES:
        steps = [lambda: data.train_batch(next(step), RECIPE.batch), our_step(vgg(size), pictures(), 1.0, "cut")]
        rows.append(row(f"{size}: data loading against the dense step", *medians(steps, REPEATS[size]), 0.03))
    return rows


def pass_of(layer: FilterLayer, below: int, samples: int) -> Callable[[], None]:
    """Forward and backward of one layer by itself; ``below`` of its input channels carry a gradient."""
    inputs = layer.weight.shape[3]
    shape = (samples, inputs, layer.size, layer.size)
    values = torch.randn(shape).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    channels = None if below == inputs else torch.arange(below)
    carrier = values if channels is None else values.new_zeros(1).expand(samples, below, *shape[2:])
    carrier.requires_grad_(bool(layer._below))
    side = layer.size // 2 if layer.pool else layer.size
    gradient = torch.randn(samples, layer.carrying(), side, side).to(torch.bfloat16)
    gradient = gradient.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(Maps(values, carrier, channels))
        if found.carrier.requires_grad:
            found.carrier.backward(gradient)

    return run


def layers() -> list[Row]:
    """Every layer by itself over active shares, those of its inputs too; written to ``vgg_layers.csv``."""
    rows, found = [], []
    model, samples = vgg("vgg16"), RECIPE.batch
    for number, layer in enumerate(unit_layers(model)):
        assert isinstance(layer, FilterLayer)
        for mode in MODES:
            times, costs = [], []
            for share in SHARES:
                set_share(model, share, mode)
                below = sum(lower.carrying() for lower in layer._below if lower.n_active) or layer.weight.shape[3]
                times += medians([pass_of(layer, below, samples)], 5)
                costs.append(layer.step_flops(samples, 1, layer.n_active, mode).figure)
            for share, seconds, cost in zip(SHARES, times, costs, strict=True):
                numbers = {"seconds": seconds, "flops": cost, "time_ratio": seconds / times[0]}
                about = {"layer": number, "filters": layer.n_units, "size": layer.size, "mode": mode, "share": share}
                found.append({**about, **numbers, "flops_ratio": cost / costs[0]})
            third = SHARES.index(1 / 3)
            name = f"layer {number}, {layer.n_units} filters at {layer.size}: a third active, {mode}, time over FLOPs"
            rows.append(row(name, times[third] / times[0], costs[third] / costs[0], None, "of dense"))
    RESULTS.mkdir(exist_ok=True)
    pd.DataFrame(found).to_csv(RESULTS / "vgg_layers.csv", index=False)
    return rows


def sampled() -> list[Row]:
    """All modes at a third active, against the dense step, beside their FLOPs."""
    batch, rows = pictures(), []
    for size in STAGES:
        model = vgg(size)
        steps = [our_step(model, batch, 1.0, "cut"), *(our_step(model, batch, 1 / 3, mode) for mode in MODES)]
        times = medians(steps, REPEATS[size])
        steps[0]()
        full = flops.training_step(model, batch).figure
        for mode, step, seconds in zip(MODES, steps[1:], times[1:], strict=True):
            step()
            cost = flops.training_step(model, batch).figure
            wanted = 1.2 if (size, mode) == ("vgg16", "cut") else None
            rows.append(row(f"{size}: a third active, {mode}", seconds, times[0], None))
            rows.append(row(f"{size}: its time over FLOPs ratio", seconds / times[0], cost / full, wanted, "of dense"))
    return rows


def gathering() -> list[Row]:
    """Gathered against dense backward by active share, and block sizes: what ``conf/hardware`` should say."""
    batch, rows = pictures(), []
    for mode in ("cut", "exact"):
        pays = 0.0
        for share in (1 / 2, 5 / 8, 3 / 4, 7 / 8):
            steps = [our_step(vgg("vgg16", gather=gather), batch, share, mode) for gather in (1.0, 0.0)]
            ours, other = medians(steps, 5)
            rows.append(row(f"{mode}: gathered against dense backward, share {share}", ours, other, None))
            pays = share if ours < 0.98 * other else pays
        print(f"{mode}: gathering pays up to a share of {pays}: hardware.gather_share")
    blocks = (8, 16, 32)
    times = medians([our_step(vgg("vgg16", block=block), batch, 1 / 3, "cut") for block in blocks], 5)
    for block, seconds in zip(blocks, times, strict=True):
        rows.append(row(f"cut, a third active: blocks of {block} against 16", seconds, times[1], None))
    return rows


PARTS = {"dense": dense, "loading": loading, "layers": layers, "sampled": sampled, "gathering": gathering}


def main(names: list[str]) -> None:
    """Run the parts named, or all."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in names or list(PARTS):
        rows += PARTS[name]()
    write("vgg", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
