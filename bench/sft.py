"""Instruction tuning from rows to an adapter: Graft's trainer beside TRL's SFTTrainer with peft, on Dolly.

    python bench/sft.py [--quick] [--vocabulary 32000] [--size 60M] [--rows 48]

LoRA, rank 16, on all linears; 24 rows in each optimizer step (8 rows, 3 batches accumulated); the same rows, tokens and
rate. A round trains every row once and is timed from the first step's begin to the last one's end. The variants:

  graft        what `graft train` does by default where there is bf16: the base in bf16, the rows of a batch end to end
               without padding, batches of like length, the loss at the labelled rows
  trl-default  `SFTConfig()` as it is: gradient checkpointing, bf16 autocast over the fp32 base, padded batches
  trl-best     no checkpointing, the base in bf16, and packing across rows (`packing=True`, `max_length=1024`): one
               packed row a batch, as many batches accumulated as make the number of optimizer steps that of the others

The base is random and its vocabulary larger than that of the tokenizer, which is the one inside Graft. The loss is that
of rows held out, from plain logits, after the last round; it must agree within 2 %. Rows: ../shared/data; without them
the script says so and ends.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import DATA, VOCABULARIES, alternate, llama, median, ratio
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

import graft
from graft import base as bases
from graft.data.collate import Collator, check_packing
from graft.data.encode import Example
from graft.data.order import bins
from graft.data.rows import load_rows
from graft.data.template import Template
from graft.train.schedule import Schedule
from graft.train.trainer import GraftTrainer

ROWS, HELD = 48, 32
BATCH, ACCUMULATE = 8, 3
"""Rows in a batch, and batches in an optimizer step."""
PACK = 1024
LR = 1e-3
LONGEST = 512
NEAR = 2e-2
"""Relative distance of the held-out losses: starts of A and orders of rows differ."""


class Watch(TrainerCallback):
    """Seconds from the first step's begin to the last one's end."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()


def examples(count: int, held: int) -> tuple[list[Example], list[Example], Any]:
    """Dolly's rows as tokens of the embedded tokenizer, all of which every vocabulary here has."""
    tokenizer = bases.load_tokenizer("embedded")
    file = DATA / "instructions" / "dolly_open_qa.jsonl"
    rows = load_rows(str(file), columns={"prompt": "instruction", "completion": "output"}, limit=4 * (count + held))
    made = Template(kind="plain").examples(rows, tokenizer)
    made = [example for example in made if len(example) <= LONGEST]
    random.Random(0).shuffle(made)
    return made[:count], made[count : count + held], tokenizer


# ------------------------------------------------------------------------------------------------- the variants


def by_graft(start: Any, rows: list[Example], tokenizer: Any, folder: Path) -> tuple[Any, Callable[[], Watch]]:
    """What `graft train` makes of a causal base: examples end to end, loss on labelled rows."""
    model = start(torch.bfloat16)
    torch.manual_seed(1)
    graft.attach(model, graft.LoRA(rank=16, alpha=32, targets="all-linear"), "default")
    check_packing(model)

    def run() -> Watch:
        schedule = Schedule([len(row) for row in rows], batch_size=BATCH, accumulate=ACCUMULATE)
        watch = Watch()
        arguments = TrainingArguments(
            str(folder),
            max_steps=schedule.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            **shared(),
        )
        trainer = GraftTrainer(
            model,
            arguments,
            data_collator=Collator(tokenizer, packed=True),
            train_dataset=rows,
            schedule=schedule,
            callbacks=[watch],
        )
        return go(trainer, watch)

    return model, run


