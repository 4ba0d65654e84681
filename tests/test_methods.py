"""Which units train: eqs. (4)-(7) on numbers worked by hand, and what each policy makes of them."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mat.policy import PolicyState, highest, settled, threshold
from mat.suite.config import MethodConfig, SelectionConfig
from mat.suite.errors import UserError
from mat.suite.methods import Method
from mat.units import UnitLayer, Units

LAYERS = (("heads", 6), ("ffn", 9), ("heads", 6), ("ffn", 9))


def make(
    policy: str = "threshold",
    *,
    layers: Sequence[tuple[str, int]] = LAYERS,
    seed: int = 0,
    score: str = "lambda_max",
    temporal: bool = False,
    slow_share: float = 0.5,
    slow_steps: int = 5,
    matched: str | None = None,
    **selection: Any,
) -> Method:
    """A method over made-up layers; ``selection`` goes to the selection's settings."""
    settings = {"units": ["heads", "ffn"], "interval": 0.05, "mode": "cut"}
    if not selection.keys() & {"share", "alpha"}:
        settings["share"] = 1 / 3
    config = MethodConfig(
        name=policy,
        policy=policy,
        score=score,
        temporal=temporal,
        slow_share=slow_share,
        slow_steps=slow_steps,
        matched=matched,
    )
    units = Units([UnitLayer(kind, f"{kind} {i}", n, []) for i, (kind, n) in enumerate(layers)])
    return Method(config, SelectionConfig(**(settings | selection)), units, seed)


def of(policy: str, seed: int, **options: Any) -> Method:
    """A method with the score that its policy needs."""
    return make(
        policy,
        seed=seed,
        score="none" if policy in ("all", "random", "multirate") else "lambda_max",
        **options,
    )


def one_layer(units: int, **options: Any) -> Method:
    return make(layers=[("heads", units)], **options)


def scores(n: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n)


def ones(flags: np.ndarray) -> list[int]:
    """Where the flags are set."""
    return [int(i) for i in np.flatnonzero(flags)]


# --- eqs. (4) and (5)


@pytest.mark.parametrize(
    "score, alpha, level, active",
    [
        ([0, 1, 2, 4], 0.5, 2.0, [2, 3]),  # a tie at the threshold is active
        ([0, 1, 2, 4], 0.51, 2.04, [3]),
        ([1, 2, 3, 5], 0.25, 2.0, [1, 2, 3]),
        ([3, 1, 2, 3], 0.0, 1.0, [0, 1, 2, 3]),
        ([3, 1, 2, 3], 1.0, 3.0, [0, 3]),
        ([7], 0.5, 7.0, [0]),  # one running unit
        ([2, 2, 2], 0.9, 2.0, [0, 1, 2]),
        ([0, 0, 0], 0.5, 0.0, [0, 1, 2]),
        ([0.3, 0.5, 0.9], 1.0, 0.9, [2]),  # low + (high - low) rounds above high here
        ([-4, -2, -1], 0.5, -2.5, [1, 2]),
    ],
)
def test_threshold_by_alpha(
    score: list[float], alpha: float, level: float, active: list[int]
) -> None:
    values = np.array(score, float)
    found = threshold(values, alpha)
    assert found == pytest.approx(level, rel=1e-15)
    assert ones(values >= found) == active


@pytest.mark.parametrize(
    "score, share, active",
    [
        ([5, 1, 4, 2, 3, 0], 1 / 3, [0, 2]),
        ([5, 1, 4, 2, 3, 0], 0.3333333333, [0, 2]),
        ([5, 1, 4, 2, 3, 0], 1.0, [0, 1, 2, 3, 4, 5]),
        ([5, 1, 4, 2, 3, 0], 0.01, [0]),  # at least one
        ([5, 1, 4, 2, 3, 0], 0.0, []),
        ([1, 2, 2, 0], 0.25, [1]),  # a share is a number of units: of equal ones the first
        ([7], 1 / 3, [0]),
        ([1] * 12, 1 / 3, [0, 1, 2, 3]),
    ],
)
def test_a_share_is_a_number_of_units(score: list[float], share: float, active: list[int]) -> None:
    assert ones(highest(np.array(score, float), share)) == active


