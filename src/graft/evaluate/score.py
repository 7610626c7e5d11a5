"""Likelihoods: how probable right answers and labels are, for each entry, entries beside each other in one batch.

Shapes: N rows times entries, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from graft.adapt import prepare
from graft.data.collate import check_ends, pad, truncate
from graft.data.encode import Example, begin_ids, without_slots
from graft.data.rows import Row, label_names
from graft.data.template import Template
from graft.errors import DataError
from graft.evaluate.batches import (
    Progress,
    bank_or_none,
    by_length,
    check_length,
    context_of,
    on_device,
    passes,
    quiet,
    routed,
)
from graft.ids import IGNORED, SLOT
from graft.routes import entry_of


@dataclass(frozen=True)
class Loss:
    """The summed loss of an example's trained tokens, in nats, and how many they are."""

    total: float
    tokens: int


def losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Sequence[Example]],
    entries: Sequence[Any],
    *,
    mode: str = "causal",
    batch_size: int = 16,
    cut: bool = False,
    progress: Progress | None = None,
) -> list[list[Loss]]:
    """The loss of each row's answer by each entry, in nats: `result[e][r]`.

    Args:
        examples: for each row one example per entry (they differ where entries have templates of their own).
        mode: "causal", or "seq2seq", whose labels are the decoder's.
        cut: cut rows that are longer than the context; without it they are an error.

    Raises:
        DataError: a row longer than the context.
    """
    found = [[Loss(0.0, 0)] * len(examples) for _ in entries]
    for numbers, i, logits_TV, labels_T in _forward(
        model, tokenizer, examples, entries, mode, batch_size, cut, progress
    ):
        if mode == "causal":
            logits_TV, labels_T = logits_TV[:-1], labels_T[1:]
        kept = labels_T != IGNORED
        total = F.cross_entropy(logits_TV[kept].float(), labels_T[kept], reduction="sum")
        found[i][numbers] = Loss(float(total), int(kept.sum()))
    return found


def class_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Sequence[Example]],
    entries: Sequence[Any],
    *,
    batch_size: int = 16,
    cut: bool = False,
    progress: Progress | None = None,
) -> list[Tensor]:
    """The log-probabilities (rows, C) of a classification head, for each entry.

    Raises:
        DataError: a row longer than the context, or one that an encoder-decoder cannot classify (see `check_ends`).
    """
    check_ends([example for row in examples for example in row], tokenizer, model.config)
    found: list[list[Tensor]] = [[torch.empty(0)] * len(examples) for _ in entries]
    rows = _forward(model, tokenizer, examples, entries, "classification", batch_size, cut, progress)
    for number, i, logits_C, _ in rows:
        found[i][number] = logits_C.float().log_softmax(-1).cpu()
    return [torch.stack(scores) for scores in found]


def choose_words(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    templates: Sequence[Template],
    entries: Sequence[Any],
    *,
    batch_size: int = 16,
    cut: bool = False,
    progress: Progress | None = None,
) -> list[list[str]]:
    """For each entry and row the word of the label that is likeliest as the whole answer, its end token included.

    Args:
        cut: where the context has no room for a prompt and the longest word, a decoder's prompt loses its beginning
            (but for the begin token), the same for all words, and an encoder-decoder's its end; else it is an error.

    Raises:
        DataError: a row longer than the context, or pseudo-tokens where its prompt would be cut.
    """
    templates = [dataclasses.replace(template, train_on="completion") for template in templates]
    mode = templates[0].mode
    chosen: list[list[str]] = [[""] * len(rows) for _ in entries]
    choices = {i: words_of(template, rows) for i, template in enumerate(templates)}
    most = max(len(words) for words in choices.values())
    best = [[float("inf")] * len(rows) for _ in entries]
    # An entry with fewer words scores its last one again, which changes nothing.
    words = [[list(each.items())[min(k, len(each) - 1)] for each in choices.values()] for k in range(most)]
    limit = context_of(model, tokenizer) if cut and mode == "causal" else None
    room = None
    if limit is not None:
        asked = ([label for _, label in word_of] for word_of in words)
        room = _room(limit, [_examples_of(rows, templates, labels, tokenizer) for labels in asked])
    settings: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "cut": cut and mode != "causal"}
    for word_of in words:
        examples = _examples_of(rows, templates, [label for _, label in word_of], tokenizer)
        if room is not None:
            begin = begin_ids(tokenizer)
            examples = [_shortened(row, entries, left, begin) for row, left in zip(examples, room, strict=True)]
        scored = losses(model, tokenizer, examples, entries, progress=progress, **settings)
        for i, per_row in enumerate(scored):
            for number, loss in enumerate(per_row):
                if loss.total < best[i][number]:
                    best[i][number], chosen[i][number] = loss.total, word_of[i][0]
    return chosen


