"""Which form an adapter's folder has: peft's wherever its form computes exactly the same, else our own.

What peft's form cannot hold is `Unheld`, with the reason; it is never approximated. Every field of a foreign config is
honoured, at its empty value, or refused by name. `graft.forms` has the forms.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor, nn

import graft.forms  # noqa: F401  fills the registry
from graft import roles
from graft.adapt import FOREIGN
from graft.adapter import Adapter
from graft.errors import AdapterFileError, ConfigError, SiteError
from graft.forms import targets
from graft.forms.base import COMMON, FORMS, ROOT, Config, Slot, Unheld, form_of, plain
from graft.method import CopyDelta, Expanded, Method
from graft.methods.compose import Compose

FORMAT = 1
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


# ------------------------------------------------------------------------------------------------- our own form


def own_config(model: nn.Module, adapter: Adapter) -> Config:
    """The config of our own form: a `peft_type` that peft does not have, so that it refuses the folder."""
    method = adapter.method.saved_as(adapter)
    kind = type(method).peft_type or type(method).name.upper()
    return {
        "peft_type": f"GRAFT_{kind}" if kind in FORMS else kind,
        "format_version": FORMAT,
        "method": method.to_dict(full=True),
        "peft_compat": adapter.peft_compat,
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
    }


def own_slots(adapter: Adapter) -> dict[str, Slot]:
    """Our own form: parameters by site and name, what sites share once, and base parameters by their own names."""
    slots = {name: _selected(adapter, name) for name in adapter.selected}
    if adapter.parts:
        return slots  # they have folders of their own
    for site, delta in adapter.items():
        for key, value in delta.kept().items():
            slots[f"{ROOT}{site.path}.{key}"] = plain(value)
    shared = adapter.shared
    if isinstance(shared, Expanded):
        slots["prompt_embeddings"] = _expanded(shared)
    elif shared is not None:
        for key, value in shared.state_dict(keep_vars=True).items():
            slots[f"base_model.shared.{key}"] = plain(value)
    return slots


def _expanded(shared: Expanded) -> Slot:
    """The rows; they are read from whatever makes them, and filled after `Method.finish`."""

    def fill(new: Tensor) -> None:
        assert shared.table is not None
        shared.table.data.copy_(new)

    return Slot(tuple(shared.expanded().shape), shared.expanded, fill)


def _selected(adapter: Adapter, name: str) -> Slot:
    parameter = adapter.selected[name]

    def values() -> Tensor:
        return parameter.data if adapter.acting else adapter.other[name]

    return Slot(tuple(parameter.shape), values, lambda new: values().copy_(new))


# ------------------------------------------------------------------------------------------------- peft's forms


def peft_config(model: nn.Module, adapter: Adapter) -> Config:
    """The peft config of an adapter.

    Raises:
        Unheld: peft has no such method, or its form would compute something else.
    """
    method = adapter.method.saved_as(adapter)
    form = form_of(method)
    kept = sorted(site.path for site, delta in adapter.items() if type(delta) is CopyDelta)
    config: Config = {
        "peft_type": form.kind,
        "task_type": _task(model, set(kept)),
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "modules_to_save": kept or None,
    }
    if targets.saved_whole(model, config) != set(kept):
        raise Unheld("peft's rule for modules_to_save would take other modules too")
    if "modules_to_save" not in form.fields:
        if kept:
            raise Unheld(f"peft's {form.kind} trains no module whole, such as {kept[0]}")
        del config["modules_to_save"]
    return config | form.write(model, adapter, method, config)


def peft_slots(model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
    """peft's form. `config` is the folder's: its fields say how many rows a prompt has."""
    return FORMS[config["peft_type"]].slots(model, adapter, config)


def method_of(config: Config, model: nn.Module | None, where: str) -> Method:
    """The method that a peft config describes; it is attached with `peft_compat=True`.

    Args:
        config: the JSON form.
        model: the model of the folder's adapter; None for a config object whose adapter is yet to be trained.
        where: what error messages name.

    Raises:
        AdapterFileError: a field that we do not honour, or a value out of range.
    """
    kind = config.get("peft_type")
    if kind not in FORMS:
        raise AdapterFileError(f"{where}: peft_type {kind!r} is not one that Graft reads: {', '.join(sorted(FORMS))}")
    form = FORMS[kind]
    known = COMMON | form.fields | form.inert
    for field, value in config.items():
        if field not in known and not targets.empty(value):
            raise AdapterFileError(
                f"{where}: field {field!r} = {value!r} is not supported and may change what the adapter computes; "
                "an adapter without it can be loaded"
            )
    try:
        return form.read(config, model)
    except (ConfigError, SiteError, AdapterFileError, TypeError, AttributeError, re.error) as error:
        raise AdapterFileError(f"{where}: {error}") from error


def read_object(config: Any, model: nn.Module) -> Method | None:
    """A peft config object as a method for a model, or None if it is none; `graft.attach` asks this.

    Raises:
        ConfigError: a field that we do not honour, or that contradicts the model.
    """
    kind = getattr(config, "peft_type", None)
    if kind is None or not callable(getattr(config, "to_dict", None)):
        return None
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    task = data.get("task_type")
    data |= {"peft_type": targets.text_of(kind), "task_type": None if task is None else targets.text_of(task)}
    form, where = FORMS.get(targets.text_of(kind)), type(config).__name__
    try:
        data = targets.uncut(model, form.fitted(data, model)) if form else data
        kept = targets.kept(data, model) if form and "modules_to_save" in form.fields else None
    except AdapterFileError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        method = method_of(data, None, where)
        return method if kept is None else _keeping(method, kept, bool(roles.task_heads(model)))
    except AdapterFileError as error:
        raise ConfigError(str(error)) from error


def _keeping(method: Method, kept: dict[str, Any], heads: bool) -> Method:
    """A method that keeps these modules whole, in a composed one its first part; `heads`: the model has any."""
    kept = kept | {"head": kept["head"] and heads}
    if not isinstance(method, Compose):
        return dataclasses.replace(method, **kept)
    first = dataclasses.replace(method.parts[0], modules_to_save=kept["modules_to_save"])
    return dataclasses.replace(method, parts=(first, *method.parts[1:]), head=kept["head"])


def free_fields(config: Config) -> set[str]:
    """The fields of a peft config that `graft.json` does not answer for."""
    form = FORMS.get(str(config.get("peft_type")))
    storage = {"fan_in_fan_out"}  # how the base keeps its weights; a quantized GPT-2 has linears
    return (COMMON - {"peft_type"}) | storage | (form.inert if form else set())


def _task(model: nn.Module, kept: set[str]) -> str | None:
    """peft's task type; None where it would add a head that this adapter does not train."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if task in targets.HEADS:
        heads = targets.saved_whole(model, {"task_type": task})
        return task if heads and heads <= kept else None
    if task == "CAUSAL_LM" and roles.is_encoder_decoder(model):
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if task is None and getattr(model, "base_model", None) is model else task


def base_name(model: nn.Module) -> str:
    """What the base calls itself: a path or hub name, "" if it was built from a config."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


FOREIGN.append(read_object)
