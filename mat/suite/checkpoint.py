"""Checkpoints: replaced as a whole, read with ``weights_only``."""

from pathlib import Path
from typing import Any

import torch

from mat.suite.errors import UserError
from mat.suite.files import replacing


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint."""
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What was saved, its tensors on the device; None if there is no such file.

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
