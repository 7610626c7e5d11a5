"""Tiny models that speak the embedded base's tokenizer, with adapters that really change them, and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import graft
from graft.data.rows import Row, load_rows
from tiny import tiny

BASE = Path(graft.__file__).parent / "assets" / "base"
IDS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def speaking(name: str, **overrides: Any) -> Any:
    """`tiny(name)` with the tokenizer's vocabulary and special tokens."""
    start = {"decoder_start_token_id": 1} if name in ("t5", "mt5", "bart") else {}
    spread = {"bart": {"init_std": 0.3}, "llama": {"initializer_range": 0.2}}.get(name, {})  # so that inputs matter
    return tiny(name, **{**IDS, **start, **spread, **overrides})


def adapted(model: Any, noise: float = 0.5, **methods: Any) -> Any:
    """The model with an adapter of each name, its parameters random and large enough to show."""
    for seed, (name, method) in enumerate(methods.items()):
        adapter = graft.attach(model, method, name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * noise
    return model


def rows_of(folder: Path, records: Sequence[dict[str, Any]], **settings: Any) -> list[Row]:
    """Rows by way of a file, as users have them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_rows(str(path), **settings)


WORDS = ["red", "a small blue house", "why not go there now and see it all", "bird", "the cat sat on a mat"]
