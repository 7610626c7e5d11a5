"""A base, its tokenizer and adapters from folders, each with the template that it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from graft import files_disk, roles
from graft.base import load_base, load_tokenizer
from graft.data.collate import pad_id
from graft.data.template import APPLIES, Template
from graft.errors import ConfigError
from graft.evaluate.batches import BASE_LABEL, random_head
from graft.files import load, read_card

HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
"""How the last weight of a sequence classification head is called in peft's files."""


@dataclass(frozen=True)
class Opened:
    """What `open_base` loaded. `templates`: by adapter, and under None the one for the bare base."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    templates: dict[str | None, Template]
    notes: list[str]
    random_head: bool = False
    """The bare base has no trained head for these labels: what it answers says nothing."""


def open_base(base: str, adapters: Mapping[str, str], *, precision: str = "auto", device: str | None = None) -> Opened:
    """Load a base and adapters by name; the bare base gets the first adapter's template, so that both see one prompt.

    Raises:
        ConfigError: no such base, or adapters that need different heads.
        AdapterFileError: a missing or broken adapter, or one for another base.
    """
    if BASE_LABEL in adapters:
        raise ConfigError(
            f"--adapter: {BASE_LABEL!r} is what the bare base is called; write NAME={adapters[BASE_LABEL]}"
        )
    stored = {name: template_of(folder) for name, folder in adapters.items()}
    labels = _num_labels(adapters, stored)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a head that the checkpoint lacks is random, and the same each time
        model = load_base(base, precision=precision, device=device, num_labels=labels)
    tokenizer = load_tokenizer(base)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)  # a classifying decoder finds the last token of a row by it
    notes = []
    for name, folder in adapters.items():
        note = getattr(load(model, folder, name), "note", None)
        notes += [f"{name}: {note}"] if note else []
    fallback = default_template(model, tokenizer)
    templates: dict[str | None, Template] = {name: template or fallback for name, template in stored.items()}
    templates = {None: next(iter(templates.values()), fallback), **templates}
    return Opened(model, tokenizer, templates, notes, random_head(model))


def template_of(folder: str) -> Template | None:
    """The template that is stored with an adapter; None for a folder without one, such as peft's."""
    settings = read_card(folder).get("template")
    if settings is None:
        return None
    try:
        return Template.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{folder}/graft.json: {error}") from error


def default_template(model: Any, tokenizer: PreTrainedTokenizerBase) -> Template:
    """For a model without an adapter that says more: its own chat template, or else the prompt as it is."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return Template(kind="plain", mode="classification", label_names=_label_names(model))
    mode = "seq2seq" if roles.is_encoder_decoder(model) else "causal"
    return Template(kind="chat" if tokenizer.chat_template and mode == "causal" else "plain", mode=mode)


def with_kind(template: Template, kind: str) -> Template:
    """The template with another frame, less what has no meaning there."""
    settings = template.to_dict() | {"kind": Template.from_dict(kind).kind}
    for name, places in APPLIES.items():
        if settings["kind"] not in places.get("kind", (settings["kind"],)):
            del settings[name]
    return dataclasses.replace(Template.from_dict(settings), task=template.task)


def _label_names(model: Any) -> tuple[str, ...]:
    """The labels as the checkpoint calls them; none if it only numbers them."""
    names = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def head_outputs(folder: str, template: Template | None) -> int | None:
    """How many outputs an adapter's sequence classification head has, by its template or its tensors; None: no head.

    Raises:
        AdapterFileError: a folder of peft's with a broken tensor file.
    """
    if template is not None and template.mode != "classification":
        return None
    if template is not None and template.label_names:
        return len(template.label_names)
    place = files_disk.find(Path(folder))
    if files_disk.read_json(place / files_disk.CONFIG).get("task_type") != "SEQ_CLS":
        return None
    tensors = files_disk.read_tensors(place, {})
    return next((len(tensor) for key, tensor in tensors.items() if tensor.ndim == 2 and key.endswith(HEADS)), None)


def _num_labels(adapters: Mapping[str, str], stored: Mapping[str, Template | None]) -> int | None:
    """How many outputs the adapters' task head has; None if they have none."""
    found = {name: head_outputs(folder, stored[name]) for name, folder in adapters.items()}
    counts = {name: count for name, count in found.items() if count is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            f"--adapter: the adapters' heads have different numbers of labels ({listed}); take one at a time"
        )
    return next(iter(counts.values()), None)
