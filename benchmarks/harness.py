"""Measure things in turn, A B A B, on a CPU or a CUDA device, and write ratios of medians.

Results lie in ``benchmarks/results/<name>.json``, or ``<name>-cuda.json`` of a CUDA device, with
the machine and versions; BENCHMARK_RESULTS names another folder. With BENCHMARK_TOY everything is
small and measured once, to see that it runs: such numbers mean nothing.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mat.suite.allocator import keep_freed_memory
from mat.suite.config import Config, HardwareConfig
from mat.suite.runs import environment

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
TOY = bool(os.environ.get("BENCHMARK_TOY"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOAD_BEFORE = os.getloadavg()
Action = Callable[[], object]


@dataclass
class Row:
    """One comparison: medians of ours and other, their ratio, and what was wanted of it.

    A name begins with the part of the benchmark that it belongs to, and a colon.
    """

    name: str
    ours: float
    other: float
    ratio: float
    wanted: float | None
    unit: str


# --- measuring


def autocast(bfloat16: bool = True) -> torch.autocast:
    """The context that all steps and estimates run in."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16)


def seconds(action: Action) -> float:
    """Wall time of one call, device included, under the allocator that training has."""
    keep_freed_memory()
    _wait()
    start = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - start


def medians(actions: list[Action], repeats: int, warmup: int = 2) -> list[float]:
    """Median seconds of several actions measured in turn, warm-up excluded."""
    repeats, warmup = (1, 0) if TOY else (repeats, warmup)
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(warmup + repeats):
        for action, record in zip(actions, times, strict=True):
            elapsed = seconds(action)
            if repeat >= warmup:
                record.append(elapsed)
    return [float(np.median(record)) for record in times]


def peak_bytes(action: Action) -> int:
    """Largest memory during one call beyond what was held before it.

    The device's; on a CPU the process's, so call it in a process of its own there
    (:func:`in_process`), behind something like it: libraries' scratch space is there then.
    """
    if not TOY:
        gc.collect()
    if DEVICE.type == "cuda":
        _wait()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        action()
        _wait()
        return torch.cuda.max_memory_allocated() - held
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed is no memory held
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = _resident("VmRSS")
    action()
    return _resident("VmHWM") - held


def in_process(benchmark: str, *arguments: object) -> Any:
    """What ``python -m benchmarks.<benchmark>`` prints last, as JSON, in a process of its own.

    Its C library gives back every large block as soon as it is freed, so that the process's peak is
    what was alive.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *map(str, arguments)]
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


# --- results


def row(name: str, ours: float, other: float, wanted: float | None, unit: str = "s") -> Row:
    """A finished comparison; printed as it comes."""
    result = Row(name, ours, other, ours / other, wanted, unit)
    target = "" if wanted is None else f" (wanted at most {wanted:.2f})"
    print(f"{name}: {ours:.4g} / {other:.4g} {unit} = {result.ratio:.3f}{target}", flush=True)
    return result


def path_of(name: str, suffix: str) -> Path:
    """The file of a result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / f"{name}{'-cuda' if DEVICE.type == 'cuda' else ''}.{suffix}"


def write(name: str, rows: list[Row], merge: bool = False, **found: Any) -> None:
    """Write the comparisons, and whatever else was found.

    With ``merge`` an earlier file's rows of other parts stay.
    """
    path, parts = path_of(name, "json"), {r.name.partition(":")[0] for r in rows}
    earlier = json.loads(path.read_text())["rows"] if merge and path.is_file() else []
    hardware = HardwareConfig(device=DEVICE.type, precision="bfloat16")
    about = environment(Config(hardware=hardware))
    del about["exclusive"]  # the load averages tell
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    content = {
        "environment": {**about, "command": command, "cores": os.cpu_count()},
        "load_average": {"before": LOAD_BEFORE, "after": os.getloadavg()},
        "statistic": "medians of interleaved runs, warm-up excluded; ratio = ours / other",
        "rows": [r for r in earlier if r["name"].partition(":")[0] not in parts]
        + [asdict(r) for r in rows],
        **found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_table(name: str, frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """Write a table; rows of an earlier one with other values in column ``part`` stay."""
    path = path_of(name, "csv")
    if path.is_file():
        earlier = pd.read_csv(path)
        frame = pd.concat([earlier[~earlier[part].isin(frame[part])], frame], ignore_index=True)
    frame.to_csv(path, index=False, float_format="%.5g")
    return frame


def save(figure: Figure, name: str) -> None:
    """Write a figure as a bitmap and as vectors."""
    for suffix in ("png", "svg"):
        figure.savefig(path_of(name, suffix), dpi=150)
