"""What the readers and writers of other libraries' files share: tensors in and out, and an adapter that they fill.

A `.bin` or `.pt` file is a pickle. It is opened with torch's reader for plain tensors alone; what holds anything else
is refused, and nothing in it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from graft import files_disk, probe, roles
from graft.adapt import attach, detach
from graft.adapter import Adapter
from graft.bank import bank_of, known
from graft.errors import AdapterFileError, SiteError
from graft.forms.base import Slot, plain
from graft.method import CopyDelta, Method

Slots = dict[str, Slot]
WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Names under which training scripts put the tensors, when there is nothing else in the file."""
SUFFIXES = (".safetensors", *files_disk.PICKLES)
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""How the last weight of a sequence classification head is called in transformers."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, all finite floating-point numbers; a pickle that holds anything else is not read.

    Raises:
        AdapterFileError: no such file, a damaged one, or one with something else than tensors.
    """
    if not path.is_file():
        raise AdapterFileError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own old file forms
            found = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # the two readers raise several kinds
        raise AdapterFileError(
            f"{path}: damaged, or a pickle of more than plain tensors, which can run code and is not read; save its "
            "tensors alone"
        ) from error
    if isinstance(found, dict) and len(found) == 1 and set(found) <= set(WRAPPERS):
        found = next(iter(found.values()))
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: it holds a {type(found).__name__}, not tensors by name")
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise AdapterFileError(f"{path}: {key} is {what}, adapters are tensors of floating-point numbers")
    tensors = {str(key): value.detach() for key, value in found.items()}
    files_disk.check_finite(tensors, str(path))
    return tensors


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def either(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that a folder has.

    Raises:
        AdapterFileError: it has none.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise AdapterFileError(f"{folder}: neither {' nor '.join(names)} is here")
    return found


def write_state(path: Path, slots: Slots) -> None:
    """Write what the slots read; safetensors or torch's own form, by the suffix.

    Raises:
        AdapterFileError: the file exists, its suffix says no form, or a value is not finite.
    """
    if path.suffix not in SUFFIXES:
        raise AdapterFileError(f"{path}: end its name in one of {', '.join(SUFFIXES)}")
    if path.exists():
        raise AdapterFileError(f"{path} exists; take another name")
    tensors = values(slots, str(path))
    with files_disk.fresh(path) as new:
        new.mkdir()
        write_tensors(new / path.name, tensors)
        (new / path.name).rename(path)
        new.rmdir()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in the form that the suffix says."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def values(slots: Slots, where: str) -> dict[str, Tensor]:
    """What the slots read, on the CPU, all finite."""
    tensors = {key: slot.read().detach().to("cpu").contiguous().clone() for key, slot in slots.items() if slot.written}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise AdapterFileError(f"{where}: the adapter is on the meta device and has no values to save")
    files_disk.check_finite(tensors, where)
    return tensors


def fill(slots: Slots, tensors: dict[str, Tensor], where: Path) -> None:
    """Fill every slot with the tensor of its name, each exactly once.

    Raises:
        AdapterFileError: a tensor is too many, missing, or of another shape.
    """
    for key, tensor in tensors.items():
        if key not in slots:
            raise AdapterFileError(f"{where}: {key} {tuple(tensor.shape)} has no place in this adapter or this model")
        if tuple(tensor.shape) != slots[key].shape:
            raise AdapterFileError(
                f"{where}: {key} has shape {tuple(tensor.shape)}, this model needs {slots[key].shape}"
            )
    missing = [key for key, slot in slots.items() if key not in tensors and not slot.optional]
    if missing:
        raise AdapterFileError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}")
    try:
        with torch.no_grad():
            for key, tensor in tensors.items():
                slots[key].fill(tensor)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from error


def filled(
    model: nn.Module,
    method: Method,
    name: str,
    where: Path,
    take: Callable[[Adapter], None],
    *,
    trainable: bool,
) -> Adapter:
    """Attach a new adapter and let `take` fill it; if that fails the model is as before.

    Raises:
        AdapterFileError: the model lacks a place, or `take` refuses.
    """
    with probe.random_kept(model):
        try:
            adapter = attach(model, method, name, trainable=trainable)
        except SiteError as error:
            raise AdapterFileError(f"{where}: {error}") from error
    try:
        take(adapter)
    except BaseException:
        detach(model, name)
        raise
    return adapter


def chosen(model: nn.Module, name: str, form: str) -> Adapter:
    """The adapter to be written.

    Raises:
        AdapterFileError: the model is merged, or the adapter is composed.
        RouteError: no such adapter.
    """
    bank = bank_of(model)
    known(bank, ((name, 1.0),))
    if bank.originals is not None:
        raise AdapterFileError("the model is merged; call graft.unmerge before saving an adapter")
    if bank[name].parts:
        raise AdapterFileError(f"adapter {name!r} is composed; {form}'s form holds one method, write its parts alone")
    return bank[name]


def head_slots(model: nn.Module, adapter: Adapter, form: str) -> Slots:
    """The trained task head under the model's own names; any other module that is trained whole is refused."""
    heads = {site.path for site in roles.task_heads(model)}
    slots: Slots = {}
    for site, delta in adapter.items():
        if isinstance(delta, CopyDelta):
            if site.path not in heads:
                raise AdapterFileError(
                    f"adapter {adapter.name!r} trains all of {site.path}, which {form}'s form keeps as the base has it"
                )
            slots |= {f"{site.path}.{key}": plain(value) for key, value in delta.kept().items()}
    return slots


def head_keys(model: nn.Module, keys: Any) -> set[str]:
    """Those of the keys that belong to a task head of the model."""
    heads = tuple(f"{site.path}." for site in roles.task_heads(model))
    return {key for key in keys if heads and key.startswith(heads)}


def head_outputs(tensors: dict[str, Tensor]) -> int | None:
    """How many outputs the classification head among these tensors has; None: there is none."""
    return next((len(value) for key, value in tensors.items() if value.ndim == 2 and key.endswith(HEADS)), None)


def own_path(model: nn.Module, path: str) -> str:
    """A module's path without the prefix of the model inside, which files of a bare model lack."""
    return path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
