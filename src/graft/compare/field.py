"""What a comparison measured, read from its `compare.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graft.errors import DataError

FILE = "compare.json"
VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, values: Any) -> Any:
        """A null is as good as a key that is not there."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class Counts(_Part):
    """Parameters: of base and adapter, those that train, those that are saved."""

    total: int | None = None
    trainable: int | None = None
    saved: int | None = None


class Latency(_Part):
    """Seconds of one and the same forward: the base alone, with the adapter beside it, with the adapter merged in."""

    base: float | None = None
    unmerged: float | None = None
    merged: float | None = None


class Forgetting(_Part):
    """On general text: the loss (nats a token), the base's own, and the KL divergence from the base."""

    loss: float | None = None
    base_loss: float | None = None
    kl: float | None = None


class One(_Part):
    """One run: an entry with one seed. Anything that was not measured is None."""

    seed: int | None = None
    status: Literal["ok", "skipped", "failed", "partial"] = "ok"
    why: str | None = None
    quality: dict[str, float | None] = {}
    batch_size: int | None = None
    counts: Counts = Counts()
    peak_bytes: float | None = None
    training_its: float | None = None
    evaluation_its: float | None = None
    adapter_bytes: float | None = None
    latency: Latency = Latency()
    forgetting: Forgetting = Forgetting()
    curve: list[dict[str, float | None]] = []
    seconds: float | None = None
    folder: str | None = None


class Tried(_Part):
    """One learning rate that the search tried."""

    lr: float | None = None
    rung: int | None = None
    steps: int | None = None
    score: float | None = None
    status: str = "ok"
    why: str | None = None
    seconds: float | None = None


class Entry(_Part):
    """One line of the table: a method with its settings, a baseline, or in-context learning."""

    label: str
    kind: Literal["method", "icl", "base"] = "method"
    method: str | None = None
    settings: dict[str, Any] = {}
    status: Literal["ok", "skipped", "failed", "partial"] = "ok"
    why: str | None = None
    note: str | None = None
    """What the user should know of it, though it came to its end."""
    lr: float | None = None
    tried: list[Tried] = []
    runs: list[One] = []

    @property
    def done(self) -> list[One]:
        """The runs that came to their end."""
        return [run for run in self.runs if run.status == "ok"]


class Compared(_Part):
    """A whole comparison; `notes` says which values were not finite and are left out."""

    version: Literal[1]
    title: str = "Comparison"
    base: str = ""
    data: dict[str, Any] = {}
    metric: str
    higher_is_better: bool = True
    seeds: list[int] = []
    budget: dict[str, Any] = {}
    search: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    entries: list[Entry] = Field(min_length=1)
    matrix: dict[str, Any] | None = None
    notes: list[str] = []

    def groups(self) -> dict[str, list[float]]:
        """The quality of each entry, one value a seed."""
        found = {entry.label: [run.quality.get(self.metric) for run in entry.done] for entry in self.entries}
        return {label: [value for value in values if value is not None] for label, values in found.items()}

    def fixed(self) -> set[str]:
        """The entries that no seed changes: the base as it is, measured once (with a random head it is not)."""
        return {entry.label for entry in self.entries if entry.kind == "base" and len(entry.runs) < 2}


def read(file: Path) -> Compared:
    """The comparison in a file.

    A number that is not finite becomes None and a note; a run whose quality it was counts as failed.

    Raises:
        DataError: the file is missing, no JSON, of another version, or a key has the wrong type; a label stands twice.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; `graft compare` writes it") from None
    except ValueError as error:
        raise DataError(f"{file}: no JSON ({error}); run `graft compare` again") from None
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected an object, not {type(raw).__name__}; run `graft compare` again")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{file}: version {raw.get('version')!r}, this program reads {VERSION}; run `graft compare` again"
        )
    notes: list[str] = []
    raw = _finite(raw, "", notes)
    try:
        found = Compared.model_validate(raw | {"notes": [*(raw.get("notes") or []), *notes]})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file}: {key}: {first['msg']}; run `graft compare` again") from None
    seen: set[str] = set()
    for entry in found.entries:
        if entry.label in seen:
            raise DataError(f"{file}: entries: the label {entry.label!r} stands twice; give each entry its own")
        seen.add(entry.label)
    return found.model_copy(update={"entries": [_without_broken(entry, found.metric) for entry in found.entries]})


def _finite(value: Any, key: str, notes: list[str]) -> Any:
    """The value with None for every number that is not finite; each leaves a note with its key."""
    if isinstance(value, dict):
        return {name: _finite(each, f"{key}.{name}" if key else name, notes) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each, f"{key}.{number}", notes) for number, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{key} was {value}")
        return None
    return value


def _without_broken(entry: Entry, metric: str) -> Entry:
    """The entry with the runs marked as failed that say "ok" and yet have a null where the quality belongs."""
    runs = [
        run.model_copy(update={"status": "failed", "why": run.why or f"{metric} is not a finite number"})
        if run.status == "ok" and metric in run.quality and run.quality[metric] is None
        else run
        for run in entry.runs
    ]
    good = sum(run.status == "ok" for run in runs)
    status, why = entry.status, entry.why
    if runs != entry.runs:
        status = "partial" if good else "failed"
        why = why or next(run.why for run in runs if run.status == "failed")
    return entry.model_copy(update={"runs": runs, "status": status, "why": why})
