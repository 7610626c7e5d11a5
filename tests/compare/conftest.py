"""A tiny base with the embedded tokenizer, rows, and comparisons of them that run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_here import ANIMALS, Here

from graft.base import load_tokenizer
from graft.compare import run as running
from graft.compare.settings import Compare, make_compare
from tiny import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Llama with a tokenizer of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny("llama", vocab_size=4096, pad_token_id=1, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    load_tokenizer("embedded").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of prompts for training, for the evaluation and for the test."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [{"prompt": f"The {a} sees a {b}", "completion": f"{b} {a}"} for a in ANIMALS for b in ANIMALS]
    parts = {"train": pairs[:40], "eval": pairs[40:52], "test": pairs[52:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in parts}


@pytest.fixture
def settings(base: str, rows: dict[str, str], tmp_path: Path) -> Callable[..., Compare]:
    """settings(methods=["lora"]): a small comparison in a fresh folder; keywords replace whole parts."""

    def build(**parts: Any) -> Compare:
        return make_compare(
            {
                "base": base,
                "precision": "fp32",
                "methods": ["lora"],
                "data": {"train": rows["train"], "eval": rows["eval"], "template": "plain"},
                "test": rows["test"],
                "train": {"max_steps": 4, "batch_size": 4, "log_every": 2, "save_every": 2},
                "seeds": 2,
                "metrics": ["loss"],
                "search": {"lrs": [1e-3, 1e-2, 1e-1], "least_steps": 2},
                "baselines": {"full": False, "icl": False},
                "latency": False,
                "output": str(tmp_path / "out"),
            }
            | parts
        )

    return build


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Comparisons of this test run in this process; what ran is in `done`."""
    found = Here()

    @contextmanager
    def opened(*_: Any) -> Iterator[Here]:
        yield found

    monkeypatch.setattr(running, "opened", opened)
    return found
