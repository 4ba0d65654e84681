"""Measure two things in turn, A B A B, and write the ratio of medians with the machine and the versions."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mat.allocator import keep_freed_memory
from mat.units import BackwardMode, unit_layers

RESULTS = Path(__file__).parent / "results"
keep_freed_memory()  # as training does; all that is compared runs under the same allocator


@dataclass
class Row:
    """One comparison: medians of ours and other, their ratio, and what was wanted of it."""

    name: str
    ours: float
    other: float
    ratio: float
    wanted: float | None
    unit: str


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, device included."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(actions: list[Callable[[], object]], repeats: int, warmup: int = 2) -> list[float]:
    """Median seconds of several actions measured in turn, warm-up excluded."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(warmup + repeats):
        for action, record in zip(actions, times, strict=True):
            elapsed = seconds(action)
            if repeat >= warmup:
                record.append(elapsed)
    return [float(np.median(record)) for record in times]


def set_share(model: nn.Module, share: float, mode: BackwardMode) -> None:
    """``share`` of every layer's units active, spread evenly over it."""
    for layer in unit_layers(model):
        wanted = round(share * layer.n_units)
        active = np.zeros(layer.n_units, bool)
        active[np.arange(wanted) * layer.n_units // max(1, wanted)] = True
        layer.set_active(active, mode)


def row(name: str, ours: float, other: float, wanted: float | None, unit: str = "s") -> Row:
    """A finished comparison; printed as it comes."""
    result = Row(name, ours, other, ours / other, wanted, unit)
    target = "" if wanted is None else f" (wanted at most {wanted:.2f})"
    print(f"{name}: {ours:.4g} / {other:.4g} {unit} = {result.ratio:.3f}{target}", flush=True)
    return result


def write(name: str, rows: list[Row], **found: Any) -> None:
    """Write ``benchmarks/results/<name>.json``: the comparisons, and whatever else was found."""
    cpu = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": {
            "processor": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "statistic": "medians of interleaved runs, warm-up excluded; ratio = ours / other",
        "rows": [asdict(r) for r in rows],
        **found,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
