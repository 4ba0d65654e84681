"""Whole runs: the folder they leave, the budget they keep, and that an interrupted run gives what a whole one does."""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from short_runs import (
    STEP,
    SWITCH,
    VGG,
    assert_same,
    events,
    one_sentence,
    result,
    run_interrupted,
    small,
    unseal,
)  # fmt: skip

from mat import flops, ntk, policy
from mat.flops import Flops
from mat.layers import convolution
from mat.suite import engine
from mat.suite.config import Config
from mat.suite.engine import PFLOP, Training
from mat.suite.errors import RunFailed, UserError
from mat.suite.models.vgg import Vgg
from mat.suite.runs import RunFolder
from mat.suite.stepper import Stepper
from mat.suite.validation import validate

COLUMNS = ["pflops_forward", "pflops_input_grad", "pflops_weight_grad", "pflops_overhead"]
EVENT = {"event", "step", "epoch", "split", "loss", "active_share", "pflops", "pflops_vocabulary", "pflops_needed",
         "seconds", *COLUMNS}  # fmt: skip
EXTRA: dict[str, set[str]] = {"start": {"unigram_entropy"}, "train": {"lr", "active_now"}, "selection": {"active_now"},
                              "evaluation": {"mark"}, "test": set()}  # fmt: skip
SUMMARY = {"method", "model", "mode", "seed", "steps", *COLUMNS, "pflops", "pflops_vocabulary", "pflops_needed",
           "seconds", "seconds_estimator", "best_validation_loss", "best_step", "pflops_to_best", "seconds_to_best",
           "test_loss", "active_share", "unigram_entropy", "selections", "parameters"}  # fmt: skip

