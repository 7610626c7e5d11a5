"""One run from its settings to a saved adapter: `train(load_run("run.yaml"))`. The same call again resumes.

<output>/run.yaml       the settings, resolved          <output>/checkpoints/  to go on from
<output>/data.json      the data report, hashes         <output>/adapter/      the result
<output>/metrics.jsonl  one line for each log           <output>/loss.png
<output>/result.json    written last: without it the run is not finished
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from graft import base, files
from graft.bank import bank_of
from graft.data.collate import Collator
from graft.data.report import Report
from graft.disk import locked
from graft.errors import ConfigError, TrainingError
from graft.train import state as states
from graft.train.compiled import Compiled
from graft.train.config import Run
from graft.train.folder import begin, begun, place, undone, write_text
from graft.train.forgetting import Guard
from graft.train.guards import checkpointing
from graft.train.plot import plot
from graft.train.progress import Bar, Recorder, Stopper
from graft.train.result import Result, peak_bytes, read_result, result_dict
from graft.train.schedule import Schedule, rate, warmup_steps
from graft.train.setup import (
    Data,
    Opened,
    check_data,
    check_settings,
    length,
    open_model,
    padding_free,
    read_data,
    schedule_of,
)
from graft.train.trainer import GraftTrainer
from graft.train.trunk import open_trunk

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "sgd": "sgd"}


class Interrupted(TrainingError):
    """The user or the machine stopped the run; a checkpoint is saved, and the command line exits with `exit_code`."""

    exit_code = 130


def train(
    run: Run,
    *,
    fresh: bool = False,
    force: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Any] = (),
    opened: Opened | None = None,
) -> Result:
    """Train what `run` describes; the same call goes on where it was stopped, and a finished run is not trained again.

    Args:
        run: the settings (`load_run`).
        fresh: start over in a new folder (`<output>-2`, ...).
        force: train also where more memory is predicted than there is.
        console: where the data report and the progress go; None: the terminal. `Console(quiet=True)` is silent.
        callbacks: further `transformers.TrainerCallback`s.
        opened: what the caller has loaded and read of it; nothing is predicted then.

    Raises:
        ConfigError: settings that cannot be, or other ones than the folder was begun with; or another process trains
            in the folder; or the run needs more memory than there is.
        DataError: data over the limits.
        TrainingError: a loss or gradient that is not finite, or too little memory.
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    console = console or Console()
    folder = place(run, fresh)
    if (folder / "result.json").is_file():
        console.print(f"{folder} is finished; --fresh starts over in a new folder", highlight=False, soft_wrap=True)
        return read_result(run, folder)
    with undone(folder), locked(folder):
        return _train(run, folder, console, callbacks, force, opened)


def data_report(run: Run) -> Report:
    """The report on a run's data alone; no weights are loaded and nothing is written.

    Raises:
        ConfigError, DataError: see `read_data`; limits are not checked (see `Report.check`).
    """
    config = base.load_config(run.base)
    return read_data(run, base.load_tokenizer(run.base), config).report


# ------------------------------------------------------------------------------------------------- the training


