"""The tables by name: which rows, in which order, beside which numbers of the paper. A new table is
an entry here.
"""

from dataclasses import dataclass
from pathlib import Path

from mat.suite.errors import UserError
from results.frame import Key, Run, group, read_runs
from results.measures import ACCURACY, LOSS, Level, Mark, Score, Until

DATASETS = {  # what readers call them, by dataset.name
    "pydocs": "the Python documentation",
    "wikitext2": "WikiText-2",
    "wikitext103": "WikiText-103",
    "enwiki2015": "English Wikipedia (2015)",
    "cifar10": "CIFAR-10",
}
PaperValue = tuple[
    float, float | None
]  # mean, standard deviation (None where the paper gives none)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        source: Where it stands.
        titles: What the paper calls each of its columns, by our measure.
        rows: Its numbers, by method and measure.
    """

    source: str
    titles: dict[str, str]
    rows: dict[str, dict[str, PaperValue]]


def _paper_table(
    where: str, titles: dict[str, str], rows: dict[str, tuple[PaperValue, ...]]
) -> PaperTable:
    numbers = {method: dict(zip(titles, row, strict=True)) for method, row in rows.items()}
    return PaperTable(f"Shi et al., NeurIPS 2023, arXiv 2405.07527, {where}", titles, numbers)


def _loss_titles(*marks: int) -> dict[str, str]:
    """What Tables 1 and 2 call their columns, the first of which are read at so many PFLOPs."""
    read = {
        f"val_loss_mark{number}": f"val @{mark} PFLOPs"
        for number, mark in enumerate(marks, start=1)
    }
    return {
        **read,
        "test_loss": "test @ convergence",
        "pflops_to_best": "PFLOPs until best test loss",
    }


PAPER_TABLE_1 = _paper_table(
    "Table 1: log PPL; PFLOPs per GPU, without embeddings",
    _loss_titles(10, 15, 20),
    {
        "baseline": ((5.39, 0.15), (4.75, 0.06), (4.48, 0.03), (4.41, 0.05), (28.70, None)),
        "rand": ((5.65, 0.18), (5.11, 0.16), (4.96, 0.11), (4.82, 0.06), (21.53, None)),
        "multirate": ((4.93, 0.10), (4.57, 0.03), (4.52, 0.02), (4.48, 0.03), (19.46, None)),
        "mat": ((4.46, 0.04), (4.41, 0.02), (4.35, 0.02), (4.27, 0.03), (16.50, None)),
    },
)

PAPER_TABLE_2 = _paper_table(
    "Table 2: log PPL; PFLOPs per GPU, without embeddings",
    _loss_titles(200, 400, 600),
    {
        "baseline": ((3.16, 0.12), (2.31, 0.05), (1.93, 0.03), (1.74, 0.02), (1155.2, None)),
        "rand": ((2.92, 0.15), (2.15, 0.08), (2.01, 0.07), (1.93, 0.05), (837.5, None)),
        "multirate": ((2.67, 0.09), (2.02, 0.08), (1.83, 0.05), (1.77, 0.04), (740.4, None)),
        "mat": ((2.34, 0.06), (1.92, 0.03), (1.69, 0.02), (1.68, 0.02), (614.8, None)),
    },
)

PAPER_TABLE_3 = _paper_table(
    "Table 3: top-1 accuracy in %; PFLOPs per GPU",
    {
        "pflops_to_train_95": "PFLOPs until train acc 95 %",
        "pflops_to_train_99": "PFLOPs until train acc 99 %",
        "test_accuracy": "test top-1 % @ convergence",
        "pflops_to_best": "PFLOPs @ convergence",
    },
    {
        "baseline": ((8.85, None), (12.06, None), (93.77, 0.08), (17.14, None)),
        "rand": ((9.96, None), (13.35, None), (92.71, 0.08), (18.84, None)),
        "multirate": ((7.19, None), (9.75, None), (93.43, 0.14), (13.35, None)),
        "mat": ((5.31, None), (7.21, None), (93.86, 0.05), (9.03, None)),
    },
)


@dataclass(frozen=True)
class Row:
    """One row: its runs are those with this ``model.name`` and ``method.name``."""

    model: str
    method: str
    label: str

    @property
    def key(self) -> Key:
        """What its runs are found by."""
        return self.model, self.method


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Attributes:
        name: Stem of the files written.
        subject: Its heading, but for the dataset.
        runs: First folder below the folder of runs.
        dataset: ``dataset.name`` of all its runs.
        rows: In the order shown; the first is the baseline, all others are compared with it.
        levels: Columns read along the run, besides test score and PFLOPs.
        paper: The paper's table, for rows of the baseline's model.
        score: What its runs are judged by.
    """

    name: str
    subject: str
    runs: str
    dataset: str
    rows: tuple[Row, ...]
    levels: tuple[Level, ...]
    paper: PaperTable | None = None
    score: Score = LOSS

    @property
    def title(self) -> str:
        """Heading."""
        return f"{self.subject} on {DATASETS[self.dataset]}"

    @property
    def baseline(self) -> Key:
        """The row all others are compared with."""
        return self.rows[0].key

    def row_name(self, row: Row) -> str:
        """The row's name in the CSV: its method, or its label for another model than the
        baseline's.
        """
        return row.method if row.model == self.baseline[0] else row.label.replace(", ", "_")

    def load(self, root: Path, seeds: int) -> dict[Key, list[Run]]:
        """Read the runs of all rows, in the rows' order, each sorted by seed.

        Raises:
            UserError: If a run is missing, incomplete, failed, damaged or of another dataset, or
                seeds and
                configurations do not match.
        """
        keys = [row.key for row in self.rows]
        runs = read_runs(root, self.runs, keys)
        for run in runs:
            if (dataset := run.config["dataset"]["name"]) != self.dataset:
                raise UserError(
                    f"{run.path} has dataset={dataset}, but {self.name} is of "
                    f"dataset={self.dataset}: keep it below "
                    "another name=..., and train this one on its dataset."
                )
            self.score.check(run)
        return group(runs, keys, root / self.runs, seeds)


