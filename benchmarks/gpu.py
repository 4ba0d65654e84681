"""What needs a CUDA device, as far as the time goes; call it until it says that all is done.

    python -m benchmarks.gpu --minutes 9 --data DATA --out OUT
    python -m benchmarks.gpu --dry                 # every step at toy size, on a CPU
    python -m benchmarks.gpu pack DATA PARTS       # each folder of DATA in parts of 24 MiB
    python -m benchmarks.gpu unpack PARTS DATA     # and back; also what OUT holds, into "."

Steps run one after the other, each in a process of its own: tests, benchmarks, training runs, the
fine-tuning example. Near the end of the time the present one is asked to stop: a training run
writes a checkpoint and goes on in the next call, everything else begins again. Tests and benchmarks
are made again when the code has changed, runs never. No network is needed. DATA has ``wikitext-2``,
``cifar10``, ``reuters-r8`` and ``20newsgroups`` (Parquet files) and ``minilm`` (a BERT's folder); a
step without its data is left out.

Everything is written below ``runs/gpu``, which is to stay between calls. What must be kept, all but
checkpoints, is packed into OUT, in at most 8 files of 16 MiB.
"""

import argparse
import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import parcels
from benchmarks.gpu_steps import ROOT, Step, steps

WORK = ROOT / "runs" / "gpu"
KEPT = ROOT / "results" / "gpu"  # where the record of an earlier machine lies
MIB = 2**20
# A part of the data travels beside the repository itself, which is some 30 MiB.
DATA_PART, OUT_PART, OUT_FILES = 24 * MIB, 16 * MIB, 8
STOP, KILL = 45.0, 12.0  # seconds before the end: ask a step to stop; end it, and pack
CODE = ("mat/**/*.py", "benchmarks/*.py", "tests/test_gpu*.py", "conf/**/*.yaml")


class Record:
    """What was done with which code; ``steps.json``.

    Args:
        folders: Where earlier ones lie; the last is this one's.
    """

    def __init__(self, *folders: Path) -> None:
        self.path = folders[-1] / "steps.json"
        self.done: dict[str, dict[str, Any]] = {}
        for path in (folder / self.path.name for folder in folders):
            if path.is_file():
                self.done |= json.loads(path.read_text())

    def has(self, step: Step, code: str) -> bool:
        """Whether a step is done, or fails with this code."""
        known = self.done.get(step.name)
        if step.runs:
            places = WORK / "runs", ROOT / "results" / "runs"
            complete = all(
                any((place / run / "summary.json").is_file() for place in places)
                for run in step.runs
            )
            failed = known is not None and known["verdict"] != "passed" and known["code"] == code
            return complete or failed
        return known is not None and known["code"] == code

    def add(self, step: Step, code: str, status: int, seconds: float, said: str) -> None:
        """Note how a step ended."""
        verdict = "passed" if status == 0 else f"FAILED ({status})"
        date = time.strftime("%Y-%m-%d %H:%M")
        about = {"verdict": verdict, "seconds": round(seconds), "date": date, "code": code}
        self.done[step.name] = {**about, "said": said.splitlines()[-60:]}
        self.write()

    def write(self) -> Path:
        """Write it, and what was done in words; the path of these."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.done, indent=1) + "\n")
        parts = ["# What `make gpu` found\n"]
        for name, about in self.done.items():
            said = "\n".join(about["said"])
            heading = f"## {name}: {about['verdict']}, {about['seconds']} s, {about['date']}"
            parts.append(f"{heading}\n\n```\n{said}\n```\n")
        report = self.path.with_name("report.md")
        report.write_text("\n".join(parts))
        return report


def code_digest() -> str:
    """What tests and benchmarks depend on."""
    paths = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    content = b"".join(str(p.relative_to(ROOT)).encode() + p.read_bytes() for p in paths)
    return hashlib.sha256(content).hexdigest()[:16]


def in_time(command: Sequence[str], log: Path, end: float) -> int | None:
    """Run Python until a time on the monotonic clock; its exit status, None if it was stopped."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stopped = False
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            for moment, number in ((end - STOP, signal.SIGTERM), (end - KILL, signal.SIGKILL)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, moment - time.monotonic()))
                    break
                stopped = True
                process.send_signal(number)
            status = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
    return None if stopped else status


def here(command: Sequence[str], log: Path) -> int:
    """The same in this process, which has imported everything already."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = sys.argv, os.getcwd()
    try:
        os.chdir(ROOT)
        with (
            open(log, "w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            if command[0] == "-m":
                sys.argv = list(command[1:])
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = list(command)
                runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        return 1
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return 0


def kept_files(record: Record) -> dict[str, Path]:
    """What must be kept, by its place in the repository; of runs those that are complete."""
    files = {f"results/gpu/{path.name}": path for path in (record.write(), record.path)}

    def add(place: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            left_out = path.suffix == ".pt" or {"checkpoint", "cache"} & set(parts)
            if path.is_file() and not left_out:
                files["/".join((place, *parts))] = path

    add("results/gpu/finetune", WORK / "finetune")
    add("benchmarks/results", WORK / "benchmarks")
    for summary in (WORK / "runs").rglob("summary.json"):
        run = summary.parent.relative_to(WORK / "runs")
        add(f"results/runs/{run.as_posix()}", summary.parent)
    return files


def without_checkpoints() -> None:
    """Complete runs need none, and a machine's disk is soon full of them."""
    for summary in (WORK / "runs").rglob("summary.json"):
        shutil.rmtree(summary.parent / "checkpoint", ignore_errors=True)


