"""A run at a glance: every state a run folder can be in, told from its files alone."""

import json
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from mat.suite.errors import UserError
from mat.suite.glance import look, runs_below
from mat.suite.show import clock, course, main
from tests.short_runs import one_sentence


def write_live(
    path: Path, steps: int = 3, *, complete: bool = False, failure: str | None = None
) -> Path:
    """A run of 4 PFLOPs, one per event and 10 seconds, two layers of two heads; layer 1 is frozen
    from t = 1 on."""
    path.mkdir(parents=True)
    config = {
        "seed": 0,
        "model": {"name": "bert_mini"},
        "dataset": {"name": "pydocs"},
        "method": {"name": "mat", "budget": 0.5},
        "selection": {"mode": "cut"},
        "train": {"pflops": 8.0, "marks": []},
    }
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    rows = [
        {
            "t": t,
            "kind": "heads",
            "layer": layer,
            "unit": unit,
            "active": t == 0 or layer == 0,
            "stopped": t > 1 and layer == 1,
        }
        for t in range(3)
        for layer in (0, 1)
        for unit in (0, 1)
    ]
    pd.DataFrame(rows).to_parquet(path / "units.parquet")
    lines = [
        {
            "event": "train",
            "step": i,
            "loss": 7.0 - i,
            "pflops": float(i),
            "seconds": 10.0 * i,
            "active_share": 0.5,
            "pflops_forward": i / 2,
        }
        for i in range(1, steps + 1)
    ]
    lines.append(lines[-1] | {"event": "evaluation", "loss": 5.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if complete:
        (path / "summary.json").write_text(json.dumps({"test_loss": 5.0}))
    if failure is not None:
        (path / "failure.json").write_text(json.dumps({"reason": failure}))
    return path


def age(path: Path, seconds: float) -> None:
    for file in path.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_live_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_live(tmp_path / "seed=0")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # being written
    run = look(path)
    assert run.status == "running" and run.progress == 0.75 and run.best == 5.25
    assert run.eta == pytest.approx(10.0)  # 1 PFLOP left at 1 PFLOP per 10 s
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "running",
        "75%",
        "ETA 0:00:10",
        "train 4",
        "validation 5.25",
        "forward 1.5",
        "3 of 4",
        "test –",
    ):
        assert text in shown, text
    heads = {
        line.split()[1]: line.split()
        for line in shown.splitlines()
        if line.strip().startswith("heads")
    }
    assert heads["0"][2:] == ["███", "2", "of", "2", "0"] and heads["1"][2:] == [
        "█··",
        "0",
        "of",
        "2",
        "2",
    ]


def test_states(tmp_path: Path) -> None:
    complete = write_live(tmp_path / "a" / "seed=0", complete=True)
    failed = write_live(tmp_path / "b" / "seed=0", failure="it diverged")
    quiet = write_live(tmp_path / "c" / "seed=0")
    for path in (complete, failed, quiet):
        age(path, 3600)
    assert [look(path).status for path in runs_below(tmp_path)] == [
        "complete",
        "failed",
        "interrupted",
    ]
    assert look(complete).progress == 1.0 and look(quiet).eta is None
    age(quiet, 127)  # 20 times the mean gap between events are 133 s
    assert look(quiet).status == "running"


def test_a_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_live(tmp_path / "x" / "seed=0", failure="it diverged")
    write_live(
        tmp_path / "x" / "seed=1" / "wandb" / "files", complete=True
    )  # another's config.yaml is no run
    write_live(tmp_path / "y" / "seed=0")
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "x/seed=0" in shown and "y/seed=0" in shown and "failed" in shown and "wandb" not in shown
    )


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_live(tmp_path / "seed=0")
    for name in ("units.parquet", "metrics.jsonl"):
        (path / name).unlink()
    assert main([str(path)]) == 0
    assert "0%" in capsys.readouterr().out


def test_a_diverged_evaluation_is_no_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_live(tmp_path / "seed=0", failure="the validation loss is nan")
    last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last | {"loss": float("nan")}) + "\n")
    run = look(path)
    assert run.best == 5.25 and run.evaluations["loss"].tolist() == [5.25]
    assert main([str(path)]) == 0 and "validation nan (best 5.25)" in capsys.readouterr().out


def test_a_wrong_path_gives_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and one_sentence(captured.err.removeprefix("error: "))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "seed: ["),
        ("config.yaml", "- 0"),
        ("config.yaml", "seed: 0"),
        ("metrics.jsonl", "{]\n"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"event": "train", "pflops": 1}\n'),
        ("metrics.jsonl", '{"event": "evaluation", "pflops": 1, "seconds": 1, "loss": null}\n'),
        ("environment.json", "{"),
        ("summary.json", "3"),
        ("failure.json", "[]"),
        ("units.parquet", "PAR1"),
    ],
)
def test_a_damaged_file_gives_one_sentence(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_live(tmp_path / "x" / "seed=0")
    write_live(tmp_path / "x" / "seed=1")
    (path / name).write_text(text)
    with pytest.raises(UserError, match=r"seed=0 is damaged \(.*\): delete") as refused:
        look(path)
    assert one_sentence(str(refused.value))
    assert main([str(tmp_path)]) == 0  # the other is shown
    shown = capsys.readouterr()
    assert (
        "x/seed=1" in shown.out
        and "x/seed=0" not in shown.out
        and one_sentence(shown.err.removeprefix("error: "))
    )
    shutil.rmtree(tmp_path / "x" / "seed=1")
    write_live(tmp_path / "x" / "seed=1").joinpath("config.yaml").write_text("[]")
    assert main([str(tmp_path)]) == 2 and capsys.readouterr().out == ""


def test_units_without_a_column_are_damaged(tmp_path: Path) -> None:
    path = write_live(tmp_path / "seed=0")
    pd.DataFrame({"t": [0]}).to_parquet(path / "units.parquet")
    with pytest.raises(UserError, match=r"units\.parquet has no active"):
        look(path)


def test_blocks_and_clock() -> None:
    frame = pd.DataFrame(
        {"t": [0, 0, 1, 1, 2, 2], "active": [True, True, True, False, False, False]}
    )
    assert course(frame) == "█▄·"
    assert course(pd.DataFrame({"t": 0, "active": [True] + 99 * [False]})) == "▁"
    assert clock(3723.9) == "1:02:03" and clock(None) == "–"
