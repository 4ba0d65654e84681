"""Claims and their statistics on numbers that can be checked by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mat.suite.errors import UserError
from mat.suite.glance import look
from results import alpha, claims
from results.measures import ACCURACY, LOSS
from results.paired import HELD, NOT_HELD, OPEN, interval, permutation_p, verdict
from results.specs import PAPER_TABLE_1, PAPER_TABLE_3
from tests.test_results import texts, write_run

EXPERIMENT = claims.Experiment("T", "t", "bert_mini", "alpha", PAPER_TABLE_1)
BY_ALPHA = {"method__policy": "threshold", "selection__alpha": 0.1, "selection__share": None}
BY_SHARE = {"method__policy": "threshold", "selection__alpha": None, "selection__share": 0.3}


def brute_force_p(values: np.ndarray) -> float:
    """Share of all choices of signs whose sum is at least as far from zero."""
    n = len(values)
    signs = [[1 - 2 * (k >> i & 1) for i in range(n)] for k in range(2**n)]
    sums = np.abs(np.array(signs) @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12))


@pytest.mark.parametrize("values", [[1.0, 2, 3], [1, -2, 4, -8, 16], [3, 1, 4, 1, 5, 9, 2, 6]])
def test_permutation_p_counts_all_choices_of_signs(values: list[float]) -> None:
    given = np.array(values, float)
    assert permutation_p(given) == pytest.approx(brute_force_p(given))


def test_eight_equal_signs_have_p_of_two_in_256() -> None:
    assert permutation_p(np.arange(1.0, 9)) == 2 / 256


def test_interval_of_two_values_reaches_both() -> None:
    # of the four samples of two values each, one in four is twice the lowest
    assert interval(np.array([1.0, 3.0])) == (1, 3)


def test_interval_holds_the_mean_and_shrinks_with_more_values() -> None:
    few, many = np.array([0.0, 1.0, 2.0, 3.0]), np.tile([0.0, 1.0, 2.0, 3.0], 16)
    for values in (few, many):
        low, high = interval(values)
        assert low < 1.5 < high
    assert np.diff(interval(many)) < 0.4 * np.diff(interval(few))
    assert interval(few) == interval(few)


FIVE = [-1.0, -1.1, -1.2, -0.9, -1.0]


@pytest.mark.parametrize(
    ("values", "side", "told"),
    [
        (FIVE, -1, HELD),
        (FIVE, 1, NOT_HELD),
        (FIVE[:4], -1, OPEN),  # too few seeds
        ([*FIVE[:4], 0.01], -1, OPEN),  # one sign of five differs, though the interval is below 0
        ([-5.0, 5, -4, 4, 0.5], -1, OPEN),
        ([*FIVE, -1.0, -1.0, 0.01], -1, HELD),  # of eight one may, if p allows it
        ([*FIVE, -1.0, -1.0, 2.9], -1, OPEN),
        ([*FIVE[:4], math.nan], -1, OPEN),
        ([1.0, 1, 1, 1, math.nan], -1, NOT_HELD),
        ([math.nan] * 5, -1, NOT_HELD),
        ([math.nan] * 3, -1, OPEN),
        ([], -1, OPEN),
    ],
)
def test_verdicts_follow_the_stated_rule(values: list[float], side: int, told: str) -> None:
    assert verdict(np.array(values, float), side) == told


def test_the_papers_numbers_are_computed_from_its_tables() -> None:
    first = {c.text: claims.paper_value(c, EXPERIMENT) for c in EXPERIMENT.claims()}
    assert first["MAT ends better than the baseline"] == pytest.approx(4.27 - 4.41)
    share = first["MAT reaches the baseline's best with the paper's share of its FLOPs"]
    assert share == pytest.approx(16.5 / 28.7)
    assert first["MAT ends better than its first set, kept"] is None


def runs(root: Path, seeds: int = 5) -> None:
    """The baseline is best at 3 of its 4 PFLOPs; MAT by alpha 1 better and there after 1."""
    for seed in range(seeds):
        write_run(root, "baseline", seed, [9, 8, 6, 7])
        write_run(root, "mat", seed, [6, 5, 5, 5], folder="mat,alpha", **BY_ALPHA)
        write_run(root, "mat", seed, [9, 9, 9, 7 + seed], folder="mat,share", **BY_SHARE)


def test_rows_are_told_apart_by_what_decides(tmp_path: Path) -> None:
    runs(tmp_path, seeds=2)
    rows = claims.read_rows(tmp_path, "t")
    expected = {("mat", "alpha"), ("mat", "share"), ("baseline", "")}
    assert {row[1:] for row in rows} == expected
    assert all(sorted(row) == [0, 1] for row in rows.values())


def test_matched_rows_are_decided_as_their_run(tmp_path: Path) -> None:
    runs = "t/method=mat/seed=0", "t/method=mat,selection.alpha=0.1/seed=1"
    for seed, matched in enumerate(runs):
        path = write_run(tmp_path, "rand_matched", seed, [1, 1, 1, 1], method__matched=matched)
        assert claims.row_of(look(path))[2] == ("share", "alpha")[seed]  # type: ignore[arg-type]


def test_a_row_of_two_configurations_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "mat", 0, [1, 1, 1, 1], **BY_ALPHA)
    other = {**BY_ALPHA, "selection__alpha": 0.2}
    write_run(tmp_path, "mat", 1, [1, 1, 1, 1], folder="other", **other)
    with pytest.raises(UserError, match=r"another selection\.alpha"):
        claims.read_rows(tmp_path, "t")


def test_values_pair_the_seeds_that_both_rows_have(tmp_path: Path) -> None:
    runs(tmp_path, seeds=3)
    write_run(tmp_path, "fitted", 1, [9, 8, 7, 5.5])
    write_run(tmp_path, "fitted", 7, [9, 8, 7, 5.5])
    rows = claims.read_rows(tmp_path, "t")
    baseline, mat = EXPERIMENT.row("baseline"), EXPERIMENT.row("mat", "alpha")
    against_fitted = claims.Claim("c", mat, EXPERIMENT.row("fitted"))
    seeds, values = claims.paired_values(against_fitted, rows, LOSS)
    assert seeds == [1] and values == pytest.approx([-0.5])
    _, ratios = claims.paired_values(claims.Claim("c", mat, baseline, None), rows, LOSS)
    assert ratios == pytest.approx([1 / 3] * 3)
    share = EXPERIMENT.row("mat", "share")
    _, never = claims.paired_values(claims.Claim("c", share, baseline, None), rows, LOSS)
    assert np.isnan(never).all()


def test_claims_become_lines_with_verdicts(tmp_path: Path) -> None:
    runs(tmp_path)
    section = claims.section(EXPERIMENT, tmp_path)
    assert section is not None
    lines = {line[0]: line[1:] for line in section.rows(str, "{}")}
    assert lines["MAT ends better than the baseline"] == [
        "-0.140", "-1.000 [-1.000, -1.000]", ", ".join(["-1.000"] * 5), "5 of 5", "–", HELD
    ]  # fmt: skip
    flops = lines["MAT reaches the baseline's best with the paper's share of its FLOPs"]
    assert flops[0] == "0.575" and flops[-1] == HELD
    assert lines["random units end worse"][2:] == ["no runs", "0 of 0", "–", OPEN]
    assert lines["MAT ends better than by share"][3] == "5 of 5"
    assert "MAT ends better than lowest first" not in lines  # neither runs nor the paper's number


def test_rows_are_described_over_their_seeds(tmp_path: Path) -> None:
    for seed, last in enumerate((5.0, 7.0)):
        path = write_run(tmp_path, "mat", seed, [9, 8, 8, last], **BY_ALPHA)
        eigenvalues = [1.0, 2.0, 4.0, np.nan, 1.0, 2.0, 6.0 + 6 * seed, np.nan]
        units = pd.DataFrame({
            "t": [1] * 4 + [2] * 4, "kind": "heads", "layer": 0, "unit": [0, 1, 2, 3] * 2,
            "lambda_max": eigenvalues, "active": True, "stopped": [False] * 7 + [True],
        })  # fmt: skip
        units.to_parquet(path / "units.parquet")
    (line,) = claims.row_section(EXPERIMENT, tmp_path).rows(str, "{}")
    assert line[:4] == ["mat by alpha", "2", "6.000 (5.000 to 7.000)", "1.414"]
    assert line[6:] == ["0.25 (0.25 to 0.25)", "4 (3 to 6)"]


def test_higher_accuracies_are_better(tmp_path: Path) -> None:
    experiment = claims.Experiment("T", "t", "vgg16_mini", "share", PAPER_TABLE_3, ACCURACY)
    claim = experiment.claims()[0]
    assert claims.judged(claim, experiment, np.array([1.0, 2, 1, 1, 1]))[-1] == HELD
    assert claims.judged(claim, experiment, -np.array([1.0, 2, 1, 1, 1]))[-1] == NOT_HELD


def test_command_writes_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(tmp_path / "runs")
    monkeypatch.setattr(claims, "EXPERIMENTS", (EXPERIMENT,))
    assert claims.main(["--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/out"]) == 0
    written = (tmp_path / "out/claims.md").read_text()
    assert "| MAT ends better than the baseline | -0.140 |" in written
    assert claims.main(["--runs", f"{tmp_path}/none", "--out", f"{tmp_path}/out"]) == 2


def test_alpha_points_and_figure(tmp_path: Path) -> None:
    for seed, scope in enumerate(("all", "kind")):
        path = write_run(
            *(tmp_path, "mat", seed, [9, 8, 7, 6]), name="alpha_mini", folder=f"a{seed}",
            **BY_ALPHA, selection__scope=scope,
        )  # fmt: skip
        units = pd.DataFrame({
            "t": [0, 0, 1, 1], "kind": "heads", "layer": 0, "unit": [0, 1, 0, 1],
            "step": 1, "pflops": 1.0, "active": True, "stopped": [False, False, True, seed == 1],
        })  # fmt: skip
        units.to_parquet(path / "units.parquet")
    write_run(tmp_path, "mat", 1, [9, 8, 7, 5], name="alpha_mini", **BY_SHARE)
    table = alpha.points([r for r in map(look, tmp_path.rglob("seed=*"))])
    assert table["scope"].tolist() == ["all", "kind"] and table["loss"].tolist() == [6, 6]
    assert table["stopped"].tolist() == [0.5, 1]
    assert "6.00" in texts(alpha.picture(tmp_path))  # above the top of the panel
    file = alpha.draw(tmp_path, tmp_path / "out")
    assert file.name == "alpha_mini.png" and file.stat().st_size < 300_000
