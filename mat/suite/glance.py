"""What a run folder tells at this moment, whatever state it is in: the one reader of run
folders.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mat.suite.errors import UserError
from mat.suite.files import sha256

# A run counts as alive for so many seconds, or so many gaps between its events
PATIENCE, SLOW = 120.0, 20.0
WRITTEN = ("config.yaml", "environment.json", "metrics.jsonl", "units.parquet")

# What readers of a folder rely on, by file.
CONFIGURED = (
    "seed",
    "model.name",
    "dataset.name",
    "method.name",
    "method.budget",
    "selection.mode",
    "train.pflops",
    "train.marks",
)
LOGGED = {"event", "pflops", "seconds"}
# Parts of the PFLOPs: pflops_forward, ...
LEDGER = ("forward", "input_grad", "weight_grad", "overhead")
RECORDED = {"t", "kind", "layer", "unit", "active", "stopped"}


@dataclass(frozen=True, eq=False)
class Glance:
    """A run folder as it is.

    Attributes:
        path: The folder.
        config: The resolved configuration.
        environment: ``environment.json``; empty if it is not there yet.
        events: Lines of ``metrics.jsonl``; one that is being written is left out.
        units: ``units.parquet``, or None before the first record.
        summary: Empty until the run is complete.
        failure: Why it failed, or None.
        quiet: Seconds since something was written.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    events: list[dict[str, Any]]
    units: pd.DataFrame | None
    summary: dict[str, Any]
    failure: str | None
    quiet: float

    @property
    def method(self) -> str:
        """Name of its method."""
        return str(self.config["method"]["name"])

    @property
    def model(self) -> str:
        """Name of its model."""
        return str(self.config["model"]["name"])

    @property
    def seed(self) -> int:
        """What pairs it with runs of other methods."""
        return int(self.config["seed"])

    @property
    def key(self) -> tuple[str, str]:
        """Model and method: the row of a table that the run belongs to."""
        return self.model, self.method

    def last(self, key: str, event: str | None = None) -> Any:
        """The newest value of a key, of one kind of event or any; None if there is none."""
        found = (
            e[key]
            for e in reversed(self.events)
            if event in (None, e["event"]) and e.get(key) is not None
        )
        return next(found, None)

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The evaluations on the validation split in the order they were made, without that of a
        diverged model.
        """
        return pd.DataFrame(
            [e for e in self.events if e["event"] == "evaluation" and math.isfinite(e["loss"])]
        )

    @property
    def best(self) -> float | None:
        """The lowest validation loss so far."""
        return None if self.evaluations.empty else float(self.evaluations["loss"].min())

    @cached_property
    def _pace(self) -> tuple[float, float, int]:
        """PFLOPs, seconds and number of the latest gaps between events."""
        recent = self.events[-20:]
        if len(recent) < 2:
            return 0.0, 0.0, 1
        first, last = recent[0], recent[-1]
        return last["pflops"] - first["pflops"], last["seconds"] - first["seconds"], len(recent) - 1

    @property
    def status(self) -> str:
        """``complete``, ``failed``, ``running``, or ``interrupted``: neither ended nor written to
        of late.
        """
        if self.summary or self.failure is not None:
            return "complete" if self.summary else "failed"
        _, seconds, gaps = self._pace
        return "running" if self.quiet < max(PATIENCE, SLOW * seconds / gaps) else "interrupted"

    @property
    def timed(self) -> bool:
        """Whether the run has the machine to itself, so that its seconds may be shown."""
        return self.environment.get("exclusive") is True

    @property
    def machine(self) -> str:
        """Where it computes and how precisely: seconds of runs that agree in it can be compared."""
        name = self.environment.get("device_name", self.environment.get("device", "–"))
        threads, precision = (self.environment.get(key, "–") for key in ("threads", "precision"))
        return f"{name}, {threads} threads, {precision}"

    @property
    def commit(self) -> str:
        """Which version of the code computes."""
        changes = " with uncommitted changes" if self.environment.get("dirty") else ""
        return f"{(self.environment.get('commit') or 'unknown')[:10]}{changes}"

    @property
    def budget(self) -> float:
        """PFLOPs that the run is to spend."""
        return float(self.config["train"]["pflops"] * self.config["method"]["budget"])

    @property
    def progress(self) -> float:
        """Share of them that it has spent."""
        return 1.0 if self.summary else float(min(1.0, (self.last("pflops") or 0.0) / self.budget))

    @property
    def eta(self) -> float | None:
        """Seconds of training left at the present pace (evaluations come on top), while the run is
        alive.
        """
        pflops, seconds, _ = self._pace
        if self.status != "running" or pflops <= 0:
            return None
        return float(max(0.0, self.budget - self.last("pflops")) * seconds / pflops)


def look(path: Path) -> Glance:
    """Read a run folder.

    Args:
        path: The folder, ``.../seed=<n>``.

    Raises:
        UserError: If a file of it is damaged, or its configuration missing.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} has no config.yaml: run the same command again, or delete that run folder."
        )
    try:
        summary = read_summary(path)
        environment, failure = (_json(path / f"{name}.json") for name in ("environment", "failure"))
        return Glance(
            path,
            read_config(path),
            environment,
            _events(path / "metrics.jsonl"),
            _units(path / "units.parquet"),
            summary,
            str(failure.get("reason")) if failure else None,
            time.time()
            - max((path / name).stat().st_mtime for name in WRITTEN if (path / name).is_file()),
        )
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UserError(
            f"{path} is damaged ({reason}): delete that run folder and train it again."
        ) from error