ONLINE = ("method=mat", "selection.reduction=online")
Finished = Callable[..., tuple[Config, Path]]


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Uninterrupted runs by their overrides, each made once."""
    made: dict[tuple[str, ...], tuple[Config, Path]] = {}

    def run(*overrides: str, steps: int = 26, modality: str = "text") -> tuple[Config, Path]:
        key = (*overrides, str(steps), modality)
        if key not in made:
            config = small(cache, *overrides, steps=steps, modality=modality)
            folder = tmp_path_factory.mktemp("finished") / "run"
            assert engine.run(config, folder) is not None
            made[key] = config, folder
        return made[key]

    return run


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert set(summary.pop("sha256")) >= {"summary.json", "metrics.jsonl", "config.yaml", "environment.json"}
    return summary


# --- the run folder


def test_run_folder_is_complete(finished):
    config, folder = finished("method=mat")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files - {".lock"} == {"config.yaml", "environment.json", "metrics.jsonl", "units.parquet", "summary.json",
                     "checkpoint/latest.pt", f"checkpoint/best-{summary_of(folder)['best_step']}.pt"}  # fmt: skip
    assert OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) == dataclasses.asdict(config)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.keys() == {"command", "commit", "dirty", "versions", "device", "device_name", "threads",
                                  "precision", "exclusive"}  # fmt: skip
    assert environment["versions"]["torch"] == torch.__version__ and environment["threads"] == 1

    lines = events(folder)
    assert lines[0]["event"] == "start" and lines[-1]["event"] == "test"
    assert {line["event"] for line in lines[1:-1]} == {"train", "selection", "evaluation"}
    for line in lines:
        assert line.keys() == EVENT | EXTRA[line["event"]]
        assert line["pflops"] == pytest.approx(sum(line[c] for c in COLUMNS))
    for column in ("step", "epoch", "pflops", "pflops_vocabulary", "seconds"):
        values = [line[column] for line in lines]
        assert values == sorted(values), column
    assert [e["step"] for e in lines if e["event"] == "train"] == list(range(5, lines[-1]["step"] + 1, 5))


@pytest.mark.parametrize("name", ["PATH", "GIT_DIR"])  # no git there; no repository there
def test_a_run_goes_on_where_git_says_nothing(name, cache, tmp_path, monkeypatch):
    monkeypatch.setenv(name, str(tmp_path))
    config = small(cache)
    environment = RunFolder(tmp_path / "run", config).begin(config, None)
    assert environment == json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["commit"] is None and environment["dirty"] is None


def test_summary_agrees_with_the_events(finished, tmp_path):
    config, folder = finished("method=mat")
    summary, lines = summary_of(folder), events(folder)
    assert summary.keys() == SUMMARY
    evaluations = [e for e in lines if e["event"] == "evaluation"]
    best = min(evaluations, key=lambda e: e["loss"])
    read = {"best_validation_loss": best["loss"], "best_step": best["step"], "pflops_to_best": best["pflops"],
            "seconds_to_best": best["seconds"], "test_loss": lines[-1]["loss"]}  # fmt: skip
    assert {key: summary[key] for key in read} == read
    assert all(summary[key] == lines[-1][key] for key in (*COLUMNS, "pflops", "seconds"))
    assert summary["selections"] == len([e for e in lines if e["event"] == "selection"])
    assert (summary["method"], summary["mode"], summary["seed"]) == ("mat", "cut", 0)
    model = Training(config, RunFolder(tmp_path / "run", config)).model
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < summary["seconds_estimator"] < summary["seconds"]


def test_units_have_a_row_per_selection_and_unit(finished):
    _, folder = finished("method=mat")
    units = pd.read_parquet(folder / "units.parquet")
    assert list(units.columns) == ["t", "step", "pflops", "kind", "layer", "unit", "lambda_max", "delta", "threshold",
                                   "active", "stopped", "distance"]  # fmt: skip
    n = summary_of(folder)["selections"]
    assert n >= 14 and len(units) == n * 6  # two heads and four groups
    assert not units.duplicated(["t", "kind", "layer", "unit"]).any() and sorted(set(units["t"])) == list(range(n))
    shares = units.groupby("t")["active"].mean()
    assert shares[0] == 1.0 and (shares[1:] <= 0.5).all()
    assert not (units["active"] & units["stopped"]).any() and (units["lambda_max"] > 0).all()
    assert (units["distance"] == 0).eq(units["t"] == 0).all()
    assert "gradnorm" in pd.read_parquet(finished("method=gradnorm")[1] / "units.parquet").columns


def test_complete_run_is_skipped(finished, monkeypatch):
    config, folder = finished("method=mat")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(engine, "Training", lambda *arguments: pytest.fail("trained again"))
    assert engine.run(config, folder) == summary_of(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_complete_run_stands_whatever_it_was_made_on_but_a_begun_one_goes_on_there(cache, tmp_path):
    config = small(cache, "method=mat", steps=12)
    other, rougher = (
        dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, **changed))
        for changed in ({"gather_share": 0.5}, {"precision": "bfloat16"})
    )
    run_interrupted(config, tmp_path / "run", "_train_step", 3, "sigterm")
    with pytest.raises(UserError, match=r"holds a run with another hardware.gather_share"):
        engine.run(other, tmp_path / "run")
    summary = engine.run(config, tmp_path / "run")
    assert summary is not None and engine.run(other, tmp_path / "run") == summary
    with pytest.raises(UserError, match=r"holds a run with another hardware.precision"):
        engine.run(rougher, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"), [("train.lr", 2e-2), ("selection.share", 0.5), ("dataset.length", 8), ("method.budget", 0.5)]
)
def test_folder_of_another_run_is_refused_by_name(finished, key, value):
    config, folder = finished("method=mat")
    other = OmegaConf.create(dataclasses.asdict(config))
    OmegaConf.update(other, key, value)
    group, name = key.split(".")
    changed = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    with pytest.raises(UserError, match=f"holds a run with another {key}") as caught:
        engine.run(changed, folder)
    assert one_sentence(str(caught.value)) and str(folder) in str(caught.value)
    assert not (folder / "failure.json").exists()


def test_a_run_made_before_a_key_existed_had_its_default(cache, tmp_path):
    config = small(cache, "method=baseline", steps=6)
    summary, known = engine.run(config, tmp_path / "run"), tmp_path / "run" / "config.yaml"
    unseal(tmp_path / "run")
    recorded = OmegaConf.load(known)
    del recorded.selection.beta
    OmegaConf.save(recorded, known)
    assert engine.run(config, tmp_path / "run") == summary
    other = dataclasses.replace(config, selection=dataclasses.replace(config.selection, beta=0.5))
    with pytest.raises(UserError, match=r"holds a run with another selection.beta"):
        engine.run(other, tmp_path / "run")


def test_a_run_made_when_a_key_still_existed_stands_at_the_value_that_is_left_of_it(cache, tmp_path):
    config = small(cache, "method=baseline", steps=6)
    summary, known = engine.run(config, tmp_path / "run"), tmp_path / "run" / "config.yaml"
    unseal(tmp_path / "run")
    recorded = OmegaConf.load(known)
    for value, same in ((0, True), (2, False)):
        recorded.selection.cut_last = value
        OmegaConf.save(recorded, known)
        if same:
            assert engine.run(config, tmp_path / "run") == summary
            continue
        with pytest.raises(UserError, match=r"holds a run with another selection.cut_last"):
            engine.run(config, tmp_path / "run")


def test_what_is_not_science_may_change(finished):
    config, folder = finished("method=mat")
    changed = dataclasses.replace(
        config,
        hardware=dataclasses.replace(config.hardware, threads=1, exclusive=False),
        tracking=dataclasses.replace(config.tracking, project="another"),
        train=dataclasses.replace(config.train, checkpoint_steps=3),
        dataset=dataclasses.replace(config.dataset, cache="elsewhere"),
    )
    assert engine.run(changed, folder) == summary_of(folder)


# --- budget, evaluation, FLOPs


@pytest.mark.parametrize(
    "overrides",
    [*((f"method={m}",) for m in ("baseline", "rand", "multirate", "mat", "static", "gradnorm", "fitted")), ONLINE],
    ids=",".join,
)
def test_budget_is_used_and_never_exceeded(finished, overrides):
    config, folder = finished(*overrides)
    lines = events(folder)
    budget = config.train.pflops * config.method.budget
    step = max(np.diff([e["pflops"] for e in lines if e["event"] != "train"]))
    assert budget - 2 * step < lines[-1]["pflops"] <= budget
    assert lines[-1]["pflops_needed"] <= lines[-1]["pflops"]


def test_run_ends_with_an_evaluation_when_a_selection_does_not_fit_any_more(finished):
    config, folder = finished("method=mat", "selection.samples=16", steps=20)
    last = events(folder, "evaluation")[-1]
    assert last["step"] == summary_of(folder)["steps"] and last["pflops"] == summary_of(folder)["pflops"]
    spent, budget = last["pflops"], config.train.pflops * config.method.budget
    first_estimate = events(folder, "selection")[0]["pflops_overhead"]
    assert spent <= budget < spent + first_estimate  # it was a selection that did not fit


@pytest.mark.parametrize("stop", [True, False])
def test_run_may_end_when_all_units_have_stopped(stop, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "settled", lambda delta, *rest: np.ones(len(delta), bool))
    config = small(cache, "method=mat", f"train.stop_when_settled={stop}")
    summary = engine.run(config, tmp_path / "run")
    assert summary is not None and summary["selections"] == 3  # all stop at t = 2; there is nothing left to select
    evaluations = events(tmp_path / "run", "evaluation")
    assert evaluations[-1]["step"] == summary["steps"]
    budget = config.train.pflops * config.method.budget
    share = summary["pflops"] / budget
    marks = [e["mark"] for e in evaluations if e["mark"] is not None]
    assert share < 0.3 if stop else share > 0.9
    assert marks == ([] if stop else [mark for mark in config.train.marks if mark <= budget])


def test_run_without_a_single_step_is_refused(cache, tmp_path):
    config = small(cache, "method=mat", "train.pflops=1e-9")
    with pytest.raises(UserError, match=r"train.pflops=1e-09 is too short") as caught:
        engine.run(config, tmp_path / "run")
    assert one_sentence(str(caught.value)) and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("method", ["baseline", "mat", "multirate"])
def test_evaluation_comes_often_enough_and_at_every_mark(finished, method):
    marks = [0.25, 0.3484, 0.35, 0.65]  # of the plan; all but one meet a regular evaluation, the last one the end
    pflops = 51 * STEP["text"]  # here they meet but for rounding
    assert 14 * 0.025 * (pflops * PFLOP) != 0.35 * pflops * PFLOP
    given = [f"train.marks={[m * pflops for m in marks]}", f"train.pflops={pflops}", "method.budget=0.65"]
    config, folder = finished(f"method={method}", *given)
    evaluations = events(folder, "evaluation")
    for mark in config.train.marks:
        read = [e for e in evaluations if e["mark"] == mark]
        assert len(read) == 1 and read[0]["pflops"] <= mark
        later = next((e for e in evaluations if e["step"] > read[0]["step"]), None)
        assert later is None or later["pflops"] > mark - 0.025 * pflops
    assert len(evaluations) == 26 + 1
    overhead = max(np.diff([e["pflops_overhead"] for e in evaluations]))
    assert max(np.diff([e["pflops"] for e in evaluations])) <= 0.025 * pflops + STEP["text"] + overhead
    assert evaluations[-1]["step"] == summary_of(folder)["steps"]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """FLOPs of every step and estimate of a run, as torch's counter sees them.

    What the ledger itself runs once to record a model's products is left out, and so are evaluations.
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
def test_ledger_equals_what_a_counter_sees_over_a_run(method, reduction, mode, cache, tmp_path, monkeypatch):
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
def test_ledger_of_filters_and_experts_equals_the_counter(family, mode, cache, tmp_path, monkeypatch):
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
def test_online_scores_are_those_of_the_batch_that_the_step_trains_on(method, row, cache, tmp_path, monkeypatch):
    config = small(cache, f"method={method}", "selection.reduction=online", "train.accumulation=2", steps=16)
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
        assert event.get("accuracy") == (None if len(last) < 9 else pytest.approx(correct / 1137, rel=1e-12))


