"""One self-contained HTML page from run folders: tables, curves, active sets, eigenvalues, ledger,
commands.

    python -m results.report --runs results/runs --out results/report.html

Opens without a network: the plotting library is in the file, and the page's own policy forbids
every request. Works on a sweep that is still running or partly failed: it shows what there is and
says what is missing.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from mat.suite.errors import UserError
from mat.suite.files import say, write_text
from mat.suite.glance import Glance, look_below
from mat.suite.show import clock, number
from results import charts
from results.cli import add_seeds, command, parser_of
from results.curves import LINES
from results.measures import summarise
from results.render import Column, Section, to_html
from results.specs import SPECS
from results.tables import notes, sections

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
DEPTH = 3  # of a run below the folder of all runs: experiment, overrides, seed
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1280px;
  margin: 0 auto; padding: 0 24px 60px; }
h1 { margin: 28px 0 4px; } h2 { margin: 48px 0 8px; border-top: 3px solid #222; padding-top: 12px; }
h3 { margin: 28px 0 4px; }
h4 { margin: 14px 0 4px; font-weight: 600; } nav a { margin-right: 14px; } a { color: #0072B2; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th { text-align: left; border-bottom: 2px solid #222; padding: 3px 12px 3px 0;
  vertical-align: bottom; }
td { border-bottom: 1px solid #ddd; padding: 3px 12px 3px 0; vertical-align: top; }
code { font-size: 12px; user-select: all; }
select { font: inherit; padding: 2px 6px; max-width: 100%; }
.missing { background: #fff4dd; border-left: 4px solid #E69F00; padding: 6px 14px; margin: 10px 0; }
.note { color: #555; font-size: 13px; } .complete { color: #00734f; }
.failed { color: #b3261e; font-weight: 600; }
.running { color: #0072B2; font-weight: 600; } .interrupted { color: #9a6700; font-weight: 600; }
"""
SCRIPT = """
const options = { displaylogo: false, responsive: true };
function draw(div) {
  if (div.dataset.drawn) return Promise.resolve();
  div.dataset.drawn = 1;
  const figure = JSON.parse(document.getElementById(div.dataset.figure).textContent);
  return Plotly.newPlot(div, figure.data, figure.layout, options);
}
function choose(select) {
  for (const group of document.querySelectorAll(`[data-select="${select.id}"]`)) {
    group.hidden = group.dataset.run !== select.value;
    if (!group.hidden) group.querySelectorAll('.chart').forEach(draw);
  }
}
document.querySelectorAll('select').forEach(s => { s.onchange = () => choose(s); choose(s); });
Promise.all([...document.querySelectorAll('.chart:not([data-later])')].map(draw)).then(
  () => { document.documentElement.dataset.ready =
    document.querySelectorAll('.js-plotly-plot').length; });
"""