SCOPED_LAYERS = [("heads", 3), ("ffn", 3), ("heads", 3), ("ffn", 3)]
SCOPED = [9, 8, 1, 20, 30, 300, 20, 10, 5, 60, 70, 400]


@pytest.mark.parametrize(
    "scope, setting, active, levels",
    [
        ("kind", {"share": 1 / 3}, [5, 6, 7, 11], [10, 300, 10, 300]),
        ("layer", {"share": 1 / 3}, [0, 5, 6, 11], [9, 300, 20, 400]),
        ("all", {"share": 1 / 3}, [5, 9, 10, 11], [60, 60, 60, 60]),
        ("kind", {"alpha": 0.5}, [5, 6, 11], [10.5, 210, 10.5, 210]),
        ("layer", {"alpha": 0.5}, [0, 1, 5, 6, 11], [5, 160, 12.5, 230]),
        ("all", {"alpha": 0.5}, [5, 11], [200.5, 200.5, 200.5, 200.5]),
    ],
)
def test_scopes(
    scope: str, setting: dict[str, float], active: list[int], levels: list[float]
) -> None:
    method = make(layers=SCOPED_LAYERS, scope=scope, **setting)
    method.select(np.array(SCOPED, float))
    state = method.select(np.array(SCOPED, float))
    assert ones(state.active) == active
    assert state.threshold.tolist() == np.repeat(levels, 3).tolist()


def test_share_of_zero_leaves_no_unit_active() -> None:
    method = make(share=0.0)
    assert method.select(scores()).active.all()
    assert not method.select(scores()).active.any()


# --- eqs. (6) and (7)


@pytest.mark.parametrize(
    "delta, previous, first, beta, expected",
    [
        (2.1, 2.0, 2.0, 0.1, True),  # |0.1| / 2 = 0.05
        (1.9, 2.0, 2.0, 0.1, True),
        (2.5, 2.0, 2.0, 0.25, False),  # 0.25 is not below 0.25
        (2.5, 2.0, 2.0, 0.26, True),
        (0.0, 0.0, 0.0, 1.0, False),  # Delta_1 = 0 never settles
        (3.0, 3.0, 0.0, 1.0, False),
        (3.0, 3.0, 1e-9, 1e-3, True),
    ],
)
def test_settled(delta: float, previous: float, first: float, beta: float, expected: bool) -> None:
    found = settled(np.array([delta]), np.array([previous]), np.array([first]), beta)
    assert found.tolist() == [expected]


# Scores of five units at t = 0, 1, 2, ...; beta = 0.1. What is worked out by hand: Delta, active
# and stopped units.
COURSE: list[tuple[list[float], list[float], list[int], list[int]]] = [
    ([1, 4, 9, 2, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], []),  # the first interval trains all units
    ([3, 2, 9, 3, 1], [2, 2, 0, 1, 1], [2], []),  # threshold (1 + 9) / 2
    (
        [3.1, 1, 9, 5, 2],
        [2.1, 3, 0, 3, 2],
        [2, 3],
        [0],
    ),  # unit 0: 0.1 / 2, though it was frozen; unit 2: Delta_1 = 0
    (
        [8, 1.1, 9, 6, 3],
        [7, 2.9, 0, 4, 3],
        [2, 3],
        [0, 1],
    ),  # threshold (3 + 9) / 2: unit 3 ties; unit 1: 0.1 / 2
    (
        [99, -5, 9, 6.05, 2],
        [98, 9, 0, 4.05, 2],
        [2],
        [0, 1, 3],
    ),  # 0 and 1 stay out, and outside lam_min and lam_max
    ([0, 0, 9, 9, 1], [1, 4, 0, 7, 1], [2], [0, 1, 3]),
    ([0, 0, 5, 9, 1.01], [1, 4, 4, 7, 1.01], [2], [0, 1, 3, 4]),  # one running unit: active
    ([0, 0, 0, 0, 0], [1, 4, 9, 2, 0], [2], [0, 1, 3, 4]),
]


