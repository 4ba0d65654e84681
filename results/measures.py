"""What the tables say about runs: numbers of one run, and their mean and standard deviation over
seeds.

A run's numbers come from its own files; comparisons take the baseline's run *of the same seed*.
"Best" is the best validation score: the lowest loss, or the highest accuracy in Table 3. A number
that a run does not have (it ended before the mark, it never reached the level) is None, and a row's
cell is then empty: a mean over the seeds that happened to get there would flatter the row.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from mat.suite.errors import UserError
from mat.suite.glance import Glance
from results.frame import Key, Run

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """What a table judges runs by; the engine picks the tested weights by the same (``best_by`` of
    the model).

    Attributes:
        name: Its name in events; the summary has ``test_<name>`` and ``best_validation_<name>``.
        unit: What it is in, for readers.
        sign: 1 if more is better, -1 if less is.
        shown: What a number is multiplied by for readers; files keep it as it is.
    """

    name: str
    unit: str
    sign: int
    shown: float = 1.0

    def values(self, run: Glance) -> "pd.Series[float]":
        """The score at every evaluation.

        Raises:
            UserError: If one of them is missing or not finite.
        """
        evaluations = run.evaluations
        values = evaluations.get(self.name, pd.Series(float("nan"), evaluations.index)).astype(
            float
        )
        if not np.isfinite(values).all():
            raise UserError(
                f"{run.path} has an evaluation without a finite {self.name}: train it again."
            )
        return values

    def check(self, run: Run) -> None:
        """Hold the summary's best validation against the evaluations.

        Raises:
            UserError: If they differ.
        """
        told, best = (
            run.number(f"best_validation_{self.name}"),
            self.sign * float((self.sign * self.values(run)).max()),
        )
        if not math.isclose(told, best, rel_tol=1e-9):
            raise UserError(
                f"{run.path} contradicts itself (best validation {self.name} {told} in "
                f"summary.json, {best} in metrics.jsonl): delete that run folder and train it "
                "again."
            )

    def first_reach(self, run: Run, level: float) -> tuple[float, float] | None:
        """Where the validation score first is at a level or better.

        Returns:
            PFLOPs and seconds of that evaluation, or None if the run never gets there.
        """
        reached = run.evaluations[self.sign * self.values(run) >= self.sign * level]
        return (
            None
            if reached.empty
            else (float(reached["pflops"].iloc[0]), float(reached["seconds"].iloc[0]))
        )


LOSS = Score("loss", "nats per masked token", -1)
ACCURACY = Score("accuracy", "%", 1, 100)


@dataclass(frozen=True)
class Mark:
    """Validation loss at the n-th FLOPs mark (from 1): the last evaluation at or before it (Tables
    1 and 2).
    """

    number: int

    @property
    def measure(self) -> str:
        """Name of its column in the frame."""
        return f"val_loss_mark{self.number}"

    def at(self, run: Run) -> float:
        """The mark in PFLOPs."""
        marks = run.config["train"]["marks"]
        if len(marks) < self.number:
            raise UserError(
                f"{run.path} has train.marks={marks}, but the table needs mark "
                f"{self.number}: set it."
            )
        return float(marks[self.number - 1])

    def title(self, run: Run) -> str:
        """Heading of its column; ``run`` is any run of the table."""
        return f"validation loss at {self.at(run):.4g} PFLOPs"

    def read(self, run: Run) -> float | None:
        """The run's number, or None where it has none."""
        if run.number("pflops") < self.at(run):
            return None
        before = run.evaluations[run.evaluations["pflops"] <= self.at(run)]
        if before.empty:
            raise UserError(
                f"{run.path} has no evaluation up to the mark {self.at(run)}: evaluate more often."
            )
        return float(before["loss"].iloc[-1])


@dataclass(frozen=True)
class Until:
    """PFLOPs until a training accuracy is reached (Table 3)."""

    accuracy: (
        float  # of the augmented training images, a running mean over an epoch's worth of steps
    )

    @property
    def measure(self) -> str:
        """Name of its column in the frame."""
        return f"pflops_to_train_{100 * self.accuracy:g}"

    def title(self, run: Run) -> str:
        """Heading of its column; ``run`` is any run of the table."""
        return f"PFLOPs to {100 * self.accuracy:g} % train accuracy"

    def read(self, run: Run) -> float | None:
        """The run's number, or None where it has none."""
        trained = [e for e in run.events if e["event"] == "train" and e.get("accuracy") is not None]
        if not trained:
            raise UserError(
                f"{run.path} has no training accuracy: train it again, for an epoch at least."
            )
        return next(
            (float(event["pflops"]) for event in trained if event["accuracy"] >= self.accuracy),
            None,
        )


Level = Mark | Until  # a column of the paper's table that is read somewhere along the run


def same_clock(one: Run, other: Run) -> bool:
    """Whether the seconds of two runs can be compared: both alone on the same machine, equally
    precise.
    """
    return one.timed and other.timed and one.machine == other.machine


