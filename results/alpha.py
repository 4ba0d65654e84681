"""MAT by alpha (eq. 4): loss, active share and stopped units against alpha, for each scope.

python -m results.alpha       # writes results/figures/alpha_mini.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mat.suite.errors import UserError
from mat.suite.glance import Glance
from results.cli import command, parser_of, save_figure
from results.curves import LINES, STYLE
from results.frame import read_runs

RUNS, SEEDS = "alpha_mini", "table1_seeds"  # pilots of one seed; runs at one alpha, other seeds
SCOPES = {"all": ("all units", "#D55E00", "o-"), "kind": ("units of a kind", "#0072B2", "s--")}
OTHERS = {  # label, colour and dashes of the runs without alpha; MAT by share lies on the third's
    "baseline": ("baseline, all FLOPs", *LINES["baseline"]),
    "fitted": ("fitted", *LINES["fitted"]),
    "static": ("a fixed third", LINES["static"][0], "-"),
    "mat": ("MAT by share, a third", "#CC79A7", ":"),
}
COLUMNS = {  # heading and label of the axis, by column of ``points``
    "loss": ("Best validation loss", "nats per masked token"),
    "active": ("Mean active share", "share of the units"),
    "stopped": ("Stopped for good at the end (eq. 7)", "share of the units"),
}
TOP = 5.1  # of the axis of losses; what lies above is written at the edge


def stopped_share(run: Glance) -> float:
    """Share of the units that eq. (7) has stopped by a run's last record."""
    assert run.units is not None
    return float(run.units[run.units["t"] == run.units["t"].max()]["stopped"].mean())


def _by_alpha(run: Glance) -> bool:
    return run.method == "mat" and run.config["selection"]["alpha"] is not None


def points(runs: Sequence[Glance]) -> pd.DataFrame:
    """A row per run of MAT by alpha: scope, alpha, seed, loss, active and stopped."""
    rows = [
        {
            "scope": run.config["selection"]["scope"],
            "alpha": run.config["selection"]["alpha"],
            "seed": run.seed,
            "loss": run.best,
            "active": run.summary["active_share"],
            "stopped": stopped_share(run),
        }
        for run in filter(_by_alpha, runs)
    ]
    table = pd.DataFrame(rows, columns=["scope", "alpha", "seed", *COLUMNS])
    return table.sort_values(["scope", "alpha", "seed"], ignore_index=True)


def _panel(axes: Axes, pilots: pd.DataFrame, seeds: pd.DataFrame, column: str) -> None:
    for scope, (label, colour, style) in SCOPES.items():
        own, others = (table[table["scope"] == scope] for table in (pilots, seeds))
        if len(own):
            axes.plot(own["alpha"], own[column], style, color=colour, label=f"MAT, {label}")
        if len(others):
            axes.plot(
                *(others["alpha"], others[column], "D"), color=colour, markersize=5,
                markerfacecolor="none", label=f"the same, {len(others)} other seeds",
            )  # fmt: skip
    title, label = COLUMNS[column]
    ticks = sorted(pilots["alpha"].unique())
    axes.set(title=title, xlabel="alpha", ylabel=label, xscale="log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _losses_above(axes: Axes, table: pd.DataFrame) -> None:
    """Write at the top of the panel what lies beyond it."""
    for row in table[table["loss"] > TOP].itertuples():
        axes.annotate(
            f"{row.loss:.2f}", (row.alpha, TOP), xytext=(0, -3), textcoords="offset points",
            ha="center", va="top", color=SCOPES[str(row.scope)][1],
        )  # fmt: skip


def picture(root: Path) -> Figure:
    """The figure.

    Args:
        root: Folder of all runs.

    Raises:
        UserError: If there is no pilot by alpha, or a run cannot be read.
    """
    runs = read_runs(root, RUNS)
    if not any(map(_by_alpha, runs)):
        raise UserError(f"{root / RUNS} holds no run of MAT by alpha: train one.")
    others = read_runs(root, SEEDS) if (root / SEEDS).is_dir() else []
    pilots, seeds = points(runs), points(others)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(COLUMNS))
    for axes, column in zip(panels, COLUMNS, strict=True):
        _panel(axes, pilots, seeds, column)
    for method, (label, colour, dashes) in OTHERS.items():
        for run in runs:
            if run.method == method and not _by_alpha(run) and run.best is not None:
                panels[0].axhline(run.best, color=colour, linestyle=dashes, label=label)
    lowest = min([*pilots["loss"], *seeds["loss"], TOP])
    panels[0].set_ylim(lowest - 0.1, TOP)
    _losses_above(panels[0], pilots)
    panels[1].set_ylim(0, 1)
    panels[2].set_ylim(-0.02, 1)
    figure.suptitle(
        "MAT against alpha: Table 1, mini, 0.7 of the baseline's FLOPs; lines: one seed", x=0.01,
        ha="left", fontsize=12,
    )  # fmt: skip
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def draw(root: Path, out: Path) -> Path:
    """Write the figure as PNG into folder ``out``; the rest is as for ``picture``."""
    with matplotlib.rc_context(STYLE):
        return save_figure(picture(root), out / RUNS, dpi=200)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when the figure could not be drawn."""
    parser = parser_of("alpha", "Draw MAT against alpha.", "results/figures")
    chosen = parser.parse_args(arguments)
    print(f"wrote {draw(chosen.runs, chosen.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
