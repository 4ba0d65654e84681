"""What is made once from the data and kept on disk: a folder that exists is complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm

from mat.suite.data.sources import Stream

T = TypeVar("T", bound=Sized)


def cached(root: str | Path, name: str, identity: list[Any], write: Callable[[Path], None]) -> Path:
    """The cache folder of some content; made if it is not there.

    One process at a time makes folders below a root: the other runs of a sweep wait and then find theirs. A killed
    one leaves an unfinished folder, which the next removes.

    Args:
        root: Folder of all caches.
        name: First part of the folder's name.
        identity: Plain values that say what the content is; their hash is the last part of the name.
        write: Writes the content into an empty folder.

    Returns:
        The folder.
    """
    root = Path(root).expanduser()
    folder = root / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if not folder.is_dir():
            for stale in root.glob(".unfinished-*"):
                shutil.rmtree(stale)
            unfinished = root / f".unfinished-{folder.name}"
            unfinished.mkdir()
            try:
                write(unfinished)
                os.replace(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def save_rows(path: Path, pieces: Iterable[NDArray[Any]], dtype: DTypeLike, shape: tuple[int, ...] = ()) -> int:
    """Write ``<path>`` as ``numpy.save`` writes the concatenated pieces, holding one of them at a time.

    Args:
        path: The .npy file.
        pieces: Arrays of any number of rows.
        dtype: Of the file.
        shape: Of a row.

    Returns:
        Number of rows.
    """
    rows = 0
    with open(path, "wb") as file:

        def header() -> None:  # numpy leaves room in it for any number of rows
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": (rows, *shape)}
            np.lib.format.write_array_header_1_0(file, header)

        header()
        for piece in pieces:
            np.asarray(piece, dtype).tofile(file)
            rows += len(piece)
        file.seek(0)
        header()
    return rows


def progress(stream: Stream[T], label: str) -> Iterator[T]:
    """The pieces of a stream under a progress bar over its rows, in a terminal; a piece's length is its rows."""
    with tqdm(total=stream.rows, desc=label, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
        for piece in stream:
            yield piece
            bar.update(len(piece))
