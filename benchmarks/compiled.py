"""Does ``torch.compile`` pay on top of the gates, and is it right? Steps of BERT-mini, compiled against as they are.

    python -m benchmarks.compiled

Forward and its part of the backward are compiled; loss, clipping and update are the same. The first step after a change
of the active set is measured apart: it is where compiled code is made again. After every one of ten changes at the same
share the gradients are compared with those of the model as it is: a set that was compiled in would show.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, Subject, medians, row, seconds, write
from benchmarks.step import bert
from mat.suite.units import unit_layers

REPEATS, CHANGES = 9, 10
TOLERANCE = 0.05  # of the gradients' norm: both are rounded to bf16, each in its own order


def draw(subject: Subject, random: np.random.Generator) -> None:
    """A random third of every layer's units active."""
    for layer in unit_layers(subject.model):
        layer.set_active(random.permutation(layer.n_units) < round(layer.n_units / 3), "cut")


def gradients(subject: Subject) -> Tensor:
    """All gradients of a backward pass, of active units only."""
    subject.backward()
    return torch.cat([gradient.flatten() for gradient in subject.optimiser.gradients()])


def changes(plain: Subject, compiled: Subject) -> tuple[float, float]:
    """Largest relative error of the compiled gradients over the changes, and the median first step's seconds."""
    random, errors, firsts = np.random.default_rng(0), [], []
    for _ in range(CHANGES):
        draw(plain, random)
        firsts.append(seconds(compiled.backward))
        expected = gradients(plain)
        found = gradients(compiled)
        same = found.shape == expected.shape
        errors.append(float((found - expected).norm() / expected.norm()) if same else float("inf"))
    print(f"relative errors: {[f'{e:.1e}' for e in errors]}; first steps: {[f'{s:.2f}' for s in firsts]} s", flush=True)
    return max(errors), float(np.median(firsts))


def main() -> None:
    """Steps at three shares, then changes of the set."""
    torch.manual_seed(0)
    plain = bert("mini")
    forward: Any = torch.compile(plain.model.forward)
    compiled = Subject(plain.model, plain.batch, plain.recipe, forward=forward)
    rows: list[Row] = []
    for label, share in (("dense step", 1.0), ("step with a third active", 1 / 3), ("step with a half active", 1 / 2)):
        first = seconds(compiled.launched(share))
        ours, other = medians([compiled.launched(share), plain.launched(share)], REPEATS)
        rows.append(row(f"mini: {label}, compiled against as it is", ours, other, None))
        rows.append(row(f"mini: {label}, the first one compiled", first, other, None))
    error, first = changes(plain, compiled)
    (as_it_is,) = medians([plain.backward], REPEATS)
    rows.append(row(f"mini: first step after a change at a third, median of {CHANGES}", first, as_it_is, None))
    rows.append(row("mini: error of compiled gradients, largest, over the tolerance", error, TOLERANCE, 1.0, "of norm"))
    if error > TOLERANCE:
        print("Compiled gradients are WRONG after a change of the active set.")
    write("compiled", rows)


if __name__ == "__main__":
    main()
