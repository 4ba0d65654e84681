"""The paper's claims and those of the controls, each held against paired runs.

    python -m results.claims       # writes results/claims.md from results/runs

Every number is computed: the paper's from its tables, ours from the runs of the seeds that both
sides of a claim have. ``results.paired`` says what decides.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mat.suite.errors import UserError
from mat.suite.files import write_text
from mat.suite.science import differences
from results.alpha import stopped_share
from results.cli import command, parser_of
from results.frame import Run, read_runs
from results.measures import ACCURACY, LOSS, Array, Score, against
from results.paired import LEVEL, RULE, TESTED, interval, permutation_p, verdict
from results.render import EMPTY, Column, Section, to_markdown
from results.specs import PAPER_TABLE_1, PAPER_TABLE_2, PAPER_TABLE_3, PaperTable

RANKED = ("threshold", "lowest", "shuffled", "static")  # policies that a threshold or share decides
Row = tuple[str, str, str]  # model.name, method.name, and what decides: "alpha", "share" or ""


@dataclass(frozen=True)
class Claim:
    """One claim about two rows of an experiment.

    Attributes:
        text: What it says.
        ours: The row that it is about.
        other: The row that it is compared with.
        better: Whether it says that ours ends better; None: it is about FLOPs to the other's best,
            of which ours is to need no more than the paper's share.
        paper: Methods of the paper's table whose numbers are compared; None where it has none.
    """

    text: str
    ours: Row
    other: Row
    better: bool | None = True
    paper: tuple[str, str] | None = None


@dataclass(frozen=True)
class Experiment:
    """Runs that claims are about.

    Attributes:
        title: Its heading.
        runs: First folder below the folder of runs.
        model: ``model.name`` of the baseline.
        by: What decides in its runs of MAT: "alpha" (eq. 4) or "share".
        paper: The paper's table.
        score: What its runs are judged by.
    """

    title: str
    runs: str
    model: str
    by: str
    paper: PaperTable
    score: Score = LOSS

    def row(self, method: str, by: str = "", model: str = "") -> Row:
        """A row by its method; of the baseline's model unless another is named."""
        return model or self.model, method, by

    def claims(self) -> list[Claim]:
        """The claims, the paper's first."""
        by, shallow = self.by, f"{self.model}_shallow"
        mat, equal = self.row("mat", by), self.row("mat_equal", by)
        baseline, fitted = self.row("baseline"), self.row("fitted")
        rand, multirate = self.row("rand"), self.row("multirate")
        return [
            Claim("MAT ends better than the baseline", mat, baseline, True, ("mat", "baseline")),
            Claim("MAT with all of the baseline's FLOPs ends better", equal, baseline),
            Claim(
                "MAT reaches the baseline's best with the paper's share of its FLOPs",
                *(mat, baseline, None, ("mat", "baseline")),
            ),
            Claim(
                "the same with MAT's schedule over all FLOPs",
                *(equal, baseline, None, ("mat", "baseline")),
            ),
            Claim(
                "Multirate reaches the baseline's best with the paper's share of its FLOPs",
                *(multirate, baseline, None, ("multirate", "baseline")),
            ),
            Claim("Multirate ends worse", multirate, baseline, False, ("multirate", "baseline")),
            Claim("random units end worse", rand, baseline, False, ("rand", "baseline")),
            Claim("MAT ends better than multirate", mat, multirate, True, ("mat", "multirate")),
            Claim("MAT ends better than random units", mat, rand, True, ("mat", "rand")),
            Claim("MAT ends better than the baseline fitted to its FLOPs", mat, fitted),
            Claim("MAT ends better than its first set, kept", mat, self.row("static", by)),
            *self._against_shares(mat),
            Claim("MAT ends better than by gradient norms", mat, self.row("gradnorm", by)),
            Claim("MAT ends better than its counts, dealt out at random", mat,
                  self.row("rand_matched", by)),
            Claim("MAT ends better than with shuffled eigenvalues", mat, self.row("shuffled", by)),
            Claim("MAT ends better than lowest first", mat, self.row("inverted", by)),
            Claim("MAT ends better than a shallow model, fitted", mat,
                  self.row("fitted", model=shallow)),
        ]  # fmt: skip

    def _against_shares(self, mat: Row) -> list[Claim]:
        """What a share decides, beside MAT by alpha."""
        if self.by == "share":
            return []
        share, static = self.row("mat", "share"), self.row("static", "share")
        fitted = self.row("fitted")
        return [
            Claim("MAT ends better than by share", mat, share),
            Claim("by share MAT ends better than the baseline", share, self.row("baseline")),
            Claim("by share MAT ends better than a fixed third, kept", share, static),
            Claim("a fixed third ends better than the baseline", static, self.row("baseline")),
            Claim("MAT ends better than a fixed third, kept", mat, static),
            Claim("MAT ends better than a third by gradient norms", mat,
                  self.row("gradnorm", "share")),
            Claim("by share MAT ends better than the baseline fitted to its FLOPs", share, fitted),
            Claim("a fixed third ends better than the baseline fitted to MAT's FLOPs", static,
                  fitted),
            Claim("by share MAT with all of the baseline's FLOPs ends better",
                  self.row("mat_equal", "share"), self.row("baseline")),
        ]  # fmt: skip


