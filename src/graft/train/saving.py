"""Trainer's checkpoints for adapters: the adapters alone, exact, and renamed into place when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from graft import files
from graft.errors import AdapterFileError, TrainingError
from graft.train import state as states
from graft.train.forgetting import Guard


class SavingTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints hold the adapters that train: to use (a folder), and to go on (exact).

    Optimizer, scheduler and random states are Trainer's own, which reads them with `weights_only=True`.
    """

    lr_scheduler: Any
    template: dict[str, Any] | None = None
    keep: int | None = None
    """How many checkpoints stay beside the best; None for what `save_total_limit` says."""
    newest: Path | None = None
    """The checkpoint that this training wrote or read last."""
    guard: Guard | None = None
    """Measures what is forgotten, if that is asked."""
    rates: Callable[[int], float] | None = None
    """The factor on the learning rate by step; None for what the arguments say."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.rates is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rates)
        self._created_lr_scheduler = True  # Trainer then makes it anew for another training
        return self.lr_scheduler

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.guard is not None and self.guard.over:
            return False  # what has forgotten too much is not the best, whatever its loss
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or (best and self.args.save_strategy != "no")
        return best

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapters that train, each as a folder of its own if there are several; no base, no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = [adapter.name for adapter in states.trained(self.model)]
        with states.same_random():
            for name in names:
                save_adapter(self.model, name, folder if len(names) == 1 else folder / name, self.template)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but under a temporary name until it is complete.

        Raises:
            TrainingError: it cannot be written; nothing is left of it.
        """
        if self.guard is not None and self.guard.stopped:
            return  # from the last checkpoint before, a run that is killed now comes to the same end
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{states.PREFIX}{self.state.global_step}"
        partial = final.with_name(final.name + states.PARTIAL)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(partial)
        except (OSError, SafetensorError, AdapterFileError, RuntimeError) as error:  # torch.save has the last
            states.sweep(folder)
            raise TrainingError(
                f"{final}: cannot be written ({' '.join(str(error).split())[:200]}); is the disk full? Training can go "
                f"on from {self.newest or 'the start'}"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if final.exists():
                states.remove(final)
            os.replace(partial, final)
            states.prune(folder, self.keep or self.args.save_total_limit, self.state.best_global_step)
            if self.guard is not None:
                self.guard.prune()
        self.newest = final

    def _write_checkpoint(self, partial: Path) -> None:
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        if self.args.should_save:
            states.write(self.model, partial / states.STATE)
            if self.guard is not None:
                self.guard.write(partial)
            if best := self.state.best_global_step:
                self.state.best_model_checkpoint = str(partial.with_name(f"{states.PREFIX}{best}"))
            self._note_callbacks()
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    def _note_callbacks(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, kept = type(callback).__name__, self.state.stateful_callbacks
                if isinstance(kept.get(name), list):
                    kept[name].append(callback.state())
                else:
                    kept[name] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.newest = Path(resume_from_checkpoint)
        optimizer = not (self.args.save_only_model or self.is_fsdp_enabled or self.is_deepspeed_enabled)
        states.check(self.newest, optimizer)
        states.read(self.model, self.newest / states.STATE)
        if self.guard is not None:
            self.guard.read(self.newest)

    def _load_best_model(self) -> None:
        states.read(self.model, Path(self.state.best_model_checkpoint or "") / states.STATE)


def save_adapter(model: nn.Module, name: str, folder: Path, template: dict[str, Any] | None) -> None:
    """`graft.save` into a folder that may hold other things, which stay."""
    aside = folder.with_name(f"{folder.name}.{name}{states.PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    files.save(model, name, aside, template=template)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(aside.iterdir()):
        if (folder / file.name).is_dir():  # a part of a composed adapter
            shutil.rmtree(folder / file.name)
        os.replace(file, folder / file.name)
    aside.rmdir()
