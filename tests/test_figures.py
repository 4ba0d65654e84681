"""Figures: the rules that mark something, and every figure drawn from small made-up runs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mat.suite.errors import UserError
from mat.suite.glance import look
from results import figures
from results.observed import (
    Source,
    border,
    gap_opens,
    losses,
    rank_correlation,
    separability,
    spectrum,
)
from tests.short_runs import one_sentence
from tests.test_results import write_run

# --- rules


@given(many=st.integers(1, 20), few=st.integers(1, 20), seed=st.integers(0, 99))
def test_border_is_between_two_plateaus(many: int, few: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    plateaus = np.concatenate([random.uniform(90, 110, many), random.uniform(0.09, 0.11, few)])
    assert border(random.permutation(plateaus)) == many
    assert border(1e9 * plateaus) == many  # the unit does not matter
    assert border(np.concatenate([plateaus, [1e-6, 0, -1e-9]])) == many  # rounding stays outside


def test_border_by_hand() -> None:
    assert (
        border(np.array([1000.0, 100, 1])) == 2
    )  # logs 3, 2 | 0: squares 1/2 within; 3 | 2, 0 has 2
    assert border(np.array([1000.0, 10, 1])) == 1
    assert border(np.array([5.0])) == 1


@pytest.mark.parametrize("n", [2, 9, 64])
def test_a_straight_spectrum_is_cut_in_the_middle_and_hardly_separable(n: int) -> None:
    straight = np.geomspace(1, 1e-3, n)
    assert border(straight) in (n // 2, -(-n // 2))
    assert separability(straight) == pytest.approx(0.75 * (1 if n % 2 else n**2 / (n**2 - 1)))


def test_separability_of_two_plateaus() -> None:
    assert separability(np.array([100.0, 100, 1, 1, 1])) == pytest.approx(1)
    assert separability(np.array([1000.0, 100, 1, 1e-9])) == pytest.approx(
        25 / 28
    )  # 3, 2 | 0: 25/6 of 42/9
    assert spectrum(np.array([1.0, 4, -1e-9])).tolist() == [1, 0.25]


def test_gap_opens_where_it_stays_open() -> None:
    assert (
        gap_opens(np.array([0.0, 0.5, 0.0, 0.3, 0.6, 2.0])) == 3
    )  # 0.5 closed again; 0.3 is above 0.2
    assert gap_opens(np.array([0.0, 0.15, 0.3, 5.0])) == 3  # 0.3 is below a tenth of 5
    assert gap_opens(np.array([0.0, 0.05, 0.08])) is None  # never above 0.1 nats
    assert gap_opens(np.array([0.0, 2.0, 0.05])) is None  # closes in the end
    assert gap_opens(np.array([0.5, 0.6])) == 0


def test_losses_are_read_at_the_evaluations(tmp_path: Path) -> None:
    run = look(write_run(tmp_path, "mat", 0, [9, 8, 5, 2]))
    x, validation, train = losses(run)
    assert (
        x.tolist() == [1, 2, 3, 4]
        and validation.tolist() == [9, 8, 5, 2]
        and train.tolist() == [9.5, 8.5, 5.5, 2.5]
    )


def test_rank_correlation() -> None:
    a = pd.Series([1.0, 10, 100, 1000])
    assert rank_correlation(a, a**2) == pytest.approx(1) and rank_correlation(
        a, -a
    ) == pytest.approx(-1)


# --- drawings


def observed(path: Path, rng: np.random.Generator) -> None:
    """Four selections of two layers with two heads and three groups each."""
    units = [
        (kind, layer, unit)
        for layer in (0, 1)
        for kind, n in (("heads", 2), ("ffn", 3))
        for unit in range(n)
    ]
    rows = pd.DataFrame([(t, 10 * t, 0.9 * t, *u) for t in range(4) for u in units],
                        columns=["t", "step", "pflops", "kind", "layer", "unit"])  # fmt: skip
    n = len(rows)
    score = rng.uniform(1, 100, n)
    rows.assign(lambda_max=score, delta=1.0, threshold=50.0, active=(score > 50) | (rows["t"] == 0),
                stopped=(score < 10) & (rows["t"] > 1), distance=rows["t"] * rng.uniform(0.5, 1, n)
                ).to_parquet(path / "units.parquet")  # fmt: skip
    rows[rows["kind"] == "heads"].assign(
        effective_rank=lambda f: rng.uniform(1, 9, len(f))
    ).to_parquet(path / "attention.parquet")
    rows.assign(
        lambda_max=np.where(rows["kind"] == "heads", score, 101 - score),
        predicted=score / (3 + rows["t"]),
        first_order=score,
        measured=score,
        eta=1e-3,
    ).to_parquet(path / "descent.parquet")
    tables = [rows.assign(scope="unit", rank=1, eigenvalue=score, trace=2 * score)]
    for t in range(4):
        for scope, layer in (("layer", 0), ("layer", 1), ("network", -1)):
            values = np.sort(10.0 ** rng.uniform(-2, 2, 6))[::-1]
            tables.append(
                pd.DataFrame(
                    {
                        "t": t,
                        "step": 10 * t,
                        "pflops": 0.9 * t,
                        "scope": scope,
                        "kind": "all",
                        "layer": layer,
                        "unit": -1,
                        "rank": np.arange(1, 7),
                        "eigenvalue": values,
                        "trace": values.sum(),
                    }
                )
            )
    pd.concat(tables).to_parquet(path / "kernels.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete runs for every figure; a shallow model's run beside Table 1's must not be taken."""
    runs, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name in ("table1_mini", "figure1_mini", "figure4_mini"):
        for method in ("baseline", "mat"):
            observed(
                write_run(runs, method, 0, [9, 8, 5, 4.5 if name[0] == "t" else 9], name=name), rng
            )
    for path in runs.glob(
        "figure4_mini/*/seed=0/metrics.jsonl"
    ):  # training goes on to 1.5, 5.5 where validation rises
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        late = [
            e | {"loss": e["loss"] - 4} if e["event"] == "train" and e["step"] > 2 else e
            for e in lines
        ]
        path.write_text("".join(json.dumps(event) + "\n" for event in late))
    write_run(runs, "baseline", 0, [9, 1], model="bert_mini_shallow", name="table1_mini")
    return runs


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_with_titles_and_labels(
    name: str, root: Path, tmp_path: Path
) -> None:
    figure, said = figures.FIGURES[name](Source(root, "_mini"))
    assert said and "nan" not in said
    for axes in figure.axes:
        assert axes.get_title(loc="left") or axes.get_title()
        shared_x = name == "figure4" and axes in figure.axes[:2]
        shared_y = (name == "figure4" and axes in figure.axes[1::2]) or name == "active_set"
        assert (axes.get_xlabel() or shared_x) and (axes.get_ylabel() or shared_y)