EXPERIMENTS = (
    Experiment("Table 1, mini: BERT", "table1_seeds", "bert_mini", "alpha", PAPER_TABLE_1),
    Experiment("Table 1: BERT", "table1_one_seed", "bert", "alpha", PAPER_TABLE_1),
    Experiment("Table 2, mini: Switch", "table2_mini", "switch_mini", "share", PAPER_TABLE_2),
    Experiment(
        "Table 3, mini: VGG16",
        "table3_mini",
        "vgg16_mini",
        "share",
        PAPER_TABLE_3,
        ACCURACY,
    ),
)


def row_of(run: Run) -> Row:
    """The row that a run belongs to; with the counts of another run that run's choice decides."""
    method, by = run.config["method"], ""
    if matched := method.get("matched"):
        by = "alpha" if "selection.alpha" in matched else "share"
    elif method.get("policy") in RANKED:
        by = "share" if run.config["selection"]["alpha"] is None else "alpha"
    return run.model, run.method, by


def read_rows(root: Path, name: str) -> dict[Row, dict[int, Run]]:
    """The runs of an experiment by row and seed.

    Raises:
        UserError: If a run is damaged, or two of a row differ in more than the seed.
    """
    rows: dict[Row, dict[int, Run]] = {}
    for run in read_runs(root, name):
        row = rows.setdefault(row_of(run), {})
        first = next(iter(row.values()), run)
        if differing := differences(first.config, run.config):
            raise UserError(
                f"{run.path} has another {min(differing)} than {first.path}, and one row holds one "
                "configuration: train one of them under a name of its own."
            )
        if run.seed in row:
            raise UserError(f"{run.path} repeats {row[run.seed].path}: delete one of the two.")
        row[run.seed] = run
    return rows


def paired_values(
    claim: Claim,
    rows: dict[Row, dict[int, Run]],
    score: Score,
) -> tuple[list[int], Array]:
    """Seeds and values of a claim: differences of the test score as it is shown, or shares of the
    other's FLOPs (NaN where a run never reaches the other's best).
    """
    ours, others = rows.get(claim.ours, {}), rows.get(claim.other, {})
    seeds, values = sorted(ours.keys() & others.keys()), []
    for seed in seeds:
        if claim.better is None:
            ratio = against(ours[seed], others[seed], (), score)["pflops_ratio"]
            values.append(math.nan if ratio is None else ratio)
        else:
            one, two = (run.number(f"test_{score.name}") for run in (ours[seed], others[seed]))
            values.append(score.shown * (one - two))
    return seeds, np.array(values, float)


def paper_value(claim: Claim, experiment: Experiment) -> float | None:
    """The paper's number for a claim: a difference of test scores, or a ratio of PFLOPs."""
    if claim.paper is None:
        return None
    one, two = (experiment.paper.rows[method] for method in claim.paper)
    if claim.better is None:
        return one["pflops_to_best"][0] / two["pflops_to_best"][0]
    test = f"test_{experiment.score.name}"
    return one[test][0] - two[test][0]


def judged(claim: Claim, experiment: Experiment, values: Array) -> list[str]:
    """The cells of a claim behind its text."""
    paper = paper_value(claim, experiment)
    bound, sign, side = 0.0, "+", -1
    if claim.better is None:
        assert paper is not None
        bound, sign = paper, ""
    else:
        side = experiment.score.sign * (1 if claim.better else -1)
    mean = EMPTY
    if len(values) and not np.isnan(values).any():
        mean = f"{values.mean():{sign}.3f}"
        if len(values) > 1:
            low, high = interval(values)
            mean += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    tested = len(values) >= TESTED and not np.isnan(values).any()
    each = [EMPTY if math.isnan(value) else f"{value:{sign}.3f}" for value in values]
    return [
        EMPTY if paper is None else f"{paper:{sign}.3f}",
        mean,
        ", ".join(each) or "no runs",
        f"{int((side * (values - bound) > 0).sum())} of {len(values)}",
        f"{permutation_p(values - bound):.4f}" if tested else EMPTY,
        verdict(values - bound, side),
    ]


