"""Checkpoints: replaced as a whole, read with ``weights_only``, and checked by the checksum they
end with.
"""

import errno
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from mat.suite.errors import Damaged
from mat.suite.files import move, naming

FORMAT = b"MAT checkpoint 2"  # behind the content, before its SHA-256
SIZE = len(FORMAT) + hashlib.sha256().digest_size


def save(path: Path, state: dict[str, Any], before: Path | None = None) -> str:
    """Write a checkpoint. An older one stays until the new one is found whole on the disk.

    Args:
        path: Where to.
        state: What ``torch.load`` reads with ``weights_only``.
        before: Where the older one stays even then.

    Returns:
        SHA-256 of the content.

    Raises:
        OSError: If the disk is full, or gives back something else.
    """
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getbuffer())
    with naming(temporary):
        with open(temporary, "wb") as file:
            for part in (buffer.getbuffer(), FORMAT, digest.digest()):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if _content(temporary) is None:
            raise OSError(errno.EIO, "the disk does not give back what was written", str(temporary))
        if before is not None and path.is_file():
            move(path, before)
        move(temporary, path)
    return digest.hexdigest()


def load(path: Path, device: torch.device, digest: str | None = None) -> dict[str, Any]:
    """What was saved, its tensors on the device.

    Args:
        path: The file.
        device: Where its tensors go.
        digest: What ``save`` returned, where it is known: no other checkpoint will do.

    Raises:
        Damaged: If the file is missing, damaged, of another version of this program, or not the one
            meant.
    """
    exists = path.is_file()
    content = _content(path) if exists else None
    if content is not None and digest in (None, hashlib.sha256(content).hexdigest()):
        loaded: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location=device, weights_only=True
        )
        return loaded
    state = "damaged, or of another run or version of this program" if exists else "missing"
    raise Damaged(f"{path} is {state}: remove {path.parent} to start the run again.")


def _content(path: Path) -> memoryview | None:
    """The content of a checkpoint that is whole, else None."""
    whole = memoryview(path.read_bytes())
    content, end = whole[:-SIZE], whole[-SIZE:]
    return content if end == FORMAT + hashlib.sha256(content).digest() else None
