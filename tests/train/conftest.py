"""Tiny bases in folders, with the embedded tokenizer, and data files for training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base import load_tokenizer
from graft.train.config import Run, make_run
from tiny import tiny

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

ASSETS = Path(__file__).parents[2] / "src" / "graft" / "assets" / "base"
IDS = {"vocab_size": 4096, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "bert": {},
    "t5": {"decoder_start_token_id": 1},
}
ANIMALS = ["cat", "dog", "bird", "fish", "horse", "mouse", "frog", "bear", "duck", "goat", "wolf", "hen"]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one saved tiny model for each kind, with a tokenizer of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = load_tokenizer("embedded")
    for kind, more in KINDS.items():
        tiny(kind, **{**IDS, **more}).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    for name in ("chat_template.jinja",):
        shutil.copy(ASSETS / name, folder / "llama" / name)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of rows: prompts, held-out prompts, and labelled texts."""
    folder = tmp_path_factory.mktemp("sources")
    pairs = [(a, b) for a in ANIMALS for b in ANIMALS[:4]]
    prompts = [{"prompt": f"The {a} sees a {b}" + " and runs" * (i % 4), "completion": f"{b} {a}"} for i, (a, b) in
               enumerate(pairs)]  # fmt: skip
    labels = [{"text": f"the {a} likes the {b}", "label": ["good", "bad"][i % 2]} for i, (a, b) in enumerate(pairs)]
    files = {"prompts": prompts[:40], "held": prompts[40:], "labels": labels}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


@pytest.fixture
def settings(bases: Path, sources: dict[str, str], tmp_path: Path) -> Callable[..., Run]:
    """settings("train.lr=1e-2", base="gpt2"): a small run in a fresh folder; keywords replace whole parts."""

    def build(base: str = "llama", data: dict[str, Any] | None = None, **parts: Any) -> Run:
        train = {"lr": 1e-2, "batch_size": 4, "max_steps": 6, "log_every": 2, "save_every": 2}
        rows = {"train": sources["prompts"], "eval": sources["held"], **(data or {})}
        if rows["eval"] is not None:
            train["eval_every"] = 3
        run = {
            "base": str(bases / base),
            "precision": "fp32",
            "method": {"method": "lora", "dropout": 0.1},
            "data": rows,
            "output": str(tmp_path / "run"),
            **parts,
            "train": {**train, **parts.get("train", {})},
        }
        return make_run(run)

    return build