def test_test_accuracy_is_read_from_the_weights_of_the_best_validation_accuracy(cache, tmp_path, monkeypatch):
    """Not from those of the lowest loss, nor from the last ones, nor from an equal accuracy later on."""
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
    assert (summary["best_step"], summary["best_validation_loss"]) == (evaluations[10]["step"], 1 / 11)
    assert 0 < summary["best_step"] < evaluations[13]["step"] < summary["steps"]
    training = Training(config, RunFolder(tmp_path / "twin", config))
    training.model.load_state_dict(weights[10])
    (batch,) = training.data.evaluation_batches("test", None, 360)
    with torch.no_grad():
        correct = training.model.eval()(batch).argmax(1) == batch.targets
    assert summary["test_accuracy"] == pytest.approx(float(correct.float().mean()), rel=1e-6)
    assert events(tmp_path / "run", "test")[0]["accuracy"] == summary["test_accuracy"]


def test_checkpoints_are_as_frequent_as_asked_whoever_makes_the_steps(cache, tmp_path, monkeypatch):
    """An online selection makes a step of its own; here every other step is one, and the fifth is theirs."""
    config = small(cache, *ONLINE, "train.checkpoint_steps=5", steps=24)
    training = Training(config, RunFolder(tmp_path / "run", config))
    saved, save = [], Training._save
    monkeypatch.setattr(Training, "_save", lambda self: saved.append(self.step) or save(self))
    steps = training.train()["steps"]
    assert len(saved) >= 3 and max(np.diff([0, *saved, steps])) <= 6, saved


