"""What a call of the estimator costs as the model and the probe grow, and the law that it follows.

    python -m benchmarks.scaling

From BERT-mini, n = 32 samples of 64 tokens, m = 1, one thing at a time: units per layer (heads and
feed-forward groups, the width fixed), samples, tokens, width (heads stay 32 wide), projections.
Every point is a median; beside it the FLOPs of the ledger. The law is a line through the
logarithms: seconds ~ x^exponent over the upper half of the points.
"""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.harness import TOY, autocast, medians, path_of, save, write
from benchmarks.subjects import encoder, gates_of, tokens
from mat import flops, ntk
from mat.suite.config import BertConfig

POINTS: dict[str, tuple[int, ...]] = {
    "units": (4, 8, 16, 32, 64),
    "samples": (4, 8, 16, 32, 64, 128),
    "tokens": (16, 32, 64, 128, 256),
    "width": (64, 128, 256, 512),
    "projections": (1, 2, 4, 8, 16),
}
if TOY:
    POINTS = {axis: points[:2] for axis, points in POINTS.items()}
VOCABULARY = 64 if TOY else 4096


def case(axis: str, x: int) -> tuple[nn.Module, Any, int]:
    """Model, probe and number of projections of a point."""
    width = x if axis == "width" else 128
    heads, groups = (x, x) if axis == "units" else (width // 32, 8)
    length = x if axis == "tokens" else 64
    samples = {"samples": x, "projections": 16}.get(axis, 4 if TOY else 32)
    config = BertConfig(
        "scaling", "bert", 2, width, heads, 4 * width, groups, "learned", "pre"
    )  # fmt: skip
    torch.manual_seed(0)
    model = encoder(config, VOCABULARY, length)
    gates_of(model)
    return model, tokens(VOCABULARY, samples, length), x if axis == "projections" else 1


def measure(axis: str, points: tuple[int, ...]) -> pd.DataFrame:
    """One row per point, measured in turn."""
    cases = [case(axis, x) for x in points]

    def call(model: nn.Module, batch: Any, m: int) -> None:
        with autocast():
            ntk.estimate(model, batch, projections=m)

    spent = medians([lambda c=c: call(*c) for c in cases], 3, warmup=1)
    with autocast():
        work = [flops.estimate(model, batch, passes=m).everything for model, batch, m in cases]
    frame = pd.DataFrame({"axis": axis, "x": points, "seconds": spent, "flops": work})
    print(frame.to_string(index=False), flush=True)
    return frame


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Slope of log y over log x in the upper half of the points."""
    upper = slice(len(x) // 2 - 1, None)
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def plot(frame: pd.DataFrame, law: dict[str, dict[str, float]]) -> None:
    """One panel per axis: seconds, and FLOPs on the same scale for comparison."""
    figure, axes = plt.subplots(1, len(law), figsize=(3.6 * len(law), 3.6), sharey=True)
    for ax, (axis, found) in zip(axes, law.items(), strict=True):
        part = frame[frame.axis == axis]
        ax.plot(part.x, part.seconds, marker="o", label=f"seconds ~ x^{found['seconds']:.2f}")
        scaled = part.flops * float(part.seconds.iloc[-1] / part.flops.iloc[-1])
        label = f"FLOPs ~ x^{found['flops']:.2f} (scaled)"
        ax.plot(part.x, scaled, linestyle="--", color="gray", label=label)
        name = "units per layer" if axis == "units" else axis
        ax.set(xscale="log", yscale="log", xlabel=name, title=axis)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("seconds per call")
    about = "two layers, width 128, n = 32 (projections: 16), 64 tokens, m = 1"
    figure.suptitle(f"Cost of one estimate: {about}")
    figure.tight_layout()
    save(figure, "scaling")


def main() -> None:
    """Measure every axis."""
    frame = pd.concat([measure(axis, points) for axis, points in POINTS.items()], ignore_index=True)
    law = {
        str(axis): {name: exponent(part.x, part[name]) for name in ("seconds", "flops")}
        for axis, part in frame.groupby("axis", sort=False)
    }
    for axis, found in law.items():
        print(f"{axis}: seconds ~ x^{found['seconds']:.2f}, FLOPs ~ x^{found['flops']:.2f}")
    frame.to_csv(path_of("scaling", "csv"), index=False, float_format="%.5g")
    plot(frame, law)
    write("scaling", [], law=law, points=frame.to_dict("records"))


if __name__ == "__main__":
    main()
