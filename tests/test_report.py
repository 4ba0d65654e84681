"""The report: what it says of whole, running and failed sweeps, and that a real browser draws it
without a network.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from mat.suite.glance import look, runs_below
from results import charts, report
from results.curves import LINES
from tests.short_runs import one_sentence
from tests.test_results import edit, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def add_units(path: Path, layers: int = 2, units: int = 3) -> None:
    """Three selections; unit 0 trains, unit 1 is frozen from t = 1 on, unit 2 has stopped at t =
    2.
    """
    rows = [
        {
            "t": t,
            "step": 10 * t,
            "pflops": float(t + 1),
            "kind": "heads",
            "layer": layer,
            "unit": unit,
            "lambda_max": 10.0 ** min(unit, 99),
            "delta": 1.0,
            "threshold": 50.0,
            "active": t == 0 or unit == 0,
            "stopped": t == 2 and unit == 2,
        }
        for t in range(3)
        for layer in range(layers)
        for unit in range(units)
    ]
    pd.DataFrame(rows).to_parquet(path / "units.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Table 1's rows with three seeds, but one MAT run is still running, one failed, and one is
    missing.
    """
    runs = tmp_path / "runs"
    extra = {
        "method__policy": "threshold",
        "selection__interval": 0.04,
        "dataset__name": "wikitext2",
    }
    for seed in range(3):
        write_run(
            runs,
            "baseline",
            seed,
            [9, 8, 5, 2 + seed],
            name="table1_mini",
            **extra | {"method__policy": "all"},
        )
        write_run(
            runs, "rand", seed, [9, 8, 5, 4 + seed], name="table1_mini", exclusive=False, **extra
        )
    for seed in range(2):
        path = write_run(runs, "mat", seed, [9, 7, 4], name="table1_mini", speed=0.5, **extra)
        add_units(path)
        (path / "summary.json").unlink()
    (path / "failure.json").write_text(
        json.dumps({"reason": "training diverged at step 7 </script>."})
    )
    environment = json.loads((path / "environment.json").read_text())
    command = "python launch.py +experiment=table1_mini method=mat seed=1"
    (path / "environment.json").write_text(json.dumps(environment | {"command": command}))
    return runs


def text_of(page: str) -> str:
    """The page without scripts and tags."""
    return re.sub(
        r"\s+",
        " ",
        re.sub(
            r"<[^>]*>", " ", re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)
        ),
    )


def test_says_what_is_missing_and_shows_the_rest(root: Path) -> None:
    page = text_of(report.build(root))
    assert "8 runs: 6 complete , 1 failed , 1 running ." in page
    assert "mat,model=bert_mini/seed=0 is running, 38% done" in page
    assert "seed=1 failed at 38% done: training diverged at step 7" in page
    assert "mat, bert_mini has no run of seed 2." in page
    rows = (
        "Multirate (method=multirate, model=bert_mini); "
        "shallow (method=baseline, model=bert_mini_shallow)."
    )
    assert f"No table1_mini: there is no run of {rows}" in page
    for heading in ("Curves and ledger", "Inside a run", "Environment", "Commands"):
        assert heading in page


def complete(root: Path) -> None:
    """Make the sweep whole: five rows of three seeds."""
    shutil.rmtree(root / "table1_mini" / "method=mat,model=bert_mini")
    for method in ("multirate", "mat"):
        for seed in range(3):
            write_run(
                root,
                method,
                seed,
                [9, 3],
                name="table1_mini",
                method__policy="all",
                selection__interval=0.04,
                dataset__name="wikitext2",
            )
    for seed in range(3):
        write_run(
            root,
            "baseline",
            seed,
            [9, 3],
            model="bert_mini_shallow",
            name="table1_mini",
            method__policy="all",
            selection__interval=0.04,
            dataset__name="wikitext2",
        )


def test_table_of_a_whole_sweep(root: Path) -> None:
    complete(root)
    page = text_of(report.build(root))
    assert (
        "Loss (nats per masked token)" in page
        and "No table1_mini" not in page
        and "15 complete" in page
    )


def test_says_which_run_keeps_a_table_back(root: Path) -> None:
    complete(root)
    (root / "table1_mini" / "method=rand,model=bert_mini" / "seed=2" / "summary.json").unlink()
    page = text_of(report.build(root))
    assert "No table1_mini: " in page and "seed=2 is incomplete (no summary.json)" in page


