"""How well cheap reductions rank the units, and what they cost: the choice of the default.

    python -m benchmarks.fidelity            # minutes

Reference: lambda_max of every unit on 64 samples; exact (all outputs, the nk x nk kernel) for a
small BERT, and many projections for BERT-mini, where the exact kernel cannot be formed. Estimates
see the first n of these samples; ``online`` sees a training batch instead, as in training (means
over five), and ``loss`` is the same kernel on the first n samples: what parts them is the choice of
samples. At initialisation and after some training.

Of an estimate: ``error``, median |lambda / (c lambda_reference) - 1| with c the common factor
(geometric mean), which cancels in eqs. (4) and (7); ``spearman``, rank correlation, and
``overlap``, share of the reference's top third that is found, both within a kind as MAT compares
(scope ``kind``), averaged over kinds; ``cost``, median seconds over those of a dense training step
of 64 sequences in the estimate's precision. Random signs: means over 4, 3, 2 seeds for m = 1, 4,
16, the first of them not timed. The cost of ``online`` is what it adds to a step. A selection by it
also makes that step a dense one, where the method would make a gated one: up to half a step of the
run's batch that is not in the cost.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmarks.harness import DEVICE, TOY, autocast, medians, path_of, row, save, write
from benchmarks.subjects import TEXT, Subject, encoder, gates_of
from mat import ntk
from mat.reduction import Reduction
from mat.suite import data
from mat.suite.config import BertConfig, TextConfig, TrainConfig
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.models.bert import MaskedEncoder

SIZES = (4, 8) if TOY else (8, 16, 32, 64)
# Projections m, timed calls.
REDUCTIONS: tuple[tuple[Reduction, int, int], ...] = (
    ("sum", 1, 1), ("loss", 1, 1), ("random", 1, 3), ("random", 4, 2), ("random", 16, 1)
)  # fmt: skip
ONLINE_BATCHES = 5
Batches = Callable[[int, int], MaskedBatch]  # (stream, samples)


@dataclass
class Setting:
    """A model, where its batches come from, and what the reference is."""

    name: str
    model: MaskedEncoder
    batches: Batches
    reduction: Reduction
    projections: int
    steps: int
    recipe: TrainConfig


def chains(stream: int, samples: int) -> MaskedBatch:
    """Sequences of 16 of 16 pieces, each mostly the triple of the one before; one hidden."""
    random = np.random.default_rng([stream, 3])
    tokens = random.integers(5, 16, (samples, 16))
    for t in range(1, 16):
        follows = random.random(samples) < 0.9
        tokens[follows, t] = 5 + (3 * tokens[follows, t - 1] + 1) % 11
    return mask(tokens.astype(np.uint16), 1 / 16, 4, 5, 16, [stream]).to(DEVICE)


def settings() -> Iterator[Setting]:
    """The small model with the exact kernel, and BERT-mini on prose that ships with Python."""
    torch.manual_seed(0)
    config = BertConfig("small", "bert", 2, 32, 4, 64, 8, "rotary", "pre")
    recipe = TrainConfig(pflops=1, batch=32, lr=3e-3)
    steps = 3 if TOY else 300
    yield Setting("small", encoder(config, 16, 16), chains, "full", 1, steps, recipe)
    if TOY:
        return
    config = BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "rotary", "pre")
    text = data.load(TextConfig(name="pydocs", vocabulary=1024, length=64), seed=0)

    def prose(stream: int, samples: int) -> MaskedBatch:
        found = text.probe_batch(samples) if stream == 0 else text.train_batch(stream, samples)[0]
        assert isinstance(found, MaskedBatch)
        return found.to(DEVICE)

    recipe = TrainConfig(pflops=1, batch=16, lr=2e-3)
    yield Setting("bert_mini", encoder(config, 1024, 64), prose, "random", 32, steps, recipe)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 for the smallest; ties do not happen among measured eigenvalues."""
    return np.argsort(np.argsort(values)).astype(float)


def compare(
    found: NDArray[np.float64], reference: NDArray[np.float64], kind: NDArray[np.str_]
) -> dict[str, float]:
    """Error, rank correlation and overlap of the module's docstring."""
    ratio = found / reference
    spearman, overlap = [], []
    for one in np.unique(kind):
        ours, theirs = ranks(found[kind == one]), ranks(reference[kind == one])
        spearman.append(float(np.corrcoef(ours, theirs)[0, 1]))
        top = len(ours) - round(len(ours) / 3)
        overlap.append(float((ours[theirs >= top] >= top).mean()))
    return {
        "factor": float(np.exp(np.log(ratio).mean())),
        "error": float(np.median(np.abs(ratio / np.exp(np.log(ratio).mean()) - 1))),
        "spearman": float(np.mean(spearman)),
        "overlap": float(np.mean(overlap)),
    }


def first(batch: MaskedBatch, samples: int) -> MaskedBatch:
    """The first n samples."""
    return batch.take(torch.arange(samples, device=DEVICE))


