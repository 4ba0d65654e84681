"""The command line: help, errors, sweeps, and a run that is stopped and started again."""

import json
import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from short_runs import events, one_sentence, small_overrides, unseal

from mat.suite.compose import CONF
from mat.suite.config import GROUPS

LAUNCH = CONF.parent / "launch.py"
Outcome = tuple[int, str, str]  # exit code, output, errors


@dataclass
class Sweep:
    """A stopped and resumed sweep.

    Attributes:
        folder: Where it ran.
        command: Its arguments.
        stopped: How it ended when it was asked to stop.
        files_then: Files below the folder at that time.
        again: How the same command ended.
    """

    folder: Path
    command: list[str]
    stopped: Outcome
    files_then: set[str]
    again: Outcome


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run launch.py in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards
    monkeypatch.delenv("MAT_DATA", raising=False)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(LAUNCH), run_name="__main__")
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def spawn(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start launch.py as a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "MAT_DATA"} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(process: "subprocess.Popen[str]") -> Outcome:
    out, err = process.communicate()
    return process.returncode, out, err


def test_help_answers_at_once_and_names_every_group(tmp_path):
    seconds = []
    while len(seconds) < 2 and not (seconds and seconds[0] < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code, out, err = outcome(spawn(tmp_path, "--help"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (code, err) == (0, "")
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 3  # of the processor's time: a busy machine takes longer
    assert all(f"\n{group}\n" in out for group in (*GROUPS, "experiment"))
    for part in ("schema_", "$$", "???"):
        assert part not in out
    for part in ("bert_mini", "multirate", "lr: ", "-m +experiment=table1_mini", "MAT_DATA"):
        assert part in out, part
    assert not list(tmp_path.iterdir())


def test_help_needs_neither_torch_nor_numpy():
    code = (
        "import sys, mat.suite.compose, mat.suite.science\n"
        "sys.exit(bool({'torch', 'numpy', 'pandas'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=LAUNCH.parent, check=False).returncode == 0
    )


def test_mistyped_key_ends_the_process_with_one_sentence(tmp_path):
    code, out, err = outcome(spawn(tmp_path, "model.widht=64"))
    assert (code, out, err) == (
        2,
        "",
        "error: model.widht is not a key: did you mean model.width?\n",
    )


MISTAKES = [  # arguments, what the sentence names
    (["model=brt"], "model=brt"),
    (["+experiment=table9_mini"], "experiment=table9_mini"),
    (["train.lr=fast"], "train.lr=fast"),
    (["model.heads=3"], "model.heads=3"),
    (["seed=0,1"], "seed=0,1"),
    (["+modle.width=3"], "modle"),
    (["dataset=wikitext2", "dataset.root=/no/such/folder"], "dataset.root=/no/such/folder"),
    (["-m", "model.widht=1,2"], "model.widht"),
    (["-m", "method=mat,amt"], "method=amt"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES)
def test_mistakes_end_with_one_sentence(arguments, named, launch, tmp_path):
    code, out, err = launch(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and named in err, err
    assert one_sentence(err.removeprefix("error: ")), err
    assert not list(tmp_path.rglob("seed=*"))


def test_missing_data_are_named_before_anything_is_trained(launch, tmp_path):
    (tmp_path / "data").mkdir()
    code, _, err = launch("dataset=wikitext2", f"dataset.root={tmp_path / 'data'}", "seed=4")
    assert code == 2 and str(tmp_path / "data" / "wikitext-2") in err
    assert one_sentence(err.removeprefix("error: ")) and not (tmp_path / "runs").exists()


def test_bugs_keep_their_traceback(launch, monkeypatch):
    def bug(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("mat.suite.engine.run", bug)
    with pytest.raises(ZeroDivisionError):
        launch()


@pytest.fixture(scope="module")
def sweep(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep over two seeds that is asked to stop during its first run, then started again."""
    folder = tmp_path_factory.mktemp("sweep")
    command = ["-m", "seed=0,1", *small_overrides(cache, "name=pair", "method=baseline", steps=120)]
    process = spawn(folder, *command)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any('"train"' in path.read_text() for path in folder.rglob("metrics.jsonl")):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    stopped = outcome(process)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return Sweep(folder, command, stopped, files, outcome(spawn(folder, *command)))


def test_sigterm_stops_a_run_with_a_checkpoint(sweep):
    code, out, err = sweep.stopped
    assert (code, out) == (130, ""), err
    names = {Path(name).name for name in sweep.files_then}
    assert "latest.pt" in names and not {"summary.json", "failure.json"} & names
    assert not any("seed=1" in name for name in sweep.files_then)
    first, *table, command = err.splitlines()
    assert first.startswith("interrupted: runs/pair/") and "same command is run again" in first
    assert [line.partition(": ")[0].split() for line in table] == [
        ["interrupted", "seed=0"],
        ["not", "begun", "seed=1"],
    ]
    assert command.startswith("To go on: python launch.py -m seed=0,1 ")


def test_same_command_goes_on_and_finishes_the_sweep(sweep):
    code, out, err = sweep.again
    assert (code, err) == (0, "")
    folders = sorted(path.parent for path in sweep.folder.rglob("summary.json"))
    assert [path.name for path in folders] == ["seed=0", "seed=1"]  # side by side
    assert (
        folders[0].parent == folders[1].parent
        and folders[0].parent.parent == sweep.folder / "runs" / "pair"
    )
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(f.relative_to(sweep.folder)) for f in folders
    ]
    assert all("nats" in line and "PFLOPs" in line for line in out.splitlines())
    assert len(json.loads((folders[0] / "environment.json").read_text())["resumed"]) == 1
    assert events(folders[0], "test")[0]["loss"] != events(folders[1], "test")[0]["loss"]


def test_complete_runs_are_skipped_whatever_does_not_name_them(sweep, launch, monkeypatch):
    monkeypatch.chdir(sweep.folder)
    times = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*.json*")}
    unnamed = [
        "tracking.project=other",
        "hardware.exclusive=false",
        "dataset.root=/",
        "train.checkpoint_steps=9",
    ]
    code, out, err = launch(*sweep.command, *unnamed)
    assert (code, err) == (0, "") and out == sweep.again[1]
    assert {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*.json*")} == times


def test_other_science_gets_another_folder(sweep, launch, monkeypatch):
    monkeypatch.chdir(sweep.folder)
    before = set(sweep.folder.rglob("summary.json"))
    assert launch(*sweep.command[2:], "seed=0", "train.pflops=2e-8")[0] == 0
    (new,) = set(sweep.folder.rglob("summary.json")) - before
    assert new.parent.parent.parent == sweep.folder / "runs" / "pair"


def test_failed_run_does_not_end_the_sweep(cache, launch, tmp_path):
    command = small_overrides(cache, "method=baseline", steps=6)
    code, out, err = launch("-m", *command, "train.lr=1e5,1e-2")
    sentence, *table, _ = err.splitlines()
    assert (
        code == 1
        and sentence.startswith("failed: ")
        and one_sentence(sentence.removeprefix("failed: "))
    ), err
    assert table[0] == f"failed      train.lr=100000.0: {sentence.removeprefix('failed: ')}"
    assert table[1].startswith("complete    train.lr=0.01: runs/smoke/")
    assert len(out.splitlines()) == 1
    failed, done = (next(tmp_path.rglob(name)).parent for name in ("failure.json", "summary.json"))
    assert failed != done and failed.parent.parent == done.parent.parent


def test_sweep_with_a_senseless_run_is_refused_before_its_first_run(cache, launch, tmp_path):
    command = small_overrides(cache, "method=baseline", steps=6)
    code, out, err = launch("-m", *command, "model.heads=2,3,5")
    sentences = err.splitlines()
    assert code == 2 and [s.partition(" does")[0] for s in sentences] == [
        "error: model.heads=3",
        "error: model.heads=5",
    ]
    assert all(one_sentence(sentence.removeprefix("error: ")) for sentence in sentences)
    assert out == "" and not list(tmp_path.rglob("config.yaml"))
    # Said once
    assert len(launch("-m", *command, "model.heads=3", "seed=1,2,3")[2].splitlines()) == 1


@pytest.mark.parametrize("sweep", ["--multirun", "--multi", "-m", "hydra.mode=MULTIRUN"])
def test_a_sweep_is_what_hydra_takes_for_one(sweep, cache, launch, tmp_path):
    code, out, err = launch(
        sweep, *small_overrides(cache, "method=baseline", steps=6), "model.heads=2,3"
    )
    assert (
        (code, out) == (2, "") and err.startswith("error: model.heads=3") and err.count("\n") == 1
    )
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_launcher_that_is_missing_is_told_before_anything_is_trained(cache, launch, tmp_path):
    code, _, err = launch("-m", *small_overrides(cache, steps=6), "hydra/launcher=joblib")
    assert (
        code == 2
        and one_sentence(err.removeprefix("error: "))
        and not (tmp_path / "runs" / "smoke").exists()
    )


def test_the_same_value_written_otherwise_is_the_same_run(cache, launch, tmp_path):
    command = small_overrides(cache, "method=baseline", steps=6)
    first = launch(*command, "train.lr=2e-3")
    assert (
        first[0] == 0
        and launch(*command, "train.lr=0.002") == launch("-m", *command, "train.lr=0.0020") == first
    )
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def test_a_path_pasted_from_the_output_works(cache, launch, tmp_path):
    command = small_overrides(cache, steps=8)
    folder = launch(*command, "method=mat")[1].partition(": ")[0]
    assert "=" in folder
    code, _, err = launch(*command, "method=rand_matched", f"method.matched={folder}")
    assert (code, err) == (0, "") and len(list(tmp_path.rglob("summary.json"))) == 2


def test_a_place_that_cannot_be_written_is_one_sentence(cache, launch, tmp_path):
    (tmp_path / "file").write_text("")
    command = small_overrides(cache, "method=baseline", steps=6)
    for place in ("runs=file", f"runs={'x' * 300}", "dataset.cache=file"):
        code, out, err = launch(*command, place)
        assert (code, out) == (2, "") and one_sentence(err.removeprefix("error: ")), err
        assert "file" in err or "xxx" in err


def test_ctrl_c_while_it_starts_leaves_no_traceback(cache, launch, monkeypatch):
    def pressed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mat.suite.engine.datasets.load", pressed)
    code, out, err = launch(*small_overrides(cache, steps=6))
    assert (code, out) == (130, "") and err.count("\n") == 1 and err.startswith("interrupted: ")


@pytest.mark.parametrize("how", ["closed", "reader gone"])
def test_a_run_outlives_its_standard_error(how, cache, tmp_path):
    command = [*small_overrides(cache, "method=baseline", steps=6), "tracking.progress=true"]
    redirect = "2>&-" if how == "closed" else "2> >(true)"
    line = shlex.join([sys.executable, str(LAUNCH), *command])
    done = subprocess.run(
        ["bash", "-c", f"{line} {redirect}"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0 and b"nats" in done.stdout
    assert all(
        json.loads(event)
        for event in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()
    )


def test_a_failed_run_is_tried_again_aloud(cache, launch, tmp_path):
    command = small_overrides(cache, "method=baseline", "train.lr=1e30", steps=6)
    assert launch(*command)[0] == 1
    code, _, err = launch(*command)
    assert code == 1 and err.splitlines()[0].endswith("failed before: it is tried again.")


def test_run_that_its_folder_refuses_does_not_end_the_sweep(cache, launch, tmp_path):
    command = small_overrides(cache, "method=baseline", steps=6)
    assert launch("-m", *command, "train.lr=1e-2")[0] == 0
    (config,) = tmp_path.rglob("config.yaml")
    unseal(config.parent)
    config.write_text(config.read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
    code, out, err = launch("-m", *command, "train.lr=1e-2,2e-2")
    sentence, *_ = err.splitlines()
    assert (
        code == 2
        and one_sentence(sentence.removeprefix("error: "))
        and "train.weight_decay" in sentence
    ), err
    assert len(out.splitlines()) == 1 and len(list(tmp_path.rglob("summary.json"))) == 2
