"""The steps of ``benchmarks.gpu``, in order: what a CUDA device is wanted for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA_TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_gpu*.py"))
# A run that a CPU makes in seconds, of the same experiment.
TOY_RUN = (
    "selection.samples=4", "selection.interval=0.05", "hardware=cpu", "hardware.precision=float32",
    "train.eval_samples=16", "train.eval_batch=256",
)  # fmt: skip
TOY_TEXT = (
    "model.layers=1", "model.width=16", "model.heads=2", "model.ffn_hidden=32",
    "model.ffn_groups=4", "dataset=pydocs", "dataset.vocabulary=256", "dataset.length=16",
    "train.batch=8", "train.pflops=2e-8", *TOY_RUN,
)  # fmt: skip
TOY_IMAGES = (
    "model.stages=[[8],[8]]", "dataset=digits", "dataset.size=8", "train.pflops=2e-7", *TOY_RUN,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Something to do.

    Attributes:
        name: Of the step.
        command: Arguments of Python; ``{data}`` stands for the folder of the data, ``{work}`` for
            the one of the results.
        toy: The same at toy size.
        least: Seconds below which it is not begun.
        needs: Folders of the data without which it is left out.
        runs: Run folders, below ``runs``, that are complete when it is done; for other steps the
            record says so.
    """

    name: str
    command: tuple[str, ...]
    toy: tuple[str, ...]
    least: float
    needs: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    def arguments(self, toy: bool, data: Path | None, work: Path) -> list[str]:
        """What Python is given."""
        return [
            argument.replace("{data}", str(data)).replace("{work}", str(work))
            for argument in (self.toy if toy else self.command)
        ]


def tests() -> Step:
    """The tests that are marked gpu."""
    command = ("-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider")
    toy = (*command, "--collect-only", "-q")
    return Step("tests", (*command, *CUDA_TESTS), (*toy, *CUDA_TESTS), 60)


def benchmark(name: str, *arguments: str) -> Step:
    """A benchmark; BENCHMARK_TOY makes it small."""
    command = ("-m", f"benchmarks.{name}", *arguments)
    return Step(" ".join((name, *arguments)), command, command, 45)


def runs(
    experiment: str, methods: str, seeds: str, data: str, toy: Sequence[str], model: str = ""
) -> Step:
    """A sweep of an experiment; at toy size of two methods and a seed."""
    options = (f"model={model}",) if model else ()
    options += ("runs={work}/runs", "tracking.progress=false")

    def sweep(methods: Sequence[str], seeds: Sequence[str]) -> tuple[str, ...]:
        what = f"method={','.join(methods)}", f"seed={','.join(seeds)}"
        return "launch.py", "-m", f"+experiment={experiment}", *what, *options

    every, each = methods.split(","), seeds.split(",")
    of_model = f",model={model}" if model else ""
    folders = [f"{experiment}/method={m}{of_model}/seed={seed}" for seed in each for m in every]
    name = f"{experiment}: {methods}{of_model} seed {seeds}"
    small = (*sweep(every[:2], each[:1]), *toy)
    return Step(name, sweep(every, each), small, 75, (data,), tuple(folders))


def fine_tuning(data: str, *arguments: str) -> Step:
    """The example on one data set."""
    command = ("-m", "examples.finetune_text", "--out", f"{{work}}/finetune/{data}")
    command += ("--model", "{data}/minilm", "--data", f"{{data}}/{data}", *arguments)
    toy = ("-m", "examples.finetune_text", "--help")  # it has tests of its own
    return Step(f"finetune {data}", command, toy, 60, ("minilm", data))


def steps() -> list[Step]:
    """All there is to do, in order."""
    table1 = {"data": "wikitext-2", "toy": TOY_TEXT}
    table3 = {"data": "cifar10", "toy": TOY_IMAGES}
    shallow = {"model": "bert_shallow", **table1}
    every = "baseline,mat,fitted,static,rand,multirate"
    few = ("--methods", "full", "fitted", "mat-alpha", "mat-share")
    return [
        tests(),
        *(benchmark("gates", case) for case in ("bert_base", "switch_block", "vgg16", "bert_mini")),
        benchmark("peers"),
        benchmark("step"),
        runs("table1", "baseline,mat,fitted,static", "1", **table1),
        runs("table1", "baseline", "1", **shallow),
        runs("table1", "rand,multirate", "1", **table1),
        runs("table1", every, "2,3", **table1),
        runs("table1", "baseline", "2,3", **shallow),
        runs("table3", every, "1", **table3),
        fine_tuning("reuters-r8", "--processes", "12", "--alone"),
        fine_tuning("20newsgroups", "--processes", "12", "--seeds", "1", "2", "3", *few),
        replace(benchmark("attach"), toy=("-m", "benchmarks.attach", "--help")),
        *(benchmark(name) for name in ("switch", "vgg", "scaling", "compiled", "fidelity")),
    ]
