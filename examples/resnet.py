"""Train torchvision's ResNet-18 on CIFAR-10 in a plain loop: some filters, mode ``exact``.

    python -m examples.resnet --data FOLDER --out FOLDER

The optimiser is torch's SGD under ``gates.guard``. All filters set the length; the other methods
stop at a share of its FLOPs, their learning rate fitted to that.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import mat
from examples.meter import Meter, now, schedule
from examples.report import Curve, curves_plot, curves_table

RATE = 0.05
PROBE = 16  # images that scores are measured on
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "fitted": None,
    "mat": {"rule": "threshold"},
    "random filters": {"rule": "random"},
}


def resnet18(classes: int) -> nn.Module:
    """torchvision's, with the stem for small images: 3 x 3 without stride, no pooling."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def read(folder: Path | None, split: str, most: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) around zero and labels (n,), from parquet files or the hub.

    Args:
        folder: With ``train*.parquet`` and ``test*.parquet``, columns ``img`` and ``label``.
        split: ``train`` or ``test``.
        most: n at most.
    """
    if folder is None:
        import datasets

        table = datasets.load_dataset("uoft-cs/cifar10", split=f"{split}[:{most}]").data.table
    else:
        paths = sorted(folder.glob(f"{split}*.parquet"))
        if not paths:
            raise SystemExit(f"{folder}: no {split}*.parquet there: name the folder with --data")
        table = pyarrow.concat_tables(pyarrow.parquet.read_table(path) for path in paths)
    rows = table.slice(0, most).to_pydict()
    files = (Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in rows["img"])
    pixels = torch.from_numpy(np.stack([np.asarray(file) for file in files]))  # (n, 32, 32, 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(rows["label"])


def batches(
    images: Tensor, labels: Tensor, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: shuffled, half of the images mirrored."""
    random = torch.Generator().manual_seed(seed)
    while True:
        for numbers in torch.randperm(len(images), generator=random).split(size):
            if len(numbers) == size:
                mirrored = torch.rand(size, 1, 1, 1, generator=random) < 0.5
                batch = images[numbers]
                yield torch.where(mirrored, batch.flip(-1), batch), labels[numbers]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Share of images with the right label, in per cent."""
    model.eval()
    right = torch.zeros((), device=device)
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        right += (model(x.to(device)).argmax(1) == y.to(device)).sum()
    model.train()
    return 100 * float(right) / len(images)


def train(method: str, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor],
          given: argparse.Namespace) -> Curve:  # fmt: skip
    """One run: its accuracy over its FLOPs."""
    torch.manual_seed(given.seed)
    device = given.device
    model = resnet18(int(train_set[1].max()) + 1).to(device)
    images = train_set[0][: given.batch].to(device)
    labels = train_set[1][: given.batch].to(device)
    probe = images[:PROBE]

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    whole = Meter(model, loss).step() * given.epochs * (len(train_set[0]) // given.batch)
    budget = whole * (1.0 if method == "full" else given.flops)
    gates = None
    if (chosen := METHODS[method]) is not None:
        config = mat.MATConfig(
            share=given.share, mode="exact", units=("filters",), every=given.every, log=False,
            seed=given.seed, **chosen,
        )  # fmt: skip
        gates = mat.attach_(model, config)
        gates.guard(optimiser)
    meter = Meter(model, loss, gates, probe)
    curve = Curve(method, whole)
    spent, seconds = 0, 0.0
    for step, (x, y) in enumerate(batches(*train_set, given.batch, given.seed)):
        if curve.due(spent / budget):
            curve.add(spent, step, seconds, accuracy(model, *test_set, device))
        if spent >= budget:
            return curve
        start = now()
        if gates is not None and gates.maybe_select(step, probe):
            spent += meter.selection
        for group in optimiser.param_groups:
            group["lr"] = RATE * schedule(spent / budget)
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds += now() - start
        spent += meter.step()
    raise AssertionError("batches never end")


def main(argv: Sequence[str] | None = None) -> None:
    """Train by every method, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, help="folder with parquet files; the hub if not given")
    parser.add_argument("--out", type=Path, default=Path("examples-out/resnet"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=1024, help="of the training split")
    parser.add_argument("--epochs", type=float, default=2.0, help="of training all filters")
    parser.add_argument("--flops", type=float, default=0.8, help="share that the others spend")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the filters that train")
    parser.add_argument("--every", type=int, default=10, help="steps between selections")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    given = parser.parse_args(argv)
    train_set = read(given.data, "train", given.images)
    test_set = read(given.data, "test", max(1, given.images // 2))
    curves = [train(method, train_set, test_set, given) for method in given.methods]
    curves_plot(given.out / "resnet.png", curves, "test accuracy, %")
    print(curves_table(curves, "test accuracy, %"))


if __name__ == "__main__":
    main()
