"""What the figures read of the runs, and the rules by which they mark something, each stated and
tested.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from mat.suite.errors import UserError
from mat.suite.glance import Glance, look_below
from results.measures import Array

NOISE = 1e-6  # eigenvalues below this share of the largest are rounding
LEAST_GAP = 0.1  # nats


@dataclass(frozen=True)
class Source:
    """Where a figure's runs are.

    Attributes:
        root: Folder of all runs.
        suffix: ``_mini`` or nothing.
        damaged: Sentences about runs that could not be read and were left out.
    """

    root: Path
    suffix: str
    damaged: list[str] = field(default_factory=list)
    _read: dict[Path, list[Glance]] = field(default_factory=dict)

    def runs(self, experiment: str, method: str) -> list[Glance]:
        """The complete runs of a method: one configuration, of the model with the shortest name
        (others vary it).

        Raises:
            UserError: If there is none, or if they differ in more than the seed.
        """
        folder = self.root / f"{experiment}{self.suffix}"
        if folder not in self._read:
            self._read[folder], damaged = look_below(folder)
            self.damaged.extend(damaged)
        found = [
            run for run in self._read[folder] if run.method == method and run.status == "complete"
        ]
        if not found:
            raise UserError(
                f"{folder} holds no complete run of method={method}: run make figures, which "
                "trains it."
            )
        model = min((run.model for run in found), key=len)
        kept = [run for run in found if run.model == model]
        if len(names := dict.fromkeys(run.path.parent.name for run in kept)) > 1:
            raise UserError(
                f"{folder} holds method={method} model={model} in {len(names)} folders "
                f"({'; '.join(names)}), but a figure shows one configuration: keep one of them and "
                "train the others under a name of their own."
            )
        return kept

    def table(self, experiment: str, method: str, name: str) -> pd.DataFrame:
        """A table of the first of these runs, ``<name>.parquet``."""
        return read_table(self.runs(experiment, method)[0], name)


def read_table(run: Glance, name: str) -> pd.DataFrame:
    """A table of a run, ``<name>.parquet``.

    Raises:
        UserError: If it is missing, or does not begin with the run (observers can be added to one
            on its way).
    """
    path = run.path / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing: remove that run folder and run make figures again.")
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(
            f"{path} is damaged: remove that run folder and run make figures again."
        ) from error
    if table["t"].min() > 0:
        raise UserError(
            f"{path} begins at t={table['t'].min()}: remove that run folder and run make figures "
            "again."
        )
    return table


def spectrum(eigenvalues: Array) -> Array:
    """Eigenvalues over the largest, descending; those below 1e-6 are rounding and left out."""
    values: Array = np.sort(eigenvalues)[::-1] / eigenvalues.max()
    return values[values > NOISE]


def border(eigenvalues: Array) -> int:
    """How many eigenvalues belong to the information space; the others span the nuisance space.

    The rule: of all cuts of the log ``spectrum`` into two groups, the one with the least squared
    deviation within the groups (Otsu 1979; two means in one dimension, exactly).
    """
    logs = np.log10(spectrum(eigenvalues))
    n = len(logs)
    if n < 2:
        return n
    k = np.arange(1, n)
    means = np.cumsum(logs)[:-1] / k, (logs.sum() - np.cumsum(logs)[:-1]) / (n - k)
    return int(k[np.argmax(k * (n - k) * (means[0] - means[1]) ** 2)])


def separability(eigenvalues: Array) -> float:
    """Share of the variance of the log ``spectrum`` that lies between the two sides of the border
    (Otsu's measure).

    The rule finds a border in every spectrum. Logs at equal distances have none, and 3/4 by this
    measure (a little more where their number is even); a border that deserves the name is well
    above.

    Args:
        eigenvalues: At least two different ones.
    """
    logs, k = np.log10(spectrum(eigenvalues)), border(eigenvalues)
    sides = np.repeat([logs[:k].mean(), logs[k:].mean()], [k, len(logs) - k])
    return float(sides.var() / logs.var())


def gap_opens(gap: Array) -> int | None:
    """Where the generalisation gap opens.

    The rule: the first evaluation from which on validation minus training loss stays above 0.1 nats
    and above a tenth of its largest value, to the end; None if there is none.
    """
    below = np.flatnonzero(gap <= max(LEAST_GAP, gap.max() / 10))
    first = int(below[-1]) + 1 if len(below) else 0
    return first if first < len(gap) else None


def losses(run: Glance) -> tuple[Array, Array, Array]:
    """PFLOPs, validation and training loss (mean since the last logged one, interpolated) at the
    evaluations.
    """
    train = pd.DataFrame([e for e in run.events if e["event"] == "train"])
    x = run.evaluations["pflops"].to_numpy(float)
    return x, run.evaluations["loss"].to_numpy(float), np.interp(x, train["pflops"], train["loss"])


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's."""
    return float(one.rank().corr(other.rank()))
