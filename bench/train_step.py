"""One training step, forward, backward and AdamW: Graft beside peft, and beside full fine-tuning without either.

    python bench/train_step.py [--quick] [--cells lora-all/60M ...] [--rows 3x128]

Graft's side is `GraftTrainer.training_step`, peft's is that of a plain `transformers.Trainer` (`model(**batch).loss`);
both with the clipping and the fused AdamW that these trainers have by default. The rows are the same, the start is the
same (Graft's adapter, saved and loaded by peft), and the losses are asserted to be: in fp32 over 50 steps. Each cell
is written when it is measured, and skipped when this code was measured before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import DTYPES, SIZES, TOLERANCE, VOCABULARIES, alternate, assert_same_losses, llama, median, ratio, rows
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import graft
from graft.train.trainer import GraftTrainer

METHODS: dict[str, Callable[[], Any]] = {
    "full": graft.FullFineTuning,
    "lora-qv": lambda: graft.LoRA(rank=16, alpha=32, targets=("attention.query", "attention.value")),
    "lora-all": lambda: graft.LoRA(rank=16, alpha=32, targets="all-linear"),
    "ia3": graft.IA3,
    "prefix": lambda: graft.PrefixTuning(length=20),
    "prompt": lambda: graft.PromptTuning(length=20),
}
STEPS = 50
"""Of the two loss curves that must be the same."""
BF16_TOLERANCE = 2e-2
"""Relative, for the first loss in bf16: both sides round, and not at the same places."""


class Side:
    """A model with its trainer and optimizer.

    Args:
        trainer: Graft's, or a plain one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        self.model: Any = trainer.model
        self.optimizer = trainer.create_optimizer()
        self.model.train()

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward, clipping and AdamW, as the trainer's own loop has them; the loss."""
        trainer = self.trainer
        (given,), items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        loss = trainer.training_step(self.model, given, items)
        trainer.losses = []
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return float(loss)


def sides(cell: dict[str, Any], folder: Path) -> dict[str, Side]:
    """Graft, peft (but for full fine-tuning, which peft has not) and full fine-tuning, from one start."""
    arguments = TrainingArguments(
        str(folder / "trainer"), learning_rate=1e-4, report_to="none", disable_tqdm=True, use_cpu=use_cpu()
    )

    def base() -> Any:
        return llama(cell["size"], cell["vocabulary"], DTYPES[cell["dtype"]])

    model = base()
    torch.manual_seed(1)
    graft.attach(model, METHODS[cell["method"]](), "default", peft_compat=cell["method"] != "full")
    shake(model)
    found = {"graft": GraftTrainer(model, arguments)}
    if cell["method"] != "full":
        graft.save(model, "default", folder / "adapter")
        found["peft"] = Trainer(by_peft(base(), folder / "adapter"), arguments)
    found["full"] = Trainer(base(), arguments)
    return {name: Side(trainer) for name, trainer in found.items()}


def by_peft(base: Any, folder: Path) -> Any:
    """The base as peft trains it, with the adapter of a folder; peft's own loading refuses to train soft prompts."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def shake(model: Any) -> None:
    """Move LoRA's B off zero, so that every gradient is at work from the first step."""
    for name, parameter in model.adapters["default"].named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=1e-3, generator=torch.Generator().manual_seed(len(name)))


def use_cpu() -> bool:
    return not torch.cuda.is_available()


def measure(cell: dict[str, Any], shape: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Losses first, on short rows, then the time of a step of each side in turn."""
    batch = rows(*shape, cell["vocabulary"])
    with tempfile.TemporaryDirectory() as folder:
        made = sides(cell, Path(folder))
        other = "peft" if "peft" in made else "full"
        steps, bound = (STEPS, TOLERANCE) if cell["dtype"] == "fp32" else (1, BF16_TOLERANCE)
        short = [rows(1, 16, cell["vocabulary"], seed) for seed in range(3 if options.quick else steps)]
        curves = {name: [made[name].step(one) for one in short] for name in ("graft", other)}
        if len(curves["graft"]) > steps:
            curves = {name: losses[:steps] for name, losses in curves.items()}
        apart = assert_same_losses(curves["graft"], curves[other], bound)
        seconds = alternate({name: lambda s=side: s.step(batch) for name, side in made.items()}, options.repeats)  # type: ignore[misc]
    row: dict[str, Any] = {**cell, "rows": "x".join(map(str, shape)), "losses": len(curves["graft"]), "apart": apart}
    row |= {name: round(median(times), 4) for name, times in seconds.items()}
    if "peft" in seconds:
        row["of_peft"] = round(ratio(seconds["graft"], seconds["peft"]), 3)
        row["peft_of_full"] = round(ratio(seconds["peft"], seconds["full"]), 3)
    row["of_full"] = round(ratio(seconds["graft"], seconds["full"]), 3)
    return row


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cells", nargs="*", default=[], metavar="PART", help="cells with all these parts: 60M/bf16")
    parser.add_argument("--rows", default="3x128", help="rows and their tokens, all labelled, none padding (3x128)")
    options = parser.parse_args()
    common.begin(options)
    warnings.simplefilter("ignore")
    count, length = (int(number) for number in ("2x16" if options.quick else options.rows).split("x"))
    axes = (METHODS, ("tiny",), (500,), DTYPES) if options.quick else (METHODS, SIZES, VOCABULARIES, DTYPES)
    results = common.Results("train_step", options)
    for values in itertools.product(*axes):
        name = "/".join(map(str, values))
        if options.cells and not any(set(part.split("/")) <= set(name.split("/")) for part in options.cells):
            continue
        if not results.done(name):
            cell = dict(zip(("method", "size", "vocabulary", "dtype"), values, strict=True))
            results.put(name, **measure(cell, (count, length), options))
        row = results.cells[name]
        print(f"{name}: {json.dumps({key: row.get(key) for key in COLUMNS[4:]})}", flush=True)
    print(show(results.cells))


COLUMNS = ("method", "size", "vocabulary", "dtype", "graft", "peft", "full", "of_peft", "of_full", "peft_of_full")


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells: seconds of a step, and ratios."""
    titles = ["method", "base", "vocabulary", "dtype", "Graft s", "peft s", "full s"]
    titles += ["Graft / peft", "Graft / full", "peft / full"]
    return common.table(titles, [[row.get(key) for key in COLUMNS] for row in sorted(cells.values(), key=place)])


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    return row["size"], row["vocabulary"], list(METHODS).index(row["method"]), row["dtype"]


if __name__ == "__main__":
    main()
