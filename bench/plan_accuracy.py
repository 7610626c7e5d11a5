"""The planner's prediction beside what a training step allocates: 5 methods, 2 bases, 2 batches.

    python bench/plan_accuracy.py [--quick] [--device cuda]

Predicted is `graft.planning.memory.training`, from shapes alone. Measured is the second step of `GraftTrainer`,
forward, backward and AdamW: the most bytes that were allocated at once beyond its start, as torch.profiler saw
allocations and releases, and all tensors that were there before it, as the garbage collector lists them. On a GPU it
is `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
from common import DTYPES, llama, llama_config, rows
from train_step import Side, shake
from transformers import TrainingArguments

import graft
from graft import base
from graft.planning.memory import training
from graft.planning.probe import alive, peak
from graft.train import state as states
from graft.train.trainer import GraftTrainer

METHODS: dict[str, Callable[[], Any]] = {
    "full": graft.FullFineTuning,
    "lora-all": lambda: graft.LoRA(rank=16, alpha=32, targets="all-linear"),
    "bottleneck": lambda: graft.Bottleneck(size=64),
    "prefix": lambda: graft.PrefixTuning(length=20),
    "ia3": graft.IA3,
}
BASES = (("30M", 32_000, "fp32"), ("60M", 151_936, "bf16"))
BATCHES = ((2, 128), (4, 256))
NEAR, ENOUGH = 0.1, 18


def predicted(method: str, size: str, vocabulary: int, dtype: str, shape: tuple[int, int], device: str) -> int:
    """Bytes, from the config alone."""
    model = base.skeleton(llama_config(size, vocabulary)).to(DTYPES[dtype])
    graft.attach(model, METHODS[method]())
    batch = rows(*shape, vocabulary)
    return training(model, batch, optimizer="adamw", accumulate=1, on_cpu=device == "cpu")[0].total


def measured(method: str, size: str, vocabulary: int, dtype: str, shape: tuple[int, int], device: str) -> int:
    """Bytes of a real step."""
    cuda = device != "cpu"
    before = torch.cuda.memory_allocated() if cuda else alive()
    model = llama(size, vocabulary, DTYPES[dtype]).to(device)
    graft.attach(model, METHODS[method]())
    shake(model)
    batch = {key: value.to(device) for key, value in rows(*shape, vocabulary).items()}
    with tempfile.TemporaryDirectory() as folder:
        side = Side(
            GraftTrainer(model, TrainingArguments(folder, report_to="none", disable_tqdm=True, use_cpu=not cuda))
        )
        side.trainer.start = states.starting(model)  # which training keeps from its first step to its last
        side.step(batch)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            side.step(batch)
            return torch.cuda.max_memory_allocated() - before
        return alive() - before + peak(lambda: side.step(batch))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    options = parser.parse_args()
    common.begin(options)
    warnings.simplefilter("ignore")
    results = common.Results("plan_accuracy" if options.device == "cpu" else "plan_accuracy_gpu", options)
    bases, batches = ((("tiny", 500, "fp32"),), ((2, 16),)) if options.quick else (BASES, BATCHES)
    for method, (size, vocabulary, dtype), shape in itertools.product(METHODS, bases, batches):
        name = f"{method}/{size}/{vocabulary}/{dtype}/{shape[0]}x{shape[1]}"
        if not results.done(name):
            told = predicted(method, size, vocabulary, dtype, shape, options.device)
            real = measured(method, size, vocabulary, dtype, shape, options.device)
            cell = {"method": method, "base": size, "vocabulary": vocabulary, "dtype": dtype, "rows": shape[0]}
            cell |= {"tokens": shape[1], "predicted_mb": round(told / 1e6, 1), "measured_mb": round(real / 1e6, 1)}
            results.put(name, **cell, off=round(told / real - 1, 4))
        print(f"{name}: {json.dumps({key: results.cells[name][key] for key in COLUMNS[6:]})}", flush=True)
    near = sum(abs(row["off"]) <= NEAR for row in results.cells.values())
    print(show(results.cells))
    print(f"{near} of {len(results.cells)} within {NEAR:.0%}; asked for {ENOUGH} of 20")


COLUMNS = ("method", "base", "vocabulary", "dtype", "rows", "tokens", "predicted_mb", "measured_mb", "off")


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells."""
    titles = [*COLUMNS[:6], "predicted MB", "measured MB", "off"]
    return common.table(titles, [[row.get(key) for key in COLUMNS] for row in cells.values()])


if __name__ == "__main__":
    main()
