"""Learning rates over the run's own budget: a progress of 0 is its first FLOP, 1 its last."""

import math
from collections.abc import Sequence

from mat.suite.config import TrainConfig

DROP = 0.1  # step: the factor at each of ``train.drops``
START, END = (
    1 / 25,
    1e-4 / 25,
)  # onecycle: where the cycle begins and ends, as shares of the peak (torch's OneCycleLR)


def learning_rate(train: TrainConfig, progress: float) -> float:
    """The learning rate at a share of the run.

    ``linear``    warm-up from 0 over ``train.warmup``, then linear decay to 0 (BERT);
    ``step``      the same warm-up, then ``train.lr``, times 0.1 at each of ``train.drops`` (VGG);
    ``onecycle``  half a cosine up over ``train.warmup``, half a cosine down to nearly 0 (Smith &
                  Topin 2018).

    Args:
        train: The recipe.
        progress: Share of the run's FLOPs that is spent, within [0, 1].
    """
    rising = progress < train.warmup
    part = progress / train.warmup if rising else (progress - train.warmup) / (1 - train.warmup)
    if train.schedule == "onecycle":
        low = START if rising else END
        return train.lr * (
            low + (1 - low) * (1 + math.cos(math.pi * (1 - part if rising else part))) / 2
        )
    if rising:
        return train.lr * part
    if train.schedule == "linear":
        return train.lr * max(0.0, 1 - part)
    return train.lr * DROP ** sum(progress >= drop for drop in train.drops)


def evaluation_points(
    pflops: float, budget: float, interval: float, marks: Sequence[float]
) -> list[float]:
    """PFLOPs at which a run is evaluated: every mark, the end, every interval of the plan.

    Args:
        pflops: The planned length.
        budget: Share of it that the run spends.
        interval: Share of it between evaluations.
        marks: PFLOPs.

    Returns:
        The points in rising order; those equal but for rounding are one.
    """
    end = pflops * budget
    regular = [i * interval * pflops for i in range(1, math.ceil(1 / interval) + 1)]
    points: list[float] = []
    for point in (*marks, end, *regular):
        if point <= end * (1 + 1e-9) and not any(math.isclose(point, p) for p in points):
            points.append(point)
    return sorted(points)
