"""Files in parts of a bounded size, and back: for machines that take and give small files only.

An archive ``data`` in three parts is ``data.<digest>.1of3.part`` to ``data.<digest>.3of3.part``;
the digest is that of all its bytes, so that parts of two archives never mix and no loss goes
unnoticed.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

PART = re.compile(r"(?P<name>.+)\.(?P<digest>[0-9a-f]{16})\.(?P<number>\d+)of(?P<count>\d+)\.part")


def pack(files: Mapping[str, Path], folder: Path, name: str, part_bytes: int) -> list[Path]:
    """Write files as the parts of one archive, in place of earlier parts of that name.

    Args:
        files: Where each lies, by its path in the archive.
        folder: Where the parts go; made if need be.
        name: Of the archive.
        part_bytes: Largest size of a part.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path, file in sorted(files.items()):
            archive.add(file, path)
    content = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.part"):
        found = PART.fullmatch(earlier.name)
        if found and found["name"] == name:
            earlier.unlink()
    count = -(-len(content) // part_bytes)
    parts = []
    for i in range(count):
        parts.append(folder / f"{name}.{_digest(content)}.{i + 1}of{count}.part")
        parts[-1].write_bytes(content[i * part_bytes : (i + 1) * part_bytes])
    return parts


def unpack(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Write the files of every archive whose parts are all there.

    Args:
        folder: Where the parts lie.
        target: Where the files go; what is there already is replaced.

    Returns:
        Names of the archives that are complete, and of the parts that are missing of others.

    Raises:
        ValueError: If a part is damaged.
    """
    archives: dict[tuple[str, str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.part")):
        if found := PART.fullmatch(path.name):
            key = found["name"], found["digest"], int(found["count"])
            archives.setdefault(key, {})[int(found["number"])] = path
    complete, missing = [], []
    for (name, digest, count), parts in archives.items():
        gaps = [i for i in range(1, count + 1) if i not in parts]
        missing += [f"{name}.{digest}.{i}of{count}.part" for i in gaps]
        if gaps:
            continue
        content = b"".join(parts[i].read_bytes() for i in range(1, count + 1))
        if _digest(content) != digest:
            raise ValueError(f"a part of {name} in {folder} is damaged: bring its parts again")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(target, filter="data")
        complete.append(name)
    return complete, missing


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
