"""VGG16: the dense step against torchvision's, data loading, every layer over active shares.

    python -m benchmarks.vgg [dense] [loading] [layers]

The whole model over active shares is a case of ``benchmarks.gates``.
"""

import itertools
import sys

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Action, Row, autocast, medians, row, write, write_table
from benchmarks.subjects import IMAGES, MODES, Subject, set_share, stock_twin, subject
from mat.layers.convolution import carriers
from mat.layers.gate import BackwardMode, length
from mat.layers.site import Operation, note_of, stand_in, with_compact
from mat.suite import data
from mat.suite.config import ImageConfig

REPEATS = {"vgg16": 9, "vgg16_mini": 21}
SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)
DIGITS = ImageConfig(name="digits", source_size=8, size=32, classes=10, validation=300)


def dense() -> list[Row]:
    """Our dense step against torchvision's."""
    rows = []
    for name, repeats in REPEATS.items():
        ours = subject(name)
        times = medians([ours.step(), stock_twin(ours)], repeats)
        rows.append(row(f"dense: {name} against torchvision", *times, 1.0))
    return rows


def loading() -> list[Row]:
    """A step's batch, cropped, mirrored and normalised, against the dense step."""
    images, step, rows = data.load(DIGITS, 0), itertools.count(), []
    for name, repeats in REPEATS.items():
        actions: list[Action] = [lambda: images.train_batch(next(step), IMAGES.batch)]
        times = medians([*actions, subject(name).step()], repeats)
        rows.append(row(f"loading: {name}, a batch against the dense step", *times, 0.03))
    return rows


def layers() -> list[Row]:
    """Every layer by itself over active shares, those of its inputs too; ``vgg_layers.csv``."""
    rows, found, ours = [], [], subject("vgg16")
    for number, gate in enumerate(ours.gates.layers):
        for mode in MODES:
            times = medians([passes(ours, number, share, mode) for share in SHARES], 5)
            costs = [work(ours, number, share, mode) for share in SHARES]
            for share, spent, cost in zip(SHARES, times, costs, strict=True):
                about = {"layer": number, "filters": gate.n_units, "size": side(ours, number)}
                about |= {"mode": mode, "share": share}
                ratios = {"time_ratio": spent / times[0], "flops_ratio": cost / costs[0]}
                found.append({**about, "seconds": spent, **ratios})
            third = SHARES.index(1 / 3)
            where = f"layers: {number}, {gate.n_units} filters at {side(ours, number)}, {mode}"
            ratios = times[third] / times[0], costs[third] / costs[0]
            name = f"{where}, a third active: time over FLOPs"
            rows.append(row(name, *ratios, None, "of dense"))
    write_table("vgg_layers", pd.DataFrame(found), "layer")
    return rows


def stretch(ours: Subject, number: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules before a layer of filters, and its own."""
    features = list(ours.model.get_submodule("features").children())
    starts = [i for i, module in enumerate(features) if isinstance(module, nn.Conv2d)]
    first, last = starts[number], [*starts, len(features)][number + 1]
    return features[:first], features[first:last]


def side(ours: Subject, number: int) -> int:
    """Height and width of a layer's maps."""
    before, _ = stretch(ours, number)
    return 32 >> sum(isinstance(module, nn.MaxPool2d) for module in before)


def work(ours: Subject, number: int, share: float, mode: BackwardMode) -> float:
    """What a layer's convolution runs, in units of its dense forward pass."""
    set_share(ours.gates, share, mode)
    convolution = stretch(ours, number)[1][0]
    site = next(site for site in ours.gates.sites if site.module is convolution)
    shares = site.shares(Operation((), 1))
    return float(1 + (shares.input_grad if number else 0) + shares.weight_grad)


def passes(ours: Subject, number: int, share: float, mode: BackwardMode) -> Action:
    """Forward and backward of one layer of filters with its batch norm, ReLU and pool."""
    layer = nn.Sequential(*stretch(ours, number)[1])
    convolution = layer[0]
    assert isinstance(convolution, nn.Conv2d)
    shape = (IMAGES.batch, convolution.in_channels, side(ours, number), side(ours, number))
    values = torch.randn(shape, device=DEVICE).to(torch.bfloat16)
    values = values.contiguous(memory_format=torch.channels_last)
    below = ours.gates.layers[number - 1] if number else None

    def inputs() -> Tensor:
        """Maps as the layer below hands them on."""
        x = values.detach()
        if below is None:
            return x
        if below.open or mode == "exact":
            return x.requires_grad_()
        index = carriers(below, np.arange(below.n_units))
        compact = stand_in(x, length(index, below.n_units), 1).requires_grad_()
        return with_compact(x, None if index is None else compact, index)

    def run() -> None:
        set_share(ours.gates, share, mode)
        with autocast():
            y = layer(inputs())
        note = note_of(y)
        output = y if note is None else note.stand_in
        if output.requires_grad:
            output.backward(torch.ones(output.shape, device=DEVICE, dtype=output.dtype))
        ours.optimiser.zero_grad()

    return run


PARTS = {"dense": dense, "loading": loading, "layers": layers}


def main(names: list[str]) -> None:
    """Run the parts named, or all; the results of others stay."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in names or list(PARTS):
        rows += PARTS[name]()
    write("vgg", rows, merge=bool(names))


if __name__ == "__main__":
    main(sys.argv[1:])
