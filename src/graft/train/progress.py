"""What a run shows and writes while it trains: one line on the screen, one JSON line for each log, and how it stops."""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from graft.train.schedule import Schedule

FORGETTING = ("forgetting_kl", "general_loss", "forgetting_weight")
"""What is logged of general text, behind `eval_`."""
NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}


def read_lines(file: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, up to a step; a last line that a kill cut off is left out."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return [line for line in lines if until is None or line["step"] <= until]


class Recorder(TrainerCallback):
    """Writes `metrics.jsonl`: `step`, `epoch`, `seconds`, and `loss`, `lr`, `grad_norm`, `tokens_per_second` (without
    padding and without evaluation), or `eval_loss` and what `FORGETTING` names."""

    def __init__(self, file: Path, schedule: Schedule, resumed: int) -> None:
        self.file, self.schedule = file, schedule
        self.lines = read_lines(file, resumed) if resumed else []
        file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        self.earlier = self.lines[-1]["seconds"] if self.lines else 0.0
        self.started = self.step_started = time.perf_counter()
        self.tokens, self.busy = 0, 0.0
        self.took: list[float] = []

    @property
    def usual(self) -> float:
        """Seconds of the median step since this start; 0 if there was none."""
        return statistics.median(self.took) if self.took else 0.0

    @property
    def seconds(self) -> float:
        """Since the run began, without the time that it lay still between starts."""
        return self.earlier + time.perf_counter() - self.started

    @property
    def speed(self) -> float:
        """Tokens a second since the last log."""
        return self.tokens / self.busy if self.busy else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.took.append(time.perf_counter() - self.step_started)
        self.busy += self.took[-1]
        self.tokens += self.schedule.tokens(state.global_step - 1)
        if control.should_save or (control.should_evaluate and args.metric_for_best_model):  # the best is saved too
            control.should_log = True  # so that the lines are the same whether a run was cut here or not

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(self.schedule.epoch(state.global_step), 4)}
        line |= {new: logs[old] for old, new in NAMES.items() if old in logs}
        line |= {key: logs[key] for key in ("eval_loss", "eval_accuracy") if key in logs}
        line |= {key: logs[f"eval_{key}"] for key in FORGETTING if f"eval_{key}" in logs}
        if "loss" in line:
            line["tokens_per_second"] = round(self.speed, 1)
            self.tokens, self.busy = 0, 0.0
        line["seconds"] = round(self.seconds, 3)
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


class Bar(TrainerCallback):
    """One line: steps, loss, tokens a second, time left; and a line for each evaluation."""

    def __init__(self, console: Console, recorder: Recorder) -> None:
        self.recorder = recorder
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            refresh_per_second=2,
        )
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="-", speed="-")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step, speed=f"{self.recorder.speed:,.0f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if self.task is not None and "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")
        if "eval_loss" in logs:
            right = f", accuracy {logs['eval_accuracy']:.3f}" if "eval_accuracy" in logs else ""
            kl = f", forgetting {logs['eval_forgetting_kl']:.4f}" if "eval_forgetting_kl" in logs else ""
            self.progress.console.print(
                f"step {state.global_step}/{state.max_steps}: evaluation loss {logs['eval_loss']:.4f}{right}{kl}",
                highlight=False,
            )

    def close(self) -> None:
        """Stop drawing."""
        self.progress.stop()


class Stopper(TrainerCallback):
    """Ends a run after the step at hand, with a checkpoint, when the user or the machine asks for it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_log = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the block runs; the second one of a kind has its usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = signal.Signals(number).name
            signal.signal(number, before[number])
            self.console.print("stopping after this step, with a checkpoint; once more to stop at once")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
