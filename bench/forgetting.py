"""Forgetting at equal task score: full fine-tuning beside LoRA on the embedded base and E2E, on general text.

    python bench/forgetting.py [--quick]

Each run trains until its evaluation loss first reaches TARGET, at two learning rates of each method and with three
seeds, and must be within 1 % of it then. Measured there: KL to the base and loss on general texts of ../shared/data;
without them there is nothing to measure. Rates stay constant after ten steps, so no run is cut in a schedule's middle.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import DATA
from rich.console import Console
from scipy import stats
from transformers import TrainerCallback

from graft.base import load_base, load_tokenizer
from graft.evaluate.forgetting import forgetting
from graft.files import load
from graft.quickstart import settings
from graft.train.config import make_run
from graft.train.run import train

TARGET = 1.60
"""Nats a token, of the evaluation rows; the base has 4.04."""
SEEDS = (0, 1, 2)
STEPS, EVERY = 300, 5
NEAR = 1.08
"""Times the target: from there on each step is evaluated, so that none jumps far below it."""
RATES: tuple[dict[str, float], ...] = ({"full": 3e-4, "lora": 4e-3}, {"full": 6e-4, "lora": 2e-3})
"""Of both methods; LoRA's 4e-3 is what the quickstart found good."""
TEXTS = {name: DATA / "pretrain" / f"{name}_valid.txt" for name in ("wikitext2", "tinystories")}
TOKENS = 4096


class Reached(TrainerCallback):
    """Ends a run at the first evaluation at or below the target; near it, each step is evaluated."""

    def __init__(self, target: float) -> None:
        self.target, self.loss, self.step = target, float("inf"), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_evaluate or self.loss <= NEAR * self.target

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.loss, self.step = metrics["eval_loss"], state.global_step
        control.should_training_stop = control.should_training_stop or self.loss <= self.target


def measure(method: str, lr: float, seed: int, quick: bool) -> dict[str, Any]:
    """Train one run to the target and measure what it forgot."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        asked = settings(f"{folder}/run").model_dump(mode="json")
        if method == "full":
            asked["method"] = {"method": "full"}
        asked["data"] |= {"eval": 0.05, "eval_limit": 48, "limit": 64 if quick else None}
        asked["train"] |= {"lr": lr, "epochs": 4, "max_steps": 4 if quick else STEPS, "schedule": "constant"}
        asked["train"] |= {"warmup": 2 if quick else 10, "eval_every": EVERY, "save_every": 10_000, "log_every": 50}
        asked["seed"] = seed
        reached = Reached(TARGET)
        result = train(make_run(asked), console=Console(quiet=True), callbacks=[reached])
        model, tokenizer = load_base("embedded", precision="fp32"), load_tokenizer("embedded")
        load(model, result.adapter, "run")
        row: dict[str, Any] = {"method": method, "lr": lr, "seed": seed, "steps": reached.step}
        row |= {"task_loss": reached.loss, "task_loss_before": result.metrics["eval_loss_before"]}
        row |= {"values": result.trainable, "on_target": 0.99 * TARGET <= reached.loss <= 1.01 * TARGET}
        for name, file in TEXTS.items():
            if file.is_file():
                (found,) = forgetting(model, tokenizer, file, ["run"], limit=512 if quick else TOKENS)
                row |= {f"{name}_kl": found.kl, f"{name}_loss": found.loss, f"{name}_base": found.base_loss}
                row[f"{name}_tokens"] = found.tokens
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def show(cells: dict[str, dict[str, Any]]) -> str:
    """Means and 95 % intervals over the seeds, and Welch's t-test of the KL between the methods."""
    lines: list[list[Any]] = []
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in cells.values():
        groups.setdefault((row["method"], row["lr"]), []).append(row)
    texts = [name for name in TEXTS if all(f"{name}_kl" in row for row in cells.values())]
    for (method, lr), rows in sorted(groups.items()):
        line = [method, f"{lr:g}", _spread([row["steps"] for row in rows], 0), _spread([r["task_loss"] for r in rows])]
        for name in texts:
            line.append(_spread([row[f"{name}_kl"] for row in rows]))
            line.append(_spread([row[f"{name}_loss"] - row[f"{name}_base"] for row in rows]))
        lines.append(line)
    titles = ["method", "lr", "steps", "task loss"]
    titles += [f"{name}: {what}" for name in texts for what in ("KL to the base", "loss, more than the base's")]
    told = [common.table(titles, lines)]
    keys = sorted(groups)
    for name in texts:
        for full in (key for key in keys if key[0] == "full"):
            for lora in (key for key in keys if key[0] == "lora"):
                one, two = ([row[f"{name}_kl"] for row in groups[key]] for key in (full, lora))
                p = stats.ttest_ind(one, two, equal_var=False).pvalue if min(len(one), len(two)) > 1 else float("nan")
                times = statistics.mean(one) / statistics.mean(two)
                told.append(f"{name}: full at {full[1]:g} / LoRA at {lora[1]:g}: KL {times:.2f} times, p = {p:.2g}")
    return "\n".join(told)


def _spread(values: list[float], digits: int = 3) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    options = common.parser(__doc__).parse_args()
    common.begin(options)
    if not any(Path(file).is_file() for file in TEXTS.values()):
        print("../shared/data/pretrain is not there: nothing to measure forgetting on")
        return
    results = common.Results("forgetting", options)
    for rates in RATES:
        for seed in SEEDS[:1] if options.quick else SEEDS:
            for method, lr in rates.items():
                name = f"{method}/{lr:g}/{seed}"
                if not results.done(name):
                    results.put(name, **measure(method, lr, seed, options.quick))
                print(f"{name}: {json.dumps(results.cells[name])[:400]}", flush=True)
    print(show(results.cells))


if __name__ == "__main__":
    main()
