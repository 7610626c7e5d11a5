"""Adapter folders in and out.

A folder has `adapter_config.json` and `adapter_model.safetensors`, in peft's form wherever that computes exactly the
same, and `graft.json` beside them, which peft ignores: the method, the prompt template, the sum of the tensor file, a
fingerprint of the base and a probe. On loading every tensor is consumed exactly once, every field of the config is
honoured or refused by name, and nothing of the model changes if anything is wrong.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from graft import files_card, files_disk, files_forms, files_lora, freeze, probe, roles, vocabulary
from graft.adapt import attach, detach
from graft.adapter import Adapter
from graft.bank import bank_of, known
from graft.errors import AdapterFileError, ConfigError, SiteError
from graft.files_disk import CARD, CONFIG, TENSORS
from graft.forms import targets
from graft.forms.base import Slot, Unheld
from graft.method import Expanded, Method, from_dict
from graft.methods import lora_init

log = logging.getLogger("graft")

CHECKS = ("error", "warn", "off")
FORMS = ("auto", "peft")
ENCODED = "a folder holds what its encoder or MLP made, not the encoder: the rows train on by themselves"
PLACED = "its template places the pseudo-tokens among the text, and peft puts them all in front"


def save(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    overwrite: bool = False,
    template: dict[str, Any] | None = None,
    form: str = "auto",
) -> Path:
    """Write one adapter into a folder of its own; a write that fails leaves everything as it was.

    A prefix with an MLP is written expanded, as it is used after training. The dial `adapter.scale` is not part of it.

    Args:
        name: the adapter.
        folder: made with its parents. It must not exist, or be empty.
        overwrite: replace an adapter folder; other files in it stay.
        template: the prompt template to store with it; None keeps the one it was loaded with.
        form: "auto" takes peft's form where it computes exactly the same and our own elsewhere; "peft" insists.

    Returns:
        The folder.

    Raises:
        AdapterFileError: the folder exists, a value is not finite, the model is merged, peft's form is asked and cannot
            hold the adapter, or the disk refuses.
        RouteError: no such adapter.
    """
    bank = bank_of(model)
    known(bank, ((name, 1.0),))
    folder = Path(folder)
    if form not in FORMS:
        raise ConfigError(f"form is one of {', '.join(FORMS)}, not {form!r}")
    if bank.originals is not None:
        raise AdapterFileError("the model is merged; call graft.unmerge before saving an adapter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise AdapterFileError(f"{folder} exists; pass overwrite=True or take another folder")
        if not (folder / CONFIG).is_file():
            raise AdapterFileError(f"{folder} holds something else than an adapter and is not overwritten")
    adapter = bank[name]
    if any(parameter.is_meta for parameter in adapter.parameters()):
        raise AdapterFileError(f"adapter {name!r} is on the meta device and has no values to save")
    with files_disk.replacing(folder) as new:
        own = _write(model, adapter, new, template, form)
        for key, part in adapter.parts.items() if own else ():
            (new / key).mkdir()
            _write(model, part, new / key, template, form)  # type: ignore[arg-type]
    return folder


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    check: str = "error",
) -> Adapter:
    """Attach the adapter of a folder, ours or peft's.

    Args:
        model: the base that the adapter was made for.
        folder: with the two files, or with one sub-folder that has them (peft's for an adapter with a name).
        name: what routes call it; None: the folder's own name.
        trainable: whether it goes on training.
        check: what to do if the stored fingerprint is of another base: "error", "warn" (log it) or "off".

    Returns:
        The adapter; `note` says if the base has another precision, `card` is what `graft.json` holds. A peft folder
        comes in with `peft_compat=True`, a folder of ours with the method and flag that it was saved with.

    Raises:
        AdapterFileError: a file is missing, broken or a pickle; a tensor is too many, missing, of another shape or not
            finite; a config field is not honoured; the base is another one.
        ConfigError: the name is taken, or the model cannot take this adapter beside what is attached.
    """
    if check not in CHECKS:
        raise ConfigError(f"check is one of {', '.join(CHECKS)}, not {check!r}")
    with vocabulary.unchanged():
        return _loaded(model, files_disk.find(Path(folder)), name, trainable, check)


def _loaded(model: nn.Module, folder: Path, name: str | None, trainable: bool, check: str) -> Adapter:
    config, card = read_config(folder), read_card(folder)
    tensors = files_disk.read_tensors(folder, card)
    method, peft_compat, own = _method(model, folder, config, card)
    note = _check_base(model, folder, card, check) or _other_name(model, config, card)
    name = folder.resolve().name if name is None else name
    with probe.random_kept(model), lora_init.filled():
        try:
            adapter = attach(model, _blank(method), name, peft_compat=peft_compat, trainable=trainable)
        except SiteError as error:
            raise AdapterFileError(f"{folder}: {error}") from error
    encoded = trainable and isinstance(adapter.shared, Expanded) and adapter.shared.table is None
    try:
        adapter.method = method
        _take(model, adapter, folder, config, card, tensors, own)
        for key, part in adapter.parts.items() if own else ():
            _take_part(model, part, folder / key)  # type: ignore[arg-type]
    except BaseException:
        detach(model, name)
        raise
    adapter.requires_grad_(trainable)
    adapter.note = "; ".join(filter(None, (note, ENCODED if encoded else None))) or None
    adapter.card = card
    return adapter


def read_card(folder: str | Path) -> dict[str, Any]:
    """What `graft.json` of a folder says (method, template, base, probe); {} if the folder has none, as peft's.

    Raises:
        AdapterFileError: it is broken, of a newer format, or has a field that we do not know.
    """
    path = files_disk.find(Path(folder)) / CARD
    if not path.exists():
        return {}
    card = files_disk.read_json(path)
    _check_version(card, path)
    files_card.check(card, path)
    return card


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder.

    Raises:
        AdapterFileError: it is missing or broken.
    """
    folder = files_disk.find(Path(folder))
    config = files_disk.read_json(folder / CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{folder / CONFIG}: it has no peft_type, so it does not say which method this is")
    return config


def check_saved(model: nn.Module, name: str) -> float | None:
    """Compare an adapter's logits with the probe in the folder that it was loaded from.

    Returns:
        The largest difference, as a share of the largest logit; None if there is no probe.

    Raises:
        AdapterFileError: they differ by more than the precision allows.
    """
    card: dict[str, Any] = bank_of(model)[name].card or {}
    return probe.check_probe(model, card.get("probe"), name)


# ------------------------------------------------------------------------------------------------- saving


def _write(model: nn.Module, adapter: Adapter, new: Path, template: dict[str, Any] | None, form: str) -> bool:
    """The files of one adapter into a new folder, and whether they are in our own form.

    The parts of a composed adapter in our own form have folders of their own in it.
    """
    with torch.no_grad():
        adapter = files_lora.exported(model, adapter) if form == "peft" else adapter
        config, slots = _layout(model, adapter, form, template)
        tensors = {key: slot.read().to("cpu").contiguous().clone() for key, slot in slots.items() if slot.written}
    files_disk.check_finite(tensors, f"adapter {adapter.name!r}")
    card = _card(model, adapter, template)
    safetensors.torch.save_file(tensors, new / TENSORS, metadata={"format": "pt"})
    card["tensors_sha256"] = files_disk.checksum(new / TENSORS)
    files_disk.write_json(new / CONFIG, dict(sorted(config.items())))
    files_disk.write_json(new / CARD, card)
    return "format_version" in config


def _layout(
    model: nn.Module, adapter: Adapter, form: str, template: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Slot]]:
    template = template if template is not None else (adapter.card or {}).get("template")
    try:
        if any("{slots:" in prompt for prompt in (template or {}).get("templates") or ()):
            raise Unheld(PLACED)
        config = files_forms.peft_config(model, adapter)
        return config, files_forms.peft_slots(model, adapter, config)
    except Unheld as reason:
        if form == "peft":
            raise AdapterFileError(f"adapter {adapter.name!r} cannot be a peft folder: {reason}") from None
        return files_forms.own_config(model, adapter), files_forms.own_slots(adapter)


def _card(model: nn.Module, adapter: Adapter, template: dict[str, Any] | None) -> dict[str, Any]:
    whole = [site.path for site, delta in adapter.items() if delta.whole]
    whole += [s.path for s in roles.task_heads(model) if any(n.startswith(f"{s.path}.") for n in adapter.selected)]
    try:
        logits = probe.probe(model, adapter.name)
    except Exception as error:  # a trained adapter must not be lost because a model refuses a few plain tokens
        log.warning("adapter %r is saved without a probe: %s", adapter.name, error)
        logits = None
    return {
        "format_version": files_forms.FORMAT,
        "graft_version": sys.modules["graft"].__version__,
        "method": adapter.method.saved_as(adapter).to_dict(full=True),
        "peft_compat": adapter.peft_compat,
        "template": template if template is not None else (adapter.card or {}).get("template"),
        "tensors_sha256": "",
        "base": probe.fingerprint(model, tuple(whole)),
        "probe": logits,
    }


# ------------------------------------------------------------------------------------------------- loading


def _method(model: nn.Module, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> tuple[Method, bool, bool]:
    """The method, whether it has peft's form, and whether the folder is in our own form."""
    where = folder / CONFIG
    own = "format_version" in config
    if not own and not card:
        return files_forms.method_of(config, model, str(where)), True, False
    source = config if own else card
    if own:
        _check_version(config, where)
    method = _read_method(source, where if own else folder / CARD)
    return method, bool(source.get("peft_compat", False)), own


def _read_method(source: dict[str, Any], path: Path) -> Method:
    settings = source.get("method")
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{path}: method: expected its settings, as in {{'method': 'lora'}}, not {settings!r}")
    try:
        return from_dict(settings)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise AdapterFileError(f"{path}: method: {error}") from error


def _take(
    model: nn.Module,
    adapter: Adapter,
    folder: Path,
    config: dict[str, Any],
    card: dict[str, Any],
    tensors: dict[str, Tensor],
    own: bool,
) -> None:
    """Fill the adapter with the folder's tensors, each exactly once."""
    if not adapter.parts and adapter.shared is not None:
        adapter.method.finish(adapter.shared)
        freeze.ignore_on_save(model, bank_of(model), adapter)
    if own or card:
        _check_config(model, adapter, folder, config, card, own)
    path = folder / TENSORS
    slots = files_forms.own_slots(adapter) if own else files_forms.peft_slots(model, adapter, config)
    for key, tensor in tensors.items():
        if key not in slots:
            raise AdapterFileError(f"{path}: {key} {tuple(tensor.shape)} has no place in this adapter or this model")
        if tuple(tensor.shape) != slots[key].shape:
            raise AdapterFileError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, this model and config need {slots[key].shape}"
                + targets.resizing(model, tuple(tensor.shape), slots[key].shape)
            )
    missing = [key for key, slot in slots.items() if key not in tensors and not slot.optional]
    if missing:
        raise AdapterFileError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    try:
        with torch.no_grad():
            given = [key for key in slots if key in tensors]  # in the order of the slots, not of the file
            for key in sorted(given, key=lambda key: slots[key].optional):  # checks compare with what is filled
                slots[key].fill(tensors[key])
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error}") from error


