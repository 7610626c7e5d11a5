"""Tensors by key: in memory up to a bound, then in memory-mapped safetensors files up to another; then it is full."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger("graft")

SHARD = 64 * 2**20
"""Bytes that are gathered before they are written as one file."""


class Store:
    """A bounded store; what was put is found again or not, never changed.

    Args:
        memory: bytes that may be kept in memory; None: no bound.
        folder: for what memory does not hold, made when it is needed; None: nothing goes to disk. Several stores, of
            several processes too, may have the same one.
        disk: bytes that may be kept in the folder.
        key: what the states are of; those of each key lie in a folder of their own inside, and are taken up.
    """

    def __init__(self, memory: int | None = None, folder: Path | None = None, disk: int = 0, key: str = "") -> None:
        self.memory, self.disk = memory, disk
        self.folder = None if folder is None else folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.kept: dict[bytes, Tensor] = {}
        self.waiting: dict[bytes, Tensor] = {}
        self.places: dict[bytes, Path] = {}
        self.in_memory = self.on_disk = self.unwritten = 0
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            with safe_open(path, "pt") as file:
                self.places |= {bytes.fromhex(name): path for name in file.keys()}  # noqa: SIM118  not a dict
            self.on_disk += path.stat().st_size

    def __len__(self) -> int:
        return len(self.kept) + len(self.waiting) + len(self.places)

    def __contains__(self, key: bytes) -> bool:
        return key in self.kept or key in self.waiting or key in self.places

    def get(self, key: bytes) -> Tensor | None:
        """The tensor of this key, on the CPU if it was on disk; None if it is not kept."""
        if key in self.kept:
            return self.kept[key]
        if key in self.waiting:
            return self.waiting[key]
        if key not in self.places:
            return None
        try:
            with safe_open(self.places[key], "pt") as file:
                return file.get_tensor(key.hex())
        except FileNotFoundError:  # another store of this folder deleted it
            gone = self.places[key]
            self.places = {other: path for other, path in self.places.items() if path != gone}
            return None

    def put(self, key: bytes, tensor: Tensor) -> bool:
        """Keep a tensor; False if there is no room left."""
        size = tensor.numel() * tensor.element_size()
        if key in self:
            return True
        if self.memory is None or self.in_memory + size <= self.memory:
            self.kept[key] = tensor
            self.in_memory += size
            return True
        if self.folder is None or self.on_disk + size > self.disk:
            return False
        self.waiting[key] = tensor.cpu().contiguous()
        self.on_disk += size
        self.unwritten += size
        if self.unwritten >= SHARD:
            self.flush()
        return key in self

    def flush(self) -> None:
        """Write what waits for the disk; if that cannot be, the log says so once, and nothing more goes there."""
        if not self.waiting or self.folder is None:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key.hex(): tensor for key, tensor in self.waiting.items()}, partial)
            os.replace(partial, path)
            self.places |= dict.fromkeys(self.waiting, path)
        except (OSError, SafetensorError) as error:
            self.disk = 0
            with contextlib.suppress(OSError):
                partial.unlink()
            log.warning("no more states are kept in %s, which cannot be written: %s", self.folder.parent, error)
        self.waiting, self.unwritten = {}, 0

    def close(self, *, delete: bool = True) -> None:
        """Let go of everything; the files too, or else write what memory holds as well, for stores to come."""
        if delete and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # only if nobody else has anything there
        elif self.folder is not None:
            kept, self.kept, self.memory = self.kept, {}, 0
            for key, tensor in kept.items():
                self.put(key, tensor)
            self.flush()
        self.kept, self.waiting, self.places = {}, {}, {}
        self.in_memory = self.on_disk = self.unwritten = 0
