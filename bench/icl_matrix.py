"""Few-shot fine-tuning against in-context learning on NLI: MNLI in domain, SNLI and AdvGLUE-MNLI out of it.

    python bench/icl_matrix.py [--quick] [--threads 1]

The embedded base, 16 examples, 10 seeds, two patterns, LoRA and full fine-tuning; `graft.compare.matrix` has the
protocol. The base's context of 512 tokens takes 16 examples only if they are short, so only those of at most 24 tokens
are drawn, and questions of at most 90 are asked. Results: `bench/results/icl_matrix/`; the same call goes on where it
was stopped. Rows: ../shared/data; without them it says so and ends.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common
from rich.console import Console

from graft.compare.matrix import run_matrix
from graft.compare.matrix_settings import make_matrix

OUT = common.RESULTS / "icl_matrix"
TESTS = {"mnli": "mnli/dev_matched.jsonl", "snli": "ood/snli_dev.jsonl", "advglue_mnli": "ood/advglue_mnli.jsonl"}
PATTERNS = ["{premise} Question: {hypothesis} Yes, maybe or no?", "{premise} {hypothesis} ?"]
WORDS = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}


def main() -> None:
    made = common.parser(__doc__)
    made.set_defaults(threads=1)
    options = made.parse_args()
    common.begin(options)
    missing = [name for name in ("mnli/train.jsonl", *TESTS.values()) if not (common.DATA / name).is_file()]
    if missing:
        sys.exit(f"{common.DATA} has no {', '.join(missing)}, so there is nothing to measure")
    rows, seeds, epochs = (20, 2, 2) if options.quick else (200, 10, 40)
    common_train = {"epochs": epochs, "batch_size": 16, "warmup": 0.1, "save_every": 1000}
    settings = {
        "bases": ["embedded"],
        "precision": "fp32",
        "train": str(common.DATA / "mnli" / "train.jsonl"),
        "tests": {
            name: {"source": str(common.DATA / file), "limit": rows, "out_of_domain": name != "mnli"}
            for name, file in TESTS.items()
        },
        "template": {"kind": "plain", "templates": PATTERNS, "verbalizer": WORDS},
        "methods": {
            "lora": {"method": {"method": "lora", "targets": "all-linear"}, "train": {"lr": 1e-3, **common_train}},
            "full": {"method": "full", "train": {"lr": 1e-4, **common_train}},
        },
        "seeds": seeds,
        "max_shot_tokens": 24,
        "max_question_tokens": 90,
    }
    work = Path(tempfile.gettempdir()) / f"graft-icl-matrix{'-quick' if options.quick else ''}"
    if options.again:
        shutil.rmtree(work, ignore_errors=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    started = time.perf_counter()
    found = run_matrix(make_matrix(settings, "bench/icl_matrix.py"), work, Console())
    print(f"{time.perf_counter() - started:.0f} s in this call, {found['seconds']:.0f} s for all results")
    if not options.quick:
        keep(found, work)


def keep(found: dict[str, object], work: Path) -> None:
    """Copy the summary and the pictures, with the machine that made them; sources by their names alone."""
    OUT.mkdir(parents=True, exist_ok=True)
    for file in ("matrix.csv", "matrix.png", "matrix.svg", "matrix.html"):
        shutil.copyfile(work / file, OUT / file)
    told = {"machine": common.facts(), "commit": common.commit()}
    text = json.dumps({**found, **told}, indent=1, ensure_ascii=False).replace(f"{common.DATA}/", "")
    (OUT / "matrix.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