def words_of(template: Template, rows: Sequence[Row]) -> dict[str, int | str]:
    """Each word that a label can have, and a label that has it."""
    if template.task is not None and template.task.verbalizer:
        words: dict[str, int | str] = {}
        for label, word in template.task.verbalizer.items():
            words.setdefault(word, label)
        return words
    return {name: name for name in label_names(rows)}


def encode(
    rows: Sequence[Row], templates: Sequence[Template], tokenizer: PreTrainedTokenizerBase
) -> list[list[Example]]:
    """For each row one example per template."""
    made: dict[int, list[Example]] = {}
    for template in templates:
        if id(template) not in made:
            made[id(template)] = template.examples(rows, tokenizer)
    return [[made[id(template)][number] for template in templates] for number in range(len(rows))]


def _examples_of(
    rows: Sequence[Row], templates: Sequence[Template], labels: Sequence[int | str], tokenizer: PreTrainedTokenizerBase
) -> list[list[Example]]:
    """For each row one example per template, with the answer that the template gives to its label."""
    columns = [
        template.examples([dataclasses.replace(row, label=label) for row in rows], tokenizer)
        for template, label in zip(templates, labels, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _room(limit: int, made: Sequence[Sequence[Sequence[Example]]]) -> list[int]:
    """Of each row how many tokens its prompt may have beside the longest word; `made`: by word, row and template."""
    longest = (max(len(each) - _start(each) for row in of_row for each in row) for of_row in zip(*made, strict=True))
    return [max(1, limit - answer) for answer in longest]


def _start(example: Example) -> int:
    """Where a decoder's answer begins."""
    return next(place for place, label in enumerate(example.labels) if label != IGNORED)


def _shortened(row: Sequence[Example], entries: Sequence[Any], most: int, begin: list[int]) -> list[Example]:
    """A row's examples, as their entries read them, with at most so many tokens before the answer: the last ones."""
    found = []
    for example in map(_read_by, row, entries):
        ids, labels = example.input_ids, example.labels
        first = len(begin) if ids[: len(begin)] == begin else 0
        gone = slice(first, first + max(0, _start(example) - most))
        if SLOT in ids[gone]:
            raise DataError(f"{example.row.where}: cut to the context it would lose pseudo-tokens; shorten the row")
        ids, labels = [*ids[: gone.start], *ids[gone.stop :]], [*labels[: gone.start], *labels[gone.stop :]]
        found.append(dataclasses.replace(example, input_ids=ids, labels=labels))
    return found


def _forward(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Sequence[Example]],
    entries: Sequence[Any],
    mode: str,
    batch_size: int,
    cut: bool,
    progress: Progress | None,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (row, entry, logits, labels) of every row and entry: (T, V) and (T,), or (C,) and () of a classifier."""
    limit = context_of(model, tokenizer)
    done = 0
    read = [[_read_by(e, entry) for e, entry in zip(row, entries, strict=True)] for row in examples]
    fitted = [[_fitted(example, limit, mode, cut) for example in row] for row in read]
    with quiet(model):
        for together in passes(model, entries):
            for numbers in by_length([max(map(len, row)) for row in fitted], batch_size):
                asked = [fitted[number][i] for number in numbers for i in together]
                given = [entries[i] for _ in numbers for i in together]
                logits, labels = _logits(model, pad(asked, tokenizer, mode=mode), given, mode)
                places = ((number, i) for number in numbers for i in together)
                for n, (number, i) in enumerate(places):
                    yield number, i, logits[n], labels[n]
                done += len(asked)
                if progress is not None:
                    progress("likelihoods", done, len(fitted) * len(entries))


def _logits(model: Any, batch: dict[str, Any], entries: Sequence[Any], mode: str) -> tuple[Tensor, Tensor]:
    batch.pop("adapter", None)
    with routed(model, entries):
        if bank_or_none(model) is not None:
            batch = prepare(model, batch, list(entries))
        batch = on_device(batch, model)
        labels = batch["labels"]
        if mode != "seq2seq":  # an encoder-decoder makes its decoder's input of them
            del batch["labels"]
        out = model(**batch) if mode == "classification" else model(**batch, use_cache=False)
        return out.logits, labels


def _read_by(example: Example, entry: Any) -> Example:
    """The example as an entry reads it: the base has no pseudo-tokens."""
    if entry_of(entry) or SLOT not in example.input_ids:
        return example
    ids, labels, types = example.input_ids, example.labels, example.token_type_ids
    if len(labels) == len(ids):
        labels = [label for label, token in zip(labels, ids, strict=True) if token != SLOT]
    ids = without_slots(ids)
    return dataclasses.replace(example, input_ids=ids, labels=labels, token_type_ids=types and types[: len(ids)])


def _fitted(example: Example, limit: int | None, mode: str, cut: bool) -> Example:
    if limit is not None and cut:
        return truncate(example, limit, mode)
    check_length(example.row.where, max(len(example), len(example.labels)), limit)
    return example
