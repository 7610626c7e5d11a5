"""`graft.json`, checked field by field before anything is taken from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from graft.errors import AdapterFileError
from graft.files_disk import CARD
from graft.forms import targets
from graft.settings import Settings, explain

Precision = Literal["fp64", "fp32", "fp16", "bf16", "quantized"]


def _sample(text: str) -> str:
    shape, *values = text.split(" ")
    try:
        _ = [int(size) for size in shape.split("x")], [float(value) for value in values]
    except ValueError:
        raise ValueError(f"base.tensors: {text!r} is not a shape and a few values") from None
    return text


class Fingerprint(Settings):
    """As `probe.fingerprint` writes it."""

    name: str
    kind: str = Field(alias="class")
    precision: Precision
    config: dict[str, Any]
    without: list[str] = []
    tensors: dict[str, Annotated[str, AfterValidator(_sample)]]


class Probe(Settings):
    """As `probe.probe` writes it."""

    ids: list[int] = Field(min_length=1)
    precision: Precision
    outputs: int | None = None
    logits: list[float] = Field(min_length=1)


class Card(Settings):
    """All fields of the file; null says "not there"."""

    format_version: Any
    graft_version: Any = None
    method: dict[str, Any]
    peft_compat: bool | None = None
    template: dict[str, Any] | None = None
    tensors_sha256: str | None = None
    base: Fingerprint | None = None
    probe: Probe | None = None


def check(card: dict[str, Any], path: Path) -> None:
    """Look whether this version of Graft wrote, or could have written, such fields.

    Raises:
        AdapterFileError: an unknown field, a missing one, or a value of another kind.
    """
    known = Card.model_fields
    for field, value in card.items():
        if field not in known and not targets.empty(value):
            raise AdapterFileError(f"{path}: field {field!r} is not known to this version of Graft")
    if not isinstance(card.get("method"), dict):
        raise AdapterFileError(f"{path}: it names no method; delete it to load the folder as peft's")
    try:
        Card.model_validate({field: value for field, value in card.items() if field in known})
    except ValidationError as error:
        raise AdapterFileError(f"{path}: damaged: {explain(error, card, Card, CARD)}") from None
