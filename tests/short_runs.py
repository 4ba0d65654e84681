"""Configurations composed as the command line composes them, small enough to train in a blink."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mat.suite import engine
from mat.suite.compose import CONF, register_schemas, resolve
from mat.suite.config import Config
from mat.suite.engine import Training

register_schemas()
# PFLOPs of a dense training step of a small model, rounded up.
STEP = {"text": 2e-9, "image": 15e-9}
SMALL = {
    "text": (
        "model.layers=1",
        "model.width=16",
        "model.heads=2",
        "model.ffn_hidden=32",
        "model.ffn_groups=4",
        "dataset=pydocs",
        "dataset.vocabulary=256",
        "dataset.length=16",
        "train.batch=8",
    ),
    # An epoch has nine steps, the last of which is a short one.
    "image": ("model.stages=[[8],[8]]", "dataset=digits", "dataset.size=8", "train.batch=128"),
}
VGG = ("model=vgg16_mini", "selection=filters_mini", "train=images_mini")
SWITCH = (
    "model=switch_mini", "model.experts=4", "model.capacity_factor=1.1", "selection=experts_mini",
)  # fmt: skip
ONLINE = ("method=mat", "selection.reduction=online")
Finished = Callable[..., tuple[Config, Path]]  # makes a whole run, once
SHORT = (
    "selection.samples=4", "selection.projections=1", "selection.interval=0.05",
    "hardware=cpu", "hardware.precision=float32",
    "train.lr=1e-2", "train.eval_samples=16", "train.eval_batch=256", "train.log_steps=5",
    "train.checkpoint_steps=7", "tracking.progress=false",
)  # fmt: skip


def composed(*overrides: str) -> DictConfig:
    """What the launcher is handed for these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def small_overrides(
    cache: Path, *overrides: str, steps: int = 40, modality: str = "text"
) -> list[str]:
    """Overrides of a run as long as so many dense steps."""
    length = f"train.pflops={steps * STEP[modality]}"
    return [f"dataset.cache={cache}", *SMALL[modality], *SHORT, length, *overrides]


def small(cache: Path, *overrides: str, steps: int = 40, modality: str = "text") -> Config:
    """The configuration of a run as long as so many dense steps."""
    return resolve(composed(*small_overrides(cache, *overrides, steps=steps, modality=modality)))


def one_sentence(message: str) -> bool:
    """Whether a message is one sentence on one line, with a remedy behind its colon."""
    ends = re.findall(r"[.?!](?=\s+[A-Z]|\s*$)", message.strip())
    plain = "\n" not in message.strip() and "Traceback" not in message
    return len(ends) == 1 and plain and ": " in message


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Events of a run, of one kind or all."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def without_seconds(numbers: dict[str, Any]) -> dict[str, Any]:
    """Everything but what a clock has measured, checksums of that, and what says where it was."""
    clocked = ("seconds", "sha256", "digests", "environment")
    return {k: v for k, v in numbers.items() if not k.startswith(clocked)}


def unseal(folder: Path) -> None:
    """Make a complete run one that was made before summaries had checksums."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary.pop("sha256", None)
    path.write_text(json.dumps(summary))


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves behind, in comparable form, without seconds."""
    units = folder / "units.parquet"
    latest = torch.load(folder / "checkpoint" / "latest.pt", weights_only=True)
    latest["best"] = without_seconds(latest["best"])
    return {
        "metrics": [without_seconds(event) for event in events(folder)],
        "summary": without_seconds(json.loads((folder / "summary.json").read_text())),
        "units": pd.read_parquet(units) if units.is_file() else None,
        "latest": without_seconds(latest),
        "best": {
            path.name: torch.load(path, weights_only=True)
            for path in folder.glob("checkpoint/best-*.pt")
        },
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equality to the last bit, through containers, with the place of the first difference."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} and {b}"


class Killed(BaseException):
    """kill -9: no checkpoint, no goodbye."""


def interrupt(monkeypatch: pytest.MonkeyPatch, verb: str, call: int, how: str) -> None:
    """End the run at the n-th call of a verb: killed before or after, or asked to stop within."""
    original = getattr(Training, verb)
    count = 0

    def patched(self: Training, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and how == "before":
            raise Killed
        if count == call and how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        answer = original(self, *arguments, **named)
        if count == call and how == "after":
            raise Killed
        return answer

    monkeypatch.setattr(Training, verb, patched)


def run_interrupted(config: Config, folder: Path, verb: str, call: int, how: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, verb, call, how)
        if how == "sigterm":
            assert engine.run(config, folder) is None
        else:
            with pytest.raises(Killed):
                engine.run(config, folder)
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"event": "tra')  # a line torn by the kill
    assert not (folder / "summary.json").exists() and not (folder / "failure.json").exists()


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert set(summary.pop("sha256")) >= {
        "summary.json",
        "metrics.jsonl",
        "config.yaml",
        "environment.json",
    }
    return summary
