"""`transformers.Trainer` with routes, soft prompts and adapter checkpoints.

What Trainer lacks for adapters, and nothing else: *the adapter is a column of the batch*; checkpoints hold adapters and
are renamed into place; a loss that is not finite stops the run before it touches the adapter; the loss of an
evaluation is the mean over tokens.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, has_length

from graft.bank import bank_of
from graft.errors import TrainingError
from graft.train import state as states
from graft.train.compiled import Compiled
from graft.train.guards import check_arguments, enough_memory, trains_quantized
from graft.train.loss import logits_head
from graft.train.routed import COLUMNS, RoutedTrainer
from graft.train.schedule import Schedule
from graft.train.steps import MethodSteps, by_rate, first_batches, refuse_own_optimizer, start
from graft.train.trunk import RunTrunk

NAMED = 20
"""Rows that an error names."""


class GraftTrainer(RoutedTrainer):
    """`transformers.Trainer` for an attached model; it takes the same arguments.

    A data set may have an `adapter` column, a batch an `adapter` list (one entry per row) or `segments`, (entry,
    length) for each run of tokens of a packed batch; a batch that names nothing gets what is in use. `save_model`
    writes the adapters that train: one as a folder that `graft.load` and peft read, several as a folder each.

    Args:
        template: stored with the adapter (see `graft.save`).
        schedule: all batches of the run, instead of Trainer's own sampler; the train set is then a list.
        eval_collator: the collator for evaluation, if it is not `data_collator`.
        autocast: run forwards under autocast to this dtype.

    Raises:
        RouteError: the model has no adapters.
        ConfigError: `push_to_hub` of checkpoints, or an evaluation in 16 bits that rounds the adapter.
        TrainingError: while training, a loss or gradient that is not finite, or too little memory.
    """

    control: Any
    compiled: Compiled | None = None
    """Blocks that training steps run compiled."""
    _signature_columns: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        template: dict[str, Any] | None = None,
        schedule: Schedule | None = None,
        eval_collator: Callable[..., Any] | None = None,
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        bank_of(model)
        args = copy.copy(args) if args is not None else TrainingArguments(output_dir="tmp_trainer", report_to="none")
        check_arguments(args)
        args._n_gpu = min(1, args.n_gpu)  # else Trainer copies the model to each GPU, away from its routes
        args.logging_nan_inf_filter = False  # a loss that is not finite is an error here, never smoothed away
        self.template, self.schedule, self.autocast = template, schedule, autocast
        use_cache = getattr(model.config, "use_cache", None)
        with trains_quantized(model):
            super().__init__(model, args, *positional, **kwargs)
        self.add_callback(MethodSteps(model))
        for adapter in bank_of(model):
            for leaf in adapter.leaves:
                leaf.guided = True
        if use_cache is not None:
            model.config.use_cache = use_cache  # Trainer changes the user's model; our batches say use_cache instead
        self.data_collator: Callable[..., Any] = _KeepAdapters(self.data_collator)
        self.eval_collator = None if eval_collator is None else _KeepAdapters(eval_collator)
        # Of the losses in transformers, those of causal models divide by the count of the whole step; classifiers and
        # encoder-decoders take the argument and ignore it, and Trainer then multiplies their gradients by accumulation.
        self.counts_items = self._loss_shifts_labels or self.compute_loss_func is not None
        # Those of causal models also upcast the logits, as few others do.
        upcasts = self._loss_shifts_labels and self.label_smoother is None
        self.logits_head = None if upcasts else logits_head(model)
        self.takes_cache = "use_cache" in inspect.signature(type(model).forward).parameters
        self.current_gradient_accumulation_steps = 1
        self.losses: list[Tensor] = []
        self.batch: dict[str, Any] = {}
        self.good_batch: dict[str, Any] | None = None
        self.before_step = states.random_states()
        self.start: dict[str, Tensor] = {}

    # Batches.

    def get_train_dataloader(self) -> DataLoader:
        if self.schedule is None:
            return super().get_train_dataloader()
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=self.schedule,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        train_collator = self.data_collator
        self.data_collator = self.eval_collator or train_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), *COLUMNS]  # else Trainer drops them

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        slotted = [self.with_slots(batch) for batch in batches]
        if any(new is not old for new, old in zip(slotted, batches, strict=True)):
            items = self._get_num_items_in_batch(slotted, device)
        return slotted, items

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self.with_slots(inputs), *args, **kwargs)

    # Steps.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self.losses:
            self.before_step = states.random_states()
        self.batch = inputs
        with contextlib.nullcontext() if self.compiled is None else self.compiled.running():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on vectors: biases, norms, gates, scales."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, with a group for each rate that a method asks."""
        if self.optimizer is not None:
            refuse_own_optimizer(states.trained(self.model))
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        by_rate(optimizer, states.trained(self.model))
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: Trainer would walk all parameters for it at every step."""
        return 0

    # What must not happen.

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, as Trainer has it; it is asked right before the optimizer's step, so a bad gradient stops here."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self.losses = self.losses, []
        total = torch.stack(losses).sum()
        if getattr(self.accelerator, "scaler", None) is None:  # a scaler skips steps whose gradients overflow
            total = total + norm
        if not math.isfinite(float(total)):
            self._stop_not_finite([float(loss) for loss in losses])
        self.good_batch = self.batch
        return norm

    def _stop_not_finite(self, losses: list[float]) -> None:
        """Give back the last good state and say which rows were in the batch.

        Raises:
            TrainingError: always.
        """
        step = self.state.global_step
        self.model.zero_grad()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        what = f"loss is {losses[bad[0]]}" if bad else "gradient is not finite"
        rows = self._rows(step, bad or range(len(losses)))
        if states.finite(self.model) and self._works():
            kept = self._keep_state(step)
        elif self.newest is not None:
            states.read(self.model, self.newest / states.STATE)
            kept = f"the adapter is as in {self.newest}"
        else:
            states.put(self.model, self.start, "the start")
            kept = "the adapter is as it was at the start"
        raise TrainingError(
            f"step {step + 1}: the {what} on the batch {rows}; {kept}; look at these rows, lower train.lr, or set "
            "precision fp32"
        )

    def _works(self) -> bool:
        """Whether the adapter, as the last step left it, still has a finite loss on the batch of that step."""
        if self.good_batch is None:
            return True
        mode = self.model.training
        self.model.eval()
        with states.same_random(), torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, self._prepare_inputs(self.good_batch))
        self.model.train(mode)
        return math.isfinite(float(loss))

    def _keep_state(self, step: int) -> str:
        """Save the state before the bad step, if checkpoints are wanted, and say where."""
        kept = f"the adapter is as after step {step}"
        if step == 0 or str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "no":
            return kept
        if self.newest is None or states.step_of(self.newest) != step:
            states.set_random_states(self.before_step)
            self._save_checkpoint(self.model, None)
        return f"{kept} ({self.newest})"

    def _rows(self, step: int, batches: Sequence[int]) -> str:
        """Where the rows of these batches of a step come from."""
        if self.schedule is None:
            return f"{', '.join(str(i + 1) for i in batches)} of the step"
        at = self.schedule.at(step)
        rows = [self.train_dataset[i].row for n in batches for i in at[n]]
        by_source: dict[str, list[str]] = {}
        for row in rows[:NAMED]:
            by_source.setdefault(row.source, []).append(str(row.index))
        named = "; ".join(f"{source} rows {', '.join(numbers)}" for source, numbers in by_source.items())
        return f"of {named}" + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")

    def dry_run(self) -> None:
        """Try the longest batch of the schedule, forward and backward, and leave no trace.

        Raises:
            TrainingError: it does not fit into memory.
        """
        assert self.schedule is not None
        rows = self.schedule.longest(flat=getattr(getattr(self.data_collator, "inner", None), "packed", False))
        batch = self.data_collator([self.train_dataset[i] for i in rows])
        parameters = [p for adapter in states.trained(self.model) for p in adapter.parameters()]
        gradients = [p.grad for p in parameters]
        buffers = [(b, b.clone()) for adapter in states.trained(self.model) for b in adapter.buffers()]
        mode = self.model.training
        with states.same_random(), enough_memory(self.args, len(rows)):
            try:
                for parameter in parameters:
                    parameter.grad = None
                self.model.train()
                inputs = self._prepare_inputs(self.with_slots(batch))
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs)
                loss.backward()
            finally:
                self.model.train(mode)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                for buffer, value in buffers:
                    buffer.copy_(value)
        if isinstance(self.trunk, RunTrunk):
            self.trunk.bound()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a lack of memory is a TrainingError with advice."""
        start(self.model, lambda count: first_batches(self, count))
        self.start, self.newest, self.losses, self.good_batch = states.starting(self.model), None, [], None
        states.sweep(Path(self.args.output_dir))
        try:
            with enough_memory(self.args, self.args.per_device_train_batch_size):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.start, self.is_in_train = {}, False

    # Evaluation.

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's where predictions are wanted; else the mean loss over tokens (Trainer's is over batches)."""
        if not prediction_loss_only or self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64)  # loss times items, items, right answers, rows
        seen = 0
        for batch in dataloader:
            seen += len(batch.get("segments") or ()) or find_batch_size(batch) or 0
            inputs = self._prepare_inputs(self.with_slots(batch))
            items = self._get_num_items_in_batch([inputs], self.args.device)
            labels = inputs.get("labels")
            classes = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.compute_loss(self.model, inputs, return_outputs=classes)
            loss = found[0] if classes else found
            count = float(items) if items is not None else 1.0
            right, rows = 0.0, 0.0
            if labels is not None and classes:
                right, rows = float((found[1]["logits"].argmax(-1) == labels).sum()), float(len(labels))
            sums += torch.tensor([float(loss) * count, count, right, rows], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device, torch.float32)).double().cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        if sums[3]:
            metrics[f"{metric_key_prefix}_accuracy"] = float(sums[2] / sums[3])
        if self.guard is not None and metric_key_prefix == "eval":
            with self.compute_loss_context_manager():
                metrics |= self.guard.measure(self.model, self.state.global_step)
            self.control.should_training_stop = self.control.should_training_stop or self.guard.stopped
        size = len(dataloader.dataset) if has_length(dataloader.dataset) else seen  # type: ignore[arg-type]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=size)


@dataclass
class _KeepAdapters:
    """A collator that hands the `adapter` column of its rows on as a list, which no other collator does."""

    inner: Callable[..., Any]

    def __call__(self, features: Sequence[Any]) -> Any:
        if not any(isinstance(feature, Mapping) and "adapter" in feature for feature in features):
            return self.inner(features)
        names = [feature.get("adapter") for feature in features]
        batch = self.inner([{key: f[key] for key in f if key != "adapter"} for f in features])
        return {**batch, "adapter": names}