# --- learning


def test_baseline_learns(finished):
    _, folder = finished("method=baseline", "train.lr=1e-2", steps=200)
    losses = [e["loss"] for e in events(folder, "evaluation")]
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    summary = summary_of(folder)
    assert summary["best_validation_loss"] < losses[0] - 0.35 and summary["test_loss"] < losses[0] - 0.35
    assert 3 < summary["unigram_entropy"] < math.log(256)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_empty_active_set_trains_the_rest_alone(finished, mode):
    _, folder = finished("method=mat", "selection.share=0", f"selection.mode={mode}")
    selections = events(folder, "selection")
    assert selections[0]["active_now"] == 1 and {e["active_now"] for e in selections[1:]} == {0}
    frozen_at = pd.read_parquet(folder / "units.parquet").query("t == 1")["step"].iloc[0]
    losses = [e["loss"] for e in events(folder, "evaluation") if e["step"] >= frozen_at]
    assert losses[-1] < losses[0]
    optimiser = torch.load(folder / "checkpoint" / "latest.pt", weights_only=True)["optimiser"]
    counts = [state["step"] for state in optimiser["state"].values()]
    gated = [count for count in counts if count.dim()]
    assert gated and {int(n) for count in gated for n in count} == {frozen_at}
    # In cut the norm in front of a sublayer without active units gets no gradient.
    skipped = {frozen_at} if mode == "cut" else set()
    assert {int(n) for n in counts if not n.dim()} == {summary_of(folder)["steps"], *skipped}


