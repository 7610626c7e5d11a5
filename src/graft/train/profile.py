"""Where the time of a run goes: `graft train --profile` trains a few steps and writes one page, `<output>/profile.md`.

The steps are trained in a folder of their own, which is removed: the run itself is neither begun nor changed.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, set_seed

from graft import base
from graft.errors import ConfigError
from graft.ids import IGNORED
from graft.train import clock as clocks
from graft.train import run as running
from graft.train.clock import PARTS, Clock, measuring
from graft.train.config import Run
from graft.train.folder import PAGE, place, undone, write_text
from graft.train.guards import checkpointing
from graft.train.schedule import rate, warmup_steps
from graft.train.setup import check_data, check_settings, needs_rows, open_model, read_data, schedule_of
from graft.train.trunk import open_trunk

WARMUP, STEPS = 2, 10
FEW = 256
"""Tokens in a step, below which the machine mostly waits for Python."""
BAR = 40
"""Characters of a bar that is the whole."""


@dataclass
class Profile:
    """What some training steps took and trained on.

    Args:
        run: the settings.
        why_padded: why examples do not stand in one row without padding; None if they do.
        frozen: what the frozen-trunk cache does in this run, in words, if there is one.
        steps: how many were measured.
        seconds: of the steps, from the end of the one before to the end of the last.
        parts: seconds of each of `PARTS`; they sum to `seconds`.
        places: positions of the batches' rows, padding included.
        padding: how many of them are padding.
        labelled: how many have a label; None where rows have one label each (classification).
        vocabulary: rows of the head, or 0.
    """

    run: Run
    why_padded: str | None = None
    frozen: str | None = None
    steps: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    places: int = 0
    padding: int = 0
    labelled: int | None = 0
    vocabulary: int = 0

    @property
    def padding_share(self) -> float:
        """Padding among all positions."""
        return self.padding / max(1, self.places)

    @property
    def labelled_share(self) -> float | None:
        """Positions with a label among those that are no padding."""
        return None if self.labelled is None else self.labelled / max(1, self.places - self.padding)

    def share(self, part: str) -> float:
        """A part of the time."""
        return self.parts[part] / self.seconds if self.seconds else 0.0

    def count(self, batch: dict[str, Any], both: bool) -> None:
        """Add a batch: `input_ids` and `labels` (B, T), and `attention_mask` if there is padding.

        Args:
            both: an encoder-decoder, whose targets are rows of their own.
        """
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        self.places += batch["input_ids"].numel()
        self.padding += 0 if mask is None else int((mask == 0).sum())
        if not isinstance(labels, Tensor) or labels.dim() < 2:
            self.labelled = None
        elif self.labelled is not None:
            trained = int((labels != IGNORED).sum())
            self.labelled += trained
            if both:
                self.places += labels.numel()
                self.padding += labels.numel() - trained


def profile(run: Run, fresh: bool = False, *, console: Console | None = None) -> Profile:
    """Train some steps of `run` and write where their time went; the run can be started, or go on, afterwards.

    Args:
        run: the settings (`load_run`).
        fresh: refused; a profile begins no run.
        console: where the page is shown; None: the terminal.

    Raises:
        ConfigError, DataError, TrainingError: see `graft.train.run.train`.
    """
    if fresh:
        raise ConfigError("--profile begins no run and changes none; leave --fresh out")
    console = console or Console()
    folder = place(run, False)
    with undone(folder), tempfile.TemporaryDirectory(prefix="graft-profile-") as scratch:
        found = _measure(run, Path(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PAGE, page(found))
    console.print(page(found), highlight=False, soft_wrap=True, markup=False)
    console.print(f"written to {folder / PAGE}", highlight=False, soft_wrap=True)
    return found


def _measure(run: Run, scratch: Path) -> Profile:
    config = base.load_config(run.base)
    tokenizer = base.load_tokenizer(run.base)
    check_settings(run, tokenizer, config)
    autocast = running._autocast(run)
    data = read_data(run, tokenizer, config)
    check_data(run, data)
    schedule = schedule_of(run, data)
    warmup = warmup_steps(run.train.warmup, schedule.steps)
    set_seed(run.seed)
    model = open_model(run, data, tokenizer)
    found = Profile(run, needs_rows(run, data, model) if run.data.padding_free is not False else "data.padding_free")
    head = model.get_output_embeddings()
    found.vocabulary = 0 if head is None else head.weight.shape[0]
    with running._quiet_transformers(), checkpointing(model, run.train.gradient_checkpointing):
        trainer: Any = running._trainer(run, scratch, model, tokenizer, data, schedule, autocast, ())
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.eval_on_start = False
        trainer.rates = functools.partial(rate, kind=run.train.schedule, steps=schedule.steps, warmup=warmup)
        rows, times = running._evaluations(run, data, schedule)
        with open_trunk(model, run.train.trunk_cache, schedule, rows, times, scratch) as trainer.trunk:
            found.frozen = None if trainer.trunk is None else trainer.trunk.plan
            trainer.dry_run()
            with measuring(trainer) as clock:
                trainer.add_callback(_Steps(found, clock, trainer, schedule.steps))
                trainer.train()
    return found


class _Steps(TrainerCallback):
    """Starts the clock behind the warm-up, stops it and the run some steps later."""

    def __init__(self, found: Profile, clock: Clock, trainer: Any, steps: int) -> None:
        self.found, self.clock = found, clock
        self.first = min(WARMUP, steps - 1)
        self.last = min(self.first + STEPS, steps)
        self.began = 0.0
        self.real = trainer.get_batch_samples
        trainer.get_batch_samples = self.batches
        self.both = bool(trainer.model.config.is_encoder_decoder)

    def batches(self, *args: Any) -> Any:
        batches, items = self.real(*args)
        if self.clock.running:
            with self.clock.inside(clocks.OWN):
                for batch in batches:
                    self.found.count(batch, self.both)
        return batches, items

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.switch(clocks.REST)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.switch(clocks.REST)
        if state.global_step == self.last:
            self.clock.stop()
            self.found.seconds = time.perf_counter() - self.began
            self.found.steps, self.found.parts = self.last - self.first, dict(self.clock.seconds)
            control.should_training_stop = True
        elif state.global_step == self.first:
            self.began = time.perf_counter()
            self.clock.start()


# ------------------------------------------------------------------------------------------------- the page


def page(found: Profile) -> str:
    """The page, in Markdown."""
    run = found.run
    total, steps = max(found.seconds, 1e-9), max(found.steps, 1)
    tokens = found.places - found.padding
    labelled = "one for each row" if found.labelled_share is None else f"{found.labelled_share:.1%} of the tokens"
    lines = [
        f"# Where the time goes: {run.method.name} on {run.base}",
        "",
        f"{found.steps} steps, {total / steps:.4g} s each, {tokens / total:,.0f} tokens a second; "
        f"{torch.get_num_threads()} threads.",
        "",
        "| what | |",
        "|---|---|",
        f"| padding share | {found.padding_share:.1%} of the positions |",
        f"| labelled share | {labelled} |",
        f"| tokens in a step | {tokens / steps:,.0f} |",
        *(
            ["| train.compile | left out here: a compiled block has no parts to tell apart |"]
            if run.train.compile
            else []
        ),
        "",
        "| part | s a step | share | | what it is |",
        "|---|---:|---:|---|---|",
    ]
    for part, meaning in PARTS.items():
        bar = "█" * round(BAR * found.share(part))
        lines.append(f"| {part} | {found.parts[part] / steps:.4f} | {found.share(part):.1%} | {bar} | {meaning} |")
    lines += [f"| sum | {sum(found.parts.values()) / steps:.4f} | 100% | | |", "", "## What to change", ""]
    return "\n".join([*lines, *(f"- {text}" for text in advice(found)), ""])


def advice(found: Profile) -> list[str]:
    """What would make the steps faster, the largest gain first where that can be told."""
    return list(_advice(found)) or ["Nothing stands out: most of the time is the base's own arithmetic."]


def _advice(found: Profile) -> Iterator[str]:
    run, share = found.run, found.share
    if found.padding_share > 0.1:
        yield f"{found.padding_share:.0%} of the positions are padding: {_against_padding(found)}"
    if run.train.gradient_checkpointing:
        yield "train.gradient_checkpointing runs every block's forward twice: turn it off if memory allows."
    where = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if run.precision == "fp32" and run.train.compute != "bf16" and base.computes_bf16(where):
        yield f"the base computes in fp32, and {where} has bf16: take precision bf16, or train.compute bf16."
    if where == "cpu" and torch.get_num_threads() < (os.cpu_count() or 1):
        yield f"torch uses {torch.get_num_threads()} of {os.cpu_count()} cores: set OMP_NUM_THREADS."
    if share(clocks.LOSS) > 0.25:
        yield f"the loss takes {share(clocks.LOSS):.0%}: {_against_loss(found)}"
    if share(clocks.ADAPTERS) > 0.25:
        yield (
            f"the method takes {share(clocks.ADAPTERS):.0%}: a lower rank, fewer targets, or no dropout "
            f"(see docs/methods/{run.method.name}.md)."
        )
    if share(clocks.ATTENTION) > 0.4:
        yield f"attention takes {share(clocks.ATTENTION):.0%}: rows are long; data.max_length cuts its square."
    if share(clocks.OPTIMIZER) > 0.15:
        yield f"the optimizer takes {share(clocks.OPTIMIZER):.0%}: a larger batch_size or accumulate steps less often."
    if share(clocks.DATA) > 0.1:
        yield f"the model waits for data {share(clocks.DATA):.0%} of the time: others use the cores or the disk."
    tokens = (found.places - found.padding) / max(found.steps, 1)
    if tokens < FEW:
        yield f"a step has {tokens:,.0f} tokens, so much of it is no arithmetic: raise train.batch_size."
    if found.frozen is not None:
        yield f"From the second epoch on steps are faster than these: {found.frozen}."


def _against_padding(found: Profile) -> str:
    data = found.run.data
    if data.padding_free is False:
        return "leave data.padding_free out, so that examples stand end to end."
    if not data.group:
        return "data.group puts examples of like length into one batch; leave it on."
    return f"{found.why_padded}, so they cannot stand end to end; a smaller batch_size with accumulate pads less."


def _against_loss(found: Profile) -> str:
    what = (
        f"each labelled token meets the {found.vocabulary:,} rows of the head" if found.vocabulary else "it has a head"
    )
    template = found.run.data.template
    if isinstance(template, dict) and template.get("train_on") == "all":
        return f"{what}, and data.template.train_on is all; completion labels the answers alone."
    return f"{what}; fewer labels, or a base with a smaller vocabulary, is all that helps."
