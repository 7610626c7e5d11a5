"""Adapters to other forms: peft's, ours, other libraries'; and a base with an adapter merged in to a plain model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graft import probe
from graft.bank import tables
from graft.base import load_base, load_config, load_tokenizer
from graft.errors import AdapterFileError, ConfigError, MergeError
from graft.evaluate.opening import default_template, head_outputs, template_of
from graft.files import load, read_card, save
from graft.files_disk import CARD, fresh
from graft.foreign import LABELS, OPTIONS, READERS, WRITERS
from graft.merging import merge

FORMS = ("graft", "peft", *WRITERS)
CARD_HOLDS = {"template": "the prompt template", "base": "the fingerprint of the base", "probe": "the probe"}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Converted:
    """What was written, and what of the adapter it cannot hold: whoever loads it must be told, or goes without."""

    path: Path
    lost: tuple[str, ...]


def convert_adapter(
    source: str,
    output: str,
    *,
    base: str,
    to: str,
    source_form: str | None = None,
    device: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Converted:
    """Write an adapter again in another form; both compute exactly the same.

    Args:
        source: a folder or file.
        output: a folder or file that does not exist.
        base: the base that the adapter was made for: its fingerprint and probe are checked, and stored in our form.
        to: "graft" (peft's two files where peft has the method, and `graft.json`), "peft" (the two files alone),
            "adapterhub", "loralib" or "llama-adapter".
        source_form: "adapterhub", "loralib", "llama-adapter" or "longlora"; None: peft's or ours.
        name: what errors call it; None: as the folder.
        options: what the source's form does not hold and asks for: `alpha` and `parts` (loralib), `layers`
            (llama-adapter), `rope_factor` (longlora).

    Raises:
        AdapterFileError: the source is broken or for another base, the form cannot hold it (it says what), or the
            output exists.
        ConfigError: an unknown form or base, or an option that the source's form needs or does not know.
    """
    if to not in FORMS:
        raise ConfigError(f"--to: {to!r} is no form; use {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    if source_form is not None and source_form not in READERS:
        raise ConfigError(f"--from: {source_form!r} is no form; use {', '.join(READERS)}, or leave it out for peft's")
    for option in options:
        if option not in OPTIONS.get(source_form or "", ()):
            owner = next((form for form, names in OPTIONS.items() if option in names), None)
            hint = f"it is for --from {owner}" if owner else "no form asks for it"
            raise ConfigError(f"--{option.replace('_', '-')}: {hint}")
    _free(Path(output))
    template = None if source_form else template_of(source)
    if source_form is None:
        labels = head_outputs(source, template)
    else:
        labels = LABELS[source_form](source) if source_form in LABELS else None
    model = load_base(base, precision=_stored_precision(base), device=device, num_labels=labels)
    adapter = READERS[source_form](model, source, **options) if source_form else load(model, source, name)
    card = {} if source_form else read_card(source)
    if card:
        probe.check_probe(model, card.get("probe"), adapter.name)
    if to == "graft":
        chosen = template or default_template(model, load_tokenizer(base))
        return Converted(save(model, adapter.name, output, template=chosen.to_dict()), ())
    lost = tuple(what for field, what in CARD_HOLDS.items() if card.get(field))
    if to in WRITERS:
        return Converted(Path(output), (*WRITERS[to](model, adapter.name, output), *lost))
    with _written(Path(output)) as folder:
        save(model, adapter.name, folder, form="peft")
        (folder / CARD).unlink()
    return Converted(Path(output), lost)


def merge_folder(
    base: str,
    adapter: str,
    output: str,
    *,
    precision: str = "auto",
    into: str | None = None,
    untie: bool = False,
    device: str | None = None,
    name: str | None = None,
) -> float | None:
    """Write the base with an adapter merged in, as a plain transformers folder with its tokenizer.

    The folder is read back and its logits compared with the probe that was stored when the adapter was saved (for a
    folder without one, with the adapter's logits before merging), and only then takes its name.

    Args:
        precision: how the base is loaded, and of what is written; "auto" is the base's own.
        into: "bf16", "fp16" or "fp32": what is written of a base that is loaded as "nf4" or "int8", the numbers that
            its codes stand for.
        untie: give a site that shares its weight with another one (a tied head) a weight of its own.
        name: what errors call the adapter; None: as its folder.

    Returns:
        The largest difference of the logits, as a share of the largest.

    Raises:
        MergeError: a method or a weight that cannot be merged, or logits that are not the adapter's.
        AdapterFileError: a broken adapter, one for another base, or the output exists.
    """
    _free(Path(output))
    template = template_of(adapter)
    precision = _stored_precision(base) if precision == "auto" else precision
    labels = head_outputs(adapter, template)
    model = load_base(base, precision=precision, device=device, num_labels=labels)
    loaded = load(model, adapter, name)
    expected = read_card(adapter).get("probe") or probe.probe(model, loaded.name)
    try:
        merge(model, loaded.name, into=into, tied="untie" if untie else "error")
    except MergeError as error:  # parts are folders here
        raise MergeError(str(error).replace(f"'{loaded.name}/", f"'{adapter.rstrip('/')}/")) from error
    inputs, outputs = (getattr(table, "weight", None) for table in tables(model))
    if untie and inputs is not outputs:  # else nothing there was untied, and both stand in the file once
        model.config.tie_word_embeddings = False
    if template is not None and template.label_names:
        model.config.id2label = dict(enumerate(template.label_names))
        model.config.label2id = {name: number for number, name in enumerate(template.label_names)}
    with _written(Path(output)) as folder:
        model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
        plain = load_base(str(folder), precision=into or precision, device=device)
        try:
            return probe.check_probe(plain, expected, None)
        except AdapterFileError as error:
            raise MergeError(f"{output} is not written, the merged model is another: {error}") from error


def _stored_precision(base: str) -> str:
    """The precision of the checkpoint: converting and merging lose nothing and add nothing."""
    return DTYPES.get(getattr(load_config(base), "dtype", None) or torch.float32, "fp32")


def _free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterFileError(f"{output} exists; take another folder")


@contextlib.contextmanager
def _written(output: Path) -> Iterator[Path]:
    """A folder under another name that takes its own at the end, or vanishes."""
    with fresh(output) as new:
        yield new
        if output.exists():
            output.rmdir()  # it is empty: _free has looked
        new.rename(output)
