"""Two real steps on the batch that needs most memory: how long one takes, and what it holds at its peak."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import set_seed

from graft import base
from graft.train import run as running
from graft.train import state as states
from graft.train.config import Run
from graft.train.guards import checkpointing, enough_memory
from graft.train.setup import check_data, check_settings, open_model, read_data, schedule_of


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What two steps measured.

    Attributes:
        seconds: of the second optimizer step, its `train.accumulate` batches each the longest.
        peak: bytes allocated at once, weights and optimizer state among them.
        steps: of the whole run.
    """

    seconds: float
    peak: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def probe(run: Run) -> Probe:
    """Load the base, train two steps on the longest batch, and keep nothing of it.

    Raises:
        ConfigError, SiteError, DataError: as training would.
        TrainingError: too little memory.
    """
    config, tokenizer = base.load_config(run.base), base.load_tokenizer(run.base)
    check_settings(run, tokenizer, config)
    data = read_data(run, tokenizer, config)
    check_data(run, data)
    schedule = schedule_of(run, data)
    set_seed(run.seed)
    before = alive()
    model = open_model(run, data, tokenizer)
    with (
        tempfile.TemporaryDirectory(prefix="graft-probe-") as scratch,
        running._quiet_transformers(),
        checkpointing(model, run.train.gradient_checkpointing),
    ):
        autocast = running._autocast(run)
        trainer: Any = running._trainer(run, Path(scratch), model, tokenizer, data, schedule, autocast, ())
        rows = schedule.longest(flat=trainer.data_collator.inner.packed)
        batch = trainer.data_collator([data.train[i] for i in rows])
        with enough_memory(trainer.args, len(rows)):
            trainer.start = states.starting(model)  # which training keeps from its first step to its last
            return _measure(trainer, batch, schedule.steps, before)


def _measure(trainer: Any, batch: dict[str, Any], steps: int, before: int) -> Probe:
    model, optimizer = trainer.model, trainer.create_optimizer()
    model.train()
    cuda = trainer.args.device.type == "cuda"

    def batches() -> None:
        accumulate = trainer.args.gradient_accumulation_steps
        given, items = trainer.get_batch_samples(iter([dict(batch)] * accumulate), accumulate, trainer.args.device)
        for each in given:
            trainer.training_step(model, each, items)

    def rest() -> None:
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    seconds = 0.0

    def timed(part: Callable[[], None]) -> None:
        nonlocal seconds
        start = time.perf_counter()
        part()
        if cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start

    if cuda:
        batches()
        rest()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        timed(batches)
        timed(rest)
        return Probe(seconds=seconds, peak=torch.cuda.max_memory_allocated(), steps=steps)
    beside = peak(batches)
    rest()
    timed(batches)  # unwatched, for the profiler takes time; of the few operations of `rest` hardly any
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    beside = max(beside, gradients + peak(lambda: timed(rest)))
    trainer.losses.clear()
    return Probe(seconds=seconds, peak=alive() - before + beside, steps=steps)


def alive() -> int:
    """Bytes of all tensors that Python knows of, each storage once, whoever holds them."""
    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.layout == torch.strided and not each.is_meta:
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def peak(run: Callable[[], Any]) -> int:
    """The most bytes of a CPU's memory that `run` had allocated at once, beyond those before it."""
    gc.collect()  # what others left would be released inside, and be missing from the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    told: Any = seen.profiler
    events = [event for event in told.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        now += size
        most = max(most, now)
    return most
