"""The embedded base's tokenizer, and rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from speaking import BASE, WORDS, rows_of
from transformers import PreTrainedTokenizerBase

from graft.data.rows import Row


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def prompts(tmp_path: Path) -> list[Row]:
    """Five rows of different lengths, in no order of length."""
    return rows_of(tmp_path, [{"prompt": word, "completion": f"{word} again"} for word in WORDS])


@pytest.fixture
def labelled(tmp_path: Path) -> list[Row]:
    """Five rows with labels."""
    labels = ["positive", "negative", "positive", "negative", "negative"]
    return rows_of(tmp_path, [{"text": text, "label": label} for text, label in zip(WORDS, labels, strict=True)])
