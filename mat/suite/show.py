"""A run at a glance, finished or live, from its folder alone; of a folder of runs, a table of them.

    python -m mat.show runs/table1_mini/method=mat/seed=2
    python -m mat.show runs

Status, losses, PFLOPs by column, time left, and the course of every layer's active share as blocks.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mat.suite.files import keep_streams, say
from mat.suite.glance import LEDGER, Glance, look_below

LEVELS = "·▁▂▃▄▅▆▇█"  # shares 0 to 1; the first is for 0 alone
STYLES = {"complete": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def clock(seconds: float | None) -> str:
    """1:02:03, or a dash."""
    return (
        "–"
        if seconds is None
        else f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{int(seconds) % 60:02d}"
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def course(units: pd.DataFrame) -> str:
    """Active share of some units over the records, one block each; the newest is on the right."""
    return "".join(
        LEVELS[max(share > 0, round(8 * share))] for share in units.groupby("t")["active"].mean()
    )


def show_run(run: Glance, console: Console) -> None:
    """Status, losses, PFLOPs by column and active units by layer of one run."""
    config, done, accuracy = (
        run.config,
        round(30 * run.progress),
        run.last("accuracy", "evaluation"),
    )
    console.print(f"[bold]{escape(str(run.path))}[/bold]", soft_wrap=True)
    console.print(
        f"{run.model} on {config['dataset']['name']}, {run.method}, {config['selection']['mode']}, "
        f"seed {run.seed}"
    )
    console.print(
        f"[{STYLES[run.status]}]{run.status}[/] {'█' * done}{'░' * (30 - done)} "
        f"{run.progress:.0%}, step {run.last('step') or 0}, {clock(run.last('seconds'))} trained, "
        f"ETA {clock(run.eta)}"
    )
    if run.failure is not None:
        console.print(run.failure, style="red", markup=False)
    console.print(
        f"loss    train {number(run.last('loss', 'train'))}, "
        f"validation {number(run.last('loss', 'evaluation'))} (best {number(run.best)}), "
        f"test {number(run.last('loss', 'test'))}"
        + ("" if accuracy is None else f"; accuracy {accuracy:.1%}")
    )
    flops = [
        f"{column.replace('_', ' ')} {number(run.last(f'pflops_{column}'), 3)}" for column in LEDGER
    ]
    console.print(
        f"PFLOPs  {', '.join(flops)}: {number(run.last('pflops'))} of {number(run.budget)}"
    )
    if run.units is None:
        console.print("active  no record yet")
        return
    table = Table(title="active share by layer", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("units", "layer", "course over the run", "active now", "stopped"):
        table.add_column(column, justify="left" if column[0] in "uc" else "right")
    for (kind, layer), units in run.units.groupby(["kind", "layer"], sort=False):
        now = units[units["t"] == units["t"].max()]
        counts = f"{now['active'].sum()} of {len(now)}", f"{now['stopped'].sum()}"
        table.add_row(str(kind), str(layer), course(units), *counts)
    console.print(table)


def show_runs(runs: list[Glance], root: Path, console: Console) -> None:
    """One row per run."""
    table = Table(
        title=escape(str(root)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("run", "status", "done", "best\nval.", "test", "PFLOPs", "active", "ETA"):
        left, wide = column in ("run", "status"), 24 if column == "run" else None
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", min_width=wide
        )
    for run in runs:
        table.add_row(
            escape(str(run.path.relative_to(root))),
            f"[{STYLES[run.status]}]{run.status}[/]",
            f"{run.progress:.0%}",
            number(run.best),
            number(run.last("loss", "test")),
            number(run.last("pflops"), 3),
            number(run.last("active_share"), 2),
            clock(run.eta),
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns 0, or 2 if there is nothing to show; damaged runs among others are told
    and left out.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mat.show", description="Show a run folder, or all below one."
    )
    parser.add_argument("path", type=Path, help="a run folder, or a folder above some")
    path = parser.parse_args(arguments).path
    keep_streams()
    console = Console()
    runs, damaged = look_below(path)
    if [run.path for run in runs] == [path]:
        show_run(runs[0], console)
    elif runs:
        show_runs(runs, path, console)
    elif not damaged:
        damaged = [
            f"{path} is no run folder (it has no config.yaml): name one, or a folder above some."
        ]
    for sentence in damaged:
        say(f"error: {sentence}")
    return 0 if runs else 2


if __name__ == "__main__":
    sys.exit(main())
