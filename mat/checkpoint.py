"""Checkpoints: written atomically, read with ``weights_only``."""

import os
from pathlib import Path
from typing import Any

import torch

from mat.errors import UserError


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Read a checkpoint.

    Args:
        path: The file.
        device: Where tensors go.

    Returns:
        What was saved, or None if there is no such file.

    Raises:
        UserError: If the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        loaded: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise UserError(f"{path} is damaged: remove {path.parent} to start the run again.") from error
    return loaded
