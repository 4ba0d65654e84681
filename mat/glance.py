"""What a run folder tells at this moment, whatever state it is in: for ``mat.show`` and the report."""

import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from mat.errors import UserError

PATIENCE, SLOW = 120.0, 20.0  # a run counts as alive for so many seconds, or so many gaps between its events
WRITTEN = ("config.yaml", "environment.json", "metrics.jsonl", "units.parquet")


@dataclass(frozen=True)
class Glance:
    """A run folder as it is.

    Attributes:
        path: The folder.
        config: The resolved configuration.
        environment: ``environment.json``; empty if it is not there yet.
        events: Lines of ``metrics.jsonl``; one that is being written is left out.
        units: ``units.parquet``, or None before the first selection.
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

    def last(self, key: str, event: str | None = None) -> Any:
        """The newest value of a key, of one kind of event or any; None if there is none."""
        found = (e[key] for e in reversed(self.events) if event in (None, e["event"]) and e.get(key) is not None)
        return next(found, None)

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The evaluations on the validation split in the order they were made, without that of a diverged model."""
        return pd.DataFrame([e for e in self.events if e["event"] == "evaluation" and math.isfinite(e["loss"])])

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
        """``complete``, ``failed``, ``running``, or ``interrupted``: neither ended nor written to of late."""
        if self.summary or self.failure is not None:
            return "complete" if self.summary else "failed"
        _, seconds, gaps = self._pace
        return "running" if self.quiet < max(PATIENCE, SLOW * seconds / gaps) else "interrupted"

    @property
    def timed(self) -> bool:
        """Whether the run has the machine to itself, so that its seconds may be shown."""
        return self.environment.get("exclusive") is True

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
        """Seconds of training left at the present pace (evaluations come on top), while the run is alive."""
        pflops, seconds, _ = self._pace
        if self.status != "running" or pflops <= 0:
            return None
        return float(max(0.0, self.budget - self.last("pflops")) * seconds / pflops)


def look(path: Path) -> Glance:
    """Read a run folder.

    Args:
        path: The folder, ``.../seed=<n>``.

    Raises:
        UserError: If it is no run folder, or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run folder (it has no config.yaml): name one, or a folder above some.")
    log, units = path / "metrics.jsonl", path / "units.parquet"
    names = ("environment", "summary", "failure")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
        assert isinstance(config, dict)
        lines = log.read_text().split("\n")[:-1] if log.is_file() else []  # what has no line feed yet is unfinished
        files = {n: path / f"{n}.json" for n in names}
        known = {n: json.loads(file.read_text()) if file.is_file() else {} for n, file in files.items()}
        return Glance(
            path, {str(k): v for k, v in config.items()}, known["environment"], [json.loads(line) for line in lines],
            pd.read_parquet(units) if units.is_file() else None, known["summary"], known["failure"].get("reason"),
            time.time() - max((path / name).stat().st_mtime for name in WRITTEN if (path / name).is_file()),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete that run folder and train it again.") from error


def runs_below(root: Path) -> list[Path]:
    """Run folders at or below a folder, sorted."""
    if (root / "config.yaml").is_file():
        return [root]
    return sorted(config.parent for config in root.rglob("seed=*/config.yaml")) if root.is_dir() else []
