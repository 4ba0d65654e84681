"""Learning rates: by hand, and one cycle as torch has it."""

import pytest
import torch

from mat.suite.config import TrainConfig
from mat.suite.schedule import learning_rate

RECIPE = {"lr": 0.1, "warmup": 0.25, "drops": [0.5, 0.75]}


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("linear", {0: 0, 0.125: 0.05, 0.25: 0.1, 0.625: 0.05, 1: 0}),
        (
            "step",
            {0: 0, 0.125: 0.05, 0.25: 0.1, 0.49: 0.1, 0.5: 0.01, 0.74: 0.01, 0.75: 0.001, 1: 0.001},
        ),
    ],
)
def test_schedules_by_hand(schedule: str, rates: dict[float, float]) -> None:
    train = TrainConfig(schedule=schedule, **RECIPE)
    for progress, rate in rates.items():
        assert learning_rate(train, progress) == pytest.approx(rate, rel=1e-12, abs=1e-15)


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    assert learning_rate(TrainConfig(schedule="step", lr=0.1, warmup=0.0), 0.0) == 0.1


def test_one_cycle_is_torchs() -> None:
    steps = 101
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([parameter], lr=0.1),
        max_lr=0.1,
        total_steps=steps,
        pct_start=0.26,
        cycle_momentum=False,
    )  # its peak is at step 0.26 * 101 - 1 = 25.26
    train = TrainConfig(schedule="onecycle", lr=0.1, warmup=0.2526)
    for step in range(steps):
        assert learning_rate(train, step / (steps - 1)) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-9
        )
        theirs.optimizer.step()
        if step < steps - 1:
            theirs.step()
