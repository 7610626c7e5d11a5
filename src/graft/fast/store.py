"""Tensors by key: in memory up to a bound, then in memory-mapped safetensors files up to another; then it is full."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft.errors import ConfigError

SHARD = 64 * 2**20
"""Bytes that are gathered before they are written as one file."""


class Store:
    """A bounded store; what was put is found again or not, never changed.

    Args:
        memory: bytes that may be kept in memory; None: no bound.
        folder: for what memory does not hold, made when it is needed; None: nothing goes to disk.
        disk: bytes that may be kept in the folder.
        key: what the states are of; a folder that another key filled is emptied, one of the same key is taken up.
    """

    def __init__(self, memory: int | None = None, folder: Path | None = None, disk: int = 0, key: str = "") -> None:
        self.memory, self.folder, self.disk, self.key = memory, folder, disk, key
        self.kept: dict[bytes, Tensor] = {}
        self.waiting: dict[bytes, Tensor] = {}
        self.places: dict[bytes, Path] = {}
        self.in_memory = self.on_disk = self.unwritten = 0
        if folder is not None:
            self._open(folder)

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
        with safe_open(self.places[key], "pt") as file:
            return file.get_tensor(key.hex())

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
        (self.folder / "key").write_text(self.key, encoding="utf-8")
        path = self.folder / f"{len(list(self.folder.glob('*.safetensors'))):06d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({key.hex(): tensor for key, tensor in self.waiting.items()}, partial)
        os.replace(partial, path)
        self.places |= dict.fromkeys(self.waiting, path)
        self.waiting, self.unwritten = {}, 0

    def close(self, *, delete: bool = True) -> None:
        """Let go of everything; the folder too, unless another run shall take it up."""
        if not delete:
            self.flush()
        elif self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.kept, self.waiting, self.places = {}, {}, {}
        self.in_memory = self.on_disk = self.unwritten = 0

    def _open(self, folder: Path) -> None:
        note = folder / "key"
        if folder.is_dir() and any(folder.iterdir()) and not note.is_file():
            raise ConfigError(f"{folder}: holds other files than kept states; name an empty folder")
        if note.is_file() and note.read_text(encoding="utf-8") != self.key:
            shutil.rmtree(folder)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.places |= {bytes.fromhex(name): path for name in file.keys()}  # noqa: SIM118  not a dict
            self.on_disk += path.stat().st_size


def free_memory() -> int:
    """Bytes of memory that are free now, as far as the system tells; 0 where it does not."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def default_store(folder: Path | None, key: str, device: torch.device) -> Store:
    """A store that takes a quarter of the free memory (of the device where states stay), and half of the free disk."""
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else free_memory() // 4
    disk = 0 if folder is None else shutil.disk_usage(_existing(folder)).free // 2
    return Store(memory, folder, disk, key)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder.parent == folder else _existing(folder.parent)
