"""Fine-tune a pretrained BERT on labelled text, by MAT and by other ways to spend fewer FLOPs.

    python -m examples.finetune_text --model FOLDER --data FOLDER --out FOLDER

Full fine-tuning sets the length: its epochs' FLOPs. All other methods stop at a share of them, with
warm-up and decay of the learning rate fitted to that. Each method's learning rate is the best of a
small grid on validation documents, held out of the training split, with a seed of its own. A run is
a JSON file and not made again; table and plot are made from the files.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.report import dots_plot, mean_in_words, table
from examples.text_data import read
from examples.text_methods import METHODS
from examples.text_runs import Settings, Task, quiet, result_of, run

TUNING_SEED = 0


def threads_of(processes: int) -> int:
    """Threads of each of some processes."""
    return max(1, (os.cpu_count() or 1) // processes)


class Runner:
    """Makes runs, several at once in processes of their own, or one by one in this one.

    Attributes:
        failed: Runs that failed in other processes, and why; one in this process raises.
    """

    def __init__(self, settings: Settings, out: Path, processes: int) -> None:
        self.settings, self.out, self.pool = settings, out, None
        self.failed: list[str] = []
        if processes > 1:
            self.pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"),
                torch.set_num_threads, (threads_of(processes),),
            )  # fmt: skip

    def make(self, tasks: Sequence[Task], folder: str = "runs") -> list[dict[str, Any]]:
        """Results of some runs, but for those that fail; what is missing is made."""
        each = partial(run, settings=self.settings, cache=self.out, folder=self.out / folder)
        missing = [task for task in tasks if not task.path(self.out / folder).is_file()]
        if self.pool is None:
            for task in missing:
                each(task)
        else:
            futures = {self.pool.submit(each, task): task for task in missing}
            for future in as_completed(futures):
                if error := future.exception():
                    name = futures[future].path(self.out / folder).stem
                    self.failed.append(f"{name}: {type(error).__name__}: {error}")
        paths = [task.path(self.out / folder) for task in tasks]
        return [result_of(path, self.settings) for path in paths if path.is_file()]

    def close(self) -> None:
        """End the processes."""
        if self.pool:
            self.pool.shutdown()


def tuned(runner: Runner, methods: Sequence[str]) -> dict[str, float]:
    """The learning rate of every method: highest validation accuracy, then lowest loss."""
    tasks = [Task(m, rate, TUNING_SEED) for m in methods for rate in METHODS[m].rates]
    best: dict[str, dict[str, Any]] = {}
    for result in runner.make(tasks):
        earlier = best.get(result["method"])
        if earlier is None or _rank(result) > _rank(earlier):
            best[result["method"]] = result
    return {method: result["rate"] for method, result in best.items()}


def _rank(result: dict[str, Any]) -> tuple[float, float]:
    loss = result["validation_loss"]
    return result["validation_accuracy"], -loss if math.isfinite(loss) else -math.inf


# --- table and plot


def report(out: Path, methods: Sequence[str]) -> str:
    """A table of all runs with seeds of the table, and a plot of their accuracies.

    Raises:
        SystemExit: If there are no runs of full fine-tuning.
    """
    found = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]
    alone = [json.loads(path.read_text()) for path in sorted((out / "alone").glob("*.json"))]
    runs = {m: [r for r in found if r["method"] == m and r["seed"] != TUNING_SEED] for m in methods}
    runs = {method: results for method, results in runs.items() if results}
    if not runs:
        raise SystemExit(f"{out}: no finished runs: leave --table-only out")
    full = {r["seed"]: r["accuracy"] for r in runs.get("full", [])}
    rows = []
    for method, results in runs.items():
        clocked = [r for r in alone if r["method"] == method] or results
        behind = [100 * (r["accuracy"] - full[r["seed"]]) for r in results if r["seed"] in full]
        memory = [r["peak_memory"] / 2**20 for r in clocked if r["peak_memory"]]
        tried = sorted({r["rate"] for r in found if r["method"] == method})
        rows.append(
            [
                method,
                METHODS[method].about,
                mean_in_words([100 * r["accuracy"] for r in results], 2),
                mean_in_words(behind, 2) if behind else "",
                f"{np.mean([r['flops'] / r['flops_of_full'] for r in results]):.3f}",
                f"{np.mean([r['steps'] for r in results]):.0f}",
                f"{np.mean([r['active'] for r in results]):.2f}",
                mean_in_words([r["seconds"] for r in clocked], 1),
                f"{np.mean(memory):.0f}" if memory else "",
                f"{results[0]['rate']:g} of {', '.join(f'{rate:g}' for rate in tried)}",
                str(len(results)),
            ]
        )
    header = [
        "method", "what trains", "test accuracy, %", "less full", "FLOPs", "steps", "active",
        "seconds", "peak MiB", "learning rate", "seeds",
    ]  # fmt: skip
    words = table(header, rows)
    (out / "table.md").write_text(words + "\n")
    values = {}
    for method, results in runs.items():
        share = np.mean([r["flops"] / r["flops_of_full"] for r in results])
        values[f"{method} ({share:.2f})"] = [100 * r["accuracy"] for r in results]
    label = "test accuracy, % (mean, 95 % interval; share of FLOPs in brackets)"
    dots_plot(out / "accuracy.png", values, label)
    return words


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=float, default=2.0, help="of full fine-tuning")
    parser.add_argument("--flops", type=float, default=0.65, help="share that the others spend")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--rate", type=float, help="one learning rate for all, instead of tuning")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--precision", default="bfloat16" if cuda else "float32",
        choices=["float32", "tf32", "bfloat16"],
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--alone", action="store_true",
        help="then one run of each method by itself, which seconds and memory are taken from",
    )  # fmt: skip
    parser.add_argument("--table-only", action="store_true", help="make no runs")
    given = parser.parse_args(argv)
    if TUNING_SEED in given.seeds:
        parser.error(f"--seeds {TUNING_SEED}: that seed is for tuning: choose others")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, print the table, draw the plot."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would use all there are
    given = arguments_of(argv)
    if not given.table_only:
        shared = {name: getattr(given, name) for name in Settings.__dataclass_fields__}
        settings = Settings(**shared)
        quiet()
        read(Path(settings.data), settings.model, settings.length, given.out)
        runner = Runner(settings, given.out, given.processes)
        rates = (
            dict.fromkeys(given.methods, given.rate) if given.rate else tuned(runner, given.methods)
        )
        runner.make([Task(m, rates[m], seed) for seed in given.seeds for m in rates])
        runner.close()
        if given.alone and rates:
            alone(settings, given.out, [Task(m, rates[m], given.seeds[0]) for m in rates])
        if runner.failed:
            print("failed:", *runner.failed, sep="\n")
    print(report(given.out, given.methods))


def alone(settings: Settings, out: Path, tasks: Sequence[Task]) -> None:
    """Runs by themselves; a first one loads the kernels and is thrown away."""
    runner = Runner(settings, out, 1)
    warm_up = tasks[0].path(out / "alone")
    if not warm_up.is_file():
        runner.make(tasks[:1], "alone")
        warm_up.unlink()
    runner.make(tasks, "alone")


if __name__ == "__main__":
    main()
