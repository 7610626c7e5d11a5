"""The frozen trunk's cache: a step of LoRA in the top half, from the second epoch on, beside the same step without it.

    python bench/trunk.py [--quick]

The base is about 60M parameters; the adapter is on all linears of the upper half of the blocks. "kept": the states of
the rows are there already, as they are from the second epoch on. "full" is plain full fine-tuning by transformers.
Losses of 50 steps with and without the cache are asserted to be the same.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import common
from common import DTYPES, alternate, assert_same_losses, llama, median, ratio, rows
from train_step import BF16_TOLERANCE, STEPS, Side, shake, use_cpu
from transformers import Trainer, TrainingArguments

import graft
from graft.fast.trunk import Trunk
from graft.train.trainer import GraftTrainer

SHAPE = (4, 128)


def sides(size: str, vocabulary: int, dtype: str, arguments: TrainingArguments) -> dict[str, Side]:
    """Full fine-tuning, LoRA in all blocks, and LoRA in the upper half without and with the cache."""
    made: dict[str, Side] = {}
    for name in ("full", "all", "half", "kept"):
        model: Any = llama(size, vocabulary, DTYPES[dtype])
        if name == "full":
            made[name] = Side(Trainer(model, arguments))
            continue
        blocks = model.config.num_hidden_layers
        layers = None if name == "all" else blocks // 2
        graft.attach(model, graft.LoRA(rank=16, alpha=32, targets="all-linear", layers=layers), "default")
        shake(model)
        trainer = GraftTrainer(model, arguments)
        trainer.trunk = Trunk(model) if name == "kept" else None
        made[name] = Side(trainer)
    return made


def measure(size: str, vocabulary: int, dtype: str, options: Any) -> dict[str, Any]:
    """The losses first, then the time of a step of each side in turn."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, learning_rate=1e-4, report_to="none", disable_tqdm=True, use_cpu=use_cpu()
        )
        made = sides(size, vocabulary, dtype, arguments)
        short = [rows(2, 16, vocabulary, seed % 10) for seed in range(3 if options.quick else STEPS)]
        curves = {name: [made[name].step(one) for one in short] for name in ("kept", "half")}
        bound = common.TOLERANCE if dtype == "fp32" else BF16_TOLERANCE
        apart = assert_same_losses(curves["kept"], curves["half"], bound)
        batch = rows(*((2, 16) if options.quick else SHAPE), vocabulary)
        seconds = alternate({name: lambda s=side: s.step(batch) for name, side in made.items()}, options.repeats)  # type: ignore[misc]
        trunk = made["kept"].trainer.trunk
    row: dict[str, Any] = {"size": size, "vocabulary": vocabulary, "dtype": dtype, "apart": apart}
    row |= {name: round(median(times), 4) for name, times in seconds.items()}
    row |= {f"{name}_of_full": round(ratio(seconds[name], seconds["full"]), 3) for name in ("all", "half", "kept")}
    return row | {"blocks": f"{trunk.depth} of {trunk.blocks}", "mb": round(trunk.store.in_memory / 1e6, 2)}


COLUMNS = ("size", "vocabulary", "dtype", "full", "all", "half", "kept", "all_of_full", "half_of_full", "kept_of_full")


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells: seconds of a step, and ratios."""
    titles = ["base", "vocabulary", "dtype", "full s", "all s", "half s", "kept s"]
    titles += ["all / full", "half / full", "kept / full"]
    return common.table(titles, [[row.get(key) for key in COLUMNS] for row in cells.values()])


def main() -> None:
    parser = common.parser(__doc__)
    options = parser.parse_args()
    common.begin(options)
    results = common.Results("trunk", options)
    for vocabulary in (500,) if options.quick else common.VOCABULARIES:
        for dtype in DTYPES:
            size = "tiny" if options.quick else "60M"
            name = f"{size}/{vocabulary}/{dtype}"
            if not results.done(name):
                results.put(name, **measure(size, vocabulary, dtype, options))
            print(f"{name}: {json.dumps({key: results.cells[name].get(key) for key in COLUMNS[3:]})}", flush=True)
    print(show(results.cells))


if __name__ == "__main__":
    main()
