"""Learning curves of a table: validation loss or accuracy against PFLOPs and against seconds.

    python -m results.curves table1_mini       # results/figures/table1_mini_curves.png

Reads the runs that the table reads, and refuses what the table refuses. A line is the mean over
seeds, its band one sample standard deviation to either side, both interpolated on a grid that all
seeds cover.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mat.suite.errors import UserError
from mat.suite.files import say
from mat.suite.glance import Glance
from results.cli import add_seeds, command, parser_of, save_figure
from results.frame import Key, Run
from results.measures import LOSS, Array, Score
from results.specs import SPECS, Row, TableSpec

# Okabe and Ito's colours, which stay apart under every colour blindness (without yellow, too faint
# for a line). A method looks the same in every figure; its variant is dashed, and a model other
# than the baseline's is grey.
LINES = {
    "baseline": ("#000000", "-"), "fitted": ("#000000", "--"),
    "rand": ("#E69F00", "-"), "rand_matched": ("#E69F00", "--"),
    "multirate": ("#0072B2", "-"), "gradnorm": ("#0072B2", "--"),
    "mat": ("#D55E00", "-"), "mat_equal": ("#D55E00", "--"),
    "static": ("#009E73", "-"), "inverted": ("#CC79A7", "-"), "shuffled": ("#56B4E9", "-"),
}  # fmt: skip
STATES = {"frozen": "#B8B8B8", "active": "#0072B2", "stopped": "#E69F00"}  # of a unit
OTHER_MODEL = "#8A8A8A"
LAYERS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A")
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}


def band(
    runs: Sequence[Glance], axis: str, score: Score = LOSS, points: int = 400
) -> tuple[Array, Array, Array]:
    """Mean and spread of the validation score over seeds.

    Args:
        runs: The runs of one row.
        axis: What the score is read against: "pflops", "seconds" or "step".
        score: Which one.
        points: Size of the grid.

    Returns:
        Grid, mean and sample standard deviation (0 for one run), each of shape (points,). The grid
        goes from the latest first to the earliest last evaluation, so that no run is extrapolated.

    Raises:
        UserError: If there is no such range: one run's evaluations end before another's begin.
    """
    curves = [
        np.stack([run.evaluations[axis].astype(float), score.shown * score.values(run)], 1)
        for run in runs
    ]
    begins, ends = (
        [float(curve[0, 0]) for curve in curves],
        [float(curve[-1, 0]) for curve in curves],
    )
    start, end = max(begins), min(ends)
    if start > end:
        early, late = runs[ends.index(end)].path, runs[begins.index(start)].path
        raise UserError(
            f"{early} is last evaluated at {axis}={end:.4g}, before {late} is first at "
            f"{start:.4g}, so there is no mean of them: train one again."
        )
    grid = np.linspace(start, end, points)
    values = np.stack([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(grid)
    return grid, values.mean(axis=0), spread


def draw_band(
    axes: Axes, runs: Sequence[Glance], axis: str, score: Score, style: tuple[str, str], label: str
) -> tuple[Array, Array, Array]:
    """Draw a row's mean and band, named with the number of its runs; returns what ``band`` does."""
    (grid, mean, spread), (colour, dash) = band(runs, axis, score), style
    axes.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
    axes.plot(grid, mean, dash, color=colour, linewidth=1.7, label=f"{label} (n = {len(runs)})")
    return grid, mean, spread


def layer_colours(layers: Iterable[int]) -> dict[int, str]:
    """A colour for every layer. Depth is ordered: more layers than can be told apart run through
    viridis.
    """
    known = sorted({int(layer) for layer in layers})
    if len(known) <= len(LAYERS):
        return dict(zip(known, LAYERS, strict=False))
    # Its end is too bright on white
    steps = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(known)))
    return dict(zip(known, map(to_hex, steps), strict=True))


def count(rows: Iterable[Sequence[object]]) -> str:
    """How many runs are behind the lines of a panel: "n = 3", or "n = 0 to 3" where rows differ."""
    sizes = [len(runs) for runs in rows]
    low, high = min(sizes), max(sizes)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def line_of(spec: TableSpec, row: Row) -> tuple[str, str]:
    """Colour and dashes of a row."""
    colour, dash = LINES[row.method]
    return (colour if row.model == spec.baseline[0] else OTHER_MODEL), dash


def _panel(
    axes: Axes, spec: TableSpec, rows: Mapping[Key, Sequence[Run]], axis: str, entropy: float | None
) -> None:
    low, high, end = np.inf, -np.inf, 0.0
    for row in spec.rows:
        runs, style = rows[row.key], line_of(spec, row)
        if not runs:
            continue
        grid, mean, spread = draw_band(axes, runs, axis, spec.score, style, row.label)
        axes.plot(grid[-1], mean[-1], "o", color=style[0], markersize=3.5)
        # The view starts where a tenth of the curve is over: the way from initialisation would
        # flatten the rest.
        late = grid >= grid[-1] / 10
        low, high = min(low, (mean - spread)[late].min()), max(high, (mean + spread)[late].max())
        end = max(end, float(grid[-1]))
    if not end:
        axes.text(
            0.5,
            0.5,
            "no run had the machine to itself",
            transform=axes.transAxes,
            ha="center",
            color="0.4",
        )
        return
    margin = 0.06 * (high - low)
    axes.set(xlim=(0, 1.02 * end), ylim=(low - margin, high + margin))
    if entropy is not None and low < entropy < high:
        axes.axhline(entropy, color="0.45", linestyle=":", linewidth=1.3)
        axes.annotate(
            "unigram entropy",
            (end, entropy),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="0.35",
            fontsize=8.5,
        )


def picture(spec: TableSpec, root: Path, seeds: int) -> Figure:
    """The curves of a table's rows.

    Args:
        spec: The table.
        root: Folder of all runs.
        seeds: Least number of seeds in each row.

    Raises:
        UserError: If the runs cannot fill the table.
    """
    rows = spec.load(root, seeds)
    timed = {key: [run for run in runs if run.timed] for key, runs in rows.items()}
    entropy = rows[spec.baseline][0].summary.get("unigram_entropy")
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(right, spec, timed, "seconds", None)
    _panel(left, spec, rows, "pflops", entropy)  # last: both panels show its range
    left.set(
        title="Against compute",
        xlabel="PFLOPs executed",
        ylabel=f"validation {spec.score.name} ({spec.score.unit})",
    )
    right.set(title=f"Against time, of runs alone on their machine ({count(timed.values())})",
              xlabel="seconds of training, selection and estimator")  # fmt: skip
    figure.suptitle(f"{spec.title} (mean over seeds, band ± 1 sd)", x=0.01, ha="left", fontsize=12)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=2.6
    )
    return figure


def draw(spec: TableSpec, root: Path, out: Path, seeds: int) -> Path:
    """Write a table's curves as PNG into folder ``out``; the rest is as for ``picture``."""
    with matplotlib.rc_context(STYLE):
        return save_figure(picture(spec, root, seeds), out / f"{spec.name}_curves", dpi=200)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when the curves could not be drawn."""
    parser = parser_of("curves", "Draw a table's learning curves.", "results/figures")
    parser.add_argument("table", choices=list(SPECS), help="whose rows to draw")
    add_seeds(parser)
    chosen = parser.parse_args(arguments)
    path = draw(SPECS[chosen.table], chosen.runs, chosen.out, chosen.seeds)
    say(f"wrote {path}", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