def study(setting: Setting, stage: str) -> pd.DataFrame:
    """One row per estimate: what was estimated how, comparison and cost."""
    model, probe = setting.model, setting.batches(0, max(SIZES))
    units = gates_of(model).units
    bfloat16 = setting.name == "bert_mini"

    def estimate(samples: int, reduction: Reduction, m: int, seed: int) -> NDArray[np.float64]:
        batch, loss = first(probe, samples), model.loss_of_outputs
        with autocast(bfloat16):
            return ntk.estimate(
                model, batch, loss=loss, reduction=reduction, projections=m, seed=seed
            ).lambda_max

    reference = estimate(max(SIZES), setting.reduction, setting.projections, 1000)
    step = Subject(copy.deepcopy(model), setting.batches(1, 64), TEXT, bfloat16).step()
    rows = []

    def add(
        reduction: str, m: int, samples: int, found: list[NDArray[np.float64]], cost: float
    ) -> None:
        compared = [compare(each, reference, units.kind) for each in found]
        about = {"model": setting.name, "stage": stage, "reduction": reduction}
        about |= {"projections": m, "samples": samples}
        rows.append({**about, **pd.DataFrame(compared).mean().to_dict(), "cost": cost})
        words = (f"{k}={v:.3g}" if isinstance(v, float) else v for k, v in rows[-1].items())
        print(*words, flush=True)

    exact: tuple[tuple[Reduction, int, int], ...] = ()
    if setting.reduction == "full":
        exact = (("full", 1, 1),)
    for samples in SIZES:
        for reduction, m, calls in (*REDUCTIONS, *exact):
            found: list[NDArray[np.float64]] = []

            def call(
                samples: int = samples, reduction: Reduction = reduction, m: int = m,
                into: Any = found,
            ) -> None:  # fmt: skip
                into.append(estimate(samples, reduction, m, seed=len(into)))

            spent, dense = medians([call, step], calls)
            add(reduction, m, samples, found, spent / dense)
        training = [
            Subject(model, setting.batches(2 + i, samples), TEXT, bfloat16)
            for i in range(ONLINE_BATCHES)
        ]
        results: list[NDArray[np.float64]] = []

        def measured(training: list[Subject] = training, results: Any = results) -> None:
            with ntk.Online(model) as online:
                training[len(results) % ONLINE_BATCHES].backward()
            results.append(online.result().lambda_max)

        actions = [measured, training[0].backward, step]
        with_kernels, without, dense = medians(actions, ONLINE_BATCHES, 1)
        cost = max(with_kernels - without, 0.0) / dense
        add("online", 1, samples, results[:ONLINE_BATCHES], cost)
    return pd.DataFrame(rows)


def train(setting: Setting) -> float:
    """Train in place, in the estimate's precision; the loss behind the last step."""
    ours = Subject(setting.model, setting.batches(10, setting.recipe.batch), setting.recipe)
    lr = setting.recipe.lr
    for i in range(setting.steps):
        ours.batch = setting.batches(10 + i, setting.recipe.batch)
        ours.recipe = replace(setting.recipe, lr=lr * min(1.0, (i + 1) / 30))
        ours.launched()()
    with torch.no_grad():
        return float(ours.loss(ours.model))


def plot(frame: pd.DataFrame) -> None:
    """Error, rank correlation and overlap against cost, one column per model and stage."""
    cases = list(dict.fromkeys(zip(frame.model, frame.stage, strict=True)))
    measures = {
        "error": "error of lambda_max",
        "spearman": "Spearman correlation",
        "overlap": "overlap of top third",
    }
    lines = list(dict.fromkeys(zip(frame.reduction, frame.projections, strict=True)))
    colours = {key: f"C{i}" for i, key in enumerate(lines)}  # the same in every panel
    figure, axes = plt.subplots(
        3, len(cases), figsize=(4 * len(cases), 9), sharex=True, sharey="row", squeeze=False
    )
    for column, (model, stage) in enumerate(cases):
        part = frame[(frame.model == model) & (frame.stage == stage)]
        for line, measure in enumerate(measures):
            for (reduction, m), group in part.groupby(["reduction", "projections"], sort=False):
                label = f"random, m = {m}" if reduction == "random" else str(reduction)
                # The reference has no error, which a logarithm cannot show.
                shown = group[group[measure] > 0]
                cost, colour = shown.cost.clip(lower=1e-3), colours[str(reduction), m]
                axes[line, column].plot(cost, shown[measure], "o-", label=label, color=colour)
        axes[0, column].set(title=f"{model}, {stage}", xscale="log", yscale="log")
        axes[2, column].set_xlabel("cost / dense steps of 64 sequences")
    for line, name in enumerate(measures.values()):
        axes[line, 0].set_ylabel(name)
    axes[2, 0].legend(fontsize=8)
    points = "a line's points are n = 8, 16, 32, 64"
    figure.suptitle(f"Reductions against the reference on 64 samples; {points}")
    figure.tight_layout()
    save(figure, "fidelity")


def main() -> None:
    """Both settings at initialisation and during training."""
    frames = []
    for setting in settings():
        frames.append(study(setting, "initialisation"))
        loss = train(setting)
        steps = setting.steps
        print(f"{setting.name}: trained {steps} steps to a loss of {loss:.2f}", flush=True)
        frames.append(study(setting, "training"))
    frame = pd.concat(frames, ignore_index=True)
    frame.to_csv(path_of("fidelity", "csv"), index=False, float_format="%.5g")
    plot(frame)
    columns = ["spearman", "overlap", "cost"]
    chosen = frame[frame.samples == SIZES[-2]]  # n = 32
    mean = chosen.groupby(["reduction", "projections"])[columns].mean()
    rows = [
        row(f"{reduction} m={m}, n=32: missed share of the top third", 1 - r.overlap, 1.0, None,
            "share")
        for (reduction, m), r in mean.iterrows()
    ]  # fmt: skip
    write("fidelity", rows, estimates=frame.to_dict("records"))


if __name__ == "__main__":
    main()