def test_course_of_mat() -> None:
    method = one_layer(5, alpha=0.5, beta=0.1, temporal=True)
    for t, (score, delta, active, stopped) in enumerate(COURSE):
        assert method.needs_score
        state = method.select(np.array(score, float))
        assert state.t == t
        assert state.delta == pytest.approx(delta, abs=1e-12), f"t={t}"
        assert (ones(state.active), ones(state.stopped)) == (active, stopped), f"t={t}"
        assert state.score.tolist() == score
    assert state.first_score.tolist() == COURSE[0][0]
    assert state.first_delta.tolist() == COURSE[1][1]


def test_without_the_temporal_policy_no_unit_stops() -> None:
    method = one_layer(5, alpha=0.5, beta=0.1)
    stopped = [method.select(np.array(score, float)).stopped.any() for score, *_ in COURSE]
    assert not any(stopped)


def test_stopping_is_checked_from_the_second_selection_after_initialisation() -> None:
    """With beta above the ratio 1 of t = 1 every unit would stop there."""
    method = one_layer(3, alpha=0.0, beta=1.5, temporal=True)
    counts = [
        int(method.select(np.array(s, float)).stopped.sum())
        for s in ([1, 2, 3], [2, 4, 6], [2, 4, 6])
    ]
    assert counts == [0, 0, 3]
    assert not method.state.active.any()
    assert not method.select(np.array([5, 5, 5], float)).active.any()


def test_threshold_of_a_scope_that_has_stopped_is_missing() -> None:
    method = make(layers=[("heads", 2), ("ffn", 2)], share=0.5, beta=0.1, temporal=True)
    for score in ([1, 2, 1, 2], [2, 3, 2, 3], [2, 3, 4, 6]):
        state = method.select(np.array(score, float))
    assert ones(state.stopped) == [0, 1] and ones(state.active) == [3]
    np.testing.assert_array_equal(state.threshold, [np.nan, np.nan, 6, 6])


# --- policies


def course(method: Method, selections: int = 4, seed: int = 0) -> list[list[int]]:
    """Active units at each selection."""
    found = []
    for t in range(selections):
        state = method.select(scores(seed=seed + t) if method.needs_score else None)
        found.append(ones(state.active))
    return found


def per_layer(active: list[int]) -> list[int]:
    """Active units of each of LAYERS."""
    edges = [0, *itertools.accumulate(n for _, n in LAYERS)]
    return [sum(low <= i < high for i in active) for low, high in itertools.pairwise(edges)]


def test_baseline_selects_nothing() -> None:
    method = make("all", score="none")
    assert not method.selects and not method.needs_score and not method.drifts
    assert method.active_at(0).all() and method.active_at(7).all()


def test_lowest_takes_the_other_end() -> None:
    score = np.array([5, 1, 4, 2, 3, 0], float)
    method = one_layer(6, policy="lowest", share=1 / 3)
    method.select(score)
    state = method.select(score)
    assert ones(state.active) == [1, 5]
    assert set(state.threshold) == {1.0}, "the threshold is told in the scores' own sign"
    assert state.score.tolist() == score.tolist()


