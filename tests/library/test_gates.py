"""Selections, state, tables and refusals of the gates of an attached model."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import build

import mat
from mat.gates import Gates
from mat.layers.gate import Indices

SKIPPED = "mat/skipped_backward_by_weights"


class Estimator:
    """In the place of ``mat.ntk``: scores that are written down, and what was asked for."""

    def __init__(self, scores: list[list[float]]) -> None:
        self.scores, self.calls = iter(scores), []

    def estimate(self, model: nn.Module, batch: Any, units: Any, **options: Any) -> SimpleNamespace:
        self.calls.append({"batch": batch, **options})
        return self.result()

    def Online(self, model: nn.Module, units: Any) -> "Estimator":
        return self

    def __enter__(self) -> "Estimator":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self) -> SimpleNamespace:
        scores = np.array(next(self.scores))
        return SimpleNamespace(lambda_max=scores, squared_norm=scores**2)


@pytest.fixture
def estimator(monkeypatch: pytest.MonkeyPatch) -> Estimator:
    # Two layers of three units; from one selection to the next, the first unit changes ever less.
    scores = [
        [1, 2, 3, 4, 5, 6],
        [2, 2.5, 9, 8, 1, 3],
        [2.0004, 7, 8, 7, 8.5, 0],
        [9, 1, 2, 3, 9, 9],
    ]
    stub = Estimator(scores)
    monkeypatch.setitem(sys.modules, "mat.ntk", stub)
    monkeypatch.setattr(mat, "ntk", stub, raising=False)
    return stub


def attached(**options: Any) -> Gates:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    return mat.attach_(model, mat.MATConfig(groups=3, every=10, **{"log": False} | options))


def test_selections_follow_the_equations(estimator: Estimator) -> None:
    gates = attached(alpha=0.5, beta=1e-3)
    probe = torch.ones(2, 4)
    made = [step for step in range(25) if gates.maybe_select(step, probe)]
    assert made == [0, 10, 20]
    # t = 1: lambda_alpha = 1 + (9 - 1) / 2 = 5. t = 2: unit 0 has settled (4e-4 < 1e-3) and stops.
    state = gates.policy.state
    assert state.stopped.tolist() == [True, False, False, False, False, False]
    assert gates.active.tolist() == [False, True, True, True, True, False]
    assert set(state.threshold) == {4.25}


def test_first_selection_leaves_all_active(estimator: Estimator) -> None:
    gates = attached()
    assert gates.maybe_select(7, torch.ones(2, 4))
    assert gates.active.all() and gates.policy.state.t == 0


def test_steps_may_start_anew_in_each_epoch() -> None:
    gates = attached(rule="random", share=0.5)
    made = [(e, step) for e in range(3) for step in range(8) if gates.maybe_select(step)]
    assert made == [(0, 0), (1, 2), (2, 4)]


def test_probe_is_the_first_batch_kept(estimator: Estimator) -> None:
    gates = attached()
    batch = {"x": torch.ones(2, 4)}
    gates.maybe_select(0, batch)
    batch["x"].zero_()
    for step in range(1, 11):
        gates.maybe_select(step, {"x": torch.zeros(2, 4)})
    assert estimator.calls[1]["batch"]["x"].eq(1).all()


def test_missing_probe_is_named(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match=r"maybe_select\(step, batch\)"):
        attached().maybe_select(0)


def test_gradient_norms_are_scores_of_the_loss(estimator: Estimator) -> None:
    gates = attached(score="gradnorm")
    gates.maybe_select(0, torch.ones(2, 4), loss=lambda out, batch: out.sum())
    assert estimator.calls[0]["reduction"] == "loss"
    assert gates.policy.state.score.tolist() == [1, 2, 3, 4, 5, 6]


def test_online_scores_come_from_a_step_of_all_units(estimator: Estimator) -> None:
    gates = attached(alpha=0.5, reduction="online")
    history = []
    for step in range(14):
        made = gates.maybe_select(step)
        history.append((made, int(gates.active.sum())))
    assert history[0] == (False, 6) and history[1] == (True, 6)
    assert history[2:10] == [(False, 6)] * 8
    assert history[10] == (False, 6) and history[11] == (True, 2)
    assert history[12:] == [(False, 2)] * 2


def test_scores_of_a_step_survive_a_checkpoint(estimator: Estimator) -> None:
    first, second = attached(reduction="online", alpha=0.5), attached(reduction="online", alpha=0.5)
    for step in range(11):
        first.maybe_select(step)
    second.load_state_dict(first.state_dict())  # between the step that is read and the next
    assert first.maybe_select(11) and second.maybe_select(11)
    assert (first.active == second.active).all() and not first.active.all()


@pytest.mark.parametrize(
    "options", [{}, {"score": "gradnorm"}, {"reduction": "online"}], ids=["mntk", "norms", "online"]
)
def test_estimators_scores_select_a_share(options: dict[str, Any]) -> None:
    ids = torch.arange(24).view(4, 6)
    batch = {"input_ids": ids, "labels": ids}
    model, _ = build("bert")
    gates = mat.attach_(model, mat.MATConfig(share=0.5, every=2, log=False, **options))
    for step in range(4):
        gates.maybe_select(step, batch)
        model(**batch).loss.backward()
        model.zero_grad()
    assert gates.policy.state.t == 1 and gates.active.sum() == 12
    assert len(set(gates.policy.state.score.tolist())) == 24


@pytest.mark.parametrize(("rule", "counts"), [("random", [6, 2, 2]), ("all", [6, 6, 6])])
def test_controls_need_no_probe(rule: str, counts: list[int]) -> None:
    gates = attached(rule=rule, share=1 / 3)
    found = []
    for step in range(21):
        gates.maybe_select(step)
        if step % 10 == 0:
            found.append(int(gates.active.sum()))
    assert found == counts


def test_given_scores_select() -> None:
    gates = attached(share=0.5)
    gates.select(np.arange(6.0))
    gates.select(np.arange(6.0))
    assert gates.active.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "needs a score"),
        (np.ones(5), "for 6 units"),
        (np.array([1, 2, 3, np.nan, 5, 6]), "ffn 2 unit 0 is not finite"),
    ],
)
def test_bad_scores_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached().select(scores)


def test_every_change_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    gates = attached(share=0.5, log=True)
    capsys.readouterr()
    gates.select(np.arange(6.0))
    gates.select(np.arange(6.0), 10)
    assert capsys.readouterr().out.splitlines() == [
        "MAT: selection 0: 6 of 6 units active; ffn 3 3; 0 stopped",
        "MAT: selection 1 at step 10: 3 of 6 units active; ffn 0 3; 0 stopped",
    ]


def test_numbers_for_trackers_name_shares_and_thresholds() -> None:
    gates = attached(share=0.5)
    assert gates.log_numbers() == {"mat/active": 1, "mat/stopped": 0, SKIPPED: 0}
    for _ in range(2):
        gates.select(np.arange(6.0))
    numbers = gates.log_numbers()
    assert numbers["mat/active"] == 0.5 and numbers["mat/threshold/ffn"] == 3
    assert numbers[SKIPPED] == pytest.approx(24 / 72)  # of 24 + 36 + 12 weights


def test_gates_print_as_a_table_by_layer() -> None:
    gates = attached(mode="exact")
    gates.set_active([True, False, False, True, True, True])
    lines = [line.split() for line in repr(gates).splitlines()]
    assert lines[1] == ["0", "ffn", "1", "of", "3", "0", "33.3%"]
    assert lines[-1] == ["all", "4", "of", "6", "0", "11.1%"]


def test_pending_gradients_refuse_a_new_set() -> None:
    gates = attached()
    gates.model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients of 0.weight are pending"):
        gates.set_active(np.zeros(6, bool))
    gates.set_active(np.ones(6, bool))  # no change
    gates.model.zero_grad()
    gates.set_active(np.zeros(6, bool))


def test_state_goes_through_a_file(estimator: Estimator, tmp_path: Any) -> None:
    first, second = attached(alpha=0.5), attached(alpha=0.5)
    for step in range(21):
        first.maybe_select(step, torch.ones(2, 4))
    torch.save(first.state_dict(), tmp_path / "gates.pt")
    second.load_state_dict(torch.load(tmp_path / "gates.pt"))
    assert (second.active == first.active).all() and not second.active.all()
    assert torch.equal(second.probe, first.probe)
    for name, value in vars(first.policy.state).items():
        np.testing.assert_equal(getattr(second.policy.state, name), value)
    assert [step for step in range(21, 35) if second.maybe_select(step)] == [30]


def test_state_of_another_partition_is_refused_by_name() -> None:
    saved = attached().state_dict()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    other = mat.attach_(model, mat.MATConfig(groups=2, log=False))
    with pytest.raises(ValueError, match=r"units of 0 are 2 ffn .* here and 3 ffn"):
        other.load_state_dict(saved)
    bert = mat.attach_(build("bert")[0], mat.MATConfig(log=False))
    with pytest.raises(ValueError, match=r"units of bert.* are in this model alone"):
        bert.load_state_dict(saved)


def test_kinds_that_are_not_asked_for_stay_ungated() -> None:
    gates = mat.attach_(build("bert")[0], mat.MATConfig(units=("ffn",), log=False))
    assert set(gates.units.kind) == {"ffn"}
    with pytest.raises(ValueError, match="there are no experts"):
        mat.attach_(build("bert")[0], mat.MATConfig(units=("experts",), log=False))


def test_attaching_twice_and_detaching_none_are_refused() -> None:
    gates = attached()
    with pytest.raises(ValueError, match="attached to this model already"):
        mat.attach_(nn.Sequential(gates.model))
    mat.detach_(gates.model)
    with pytest.raises(ValueError, match="not attached"):
        mat.detach_(gates.model)


def test_detaching_ends_an_online_reading() -> None:
    model, _ = build("bert")
    gates = mat.attach_(model, mat.MATConfig(reduction="online", log=False))
    gates.maybe_select(0)
    assert model._forward_pre_hooks
    mat.detach_(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_active_set_is_read_only() -> None:
    gates = attached()
    with pytest.raises(ValueError, match="read-only"):
        gates.active[0] = False
    assert gates.active.all()


def test_a_refused_selection_is_none() -> None:
    gates = attached(share=0.5)
    gates.select(np.arange(6.0))
    before = str(gates.policy.state_dict())
    gates.model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="are pending"):
        gates.select(np.arange(6.0))
    assert str(gates.policy.state_dict()) == before
    gates.model.zero_grad()
    gates.select(np.arange(6.0))
    assert gates.policy.state.t == 1 and gates.active.sum() == 3


def test_indices_follow_a_model_to_its_device() -> None:
    gates = attached()
    gates.set_active([True, False, True, False, True, False])
    for gate in gates.layers:  # as they are once a model has left another device
        gate.device, gate._indices = torch.device("meta"), Indices()
        for part in gate.parts.values():
            part.update()
    assert {index.device.type for index in gates.indices()} == {"meta"}
    gates.model(torch.ones(2, 4)).sum().backward()
    assert {index.device.type for index in gates.indices()} == {"cpu"}


def test_multirate_is_refused_with_what_to_call() -> None:
    with pytest.raises(ValueError, match=r"mat.AdamW\(...\).drift\(\)"):
        attached(rule="multirate")
