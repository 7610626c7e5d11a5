"""General text to measure forgetting on: a file, cut into pieces of tokens, a fixed sample of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft.base import context_length
from graft.data.encode import begin_ids, token_ids
from graft.data.rows import load_rows
from graft.errors import DataError

PIECE = 512
"""Tokens of a piece at most; where the context is shorter, three quarters of it, which leaves room for soft prompts."""
LIMIT = 8192
"""Tokens of the sample, where nobody says more."""
SUFFIXES = (".txt", ".md")
CHARACTERS = 6
"""Of a block for each token of a piece: English has 3 to 5 a token, so most blocks give one whole piece."""


def pieces(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    *,
    limit: int = LIMIT,
    seed: int = 0,
    length: int | None = None,
) -> list[list[int]]:
    """A sample of a text as pieces of token ids, each with the tokenizer's begin token if it has one.

    Which pieces they are depends on the text, the tokenizer, the context and these arguments alone, so every method
    that is measured on a text sees the same tokens.

    Args:
        source: a file of plain text (.txt, .md), which is one document; or rows with a `text` column (.jsonl, .json,
            .csv, .tsv, .parquet, a folder or a hub name), each of them a document.
        config: the model's; it says how long the context is.
        limit: tokens in all, at most.
        seed: of the sample.
        length: tokens of a piece; None: 512, or three quarters of a shorter context.

    Raises:
        DataError: no such file, rows without `text`, or no piece of two tokens.
    """
    context = context_length(config, tokenizer)
    length = length or min(PIECE, context * 3 // 4 if context else PIECE)
    blocks = [block for text in documents(source) for block in _blocks(text, CHARACTERS * length)]
    random.Random(seed).shuffle(blocks)
    begin, found, left = begin_ids(tokenizer), [], limit
    for block in blocks:
        ids = token_ids([block], tokenizer)[0][: min(length - len(begin), left)]
        if len(ids) > 1:
            found.append([*begin, *ids])
            left -= len(ids)
        if left < 2:
            break
    if not found:
        raise DataError(f"{source}: no text of at least two tokens; give general text, such as some pages of prose")
    return found


def documents(source: str | Path) -> list[str]:
    """The texts of a source: a plain file whole, of rows the column `text` of each.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has rows without text.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES:
        try:
            return [path.read_text(encoding="utf-8")]
        except FileNotFoundError:
            raise DataError(f"{source}: no such file; give a file of general text") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source}: cannot be read as UTF-8 text ({error})") from None
    rows = load_rows(str(source))
    other = next((row for row in rows if row.form not in ("text", "label")), None)
    if other is not None:
        raise DataError(f"{other.where}: general text needs a column 'text'; this row is of the form {other.form}")
    return [row.text for row in rows]


def _blocks(text: str, size: int) -> Iterator[str]:
    """A text in blocks of about `size` characters, each from a line's or a word's beginning."""
    start = 0
    while start < len(text):
        end = start + size
        cut = max(text.rfind("\n", start, end), text.rfind(" ", start, end)) + 1 if end < len(text) else len(text)
        cut = cut if cut > start else end
        if text[start:cut].strip():
            yield text[start:cut].strip()
        start = cut