def test_shuffled_keeps_the_scores_of_each_kind_and_moves_them() -> None:
    """As many units of each kind as MAT has, but others, drawn anew at each selection."""
    shuffled, mat = course(make("shuffled"), 6), course(make(), 6)
    heads = {*range(6), *range(15, 21)}
    for t in range(1, 6):
        assert len(shuffled[t]) == len(mat[t]) == 10
        assert len(heads & {*shuffled[t]}) == len(heads & {*mat[t]}) == 4
        assert shuffled[t] != mat[t]
    same_scores, reference = make("shuffled"), make()
    two_scales = scores() + 100 * (same_scores.policy.kind == "ffn")
    for method in (same_scores, reference):
        method.select(two_scales)
        method.select(two_scales)
    assert same_scores.state.threshold.tolist() == reference.state.threshold.tolist(), (
        "a kind keeps its scores"
    )
    same_scores = make("shuffled")
    sets = [ones(same_scores.select(scores()).active) for _ in range(4)]
    assert len({tuple(s) for s in sets[1:]}) == 3
    assert same_scores.state.score.tolist() == scores().tolist(), (
        "what is recorded is what was measured"
    )


@pytest.mark.parametrize(
    "policy, selections",
    [
        ("all", 0),
        ("multirate", 1),
        ("static", 2),
        ("random", 9),
        ("threshold", 9),
        ("lowest", 9),
        ("shuffled", 9),
    ],
)
def test_selections_are_due_at_every_interval_until_the_method_has_made_its_last(
    policy: str, selections: int
) -> None:
    """Intervals of 1/8 of the run: at 0, 1/8, ..., 1."""
    method = of(policy, 0, interval=0.125)
    for t in range(selections):
        assert not method.is_due(0.125 * t - 1e-9)
        assert method.is_due(0.125 * t)
        method.select(scores(seed=t) if method.needs_score else None)
    assert not method.is_due(1.0)


def test_no_selection_is_due_when_all_units_have_stopped() -> None:
    method = one_layer(2, alpha=0.5, beta=0.1, temporal=True)
    due = []
    for score in ([1, 2], [2, 3], [2, 4], [2, 4]):
        due.append(method.is_due(1.0))
        method.select(np.array(score, float))
    assert due == [True] * 4 and not method.is_due(1.0)


def test_static_keeps_the_set_of_mats_first_selection() -> None:
    method = make("static")
    sets = course(method, 2)
    assert sets == course(make(), 2)
    assert ones(method.active_at(1000)) == sets[1]


@pytest.mark.parametrize(
    "share, counts", [(1 / 3, [2, 3, 2, 3]), (0.5, [3, 4, 3, 4]), (0.0, [0] * 4), (1.0, [6, 9] * 2)]
)
def test_random_draws_a_share_of_every_kind_and_layer(share: float, counts: list[int]) -> None:
    method = make("random", score="none", share=share)
    assert method.selects and not method.needs_score
    sets = course(method, 6)
    assert sets[0] == list(range(30))
    assert all(per_layer(s) == counts for s in sets[1:])
    if 0 < share < 1:
        assert len({tuple(s) for s in sets[1:]}) == 5, "drawn anew at every selection"


def test_random_draws_uniformly() -> None:
    """Over 3,000 draws of 2 of 6 each unit comes 1,000 times; the standard deviation is 26."""
    drawn = np.zeros(6)
    method = one_layer(6, policy="random", score="none", share=1 / 3)
    method.select(None)
    for _ in range(3000):
        drawn += method.select(None).active
    assert np.abs(drawn - 1000).max() < 4 * 26, drawn


@pytest.mark.parametrize(
    "slow_share, fast", [(0.5, [3, 4, 3, 4]), (1 / 3, [4, 6, 4, 6]), (1.0, [0] * 4)]
)
def test_multirate_splits_once_into_fast_and_slow(slow_share: float, fast: list[int]) -> None:
    method = make("multirate", score="none", slow_share=slow_share, slow_steps=4)
    assert method.drifts and not method.needs_score
    first = ones(method.select(None).active)
    assert per_layer(first) == fast
    assert [bool(method.active_at(step).all()) for step in range(9)] == [
        step % 4 == 0 for step in range(9)
    ]
    assert ones(method.active_at(3)) == first
    assert ones(method.select(None).active) == first


# --- counts of another run