def test_names_the_missing_rows_of_a_sweep_that_has_just_begun(tmp_path: Path) -> None:
    write_run(
        tmp_path, "mat", 0, [9, 8], name="table2_mini", model="switch_mini", method__policy="all"
    )
    rows = (
        "Switch (method=baseline, model=switch_mini); "
        "Switch-Rand (method=rand, model=switch_mini); Multirate"
    )
    assert f"No table2_mini: there is no run of {rows}" in text_of(report.build(tmp_path))


def test_says_what_a_whole_sweep_cannot_be_compared_by(root: Path) -> None:
    complete(root)
    edit(root / "table1_mini" / "method=baseline,model=bert_mini" / "seed=1" / "summary.json",
         lambda summary: summary.update(pflops_to_best=0.0))  # fmt: skip
    page = text_of(report.build(root))
    assert (
        "No table1_mini: " in page
        and "is best before its first step" in page
        and "Curves and ledger" in page
    )


def test_commands_are_exact(root: Path) -> None:
    page = report.build(root)
    assert (
        page.count("<code>python launch.py +experiment=table1_mini method=mat seed=1</code>") == 1
    )
    assert page.count("<code>–</code>") == 7  # recorded before commands were


def test_the_shorter_name_is_that_of_the_base_model(tmp_path: Path) -> None:
    models = ("bert_mini", "bert_mini_shallow", "bert_mini_shallow")
    runs = [
        look(write_run(tmp_path, "mat", seed, [9], model=model))
        for seed, model in enumerate(models)
    ]
    assert (
        report.base_model(runs[:2]) == "bert_mini"
        and report.base_model(runs) == "bert_mini_shallow"
    )


def test_rows_are_named_by_what_their_runs_share(tmp_path: Path) -> None:
    folders = (
        "default",
        "method=mat",
        "method=mat,model=bert_mini",
        "method=mat,selection.share=0.5",
    )
    runs = [
        look(write_run(tmp_path, "mat", seed, [9, 8], folder=folder))
        for seed, folder in enumerate(folders)
    ]
    names = [charts.row_name(run) for run in runs]
    assert names == ["mat, bert_mini"] * 3 + ["mat, bert_mini, selection.share=0.5"]
    looks = charts.styles({names[0]: runs[:3], names[3]: runs[3:]}, "bert_mini")
    assert looks[names[0]] == (LINES["mat"][0], "solid") and looks[names[3]] == (
        LINES["mat"][0],
        "dot",
    )


def test_every_chart_has_title_and_axis_labels(root: Path) -> None:
    runs = [look(path) for path in runs_below(root)]
    rows = {charts.row_name(run): [run] for run in runs}
    run = next(run for run in runs if run.units is not None)
    figures = [
        charts.curves(rows, "bert_mini"),
        charts.ledger(rows),
        charts.active_set(run),
        charts.eigenvalues(run),
    ]
    for figure in figures:
        assert figure.layout.title.text
        axes = list(figure.select_xaxes()) + [
            axis for axis in figure.select_yaxes() if not axis.matches
        ]
        assert all(axis.title.text for axis in axes)


def test_means_are_over_complete_runs_and_others_are_thin(tmp_path: Path) -> None:
    runs = [
        look(write_run(tmp_path, "mat", seed, [9, 8, 4 + 2 * seed], speed=1)) for seed in (0, 1)
    ]
    young = write_run(tmp_path, "mat", 2, [90, 80], speed=0.1)
    (young / "summary.json").unlink()
    figure = charts.curves({"mat, bert_mini": [*runs, look(young)]}, "bert_mini")
    steps = [trace for trace in figure.data if trace.xaxis == "x3" and trace.hoverinfo != "skip"]
    mean, alone = steps
    assert (
        mean.x[0] == 1
        and mean.x[-1] == 3
        and mean.y[-1] == 5
        and mean.line.width > alone.line.width
    )
    assert (
        list(alone.x) == [1, 2]
        and list(alone.y) == [90, 80]
        and "seed 2, running" in alone.hovertemplate
    )
    assert figure.layout.yaxis.range[1] < 10  # of the means
    assert [trace.name for trace in figure.data if trace.showlegend is None] == [
        "mat, bert_mini (n = 2)"
    ]


