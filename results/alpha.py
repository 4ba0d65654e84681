"""MAT by alpha (eq. 4): loss, active share and stopped units against alpha, for each scope.

python -m results.alpha       # writes results/figures/alpha_mini.{png,svg}
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

RUNS = "alpha_mini"
SCOPES = {"all": ("all units", "#D55E00", "o-"), "kind": ("units of a kind", "#0072B2", "s--")}
LABELS = {"baseline": "baseline, all FLOPs", "fitted": "fitted", "mat": "MAT by share",
          "static": "a fixed third"}  # fmt: skip
COLUMNS = {  # heading and label of the axis, by column of ``points``
    "loss": ("Best validation loss", "nats per masked token"),
    "active": ("Mean active share", "share of the units"),
    "stopped": ("Stopped for good at the end (eq. 7)", "share of the units"),
}


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
    return pd.DataFrame(rows).sort_values(["scope", "alpha", "seed"], ignore_index=True)


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    for scope, (label, colour, style) in SCOPES.items():
        own = table[table["scope"] == scope]
        if own.empty:
            continue
        mean = own.groupby("alpha")[column].mean()
        seeds = own["seed"].nunique()
        axes.plot(mean.index, mean, style, color=colour, label=f"MAT, {label} (n = {seeds})")
        axes.plot(own["alpha"], own[column], ".", color=colour, markersize=3, alpha=0.6)
    title, label = COLUMNS[column]
    ticks = sorted(table["alpha"].unique())
    axes.set(title=title, xlabel="alpha", ylabel=label, xscale="log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw(root: Path, out: Path) -> list[Path]:
    """Draw the figure.

    Args:
        root: Folder of all runs.
        out: Folder for the files.

    Returns:
        The files written: PNG, SVG.

    Raises:
        UserError: If there is no run by alpha, or a run cannot be read.
    """
    runs = read_runs(root, RUNS)
    if not any(map(_by_alpha, runs)):
        raise UserError(f"{root / RUNS} holds no run of MAT by alpha: train one.")
    table = points(runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        panels = figure.subplots(1, len(COLUMNS))
        for axes, column in zip(panels, COLUMNS, strict=True):
            _panel(axes, table, column)
        panels[1].set_ylim(0, 1)
        panels[2].set_ylim(-0.02, 1)
        for method, label in LABELS.items():
            own = [r for r in runs if r.method == method and not _by_alpha(r)]
            losses = [run.best for run in own if run.best is not None and run.seed == 1]
            if losses:
                colour, dash = LINES[method]
                panels[0].axhline(losses[0], color=colour, linestyle=dash, linewidth=1, label=label)
        figure.suptitle(
            "MAT against alpha: Table 1, mini, 0.7 of the baseline's FLOPs, pilots", x=0.01,
            ha="left", fontsize=12,
        )  # fmt: skip
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=6)
        return save_figure(figure, out / RUNS, dpi=200)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when the figure could not be drawn."""
    parser = parser_of("alpha", "Draw MAT against alpha.", "results/figures")
    chosen = parser.parse_args(arguments)
    for path in draw(chosen.runs, chosen.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
