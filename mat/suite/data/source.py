"""Rows as they are stored: on the hub, in Parquet files or in a package, read by ``datasets``.

Files are streamed and the hub's data memory-mapped, so that a split may be larger than memory.
"""

import glob
import logging
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mat.suite.config import DatasetConfig
from mat.suite.data.base import evenly
from mat.suite.data.cache import file_hash
from mat.suite.errors import UserError

PIECE = 2048  # rows that are in memory at once
DIGITS_TEST = 360  # of scikit-learn's digits, evenly of every class


class Column(NamedTuple):
    """What to read: possible names, what it holds in words, the Arrow type to cast it to."""

    names: tuple[str, ...]
    content: str
    kind: str | None = None


def origin(config: DatasetConfig) -> str:
    """Where the data come from, for messages: the local folder, or the dataset's name."""
    return str(_folder(config) or f"dataset={config.name}")


def source_key(config: DatasetConfig, splits: tuple[str, ...]) -> list[str]:
    """What identifies the data: hashes of local files, or the names of hub or package.

    Raises:
        UserError: If a file cannot be read.
    """
    if _is_packaged(config):
        return [config.modality, platform.python_version()]
    if _folder(config) is None:
        return [str(config.hub_path), str(config.hub_name)]
    try:
        return [f"{split}:{file_hash(file)}" for split in splits for file in _files(config, split)]
    except OSError as error:
        fault = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError(f"{fault}: copy it again, or mend its permissions.") from error


def read(
    config: DatasetConfig, split: str, doing: str, *columns: Column
) -> Iterator[tuple[str, int, list[Any]]]:
    """Read columns of a split, a piece at a time, under a progress bar that says ``doing``.

    Yields:
        The file (or hub split), the number of the piece's first row in it, and its columns.

    Raises:
        UserError: If files are missing or damaged, or lack a column.
    """
    label = f"{doing} {config.name} {split}"
    with tqdm(desc=label, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
        for where, load, fault, remedy in _parts(config, split):
            first = 0
            for table in _stream(load, fault, remedy):
                yield where, first, [_column(table, column, where) for column in columns]
                first += table.num_rows
                bar.update(table.num_rows)


def _is_packaged(config: DatasetConfig) -> bool:
    return config.hub_path is None and config.local_folder is None


def _folder(config: DatasetConfig) -> Path | None:
    if config.root is None or config.local_folder is None:
        return None
    return Path(config.root).expanduser() / config.local_folder


def _files(config: DatasetConfig, split: str) -> list[str]:
    folder = _folder(config)
    found = sorted(glob.glob(f"{glob.escape(str(folder))}/{split}*.parquet"))
    if not found:
        hub = "set dataset.root=null to load from the hub"
        raise UserError(
            f"{folder} has no {split}*.parquet: point dataset.root (or MAT_DATA) at the folder that"
            f" holds {config.local_folder}/, or {hub if config.hub_path else 'choose other data'}."
        )
    return found


def _parts(config: DatasetConfig, split: str) -> Iterator[tuple[str, Callable[[], Any], str, str]]:
    """What a split consists of: its name, how it is loaded, and the words when that fails."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if _is_packaged(config):
        packaged = {"text": _pydocs, "image": _digits}[config.modality]
        yield origin(config), partial(packaged, split), config.name, "install it again"
    elif _folder(config) is not None:
        for file in _files(config, split):
            where, stream = glob.escape(file), {"streaming": True, "batch_size": PIECE}
            load = partial(datasets.Dataset.from_parquet, where, **stream)
            yield file, load, f"{file} is not a readable Parquet file", "copy it again"
    else:
        local = f"set dataset.root (or MAT_DATA) to a folder with {config.local_folder}/*.parquet"
        if config.hub_path is None:
            raise UserError(f"dataset={config.name} is not on the hub: {local}.")
        load = partial(datasets.load_dataset, config.hub_path, config.hub_name, split=split)
        fault = f"dataset={config.name} could not be loaded from the hub"
        yield f"{config.hub_path} ({split})", load, fault, f"check the network, or {local}"


def _stream(load: Callable[[], Any], fault: str, remedy: str) -> Iterator[Any]:
    try:
        yield from load().with_format("arrow").iter(PIECE)
    except Exception as error:  # the libraries raise many kinds; all mean that it cannot be read
        raise UserError(f"{fault} ({type(error).__name__}): {remedy}.") from error


def _column(table: Any, column: Column, where: str) -> Any:
    try:
        (name,) = [name for name in column.names if name in table.column_names]
        array = table.column(name)
        return array.cast(column.kind) if column.kind else array
    except (ValueError, NotImplementedError) as error:  # none, two, or of another type
        stored = ", ".join(f"'{field.name}' ({field.type})" for field in table.schema)
        wanted = f"one column '{column.names[0]}' of {column.content}"
        raise UserError(f"{where} has {stored}: rename or convert them to {wanted}.") from error


def _pydocs(split: str) -> Any:
    """English prose: ``pydoc_data.topics``, every topic in one split."""
    from pydoc_data.topics import topics

    from datasets import Dataset

    splits = ["train"] * 8 + ["validation", "test"]
    names = [name for i, name in enumerate(sorted(topics)) if splits[i % 10] == split]
    return Dataset.from_dict({"text": [line for n in names for line in topics[n].splitlines()]})


def _digits(split: str) -> Any:
    """scikit-learn's handwritten digits of 8 x 8 pixels; 17 shades of grey become 0..255."""
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits

    shades, labels = load_digits(return_X_y=True)
    grey = np.rint(shades * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    rows = np.flatnonzero(evenly(labels, DIGITS_TEST) == (split == "test"))
    columns = {"img": [fromarray(image) for image in grey[rows]], "label": labels[rows]}
    return Dataset.from_dict(columns, Features(img=Image(), label=Value("int64")))
