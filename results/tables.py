"""The paper's tables from run folders: printed, and written as Markdown, CSV and LaTeX.

    python -m results.tables table1_mini                 # writes results/table1_mini.md, .csv and
    .tex python -m results.tables all --runs runs --seeds 5   # every table whose runs exist

The CSV has every number in full; the other three show the same sections, rounded. A missing run, a
NaN or a wrong number of seeds ends it with one sentence on stderr and exit code 2.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from mat.suite.errors import UserError
from mat.suite.files import say, write_text
from results.cli import add_seeds, command, parser_of
from results.frame import Key, MissingRow, Run
from results.measures import Level, Mark, Until, mean_column, summarise
from results.render import EMPTY, Column, Section, cell, decimals, show, to_latex, to_markdown
from results.specs import DATASETS, SPECS, PaperTable, TableSpec


def _number(
    frame: pd.DataFrame,
    header: str,
    measure: str,
    count: str = "n",
    stress: int = 0,
    shown: float = 1.0,
) -> Column:
    """A column of ``mean ± sd (n)``, n being the frame's column ``count``, numbers multiplied by
    ``shown``.

    The measure's own count stands as ``k of n``, also in an empty cell.
    ``stress``: which mean is the best, the highest (1) or the lowest (-1); none when 0.
    """
    means, sds = (
        _times(frame[column], shown) for column in (mean_column(measure), f"{measure}_sd")
    )
    own = count == f"n_{measure}"
    cells = zip(means, sds, _of(frame, count) if own else frame[count], strict=True)
    present = [stress * mean for mean in means if mean is not None]
    contest = stress and len(present) > 1  # alone in its column, a row is not the best of anything
    best = {
        row
        for row, mean in enumerate(means)
        if contest and mean is not None and stress * mean == max(present)
    }
    return Column(
        f"{header}, mean ± sd ({'k of ' * own}n)",
        [cell(*values, decimals(means)) for values in cells],
        best,
    )


def _of(frame: pd.DataFrame, count: str) -> list[str]:
    """``k of n`` runs, by row."""
    return [f"{k} of {n}" for k, n in zip(frame[count], frame["n"], strict=True)]


def _times(values: Iterable[float | None], factor: float) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def sections(spec: TableSpec, rows: dict[Key, list[Run]], frame: pd.DataFrame) -> list[Section]:
    """The blocks of a table: loss or accuracy, FLOPs, seconds and, if the paper has the rows, its
    numbers beside ours.

    Args:
        spec: The table.
        rows: Its runs.
        frame: What ``summarise`` made of them.
    """
    run, labels = rows[spec.baseline][0], Column("method", [row.label for row in spec.rows])
    name, better, shown = spec.score.name, spec.score.sign, spec.score.shown

    def count(level: Level) -> str:
        return f"n_{level.measure}" if isinstance(level, Until) else "n"

    scores = [
        labels,
        Column("backward mode", list(frame["mode"])),
        *(
            _number(frame, level.title(run), level.measure, count(level), stress=-1)
            for level in spec.levels
        ),
        _number(
            frame, f"best validation {name}", f"best_validation_{name}", stress=better, shown=shown
        ),
        _number(
            frame, f"test {name} at best validation", f"test_{name}", stress=better, shown=shown
        ),
    ]
    flops = [
        labels,
        Column("share of the planned PFLOPs", [f"{budget:.4g}" for budget in frame["budget"]]),
        _number(frame, "active share of units", "active_share"),
        _number(frame, "total", "pflops_total"),
        _number(frame, "overhead / total", "overhead_share"),
        _number(frame, "to own best", "pflops_to_best"),
        _number(frame, "to baseline's best", "pflops_to_baseline_best", stress=-1),
        Column("runs that reached it", _of(frame, "n_reached")),
        _number(frame, "to baseline's best / baseline's", "pflops_ratio", stress=-1),
    ]
    seconds = [
        labels,
        Column("runs timed", _of(frame, "n_timed")),
        _number(frame, "total", "seconds_total", "n_timed"),
        _number(frame, "to own best", "seconds_to_best", "n_timed"),
        _number(frame, "to baseline's best", "seconds_to_baseline_best", "n_timed", stress=-1),
        _number(
            frame, "to baseline's best / baseline's", "seconds_ratio", "n_timed_pairs", stress=-1
        ),
    ]
    blocks = [
        Section(f"{name.capitalize()} ({spec.score.unit})", scores),
        Section("PFLOPs (executed)", flops),
        Section("Seconds (runs that had the machine to themselves)", seconds),
    ]
    return [*blocks, _beside_the_paper(spec, spec.paper, run, frame)] if spec.paper else blocks


def _beside_the_paper(spec: TableSpec, paper: PaperTable, run: Run, frame: pd.DataFrame) -> Section:
    """Every number of the paper's table beside ours, and each over its own baseline (ours paired by
    seed).
    """
    titles = {level.measure: level.title(run) for level in spec.levels}
    test = f"test_{spec.score.name}"
    titles |= {
        test: test.replace("_", " "),
        "pflops_to_best": f"PFLOPs to best validation {spec.score.name}",
    }
    lines = []
    for row, ours in zip(spec.rows, frame.to_dict("records"), strict=True):
        if row.model != spec.baseline[0] or row.method not in paper.rows:
            continue
        for measure, theirs in paper.titles.items():
            shown = spec.score.shown if measure == test else 1.0
            digits = decimals(_times(frame[mean_column(measure)], shown))
            mean, spread = _times((ours[mean_column(measure)], ours[f"{measure}_sd"]), shown)
            value, sd = paper.rows[row.method][measure]
            ratio, paper_ratio = (
                ours[f"{measure}_ratio"],
                value / paper.rows[spec.baseline[1]][measure][0],
            )
            lines.append(
                [
                    row.label,
                    titles[measure],
                    cell(mean, spread, ours["n"], digits),
                    theirs,
                    cell(value, sd, None, 2),
                    cell(ratio, ours[f"{measure}_ratio_sd"], ours["n"], 3),
                    f"{paper_ratio:.3f}",
                    EMPTY if ratio is None else f"{ratio - paper_ratio:+z.3f}",
                ]
            )
    headers = (
        "method",
        "quantity",
        "ours, mean ± sd (n)",
        "paper's quantity",
        "paper's, mean ± sd",
        "ours / baseline, mean ± sd (n)",
        "paper's / baseline, of means",
        "ours - paper's ratio",
    )
    columns = zip(headers, zip(*lines, strict=True), strict=True)
    return Section(
        f"Beside the paper ({paper.source})", [Column(header, texts) for header, texts in columns]
    )


def notes(spec: TableSpec, rows: dict[Key, list[Run]]) -> list[str]:
    """What a reader must know to read the numbers: where they were made and how they were
    counted.
    """
    runs = [run for row in rows.values() for run in row]
    machines = [
        f"{run.machine}, torch {run.environment.get('versions', {}).get('torch')}" for run in runs
    ]
    seeds = ", ".join(str(run.seed) for run in rows[spec.baseline])
    name, beyond = spec.score.name, "below" if spec.score.sign < 0 else "above"
    measured, read = {
        Mark: (
            "losses at equal PFLOPs",
            "At a FLOPs mark counts the last evaluation at or before it.",
        ),
        Until: (
            "PFLOPs to equal training accuracies",
            "Training accuracy is that of the last epoch's worth of augmented batches, read where "
            "it is logged.",
        ),
    }[type(spec.levels[0])]
    return [
        f"Data: {DATASETS[spec.dataset]} (dataset={spec.dataset}).",
        f"Machine: {'; '.join(dict.fromkeys(machines))}.",
        f"Commit: {'; '.join(dict.fromkeys(run.commit for run in runs))}.",
        f"Planned length of a dense run: {runs[0].config['train']['pflops']:.4g} PFLOPs. Seeds: "
        f"{seeds}.",
        "Cells are mean ± sample standard deviation over seeds (number of runs); the best of a "
        f"column is bold. Best is the best validation {name}, and test {name} is read there. "
        f"{read}",
        "A method's total PFLOPs are its budget, a chosen share of the planned ones, over which "
        "its learning rate decays; PFLOPs to its own best follow from that. What is measured are "
        f"{measured} and the PFLOPs to the baseline's best.",
        f"Comparisons are paired by seed: the first evaluation at or {beyond} the best validation "
        f"{name} of the baseline's run of that seed. {EMPTY}: no number, because a run ended "
        "before the mark, not all seeds reached the level, or no run was timed.",
        "PFLOPs are those executed, 2 per multiply-add, overhead of the method included; input "
        "embeddings, vocabulary projection and evaluation are left out.",
        "Seconds are those of training steps, selections and estimator, without evaluation, of "
        "runs that had the machine to themselves.",
    ]


def make(spec: TableSpec, root: Path, out: Path, seeds: int, console: Console) -> list[Path]:
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
        UserError: If the runs cannot fill the table; nothing is written then.
    """
    rows = spec.load(root, seeds)
    frame = summarise(rows, spec.baseline, spec.levels, spec.score)
    blocks, footer = sections(spec, rows, frame), notes(spec, rows)
    show(spec.title, blocks, footer, console)
    frame.insert(0, "label", [row.label for row in spec.rows])
    frame["method"] = [spec.row_name(row) for row in spec.rows]
    shown = (spec.title, f"python -m results.tables {spec.name}", blocks, footer)
    texts = {"md": to_markdown(*shown), "csv": frame.to_csv(index=False), "tex": to_latex(*shown)}
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{spec.name}.{suffix}" for suffix in texts]
    for path, text in zip(files, texts.values(), strict=True):
        write_text(path, text)
    return files


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when a table could not be made (the others still are)."""
    parser = parser_of("tables", "Make the paper's tables from runs.", "results")
    parser.add_argument(
        "table", choices=[*SPECS, "all"], help="which table; all: every one whose runs exist"
    )
    add_seeds(parser)
    chosen = parser.parse_args(arguments)
    every = [spec for spec in SPECS.values() if (chosen.runs / spec.runs).is_dir()]
    specs = every if chosen.table == "all" else [SPECS[chosen.table]]
    if not specs:
        sentence = (
            f"{chosen.runs} holds the runs of no table: train some first, or point --runs at them."
        )
        raise UserError(sentence)
    # Into a pipe or a log the tables take the width they need.
    console, code = Console(width=None if sys.stdout.isatty() else 240), 0
    for spec in specs:
        try:
            for path in make(spec, chosen.runs, chosen.out, chosen.seeds, console):
                say(f"wrote {path}", sys.stdout)
        except MissingRow as error:
            among_others = chosen.table == "all"
            say(f"{'' if among_others else 'error: '}no {spec.name}: {error}")
            code = code if among_others else 2
        except UserError as error:
            say(f"error: {error}")
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
