"""Files that are whole or not there, and folders that one process has for itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from graft.errors import BusyError

if sys.platform != "win32":
    import fcntl

PARTIAL = ".partial"
"""The end of a name while the file is being written."""
LOCK = ".lock"
"""Held while a process writes into a folder, and removed behind it."""


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: it is whole, or as it was."""
    partial = file.with_name(file.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into the folder; a killed one loses its lock with its life.

    Raises:
        BusyError: another process works there.
    """
    if sys.platform == "win32" or os.environ.get("RANK", "0") != "0":
        yield  # no such locks; or not the first process of a distributed run, which locks for all
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = file.exists() and os.path.samestat(os.fstat(handle), file.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # or it was removed between the two calls, by a run that just ended
            raise BusyError(f"output: another process works in {folder}; wait for it, or take another output")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(handle)
