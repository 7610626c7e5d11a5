"""Tensors by key: in memory up to a bound, then in memory-mapped safetensors files up to another; then it is full."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
        return True

    def flush(self) -> None:
        """Write what waits for the disk."""
        if not self.waiting or self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({key.hex(): tensor for key, tensor in self.waiting.items()}, partial)
        os.replace(partial, path)
        self.places |= dict.fromkeys(self.waiting, path)
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


def free_memory() -> int:
    """Bytes of memory that are free now, as far as the system tells; 0 where it does not."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def room(folder: Path, device: torch.device) -> tuple[int, int]:
    """A quarter of the free memory (of the device where states stay) and half of the free disk, in bytes."""
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else free_memory() // 4
    return memory, shutil.disk_usage(_existing(folder)).free // 2


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder.parent == folder else _existing(folder.parent)
