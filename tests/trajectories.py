"""Short runs of every model and method in float64: numbers that a change of the code must keep.

``python -m tests.trajectories`` writes ``trajectories.json`` anew. Do so only for a change that is
meant to give other numbers, and say why in its commit.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

from mat.layers import convolution
from mat.suite import engine
from mat.suite.compose import resolve
from mat.suite.data.base import Data
from mat.suite.data.images import ImageBatch
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.interface import Batch
from mat.suite.models import build
from mat.suite.runs import RunFolder
from tests.short_runs import composed

FILE = Path(__file__).with_name("trajectories.json")
TRAINING, OTHERS = 60, 8  # samples; the last batch of an epoch is a short one
TRANSFORMER = (
    "model.layers=2", "model.width=8", "model.heads=2", "model.ffn_hidden=12", "model.ffn_groups=3",
    "dataset=pydocs", "dataset.vocabulary=64", "dataset.length=8", "train=mini", "train.batch=16",
    "train.lr=1e-2", "train.marks=[]",
)  # fmt: skip
INTERVAL = 0.14  # of FLOPs between selections; a configuration allows less, but runs are short here
MODELS: dict[str, tuple[str, ...]] = {
    "bert": ("model=bert_mini", *TRANSFORMER, "train.pflops=3e-8"),
    "bert_post": (
        "model=bert_mini", *TRANSFORMER, "train.pflops=3e-8",
        "model.positions=learned", "model.norm=post", "model.dropout=0.1",
    ),
    "switch": (
        "model=switch_mini", *TRANSFORMER, "train.pflops=3e-8", "selection=experts_mini",
        "model.experts=4", "model.switch_every=2", "model.capacity_factor=1.1",
        "selection.units=[heads,experts,ffn]",
    ),
    "vgg": (
        "model=vgg16_mini", "model.stages=[[4],[5,6]]", "dataset=digits", "dataset.size=8",
        "selection=filters_mini", "train=images_mini", "train.batch=16", "train.pflops=4e-8",
    ),
}  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {
    name: (f"method={name}",)
    for name in (
        "baseline", "fitted", "rand", "multirate", "mat", "mat_equal", "inverted", "shuffled",
        "static", "gradnorm",
    )
} | {
    "rand_matched": ("method=rand",),  # to the mat run
    "mat_alpha": ("method=mat", "selection.share=null", "selection.alpha=0.2"),
    "mat_sum": ("method=mat", "selection.reduction=sum"),
    "mat_full": ("method=mat", "selection.reduction=full", "selection.samples=2"),
    "mat_online": ("method=mat", "selection.reduction=online"),
    "mat_accumulated": ("method=mat", "train.accumulation=2"),
}  # fmt: skip
SHORT = (
    "hardware=cpu", "hardware.precision=float32", "hardware.threads=1", "selection.samples=4",
    "selection.projections=2", "selection.beta=0.1",
    "train.eval_samples=8", "train.eval_batch=8", "train.log_steps=1", "tracking.progress=false",
)  # fmt: skip
UNCOUPLED = ("mat_online", "mat_accumulated")  # need a loss that is a mean over independent samples


def cases() -> list[str]:
    """``<model> <method> <backward mode>``; post-norm with MAT, multirate and no method only."""
    names = []
    for model in MODELS:
        for method in METHODS:
            if method in UNCOUPLED and not model.startswith("bert"):
                continue
            if model == "bert_post" and method not in ("baseline", "mat", "multirate"):
                continue
            modes = ("cut",) if method in ("baseline", "fitted") else ("cut", "exact")
            names += [f"{model} {method} {mode}" for mode in modes]
    return names


class Made(Data):
    """Samples made from a seed, with something to learn in them: float64 images, or tokens.

    Args:
        outputs: Classes, or pieces.
        seed: Of the order of the training samples and of their masks.
        image: Shape of an image, or None for sequences of 8 tokens.
    """

    def __init__(self, outputs: int, seed: int, image: tuple[int, ...] | None) -> None:
        super().__init__(TRAINING, seed, outputs)
        random = np.random.default_rng(0)
        total = TRAINING + 2 * OTHERS
        self.image = image
        self.labels = random.integers(0, outputs, total)
        if image:
            means = random.normal(size=(outputs, *image))
            self.samples = means[self.labels] + random.normal(size=(total, *image))
        else:
            steps = random.integers(1, 4, (total, 8))  # a random walk around the vocabulary
            self.samples = 5 + (self.labels[:, None] + steps.cumsum(1)) % (outputs - 5)

    def train_batch(self, step: int, batch: int) -> tuple[Batch, int]:
        rows, key, epoch = self._train_rows(step, batch)
        return self._batch(rows, key), epoch

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterator[Batch]:
        first = TRAINING + OTHERS * (split == "test")
        yield self._batch(np.arange(first, first + OTHERS), [7])

    def probe_batch(self, samples: int) -> Batch:
        return self._batch(self._probe_rows(samples), [self.seed, 8])

    def facts(self) -> dict[str, float]:
        return {}

    def _batch(self, rows: Any, key: list[int]) -> Batch:
        if self.image:
            images = torch.from_numpy(self.samples[rows])
            return ImageBatch(
                images.contiguous(memory_format=torch.channels_last),
                torch.from_numpy(self.labels[rows]),
            )
        batch: MaskedBatch = mask(
            self.samples[rows].astype(np.uint16), 0.25, 4, 5, self.outputs, key
        )
        return batch


def trajectory(case: str, folder: Path, matched: Path | None = None) -> dict[str, Any]:
    """Make one run.

    Args:
        case: One of :func:`cases`.
        folder: For the run's files.
        matched: Folder of a finished mat run of the same model and mode, for ``rand_matched``.

    Returns:
        Lists over steps and selections, FLOPs by column, losses, and (sum, norm) by parameter.
    """
    model, method, mode = case.split()
    overrides = [*MODELS[model], *SHORT, *METHODS[method], f"selection.mode={mode}", "seed=1"]
    overrides += [f"method.matched={matched}"] if matched else []
    config = resolve(composed(*overrides))
    config.selection.interval = INTERVAL
    if method == "mat_full" and model != "vgg":
        config.train.pflops *= 6  # an estimate of all 32 outputs costs as much as ten steps
    data = Made(6 if model == "vgg" else 16, config.seed, (3, 8, 8) if model == "vgg" else None)
    norms: list[float] = []
    with (
        mock.patch.object(engine.datasets, "load", lambda *_: data),
        mock.patch.object(engine, "build", lambda *arguments: build(*arguments).double()),
        mock.patch.multiple(convolution, BLOCK=1, SHARE=1.0),  # few channels: nothing is filled up
    ):
        training = engine.Training(config, RunFolder(folder, config))
        step = training.stepper.step

        def noted(*arguments: Any, **options: Any) -> Any:
            outcome = step(*arguments, **options)
            norms.append(outcome.read().norm)
            return outcome

        training.stepper.step = noted  # type: ignore[method-assign]
        summary = training.train()
        training.close(summary)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    units = pd.read_parquet(folder / "units.parquet")
    latest = torch.load(folder / "checkpoint" / "latest.pt", weights_only=True)
    count = int((units["t"] == 0).sum())
    records = [rows for _, rows in units.groupby("t")]
    score = "gradnorm" if method == "gradnorm" else "lambda_max"
    return {
        "lr": [event["lr"] for event in steps],
        "active": [round(event["active_now"] * count) for event in steps],
        "norm": norms,
        "loss": [event["loss"] for event in steps],
        "selected_at": [int(rows["step"].iloc[0]) for rows in records],
        "score": [rows[score].tolist() for rows in records if rows[score].notna().all()],
        "open": ["".join("01"[a] for a in rows["active"]) for rows in records],
        "stopped": ["".join("01"[s] for s in rows["stopped"]) for rows in records],
        "flops": {
            name: round(summary[f"pflops_{name}"] * engine.PFLOP)
            for name in ("forward", "input_grad", "weight_grad", "overhead", "vocabulary", "needed")
        },
        "validation": [event["loss"] for event in events if event["event"] == "evaluation"],
        "test": summary["test_loss"],
        "final": sums(latest["model"]),
    }


def sums(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Sum and norm of every tensor, whatever its layout."""
    return {
        name: [float(tensor.sum()), float(tensor.norm())]
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked") and name != "decoder.weight"  # which is tied
    }


def needed_run(case: str) -> str | None:
    """The case whose run another one is matched to."""
    model, method, mode = case.split()
    return f"{model} mat {mode}" if method == "rand_matched" else None


def trajectories(wanted: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of some cases, and of those that they are matched to."""
    made: dict[str, dict[str, Any]] = {}

    def make(case: str) -> Path:
        path = folder / case.replace(" ", "-")
        if case not in made:
            other = needed_run(case)
            made[case] = trajectory(case, path, make(other) if other else None)
        return path

    for case in wanted:
        make(case)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        made = trajectories(sys.argv[1:] or cases(), Path(temporary))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items()]
    if sys.argv[1:]:
        print("\n".join(lines))
    else:
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