def _four_methods(model: str, label: str = "BERT") -> tuple[Row, ...]:
    labels = {"baseline": label, "rand": f"{label}-Rand", "multirate": "Multirate", "mat": "MAT"}
    return tuple(Row(model, method, label) for method, label in labels.items())


def _with_controls(model: str, label: str) -> tuple[Row, ...]:
    """The four methods, the baseline with MAT's FLOPs and MAT with the baseline's."""
    fitted, equal = (
        Row(model, "fitted", f"{label}, fitted"),
        Row(model, "mat_equal", "MAT, baseline's FLOPs"),
    )
    return *_four_methods(model, label), fitted, equal


_MARKS = (Mark(1), Mark(2), Mark(3))
_ACCURACIES = {
    "": (0.95, 0.99),
    "_mini": (0.8, 0.85, 0.9, 0.95, 0.99),
}  # mini: the highest that all reach is wanted
_TEXTS = {"": "wikitext103", "_mini": "enwiki2015"}


def _tables(suffix: str, scale: str) -> tuple[TableSpec, ...]:
    """The tables of one scale: what names end in, and what headings say of it."""
    bert, shallow = f"bert{suffix}", f"bert{suffix}_shallow"
    return (
        TableSpec(
            f"table1{suffix}",
            f"Table 1{scale}: BERT",
            f"table1{suffix}",
            "wikitext2",
            (*_four_methods(bert), Row(shallow, "baseline", "shallow")),
            _MARKS,
            PAPER_TABLE_1,
        ),
        TableSpec(
            f"table1_controls{suffix}",
            f"Controls of Table 1{scale}: BERT",
            f"table1{suffix}",
            "wikitext2",
            (
                Row(bert, "baseline", "BERT"),
                Row(bert, "mat", "MAT"),
                Row(bert, "mat_equal", "MAT, baseline's FLOPs"),
                Row(bert, "fitted", "BERT, fitted"),  # its schedule fitted to MAT's FLOPs
                Row(shallow, "fitted", "shallow, fitted"),
                Row(bert, "static", "static"),
                Row(bert, "inverted", "inverted"),
                Row(bert, "shuffled", "shuffled"),
                Row(bert, "gradnorm", "gradnorm"),
                Row(bert, "rand_matched", "rand, matched"),
            ),
            _MARKS,
        ),
        TableSpec(
            f"table2{suffix}",
            f"Table 2{scale}: Switch Transformer",
            f"table2{suffix}",
            _TEXTS[suffix],
            _with_controls(f"switch{suffix}", "Switch"),
            _MARKS,
            PAPER_TABLE_2,
        ),
        TableSpec(
            f"table3{suffix}",
            f"Table 3{scale}: VGG16",
            f"table3{suffix}",
            "cifar10",
            _with_controls(f"vgg16{suffix}", "VGG16"),
            tuple(map(Until, _ACCURACIES[suffix])),
            PAPER_TABLE_3,
            ACCURACY,
        ),
    )


_DEMO = TableSpec("demo", "Mini BERT", "demo", "pydocs", _four_methods("bert_mini"), _MARKS)
SPECS = {spec.name: spec for spec in (_DEMO, *_tables("", ""), *_tables("_mini", ", mini"))}
