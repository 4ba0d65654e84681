"""The run folder: the contract between the engine and ``results/`` (what each file holds: README, "Run folder").

``units.parquet`` and the observers' tables grow by a record of all units per selection interval, whether the method
selects or not. ``summary.json`` is written last: its presence means that the run is complete.
"""

import hashlib
import json
import platform
import shlex
import subprocess
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from mat.suite.config import Config, HardwareConfig, differences, is_incidental
from mat.suite.errors import UserError
from mat.suite.files import replacing

MACHINE = tuple(f"hardware.{f.name}" for f in fields(HardwareConfig) if f.name != "precision")
LONGEST_NAME = 200  # bytes; file systems allow 255


def folder_of(config: Config, overrides: list[str]) -> Path:
    """Where a run lives.

    Args:
        config: Its configuration.
        overrides: The command line's overrides, as Hydra gives them.

    Returns:
        ``<runs>/<name>/<overrides without seed>/seed=<n>``; very long overrides end in a hash of them all.
    """
    named = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key not in ("experiment", "hardware") and not is_incidental(key):
            named.append(override.lstrip("+").replace("/", "_"))
    leaf = ",".join(sorted(named)) or "default"
    if len(leaf.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(leaf.encode()).hexdigest()[:12]
        leaf = f"{leaf.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"
    return Path(config.runs) / config.name / leaf / f"seed={config.seed}"


def write_atomically(path: Path, text: str) -> None:
    """Write a text that replaces the file as a whole."""
    with replacing(path) as file:
        file.write(text.encode())


class RunFolder:
    """One run's files.

    Args:
        path: The folder; made if need be.
        config: The run's configuration.

    Raises:
        UserError: If the folder holds a run of another configuration, or one begun on other hardware.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.checkpoints = path / "checkpoint"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        resolved = asdict(config)
        known = path / "config.yaml"
        complete = (path / "summary.json").is_file()
        begun = complete or (self.checkpoints / "latest.pt").is_file()
        if known.is_file() and begun:  # a run that was refused or killed before its first checkpoint holds nothing
            before: Any = OmegaConf.to_container(OmegaConf.load(known))
            differing = differences(before, resolved)
            if complete:  # and stands, whatever machine made it
                differing = {k: v for k, v in differing.items() if k not in MACHINE}
            if differing:
                raise UserError(
                    f"{path} holds a run with another {next(iter(differing))}: remove that folder, or give this run "
                    "another name=..."
                )
        else:
            write_atomically(known, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        (path / "failure.json").unlink(missing_ok=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a complete run, else None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write_environment(self, config: Config) -> None:
        """Record where and with what the run computes; each resumption is added under ``resumed``."""
        first = now = environment(config)
        path = self.path / "environment.json"
        if path.is_file():
            first = json.loads(path.read_text())
            first["resumed"] = [*first.get("resumed", []), now]
            first["exclusive"] = first["exclusive"] and now["exclusive"]
        write_atomically(path, json.dumps(first, indent=1))

    def append(self, event: dict[str, Any]) -> None:
        """Add one event to ``metrics.jsonl``."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")

    def lines(self) -> int:
        """Events written so far."""
        path = self.path / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def rewind(self, lines: int, records: int) -> None:
        """Forget what was written after a checkpoint: events beyond a number, records from a number on."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            kept = path.read_text().splitlines(keepends=True)[:lines]
            write_atomically(path, "".join(kept))
        for table in self.path.glob("*.parquet"):
            frame = pd.read_parquet(table)
            with replacing(table) as file:
                frame[frame["t"] < records].to_parquet(file, index=False)

    def add_rows(self, table: str, rows: pd.DataFrame) -> None:
        """Add a record's rows to ``<table>.parquet``, which is rewritten."""
        path = self.path / f"{table}.parquet"
        frame = pd.concat([pd.read_parquet(path), rows]) if path.is_file() else rows
        with replacing(path) as file:
            frame.to_parquet(file, index=False)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``: the run is complete."""
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1))

    def write_failure(self, reason: str) -> None:
        """Mark the run failed; a new try takes that back."""
        write_atomically(self.path / "failure.json", json.dumps({"reason": reason}, indent=1))


def environment(config: Config) -> dict[str, Any]:
    """Command, commit, versions, device, threads, precision of this process; None for what git does not tell."""

    def git(*arguments: str) -> str | None:
        root = Path(__file__).resolve().parents[2]
        try:
            return subprocess.check_output(["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    device = config.hardware.device
    return {
        "command": _command(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build, such as +cu126, which the metadata lack
            **{name: version(name) for name in ("datasets", "tokenizers")},
        },
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": config.hardware.precision,
        "exclusive": config.hardware.exclusive,
    }


def _command() -> str | None:
    """The command that makes this run alone, also of a run that is part of a sweep; None outside the launcher."""
    if not HydraConfig.initialized():
        return None
    return shlex.join(["python", "launch.py", *HydraConfig.get().overrides.task])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [n for n in info.read_text().splitlines() if n.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