def _take_part(model: nn.Module, part: Adapter, folder: Path) -> None:
    """Fill one part of a composed adapter from its folder, which must be of the method that the whole names."""
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder}: no {CONFIG} here; a part of the composed adapter is missing")
    config, card = read_config(folder), read_card(folder)
    tensors = files_disk.read_tensors(folder, card)
    method, peft_compat, own = _method(model, folder, config, card)
    if not card:
        raise AdapterFileError(f"{folder}: no {CARD} here; load the part alone, or put the file back")
    told = dataclasses.replace(part.method, head=method.head)
    if (told.to_dict(full=True), part.peft_compat) != (method.to_dict(full=True), peft_compat):
        raise AdapterFileError(f"{folder}: holds another {method.name} than the composed adapter names")
    part.card = card
    _take(model, part, folder, config, card, tensors, own)


def _blank(method: Method) -> Method:
    """The method without what only its first start needs: its rows come from the file, not from a text."""
    parts = getattr(method, "parts", None)
    if parts:
        return dataclasses.replace(method, parts=tuple(_blank(part) for part in parts))  # type: ignore[call-arg]
    if hasattr(method, "text"):
        words = {name: None for name in ("text", "labels") if hasattr(method, name)}
        return dataclasses.replace(method, init="random", **words)  # type: ignore[arg-type, call-arg]
    return method