def look_below(root: Path) -> tuple[list[Glance], list[str]]:
    """The runs at or below a folder, sorted by path, and a sentence about each that is damaged."""
    runs, damaged = [], []
    for path in runs_below(root):
        try:
            runs.append(look(path))
        except UserError as error:
            damaged.append(str(error))
    return runs, damaged


def state_of(path: Path) -> tuple[str, str]:
    """Where a run stands that no process works on, and why if it failed: ``complete``, ``failed``,
    ``damaged``,
    ``interrupted`` or ``not begun``.
    """
    if not (path / "config.yaml").is_file():
        return "not begun", ""
    try:
        run = look(path)
    except UserError as error:
        return "damaged", str(error)
    return run.status.replace("running", "interrupted"), run.failure or ""


def row_of(path: Path) -> tuple[str, str] | None:
    """Model and method of a run folder; None where its configuration cannot be read."""
    try:
        config = read_config(path)
    except (ValueError, OSError):
        return None
    return config["model"]["name"], config["method"]["name"]


def seal(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """A summary with the checksums of the run's other files and its own: what ``summary.json``
    holds.
    """
    names = sorted(
        file.name for file in path.iterdir() if file.name in WRITTEN or file.suffix == ".parquet"
    )
    own = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
    return {
        **summary,
        "sha256": {"summary.json": own, **{name: sha256(path / name) for name in names}},
    }


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run folder, without its checksums; empty until the run is complete.

    Raises:
        ValueError: If it, or a file it has a checksum of, is not what was written. (Old ones have
            no checksums.)
    """
    summary = _json(path / "summary.json")
    sealed = summary.pop("sha256", None)
    for name, digest in (sealed or {}).items():
        if name == "summary.json":
            found = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
        else:
            found = sha256(path / name) if (path / name).is_file() else ""
        if found != digest:
            raise ValueError(f"{name} is not what was written")
    return summary


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run folder.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        config = OmegaConf.load(path / "config.yaml")
        for key in CONFIGURED:
            if not isinstance(config, DictConfig) or OmegaConf.select(config, key) is None:
                raise ValueError(f"config.yaml has no {key}")
        content: Any = OmegaConf.to_container(config)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    return dict(content)


def _object(text: str) -> dict[str, Any] | None:
    """What a JSON object says, or None if the text is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _json(path: Path) -> dict[str, Any]:
    """A file's content; empty if it is not there."""
    content = _object(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if content is None:
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _events(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines, events = text.split("\n")[:-1], []  # what has no line feed yet is unfinished
    for number, event in enumerate(map(_object, lines), start=1):
        if (
            event is None
            or not event.keys() >= LOGGED
            or (event["event"] == "evaluation" and not isinstance(event.get("loss"), float | int))
        ):
            raise ValueError(f"{path.name}, line {number}, is no event")
        events.append(event)
    return events


def _units(path: Path) -> pd.DataFrame | None:
    try:
        units = pd.read_parquet(path) if path.is_file() else None
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise ValueError(f"{path.name} cannot be read") from error
    if units is not None and (missing := sorted(RECORDED - set(units))):
        raise ValueError(f"{path.name} has no {missing[0]}")
    return units


def runs_below(root: Path) -> list[Path]:
    """Run folders at or below a folder, sorted."""
    if (root / "config.yaml").is_file():
        return [root]
    return (
        sorted(config.parent for config in root.rglob("seed=*/config.yaml"))
        if root.is_dir()
        else []
    )
