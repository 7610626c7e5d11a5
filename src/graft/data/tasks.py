"""Text with labels to instructions: several prompts for each task, chosen row by row, and words for the labels.

A prompt is text with `{column}` placeholders; any column of the row may stand there, under its own name or ours.
`{slots:n}` stands for n pseudo-tokens, whose embeddings a soft prompt gives; every prompt has as many. Which prompt a
row gets is a hash of the seed and the row's number, so it is the same in every run and on every machine.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graft.data.read import near
from graft.data.rows import Row
from graft.errors import ConfigError, DataError

MARK = "\ufdd0"
"""Stands for a pseudo-token in rendered text; Unicode keeps this code for such a use and gives it to no character."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and the word for each label."""

    templates: tuple[str, ...]
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    """The label, as text, to the word that the model says; empty: labels are their own words."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("template templates: give at least one prompt, for example 'Review: {text}\\nSentiment:'")
        counts = [_slots(template) for template in self.templates]
        for template, count in zip(self.templates, counts, strict=True):
            if count != counts[0]:
                raise ConfigError(f"template {template!r}: {count} pseudo-tokens, the first template has {counts[0]}")

    @property
    def slots(self) -> int:
        """How many pseudo-tokens each prompt has."""
        return _slots(self.templates[0])

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that a label can have, in the verbalizer's order."""
        return tuple(dict.fromkeys(self.verbalizer.values()))

    def prompt(self, row: Row, seed: int = 0) -> str:
        """The prompt that this row gets, filled."""
        return fill(self.templates[self.chosen(row, seed)], row)

    def chosen(self, row: Row, seed: int = 0) -> int:
        """Which prompt this row gets, from 0."""
        digest = hashlib.blake2b(f"{seed}:{row.index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) % len(self.templates)

    def answer(self, row: Row) -> str:
        """The word for the row's label, or the row's own completion if it has no label."""
        if row.label is None:
            if not row.completion:
                raise DataError(f"{row.where}: neither a label nor a completion to answer the template with")
            return row.completion
        word = self.verbalizer.get(str(row.label))
        if word is not None:
            return word
        if self.verbalizer:
            known = ", ".join(self.verbalizer)
            raise DataError(
                f"{row.where}: label '{row.label}' has no word in template verbalizer"
                f"{near(row.label, self.verbalizer)}; it knows {known}"
            )
        if isinstance(row.label, int):
            raise DataError(
                f"{row.where}: label {row.label} is a number without a word; set template verbalizer, for example "
                "{0: negative, 1: positive}"
            )
        return row.label


def _pieces(template: str) -> list[tuple[str, str | int | None]]:
    """(text, placeholder after it) pairs of a prompt; a number stands for so many pseudo-tokens."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{column}}, and {{{{ or }}}} for a brace") from None
    pieces: list[tuple[str, str | int | None]] = []
    for text, name, spec, conversion in parsed:
        if name == "slots" and spec and spec.isdecimal() and int(spec) and not conversion:
            pieces.append((text, int(spec)))
        elif name == "" or spec or conversion:
            raise ConfigError(
                f"template {template!r}: a placeholder is only the name of a column, such as {{text}}, or {{slots:3}} "
                "for 3 pseudo-tokens"
            )
        else:
            pieces.append((text, name))
    return pieces


def _slots(template: str) -> int:
    return sum(piece for _, piece in _pieces(template) if isinstance(piece, int))


def columns_of(template: str) -> list[str]:
    """The columns that a prompt shows, each once."""
    return list(dict.fromkeys(name for _, name in _pieces(template) if isinstance(name, str)))


def fill(template: str, row: Row) -> str:
    """The prompt with the row's columns in place of their names, and a `MARK` for each pseudo-token."""
    parts = []
    for text, name in _pieces(template):
        parts.append(text)
        if name is None:
            continue
        if isinstance(name, int):
            parts.append(MARK * name)
            continue
        if name not in row.fields:
            there = ", ".join(map(str, row.fields)) or "none"
            raise DataError(
                f"{row.where}: template placeholder '{{{name}}}' is not a column"
                f"{near(name, row.fields)}; there are: {there}"
            )
        value = row.fields[name]
        if not isinstance(value, str | int | float):
            what = "empty (null)" if value is None else f"a {type(value).__name__}"
            raise DataError(f"{row.where}: template placeholder '{{{name}}}' is {what}; text or a number is needed")
        parts.append(str(value))
    return "".join(parts)


TASKS: dict[str, Task] = {
    "sentiment": Task(
        templates=(
            "Review: {text}\nSentiment:",
            "{text}\nIs this review positive or negative?",
            "Is the following text positive or negative?\n{text}",
            "What is the sentiment of this sentence, negative or positive?\nSentence: {text}",
            "Someone wrote: {text}\nTheir opinion is",
        ),
        verbalizer={"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"},
    ),
    "nli": Task(
        templates=(
            "{premise}\nDoes it follow that {hypothesis}\nyes, maybe or no?",
            "Premise: {premise}\nHypothesis: {hypothesis}\nIs the hypothesis true? Answer yes, maybe or no.",
            "Suppose that {premise}\nCan we infer that {hypothesis}\nyes, maybe or no?",
            "{premise}\nBased on this, is it true that {hypothesis}\nyes, maybe or no?",
        ),
        verbalizer={
            "0": "yes",
            "1": "maybe",
            "2": "no",
            "entailment": "yes",
            "neutral": "maybe",
            "contradiction": "no",
        },
    ),
    "topic": Task(
        templates=(
            "{text}\nTopic:",
            "What is this text about?\n{text}",
            "Text: {text}\nWhich topic does the text belong to?",
        ),
    ),
}


def task_for(rows: Sequence[Row]) -> Task:
    """The task that fits the labels: sentiment or NLI by their words, else topic if the labels are words."""
    labels = {str(row.label) for row in rows}
    numbers = any(isinstance(row.label, int) for row in rows)
    pairs = rows[0].pair is not None
    if not numbers and not pairs and labels <= {"negative", "positive"}:
        return TASKS["sentiment"]
    if not numbers and pairs and labels <= {"entailment", "neutral", "contradiction"}:
        return TASKS["nli"]
    if not numbers and not pairs:
        return TASKS["topic"]
    raise DataError(
        f"{rows[0].source}: no prompt is known for labels {', '.join(sorted(labels)[:6])}; set template task "
        f"({', '.join(TASKS)}) or template templates and verbalizer"
    )
