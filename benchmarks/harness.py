"""Measure things in turn, A B A B, on the CPU or a CUDA device, and write ratios of medians with machine and versions.

Results lie in ``benchmarks/results/<name>.json``, or ``<name>-cuda.json`` where there is a CUDA device to measure on.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mat.suite.allocator import keep_freed_memory
from mat.suite.config import Config, HardwareConfig, TrainConfig
from mat.suite.interface import Batch, UnitModel
from mat.suite.optim import build_optimiser
from mat.suite.runs import environment
from mat.suite.stepper import Stepper
from mat.suite.units import BackwardMode, unit_layers

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES: tuple[BackwardMode, ...] = ("cut", "exact")
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


# --- steps


def autocast(bfloat16: bool = True) -> torch.autocast:
    """The context that all steps and estimates run in."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16)


def set_share(model: nn.Module, share: float, mode: BackwardMode) -> None:
    """``share`` of every layer's units active, spread evenly over it."""
    for layer in unit_layers(model):
        wanted = round(share * layer.n_units)
        active = np.zeros(layer.n_units, bool)
        active[np.arange(wanted) * layer.n_units // max(1, wanted)] = True
        layer.set_active(active, mode)


def nothing() -> None:
    """What happens before and after the backward of most steps."""


class Subject:
    """A model in training; its steps share the optimiser and the gates.

    Args:
        model: The model, on ``DEVICE``.
        batch: The batch of every step, there too.
        recipe: Optimiser, learning rate and clipping.
        bfloat16: Autocast; else the model's own precision.
        forward: Runs in place of the model in :meth:`launched` steps, such as its compiled form.
    """

    def __init__(
        self, model: UnitModel, batch: Batch, recipe: TrainConfig, bfloat16: bool = True,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.recipe, self.bfloat16 = model, batch, recipe, bfloat16
        self.forward = forward or model
        self.optimiser = build_optimiser(model, recipe)

    def backward(self) -> None:
        """Forward and backward, gates as they stand."""
        self.model.train()
        self.optimiser.clear()
        with autocast(self.bfloat16):
            loss = self.model.loss_of_outputs(self.forward(self.batch), self.batch)
            extra = self.model.auxiliary_loss()
        torch.autograd.backward(loss if extra is None else loss + extra)

    def step(self, share: float = 1.0, mode: BackwardMode = "cut") -> Action:
        """A training step as in a run, a share of the units active; on CUDA a graph of its own, from the third call."""
        context, graphs = partial(autocast, self.bfloat16), DEVICE.type == "cuda"
        stepper = Stepper(self.model, self.optimiser, context, self.recipe.clip, graphs=graphs)

        def run() -> None:
            set_share(self.model, share, mode)
            stepper.step(self.batch, self.recipe.lr)

        return run

    def launched(self, share: float = 1.0, before: Action = nothing, after: Action = nothing) -> Action:
        """The same in ``cut``, every kernel launched by itself; ``before`` and ``after`` lie around its backward."""

        def run() -> None:
            set_share(self.model, share, "cut")
            before()
            self.backward()
            after()
            self.optimiser.clip(self.recipe.clip)
            self.optimiser.step(self.recipe.lr)

        return run


def stock_step(model: nn.Module, loss: Callable[[], Tensor], recipe: TrainConfig) -> Action:
    """The same step as a plain loop over stock layers, with torch's own optimiser."""
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "sgd":
        momentum, decay = recipe.momentum, recipe.weight_decay
        optimiser = torch.optim.SGD(model.parameters(), recipe.lr, momentum, weight_decay=decay)
    else:
        betas = recipe.betas[0], recipe.betas[1]
        optimiser = torch.optim.AdamW(
            model.parameters(), recipe.lr, betas, recipe.eps, recipe.weight_decay, fused=True
        )  # fmt: skip

    def run() -> None:
        model.train()
        optimiser.zero_grad()
        with autocast():
            value = loss()
        value.backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()

    return run


# --- measuring


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
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(warmup + repeats):
        for action, record in zip(actions, times, strict=True):
            elapsed = seconds(action)
            if repeat >= warmup:
                record.append(elapsed)
    return [float(np.median(record)) for record in times]


def peak_bytes(action: Action) -> int:
    """Largest memory during one call beyond what was held before it: the device's, or the process's on a CPU.

    On a CPU for :func:`in_process`. Call something like it before, so that libraries and their scratch space are there.
    """
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

    Its C library gives back every large block as soon as it is freed, so that the process's peak is what was alive.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *map(str, arguments)]
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


# --- results


def row(name: str, ours: float, other: float, wanted: float | None, unit: str = "s") -> Row:
    """A finished comparison; printed as it comes."""
    result = Row(name, ours, other, ours / other, wanted, unit)
    target = "" if wanted is None else f" (wanted at most {wanted:.2f})"
    print(f"{name}: {ours:.4g} / {other:.4g} {unit} = {result.ratio:.3f}{target}", flush=True)
    return result


def path_of(name: str, suffix: str) -> Path:
    """The file of a result."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}{'-cuda' if DEVICE.type == 'cuda' else ''}.{suffix}"


def write(name: str, rows: list[Row], merge: bool = False, **found: Any) -> None:
    """Write the comparisons, and whatever else was found; with ``merge`` an earlier file's rows of other parts stay."""
    path, parts = path_of(name, "json"), {r.name.partition(":")[0] for r in rows}
    earlier = json.loads(path.read_text())["rows"] if merge and path.is_file() else []
    about = environment(Config(hardware=HardwareConfig(device=DEVICE.type, precision="bfloat16")))
    del about["exclusive"]  # the load averages tell
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    content = {
        "environment": {**about, "command": command, "cores": os.cpu_count()},
        "load_average": {"before": LOAD_BEFORE, "after": os.getloadavg()},
        "statistic": "medians of interleaved runs, warm-up excluded; ratio = ours / other",
        "rows": [r for r in earlier if r["name"].partition(":")[0] not in parts] + [asdict(r) for r in rows],
        **found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_table(name: str, frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """Write a table; of an earlier one the rows with other values in column ``part`` stay, and are returned, too."""
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
