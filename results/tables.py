"""The paper's tables from run folders: printed, and written as Markdown, CSV and LaTeX.

    python -m results.tables table1_mini                 # writes results/table1_mini.md, .csv and .tex
    python -m results.tables all --runs runs --seeds 5   # every table whose runs exist

The CSV has every number in full; the other three show the same sections, rounded. A missing run, a NaN or a wrong
number of seeds ends it with one sentence on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from mat.errors import UserError
from results.frame import Key, MissingRow, Run
from results.measures import mean_column, summarise
from results.render import EMPTY, Column, Section, cell, decimals, show, to_latex, to_markdown
from results.specs import SPECS, PaperTable, TableSpec


def _number(frame: pd.DataFrame, header: str, measure: str, count: str = "n", stress: bool = False) -> Column:
    """A column of ``mean ± sd (n)``, n being the frame's column ``count``; ``stress``: the lowest mean is the best."""
    means = list(frame[mean_column(measure)])
    cells = zip(means, frame[f"{measure}_sd"], frame[count], strict=True)
    present = [mean for mean in means if mean is not None]
    contest = stress and len(present) > 1  # alone in its column, a row is not the best of anything
    best = {row for row, mean in enumerate(means) if contest and mean == min(present)}
    return Column(f"{header}, mean ± sd (n)", [cell(*values, decimals(means)) for values in cells], best)


def sections(spec: TableSpec, rows: dict[Key, list[Run]], frame: pd.DataFrame) -> list[Section]:
    """The blocks of a table: loss, FLOPs, seconds and, if the paper has the rows, its numbers beside ours.

    Args:
        spec: The table.
        rows: Its runs.
        frame: What ``summarise`` made of them.
    """
    run, labels = rows[spec.baseline][0], Column("method", [row.label for row in spec.rows])

    def of(count: str) -> list[str]:
        return [f"{k} of {n}" for k, n in zip(frame[count], frame["n"], strict=True)]

    loss = [
        labels,
        Column("backward mode", list(frame["mode"])),
        *(_number(frame, level.title(run), level.measure, stress=True) for level in spec.levels),
        _number(frame, "best validation loss", "best_validation_loss", stress=True),
        _number(frame, "test loss at best validation", "test_loss", stress=True),
    ]
    flops = [
        labels,
        Column("share of the planned PFLOPs", [f"{budget:.4g}" for budget in frame["budget"]]),
        _number(frame, "active share of units", "active_share"),
        _number(frame, "total", "pflops_total"),
        _number(frame, "overhead / total", "overhead_share"),
        _number(frame, "to own best", "pflops_to_best"),
        _number(frame, "to baseline's best", "pflops_to_baseline_best", stress=True),
        Column("runs that reached it", of("n_reached")),
        _number(frame, "to baseline's best / baseline's", "pflops_ratio", stress=True),
    ]
    seconds = [
        labels,
        Column("runs timed", of("n_timed")),
        _number(frame, "total", "seconds_total", "n_timed"),
        _number(frame, "to own best", "seconds_to_best", "n_timed"),
        _number(frame, "to baseline's best", "seconds_to_baseline_best", "n_timed", stress=True),
        _number(frame, "to baseline's best / baseline's", "seconds_ratio", "n_timed_pairs", stress=True),
    ]
    blocks = [
        Section("Loss (nats per masked token)", loss),
        Section("PFLOPs (executed)", flops),
        Section("Seconds (runs that had the machine to themselves)", seconds),
    ]
    return [*blocks, _beside_the_paper(spec, spec.paper, run, frame)] if spec.paper else blocks


def _beside_the_paper(spec: TableSpec, paper: PaperTable, run: Run, frame: pd.DataFrame) -> Section:
    """Every number of the paper's table beside ours, and each over its own baseline (ours paired by seed)."""
    titles = {level.measure: level.title(run) for level in spec.levels}
    titles |= {"test_loss": "test loss", "pflops_to_best": "PFLOPs to best validation loss"}
    lines = []
    for row, ours in zip(spec.rows, frame.to_dict("records"), strict=True):
        if row.model != spec.baseline[0] or row.method not in paper.rows:
            continue
        for measure, theirs in paper.titles.items():
            digits = decimals(list(frame[mean_column(measure)]))
            value, sd = paper.rows[row.method][measure]
            ratio, paper_ratio = ours[f"{measure}_ratio"], value / paper.rows[spec.baseline[1]][measure][0]
            lines.append([
                row.label, titles[measure], cell(ours[mean_column(measure)], ours[f"{measure}_sd"], ours["n"], digits),
                theirs, cell(value, sd, None, 2), cell(ratio, ours[f"{measure}_ratio_sd"], ours["n"], 3),
                f"{paper_ratio:.3f}", EMPTY if ratio is None else f"{ratio - paper_ratio:+z.3f}",
            ])  # fmt: skip
    headers = ("method", "quantity", "ours, mean ± sd (n)", "paper's quantity", "paper's, mean ± sd",
               "ours / baseline, mean ± sd (n)", "paper's / baseline, of means", "ours - paper's ratio")  # fmt: skip
    columns = zip(headers, zip(*lines, strict=True), strict=True)
    return Section(f"Beside the paper ({paper.source})", [Column(header, texts) for header, texts in columns])


