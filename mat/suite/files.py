"""Files that are replaced as a whole, checksums of them, and lines for whoever still reads."""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system (a full disk) name the file, also where a library lost its name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the place of another: there is the old one or the new one, never half of
    it.
    """
    temporary = path.with_name(path.name + ".tmp")
    with naming(temporary):
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)


def move(path: Path, place: Path) -> None:
    """Rename a file so that the new name survives a power cut."""
    os.replace(path, place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text that replaces the file as a whole."""
    with replacing(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to a stream, standard error by default; one that nobody reads costs nothing."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        hush(stream)


def hush(stream: TextIO) -> None:
    """Let what is written to a stream that nobody reads vanish, at the interpreter's end, too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def keep_streams() -> None:
    """Make the standard streams safe to write to, before anything else is opened.

    The number of one that is closed would go to the next file of the run, and what libraries print
    with it; what the locale cannot encode is shown as a question mark.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