def _check_config(
    model: nn.Module, adapter: Adapter, folder: Path, config: dict[str, Any], card: dict[str, Any], own: bool
) -> None:
    """The config must say what the method of `graft.json` would write: neither may be edited alone."""
    try:
        expected = files_forms.own_config(model, adapter) if own else files_forms.peft_config(model, adapter)
    except Unheld as reason:
        raise AdapterFileError(f"{folder / CARD}: does not belong to this peft folder: {reason}") from None
    free = files_forms.free_fields(config) | ({"method"} if own else set())
    for field, value in config.items():
        if field in free or (field not in expected and targets.empty(value)):
            continue
        if field not in expected or _plain(value, config) != _plain(expected[field], config):
            raise AdapterFileError(
                f"{folder / CONFIG}: field {field!r} = {value!r} is not what {CARD} says; delete {CARD} to load the "
                "folder by its config alone"
            )
    told = (_read_method(card, folder / CARD), card.get("peft_compat")) if own and card else None
    if told is not None and told != (adapter.method, config.get("peft_compat")):
        raise AdapterFileError(f"{folder}: {CONFIG} and {CARD} describe different methods")


def _plain(value: Any, config: dict[str, Any]) -> Any:
    """Lists as sets, without the heads that peft adds by itself, and nothing as an empty one."""
    if isinstance(value, list) or value is None:
        return {str(item) for item in value or ()} - set(targets.HEADS.get(str(config.get("task_type")), ()))
    return value


def _check_base(model: nn.Module, folder: Path, card: dict[str, Any], check: str) -> str | None:
    if check == "off" or not card.get("base"):
        return None
    try:
        note = probe.check_base(model, card["base"])
    except AdapterFileError as error:
        if check == "error":
            raise AdapterFileError(f"{folder}: {error}") from error
        note = str(error)
        log.warning("%s: %s", folder, error)
    else:
        if note:
            log.info("%s: %s", folder, note)
    return note


def _other_name(model: nn.Module, config: dict[str, Any], card: dict[str, Any]) -> str | None:
    """peft's folder has no fingerprint: all that it tells of its base is a name."""
    told, here = str(config.get("base_model_name_or_path") or ""), files_forms.base_name(model)
    if card or not told or not here or Path(told).name == Path(here).name:
        return None
    return f"made for {told}, this base is {here}; a folder of peft has no fingerprint to tell if they are the same"


def _check_version(data: dict[str, Any], path: Path) -> None:
    if data.get("format_version") != files_forms.FORMAT:
        raise AdapterFileError(
            f"{path}: format_version {data.get('format_version')!r}, this version of Graft reads {files_forms.FORMAT}"
        )
