"""Tables and plots of the examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Quantile 0.975 of Student's t distribution by degrees of freedom, from 1.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5


def mean_in_words(values: Sequence[float], digits: int) -> str:
    """Mean and interval."""
    half = interval(values)
    return f"{np.mean(values):.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown with columns of equal width."""
    lines = [list(header), ["-"] * len(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


@dataclass
class Curve:
    """How a method gets on: a value at eleven times of its run.

    Attributes:
        method: Its name.
        whole: FLOPs of the full run, which all are shown as shares of.
        points: FLOPs, steps, seconds and the value, at each time.
    """

    method: str
    whole: float
    points: list[tuple[float, int, float, float]] = field(default_factory=list)

    def due(self, progress: float) -> bool:
        """Whether a value is wanted, by the share of the run's FLOPs that is spent."""
        return progress >= min(1.0, len(self.points) / 10)

    def add(self, flops: float, steps: int, seconds: float, value: float) -> None:
        """Note a value."""
        self.points.append((flops, steps, seconds, value))


def curves_table(curves: Sequence[Curve], value: str) -> str:
    """Where every method ended."""
    rows = []
    for curve in curves:
        flops, steps, seconds, last = curve.points[-1]
        share = f"{flops / curve.whole:.3f}"
        rows.append([curve.method, f"{last:.3f}", share, str(steps), f"{seconds:.1f}"])
    return table(["method", value, "FLOPs", "steps", "seconds"], rows)


def curves_plot(path: Path, curves: Sequence[Curve], value: str) -> None:
    """The values over the FLOPs."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for curve in curves:
        shares = [point[0] / curve.whole for point in curve.points]
        axis.plot(shares, [point[3] for point in curve.points], ".-", label=curve.method)
    axis.set(xlabel="FLOPs, full training = 1", ylabel=value)
    axis.legend()
    save(figure, path)


def dots_plot(path: Path, values: Mapping[str, Sequence[float]], value: str) -> None:
    """Values by name, with their mean and interval."""
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(values) + 1.2))
    for at, each in enumerate(values.values()):
        axis.plot(each, [at] * len(each), ".", color="0.6")
        axis.errorbar(np.mean(each), at, xerr=interval(each), fmt="o", color="C0", capsize=3)
    axis.set(xlabel=value)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
