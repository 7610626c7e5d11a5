"""What methods do while they train: a start from data, rates of their own, and work before and after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from graft.adapter import Adapter
from graft.errors import ConfigError, TrainingError
from graft.train import state as states


class MethodSteps(TrainerCallback):
    """Calls each trained adapter's method when training begins, before and after each optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in _trained(self.model):
            adapter.method.begin(adapter, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in _trained(self.model):
            adapter.method.before_step(adapter, state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in _trained(self.model):
            adapter.method.after_step(adapter, state.global_step, state.max_steps)


def start(model: nn.Module, batches: Callable[[int], Sequence[dict[str, Any]]]) -> None:
    """Let methods that begin from data see their batches; no random number is drawn for what follows.

    Args:
        batches: gives the first n training batches, the same ones whenever it is asked.

    Raises:
        ConfigError: batches whose rows go to several adapters.
    """
    for adapter in _trained(model):
        wanted = adapter.method.wants_batches()
        if not wanted:
            continue
        with states.same_random():
            seen = list(batches(wanted))
            for batch in seen:
                _own(adapter, batch)
            adapter.method.start(model, adapter, [_plain(batch) for batch in seen])


def first_batches(trainer: Any, count: int) -> list[dict[str, Any]]:
    """The first training batches: those of the schedule, or else the data set's first rows in their order."""
    collate: Any = trainer.data_collator
    if trainer.schedule is not None:
        found = [collate([trainer.train_dataset[i] for i in rows]) for rows in islice(trainer.schedule, count)]
    else:
        collate = trainer._get_collator_with_removed_columns(collate, "training")
        size = trainer.args.train_batch_size
        found = list(islice(DataLoader(trainer.train_dataset, batch_size=size, collate_fn=collate), count))
    more = {"use_cache": False} if trainer.takes_cache else {}
    return [trainer._prepare_inputs({**trainer.with_slots(batch), **more}) for batch in found]


def by_rate(optimizer: torch.optim.Optimizer, adapters: Sequence[Adapter]) -> None:
    """Split the optimizer's groups so that each parameter has the rate that its method gives it."""
    rates = rates_of(adapters)
    for group in list(optimizer.param_groups):
        split: dict[float, list[Tensor]] = {1.0: []}
        for parameter in group["params"]:
            split.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        group["params"] = split.pop(1.0)
        for rate, parameters in split.items():
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**options, "params": parameters, "lr": group["lr"] * rate})


def rates_of(adapters: Sequence[Adapter]) -> dict[int, float]:
    """The factor on the learning rate for each parameter (by id) that has another one than 1."""
    found: dict[int, float] = {}
    for adapter in adapters:
        for leaf in adapter.leaves:
            factor = adapter.method.part_rate(leaf.name.rpartition("/")[2]) if adapter.parts else 1.0
            named = [*leaf.named_parameters(), *leaf.selected.items()]
            found |= {id(p): rate for name, p in named if (rate := factor * leaf.method.rate(name, p)) != 1.0}
    return found


def refuse_own_optimizer(adapters: Sequence[Adapter]) -> None:
    """An optimizer that the user made knows nothing of a method's rates.

    Raises:
        TrainingError: a method has rates of its own.
    """
    for adapter in adapters:
        if rates_of([adapter]):
            raise TrainingError(
                f"adapter {adapter.name!r} ({adapter.method.name}) has learning rates of its own, which an optimizer "
                "that you pass does not follow; leave the optimizer to GraftTrainer"
            )


def _trained(model: nn.Module) -> list[Adapter]:
    return [leaf for adapter in states.trained(model) for leaf in adapter.leaves if leaf.trainable]


def _own(adapter: Adapter, batch: dict[str, Any]) -> None:
    named = {entry for entry in batch.get("adapter") or () if entry is not None}
    named |= {entry for entry, _ in batch.get("segments") or () if entry is not None}
    if named - {adapter.name.partition("/")[0]}:
        raise ConfigError(
            f"{adapter.method.name}: it starts from data, and the batches have rows of other adapters; train "
            f"{adapter.name!r} alone"
        )


def _plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in ("adapter", "segments")}
