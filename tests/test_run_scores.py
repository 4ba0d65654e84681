"""What a run counts and scores: its ledger, online selections, accuracies, checkpoints."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from short_runs import (
    ONLINE,
    SWITCH,
    VGG,
    events,
    small,
    summary_of,
)  # fmt: skip

from mat import flops, ntk
from mat.flops import Flops
from mat.layers import convolution
from mat.suite import engine
from mat.suite.engine import PFLOP, Training
from mat.suite.models.vgg import Vgg
from mat.suite.runs import RunFolder
from mat.suite.stepper import Stepper


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """FLOPs of every step and estimate of a run, as torch's counter sees them.

    What the ledger itself runs once to record a model's products is left out, and so are
    evaluations.
    """
    found: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with flops.flop_counter() as counter:
                answer = function(*arguments, **options)
            found.append(counter.get_total_flops())
            return answer

        return run

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_scores_on", lambda *_: {"loss": 1.0, "accuracy": 0.5})
        patched.setattr(Stepper, "step", watched(Stepper.step))
        patched.setattr(ntk, "estimate", watched(ntk.estimate))
        patched.setattr(ntk.Online, "result", watched(ntk.Online.result))
        yield found


LEDGERS = [  # method, reduction, mode
    ("baseline", "random", "cut"),
    ("multirate", "random", "cut"),
    ("mat", "random", "cut"),
    ("mat", "random", "exact"),
    ("gradnorm", "random", "cut"),
    ("static", "random", "exact"),
    ("mat", "online", "cut"),
]


@pytest.mark.parametrize(("method", "reduction", "mode"), LEDGERS)
def test_ledger_equals_what_a_counter_sees_over_a_run(
    method, reduction, mode, cache, tmp_path, monkeypatch
):
    given = [f"method={method}", f"selection.mode={mode}", "train.accumulation=2", "model.layers=2",
             f"selection.reduction={reduction}"]  # fmt: skip
    config = small(cache, *given, steps=24)
    training = Training(config, RunFolder(tmp_path / "run", config))
    with counted(monkeypatch) as found:
        summary = training.train()
    assert training.spent.everything == sum(found)
    assert summary["pflops"] + summary["pflops_vocabulary"] == pytest.approx(sum(found) / PFLOP)
    assert summary["steps"] >= 3
    few = {"baseline": 0, "multirate": 1, "static": 2}
    assert summary["selections"] == few[method] if method in few else summary["selections"] > 2


@pytest.mark.parametrize("mode", ["exact", "cut"])
@pytest.mark.parametrize("family", ["vgg", "switch"])
def test_ledger_of_filters_and_experts_equals_the_counter(
    family, mode, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(convolution, "BLOCK", 1)
    model, modality = (VGG, "image") if family == "vgg" else (SWITCH, "text")
    given = (*model, "method=mat", f"selection.mode={mode}")
    config = small(cache, *given, modality=modality, steps=20)
    training = Training(config, RunFolder(tmp_path / "run", config))
    with counted(monkeypatch) as found:
        summary = training.train()
    assert summary["selections"] > 2 and summary["active_share"] < 1
    assert training.spent.everything == sum(found)


@pytest.mark.parametrize(("method", "row"), [("mat", "lambda_max"), ("gradnorm", "gradnorm")])
def test_online_scores_are_those_of_the_batch_that_the_step_trains_on(
    method, row, cache, tmp_path, monkeypatch
):
    config = small(
        cache, f"method={method}", "selection.reduction=online", "train.accumulation=2", steps=16
    )
    training = Training(config, RunFolder(tmp_path / "run", config))
    expected, shares, steps = [], [], []
    select, step = Training._select, Training._train_step

    def measured(self: Training, cost: Flops) -> None:
        batch, _ = self.data.train_batch(self.step, config.train.batch)
        found = ntk.estimate(self.model, batch, loss=self.model.loss_of_outputs, reduction="loss")
        expected.append(found.lambda_max if method == "mat" else np.sqrt(found.squared_norm))
        steps.append(self.step)
        select(self, cost)

    def watched(self: Training, *arguments: Any, **named: Any) -> None:
        shares.append(float(self.gates.active.mean()))
        step(self, *arguments, **named)

    monkeypatch.setattr(Training, "_select", measured)
    monkeypatch.setattr(Training, "_train_step", watched)
    summary = training.train()
    assert len(expected) > 2 and min(shares) < 1
    assert all(shares[s] == 1 for s in steps)  # nothing is frozen in a step that is measured
    assert summary["steps"] == len(shares) and summary["pflops_overhead"] > 0
    assert 0 < summary["seconds_estimator"] < summary["seconds"]
    units = pd.read_parquet(tmp_path / "run" / "units.parquet")
    for t, wanted in enumerate(expected):
        np.testing.assert_allclose(units[units["t"] == t][row], wanted, rtol=2e-4)


# --- what Tables 2 and 3 read


def test_a_step_back_propagates_the_loss_and_the_routers_losses(cache, tmp_path, monkeypatch):
    config = small(cache, *SWITCH, "method=baseline")
    training = Training(config, RunFolder(tmp_path / "run", config))
    batch = training.data.train_batch(0, 8)[0]
    twin = copy.deepcopy(training.model).train()
    loss, extra = twin.loss(batch), twin.auxiliary_loss()
    assert extra is not None and extra > 0.01  # what a step without it would lack
    given, backward = [], torch.autograd.backward

    def spy(tensor: torch.Tensor) -> None:
        given.append(float(tensor.detach()))
        backward(tensor)

    monkeypatch.setattr(torch.autograd, "backward", spy)
    training._train_step(batch, Flops())
    assert given == pytest.approx([float((loss + extra).detach())], rel=1e-6)


def test_running_accuracy_is_the_mean_over_the_last_epochs_samples(cache, tmp_path, monkeypatch):
    """Digits: 1,137 training images, in nine steps of 128 but for the last, of 113."""
    config = small(cache, *VGG, "method=baseline", modality="image", steps=24)
    seen, metrics = [], Vgg.metrics

    def spy(self: Vgg, outputs: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        found = metrics(self, outputs, batch)
        if self.training:
            seen.append((float(found["accuracy"]), batch.samples))
        return found

    monkeypatch.setattr(Vgg, "metrics", spy)
    engine.run(config, tmp_path / "run")
    logged = events(tmp_path / "run", "train")
    assert [n for _, n in seen[:9]] == [128] * 8 + [113] and logged[-1]["step"] > 18
    for event in logged:
        last = seen[max(0, event["step"] - 9) : event["step"]]
        correct = sum(accuracy * n for accuracy, n in last)
        assert event.get("accuracy") == (
            None if len(last) < 9 else pytest.approx(correct / 1137, rel=1e-12)
        )


def test_test_accuracy_is_read_from_the_weights_of_the_best_validation_accuracy(
    cache, tmp_path, monkeypatch
):
    """Not of the lowest loss, nor the last ones, nor of an equal accuracy later on."""
    config = small(cache, *VGG, "method=baseline", modality="image", steps=12)
    scores_on, weights = Training._scores_on, []

    def scripted(self: Training, split: str, samples: int | None) -> dict[str, float]:
        if split == "test":
            return scores_on(self, split, samples)
        weights.append(copy.deepcopy(self.model.state_dict()))
        return {"loss": 1 / len(weights), "accuracy": {11: 0.75, 14: 0.75}.get(len(weights), 0.25)}

    monkeypatch.setattr(Training, "_scores_on", scripted)
    engine.run(config, tmp_path / "run")
    evaluations, summary = events(tmp_path / "run", "evaluation"), summary_of(tmp_path / "run")
    assert summary["best_validation_accuracy"] == max(e["accuracy"] for e in evaluations) == 0.75
    assert (summary["best_step"], summary["best_validation_loss"]) == (
        evaluations[10]["step"],
        1 / 11,
    )
    assert 0 < summary["best_step"] < evaluations[13]["step"] < summary["steps"]
    training = Training(config, RunFolder(tmp_path / "twin", config))
    training.model.load_state_dict(weights[10])
    (batch,) = training.data.evaluation_batches("test", None, 360)
    with torch.no_grad():
        correct = training.model.eval()(batch).argmax(1) == batch.targets
    assert summary["test_accuracy"] == pytest.approx(float(correct.float().mean()), rel=1e-6)
    assert events(tmp_path / "run", "test")[0]["accuracy"] == summary["test_accuracy"]


def test_checkpoints_are_as_frequent_as_asked_whoever_makes_the_steps(cache, tmp_path, monkeypatch):
    """An online selection makes a step of its own; here every other step is one."""
    config = small(cache, *ONLINE, "train.checkpoint_steps=5", steps=24)
    training = Training(config, RunFolder(tmp_path / "run", config))
    saved, save = [], Training._save
    monkeypatch.setattr(Training, "_save", lambda self: saved.append(self.step) or save(self))
    steps = training.train()["steps"]
    assert len(saved) >= 3 and max(np.diff([0, *saved, steps])) <= 6, saved