class Page:
    """HTML in the making: texts and charts with ids of their own."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._count = 0

    def add(self, *html: str) -> None:
        """Add HTML as it is."""
        self.parts += html

    def missing(self, sentences: Sequence[str]) -> None:
        """Say what there is not."""
        if sentences:
            self.add(
                "<div class='missing'>", *(f"<div>{escape(s)}</div>" for s in sentences), "</div>"
            )

    def chart(self, figure: go.Figure, later: bool = False) -> None:
        """Add a chart; ``later``: drawn when it is chosen."""
        self._count += 1
        name = f"figure{self._count}"
        data = plotly.io.to_json(figure, validate=False).replace("</", "<\\/")
        height = figure.layout.height
        self.add(
            f"<script type='application/json' id='{name}'>{data}</script>",
            f"<div class='chart'{' data-later=1' if later else ''} data-figure='{name}' "
            f"style='height:{height}px'>"
            "</div>",
        )


def incomplete(
    runs: Sequence[Glance], rows: Mapping[str, Sequence[Glance]], root: Path
) -> list[str]:
    """Sentences about what is missing in an experiment: runs not complete, and seeds that other
    rows have.
    """
    found = []
    for run in runs:
        where, done = run.path.relative_to(root), f"{run.progress:.0%} done"
        if run.status == "failed":
            found.append(f"{where} failed at {done}: {run.failure}")
        elif run.status != "complete":
            found.append(
                f"{where} is {run.status}, {done}"
                + (f", ETA {clock(run.eta)}." if run.eta else ".")
            )
    seeds = {run.seed for run in runs}
    for name, members in rows.items():
        if absent := seeds - {run.seed for run in members}:
            found.append(f"{name} has no run of seed {', '.join(map(str, sorted(absent)))}.")
    return found


def _tables(page: Page, experiment: str, runs: Sequence[Glance], root: Path, seeds: int) -> None:
    keys = {run.key for run in runs}
    for spec in (spec for spec in SPECS.values() if spec.runs == experiment):
        page.add(f"<h3>{escape(spec.title)}</h3>")
        absent = [row for row in spec.rows if row.key not in keys]
        if absent:
            named = "; ".join(
                f"{row.label} (method={row.method}, model={row.model})" for row in absent
            )
            page.missing([f"No {spec.name}: there is no run of {named}."])
            continue
        try:
            rows = spec.load(root, seeds)
            blocks = sections(spec, rows, summarise(rows, spec.baseline, spec.levels, spec.score))
        except UserError as error:
            page.missing([f"No {spec.name}: {error}"])
            continue
        page.add(*map(to_html, blocks))
        page.add(
            "<details class='note'><summary>How to read it</summary><ul>",
            *(f"<li>{escape(note)}</li>" for note in notes(spec, rows)),
            "</ul></details>",
        )


def _runs(page: Page, runs: Sequence[Glance], root: Path) -> None:
    """State, environment and exact command of every run."""
    columns = {
        "run": [str(run.path.relative_to(root)) for run in runs],
        "status": [run.status for run in runs],
        "done": [f"{run.progress:.0%}" for run in runs],
        "best validation loss": [number(run.best) for run in runs],
        "test loss": [number(run.last("loss", "test")) for run in runs],
        "PFLOPs": [number(run.last("pflops")) for run in runs],
        "seconds": [number(run.last("seconds") if run.timed else None) for run in runs],
        "active share": [number(run.last("active_share"), 3) for run in runs],
        "backward mode": [run.config["selection"]["mode"] for run in runs],
    }
    page.add(to_html(Section("Runs", [Column(header, texts) for header, texts in columns.items()])))
    where: dict[str, list[str]] = {}
    for run in runs:
        versions = ", ".join(
            f"{name} {version}" for name, version in run.environment.get("versions", {}).items()
        )
        text = (
            f"{run.machine}; {versions}; commit {run.commit}; "
            f"machine {'its own' if run.timed else 'shared'}"
            f"{', resumed' if run.environment.get('resumed') else ''}"
        )
        where.setdefault(text, []).append(str(run.path.relative_to(root)))
    paths = ["; ".join(names) for names in where.values()]
    page.add(
        to_html(Section("Environment", [Column("environment", list(where)), Column("runs", paths)]))
    )
    commands = (run.environment.get("command") or "–" for run in runs)
    lines = (f"<tr><td><code>{escape(command)}</code></td></tr>" for command in commands)
    page.add(
        "<h4>Commands</h4><div class='scroll'><table><tbody>", *lines, "</tbody></table></div>"
    )


def base_model(runs: Sequence[Glance]) -> str:
    """The model of most runs, whose rows are in colour; of several that with the shortest name,
    which others vary.
    """
    counts = Counter(run.model for run in runs)
    return max(counts, key=lambda name: (counts[name], -len(name), name))


def experiment_section(
    page: Page, experiment: str, runs: Sequence[Glance], root: Path, seeds: int
) -> None:
    """Everything about the runs below one name."""
    rows: dict[str, list[Glance]] = {}
    for run in sorted(runs, key=lambda r: [*LINES, r.method].index(r.method)):
        rows.setdefault(charts.row_name(run), []).append(run)
    base = base_model(runs)
    page.add(f"<h2 id='{escape(experiment)}'>{escape(experiment)}</h2>")
    page.missing(incomplete(runs, rows, root))
    _tables(page, experiment, runs, root, seeds)
    page.add("<h3>Curves and ledger</h3>")
    page.chart(charts.curves(rows, base))
    page.chart(charts.ledger(rows))
    selecting = [
        run for run in runs if run.units is not None and run.config["method"]["policy"] != "all"
    ]
    if selecting:
        select = f"choice-{escape(experiment)}"
        names = [str(run.path.relative_to(root / experiment)) for run in selecting]
        first = next((i for i, run in enumerate(selecting) if run.method == "mat"), 0)
        page.add(
            f"<h3>Inside a run</h3><label>Run: <select id='{select}'>",
            *(
                f"<option{' selected' if i == first else ''}>{escape(n)}</option>"
                for i, n in enumerate(names)
            ),
            "</select></label>",
        )
        for name, run in zip(names, selecting, strict=True):
            page.add(f"<div data-select='{select}' data-run='{escape(name)}' hidden>")
            page.chart(charts.active_set(run), later=True)
            assert run.units is not None
            if "gradnorm" in run.units or run.units["lambda_max"].notna().any():
                page.chart(charts.eigenvalues(run), later=True)
            else:
                page.add("<p class='note'>This method measures no eigenvalues.</p>")
            page.add("</div>")
    _runs(page, runs, root)


def build(root: Path, seeds: int = 3) -> str:
    """The page.

    Args:
        root: Folder of all runs.
        seeds: Least number of seeds per row of a table.

    Raises:
        UserError: If there is no run that can be read, or ``root`` is a folder within that of all
            runs.
    """
    page, experiments = Page(), dict[str, list[Glance]]()
    found, damaged = look_below(root)
    for run in found:
        parts = run.path.relative_to(root).parts
        if len(parts) == DEPTH:
            experiments.setdefault(parts[0], []).append(run)
        else:
            damaged.append(
                f"{run.path} is not {DEPTH} folders below {root}: move it, or point --runs at the "
                "folder of all runs."
            )
    if not experiments:
        raise UserError(
            next(iter(damaged), f"{root} holds no runs: train some first, or point --runs at them.")
        )
    states = [run.status for runs in experiments.values() for run in runs]
    counts = ", ".join(
        f"<span class='{s}'>{states.count(s)} {s}</span>" for s in dict.fromkeys(sorted(states))
    )
    page.add(
        "<h1>Modular Adaptive Training: runs</h1>",
        f"<p>{len(states)} runs: {counts}.</p>",
        "<nav>",
        *(f"<a href='#{escape(name)}'>{escape(name)}</a>" for name in experiments),
        "</nav>",
    )
    page.missing(damaged)
    for name, runs in experiments.items():
        experiment_section(page, name, runs, root, seeds)
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            "<link rel='icon' href='data:,'><title>Modular Adaptive Training: runs</title>",
            f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
            *page.parts,
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 if there is nothing to report."""
    parser = parser_of("report", "Run folders to one HTML page.", "results/report.html")
    add_seeds(parser)
    chosen = parser.parse_args(arguments)
    page = build(chosen.runs, chosen.seeds)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, page)
    say(f"wrote {chosen.out}", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
