"""Runs of one experiment sorted into the rows of a table.

A run is ``<runs>/<name>/<overrides without seed>/seed=<n>/``. What cannot stand in a table (a run
that is missing, incomplete or failed, a NaN, a wrong number of seeds) raises and names the run: no
default replaces a number.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mat.suite.errors import UserError
from mat.suite.glance import Glance, look, row_of
from mat.suite.schedule import evaluation_points
from mat.suite.science import differences

Key = tuple[str, str]  # (model.name, method.name): one row of a table

# What an evaluation must tell: PFLOPs and seconds are cumulative, the loss is in nats.
EVALUATED = ("step", "loss", "pflops", "seconds")

SHARED = ("dataset.", "train.", "selection.", "hardware.")  # what rows of one table have in common


class MissingRow(UserError):
    """A row of the table has no run at all."""


@dataclass(frozen=True, eq=False)
class Run(Glance):
    """A run whose numbers can stand in a table: complete, and finite where a table reads it.

    Raises:
        UserError: If it is not.
    """

    def __post_init__(self) -> None:
        if self.failure is not None:
            reason = self.failure.rstrip(".")
            raise UserError(
                f"{self.path} failed ({reason}): mend the cause and run the same command again."
            )
        if not self.summary:
            raise UserError(
                f"{self.path} is incomplete (no summary.json): run the same command again to "
                "resume."
            )
        if not self.environment:
            raise UserError(
                f"{self.path / 'environment.json'} is missing: delete that run folder and train it "
                "again."
            )
        metrics, reached = self.path / "metrics.jsonl", 0.0
        for line, event in enumerate(self.events, start=1):
            where = f"{metrics}, line {line},"
            if event["event"] == "evaluation":
                for key in EVALUATED:
                    _number(event, key, where)
                # A resumed run that wrote an evaluation twice would be read as reaching a level
                # earlier than it did.
                if event["pflops"] < reached:
                    raise UserError(
                        f"{where} goes back in PFLOPs: delete that run folder and train it again."
                    )
                reached = event["pflops"]
            if event.get("accuracy") is not None:
                _number(event, "accuracy", where)
        if self.evaluations.empty:
            raise UserError(
                f"{metrics} holds no evaluation: delete that run folder and train it again."
            )
        if not metrics.read_bytes().endswith(b"\n"):
            raise UserError(
                f"{metrics} ends within a line: delete that run folder and train it again."
            )
        self._hold_together()

    def _hold_together(self) -> None:
        """Refuse a summary that the configuration or the events contradict, and events twice or not
        at all.
        """
        again = "delete that run folder and train it again."
        once = Counter(
            (e["event"], e.get("step")) for e in self.events if e["event"] != "evaluation"
        )
        for (event, step), times in once.items():
            if times > 1:
                raise UserError(
                    f"{self.path / 'metrics.jsonl'} has {times} {event} events at step {step}: "
                    f"{again}"
                )
        train, method = self.config["train"], self.config["method"]
        if "eval_interval" in train and not train.get("stop_when_settled"):
            points = evaluation_points(
                train["pflops"], method["budget"], train["eval_interval"], train["marks"]
            )
            made = sum(e["event"] == "evaluation" for e in self.events)
            if made != len(points):
                raise UserError(
                    f"{self.path / 'metrics.jsonl'} has {made} evaluations of {len(points)}: "
                    f"{again}"
                )
        known = {"seed": self.seed, "method": self.method, "model": self.model}
        known |= {key: max(e[key] for e in self.events) for key in ("pflops", "seconds")}
        known |= {f"test_{key}": self.last(key, "test") for key in ("loss", "accuracy")}
        for key, value in known.items():
            told = self.summary.get(key)
            # What is no number, a truth value among them, is told where it is read.
            number = (
                isinstance(told, float | int) and not isinstance(told, bool) and math.isfinite(told)
            )
            name = isinstance(told, str) and isinstance(value, str)
            if value is not None and (number or name) and told != value:
                raise UserError(
                    f"{self.path} contradicts itself ({key} is {told} in summary.json, but "
                    f"{value}): {again}"
                )

    def number(self, key: str) -> float:
        """A number of the summary.

        Raises:
            UserError: If it is missing, NaN or infinite.
        """
        return _number(self.summary, key, self.path / "summary.json")


def _number(values: dict[str, Any], key: str, where: str | Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"{where} has {key}={value}, which is no finite number: delete that run folder and "
            "train it again."
        )
    return float(value)


def read_runs(root: Path, name: str, keys: Collection[Key] | None = None) -> list[Run]:
    """Read the runs of one experiment.

    Args:
        root: Folder of all runs.
        name: The experiment: first folder below ``root``.
        keys: Rows to read; a run of another row is left alone, whatever state it is in. All runs
            when None.

    Returns:
        The runs, sorted by path.

    Raises:
        UserError: If there is no such folder, or a run is incomplete, failed, damaged or holds a
            NaN.
    """
    folder = root / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: train the runs of name={name} first, or point --runs at "
            "them."
        )
    paths = [path for path in sorted(folder.rglob("seed=*")) if path.is_dir()]
    wanted = [path for path in paths if keys is None or row_of(path) in (*keys, None)]
    return [Run(**vars(look(path))) for path in wanted]


def _require_same(first: Run, other: Run, what: str, groups: tuple[str, ...] = ("",)) -> None:
    """Raise unless two runs agree in the science of some groups of their configurations."""
    for key, (one, two) in differences(first.config, other.config).items():
        if key.startswith(groups):
            raise UserError(
                f"{other.path} has {key}={two} but {first.path} has {one}, and {what}: "
                "keep one of them below this name and train the other under a name of its own."
            )


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def group(
    runs: Iterable[Run], keys: Collection[Key], folder: Path, seeds: int = 3
) -> dict[Key, list[Run]]:
    """Sort runs into the rows of one table.

    Args:
        runs: What ``read_runs`` returned.
        keys: The rows, all of them needed.
        folder: Folder of the experiment, named in errors.
        seeds: Least number of seeds in each row.

    Returns:
        For each key its runs, sorted by seed. All rows hold the same seeds, so that they can be
        paired.

    Raises:
        UserError: If a row has no run or too few seeds, rows differ in their seeds or in dataset,
            training, selection or hardware, or the runs of one row differ in more than the seed.
    """
    rows: dict[Key, list[Run]] = {key: [] for key in keys}
    for run in runs:
        if run.key in rows:
            rows[run.key].append(run)
    reference: list[Run] = []
    for (model, method), row in rows.items():
        name = f"{folder}: model={model} method={method}"
        if not row:
            raise MissingRow(
                f"{name} has no run: train it, which makes {folder}/...method={method}.../seed=<n>."
            )
        row.sort(key=lambda run: run.seed)
        for run in row[1:]:
            _require_same(row[0], run, "one row holds one configuration")
        present = {run.seed for run in row}
        if len(present) < len(row):
            twice = next(b for a, b in itertools.pairwise(row) if a.seed == b.seed)
            raise UserError(
                f"{twice.path} repeats seed {twice.seed} of {name}: delete one of the two run "
                "folders."
            )
        if len(present) < seeds:
            raise UserError(
                f"{name} has seeds {_seeds(present)}, but the table needs {seeds}: train the "
                "missing ones, or lower --seeds."
            )
        reference = reference or row
        paired = {run.seed for run in reference}
        if present != paired:
            raise UserError(
                f"{name} has seeds {_seeds(present)}, but {reference[0].path.parent} has "
                f"{_seeds(paired)}, and rows are compared seed by seed: train the missing ones or "
                "delete the others."
            )
        _require_same(reference[0], row[0], "rows of one table share it", SHARED)
    return rows
