"""What the command lines of ``results`` have in common."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mat.suite.compose import explain
from mat.suite.files import keep_streams, replacing, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command line whose refusals are one sentence on standard error, and exit code 2."""

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> int:
        keep_streams()
        try:
            return main(arguments)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            say(f"error: {sentence}")
            return 2

    return guarded


def parser_of(
    module: str, about: str, out: str, runs: str = "results/runs"
) -> argparse.ArgumentParser:
    """A parser of ``--runs`` and ``--out``, with their defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m results.{module}", description=about)
    parser.add_argument(
        "--runs", type=Path, default=Path(runs), help="folder of all runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="where to write (default: %(default)s)"
    )
    return parser


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Let a parser take ``--seeds``."""
    parser.add_argument(
        "--seeds", type=int, default=3, help="least number of seeds per row (default: %(default)s)"
    )


def save_figure(figure: "Figure", stem: Path, dpi: int) -> Path:
    """Write a figure as PNG, as a whole or not at all; the same runs make the same file."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}.png")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
    return path