def by_trl(
    start: Any, rows: list[Example], tokenizer: Any, folder: Path, best: bool
) -> tuple[Any, Callable[[], Watch]]:
    """SFTTrainer with peft, on the very tokens."""
    model = start(torch.bfloat16 if best else torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    steps = math.ceil(len(rows) / (BATCH * ACCUMULATE))
    if best:
        packs = len(bins([len(row) for row in rows], PACK))
        more: dict[str, Any] = {
            "packing": True,
            "max_length": PACK,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": math.ceil(packs / steps),
        }
    else:
        assert SFTConfig.per_device_train_batch_size == BATCH
        more = {"gradient_accumulation_steps": ACCUMULATE}

    def run() -> Watch:
        watch = Watch()
        arguments = SFTConfig(str(folder), num_train_epochs=1, **more, **shared())
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
        return go(trainer, watch)

    return model, run


def go(trainer: Any, watch: Watch) -> Watch:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch


def shared() -> dict[str, Any]:
    return {
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 0,
    }


@torch.no_grad()
def held_out(model: Any, rows: list[Example]) -> float:
    """The mean loss over the labels of rows that no variant trains on, row by row, from plain logits."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float().cpu()
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    model.train()
    return total / count


# ------------------------------------------------------------------------------------------------- the measurement


def measure(size: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    count, held = (12, 4) if options.quick else (options.rows, HELD)
    rows, apart, tokenizer = examples(count, held)
    lengths = [len(row) for row in rows]

    def start(dtype: torch.dtype) -> Any:
        return llama(size, vocabulary, dtype)

    with tempfile.TemporaryDirectory() as scratch:
        made = {
            "graft": by_graft(start, rows, tokenizer, Path(scratch) / "graft"),
            "trl-default": by_trl(start, rows, tokenizer, Path(scratch) / "default", best=False),
            "trl-best": by_trl(start, rows, tokenizer, Path(scratch) / "best", best=True),
        }
        before = {name: held_out(model, apart) for name, (model, _) in made.items()}
        watches: dict[str, list[Watch]] = {name: [] for name in made}

        def once(name: str) -> Callable[[], None]:
            def run() -> None:
                _, train = made[name]
                watches[name].append(train())

            return run

        alternate({name: once(name) for name in made}, options.repeats, warmup=1)
        losses = {name: held_out(model, apart) for name, (model, _) in made.items()}
    for loss in losses.values():
        common.assert_same_losses([loss], [losses["trl-default"]], NEAR)
    seconds = {name: [each.last - each.first for each in found[1:]] for name, found in watches.items()}
    trained = sum(row.trained for row in rows)
    padded = sum(max(lengths[i : i + BATCH]) * len(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH))
    return {
        "size": size,
        "vocabulary": vocabulary,
        "rows": len(rows),
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "padding": round(1 - sum(lengths) / padded, 3),
        "loss_before": round(statistics.mean(before.values()), 4),
        "variants": {
            name: {
                "seconds": round(median(times), 3),
                "samples_per_second": round(len(rows) / median(times), 3),
                "trained_tokens_per_second": round(trained / median(times), 1),
                "loss": round(losses[name], 4),
                "speedup": round(ratio(times, seconds["graft"]), 2),
            }
            for name, times in seconds.items()
        },
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--size", default="60M", choices=["30M", "60M"])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows that are trained on ({ROWS})")
    options = parser.parse_args()
    common.begin(options)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    if not (DATA / "instructions").is_dir():
        print(f"skipped: {DATA} is not there")
        return
    results = common.Results("sft", options)
    sizes, vocabularies = (["tiny"], [4096]) if options.quick else ([options.size], options.vocabulary)
    for size in sizes:
        for vocabulary in vocabularies:
            name = f"{size}/{vocabulary}"
            if not results.done(name):
                results.put(name, **measure(size, vocabulary, options))
            print(f"{name}: {json.dumps(results.cells[name]['variants'])}", flush=True)
    print(show(results.cells))


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells."""
    titles = [
        "base",
        "vocabulary",
        "variant",
        "s an epoch",
        "samples / s",
        "trained tokens / s",
        "held-out loss",
        "Graft is",
    ]
    lines = []
    for row in cells.values():
        for name, one in row["variants"].items():
            rates = [one["seconds"], one["samples_per_second"], one["trained_tokens_per_second"]]
            times = "" if name == "graft" else f"{one['speedup']:.2f} times as fast"
            lines.append([row["size"], row["vocabulary"], name, *rates, f"{one['loss']:.3f}", times])
    return common.table(titles, lines)


if __name__ == "__main__":
    main()
