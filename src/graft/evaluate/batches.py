"""Batches in which entries stand side by side: every row once for each entry, whose deltas act on it.

Rows are sorted by length, the longest first (so that a lack of memory shows at once), and come back in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapt import route, use
from graft.bank import Bank
from graft.base import context_length, made_new
from graft.errors import ConfigError, DataError, RouteError
from graft.routes import entry_of

BASE_LABEL = "base"
RANDOM_LABEL = f"{BASE_LABEL} (random head)"
"""What results of a classifier call a base whose checkpoint has no head for it."""

Progress = Callable[[str, int, int], None]
"""Told what runs, and how many of how many rows (each once for each entry) are done."""


def label_of(entry: Any) -> str:
    """What results call an entry: "base", a name, "a+b", or "0.5*a+0.5*b"."""
    parts = [name if weight == 1.0 else f"{weight:g}*{name}" for name, weight in entry_of(entry)]
    return "+".join(parts) or BASE_LABEL


def labels_of(entries: Sequence[Any]) -> list[str]:
    """The label of each entry.

    Raises:
        ConfigError: no entry, or two that results could not tell apart.
    """
    labels = [label_of(entry) for entry in entries]
    if not labels:
        raise ConfigError("entries: give at least one, None for the base")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"entries: two of them are called {twice!r}; name each once, and no adapter {BASE_LABEL!r}")
    return labels


def random_head(model: Any) -> bool:
    """Whether the bare base answers with a head that its checkpoint lacks, so that what it answers says nothing."""
    return bool(made_new(model))


def bank_or_none(model: nn.Module) -> Bank | None:
    """The model's bank, if it has adapters."""
    bank = getattr(model, "adapters", None)
    return bank if isinstance(bank, Bank) else None


def passes(model: nn.Module, entries: Sequence[Any]) -> list[list[int]]:
    """Which entries go through the model together: all of them, or one by one where an adapter changes the base."""
    bank = bank_or_none(model)
    alone = bank is not None and any(adapter.selected for adapter in bank)
    return [[i] for i in range(len(entries))] if alone else [list(range(len(entries)))]


@contextlib.contextmanager
def routed(model: nn.Module, rows: Sequence[Any]) -> Iterator[None]:
    """Inside, `rows[b]` is the entry of row b. An adapter that changes the base itself stays in use afterwards.

    Raises:
        RouteError: an unknown name, a model without adapters, or entries that cannot stand in one batch.
    """
    bank = bank_or_none(model)
    if bank is None:
        if any(entry_of(row) for row in rows):
            raise RouteError("the model has no adapters; call graft.attach or graft.load first")
        yield
    elif any(adapter.selected for adapter in bank):
        chosen = {entry_of(row) for row in rows}
        if len(chosen) > 1:
            raise RouteError("an adapter that changes the base itself cannot share a batch; run the entries in turn")
        if chosen != {bank.used}:
            use(model, dict(chosen.pop()))
        yield
    else:
        with route(model, rows):
            yield


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and what is in use are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    bank = bank_or_none(model)
    used = None if bank is None else bank.used
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if bank is not None and used is not None and bank.used != used:
            use(model, dict(used))


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows in batches of `size`, the longest first; rows of one length in their order."""
    if size < 1:
        raise ConfigError(f"batch_size {size}: give at least 1")
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return [order[i : i + size] for i in range(0, len(order), size)]


def on_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch's tensors beside the model; what is no tensor stays behind."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def context_of(model: Any, tokenizer: Any) -> int | None:
    """The longest input that the model has positions for, less what prefixes take; None where there is no limit."""
    limit = context_length(model.config, tokenizer)
    if limit is None:
        return None
    adapters = list(bank_or_none(model) or ())
    shifts = [max(adapter.shift.values(), default=0) for adapter in adapters]
    return int(limit * min((adapter.stretch for adapter in adapters), default=1.0)) - max(shifts, default=0)


def check_length(where: str, length: int, limit: int | None) -> None:
    """Raise a DataError for a row that is longer than the context."""
    if limit is not None and length > limit:
        raise DataError(f"{where}: {length} tokens, the context has {limit}; shorten or remove the row")