def seed_results() -> None:
    """Begin with the committed results: a benchmark may measure a part of its cases only."""
    folder = WORK / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "benchmarks" / "results").glob("*-cuda.*"):
        if not (folder / path.name).is_file():
            shutil.copy(path, folder)


def todo(record: Record, code: str, data: Path | None, only: Sequence[str]) -> Iterator[Step]:
    """Steps that are not done and have their data."""
    for step in steps():
        if only and not any(step.name.startswith(name) for name in only):
            continue
        if record.has(step, code) and not only:
            continue
        missing = [name for name in step.needs if data is None or not (data / name).is_dir()]
        if missing:
            print(f"== {step.name}: left out, --data has no {', '.join(missing)}", flush=True)
            continue
        yield step


def make(minutes: float, data: Path | None, out: Path, only: Sequence[str] = ()) -> int:
    """Do what fits into the time; the number of steps that failed."""
    end = time.monotonic() + 60 * minutes
    os.environ |= {"BENCHMARK_RESULTS": str(WORK / "benchmarks"), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    if data is not None:
        os.environ["MAT_DATA"] = str(data)
    seed_results()
    record, code, failed, waiting = Record(KEPT, WORK), code_digest(), 0, 0
    for number, step in enumerate(todo(record, code, data, only)):
        start = time.monotonic()
        if end - STOP - start < step.least:
            waiting += 1
            continue
        print(f"== {step.name}", flush=True)
        log = WORK / "logs" / f"{number}.log"
        status = in_time(step.arguments(False, data, WORK), log, end)
        said = log.read_text(errors="replace")
        print("\n".join(said.splitlines()[-12:]), flush=True)
        without_checkpoints()
        if status is None:
            print("stopped by the clock: it goes on in the next call", flush=True)
            waiting += 1
            continue
        record.add(step, code, status, time.monotonic() - start, said)
        failed += status != 0
    print("all is done" if not waiting else f"{waiting} steps wait for the next call", flush=True)
    keep(record, out)
    return failed


def keep(record: Record, out: Path) -> None:
    """Pack what must be kept."""
    parts = parcels.pack(kept_files(record), out, "gpu", OUT_PART)
    if len(parts) > OUT_FILES:
        raise SystemExit(f"{len(parts)} files of 16 MiB in {out}: more than {OUT_FILES}")
    print(f"{len(parts)} files in {out}: python -m benchmarks.gpu unpack {out} .", flush=True)


def dry(out: Path) -> int:
    """Every step at toy size in this process; the number of those that failed."""
    global WORK
    WORK = out / "work"
    os.environ |= {"BENCHMARK_RESULTS": str(WORK / "benchmarks"), "BENCHMARK_TOY": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    warnings.filterwarnings("ignore")
    record, code, failed, complete = Record(WORK), code_digest(), 0, 0
    for number, step in enumerate(steps()):
        start = time.monotonic()
        log = WORK / "logs" / f"{number}.log"
        status = here(step.arguments(True, None, WORK), log)
        before, complete = complete, len(list((WORK / "runs").rglob("summary.json")))
        if step.runs and status == 0 and complete == before:
            status = 1  # nothing was trained
        spent = time.monotonic() - start
        record.add(step, code, status, spent, log.read_text())
        print(f"{step.name}: {record.done[step.name]['verdict']}, {spent:.1f} s", flush=True)
        if status:
            print(log.read_text(), flush=True)
        failed += status != 0
    without_checkpoints()
    keep(record, out)
    return failed


def pack_data(data: Path, parts: Path) -> None:
    """Each folder of the data as an archive of its own, so that the first can be used at once."""
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        files = {str(p.relative_to(data)): p for p in folder.rglob("*") if p.is_file()}
        for path in parcels.pack(files, parts, folder.name, DATA_PART):
            print(f"{path} {path.stat().st_size / MIB:.1f} MiB")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["pack"] and len(given) == 3:
        pack_data(Path(given[1]), Path(given[2]))
        return 0
    if given[:1] == ["unpack"] and len(given) == 3:
        complete, missing = parcels.unpack(Path(given[1]), Path(given[2]))
        print(f"unpacked: {', '.join(complete) or 'nothing'}")
        print("\n".join(f"missing: {name}" for name in missing))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--data", type=Path, default=os.environ.get("MAT_DATA") or None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="steps that begin so, done or not")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(given)
    if options.dry:
        return dry((options.out or ROOT / "runs" / "gpu-dry").resolve())
    import torch

    if not torch.cuda.is_available():
        print("error: there is no CUDA device: python -m benchmarks.gpu --dry", file=sys.stderr)
        return 2
    data = Path(options.data).resolve() if options.data else None
    return make(options.minutes, data, (options.out or KEPT).resolve(), options.only)


if __name__ == "__main__":
    sys.exit(main())