def write_finished_run(folder: Path, rows: list[tuple[int, str, int, int, bool]]) -> str:
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=["t", "kind", "layer", "unit", "active"]).to_parquet(
        folder / "units.parquet"
    )
    (folder / "summary.json").write_text(json.dumps({}))
    return str(folder)


def matched_rows(counts: dict[int, list[int]]) -> list[tuple[int, str, int, int, bool]]:
    """``counts``: active units of each of LAYERS at each selection."""
    depth = {"heads": iter((0, 1)), "ffn": iter((0, 1))}
    layers = [(kind, next(depth[kind]), n) for kind, n in LAYERS]
    return [
        (t, kind, layer, u, u < active)
        for t, per in counts.items()
        for (kind, layer, n), active in zip(layers, per, strict=True)
        for u in range(n)
    ]


def test_matched_takes_the_counts_of_a_run(tmp_path: Path) -> None:
    counts = {0: [6, 9, 6, 9], 1: [1, 0, 5, 9], 2: [0, 7, 2, 3]}
    run = write_finished_run(tmp_path / "run", matched_rows(counts))
    sets = course(make("random", score="none", matched=run), 5)
    assert [per_layer(s) for s in sets] == [counts[0], counts[1], counts[2], counts[2], counts[2]]
    assert sets[3] != sets[4], "the counts of the last selection go on, the units are drawn anew"


@pytest.mark.parametrize("missing", ["units.parquet", "summary.json"])
def test_matched_run_must_be_finished(tmp_path: Path, missing: str) -> None:
    run = write_finished_run(tmp_path / "run", matched_rows({0: [6, 9, 6, 9]}))
    (Path(run) / missing).unlink()
    with pytest.raises(UserError, match=f"method.matched={run} is not a finished run"):
        make("random", score="none", matched=run)


@pytest.mark.parametrize(
    "layers", [(*LAYERS, ("heads", 6)), (("heads", 2), *LAYERS[1:])], ids=["deeper", "narrower"]
)
def test_matched_run_must_have_the_same_units(
    tmp_path: Path, layers: tuple[tuple[str, int], ...]
) -> None:
    run = write_finished_run(tmp_path / "run", matched_rows({0: [6, 9, 6, 9], 1: [3, 3, 3, 3]}))
    with pytest.raises(UserError, match=f"method.matched={run} has other units"):
        make("random", score="none", matched=run, layers=layers)


# --- chance and memory

CHANCE = ["random", "shuffled", "multirate"]


@pytest.mark.parametrize("policy", CHANCE)
def test_choices_depend_on_the_seed_alone(policy: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = course(of(policy, 3))
    torch.manual_seed(2)
    np.random.seed(2)
    assert course(of(policy, 3)) == first
    assert course(of(policy, 4)) != first


@pytest.mark.parametrize("policy", [*CHANCE, "threshold", "lowest", "static"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_state_round_trip_goes_on_as_if_nothing_had_happened(policy: str, after: int) -> None:
    """Through plain numbers and lists, as a checkpoint has them."""
    straight, stopped, resumed = (
        of(policy, 5, temporal=policy == "threshold", beta=0.3) for _ in range(3)
    )

    def select(method: Method, t: int) -> PolicyState:
        return method.select(scores(seed=t) if method.needs_score else None)

    for t in range(after):
        select(straight, t)
        select(stopped, t)
    saved = stopped.policy.state_dict()
    assert all(isinstance(v, int | list) for v in saved.values())
    resumed.policy.load_state_dict(json.loads(json.dumps(saved)))
    for t in range(after, 6):
        expected, found = select(straight, t), select(resumed, t)
        assert expected.t == found.t == t
        for name, value in vars(expected).items():
            if name != "t":
                np.testing.assert_array_equal(
                    getattr(found, name), value, err_msg=f"{name} at t={t}"
                )
                assert getattr(found, name).dtype == value.dtype, name
        np.testing.assert_array_equal(resumed.active_at(t), straight.active_at(t))
    if policy == "threshold":
        assert straight.state.stopped.any() and not straight.state.stopped.all()
