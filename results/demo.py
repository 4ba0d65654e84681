"""The demo's table and picture: what the four methods did on the default data (``make demo``).

    python -m results.demo                     # the table, and runs/demo_curves.png

Fails when the baseline ends less than ``MARGIN`` nats under the unigram entropy: a smoke run that
learns nothing is worth nothing.
"""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mat.suite.errors import UserError
from mat.suite.files import say
from mat.suite.glance import LEDGER
from results.cli import command, parser_of
from results.curves import draw
from results.frame import Key, Run
from results.specs import SPECS

MARGIN = 0.5


def table(rows: dict[Key, list[Run]]) -> Table:
    """Method by validation loss, TFLOPs by column, seconds, active share."""
    shown = Table(
        title="Four methods, one seed (TFLOPs executed, embeddings and vocabulary left out)",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("method", "valid.\nloss", *LEDGER, "total", "secs", "active\nshare"):
        header = column.replace("_", "\n")
        shown.add_column(header, justify="left" if column == "method" else "right", no_wrap=True)
    for (_, method), runs in rows.items():
        summary = runs[0].summary
        flops = [1000 * summary[f"pflops_{column}"] for column in LEDGER] + [
            1000 * summary["pflops"]
        ]
        shown.add_row(
            method, f"{summary['best_validation_loss']:.3f}", *(f"{value:.2f}" for value in flops),
            f"{summary['seconds']:.0f}", f"{summary['active_share']:.2f}",
        )  # fmt: skip
    return shown


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 if runs are missing or the baseline has learned too little."""
    chosen = parser_of("demo", "Show what the four methods did.", "runs", "runs").parse_args(
        arguments
    )
    rows = SPECS["demo"].load(chosen.runs, seeds=1)
    Console().print(table(rows))
    baseline = next(iter(rows.values()))[0].summary
    learned = baseline["unigram_entropy"] - baseline["best_validation_loss"]
    say(f"wrote {draw(SPECS['demo'], chosen.runs, chosen.out, seeds=1)}", sys.stdout)
    say(f"The baseline ends {learned:.2f} nats under the unigram entropy.", sys.stdout)
    if learned < MARGIN:
        raise UserError(
            f"the baseline ends only {learned:.2f} nats under the unigram entropy, wanted {MARGIN}."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