def of_run(run: Run, levels: Sequence[Level], score: Score = LOSS) -> dict[str, float | None]:
    """What one run says by itself.

    Args:
        run: The run.
        levels: The columns of the paper's table besides test score and PFLOPs.
        score: What it is judged by.

    Raises:
        UserError: If a number is missing or not finite.
    """
    return {
        **{
            f"{part}_{score.name}": run.number(f"{part}_{score.name}")
            for part in ("test", "best_validation")
        },
        "pflops_total": run.number("pflops"),
        "seconds_total": run.number("seconds"),
        "pflops_to_best": run.number("pflops_to_best"),
        "seconds_to_best": run.number("seconds_to_best"),
        "active_share": run.number("active_share"),
        "overhead_share": run.number("pflops_overhead") / run.number("pflops"),
    } | {level.measure: level.read(run) for level in levels}


def against(
    run: Run, baseline: Run, levels: Sequence[Level], score: Score = LOSS
) -> dict[str, float | None]:
    """What one run says beside the baseline's run of the same seed.

    Returns:
        PFLOPs and seconds to the baseline's best validation score, these over what the baseline
        itself needed (``pflops_ratio``, ``seconds_ratio``), and each column of the paper's table
        over the baseline's.

    Raises:
        UserError: If the baseline was best before its first step, so that there is nothing to
            divide by.
    """
    needed = baseline.number("pflops_to_best"), baseline.number("seconds_to_best")
    if min(needed) <= 0:
        raise UserError(
            f"{baseline.path} is best before its first step, so nothing was learnt: "
            "mend its recipe."
        )
    reached = score.first_reach(run, baseline.number(f"best_validation_{score.name}"))
    values: dict[str, float | None] = dict.fromkeys(
        ("pflops_to_baseline_best", "seconds_to_baseline_best", "pflops_ratio", "seconds_ratio")
    )
    if reached is not None:
        values = dict(
            zip(values, (*reached, reached[0] / needed[0], reached[1] / needed[1]), strict=True)
        )
    ours, theirs = of_run(run, levels, score), of_run(baseline, levels, score)
    for measure in (*(level.measure for level in levels), f"test_{score.name}", "pflops_to_best"):
        one, other = ours[measure], theirs[measure]
        values[f"{measure}_ratio"] = None if one is None or other is None else one / other
    return values


SECONDS = ("seconds_total", "seconds_to_best", "seconds_to_baseline_best")


def mean_column(measure: str) -> str:
    """Where a measure's mean stands in the frame (a ratio is a mean of paired ratios already by
    name).
    """
    return measure if measure.endswith("_ratio") else f"{measure}_mean"


def _aggregate(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (ddof = 1); both None if a seed has no value."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None, None
    return statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None


def summarise(
    rows: Mapping[Key, Sequence[Run]], baseline: Key, levels: Sequence[Level], score: Score = LOSS
) -> pd.DataFrame:
    """One row per table row: means and standard deviations over seeds.

    Args:
        rows: Runs by row, each sorted by the same seeds (``frame.group``).
        baseline: The row that all others are compared with.
        levels: The columns of the paper's table besides test score and PFLOPs.
        score: What runs are judged by.

    Returns:
        Columns ``<measure>_mean`` and ``_sd`` (ratios: ``<measure>`` and ``_sd``), and how many
        runs they are over: n, n_reached (reached the baseline's best), n_timed (behind the
        seconds), n_timed_pairs (behind seconds_ratio), and ``n_<measure>`` of every level (reached
        it).
    """
    table = []
    for (model, method), runs in rows.items():
        pairs = list(zip(runs, rows[baseline], strict=True))
        numbers = [
            of_run(run, levels, score) | against(run, other, levels, score) for run, other in pairs
        ]
        timed, paired = (
            [run.timed for run in runs],
            [same_clock(run, other) for run, other in pairs],
        )
        reached = sum(values["pflops_ratio"] is not None for values in numbers)
        row: dict[str, object] = {
            "method": method,
            "model": model,
            "mode": runs[0].config["selection"]["mode"],
            "budget": runs[0].config["method"]["budget"],
            "n": len(runs),
            "n_reached": reached,
            "n_timed": sum(timed),
            "n_timed_pairs": sum(paired),
        }
        for level in levels:
            row[f"n_{level.measure}"] = sum(values[level.measure] is not None for values in numbers)
        for measure in numbers[0]:
            kept = (
                paired
                if measure == "seconds_ratio"
                else timed
                if measure in SECONDS
                else [True] * len(runs)
            )
            values = [values[measure] for values, keep in zip(numbers, kept, strict=True) if keep]
            if measure in ("seconds_to_baseline_best", "seconds_ratio") and reached < len(runs):
                values = []  # all seeds must reach the level, timed or not
            row[mean_column(measure)], row[f"{measure}_sd"] = _aggregate(values)
        table.append(row)
    # Object columns keep an empty cell (None) apart from a number; counts stay integers.
    return pd.DataFrame(table, dtype=object)
