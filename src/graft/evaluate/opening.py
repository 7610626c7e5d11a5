"""A base, its tokenizer and adapters from folders, each with the template that it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft import roles
from graft.base import load_base, load_tokenizer
from graft.data.collate import pad_id
from graft.data.template import Template
from graft.errors import ConfigError
from graft.evaluate.batches import BASE_LABEL
from graft.files import load, read_card


@dataclass(frozen=True)
class Opened:
    """What `open_base` loaded. `templates`: by adapter, and under None the one for the bare base."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    templates: dict[str | None, Template]
    notes: list[str]


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
    model = load_base(base, precision=precision, device=device, num_labels=_num_labels(stored))
    tokenizer = load_tokenizer(base)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)  # a classifying decoder finds the last token of a row by it
    notes = []
    for name, folder in adapters.items():
        note = getattr(load(model, folder, name), "note", None)
        notes += [f"{name}: {note}"] if note else []
    fallback = default_template(model, tokenizer)
    templates: dict[str | None, Template] = {name: template or fallback for name, template in stored.items()}
    return Opened(model, tokenizer, {None: next(iter(templates.values()), fallback), **templates}, notes)


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
    """The template with another frame."""
    checked = Template.from_dict(kind)
    return dataclasses.replace(template, kind=checked.kind)


def _label_names(model: Any) -> tuple[str, ...]:
    """The labels as the checkpoint calls them; none if it only numbers them."""
    names = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _num_labels(stored: Mapping[str, Template | None]) -> int | None:
    """How many outputs the adapters' task head has; None if they have none."""
    counts = {
        name: len(template.label_names)
        for name, template in stored.items()
        if template is not None and template.mode == "classification"
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            f"--adapter: the adapters' heads have different numbers of labels ({listed}); take one at a time"
        )
    return next(iter(counts.values()), None)
