"""The folder on disk: found, read, and replaced in one step; nothing here knows a method.

safetensors has no checksum, so `graft.json` keeps one of the tensor file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from graft.errors import AdapterFileError

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "graft.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """The name of a new folder beside `folder`, to be filled and renamed; if that fails, nothing is left of it.

    Raises:
        AdapterFileError: the disk refuses.
    """
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    new = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.new"
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        yield new
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise AdapterFileError(f"{folder}: could not be written: {error}") from error
        raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, with what else was in there; or vanishes."""
    folder = folder.resolve() if folder.is_symlink() else folder
    with fresh(folder) as new:
        new.mkdir()
        yield new
        if (new / TENSORS).exists() and (new / CONFIG).exists():
            shutil.copymode(new / CONFIG, new / TENSORS)  # safetensors writes for the owner alone
        if not folder.exists():
            new.rename(folder)
            return
        for item in folder.iterdir():
            if item.name not in (CONFIG, TENSORS, CARD) and not (new / item.name).exists():
                (shutil.copytree if item.is_dir() else shutil.copy2)(item, new / item.name)
        old = new.with_suffix(".old")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write fields, without NaN, which is no JSON."""
    # Nested keys keep their order: in rank_pattern the first that fits counts.
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def find(folder: Path) -> Path:
    """The folder itself, or its only sub-folder with an adapter."""
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such folder" if not folder.exists() else f"{folder} is no folder")
    if (folder / CONFIG).is_file():
        return folder
    inside = sorted(item.parent for item in folder.glob(f"*/{CONFIG}"))
    if len(inside) == 1:
        return inside[0]
    many = f"; load one of its sub-folders: {', '.join(item.name for item in inside)}" if inside else ""
    raise AdapterFileError(f"{folder}: no {CONFIG} here{many}")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{path}: it holds a {type(data).__name__}, not fields")
    return data


def read_tensors(folder: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, all finite; their file has the sum that `card` says."""
    path = folder / TENSORS
    if not path.is_file():
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLES)
        if pickles:
            raise AdapterFileError(
                f"{folder / pickles[0]} is a pickle, which can run code and is not read; load it once with peft, where "
                "you trust it, and write it again with save_pretrained (safe_serialization=True)"
            )
        raise AdapterFileError(f"{folder}: no {TENSORS} here")
    if card.get("tensors_sha256") and card["tensors_sha256"] != checksum(path):
        raise AdapterFileError(
            f"{path}: its content is not what {CARD} says was written; it is damaged, or another tool wrote it "
            f"(then delete {CARD})"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # its reader raises several kinds for broken headers
        raise AdapterFileError(f"{path}: damaged or cut short: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{path}: {key} is of {tensor.dtype}, adapters are floating-point numbers")
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity, by the tensor's name."""
    for key, tensor in tensors.items():
        # What is not finite makes its sum so; looking at each value takes twenty times as long.
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{where}: {key} has values that are not finite; nothing is taken from it")


def checksum(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
