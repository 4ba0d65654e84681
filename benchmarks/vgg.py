"""VGG16: the dense step against torchvision's, data loading, every layer over active shares, and what pays to gather.

    python -m benchmarks.vgg [dense] [loading] [layers] [gathering]

The whole model over active shares is a case of ``benchmarks.gates``.
"""

import itertools
import sys
from typing import Any

import pandas as pd
import torch
from torch import nn
from torchvision.models.vgg import make_layers

from benchmarks.harness import (
    DEVICE,
    MODES,
    Action,
    Row,
    Subject,
    autocast,
    medians,
    row,
    set_share,
    stock_step,
    write,
    write_table,
)
from mat.suite.config import HardwareConfig, ImageConfig, TrainConfig, VggConfig
from mat.suite.data.images import ImageBatch, Images
from mat.suite.units import BackwardMode, unit_layers
from mat.suite.vgg import FilterLayer, Maps, Vgg

FULL = [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3]
STAGES = {"vgg16": FULL, "vgg16_mini": [[filters // 2 for filters in stage] for stage in FULL]}
REPEATS = {"vgg16": 9, "vgg16_mini": 21}
RECIPE = TrainConfig(pflops=1, batch=128, lr=1e-3, optimiser="sgd", weight_decay=5e-4, clip=None)
SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)


def pictures(samples: int = RECIPE.batch) -> ImageBatch:
    """Random images of CIFAR-10's size."""
    images = torch.randn(samples, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return ImageBatch(images, torch.randint(10, (samples,), device=DEVICE))


def vgg(size: str, block: int = 16, gather: float = 0.75) -> Subject:
    hardware = HardwareConfig(device=DEVICE.type, precision="bfloat16", gather_block=block, gather_share=gather)
    model = Vgg(VggConfig(size, stages=STAGES[size]), 10, 3, 32, hardware)
    return Subject(model.to(DEVICE), pictures(), RECIPE)


def twin_step(size: str, batch: ImageBatch) -> Action:
    """The same step as a plain loop over torchvision's layers, channels-last, with a CIFAR head."""
    plan: list[Any] = [filters for stage in STAGES[size] for filters in (*stage, "M")]
    head = nn.Linear(STAGES[size][-1][-1], 10)
    model = nn.Sequential(make_layers(plan, batch_norm=True), nn.Flatten(), head)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    return stock_step(model, lambda: nn.functional.cross_entropy(model(batch.inputs).float(), batch.targets), RECIPE)


def dense() -> list[Row]:
    """Our dense step against torchvision's."""
    rows = []
    for size, repeats in REPEATS.items():
        subject = vgg(size)
        ours, other = medians([subject.step(), twin_step(size, subject.batch)], repeats)
        rows.append(row(f"dense: {size} against torchvision", ours, other, 1.0))
    return rows


def loading() -> list[Row]:
    """A step's batch, cropped, mirrored and normalised, of digits at CIFAR-10's size, against the dense step."""
    rows, step = [], itertools.count()
    data = Images(ImageConfig(name="digits", source_size=8, size=32, classes=10, validation=300), 0)
    for size, repeats in REPEATS.items():
        actions: list[Action] = [lambda: data.train_batch(next(step), RECIPE.batch), vgg(size).step()]
        rows.append(row(f"loading: {size}, a batch against the dense step", *medians(actions, repeats), 0.03))
    return rows


def pass_of(model: Vgg, layer: FilterLayer, share: float, mode: BackwardMode) -> Action:
    """Forward and backward of one layer by itself, a share of its filters and of its inputs active."""
    set_share(model, share, mode)
    wanted = [lower for lower in layer._below if lower._wants_gradient]
    inputs, samples = layer.weight.shape[3], RECIPE.batch
    below = sum(lower.carrying() for lower in wanted) or inputs
    shape = (samples, inputs, layer.size, layer.size)
    values = torch.randn(shape, device=DEVICE).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    channels = None if below == inputs else torch.arange(below, device=DEVICE)
    carrier = values if channels is None else values.new_zeros(1).expand(samples, below, *shape[2:])
    carrier.requires_grad_(bool(wanted))
    side = layer.size // 2 if layer.pool else layer.size
    gradient = torch.randn(samples, layer.carrying(), side, side, device=DEVICE).to(torch.bfloat16)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    active = layer.active

    def run() -> None:
        layer.set_active(active, mode)
        layer.clear_gradient()
        carrier.grad = None
        with autocast():
            found = layer(Maps(values, carrier, channels))
        if found.carrier.requires_grad:
            found.carrier.backward(gradient)

    return run


def layers() -> list[Row]:
    """Every layer by itself over active shares, those of its inputs too; written to ``vgg_layers.csv``."""
    rows, found = [], []
    model = vgg("vgg16").model
    for number, layer in enumerate(unit_layers(model)):
        assert isinstance(layer, FilterLayer)
        for mode in MODES:
            times = medians([pass_of(model, layer, share, mode) for share in SHARES], 5)
            costs = []
            for share, seconds in zip(SHARES, times, strict=True):
                set_share(model, share, mode)
                costs.append(layer.step_flops(RECIPE.batch, 1, layer.n_active, mode).figure)
                numbers = {"seconds": seconds, "flops": costs[-1], "time_ratio": seconds / times[0]}
                about = {"layer": number, "filters": layer.n_units, "size": layer.size, "mode": mode, "share": share}
                found.append({**about, **numbers, "flops_ratio": costs[-1] / costs[0]})
            third = SHARES.index(1 / 3)
            name = f"layers: {number}, {layer.n_units} filters at {layer.size}, {mode}, a third active: time over FLOPs"
            rows.append(row(name, times[third] / times[0], costs[third] / costs[0], None, "of dense"))
    write_table("vgg_layers", pd.DataFrame(found), "layer")
    return rows


def gathering() -> list[Row]:
    """Gathered against dense backward by active share, and block sizes: what ``conf/hardware`` should say."""
    rows = []
    for mode in ("cut", "exact"):
        pays = 0.0
        for share in (1 / 2, 5 / 8, 3 / 4, 7 / 8):
            ours, other = medians([vgg("vgg16", gather=gather).step(share, mode) for gather in (1.0, 0.0)], 5)
            rows.append(row(f"gathering: {mode}, against a dense backward, share {share}", ours, other, None))
            pays = share if ours < 0.98 * other else pays
        print(f"{mode}: gathering pays up to a share of {pays}: hardware.gather_share")
    blocks = (8, 16, 32)
    times = medians([vgg("vgg16", block=block).step(1 / 3, "cut") for block in blocks], 5)
    for block, seconds in zip(blocks, times, strict=True):
        rows.append(row(f"gathering: cut, a third active, blocks of {block} against 16", seconds, times[1], None))
    return rows


PARTS = {"dense": dense, "loading": loading, "layers": layers, "gathering": gathering}


def main(names: list[str]) -> None:
    """Run the parts named, or all; the results of others stay."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in names or list(PARTS):
        rows += PARTS[name]()
    write("vgg", rows, merge=bool(names))


if __name__ == "__main__":
    main(sys.argv[1:])
