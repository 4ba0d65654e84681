"""Prepared data on disk: whole or not there, and checked whenever they are loaded."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from mat.suite.config import DatasetConfig
from mat.suite.errors import UserError

CHECKSUMS = "checksums.json"
FORMAT = 2  # of what is prepared


def prepared(
    config: DatasetConfig, identity: list[Any], write: Callable[[Path], None]
) -> tuple[Path, str]:
    """The folder of a dataset's prepared data; made if it is not there or damaged.

    One process at a time prepares data: the other runs of a sweep wait and then find theirs. A
    killed one leaves an unfinished folder, which the next removes.

    Args:
        config: The dataset's configuration.
        identity: Plain values that say what the content is.
        write: Writes the content into an empty folder.

    Returns:
        The folder, and the fingerprint of its content.

    Raises:
        UserError: If ``dataset.cache`` cannot be written.
    """
    root = Path(config.cache).expanduser()
    folder = root / f"{config.name}-{_short_hash([FORMAT, *identity])}"
    try:
        if (fingerprint := _fingerprint(folder)) is None:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):
                fingerprint = _fingerprint(folder) or _make(folder, write)
    except OSError as error:
        reason = f"dataset.cache={config.cache} cannot be written ({error.strerror or error})"
        raise UserError(f"{reason}: make room there, or choose another folder.") from error
    return folder, fingerprint


def _make(folder: Path, write: Callable[[Path], None]) -> str:
    if folder.exists():
        print(f"{folder} is damaged: it is made again.", file=sys.stderr)
        shutil.rmtree(folder)
    for stale in folder.parent.glob(".unfinished-*"):
        shutil.rmtree(stale)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    unfinished.mkdir()
    try:
        write(unfinished)
        checksums = _checksums(unfinished)
        (unfinished / CHECKSUMS).write_text(json.dumps(checksums))
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _short_hash(checksums)


def _fingerprint(folder: Path) -> str | None:
    """The fingerprint of a folder's content; None if that is not what was written."""
    try:
        checksums = _checksums(folder)
        whole = json.loads((folder / CHECKSUMS).read_text()) == checksums
    except (OSError, ValueError):
        return None
    return _short_hash(checksums) if whole else None


def _checksums(folder: Path) -> dict[str, str]:
    return {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.name != CHECKSUMS}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short_hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
