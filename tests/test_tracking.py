"""The mirror shows what the run folder holds, and cannot cost a run."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from short_runs import assert_same, events, small, without_seconds

from mat.suite import engine
from mat.suite.config import Config
from mat.suite.tracking import Mirror, Progress, open_mirror


class Recorder:
    """Stands in for a wandb run; raises in the verbs named."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.calls: list[tuple[str, Any]] = []
        self.summary = self

    def _record(self, verb: str, value: Any) -> None:
        self.calls.append((verb, value))
        if verb in self.broken:
            raise ConnectionError("no network")

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self._record("log", (numbers, step))

    def update(self, summary: dict[str, Any]) -> None:
        self._record("update", summary)

    def finish(self, exit_code: int) -> None:
        self._record("finish", exit_code)

    def received(self, verb: str) -> list[Any]:
        return [value for name, value in self.calls if name == verb]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def config(cache: Path) -> Config:
    return small(cache, "method=mat", "tracking=wandb", steps=8)


def init_with(monkeypatch: pytest.MonkeyPatch, *runs: Recorder | Exception) -> list[dict[str, Any]]:
    """Replace ``wandb.init`` by what gives these, one after the other; returns how it was
    called.
    """
    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Recorder:
        asked.append(arguments)
        answer = runs[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("wandb.init", init)
    return asked


def shows_something(mirror: Mirror) -> bool:
    return mirror._run is not None


def test_mirror_receives_every_event_and_the_summary(config, tmp_path, monkeypatch):
    recorder = Recorder()
    asked = init_with(monkeypatch, recorder)
    summary = engine.run(config, tmp_path / "exp" / "method=mat" / "seed=0")
    lines = events(tmp_path / "exp" / "method=mat" / "seed=0")
    assert [step for _, step in recorder.received("log")] == [line["step"] for line in lines]
    for (numbers, _), line in zip(recorder.received("log"), lines, strict=True):
        kind = line["event"]
        assert (
            numbers[f"{kind}/pflops"] == line["pflops"]
            and numbers[f"{kind}/active_share"] == line["active_share"]
        )
        assert numbers.get(f"{kind}/loss") == line["loss"] and all(
            key.startswith(f"{kind}/") for key in numbers
        )
    assert recorder.received("update") == [summary] and recorder.received("finish") == [0]
    assert asked[0]["name"] == "exp/method=mat/seed=0" and asked[0]["config"]["train"]["batch"] == 8


def test_failed_run_closes_the_mirror_without_a_summary(config, tmp_path, monkeypatch):
    recorder = Recorder()
    init_with(monkeypatch, recorder)

    def fail(self: Any, *arguments: Any) -> None:
        raise engine.RunFailed("diverged")

    monkeypatch.setattr(engine.Training, "_train_step", fail)
    with pytest.raises(engine.RunFailed):
        engine.run(config, tmp_path / "run")
    assert recorder.received("update") == [] and recorder.received("finish") == [1]


@pytest.mark.parametrize("broken", [["log"], ["update"], ["finish"], ["log", "update", "finish"]])
def test_failing_mirror_is_reported_once_and_left_alone(
    broken, config, tmp_path, monkeypatch, caplog
):
    recorder = Recorder(*broken)
    init_with(monkeypatch, recorder)
    with caplog.at_level(logging.WARNING):
        assert engine.run(config, tmp_path / "run") is not None
    assert (tmp_path / "run" / "summary.json").is_file()
    warnings = [
        record.getMessage() for record in caplog.records if "mirroring" in record.getMessage()
    ]
    assert len(warnings) == 1 and "no network" in warnings[0]
    assert len([name for name, _ in recorder.calls if name in broken]) == 1


def test_mirror_changes_no_number(config, cache, tmp_path, monkeypatch):
    init_with(monkeypatch, Recorder())
    engine.run(config, tmp_path / "mirrored")
    engine.run(small(cache, "method=mat", steps=8), tmp_path / "alone")
    mirrored, alone = (
        [without_seconds(e) for e in events(tmp_path / name)] for name in ("mirrored", "alone")
    )
    assert_same(mirrored, alone)


def test_run_goes_on_without_wandb(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        assert engine.run(config, tmp_path / "run") is not None
    assert "wandb could not start" in caplog.text


KEYS = [  # environment, netrc, how wandb starts when it can, and when it cannot go online
    ({}, "", ["offline"]),
    ({"WANDB_API_KEY": "k" * 40}, "", ["online", "offline"]),
    ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", ["offline"]),
    ({}, "machine api.wandb.ai login user password secret", ["online", "offline"]),
    ({}, "machine example.org login user password secret", ["offline"]),
    (
        {"WANDB_BASE_URL": "https://wandb.example.org"},
        "machine wandb.example.org login u password s",
        ["online", "offline"],
    ),
    ({}, "machine", ["offline"]),
]


@pytest.mark.parametrize(("environment", "netrc", "modes"), KEYS)
def test_offline_without_a_key_or_a_network(
    environment, netrc, modes, config, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    recorder = Recorder()
    asked = init_with(monkeypatch, recorder)
    assert shows_something(open_mirror(config, tmp_path))
    assert [a["mode"] for a in asked] == modes[:1]
    asked = init_with(monkeypatch, *[ConnectionError("no network")] * (len(modes) - 1), recorder)
    mirror = open_mirror(config, tmp_path)
    mirror.finish({})
    assert [a["mode"] for a in asked] == modes and recorder.received("finish") == [0]
    init_with(monkeypatch, *[RuntimeError("broken")] * len(modes))
    assert not shows_something(open_mirror(config, tmp_path))


def test_wandb_is_asked_for_only_when_wanted(cache, tmp_path, monkeypatch):
    asked = init_with(monkeypatch)
    assert not shows_something(open_mirror(small(cache), tmp_path)) and asked == []


def test_wandb_can_be_disabled_from_outside(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    asked = init_with(monkeypatch)
    assert not shows_something(open_mirror(config, tmp_path)) and asked == []


def test_an_unknown_mode_of_wandb_is_one_line(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    asked = init_with(monkeypatch)
    assert not shows_something(open_mirror(config, tmp_path)) and asked == []
    assert caplog.text.count("\n") == 1 and "WANDB_MODE=nonsense" in caplog.text


def test_resumed_run_goes_on_under_the_same_identity(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    asked = init_with(monkeypatch, Recorder(), Recorder(), Recorder())
    for name in ("one", "one", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        open_mirror(config, tmp_path / name)
    assert asked[0]["id"] == asked[1]["id"] != asked[2]["id"] and asked[1]["resume"] == "allow"


def test_real_offline_run_leaves_its_files(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    summary = engine.run(config, tmp_path / "run")
    wandb.teardown()  # what the interpreter does at its end: the service writes what it holds
    assert summary is not None and events(tmp_path / "run")[-1]["event"] == "test"
    records = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 1
    written = records[0].read_bytes()
    assert b"evaluation/loss" in written and b"best_validation_loss" in written


def test_progress_bar_shows_what_matters(capsys):
    bar = Progress(2.0, 0.5, True, "bert mat seed=1")
    bar.update(1.5, 3.25, 0.5, 3.5)
    bar.update(2.0, 3.125, 0.25, None)
    bar.close()
    shown = capsys.readouterr().err
    for part in ("bert mat seed=1", "25%", "100%", "loss 3.125", "active 25%", "2/2 PFLOPs"):
        assert part in shown, shown
    hidden = Progress(2.0, 0.0, False, "bert")
    hidden.update(1.0, 3.0, 1.0, None)
    hidden.close()
    assert capsys.readouterr().err == ""
