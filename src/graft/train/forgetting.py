"""Forgetting during a run: measured on general text at each evaluation, and held within `train.max_forgetting`.

At the bound a run stops, or adds weight * KL(base || adapter) a labelled token of the training batch to its loss: the
adapter is off in a second forward of the same batch, without gradients. The weight starts at 0; an evaluation over the
bound makes it 1, then doubles it up to `MOST`; one under half of the bound halves it. Either way the adapter of the
last evaluation within the bound is kept, where the last of all is not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from graft.bank import bank_of
from graft.errors import ConfigError, TrainingError
from graft.evaluate.batches import quiet
from graft.evaluate.forgetting import check_model, forgetting
from graft.evaluate.general import pieces
from graft.fast.kl import kl_sum
from graft.fast.loss import Outputs, outputs
from graft.train import state as states
from graft.train.config import Run

STATE = "forgetting.json"
"""Of a checkpoint: what the guard knows."""
KEPT = "within_bound-"
"""Beside the checkpoints, with the step behind it: the adapters of an evaluation within the bound."""
MOST = 2.0**10
"""The highest weight of the KL in the loss."""

log = logging.getLogger("graft")


class Guard:
    """Measures a run on general text and holds it within its bound.

    Args:
        run: with `data.general`.
        folder: of the run's checkpoints.
        names: the adapters that train; the one that forgets most counts.

    Attributes:
        kl, loss: of the last evaluation.
        weight: of the KL in the loss.
        kept_step: the last evaluation within the bound; None before there is one.
        over: whether the last evaluation was over the bound.
        stopped: whether the run ends for it.

    Raises:
        ConfigError, DataError: see `check`, `pieces`.
    """

    def __init__(
        self, run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, names: Sequence[str]
    ) -> None:
        check(run, model)
        assert run.data.general is not None
        self.bound, self.regularises = run.train.max_forgetting, run.train.on_forgetting == "regularise"
        self.tokenizer, self.names, self.folder = tokenizer, list(names), folder
        self.pieces = pieces(run.data.general, tokenizer, model.config)
        self.kl = self.loss = self.weight = 0.0
        self.kept_step: int | None = None
        self.kept_kl = 0.0
        self.over = self.stopped = self.said = False

    # At each evaluation.

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure, keep the adapters if they are within the bound, and decide what to do if not.

        Raises:
            TrainingError: the bound is passed before the first step.
        """
        with states.same_random():
            found = forgetting(model, self.tokenizer, self.pieces, self.names)
        worst = max(found, key=lambda each: each.kl if each.kl == each.kl else float("inf"))
        self.kl, self.loss = worst.kl, worst.loss
        shown = {"eval_forgetting_kl": self.kl, "eval_general_loss": self.loss}
        if self.bound is None:
            return shown
        self.over = not self.kl <= self.bound
        if not self.over:
            self._keep(model, step)
        elif self.kept_step is None:
            raise TrainingError(
                f"train.max_forgetting: before the first step the KL to the base is {self.kl:.4g} nats a token, over "
                f"{self.bound:g}; raise it, or take a method that starts as the base does"
            )
        self.stopped = self.over and not self.regularises
        if self.regularises:
            shown["eval_forgetting_weight"] = self.weight
            self.weight = self._next_weight(self.bound)
        return shown

    def _next_weight(self, bound: float) -> float:
        if not self.over:
            return self.weight / 2 if self.kl < bound / 2 else self.weight
        if self.weight == MOST and not self.said:
            self.said = True
            log.warning(
                "train.max_forgetting: the KL to the base is %.4g nats a token, over %g, at its highest weight in the "
                "loss (%g), where it stays; lower train.lr, or raise the bound",
                self.kl,
                bound,
                MOST,
            )
        return min(max(1.0, 2 * self.weight), MOST)

    def _keep(self, model: nn.Module, step: int) -> None:
        self.kept_step, self.kept_kl = step, self.kl
        if os.environ.get("RANK", "0") != "0":
            return  # every process has the same adapters
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._kept(step)
        partial = file.with_name(file.name + states.PARTIAL)
        states.write(model, partial)
        os.replace(partial, file)

    def _kept(self, step: int | None) -> Path:
        return self.folder / f"{KEPT}{step}.safetensors"

    # In each step.

    def towards_base(self, model: nn.Module, inputs: dict[str, Any]) -> Callable[[Outputs], Tensor]:
        """What a batch's summed loss gains, from the adapter's outputs; call it where the adapter is off."""
        with quiet(model), torch.no_grad():
            base = outputs(model, inputs)
        return lambda found: self.weight * kl_sum(base, found)

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Inside, a step regularises if this run ever may: a trial of the longest batch then sees what that takes."""
        before, self.weight = self.weight, float(self.regularises)
        try:
            yield
        finally:
            self.weight = before

    # At the end, and between starts.

    def told(self, best: int | None) -> str | None:
        """A line that says what the bound did; None if it did nothing.

        Args:
            best: the step of the adapter that is kept for its score; None: the last within the bound is kept.
        """
        if not self.over:
            return None
        what = "the run stopped" if self.stopped else "the run ended"
        told = f"forgetting is {self.kl:.4g} nats a token, over train.max_forgetting {self.bound:g}: {what}, and the "
        if best:
            return f"{told}adapter of step {best}, the best within it, is kept"
        told += f"adapter of step {self.kept_step} ({self.kept_kl:.4g}) is kept"
        return told if self.kept_step else f"{told}, which has not trained; evaluate more often (train.eval_every)"

    def restore(self, model: nn.Module) -> None:
        """Put the adapters of the last evaluation within the bound into the model."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # until the file of the first process is there
        states.read(model, self._kept(self.kept_step))

    def prune(self) -> None:
        """Remove kept adapters that neither this run nor a checkpoint goes back to; call it after a checkpoint."""
        wanted = {self._kept(self.kept_step)}
        for checkpoint in states.checkpoints(self.folder):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of a broken one `read` tells
                wanted.add(self._kept(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["kept_step"]))
        for file in self.folder.glob(f"{KEPT}*"):
            if file not in wanted:
                file.unlink()

    def write(self, checkpoint: Path) -> None:
        """Store what a resumed run needs to go on as this one."""
        known = {key: getattr(self, key) for key in ("kl", "loss", "weight", "kept_step", "kept_kl", "over")}
        (checkpoint / STATE).write_text(json.dumps(known) + "\n", encoding="utf-8")

    def read(self, checkpoint: Path) -> None:
        """Take what `write` stored.

        Raises:
            TrainingError: it is missing or broken.
        """
        try:
            known = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            for key in ("kl", "loss", "weight", "kept_step", "kept_kl", "over"):
                setattr(self, key, known[key])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{checkpoint / STATE}: cannot be read ({error}); remove this checkpoint or use --fresh"
            ) from None


def check(run: Run, model: Any) -> None:
    """Refuse forgetting where it cannot be measured, or regularised as the run asks.

    Raises:
        ConfigError: no language model, or a method or setting that cannot be regularised.
    """
    if run.data.general is None:
        return
    try:
        check_model(model)
    except ConfigError as error:
        raise ConfigError(f"data.general: {error}") from None
    if run.train.on_forgetting != "regularise":
        return
    bank, why = bank_of(model), None
    if any(adapter.selected for adapter in bank):
        why = f"{run.method.name} trains the base itself, which a batch cannot have beside it"
    elif any(bank.prompts(((name, 1.0),)) for name in bank.names):
        why = f"{run.method.name} puts pseudo-tokens into the batch, which the base cannot read"
    elif run.train.compile:
        why = "with train.compile the base's forward would be another graph"
    if why is not None:
        raise ConfigError(f"train.on_forgetting: {why}; say stop")
