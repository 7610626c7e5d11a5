"""A batch's forward and loss: its routes, its soft prompts' slots, its dtype and the adapters' penalties."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapt import prepare, route
from graft.bank import bank_of
from graft.errors import ConfigError, TrainingError
from graft.fast.head import head_of
from graft.fast.loss import Outputs, fast_loss
from graft.fast.trunk import Trunk
from graft.method import Delta
from graft.slots import marked
from graft.train import state as states
from graft.train.loss import in_fp32
from graft.train.saving import SavingTrainer

COLUMNS = ("adapter", "segments")
"""What a batch has besides the model's own inputs."""


class RoutedTrainer(SavingTrainer):
    """`transformers.Trainer` whose batches name their adapters: the adapter is a column of the batch."""

    autocast: torch.dtype | None = None
    """Forwards run under autocast to this dtype."""
    trunk: Trunk | None = None
    """Keeps the states below the first block that trains, if there is one."""
    _labelled_rows: bool = True
    """Whether losses leave out the logits of what has no label; they are the same."""
    counts_items: bool
    """Whether the model's loss divides by the count of the whole step."""
    logits_head: nn.Module | None
    """The head whose 16-bit logits are handed out in fp32 (see `in_fp32`)."""
    takes_cache: bool
    """Whether the model's forward knows `use_cache`."""

    # Batches.

    def with_slots(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the slots of its rows' soft prompts; itself if there are none."""
        bank = bank_of(self.model)
        if not any(bank.prompts(((name, 1.0),)) for name in bank.names) and not marked(batch):
            return batch
        if batch.get("segments") is not None:
            return prepare(self.model, batch, segments=self._segments(batch["segments"]))
        return prepare(self.model, batch, self._entries(batch.get("adapter")))

    def routed(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], contextlib.AbstractContextManager]:
        """The inputs of the model without our columns, and the route that they ask for."""
        plain = {key: value for key, value in inputs.items() if key not in COLUMNS}
        if self.takes_cache:
            plain["use_cache"] = False
        segments = inputs.get("segments")
        routing = self._route(inputs.get("adapter"), segments)
        return plain, routing if self.trunk is None else self._above(self.trunk, routing, plain, segments)

    def _route(self, rows: Sequence[Any] | None, segments: Any) -> contextlib.AbstractContextManager:
        if segments is not None:
            if any(adapter.selected for adapter in bank_of(self.model)):
                return contextlib.nullcontext()  # what trains the base itself cannot be routed, and need not be
            return route(self.model, segments=self._segments(segments))
        entries = self._entries(rows)
        return contextlib.nullcontext() if entries is None else route(self.model, entries)

    @contextlib.contextmanager
    def _above(self, trunk: Trunk, routing: Any, plain: dict[str, Any], segments: Any) -> Iterator[None]:
        """The route, and a forward that starts above the frozen trunk."""
        with routing, trunk.serving(plain, segments and [length for _, length in segments]):
            yield

    def _segments(self, segments: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Packed segments with the entry that each gets; what is in use, if none of them names anything."""
        entries = self._entries([entry for entry, _ in segments]) or [dict(bank_of(self.model).used)] * len(segments)
        return [(entry, length) for entry, (_, length) in zip(entries, segments, strict=True)]

    def _entries(self, rows: Sequence[Any] | None) -> Sequence[Any] | None:
        """The entries of a batch; None for what is in use, which is what rows mean that all name nothing."""
        return None if rows is None or all(row is None for row in rows) else rows

    # The loss.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        routed = inputs
        inputs, routing = self.routed(inputs)
        share: Any = None
        if num_items_in_batch is not None and not self.counts_items:
            world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            here = self._get_num_items_in_batch([inputs], self.args.device)
            share = here / max(num_items_in_batch, 1) * world
            num_items_in_batch = None
        fast = self._labelled_rows and not return_outputs and self._plain_loss()
        if fast:
            head_of(self.model)  # here, so that its trial never runs inside of a route
        outputs: Any = None
        further = self._held_to_base(routed, inputs) if model.training and fast else None
        with routing:
            loss = self._fast_loss(model, inputs, num_items_in_batch, further) if fast else None
            if loss is None:
                if self.guard is not None and self.guard.weight and model.training:
                    raise ConfigError(
                        "train.on_forgetting: regularise works where the loss is computed at labelled tokens alone, "
                        "and the log says why it is not here; say stop"
                    )
                with in_fp32(self.logits_head):
                    loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if share is not None:
            loss = loss * share
        if model.training:
            loss = self._with_penalties(loss)
            if not loss.requires_grad:
                raise TrainingError("nothing that trains acts on this batch; graft.use an adapter that trains")
        return (loss, outputs) if return_outputs else loss

    def _plain_loss(self) -> bool:
        """Whether Trainer would take the model's own loss, or smoothed labels, in this one process."""
        spread = getattr(self.accelerator, "parallelism_config", None) is not None or self.args.n_gpu > 1
        return not spread and self.compute_loss_func is None and not self.args.use_liger_kernel

    def _held_to_base(self, routed: dict[str, Any], inputs: dict[str, Any]) -> Callable[[Outputs], Tensor] | None:
        """What regularising adds to the loss of this batch, once the adapter's outputs are there; None for nothing."""
        if self.guard is None or not self.guard.weight:
            return None
        segments, rows = routed.get("segments"), len(inputs["labels"])
        off: dict[str, Any] = {"segments": [(None, n) for _, n in segments]} if segments else {"rows": [None] * rows}
        with route(self.model, **off):
            return self.guard.towards_base(self.model, inputs)

    def _fast_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
        further: Callable[[Outputs], Tensor] | None,
    ) -> Tensor | None:
        """The loss at the labelled rows, as Trainer scales it; None where the plain one is needed."""
        smoothing = self.args.label_smoothing_factor
        loss = fast_loss(self.model, inputs, call=model, num_items=num_items, smoothing=smoothing, further=further)
        if loss is None or num_items is None or not self.args.average_tokens_across_devices:
            return loss
        return loss * self.accelerator.num_processes

    def _with_penalties(self, loss: Tensor) -> Tensor:
        """The loss of a batch with its part of the adapters' penalties, which count once in a step."""
        for adapter in states.trained(self.model):
            for _, delta in adapter.items():
                penalty = delta.penalty() if type(delta).penalty is not Delta.penalty else None
                if penalty is not None:
                    loss = loss + penalty / self.current_gradient_accumulation_steps
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast)