def _train(
    run: Run,
    folder: Path,
    console: Console,
    callbacks: Sequence[Any],
    force: bool,
    opened: Opened | None,
) -> Result:
    from graft.planning.gate import check_room  # it plans by this folder's own settings and rows

    config = base.load_config(run.base)
    tokenizer = base.load_tokenizer(run.base)
    check_settings(run, tokenizer, config)
    autocast = _autocast(run)
    check_gpu(run.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: it trains in one process; start it without torchrun or accelerate launch")
    data = read_data(run, tokenizer, config) if opened is None else opened.data
    resumed = begun(folder, data)
    if not resumed:
        console.print(data.report.table())
    check_data(run, data)
    if opened is None and not resumed:
        check_room(run, config, tokenizer, data, force=force, console=console)
    schedule = schedule_of(run, data)
    warmup = warmup_steps(run.train.warmup, schedule.steps)
    set_seed(run.seed)
    model = open_model(run, data, tokenizer, None if opened is None else opened.model)
    with _quiet_transformers(), checkpointing(model, run.train.gradient_checkpointing):
        trainer = _trainer(run, folder, model, tokenizer, data, schedule, autocast, callbacks)
        if opened is not None and opened.last_alone and run.train.max_forgetting is None:
            trainer.args.eval_on_start = False  # under a bound, the first adapter is the first to go back to
        trainer.rates = functools.partial(rate, kind=run.train.schedule, steps=schedule.steps, warmup=warmup)
        if run.data.general is not None:
            trainer.guard = Guard(run, model, tokenizer, folder / "checkpoints", data.names)
        rows, times = _evaluations(run, data, schedule)
        with open_trunk(model, run.train.trunk_cache, schedule, rows, times, folder) as trainer.trunk:
            if run.train.compile:
                trainer.compiled = Compiled(model, () if trainer.trunk is None else trainer.trunk.modules)
            with contextlib.nullcontext() if trainer.guard is None else trainer.guard.tried():
                trainer.dry_run()
            if trainer.compiled is not None:
                trainer.compiled.first_pass(trainer.dry_run)
            if not resumed:
                begin(run, folder, data)
            console.print(_headline(run, model, schedule), highlight=False, soft_wrap=True)
            if trainer.trunk is not None:
                console.print(trainer.trunk.plan, highlight=False, soft_wrap=True)
            recorder = _fit(trainer, folder, schedule, console)
            if trainer.guard is not None and (told := trainer.guard.told(_best(trainer))) is not None:
                console.print(told, highlight=False, soft_wrap=True)
            if trainer.trunk is not None:
                console.print(trainer.trunk.told, highlight=False, soft_wrap=True)
            if trainer.compiled is not None:
                console.print(_compiled(trainer.compiled, recorder), highlight=False, soft_wrap=True)
    return _finish(run, folder, model, data, trainer, recorder, console)


def _evaluations(run: Run, data: Data, schedule: Schedule) -> tuple[list[int], int]:
    """Tokens of each evaluation row, and how often they are evaluated."""
    every = run.train.eval_every or schedule.steps_per_epoch
    return [length(example) for example in data.evaluation or ()], 1 + -(-schedule.steps // every)


def _autocast(run: Run) -> torch.dtype | None:
    """The dtype of the forwards, where it is not the base's own.

    Raises:
        ConfigError: bf16 is asked for and the device does not compute in it.
    """
    where = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = "train.compute" if run.train.compute == "bf16" else "precision" if run.precision == "bf16" else None
    if asked and not base.computes_bf16(where):
        raise ConfigError(f"{asked}: {where} does not compute in bf16; use fp32 or auto")
    whole = run.precision == "fp32" or (run.precision == "auto" and not base.computes_bf16(where))
    if run.train.compute == "fp32" and not whole:
        raise ConfigError(f"train.compute: the base is in {run.precision} here, not in fp32; say precision: fp32")
    return torch.bfloat16 if run.train.compute == "bf16" else None


def check_gpu(device: str | None) -> None:
    """Refuse a GPU that is not the first: Trainer would move the model there.

    Raises:
        ConfigError: what to write instead.
    """
    if device is not None and (number := torch.device(device).index):
        raise ConfigError(
            f"device: {device}: Trainer takes the first GPU that it sees; say cuda, and CUDA_VISIBLE_DEVICES={number} "
            "before the command"
        )


def _arguments(run: Run, folder: Path, schedule: Schedule, device: torch.device, evaluates: bool) -> TrainingArguments:
    settings = run.train
    eval_every = settings.eval_every or schedule.steps_per_epoch
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=schedule.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        optim=OPTIMIZERS[settings.optimizer],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        seed=run.seed,
        logging_steps=settings.log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=settings.save_every or eval_every,
        metric_for_best_model=f"eval_{settings.keep_best}" if settings.keep_best else None,
        greater_is_better=settings.keep_best == "accuracy",
        eval_on_start=evaluates and not states.checkpoints(folder / "checkpoints"),
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _trainer(
    run: Run,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    schedule: Schedule,
    autocast: torch.dtype | None,
    callbacks: Sequence[Any],
) -> GraftTrainer:
    mode, flat = data.template.mode, padding_free(run, data, model)
    trainer = GraftTrainer(
        model,
        _arguments(run, folder, schedule, model.device, data.evaluation is not None),
        data_collator=Collator(tokenizer, packed=run.data.packing or flat, mode=mode),
        eval_collator=Collator(tokenizer, packed=flat, mode=mode),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        template=data.template.to_dict(),
        schedule=schedule,
        autocast=autocast,
        callbacks=list(callbacks),
    )
    trainer.keep = run.train.keep
    trainer.remove_callback(PrinterCallback)
    return trainer


def _fit(trainer: GraftTrainer, folder: Path, schedule: Schedule, console: Console) -> Recorder:
    """Train to the end, from the newest checkpoint if there is one; the best adapter is in the model afterwards."""
    found = states.checkpoints(folder / "checkpoints")
    recorder = Recorder(folder / "metrics.jsonl", schedule, states.step_of(found[-1]) if found else 0)
    bar, stopper = Bar(console, recorder), Stopper(console)
    for callback in (recorder, bar, stopper):
        trainer.add_callback(callback)
    if found:
        console.print(f"going on from {found[-1]}", highlight=False, soft_wrap=True)
    try:
        with stopper.listening():
            trainer.train(str(found[-1]) if found else None)
    finally:
        bar.close()
    step = trainer.state.global_step
    ended = step >= schedule.steps or (trainer.guard is not None and trainer.guard.stopped)
    if stopper.asked and not ended:
        raise Interrupted(
            f"{stopper.asked}: stopped after step {step} of {schedule.steps}; {trainer.newest} is saved, the same "
            "command goes on from there"
        )
    best = _best(trainer)
    if best:
        if best != step:
            states.read(trainer.model, folder / "checkpoints" / f"{states.PREFIX}{best}" / states.STATE)
    elif trainer.guard is not None and trainer.guard.over:
        trainer.guard.restore(trainer.model)
    return recorder


def _best(trainer: GraftTrainer) -> int | None:
    """The step of the best evaluation, if that is what is kept."""
    return trainer.state.best_global_step if trainer.args.metric_for_best_model else None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers and accelerate say nothing below an error."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------- the result


def _finish(
    run: Run,
    folder: Path,
    model: PreTrainedModel,
    data: Data,
    trainer: GraftTrainer,
    recorder: Recorder,
    console: Console,
) -> Result:
    """Save the adapter, the plot, and last of all the result."""
    several = len(data.names) > 1
    for name in data.names:
        target = folder / "adapter" / name if several else folder / "adapter"
        files.save(model, name, target, overwrite=True, template=data.template.to_dict())
    plot(recorder.lines, folder / "loss.png", f"{run.method.name} on {run.base}")
    adapters = [bank_of(model)[name] for name in data.names]
    result = Result(
        run=run,
        metrics=_metrics(recorder, trainer),
        peak_bytes=peak_bytes(model.device),
        seconds=round(recorder.seconds, 3),
        trainable=sum(adapter.trainable for adapter in adapters),
        saved=sum(adapter.saved for adapter in adapters),
        folder=folder,
    )
    write_text(
        folder / "result.json", json.dumps(result_dict(result, model, data), indent=2, ensure_ascii=False) + "\n"
    )
    console.print(_summary(result), highlight=False, soft_wrap=True)
    return result


def _metrics(recorder: Recorder, trainer: GraftTrainer) -> dict[str, float]:
    lines = recorder.lines
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    step = trainer.state.global_step
    found: dict[str, float] = {"steps": step, "epochs": round(recorder.schedule.epoch(step), 4)}
    if recorder.took:
        found["step_seconds"] = round(recorder.usual, 5)
    if trainer.compiled is not None:
        found["compile_seconds"] = round(trainer.compiled.seconds, 3)
    if losses:
        found["loss"] = losses[-1]
        found["tokens_per_second"] = round(sum(speeds) / len(speeds), 1)
    if evaluated:
        best = _best(trainer)
        if not best and trainer.guard is not None and trainer.guard.over:
            best = trainer.guard.kept_step
        kept = next((line for line in evaluated if line["step"] == best), evaluated[-1])
        found |= {
            key: kept[key] for key in ("eval_loss", "eval_accuracy", "forgetting_kl", "general_loss") if key in kept
        }
        if evaluated[0]["step"] == 0:
            found["eval_loss_before"] = evaluated[0]["eval_loss"]
            if "general_loss" in kept:
                found["general_loss_before"] = evaluated[0]["general_loss"]
        if trainer.guard is not None and trainer.guard.stopped:
            found["stopped_step"] = step
        found["kept_step"] = kept["step"]
    return found


def _headline(run: Run, model: PreTrainedModel, schedule: Schedule) -> str:
    trainable = sum(adapter.trainable for adapter in states.trained(model))
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("adapters."))
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{run.method.name} on {run.base} ({dtype}, {model.device}): {trainable:,} values train beside {total:,}; "
        f"{schedule.steps:,} steps, {schedule.epoch(schedule.steps):.3g} epochs"
    )


def _compiled(compiled: Compiled, recorder: Recorder) -> str:
    return f"compiled in {compiled.seconds:.1f} s (the first pass); a step now takes {recorder.usual:.3g} s"


def _summary(result: Result) -> str:
    metrics = result.metrics
    loss = f"loss {metrics['loss']:.4f}, " if "loss" in metrics else ""
    if "eval_loss" in metrics:
        before = f" ({metrics['eval_loss_before']:.4f} before)" if "eval_loss_before" in metrics else ""
        loss += f"evaluation loss {metrics['eval_loss']:.4f}{before}, "
    return f"{loss}{result.seconds:.0f} s; the adapter is in {result.adapter}"