def section(experiment: Experiment, root: Path) -> Section | None:
    """The claims of an experiment; those that neither the paper nor a run speaks of are left out.

    Returns:
        The section, or None where there are no runs at all.

    Raises:
        UserError: If a run cannot be read.
    """
    if not (root / experiment.runs).is_dir():
        return None
    rows, lines = read_rows(root, experiment.runs), []
    for claim in experiment.claims():
        _, values = paired_values(claim, rows, experiment.score)
        if len(values) or claim.paper:
            lines.append([claim.text, *judged(claim, experiment, values)])
    headers = (
        "claim", "the paper's", f"ours, mean [{LEVEL:.0%} interval]", "by seed", "support it",
        "p", "verdict",
    )  # fmt: skip
    seeds = sorted({seed for row in rows.values() for seed in row})
    title = f"{experiment.title} ({experiment.score.unit}; seeds {', '.join(map(str, seeds))})"
    columns = zip(headers, zip(*lines, strict=True), strict=True)
    return Section(title, [Column(header, texts) for header, texts in columns])


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the range where there are several."""
    if not len(values):
        return EMPTY
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def outlier(run: Run) -> float | None:
    """The largest eigenvalue over the median at a run's last estimate; None without estimates."""
    if run.units is None or "lambda_max" not in run.units:
        return None
    known = run.units.dropna(subset="lambda_max")
    if known.empty:
        return None
    last = known.loc[known["t"] == known["t"].max(), "lambda_max"]
    return float(last.max() / last.median())


def row_section(experiment: Experiment, root: Path) -> Section:
    """What the claims of an experiment rest on: each row over its seeds.

    Raises:
        UserError: If a run cannot be read.
    """
    rows, score = read_rows(root, experiment.runs), experiment.score
    lines = []
    for (model, method, by), runs in sorted(rows.items()):
        summaries = [run.summary for run in runs.values()]
        scores = [score.shown * s[f"best_validation_{score.name}"] for s in summaries]
        tests = [score.shown * s[f"test_{score.name}"] for s in summaries]
        deviation = f"{np.std(scores, ddof=1):.3f}" if len(scores) > 1 else EMPTY
        name = f"{method} by {by}" if by else method
        lines.append([
            name if model == experiment.model else f"{name}, {model}",
            str(len(runs)),
            _spread(scores, 3),
            deviation,
            f"{np.mean(tests):.3f}",
            _spread([s["active_share"] for s in summaries], 2),
            _spread([stopped_share(r) for r in runs.values() if r.units is not None], 2),
            _spread([r for run in runs.values() if (r := outlier(run)) is not None], 0),
        ])  # fmt: skip
    headers = (
        "row", "seeds", f"best validation {score.name}, mean (range)", "sd",
        f"test {score.name}", "mean active share (range)", "stopped at the end (range)",
        "largest over median eigenvalue (range)",
    )  # fmt: skip
    columns = zip(headers, zip(*lines, strict=True), strict=True)
    title = f"{experiment.title}: rows"
    return Section(title, [Column(header, texts) for header, texts in columns])


NOTES = (
    RULE,
    "A number is the difference of test scores at the best validation, of FLOPs the share of what "
    "the baseline needed to its best validation. Both sides of a claim have the same seeds, in the "
    "order given; the paper's numbers are differences and ratios of its means.",
    "Intervals are percentile bootstrap intervals, which are too narrow with few seeds.",
    "By alpha the first set, chosen after a twentieth of the FLOPs, is mostly far larger than "
    "those that follow: that MAT ends better than it says that most units need not train, not "
    "that the set has to move. By share both sets have the same size.",
    "Eigenvalues are those of the last estimate: of a set that is kept, that which chose it. By "
    "eq. (4) with alpha = 0.1 a unit trains only above about a tenth of the largest.",
    "With 0.70 of the baseline's FLOPs MAT ends with its schedule; what it is fairly compared with "
    "is the baseline fitted to the same FLOPs.",
)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when the claims could not be judged."""
    parser = parser_of("claims", "Hold the paper's claims against paired runs.", "results")
    chosen = parser.parse_args(arguments)
    sections = []
    for experiment in EXPERIMENTS:
        if (judgements := section(experiment, chosen.runs)) is not None:
            sections += [judgements, row_section(experiment, chosen.runs)]
    if not sections:
        raise UserError(f"{chosen.runs} holds no runs that claims are about: train table1 first.")
    path = chosen.out / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_markdown("Claims", "python -m results.claims", sections, NOTES))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
