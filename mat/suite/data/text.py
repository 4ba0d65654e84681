"""Text line by line: WikiText and its like from the hub or local Parquet, or prose that ships with CPython."""

import platform
from collections.abc import Callable, Iterator

from mat.suite.config import TextConfig
from mat.suite.data.sources import PIECE, ArrowPiece, Columns, Stream, is_packaged, open_splits, source_key

SPLITS = ("train", "validation", "test")
Lines = Stream[list[str]]


def _is_text(kind: object) -> bool:
    import pyarrow

    return kind in (pyarrow.string(), pyarrow.large_string())


COLUMNS: Columns = {"text": ("strings", _is_text)}


def open_text(config: TextConfig) -> dict[str, Lines]:
    """The corpus: a stream of lines by split, some at a time.

    Raises:
        UserError: If files are missing or damaged, with the path and the remedy; also while reading.
    """
    if is_packaged(config):
        return _pydocs()

    def lines(rows: Stream[ArrowPiece]) -> Callable[[], Iterator[list[str]]]:
        return lambda: ([line or "" for line in piece.table.column("text").to_pylist()] for piece in rows)

    return {split: Stream(rows.rows, lines(rows)) for split, rows in open_splits(config, SPLITS, COLUMNS).items()}


def text_key(config: TextConfig) -> list[str]:
    """What identifies the text: hashes of local files, or the hub's name, or Python's version."""
    return ["pydocs", platform.python_version()] if is_packaged(config) else source_key(config, SPLITS)


def _pydocs() -> dict[str, Lines]:
    """English prose: ``pydoc_data.topics``, every topic in one split."""
    from pydoc_data.topics import topics

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, name in enumerate(sorted(topics)):
        split = {8: "validation", 9: "test"}.get(number % 10, "train")
        splits[split] += topics[name].splitlines()

    def pieces(lines: list[str]) -> Callable[[], Iterator[list[str]]]:
        return lambda: (lines[i : i + PIECE] for i in range(0, len(lines), PIECE))

    return {split: Stream(len(lines), pieces(lines)) for split, lines in splits.items()}