def test_the_seconds_have_an_n_of_their_own(tmp_path: Path) -> None:
    runs = [look(write_run(tmp_path, "mat", seed, [9, 8], exclusive=seed == 0)) for seed in (0, 1)]
    figure = charts.curves({"mat, bert_mini": runs}, "bert_mini")
    assert figure.layout.annotations[1].text == "against time (runs alone on their machine, n = 1)"
    hover = {trace.xaxis: trace.hovertemplate for trace in figure.data if trace.hovertemplate}
    assert (
        "±" in hover["x"]
        and "n = 2" in hover["x"]
        and "±" not in hover["x2"]
        and "n = 1" in hover["x2"]
    )


def test_complete_runs_without_a_common_range_are_each_alone(tmp_path: Path) -> None:
    runs = [look(write_run(tmp_path, "mat", seed, [9, 8], speed=10.0**seed)) for seed in (0, 1)]
    figure = charts.curves({"mat, bert_mini": runs}, "bert_mini")
    lines = [trace for trace in figure.data if trace.xaxis == "x" and trace.hovertemplate]
    assert [list(line.x) for line in lines] == [[1, 2], [10, 20]]


def test_ledger_is_of_complete_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "mat", seed, [9, 8, 7, 6, 5][: 2 + seed], exclusive=seed != 2)
        for seed in range(4)
    ]
    (runs[3] / "summary.json").unlink()
    bars = charts.ledger({"mat, bert_mini": [look(path) for path in runs]}).data
    (seconds,) = (bar for bar in bars if bar.name == "seconds")
    # Of 20 and 30; 40 shared, 50 still runs
    assert list(seconds.x) == [25] and list(seconds.customdata) == [2]


def test_heat_map_shows_state_and_eigenvalue(root: Path) -> None:
    run = next(run for run in map(look, runs_below(root)) if run.units is not None)
    (heat,) = charts.active_set(run).data
    assert heat.y[:3] == ("heads 0.0", "heads 0.1", "heads 0.2") and list(heat.x) == [0, 1, 2]
    assert heat.z[:3].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, -1]]
    assert (
        heat.text[:3, 2].tolist() == ["active", "frozen", "stopped"]
        and "%{text}" in heat.hovertemplate
    )
    assert heat.customdata[:3, 0, 0].tolist() == [1, 10, 100] and heat.customdata[
        0, :, 2
    ].tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("score", "name"), [("lambda_max", "lambda_max"), ("gradnorm", "gradient norm")]
)
def test_hovers_name_what_they_show(score: str, name: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, "gradnorm", 0, [9, 8], selection__interval=0.04)
    for units, said in ((3, name), (charts.MANY, f"median {name}")):
        add_units(path, units=units)
        pd.read_parquet(path / "units.parquet").rename(columns={"lambda_max": score}).to_parquet(
            path / "units.parquet"
        )
        run = look(path)
        (heat,), (course, *_) = charts.active_set(run).data, charts.eigenvalues(run).data
        assert (
            f"<br>{said} %{{customdata[0]" in heat.hovertemplate
            and f": {said} %{{y" in course.hovertemplate
        )


def test_the_units_of_a_whole_bert_are_rows(tmp_path: Path) -> None:
    path = write_run(tmp_path, "mat", 0, [9, 8], selection__interval=0.04)
    add_units(path, layers=12, units=24)
    figure = charts.active_set(look(path))
    # And the threshold
    assert len({course.line.color for course in charts.eigenvalues(look(path)).data}) == 12 + 1
    assert len(figure.data[0].y) == 288 and figure.layout.height < 2000
    assert list(figure.layout.yaxis.tickvals) == [f"heads {layer}.0" for layer in range(12)]


def test_many_units_are_shown_by_layer(root: Path) -> None:
    path = next(run.path for run in map(look, runs_below(root)) if run.units is not None)
    add_units(path, layers=2, units=charts.MANY)
    (heat,) = charts.active_set(look(path)).data
    assert heat.text[0].tolist() == [
        "active 100%, stopped 0%",
        "active 0%, stopped 0%",
        "active 0%, stopped 0%",
    ]
    assert heat.y == ("heads 0", "heads 1") and heat.z[0].tolist() == [
        1,
        1 / charts.MANY,
        1 / charts.MANY,
    ]