def test_seed_decides_the_start_and_the_method_does_not(cache, tmp_path):
    def start(*overrides: str) -> dict[str, torch.Tensor]:
        config = small(cache, *overrides)
        return Training(config, RunFolder(tmp_path / "_".join(overrides), config)).model.state_dict()

    first = start("method=mat", "seed=1")
    for method in ("baseline", "rand", "multirate", "gradnorm"):
        assert_same(start(f"method={method}", "seed=1"), first)
    assert not torch.equal(start("method=mat", "seed=2")["tokens.weight"], first["tokens.weight"])


def test_seeds_differ_from_the_first_step_on(finished):
    losses = [events(finished("method=rand", f"seed={seed}")[1], "evaluation")[-1]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_accumulation_is_the_same_step(finished, precision):
    folders = [finished("method=baseline", f"hardware.precision={precision}", f"train.accumulation={n}", steps=10)[1]
               for n in (1, 4)]  # fmt: skip
    losses = [[e["loss"] for e in events(folder) if e["event"] in ("train", "evaluation")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "float32" else 1e-2)


# --- interruption


DROPOUT = ("model.dropout=0.2", "hardware.precision=bfloat16")
INTERRUPTIONS = [  # overrides, verb, call, how
    (("method=mat",), "_train_step", 4, "after"),  # before the first checkpoint
    (("method=mat",), "_train_step", 11, "before"),  # between steps
    (("method=mat",), "_train_step", 10, "sigterm"),
    (("method=mat",), "_select", 1, "after"),
    (("method=mat",), "_select", 9, "before"),
    (("method=mat",), "_select", 9, "after"),
    (("method=mat",), "_select", 9, "sigterm"),
    (("method=mat",), "_evaluate", 17, "after"),  # best-<step>.pt is newer than latest.pt
    (("method=mat",), "_save", 2, "before"),
    (("method=mat",), "_finish", 1, "before"),
    (("method=multirate",), "_train_step", 3, "after"),  # in the first cycle of five
    (("method=multirate",), "_train_step", 13, "sigterm"),  # in the middle of a cycle
    (("method=multirate",), "_train_step", 18, "before"),
    (("method=baseline",), "_train_step", 2, "sigterm"),
    (("method=baseline",), "_train_step", 12, "after"),
    (("method=baseline", *DROPOUT), "_train_step", 12, "sigterm"),
    (("method=mat", *DROPOUT), "_train_step", 12, "before"),
    (("method=rand",), "_train_step", 12, "before"),
    (("method=gradnorm",), "_select", 6, "after"),
    (("method=shuffled",), "_select", 6, "after"),
    (ONLINE, "_select", 6, "before"),
    (ONLINE, "_select", 6, "sigterm"),
    (ONLINE, "_train_step", 8, "after"),
]


OTHER_MODELS = [  # modality, overrides, verb, call, how
    ("image", (*VGG, "method=mat", "selection.mode=cut"), "_train_step", 12, "before"),  # past the first full epoch
    ("image", (*VGG, "method=mat"), "_train_step", 4, "sigterm"),
    ("image", (*VGG, "method=mat"), "_train_step", 12, "after"),
    ("image", (*VGG, "method=mat"), "_evaluate", 17, "after"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_train_step", 9, "before"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_train_step", 10, "sigterm"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_select", 5, "before"),
]


@pytest.mark.parametrize(
    ("modality", "overrides", "verb", "call", "how"), [*(("text", *row) for row in INTERRUPTIONS), *OTHER_MODELS]
)
def test_interrupted_run_gives_the_same_numbers(modality, overrides, verb, call, how, finished, tmp_path):
    config, reference = finished(*overrides, modality=modality)
    run_interrupted(config, tmp_path / "run", verb, call, how)
    assert engine.run(config, tmp_path / "run") is not None
    assert_same(result(tmp_path / "run"), result(reference))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [e["device"] for e in environment.get("resumed", [])] in (["cpu"], [])  # nothing to go on from


def test_checkpoint_right_at_a_selection(finished, tmp_path):
    config, reference = finished("method=mat", "selection.samples=1", steps=60)  # selections two steps apart
    units = pd.read_parquet(reference / "units.parquet")
    step = int(units[units["t"] == 7]["step"].iloc[0])
    assert step >= 7 and step - int(units[units["t"] == 6]["step"].iloc[0]) > 1
    run_interrupted(config, tmp_path / "run", "_train_step", step, "sigterm")
    assert pd.read_parquet(tmp_path / "run" / "units.parquet")["t"].max() == 6  # the eighth is made after resuming
    shutil.move(tmp_path / "run", tmp_path / "moved")  # nothing in a folder depends on where it lies
    engine.run(config, tmp_path / "moved")
    assert_same(result(tmp_path / "moved"), result(reference))


def test_run_interrupted_again_and_again(finished, tmp_path):
    config, reference = finished("method=mat")
    summary, times = None, 0
    with pytest.MonkeyPatch.context() as patched:
        original = Training._train_step

        def every_fifth(self: Training, *arguments: Any) -> None:
            original(self, *arguments)
            if self.step % 5 == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(Training, "_train_step", every_fifth)
        while summary is None and times < 20:
            summary, times = engine.run(config, tmp_path / "run"), times + 1
    assert times >= 4
    assert_same(result(tmp_path / "run"), result(reference))


def test_signal_handlers_are_put_back(cache, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    config = small(cache, "method=baseline")
    run_interrupted(config, tmp_path / "run", "_train_step", 1, "sigterm")
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_checkpoint_is_old_or_new_never_half(cache, tmp_path, monkeypatch):
    config = small(cache, "method=baseline")
    run_interrupted(config, tmp_path / "run", "_train_step", 9, "sigterm")
    path = tmp_path / "run" / "checkpoint" / "latest.pt"
    before = path.read_bytes()

    def torn(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        engine.run(config, tmp_path / "run")
    assert path.read_bytes() == before


# --- failure


def poison(self: Training) -> None:
    with torch.no_grad():
        self.model.get_parameter("transform.weight").fill_(math.nan)


FAILURES = [  # before which call of what numbers go bad, a part of the sentence
    ("_train_step", 11, "training diverged at step 10 (loss nan"),
    ("_evaluate", 17, "the validation loss is nan"),
    ("_select", 9, "has diverged"),
]


@pytest.mark.parametrize(("verb", "call", "part"), FAILURES)
def test_divergence_fails_the_run_and_keeps_the_last_good_checkpoint(verb, call, part, finished, tmp_path, monkeypatch):
    config, reference = finished("method=mat")
    folder = tmp_path / "run"
    original, count = getattr(Training, verb), 0

    def broken(self: Training, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            poison(self)
        return original(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(RunFailed) as caught:
        patched.setattr(Training, verb, broken)
        engine.run(config, folder)
    message = str(caught.value)
    assert part in message and str(folder) in message and one_sentence(message), message
    assert json.loads((folder / "failure.json").read_text()) == {"reason": message}
    assert not (folder / "summary.json").exists()
    kept = torch.load(folder / "checkpoint" / "latest.pt", weights_only=True)
    assert kept["step"] == 7 and all(torch.isfinite(t).all() for t in kept["model"].values())
    assert engine.run(config, folder) is not None
    assert not (folder / "failure.json").exists()
    assert_same(result(folder), result(reference))


def test_too_high_a_learning_rate_fails_by_itself(cache, tmp_path):
    config = small(cache, "method=baseline", "train.lr=1e30")
    with pytest.raises(RunFailed, match=r"loss .*nan.* at step \d+.*: lower train.lr"):
        engine.run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["reason"].startswith(str(tmp_path))


def test_missing_cuda_device_is_one_sentence(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = small(cache, "hardware=cuda")
    validate(config)
    with pytest.raises(UserError, match=r"hardware.device=cuda.*hardware=cpu") as caught:
        engine.run(config, tmp_path / "run")
    assert one_sentence(str(caught.value))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["baseline", "mat", "multirate"])
def test_interrupted_run_on_a_gpu_gives_the_same_numbers(method, cache, tmp_path):
    config = small(cache, f"method={method}", *DROPOUT, "hardware=cuda")
    assert engine.run(config, tmp_path / "reference") is not None
    run_interrupted(config, tmp_path / "run", "_train_step", 12, "before")
    assert engine.run(config, tmp_path / "run") is not None
    assert_same(result(tmp_path / "run"), result(tmp_path / "reference"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal needs a machine without a CUDA device")
def test_run_that_was_refused_leaves_its_folder_to_another(cache, tmp_path):
    with pytest.raises(UserError, match="choose hardware=cpu"):
        engine.run(small(cache, "method=baseline", "hardware.device=cuda", steps=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    summary = engine.run(small(cache, "method=baseline", steps=3), tmp_path / "run")
    assert summary is not None and not (tmp_path / "run" / "failure.json").exists()
    assert "device: cpu" in (tmp_path / "run" / "config.yaml").read_text()
