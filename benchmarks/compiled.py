"""Does ``torch.compile`` pay on top of the gates, and is it right? Steps of BERT-mini.

    python -m benchmarks.compiled

Compiled against as they are: the forward pass and its part of the backward; loss, clipping and
update are the same. The first step after a change of the active set is measured apart: it is where
compiled code is made again. After every one of ten changes at the same share the gradients are
compared with those of the model as it is: a set that was compiled in would show.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import TOY, Row, medians, row, seconds, write
from benchmarks.subjects import Subject, subject

REPEATS, CHANGES = 9, 2 if TOY else 10
TOLERANCE = 0.05  # of the gradients' norm: both are rounded to bf16, each in its own order


def draw(ours: Subject, random: np.random.Generator) -> None:
    """A random third of every layer's units active."""
    wanted = [
        random.permutation(gate.n_units) < round(gate.n_units / 3) for gate in ours.gates.layers
    ]
    ours.gates.set_active(np.concatenate(wanted))


def gradients(ours: Subject) -> Tensor:
    """All gradients of a backward pass, of active units only."""
    ours.backward()
    found = torch.cat([gradient.flatten() for gradient in ours.optimiser.gradients()])
    ours.optimiser.zero_grad()
    return found


def changes(plain: Subject, compiled: Subject) -> tuple[float, float]:
    """Largest relative error of the compiled gradients, and the median first step's seconds."""
    random, errors, firsts = np.random.default_rng(0), [], []
    for _ in range(CHANGES):
        draw(plain, random)
        firsts.append(seconds(lambda: gradients(compiled)))
        expected = gradients(plain)
        found = gradients(compiled)
        same = found.shape == expected.shape
        error = float((found - expected).norm() / expected.norm()) if same else float("inf")
        errors.append(error)
    print(f"relative errors: {[f'{e:.1e}' for e in errors]}", flush=True)
    print(f"first steps: {[f'{s:.2f}' for s in firsts]} s", flush=True)
    return max(errors), float(np.median(firsts))


def main() -> None:
    """Steps at three shares, then changes of the set."""
    torch.manual_seed(0)
    plain = subject("bert_mini")
    forward: Any = plain.model.forward if TOY else torch.compile(plain.model.forward)
    compiled = Subject(plain.model, plain.batch, plain.recipe, forward=forward)
    shares = {
        "dense step": 1.0,
        "step with a third active": 1 / 3,
        "step with a half active": 1 / 2,
    }
    rows: list[Row] = []
    for label, share in shares.items():
        first = seconds(compiled.launched(share))
        ours, other = medians([compiled.launched(share), plain.launched(share)], REPEATS)
        rows.append(row(f"mini: {label}, compiled against as it is", ours, other, None))
        rows.append(row(f"mini: {label}, the first one compiled", first, other, None))
    error, first = changes(plain, compiled)
    (as_it_is,) = medians([lambda: gradients(plain)], REPEATS)
    name = f"mini: first step after a change at a third, median of {CHANGES}"
    rows.append(row(name, first, as_it_is, None))
    name = "mini: error of compiled gradients, largest, over the tolerance"
    rows.append(row(name, error, TOLERANCE, 1.0, "of norm"))
    if error > TOLERANCE:
        print("Compiled gradients are WRONG after a change of the active set.")
    write("compiled", rows)


if __name__ == "__main__":
    main()
