"""The tables by name: which rows, in which order, beside which numbers of the paper. A new table is an entry here."""

from dataclasses import dataclass
from pathlib import Path

from results.frame import Key, Run, group, read_runs
from results.measures import Level, Mark

PaperValue = tuple[float, float | None]  # mean, standard deviation (None where the paper gives none)


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


def _paper_table(source: str, titles: dict[str, str], rows: dict[str, tuple[PaperValue, ...]]) -> PaperTable:
    return PaperTable(source, titles, {method: dict(zip(titles, row, strict=True)) for method, row in rows.items()})


PAPER_TABLE_1 = _paper_table(
    "Shi et al., NeurIPS 2023, arXiv 2405.07527, Table 1: log PPL; PFLOPs per GPU, without embeddings",
    {
        "val_loss_mark1": "val @10 PFLOPs",
        "val_loss_mark2": "val @15 PFLOPs",
        "val_loss_mark3": "val @20 PFLOPs",
        "test_loss": "test @ convergence",
        "pflops_to_best": "PFLOPs until best test loss",
    },
    {
        "baseline": ((5.39, 0.15), (4.75, 0.06), (4.48, 0.03), (4.41, 0.05), (28.70, None)),
        "rand": ((5.65, 0.18), (5.11, 0.16), (4.96, 0.11), (4.82, 0.06), (21.53, None)),
        "multirate": ((4.93, 0.10), (4.57, 0.03), (4.52, 0.02), (4.48, 0.03), (19.46, None)),
        "mat": ((4.46, 0.04), (4.41, 0.02), (4.35, 0.02), (4.27, 0.03), (16.50, None)),
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
        title: Heading.
        runs: First folder below the folder of runs.
        rows: In the order shown; the first is the baseline, all others are compared with it.
        levels: Columns read along the run, besides test loss and PFLOPs.
        paper: The paper's table, for rows of the baseline's model.
    """

    name: str
    title: str
    runs: str
    rows: tuple[Row, ...]
    levels: tuple[Level, ...]
    paper: PaperTable | None = None

    @property
    def baseline(self) -> Key:
        """The row all others are compared with."""
        return self.rows[0].key

    def row_name(self, row: Row) -> str:
        """The row's name in the CSV: its method, or its label for another model than the baseline's."""
        return row.method if row.model == self.baseline[0] else row.label.replace(", ", "_")

    def load(self, root: str | Path, seeds: int) -> dict[Key, list[Run]]:
        """Read the runs of all rows, in the rows' order, each sorted by seed.

        Raises:
            ResultsError: If a run is missing, incomplete, failed or damaged, or seeds and configurations do not match.
        """
        keys = [row.key for row in self.rows]
        return group(read_runs(root, self.runs, keys), keys, Path(root) / self.runs, seeds)


def _four_methods(model: str) -> tuple[Row, ...]:
    labels = {"baseline": "BERT", "rand": "BERT-Rand", "multirate": "Multirate", "mat": "MAT"}
    return tuple(Row(model, method, label) for method, label in labels.items())


SCALES = (("", ""), ("_mini", ", mini"))
_MARKS = (Mark(1), Mark(2), Mark(3))

SPECS = {
    spec.name: spec
    for spec in (
        TableSpec("demo", "Mini BERT on the Python documentation", "demo", _four_methods("bert_mini"), _MARKS),
        *(
            TableSpec(
                f"table1{suffix}", f"Table 1{scale}: BERT on WikiText-2", f"table1{suffix}",
                (*_four_methods(f"bert{suffix}"), Row(f"bert{suffix}_shallow", "baseline", "shallow")),
                _MARKS, PAPER_TABLE_1,
            )
            for suffix, scale in SCALES
        ),
        *(
            TableSpec(
                f"table1_controls{suffix}", f"Controls of Table 1{scale}: BERT on WikiText-2", f"table1{suffix}",
                (
                    Row(f"bert{suffix}", "baseline", "BERT"),
                    Row(f"bert{suffix}", "mat", "MAT"),
                    Row(f"bert{suffix}", "fitted", "BERT, fitted"),  # its schedule fitted to MAT's FLOPs
                    Row(f"bert{suffix}_shallow", "fitted", "shallow, fitted"),
                    Row(f"bert{suffix}", "static", "static"),
                    Row(f"bert{suffix}", "inverted", "inverted"),
                    Row(f"bert{suffix}", "shuffled", "shuffled"),
                    Row(f"bert{suffix}", "gradnorm", "gradnorm"),
                    Row(f"bert{suffix}", "rand_matched", "rand, matched"),
                ), _MARKS,
            )
            for suffix, scale in SCALES
        ),
    )
}  # fmt: skip
