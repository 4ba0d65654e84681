"""The run folder: the contract between the engine and ``results/`` (what each file holds: README,
"Run folder").

``units.parquet`` and the observers' tables grow by a record of all units per selection interval,
whether the method selects or not. A checkpoint holds all that a run needs to go on, the
configuration and checksums of its records among it; ``summary.json`` is written last, with the
checksums of all other files: the run is complete.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Collection
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from mat.suite import checkpoint
from mat.suite.config import Config, HardwareConfig
from mat.suite.errors import Damaged, UserError
from mat.suite.files import move, naming, replacing, say, write_text
from mat.suite.glance import read_config, read_summary, seal
from mat.suite.science import differences

MACHINE = {f"hardware.{f.name}" for f in fields(HardwareConfig) if f.name != "precision"}


class RunFolder:
    """One run's files. Nothing is written before ``begin``.

    Args:
        path: The folder.
        config: The run's configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoint"
        self.latest, self.before = (self.checkpoints / f"{n}.pt" for n in ("latest", "before"))
        self.begun = False
        self._lock = FileLock(path / ".lock", timeout=0)
        self._digests: dict[str, str] = {}  # of the tables' content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.release(force=True)

    # --- what is there

    def complete(self) -> dict[str, Any] | None:
        """The summary of a complete run, all of whose files are as they were written; else None.

        Raises:
            UserError: If the folder holds another run, or a complete one that is damaged beyond
                repair.
        """
        try:
            summary = read_summary(self.path)
            recorded = read_config(self.path) if summary else None
        except ValueError as error:
            if not self.latest.is_file():
                raise UserError(
                    f"{self.path} is damaged ({error}): remove that run folder to train it again."
                ) from error
            say(f"{self.path} is damaged ({error}): it is completed again from its checkpoint.")
            return None
        if recorded is not None:
            self._require_same(recorded, MACHINE)
        return summary or None

    def restore(self, device: torch.device) -> dict[str, Any] | None:
        """The newest checkpoint whose best weights and records are whole, too; None where there is
        none.

        Raises:
            UserError: If another process trains the run, if it is another one, or if nothing of it
                is whole.
        """
        if not self.path.is_dir():
            return None
        self.lock()
        damaged = None
        for path in (self.latest, self.before):
            if not path.is_file():
                continue
            try:
                state = checkpoint.load(path, device)
                self._require_same(state["config"])
                if state["best"].get("sha256"):
                    checkpoint.load(
                        self.best_weights(state["best"]), device, state["best"]["sha256"]
                    )
                self._rewind(state["lines"], state["records"], state["digests"])
            except Damaged as error:
                damaged = damaged or error
                continue
            if damaged is not None:
                say(
                    f"{str(damaged).partition(':')[0]}: the run goes on from the checkpoint before "
                    "it."
                )
            if path == self.before:
                move(self.before, self.latest)
            self._needed = state["best"].get("step")
            return state
        if damaged is not None:
            raise damaged
        return None

    def lock(self) -> None:
        """Keep other processes out until this one leaves the folder.

        Raises:
            UserError: If another process is in it.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.path} is being trained by another process: wait until it ends, or stop it."
            ) from error

    def _require_same(self, recorded: dict[str, Any], but: Collection[str] = ()) -> None:
        auto = {"hardware.precision"} if self.config.hardware.precision == "auto" else set()
        differing = differences(recorded, asdict(self.config)).keys() - {*but, *auto}
        if differing:
            raise UserError(
                f"{self.path} holds a run with another {min(differing)}: remove that folder, or "
                "give this run another name=..."
            )

    # --- what is written

    def begin(self, config: Config, before: dict[str, Any] | None) -> dict[str, Any]:
        """Make the folder, and write into it what the run is and where it computes.

        Args:
            config: The configuration, its precision settled.
            before: The environment of the run that goes on, if there is one.

        Returns:
            The environment, each resumption under ``resumed``.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.begun = True
        if before is None:
            self._rewind(0, 0, None)
        recorded = now = environment(config)
        if before is not None:
            recorded = {**before, "resumed": [*before.get("resumed", []), now]}
            recorded["exclusive"] = before["exclusive"] and now["exclusive"]
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        write_text(self.path / "environment.json", json.dumps(recorded, indent=1))
        failure = self.path / "failure.json"
        if failure.is_file():
            say(f"{self.path} failed before: it is tried again.")
            failure.unlink()
        return recorded

    def best_weights(self, best: dict[str, Any]) -> Path:
        """Where the weights with the best validation score are."""
        return self.checkpoints / f"best-{best['step']:.0f}.pt"

    def append(self, event: dict[str, Any]) -> None:
        """Add one event to ``metrics.jsonl``."""
        with naming(self.path / "metrics.jsonl"), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")

    def recorded(self) -> dict[str, Any]:
        """How many events there are, and checksums of them and of the tables: a part of a
        checkpoint.
        """
        events = self.path / "metrics.jsonl"
        with naming(events), open(events, "rb") as file:
            written = file.read()
            os.fsync(file.fileno())
        digests = {**self._digests, "metrics": hashlib.sha256(written).hexdigest()}
        return {"lines": written.count(b"\n"), "digests": digests}

    def add_rows(self, table: str, rows: pd.DataFrame) -> None:
        """Add a record's rows to ``<table>.parquet``, which is rewritten."""
        path = self.path / f"{table}.parquet"
        frame = pd.concat([pd.read_parquet(path), rows]) if path.is_file() else rows
        self._write_table(path, frame)

    def save(self, state: dict[str, Any]) -> None:
        """Write the latest checkpoint; the one before it and the best weights of both stay."""
        checkpoint.save(self.latest, state, self.before)
        self._clear({self._needed, state["best"].get("step")})
        self._needed = state["best"].get("step")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``: the run is complete, and no earlier checkpoint is needed."""
        write_text(self.path / "summary.json", json.dumps(seal(self.path, summary), indent=1))
        self.before.unlink(missing_ok=True)
        self._clear({self._needed})

    def write_failure(self, reason: str) -> None:
        """Mark a run that has begun failed; a new try takes that back."""
        if self.begun:
            write_text(self.path / "failure.json", json.dumps({"reason": reason}, indent=1))

    _needed: float | None = None  # step of the best weights that the latest checkpoint needs

    def _clear(self, steps: set[float | None]) -> None:
        kept = {self.best_weights({"step": step}) for step in steps if step is not None}
        for old in set(self.checkpoints.glob("best-*.pt")) - kept:
            old.unlink()

    def _write_table(self, path: Path, frame: pd.DataFrame) -> None:
        with replacing(path) as file:
            frame.to_parquet(file, index=False)
        self._digests[path.stem] = _digest(frame)

    def _rewind(self, lines: int, records: int, digests: dict[str, str] | None) -> None:
        """Forget what was written after a checkpoint: events beyond a number, records from a number
        on.

        Args:
            lines: Number of events.
            records: Number of records.
            digests: Checksums of what is left; None at a start from nothing.

        Raises:
            Damaged: If something else would be left; nothing is changed then.
        """
        events = self.path / "metrics.jsonl"
        written = events.read_bytes() if events.is_file() else b""
        kept = b"".join(written.splitlines(keepends=True)[:lines])
        names = {path.stem for path in self.path.glob("*.parquet")} | (digests or {}).keys()
        frames = {}
        try:
            for name in names - {"metrics"}:
                frame = (
                    pd.read_parquet(self.path / f"{name}.parquet")
                    if records
                    else pd.DataFrame({"t": []})
                )
                frames[name] = frame[frame["t"] < records]
        except (OSError, ValueError, KeyError) as error:
            raise self._damage(f"{name}.parquet") from error
        found = {
            "metrics": hashlib.sha256(kept).hexdigest(),
            **{n: _digest(f) for n, f in frames.items() if len(f)},
        }
        for name in found.keys() | (digests or found).keys():
            if digests is not None and found.get(name) != digests.get(name):
                raise self._damage("metrics.jsonl" if name == "metrics" else f"{name}.parquet")
        if kept != written:
            with replacing(events) as file:
                file.write(kept)
        for name, frame in frames.items():
            if len(frame):
                self._write_table(self.path / f"{name}.parquet", frame)
            else:
                (self.path / f"{name}.parquet").unlink(missing_ok=True)

    def _damage(self, name: str) -> Damaged:
        return Damaged(
            f"{self.path / name} is damaged: remove {self.checkpoints} to start the run again."
        )


def check_matched(config: Config) -> None:
    """Refuse a ``method.matched`` that differs from a run in more than its method and its machine.

    Raises:
        UserError: If it does, if it selects nothing, or if it is incomplete or damaged.
    """
    if config.method.matched is None:
        return
    run, key = Path(config.method.matched), f"method.matched={config.method.matched}"
    try:
        recorded = read_config(run) if read_summary(run) else None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{key} is damaged ({error}): train that run again, or name another."
        ) from error
    if recorded is None:
        raise UserError(f"{key} is not a finished run: run it first, or name another run folder.")
    if recorded["method"].get("policy") == "all":
        raise UserError(
            f"{key} is a run that selects no units: name one that does, such as one of method=mat."
        )
    for other in differences(recorded, asdict(config)):
        if not other.startswith(("method.", "hardware.")):
            raise UserError(
                f"{key} is a run with another {other}: name one that differs in its method alone."
            )


def _digest(frame: pd.DataFrame) -> str:
    """A checksum of a table's content, however it is stored."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()
    return hashlib.sha256(" ".join(frame.columns).encode() + rows).hexdigest()


def environment(config: Config) -> dict[str, Any]:
    """Command, commit, versions, device, threads, precision of this process; None for what git does
    not tell.
    """

    def git(*arguments: str) -> str | None:
        root = Path(__file__).resolve().parents[2]
        try:
            return subprocess.check_output(
                ["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True
            ).strip()
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
            # With its build, such as +cu126, which the metadata lack
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("datasets", "tokenizers")},
        },
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": config.hardware.precision,
        "exclusive": config.hardware.exclusive,
    }


def _command() -> str | None:
    """The command that makes this run alone, also of a run that is part of a sweep; None outside
    the launcher.
    """
    if not HydraConfig.initialized():
        return None
    return shlex.join(["python", "launch.py", *HydraConfig.get().overrides.task])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()
