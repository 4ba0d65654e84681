"""What the command lines of ``results`` have in common."""

import argparse
from pathlib import Path


def parser_of(module: str, about: str, out: str, runs: str = "results/runs") -> argparse.ArgumentParser:
    """A parser of ``--runs`` and ``--out``, with their defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m results.{module}", description=about)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="where to write (default: %(default)s)")
    return parser


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Let a parser take ``--seeds``."""
    parser.add_argument("--seeds", type=int, default=3, help="least number of seeds per row (default: %(default)s)")
