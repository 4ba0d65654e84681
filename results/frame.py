"""Run folders to frames: the one place of ``results`` that knows how a run lies on disk.

A run is ``<runs>/<name>/<overrides without seed>/seed=<n>/``. What cannot stand in a table (a run that is missing,
incomplete or failed, a NaN, a wrong number of seeds) raises and names the run: no default replaces a number.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mat.config import differences
from mat.errors import UserError
from mat.glance import missing_key, read_config

Key = tuple[str, str]  # (model.name, method.name): one row of a table

# What a configuration must tell.
CONFIGURED = (
    "seed", "model.name", "dataset.name", "method.name", "method.budget", "selection.mode", "train.pflops",
    "train.marks",
)  # fmt: skip

# What an evaluation must tell: PFLOPs and seconds are cumulative, the loss is in nats.
EVALUATED = ("step", "loss", "pflops", "seconds")

SHARED = ("dataset.", "train.", "selection.", "hardware.")  # what rows of one table have in common


class ResultsError(UserError):
    """The runs cannot fill the table. The message is one sentence naming the run and the remedy."""


class MissingRow(ResultsError):
    """A row of the table has no run at all."""


@dataclass(frozen=True, eq=False)
class Run:
    """One complete run.

    Attributes:
        path: Its folder, ``.../seed=<n>``.
        config: The resolved configuration.
        environment: Commit, versions, device, threads, precision, and whether the run had the machine to itself.
        summary: What the run came to.
        metrics: One row per line of ``metrics.jsonl``.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: pd.DataFrame

    @property
    def key(self) -> Key:
        """The table row this run belongs to."""
        return _key(self.config)

    @property
    def seed(self) -> int:
        """What pairs this run with those of the other rows."""
        return int(self.config["seed"])

    @property
    def timed(self) -> bool:
        """Whether the run had the machine to itself, so that its seconds may be shown."""
        return self.environment.get("exclusive") is True

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The evaluations on the validation split, in the order they were made."""
        return self.metrics[self.metrics["event"] == "evaluation"].reset_index(drop=True)

    def number(self, key: str) -> float:
        """A number of the summary.

        Raises:
            ResultsError: If it is missing, NaN or infinite.
        """
        return _number(self.summary, key, self.path / "summary.json")


def _key(config: dict[str, Any]) -> Key:
    return str(config["model"]["name"]), str(config["method"]["name"])


def _number(values: dict[str, Any], key: str, where: str | Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ResultsError(
            f"{where} has {key}={value}, which is no finite number: delete that run folder and train it again."
        )
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{path} is missing: delete that run folder and train it again.") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ResultsError(f"{path} is damaged: delete that run folder and train it again.")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResultsError(f"{path} is missing: run the same command again, or delete that run folder.")
    try:
        config = read_config(path)
    except (ValueError, OSError):
        raise ResultsError(f"{path} is damaged: delete that run folder and train it again.") from None
    if key := missing_key(config, CONFIGURED):
        raise ResultsError(f"{path} has no {key}: delete that run folder and train it again.")
    return config


def _read_metrics(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ResultsError(f"{path} is missing: delete that run folder and train it again.")
    lines: list[dict[str, Any]] = []
    reached = 0.0
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "event" not in line:
            raise ResultsError(f"{path}, line {number}, is damaged: delete that run folder and train it again.")
        if line["event"] == "evaluation":
            for key in EVALUATED:
                _number(line, key, f"{path}, line {number},")
            # A resumed run that wrote an evaluation twice would be read as reaching a level earlier than it did.
            if line["pflops"] < reached:
                raise ResultsError(
                    f"{path}, line {number}, goes back in PFLOPs: delete that run folder and train it again."
                )
            reached = line["pflops"]
        if line.get("accuracy") is not None:
            _number(line, "accuracy", f"{path}, line {number},")
        lines.append(line)
    frame = pd.DataFrame(lines)
    if frame.empty or not (frame["event"] == "evaluation").any():
        raise ResultsError(f"{path} holds no evaluation: delete that run folder and train it again.")
    return frame


def _read_run(path: Path, config: dict[str, Any]) -> Run:
    if (path / "failure.json").is_file():
        reason = str(_read_json(path / "failure.json").get("reason")).rstrip(".")
        raise ResultsError(f"{path} failed ({reason}): mend the cause and run the same command again.")
    if not (path / "summary.json").is_file():
        raise ResultsError(f"{path} is incomplete (no summary.json): run the same command again to resume.")
    environment, summary = _read_json(path / "environment.json"), _read_json(path / "summary.json")
    return Run(path, config, environment, summary, _read_metrics(path / "metrics.jsonl"))


def read_runs(root: str | Path, name: str, keys: Collection[Key] | None = None) -> list[Run]:
    """Read the runs of one experiment.

    Args:
        root: Folder of all runs.
        name: The experiment: first folder below ``root``.
        keys: Rows to read; a run of another row is left alone, complete or not. All runs when None.

    Returns:
        The runs, sorted by path.

    Raises:
        ResultsError: If there is no such folder, or a run is incomplete, failed, damaged or holds a NaN.
    """
    folder = Path(root) / name
    if not folder.is_dir():
        raise ResultsError(f"{folder} is not a folder: train the runs of name={name} first, or point --runs at them.")
    configs = {path: _read_config(path / "config.yaml") for path in sorted(folder.rglob("seed=*")) if path.is_dir()}
    return [_read_run(path, config) for path, config in configs.items() if keys is None or _key(config) in keys]


def _require_same(first: Run, other: Run, what: str, groups: tuple[str, ...] = ("",)) -> None:
    """Raise unless two runs agree in the science of some groups of their configurations."""
    for key, (one, two) in differences(first.config, other.config).items():
        if key.startswith(groups):
            raise ResultsError(
                f"{other.path} has {key}={two} but {first.path} has {one}, and {what}: "
                "keep one of them below this name and train the other under a name of its own."
            )


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def group(runs: Iterable[Run], keys: Collection[Key], folder: Path, seeds: int = 3) -> dict[Key, list[Run]]:
    """Sort runs into the rows of one table.

    Args:
        runs: What ``read_runs`` returned.
        keys: The rows, all of them needed.
        folder: Folder of the experiment, named in errors.
        seeds: Least number of seeds in each row.

    Returns:
        For each key its runs, sorted by seed. All rows hold the same seeds, so that they can be paired.

    Raises:
        ResultsError: If a row has no run or too few seeds, rows differ in their seeds or in the planned PFLOPs and
            marks, or the runs of one row differ in more than the seed.
    """
    rows: dict[Key, list[Run]] = {key: [] for key in keys}
    for run in runs:
        if run.key in rows:
            rows[run.key].append(run)
    reference: list[Run] = []
    for (model, method), row in rows.items():
        name = f"{folder}: model={model} method={method}"
        if not row:
            raise MissingRow(f"{name} has no run: train it, which makes {folder}/...method={method}.../seed=<n>.")
        row.sort(key=lambda run: run.seed)
        for run in row[1:]:
            _require_same(row[0], run, "one row holds one configuration")
        present = {run.seed for run in row}
        if len(present) < len(row):
            twice = next(b for a, b in itertools.pairwise(row) if a.seed == b.seed)
            raise ResultsError(f"{twice.path} repeats seed {twice.seed} of {name}: delete one of the two run folders.")
        if len(present) < seeds:
            raise ResultsError(
                f"{name} has seeds {_seeds(present)}, but the table needs {seeds}: train the missing ones, "
                "or lower --seeds."
            )
        reference = reference or row
        paired = {run.seed for run in reference}
        if present != paired:
            raise ResultsError(
                f"{name} has seeds {_seeds(present)}, but {reference[0].path.parent} has {_seeds(paired)}, and rows "
                "are compared seed by seed: train the missing ones or delete the others."
            )
        _require_same(reference[0], row[0], "rows of one table share it", SHARED)
    return rows
