"""``benchmarks.gpu``: every step at toy size, the clock, what is kept, and files in parts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, parcels
from benchmarks.gpu import Record, Step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and nothing kept before."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    for name in ("BENCHMARK_RESULTS", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED", "MPLBACKEND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return tmp_path / "work"


def step(name: str, code: str, least: float = 0.0, **options: object) -> Step:
    """A step that runs some Python."""
    return Step(name, ("-c", code), ("-c", code), least, **options)  # type: ignore[arg-type]


def make(
    monkeypatch: pytest.MonkeyPatch, out: Path, steps: list[Step], seconds: float
) -> int:  # fmt: skip
    """A call with some steps, of so many seconds."""
    monkeypatch.setattr(gpu, "steps", lambda: steps)
    monkeypatch.setattr(gpu, "STOP", 1.0)
    monkeypatch.setattr(gpu, "KILL", 0.2)
    return gpu.make(seconds / 60, None, out)


def test_done_steps_are_not_made_again_until_code_changes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    steps = [
        step("good", f"open({str(count)!r}, 'a').write('g')"),
        step("bad", f"open({str(count)!r}, 'a').write('b'); raise SystemExit(3)"),
    ]
    assert make(monkeypatch, tmp_path / "out", steps, 60) == 1
    assert make(monkeypatch, tmp_path / "out", steps, 60) == 0
    assert count.read_text() == "gb"
    record = json.loads((work / "steps.json").read_text())
    assert [about["verdict"] for about in record.values()] == ["passed", "FAILED (3)"]
    monkeypatch.setattr(gpu, "code_digest", lambda: "other")
    make(monkeypatch, tmp_path / "out", steps, 60)
    assert count.read_text() == "gbgb"


def test_the_clock_stops_a_step_and_the_next_call_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = work / "runs" / "long"
    code = f"""
import signal, sys, time, pathlib
run = pathlib.Path({str(run)!r})
run.mkdir(parents=True, exist_ok=True)
def stop(*_):
    (run / "latest").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
if not (run / "latest").exists():
    time.sleep(60)
(run / "summary.json").touch()
"""
    steps = [step("run", code, runs=("long",)), step("late", "", least=30)]
    start = time.monotonic()
    make(monkeypatch, tmp_path / "out", steps, 4)
    assert time.monotonic() - start < 20 and (run / "latest").exists()
    assert not (run / "summary.json").exists() and not Record(work).done
    make(monkeypatch, tmp_path / "out", steps, 20)
    assert list(json.loads((work / "steps.json").read_text())) == ["run"]
    assert Record(work).has(steps[0], "any code")


def test_a_step_that_does_not_stop_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STOP", 1.0)
    monkeypatch.setattr(gpu, "KILL", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert gpu.in_time(("-c", code), tmp_path / "log", start + 3) is None
    assert time.monotonic() - start < 20


def test_what_is_kept_lands_in_its_place(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = work / "runs" / "table1" / "method=mat"
    for path in ("1/summary.json", "1/metrics.jsonl", "1/checkpoint/a.pt", "2/metrics.jsonl"):
        (runs / f"seed={path}").parent.mkdir(parents=True, exist_ok=True)
        (runs / f"seed={path}").write_text(path)
    make(monkeypatch, tmp_path / "out", [step("any", "")], 60)
    assert not (runs / "seed=1" / "checkpoint").exists()
    complete, missing = parcels.unpack(tmp_path / "out", tmp_path / "there")
    assert complete == ["gpu"] and not missing
    there = tmp_path / "there" / "results"
    runs = there / "runs" / "table1" / "method=mat"
    assert (runs / "seed=1" / "metrics.jsonl").read_text() == "1/metrics.jsonl"
    assert not (runs / "seed=2").exists(), "it is not complete"
    assert (there / "gpu" / "report.md").is_file()


def test_parts_give_back_what_was_packed_and_miss_nothing(tmp_path: Path) -> None:
    files = {f"data/{i}": tmp_path / str(i) for i in range(3)}
    for i, path in enumerate(files.values()):
        path.write_bytes(os.urandom(4000 + i))
    parts = parcels.pack(files, tmp_path / "parts", "data", 5000)
    assert len(parts) == 3 and all(part.stat().st_size <= 5000 for part in parts)
    held = parts[1].read_bytes()
    parts[1].unlink()
    assert parcels.unpack(tmp_path / "parts", tmp_path / "there") == ([], [parts[1].name])
    parts[1].write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        parcels.unpack(tmp_path / "parts", tmp_path / "there")
    parts[1].write_bytes(held)
    assert parcels.unpack(tmp_path / "parts", tmp_path / "there") == (["data"], [])
    for place, path in files.items():
        assert (tmp_path / "there" / place).read_bytes() == path.read_bytes()
    assert parcels.pack(files, tmp_path / "parts", "data", 10**6) == list(
        (tmp_path / "parts").iterdir()
    )


def test_every_step_runs_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": passed") == len(gpu.steps())
