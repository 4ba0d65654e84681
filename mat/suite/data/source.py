"""Rows as they are stored: on the Hugging Face hub or in Parquet files, read by ``datasets``.

They stream by PIECE at a time, so that a split may be larger than memory. Data that ship with a
package (pydocs, digits) come from elsewhere.
"""

import glob
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mat.suite.config import DatasetConfig
from mat.suite.data.cache import file_hash
from mat.suite.errors import UserError

PIECE = 2048  # rows that are in memory at once


@dataclass(frozen=True)
class Column:
    """A column to read: what it is called, what it holds in words, and a test of its Arrow type."""

    names: tuple[str, ...]
    content: str
    fits: Callable[[Any], bool]


def is_packaged(config: DatasetConfig) -> bool:
    """Whether the data ship with a package, as pydocs and digits do."""
    return config.hub_path is None and config.local_folder is None


def origin(config: DatasetConfig) -> str:
    """Where the data come from, for messages: the local folder, or the dataset's name."""
    return str(_folder(config) or f"dataset={config.name}")


def source_key(config: DatasetConfig, splits: tuple[str, ...]) -> list[str]:
    """What identifies hub or local data: the hub's name, or hashes of the files."""
    if _folder(config) is None:
        return [str(config.hub_path), str(config.hub_name)]
    return [f"{split}:{file_hash(file)}" for split in splits for file in _files(config, split)]


def read(
    config: DatasetConfig, split: str, doing: str, *columns: Column
) -> Iterator[tuple[str, int, list[Any]]]:
    """Read columns of a split, under a progress bar.

    Args:
        config: The dataset's configuration.
        split: Name of the split.
        doing: What is done with the rows, for the progress bar.
        columns: Columns to read.

    Yields:
        The file (or hub split), the number of its first row here, and an Arrow array per column.

    Raises:
        UserError: If files are missing or damaged, or lack a column.
    """
    local = _folder(config) is not None
    label = f"{doing} {config.name} {split}"
    with tqdm(desc=label, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
        for where in _files(config, split) if local else [f"{config.hub_path} ({split})"]:
            first = 0
            for table in _parquet(where) if local else _hub(config, split):
                yield where, first, [table.column(_name(table, c, where)) for c in columns]
                first += table.num_rows
                bar.update(table.num_rows)


def _folder(config: DatasetConfig) -> Path | None:
    if config.root is None or config.local_folder is None:
        return None
    return Path(config.root).expanduser() / config.local_folder


def _files(config: DatasetConfig, split: str) -> list[str]:
    folder = _folder(config)
    assert folder is not None
    found = sorted(glob.glob(f"{glob.escape(str(folder))}/{split}*.parquet"))
    if not found:
        hub = "set dataset.root=null to load from the hub"
        raise UserError(
            f"{folder} has no {split}*.parquet: point dataset.root (or MAT_DATA) at the folder that"
            f" holds {folder.name}/, or {hub if config.hub_path else 'choose another dataset'}."
        )
    return found


def _parquet(file: str) -> Iterator[Any]:
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            "parquet", data_files=glob.escape(file), split="train", streaming=True, batch_size=PIECE
        )
        yield from rows.with_format("arrow").iter(PIECE)
    except Exception as error:  # datasets raises many kinds; all mean that the file is damaged
        raise UserError(f"{file} is not a readable Parquet file: copy it again.") from error


def _hub(config: DatasetConfig, split: str) -> Iterator[Any]:
    import datasets

    needed = (
        f"set dataset.root (or MAT_DATA) to a folder that holds {config.local_folder}/*.parquet"
    )
    if config.hub_path is None:
        raise UserError(f"dataset={config.name} is not on the hub: {needed}.")
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(config.hub_path, config.hub_name, split=split)
        yield from rows.with_format("arrow").iter(PIECE)
    except Exception as error:  # the hub's client raises many kinds, too
        raise UserError(
            f"dataset={config.name} could not be loaded from the hub ({type(error).__name__}): "
            f"check the network, or {needed}."
        ) from error


def _name(table: Any, column: Column, where: str) -> str:
    """The one column of a table that fits."""
    schema = table.schema
    fits = [n for n in column.names if n in schema.names and column.fits(schema.field(n).type)]
    if len(fits) != 1:
        names = " or ".join(f"'{name}'" for name in column.names)
        stored = ", ".join(f"'{field.name}' ({field.type})" for field in schema)
        raise UserError(
            f"{where} needs one column {names} of {column.content} and has {stored}: rename or "
            "convert one."
        )
    return fits[0]
