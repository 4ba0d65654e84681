"""Whole runs: the folder they leave, the budget they keep, and that they learn."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from short_runs import (
    ONLINE,
    STEP,
    assert_same,
    events,
    one_sentence,
    run_interrupted,
    small,
    summary_of,
    unseal,
)  # fmt: skip

from mat import policy
from mat.suite import engine
from mat.suite.engine import PFLOP, Training
from mat.suite.errors import UserError
from mat.suite.runs import RunFolder

COLUMNS = ["pflops_forward", "pflops_input_grad", "pflops_weight_grad", "pflops_overhead"]
EVENT = {
    "event", "step", "epoch", "split", "loss", "active_share", "pflops", "pflops_vocabulary",
    "pflops_needed", "seconds", *COLUMNS,
}  # fmt: skip
EXTRA: dict[str, set[str]] = {
    "start": {"unigram_entropy"},
    "train": {"lr", "active_now"},
    "selection": {"active_now"},
    "evaluation": {"mark"},
    "test": set(),
}
SUMMARY = {
    "method", "model", "mode", "seed", "steps", *COLUMNS, "pflops", "pflops_vocabulary",
    "pflops_needed", "seconds", "seconds_estimator", "best_validation_loss", "best_step",
    "pflops_to_best", "seconds_to_best", "test_loss", "active_share", "unigram_entropy",
    "selections", "parameters",
}  # fmt: skip


# --- the run folder


def test_run_folder_is_complete(finished):
    config, folder = finished("method=mat")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files - {".lock"} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "units.parquet",
        "summary.json",
        "checkpoint/latest.pt",
        f"checkpoint/best-{summary_of(folder)['best_step']}.pt",
    }
    assert OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) == dataclasses.asdict(
        config
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.keys() == {
        "command",
        "commit",
        "dirty",
        "versions",
        "device",
        "device_name",
        "threads",
        "precision",
        "exclusive",
    }
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
    assert [e["step"] for e in lines if e["event"] == "train"] == list(
        range(5, lines[-1]["step"] + 1, 5)
    )


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
    read = {
        "best_validation_loss": best["loss"],
        "best_step": best["step"],
        "pflops_to_best": best["pflops"],
        "seconds_to_best": best["seconds"],
        "test_loss": lines[-1]["loss"],
    }
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
    assert list(units.columns) == [
        "t",
        "step",
        "pflops",
        "kind",
        "layer",
        "unit",
        "lambda_max",
        "delta",
        "threshold",
        "active",
        "stopped",
        "distance",
    ]
    n = summary_of(folder)["selections"]
    assert n >= 14 and len(units) == n * 6  # two heads and four groups
    assert not units.duplicated(["t", "kind", "layer", "unit"]).any() and sorted(
        set(units["t"])
    ) == list(range(n))
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


def test_a_complete_run_stands_whatever_it_was_made_on_but_a_begun_one_goes_on_there(
    cache, tmp_path
):
    config = small(cache, "method=mat", steps=12)
    other, rougher = (
        dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, **changed))
        for changed in ({"estimator_bytes": 2**21}, {"precision": "bfloat16"})
    )
    run_interrupted(config, tmp_path / "run", "_train_step", 3, "sigterm")
    with pytest.raises(UserError, match=r"holds a run with another hardware.estimator_bytes"):
        engine.run(other, tmp_path / "run")
    summary = engine.run(config, tmp_path / "run")
    assert summary is not None and engine.run(other, tmp_path / "run") == summary
    with pytest.raises(UserError, match=r"holds a run with another hardware.precision"):
        engine.run(rougher, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.lr", 2e-2), ("selection.share", 0.5), ("dataset.length", 8), ("method.budget", 0.5)],
)
def test_folder_of_another_run_is_refused_by_name(finished, key, value):
    config, folder = finished("method=mat")
    other = OmegaConf.create(dataclasses.asdict(config))
    OmegaConf.update(other, key, value)
    group, name = key.split(".")
    changed = dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
    )
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


def test_a_run_made_when_a_key_still_existed_stands_at_the_value_that_is_left_of_it(
    cache, tmp_path
):
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
    [
        *(
            (f"method={m}",)
            for m in ("baseline", "rand", "multirate", "mat", "static", "gradnorm", "fitted")
        ),
        ONLINE,
    ],
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
    assert (
        last["step"] == summary_of(folder)["steps"]
        and last["pflops"] == summary_of(folder)["pflops"]
    )
    spent, budget = last["pflops"], config.train.pflops * config.method.budget
    first_estimate = events(folder, "selection")[0]["pflops_overhead"]
    assert spent <= budget < spent + first_estimate  # it was a selection that did not fit


@pytest.mark.parametrize("stop", [True, False])
def test_run_may_end_when_all_units_have_stopped(stop, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "settled", lambda delta, *rest: np.ones(len(delta), bool))
    config = small(cache, "method=mat", f"train.stop_when_settled={stop}")
    summary = engine.run(config, tmp_path / "run")
    assert (
        summary is not None and summary["selections"] == 3
    )  # all stop at t = 2; there is nothing left to select
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
    marks = [
        0.25,
        0.3484,
        0.35,
        0.65,
    ]  # of the plan; all but one meet a regular evaluation, the last one the end
    pflops = 51 * STEP["text"]  # here they meet but for rounding
    assert 14 * 0.025 * (pflops * PFLOP) != 0.35 * pflops * PFLOP
    given = [
        f"train.marks={[m * pflops for m in marks]}",
        f"train.pflops={pflops}",
        "method.budget=0.65",
    ]
    config, folder = finished(f"method={method}", *given)
    evaluations = events(folder, "evaluation")
    for mark in config.train.marks:
        read = [e for e in evaluations if e["mark"] == mark]
        assert len(read) == 1 and read[0]["pflops"] <= mark
        later = next((e for e in evaluations if e["step"] > read[0]["step"]), None)
        assert later is None or later["pflops"] > mark - 0.025 * pflops
    assert len(evaluations) == 26 + 1
    overhead = max(np.diff([e["pflops_overhead"] for e in evaluations]))
    assert (
        max(np.diff([e["pflops"] for e in evaluations])) <= 0.025 * pflops + STEP["text"] + overhead
    )
    assert evaluations[-1]["step"] == summary_of(folder)["steps"]


# --- learning


def test_baseline_learns(finished):
    _, folder = finished("method=baseline", "train.lr=1e-2", steps=200)
    losses = [e["loss"] for e in events(folder, "evaluation")]
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    summary = summary_of(folder)
    assert (
        summary["best_validation_loss"] < losses[0] - 0.35
        and summary["test_loss"] < losses[0] - 0.35
    )
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
        return Training(
            config, RunFolder(tmp_path / "_".join(overrides), config)
        ).model.state_dict()

    first = start("method=mat", "seed=1")
    for method in ("baseline", "rand", "multirate", "gradnorm"):
        assert_same(start(f"method={method}", "seed=1"), first)
    assert not torch.equal(start("method=mat", "seed=2")["tokens.weight"], first["tokens.weight"])


def test_seeds_differ_from_the_first_step_on(finished):
    losses = [
        events(finished("method=rand", f"seed={seed}")[1], "evaluation")[-1]["loss"]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_accumulation_is_the_same_step(finished, precision):
    folders = [
        finished(
            "method=baseline",
            f"hardware.precision={precision}",
            f"train.accumulation={n}",
            steps=10,
        )[1]
        for n in (1, 4)
    ]
    losses = [
        [e["loss"] for e in events(folder) if e["event"] in ("train", "evaluation")]
        for folder in folders
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "float32" else 1e-2)