def test_a_diverged_run_does_not_stop_the_page(root: Path) -> None:
    path = root / "table1_mini" / "method=mat,model=bert_mini" / "seed=1"
    last = look(path).events[-2]
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last | {"event": "evaluation", "loss": float("nan")}) + "\n")
    assert "1 failed" in text_of(report.build(root))


def test_damaged_runs_are_told(root: Path) -> None:
    complete(root)
    path = root / "table1_mini" / "method=mat,model=bert_mini" / "seed=1"
    (path / "config.yaml").write_text("seed: [")
    page = text_of(report.build(root))
    assert page.count("seed=1 is damaged (while parsing") == 2 and "14 complete" in page
    assert re.search("No table1_mini: [^ ]*/method=mat,model=bert_mini/seed=1 is damaged", page)


def test_seconds_of_a_shared_machine_are_not_shown(root: Path) -> None:
    rows = (re.findall(r"<td>(.*?)</td>", row) for row in report.build(root).split("</tr>"))
    seconds = {cells[0]: cells[6] for cells in rows if len(cells) == 9}
    assert seconds["table1_mini/method=baseline,model=bert_mini/seed=0"] == "40"
    assert seconds["table1_mini/method=rand,model=bert_mini/seed=0"] == "–"


def test_without_runs_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert (
        one_sentence(capsys.readouterr().err.removeprefix("error: "))
        and not (tmp_path / "x.html").exists()
    )


def test_a_folder_within_that_of_all_runs_gives_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "runs", "mat", 0, [9, 8])
    # Named so before names were checked
    deep = write_run(tmp_path / "runs", "mat", 0, [9, 8], name="a/b")
    for within in (run, *run.parents[:2]):
        assert report.main(["--runs", str(within), "--out", str(tmp_path / "x.html")]) == 2
        assert (
            one_sentence(capsys.readouterr().err.removeprefix("error: "))
            and not (tmp_path / "x.html").exists()
        )
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "x.html")]) == 0
    assert f"{deep} is not 3 folders below" in (tmp_path / "x.html").read_text()


@pytest.fixture(scope="module")
def browser() -> str:
    """A real browser (.ci/run installs Debian's chromium where it can)."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


def test_in_a_browser(root: Path, tmp_path: Path, browser: str) -> None:
    """The page's policy turns every request into a console error, so no error means no request
    too.
    """
    out = tmp_path / "report.html"
    assert report.main(["--runs", str(root), "--out", str(out)]) == 0
    page = out.read_text()
    assert "default-src 'none'" in page and not re.search(
        r"<(?:script|link|img)[^>]+(?:src|href)=['\"]?http", page
    )
    # Choosing another run draws it too.
    probe = """<script>addEventListener('load', async () => {
      const select = document.querySelector('select'), last = select.options.length - 1;
      select.value = select.options[last].value; select.onchange();
      document.title = 'chosen ' + select.value;
    });</script></body>"""
    out.write_text(page.replace("</body>", probe))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            "--window-size=1300,3000",
            "--dump-dom",
            f"file://{out}",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    drawn = re.findall(r'class="[^"]*js-plotly-plot', done.stdout)
    # Curves, ledger, and two charts of each chosen run
    assert 'data-ready="' in done.stdout and len(drawn) == 6
    for title in (
        "Validation loss, mean over complete runs",
        "FLOPs ledger",
        "Active set",
        "Top eigenvalues",
    ):
        assert re.search(rf'class="gtitle"[^>]*>{title}', done.stdout), title
    assert "<title>chosen method=mat,model=bert_mini/seed=1" in done.stdout


def test_the_browser_test_would_see_a_request(tmp_path: Path, browser: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f'<meta http-equiv="Content-Security-Policy" content="{report.POLICY}">'
                    "<script src='http://127.0.0.1:9/x.js'></script>")  # fmt: skip
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert any(
        "CONSOLE" in line and "Content Security Policy" in line for line in done.stderr.splitlines()
    )


def test_ages_do_not_matter_to_the_page(root: Path) -> None:
    for path in runs_below(root):
        for file in path.iterdir():
            os.utime(file, (time.time() - 86400,) * 2)
    assert "is interrupted" in text_of(report.build(root))