def table_of(root: Path, run: str, name: str) -> pd.DataFrame:
    return pd.read_parquet(next(root.glob(f"{run}*/seed=0/{name}.parquet")))


def spearman(rows: pd.DataFrame, one: str, other: str) -> float:
    return float(rows[[one, other]].corr(method="spearman").iloc[0, 1])


def test_numbers_of_figure_1(root: Path) -> None:
    heads = table_of(root, "figure1_mini/method=baseline", "attention")
    units = table_of(root, "figure1_mini/method=baseline", "units").query("kind == 'heads'")
    both = heads.assign(top=units["lambda_max"].to_numpy())
    start, end = both[both["t"] == 0], both[both["t"] == 3]
    said = figures.figure1(Source(root, "_mini"))[1]
    first, last = start["effective_rank"].mean(), end["effective_rank"].min()
    assert f"heads {first:.1f} at the start, {last:.1f} to" in said
    assert f"grows by a factor {end['top'].mean() / start['top'].mean():.0f} and" in said
    assert (
        f"differs by a factor {end['top'].max() / end['top'].min():.0f} between heads at the end"
        in said
    )
    assert (
        f"{spearman(end, 'effective_rank', 'top'):+.2f} (end)" in said
        and "ends at 9.00 nats" in said
    )


def test_numbers_of_figure_2(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", 0, [9, 8], name="table1")
    units = pd.DataFrame(
        [(t, float(t), "heads", 0, unit, 9.0, 5.0) for t in range(5) for unit in range(4)],
        columns=["t", "pflops", "kind", "layer", "unit", "lambda_max", "threshold"],
    )
    active = np.array(
        [[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=bool
    ).ravel()
    for seed, stopped in ((2, 0), (3, 2)):
        path = write_run(tmp_path, "mat", seed, [9, 7], name="table1")
        at_end = (units["t"] == 4) & (units["unit"] < stopped)
        units.assign(active=active, stopped=at_end).to_parquet(path / "units.parquet")
    said = figures.figure2(Source(tmp_path, ""))[1]
    assert "active share 0.38" in said and "of 4 units stop 0 (seed 2), 2 (seed 3)" in said
    assert (
        "50% of the units change after t = 1, 0.8 times on average" in said
    )  # unit 0 twice, unit 1 once
    assert "7.000 (MAT) and 8.000 (BERT)" in said


def test_numbers_of_figure_3(root: Path) -> None:
    kernels = table_of(root, "figure1_mini/method=baseline", "kernels")
    later = kernels[(kernels["scope"] == "layer") & (kernels["t"] > 0)].groupby(["t", "layer"])[
        "eigenvalue"
    ]
    share = (later.max() / later.sum()).mean()
    said = figures.figure3(Source(root, "_mini"))[1]
    assert f"lambda_1 holds {share:.2f} of a layer's trace" in said
    assert (
        "of single units' traces it holds 0.50 (ffn, 0.50 at most), 0.50 (heads, 0.50 at most)"
        in said
    )


def test_numbers_of_figure_4(root: Path) -> None:
    units = table_of(root, "figure4_mini/method=mat", "units")
    median = units[units["t"] == 3]["lambda_max"].median()
    said = figures.figure4(Source(root, "_mini"))[1].split("; MAT: ")[1]
    assert (
        "gap opens at 3 PFLOPs, step 3 (best validation 5.000 at 3), 3.50 nats at the end" in said
    )
    assert f"{median:.3g} there, {median:.3g} at the end" in said  # recorded to 2.7 PFLOPs


def test_numbers_of_equation_2(root: Path) -> None:
    rows = table_of(root, "figure1_mini/method=baseline", "descent").query("t > 0")
    said = figures.equation2(Source(root, "_mini"))[1]
    assert (
        "predicts 0.33 of the measured drop at t = 0 (median), 0.20 at the other selections" in said
    )
    mean = np.mean([spearman(one, "lambda_max", "measured") for _, one in rows.groupby("t")])
    assert f"+1.00 of the prediction, {mean:+.2f} of lambda_max" in said
    assert "(-1.00 within ffn, +1.00 within heads;" in said


def test_numbers_and_label_of_figure_5(root: Path) -> None:
    figure, said = figures.figure5(Source(root, "_mini"))
    kernels = table_of(root, "figure1_mini/method=baseline", "kernels")
    network = kernels[kernels["scope"] == "network"].groupby("t")["eigenvalue"].apply(np.array)
    counts = [border(network[t]) for t in (0, 3)]
    shares = [network[t][:n].sum() / network[t].sum() for t, n in zip((0, 3), counts, strict=True)]
    assert f"{counts[0]} of 6 eigenvalues at the start, {counts[1]} at the end" in said
    assert f"with {shares[0]:.2f} and {shares[1]:.2f} of the trace" in said
    clear = [separability(network[t]) for t in (0, 3)]
    assert (
        f"separability {clear[0]:.2f} and {clear[1]:.2f}, of logs at equal "
        f"distances {0.75 * 36 / 35:.2f}" in said
    )
    assert [text.get_position()[0] for text in figure.axes[0].texts] == [counts[1] + 0.5] * 2


def test_eq_3_marks_stopped_units_and_ends_with_the_records(root: Path) -> None:
    figure, said = figures.equation3(Source(root, "_mini"))
    units = table_of(root, "figure4_mini/method=mat", "units")
    stopped = units[(units["t"] == 3) & units["stopped"]]
    points = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    marked = [
        n for name, n in points.items() if name.startswith("MAT") and name.endswith("stopped")
    ]
    assert sum(marked) == len(stopped) > 0 and sum(points.values()) == 20
    assert [len(line.get_xdata()) for line in figure.axes[2].lines] == [
        2,
        2,
    ]  # evaluated at 1 to 4, recorded to 2.7
    each = units.groupby(["kind", "layer", "unit"]).agg(
        top=("lambda_max", "mean"), distance=("distance", "last"), active=("active", "mean")
    )
    ffn, frozen = each.loc["ffn"], each[each["active"] < 0.5]["distance"].mean()
    within = sum(spearman(one, "top", "distance") > 0 for _, one in ffn.groupby("layer"))
    mat = said.split("; MAT: ")[1]
    assert (
        f"{spearman(ffn, 'top', 'distance'):+.2f} (ffn; positive within {within} of 2 layers)"
        in mat
    )
    assert (
        f"mean distance {each['distance'].mean():.2f} ({frozen:.2f} of those frozen most "
        "of the time" in mat
    )
    assert "gap at the end 3.50 nats" in mat


def test_command_line_writes_files_and_names_what_is_missing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suffix", "_mini", "--runs", str(root), "--out", str(tmp_path)]
    assert figures.main(["equation2", *arguments]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"equation2_mini.png", "equation2_mini.svg"}
    before = (tmp_path / "equation2_mini.svg").read_bytes()
    assert (
        figures.main(["equation2", *arguments]) == 0
        and (tmp_path / "equation2_mini.svg").read_bytes() == before
    )
    capsys.readouterr()
    assert (
        figures.main(["figure1", "--runs", str(root), "--out", str(tmp_path)]) == 2
    )  # the full runs are not there
    assert one_sentence(capsys.readouterr().err.partition(": ")[2])


def test_incomplete_runs_and_missing_tables_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "baseline", 0, [9, 8], name="figure1")
    with pytest.raises(UserError, match=r"attention\.parquet is missing"):
        figures.figure1(Source(tmp_path, ""))
    (path / "summary.json").unlink()
    (path / "failure.json").write_text(json.dumps({"reason": "x"}))
    with pytest.raises(UserError, match="no complete run"):
        figures.figure1(Source(tmp_path, ""))


def test_configurations_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("method=mat", "method=mat,model=bert_mini_shallow"):
        for seed in (0, 1):
            write_run(
                tmp_path,
                "mat",
                seed,
                [9],
                model=folder.partition("model=")[2] or "bert_mini",
                folder=folder,
            )
    assert [run.path.parent.name for run in Source(tmp_path, "").runs("t", "mat")] == [
        "method=mat"
    ] * 2
    write_run(tmp_path, "mat", 0, [9], folder="method=mat,selection.share=0.5")
    with pytest.raises(UserError, match=r"method=mat; method=mat,selection\.share=0\.5") as refused:
        Source(tmp_path, "").runs("t", "mat")
    assert one_sentence(str(refused.value))


def test_the_runs_of_an_experiment_are_read_once(tmp_path: Path) -> None:
    write_run(tmp_path, "mat", 0, [9])
    source = Source(tmp_path, "")
    (run,) = source.runs("t", "mat")
    shutil.rmtree(tmp_path / "t")
    assert source.runs("t", "mat") == [run]


def test_a_table_that_begins_in_mid_run_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "mat", 0, [9])
    pd.DataFrame({"t": [5, 6]}).to_parquet(path / "kernels.parquet")
    with pytest.raises(UserError, match=r"kernels\.parquet begins at t=5") as refused:
        Source(tmp_path, "").table("t", "mat", "kernels")
    assert one_sentence(str(refused.value))


def test_damaged_runs_are_left_out_and_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = shutil.copytree(root, tmp_path / "runs")
    path = write_run(runs, "baseline", 1, [9], name="figure1_mini")
    (path / "config.yaml").write_text("seed: [")
    assert (
        figures.main(
            ["equation2", "--suffix", "_mini", "--runs", str(runs), "--out", str(tmp_path)]
        )
        == 0
    )
    assert re.fullmatch(
        r"left out: .*figure1_mini/.*/seed=1 is damaged .*\n", capsys.readouterr().err
    )
