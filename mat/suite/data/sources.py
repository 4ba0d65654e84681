"""Where data lie: on the Hugging Face hub, or as the same Parquet files in a local folder; read piece by piece.

Nothing here holds a whole split in memory. Data sets that ship with a package (pydocs, digits) come from elsewhere.
"""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mat.suite.config import DatasetConfig
from mat.suite.errors import UserError

PIECE = 2048  # rows that are in memory at once
Piece = TypeVar("Piece", covariant=True)
Columns = Mapping[str, tuple[str, Callable[[Any], bool]]]  # name: what it holds in words, test of its Arrow type


@dataclass(frozen=True)
class Stream(Generic[Piece]):
    """A split in pieces, read anew each time it is iterated over.

    Attributes:
        rows: Number of rows in all pieces.
        read: Begins at the first piece.
    """

    rows: int
    read: Callable[[], Iterator[Piece]]

    def __iter__(self) -> Iterator[Piece]:
        return self.read()


@dataclass(frozen=True)
class ArrowPiece:
    """Consecutive rows of a split: an Arrow table, the file (or hub split) it is from and its first row's number."""

    table: Any
    where: str
    first: int

    def __len__(self) -> int:
        return int(self.table.num_rows)


def is_packaged(config: DatasetConfig) -> bool:
    """Whether the data ship with a package, as pydocs and digits do."""
    return config.hub_path is None and config.local_folder is None


def origin(config: DatasetConfig) -> str:
    """Where the data come from, for messages: the local folder, or the dataset's name."""
    return str(_folder(config)) if _is_local(config) else f"dataset={config.name}"


def _is_local(config: DatasetConfig) -> bool:
    return config.root is not None and config.local_folder is not None


def _folder(config: DatasetConfig) -> Path:
    return Path(str(config.root)).expanduser() / str(config.local_folder)


def source_key(config: DatasetConfig, splits: tuple[str, ...]) -> list[str]:
    """What identifies hub or local data: hashes of the files, or the hub's name."""
    if not _is_local(config):
        return [str(config.hub_path), str(config.hub_name)]
    keys = []
    for split, files in _files(config, splits).items():
        for file in files:
            with open(file, "rb") as opened:
                keys.append(f"{split}:{hashlib.file_digest(opened, 'sha256').hexdigest()}")
    return keys


def open_splits(config: DatasetConfig, splits: tuple[str, ...], columns: Columns) -> dict[str, Stream[ArrowPiece]]:
    """The rows of the splits.

    Args:
        config: The dataset's configuration.
        splits: Names of the splits.
        columns: Columns to read.

    Returns:
        A stream by split.

    Raises:
        UserError: If files are missing or damaged, or lack a column, with the path and the remedy; also while reading.
    """
    return _parquet(config, splits, columns) if _is_local(config) else _hub(config, splits, columns)


def _files(config: DatasetConfig, splits: tuple[str, ...]) -> dict[str, list[str]]:
    folder, found = _folder(config), {}
    otherwise = "set dataset.root=null to load from the hub" if config.hub_path else "choose another dataset"
    for split in splits:
        found[split] = sorted(glob.glob(f"{glob.escape(str(folder))}/{split}*.parquet"))
        if not found[split]:
            raise UserError(
                f"{folder} has no {split}*.parquet: point dataset.root (or MAT_DATA) at the folder that holds "
                f"{folder.name}/, or {otherwise}."
            )
    return found


def _require(schema: Any, where: str, columns: Columns, remedy: str) -> None:
    for name, (content, fits) in columns.items():
        if name not in schema.names or not fits(schema.field(name).type):
            raise UserError(f"{where} has no column '{name}' of {content}: {remedy}.")


def _parquet(config: DatasetConfig, splits: tuple[str, ...], columns: Columns) -> dict[str, Stream[ArrowPiece]]:
    import pyarrow
    import pyarrow.parquet as pq

    @contextmanager
    def opened(file: str) -> Iterator[Any]:
        try:
            yield pq.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a readable Parquet file: copy it again.") from error

    def read(files: list[str]) -> Iterator[ArrowPiece]:
        for file in files:
            first = 0
            with opened(file) as parquet:
                for batch in parquet.iter_batches(PIECE, columns=list(columns)):
                    yield ArrowPiece(batch, file, first)
                    first += batch.num_rows

    streams = {}
    for split, files in _files(config, splits).items():
        rows = 0
        for file in files:
            with opened(file) as parquet:
                _require(parquet.schema_arrow, file, columns, f"copy the Parquet files of {config.name} there")
                rows += parquet.metadata.num_rows
        streams[split] = Stream(rows, lambda files=files: read(files))  # type: ignore[misc]
    return streams


def _hub(config: DatasetConfig, splits: tuple[str, ...], columns: Columns) -> dict[str, Stream[ArrowPiece]]:
    from datasets import load_dataset
    from datasets import logging as datasets_logging

    needed = f"set dataset.root (or MAT_DATA) to a folder that holds {config.local_folder}/*.parquet"
    if config.hub_path is None:
        raise UserError(f"dataset={config.name} is not on the hub: {needed}.")
    datasets_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = load_dataset(config.hub_path, config.hub_name)
    except Exception as error:  # the hub's client raises many kinds; all mean that the data could not be had
        raise UserError(
            f"dataset={config.name} could not be loaded from the hub ({type(error).__name__}): check the network, or "
            f"{needed}."
        ) from error

    def read(split: str) -> Iterator[ArrowPiece]:
        first = 0
        for table in loaded[split].with_format("arrow").iter(PIECE):
            yield ArrowPiece(table, f"{config.hub_path} ({split})", first)
            first += table.num_rows

    for split in splits:
        _require(loaded[split].features.arrow_schema, f"{config.hub_path} ({split})", columns, needed)
    return {split: Stream(len(loaded[split]), lambda split=split: read(split)) for split in splits}  # type: ignore[misc]
