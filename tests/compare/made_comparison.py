"""Made-up comparisons, as `graft compare` writes them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = (
    ("full", 3_300_000, 55.0, 13.2e6),
    ("lora", 65_536, 55.3, 0.27e6),
    ("dora", 69_000, 55.1, 0.29e6),
    ("bottleneck", 210_000, 54.6, 0.85e6),
    ("prefix", 20_480, 47.0, 0.09e6),
    ("ia3", 3_072, 50.2, 0.02e6),
    ("bitfit", 9_000, 51.0, 0.04e6),
    ("prompt", 2_560, 31.0, 0.012e6),
    ("lora_fa", 32_768, 53.9, 0.14e6),
)


def run(seed: int, score: float, trainable: int, size: float, **other: Any) -> dict[str, Any]:
    """One finished run of a base of 3.3 million parameters."""
    steps = range(0, 201, 20)
    noise = random.Random(f"{seed}{trainable}")
    start, end = 3.2, 4.0 - score / 22
    curve = [
        {
            "step": step,
            "loss": end + (start - end) * math.exp(-step / 45) + noise.gauss(0, 0.03),
            "eval_loss": end + 0.05 + (start - end) * math.exp(-step / 50) if step % 40 == 0 else None,
        }
        for step in steps
    ]
    values: dict[str, Any] = {
        "seed": seed,
        "status": "ok",
        "why": None,
        "quality": {"bleu": score, "loss": end},
        "batch_size": 8,
        "counts": {"total": 3_300_000 + trainable % 3_300_000, "trainable": trainable, "saved": trainable},
        "peak_bytes": int(90e6 + 12 * trainable),
        "training_its": 9.5 - trainable / 1e6,
        "evaluation_its": 21.0,
        "adapter_bytes": int(size),
        "latency": {"base": 0.0040, "unmerged": 0.0046, "merged": 0.0040 if trainable != 2_560 else None},
        "forgetting": {"loss": 3.1 + trainable / 1e7, "base_loss": 3.05, "kl": trainable / 2e7},
        "curve": curve,
        "seconds": 21.0 + trainable / 2e5,
        "folder": f"runs/{trainable}-{seed}",
    }
    return values | other


def entry(label: str, runs: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    tried = [
        {"lr": lr, "rung": rung, "steps": 40 * (rung + 1), "score": score, "status": "ok", "why": None, "seconds": 3.2}
        for rung, lr, score in ((0, 1e-4, -2.41), (0, 1e-3, -1.93), (0, 1e-2, -2.9), (1, 1e-3, -1.7))
    ]
    return {
        "label": label,
        "kind": "method",
        "method": label,
        "settings": {"rank": 8, "targets": ["attention.query", "attention.value"]},
        "status": "ok",
        "why": None,
        "lr": 1e-3,
        "tried": tried,
        "runs": runs,
    } | other


def comparison(seeds: int = 3, methods: tuple[tuple[str, int, float, float], ...] = METHODS) -> dict[str, Any]:
    """Methods, the base and few shots, one method that was skipped and one that failed."""
    noise = random.Random(0)
    entries = [
        entry(name, [run(seed, quality + noise.gauss(0, 0.45), *(count, size)) for seed in range(seeds)])
        for name, count, quality, size in methods
    ]
    bare = {
        "counts": None,
        "training_its": None,
        "adapter_bytes": None,
        "latency": None,
        "forgetting": None,
        "curve": [],
    }
    icl = [run(seed, 24 + noise.gauss(0, 3), 0, 0, **bare) for seed in range(seeds)]
    base = [run(0, 12.5, 0, 0, **bare)]
    no_search: dict[str, Any] = {"method": None, "settings": {}, "lr": None, "tried": []}
    failed = [run(0, 0, 5, 5, status="failed", why="the loss is not finite at step 31", quality={}, curve=[])]
    return {
        "version": 1,
        "title": "E2E on the embedded base",
        "base": "embedded",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "test": None, "rows": {"train": 2000, "eval": 200}},
        "metric": "bleu",
        "higher_is_better": True,
        "seeds": list(range(seeds)),
        "budget": {"steps": 200, "batch_size": 8, "tokens": 131_072},
        "search": {"kind": "halving", "metric": "loss", "rungs": [40, 80]},
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2.13", "transformers": "5.23"},
        "entries": [
            *entries,
            entry("16 shots", icl, kind="icl", **no_search),
            entry("base", base, kind="base", **no_search),
            entry("vera", [], status="skipped", why="vera needs sites of one shape; this base has two"),
            entry("adalora", failed, status="failed", why=None),
        ],
    }


def many(count: int) -> tuple[tuple[str, int, float, float], ...]:
    """Methods of all sizes, whose names are as long as names get."""
    return tuple(
        (
            f"lora rank {2 ** (i % 8)}, all linear, start {i}",
            int(2000 * 1.3**i),
            40 + 15 * math.sin(i * 2.1),
            1e4 * 1.3**i,
        )
        for i in range(count)
    )


def write(folder: Path, found: dict[str, Any]) -> Path:
    """The folder with the comparison in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found), encoding="utf-8")
    return folder
