"""Does ``torch.compile`` pay on top of the gates? Steps of BERT-mini, compiled against as they are.

    python -m benchmarks.compiled

Forward and its part of the backward are compiled; loss, clipping and update are the same. The first step after every
change of the active set is measured apart: it is where compiled code is made again.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, medians, row, seconds, set_share, write
from benchmarks.step import SIZES, batch_of
from mat.bert import Bert
from mat.optim import UnitAdamW

REPEATS = 9


def main() -> None:
    """Measure dense steps, and steps with a third of the units active after a change of the set."""
    config, vocabulary, samples, length = SIZES["mini"]
    torch.manual_seed(0)
    model, batch = Bert(config, vocabulary, length), batch_of(vocabulary, samples, length)
    optimiser = UnitAdamW(model, (0.9, 0.98), 1e-6, 0.01)
    compiled: Callable[..., Any] = torch.compile(model.forward)

    def step(forward: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            model.train()
            optimiser.clear()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss_of_outputs(forward(batch), batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.clip(1.0)
            optimiser.step(1e-4)

        return run

    rows: list[Row] = []
    for label, share in (("dense step", 1.0), ("step with a third active", 1 / 3), ("step with a half active", 1 / 2)):
        set_share(model, share, "cut")
        first = seconds(step(compiled))
        ours, other = medians([step(compiled), step(model)], REPEATS)
        rows.append(row(f"{label}, compiled against as it is", ours, other, None))
        rows.append(row(f"{label}, the first one compiled", first, other, None))
    write("compiled", rows)


if __name__ == "__main__":
    main()