def notes(spec: TableSpec, rows: dict[Key, list[Run]]) -> list[str]:
    """What a reader must know to read the numbers: where they were made and how they were counted."""
    runs = [run for row in rows.values() for run in row]
    made = [run.environment for run in runs]
    machines = [f"{e.get('device_name', e.get('device'))}, {e.get('threads')} threads, {e.get('precision')}, "
                f"torch {e.get('versions', {}).get('torch')}" for e in made]  # fmt: skip
    commits = [str(e.get("commit"))[:10] + (" with uncommitted changes" if e.get("dirty") else "") for e in made]
    seeds = ", ".join(str(run.seed) for run in rows[spec.baseline])
    return [
        f"Machine: {'; '.join(dict.fromkeys(machines))}.",
        f"Commit: {'; '.join(dict.fromkeys(commits))}.",
        f"Planned length of a dense run: {runs[0].config['train']['pflops']:.4g} PFLOPs. Seeds: {seeds}.",
        "Cells are mean ± sample standard deviation over seeds (number of runs); the best of a column is bold. Best is "
        "the best validation loss, and test loss is read there. At a FLOPs mark counts the last evaluation at or "
        "before it.",
        "A method's total PFLOPs are its budget, a chosen share of the planned ones, over which its learning rate "
        "decays; PFLOPs to its own best follow from that. What is measured are losses at equal PFLOPs and the PFLOPs "
        "to the baseline's best.",
        "Comparisons are paired by seed: the first evaluation at or below the best validation loss of the baseline's "
        f"run of that seed. {EMPTY}: no number, because a run ended before the mark, not all seeds reached the level, "
        "or no run was timed.",
        "PFLOPs are those executed, 2 per multiply-add, overhead of the method included; input embeddings, vocabulary "
        "projection and evaluation are left out.",
        "Seconds are those of training steps, selections and estimator, without evaluation, of runs that had the "
        "machine to themselves.",
    ]


def make(spec: TableSpec, root: str | Path, out: str | Path, seeds: int, console: Console) -> list[Path]:
    """Read the runs, print the table and write its files.

    Args:
        spec: The table.
        root: Folder of all runs.
        out: Folder for the files.
        seeds: Least number of seeds in each row.
        console: Where to print.

    Returns:
        The files written: Markdown, CSV, LaTeX.

    Raises:
        ResultsError: If the runs cannot fill the table; nothing is written then.
    """
    rows = spec.load(root, seeds)
    frame = summarise(rows, spec.baseline, spec.levels)
    blocks, footer = sections(spec, rows, frame), notes(spec, rows)
    show(spec.title, blocks, footer, console)
    frame.insert(0, "label", [row.label for row in spec.rows])
    frame["method"] = [spec.row_name(row) for row in spec.rows]
    shown = (spec.title, f"python -m results.tables {spec.name}", blocks, footer)
    texts = {"md": to_markdown(*shown), "csv": frame.to_csv(index=False), "tex": to_latex(*shown)}
    Path(out).mkdir(parents=True, exist_ok=True)
    files = [Path(out) / f"{spec.name}.{suffix}" for suffix in texts]
    for path, text in zip(files, texts.values(), strict=True):
        path.write_text(text)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when a table could not be made (the others still are)."""
    parser = argparse.ArgumentParser(prog="python -m results.tables", description="Make the paper's tables from runs.")
    parser.add_argument("table", choices=[*SPECS, "all"], help="which table; all: every one whose runs exist")
    parser.add_argument("--runs", default="results/runs", help="folder of all runs (default: %(default)s)")
    parser.add_argument("--out", default="results", help="folder for the files (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="least number of seeds per row (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    every = [spec for spec in SPECS.values() if (Path(chosen.runs) / spec.runs).is_dir()]
    specs = every if chosen.table == "all" else [SPECS[chosen.table]]
    if not specs:
        print(f"{chosen.runs} holds the runs of no table: train some first, or point --runs at them.", file=sys.stderr)
        return 2
    # Into a pipe or a log the tables take the width they need.
    console, code = Console(width=None if sys.stdout.isatty() else 240), 0
    for spec in specs:
        try:
            for path in make(spec, chosen.runs, chosen.out, chosen.seeds, console):
                print(f"wrote {path}")
        except MissingRow as error:
            print(f"no {spec.name}: {error}", file=sys.stderr)
            code = code if chosen.table == "all" else 2
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
