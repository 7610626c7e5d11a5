"""Demonstrations: rows drawn from a pool by seed, put in front of every question, and as many as the context takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft.data.rows import Message, Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate.batches import bank_or_none, context_of
from graft.routes import entry_of

BETWEEN = "\n\n"
"""Parts demonstrations outside chat, and ends a generated answer."""


def draw(pool: Sequence[Row], shots: int, seed: int = 0, *, balanced: bool | None = None) -> list[Row]:
    """Demonstrations from a pool, in random order; a function of the pool and `seed` alone, and draws of one seed nest.

    Args:
        pool: rows with answers or labels.
        shots: how many.
        seed: chooses rows and order.
        balanced: as many of each label, one more of some where they do not divide; None: if the rows have labels.

    Raises:
        DataError: fewer rows than shots, in all or with some label.
        ConfigError: `shots` below 0, or balanced draws of rows without labels.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise ConfigError(f"shots: give a whole number from 0, or 'fit', not {shots!r}")
    chosen = _order(pool, seed, balanced, shots)[:shots]
    random.Random(f"order of {shots} shots {seed}").shuffle(chosen)
    return chosen


def _order(pool: Sequence[Row], seed: int, balanced: bool | None, shots: int) -> list[Row]:
    """Rows in the order in which they are drawn: label after label in turn."""
    source = pool[0].source if pool else "pool"
    if len(pool) < shots:
        raise DataError(f"{source}: {len(pool)} rows for {shots} shots; give more rows or fewer shots")
    labelled = all(row.label is not None for row in pool)
    if balanced and not labelled:
        raise ConfigError(f"balanced: {source} has rows without labels; leave it out")
    by_label: dict[str, list[Row]] = {}
    for row in pool:
        by_label.setdefault(str(row.label) if labelled and balanced is not False else "", []).append(row)
    drawn = random.Random(f"shots {seed}")
    labels = sorted(by_label)
    drawn.shuffle(labels)
    for place, label in enumerate(labels):
        drawn.shuffle(by_label[label])
        needed = shots // len(labels) + (place < shots % len(labels))
        if len(by_label[label]) < needed:
            raise DataError(
                f"{source}: {len(by_label[label])} rows with label '{label}', {shots} shots balanced over "
                f"{len(labels)} labels need {needed}; give more rows, fewer shots, or balanced false"
            )
    longest = max(map(len, by_label.values()), default=0)
    return [by_label[label][turn] for turn in range(longest) for label in labels if turn < len(by_label[label])]


def with_shots(rows: Sequence[Row], shots: Sequence[Row], template: Template) -> tuple[list[Row], Template]:
    """Rows whose prompts have the demonstrations in front, and the template that takes them as they are.

    Outside chat the demonstrations are rendered as in training, with an empty line between them. In chat each is a
    user's and an assistant's turn; system messages of demonstrations are left out, that of the question is kept.

    Raises:
        DataError: an answer with an empty line, which would end it; or see `Template`.
    """
    if template.kind == "chat":
        front = tuple(turn for shot in shots for turn in _turns(shot, template))
        turns = "last" if template.mode == "causal" else "all"
        made = dataclasses.replace(template, task=None, turns=turns, train_on="completion")
        return [_asked(row, (*_system(row), *front, *_turns(row, template)), template) for row in rows], made
    for shot in shots:
        if BETWEEN in template.answer(shot):
            raise DataError(f"{shot.where}: its answer has an empty line, which ends an answer; remove it or use chat")
    text = "".join(template.render(shot).text + BETWEEN for shot in shots)
    made = Template(kind="plain", mode=template.mode, separator=template.separator)
    return [_prompted(row, text + template.render_prompt(row), template) for row in rows], made


def answered(row: Row, word: str, template: Template) -> Row:
    """A row of `with_shots` with this word as its answer."""
    if template.kind != "chat":
        return dataclasses.replace(row, completion=word)
    last = row.messages[-1]._replace(content=word)
    return dataclasses.replace(row, messages=(*row.messages[:-1], last), completion=word)


def fitting(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    pool: Sequence[Row],
    template: Template,
    shots: int | str,
    seed: int = 0,
    *,
    most: int | None = None,
    balanced: bool | None = None,
    entries: Sequence[Any] = (None,),
) -> list[Row]:
    """`draw`, as long as every row and its answer still fit into the model's context behind the demonstrations.

    A row with a label has to fit with the longest word of the template, whichever is right.

    Args:
        shots: how many, or "fit" for as many as there is room and a pool for.
        most: the highest count that "fit" may take; None: no limit but these. A number of shots stands for itself.

    Raises:
        DataError: they do not fit; it says how many would.
        ConfigError: "fit" for a model without a limit, and without `most`; `most` below 1.
    """
    if most is not None and most < 1:
        raise ConfigError(f"shots 'fit': give at least 1 as the most, not {most}")
    limit = room(model, tokenizer, entries)
    if limit is None:
        if shots == "fit" and most is None:
            raise ConfigError("shots 'fit': the model has no longest input; give a number")
        count: Any = _most(pool, len(pool) if most is None else most, seed, balanced) if shots == "fit" else shots
        return draw(pool, count, seed, balanced=balanced)
    word = _longest_word(rows[0], template, tokenizer)

    def lengths(count: int, asked: Sequence[Row]) -> list[int]:
        made, plain = with_shots(asked, draw(pool, count, seed, balanced=balanced), template)
        made = made if word is None else [answered(row, word, template) for row in made]
        return [max(len(e), len(e.labels)) for e in plain.examples(made, tokenizer)]

    alone = lengths(0, rows)
    longest = max(range(len(rows)), key=alone.__getitem__)

    def fits(count: int) -> bool:
        return lengths(count, [rows[longest]])[0] <= limit

    wanted: Any = _most(pool, min(most or limit, limit), seed, balanced) if shots == "fit" else shots
    drawn = draw(pool, wanted, seed, balanced=balanced)
    low = _highest(fits, len(drawn)) if shots == "fit" or not fits(len(drawn)) else len(drawn)
    while low >= 0 and max(lengths(low, rows)) > limit:
        low -= 1
    if low == len(drawn) or (shots == "fit" and low > 0):
        return draw(pool, low, seed, balanced=balanced)
    asked = min(1, len(drawn)) if shots == "fit" else len(drawn)
    raise DataError(
        f"{rows[longest].where}: behind {'one demonstration' if asked == 1 else f'{asked} demonstrations'} it "
        f"takes {lengths(asked, [rows[longest]])[0]} tokens, the context has {limit}; {max(low, 0) or 'none'} would "
        f"fit: give {'fewer shots (or shots fit), ' if low > 0 else ''}a pool of shorter rows, or shorter questions"
    )


def _longest_word(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The word of a label that takes most tokens behind a prompt; None for rows that are not answered so."""
    if row.form != "label" or template.task is None or not template.task.words:
        return None
    (asked,), plain = with_shots([row], [], template)
    words = template.task.words
    made = plain.examples([answered(asked, word, template) for word in words], tokenizer)
    return max(zip(words, made, strict=True), key=lambda each: max(len(each[1]), len(each[1].labels)))[0]


def _highest(fits: Callable[[int], bool], most: int) -> int:
    """The highest count up to `most` that fits, 0 if not even one does; no count over twice that and 1 is tried."""
    low, step = 0, 1
    while low + step <= most and fits(low + step):
        low, step = low + step, 2 * step
    over = min(low + step, most + 1)
    while over - low > 1:
        count = (low + over) // 2
        low, over = (count, over) if fits(count) else (low, count)
    return low


def room(model: Any, tokenizer: PreTrainedTokenizerBase, entries: Sequence[Any]) -> int | None:
    """Tokens that a text may have beside prefixes and soft prompts of the entries; None where there is no limit."""
    limit, bank = context_of(model, tokenizer), bank_or_none(model)
    if limit is None or bank is None:
        return limit
    return limit - max(sum(prompt.length for prompt in bank.prompts(entry_of(entry))) for entry in entries)


def _most(pool: Sequence[Row], limit: int, seed: int, balanced: bool | None) -> int:
    """The most shots that the pool allows; each takes a token at least."""
    low, over = 0, min(len(pool), limit) + 1
    while over - low > 1:
        count = (low + over) // 2
        try:
            draw(pool, count, seed, balanced=balanced)
            low = count
        except DataError:
            over = count
    return low


def _asked(row: Row, messages: tuple[Message, ...], template: Template) -> Row:
    answer = messages[-1].content
    return dataclasses.replace(
        row, form="chat", messages=messages, completion=answer, references=_rights(row, template)
    )


def _prompted(row: Row, prompt: str, template: Template) -> Row:
    answer = row.completion if row.form == "chat" else template.answer(row)
    rights = _rights(row, template)
    return dataclasses.replace(row, form="prompt", prompt=prompt, context="", completion=answer, references=rights)


def _rights(row: Row, template: Template) -> tuple[str, ...]:
    return row.references if row.form == "chat" else template.references(row)


def _system(row: Row) -> tuple[Message, ...]:
    return tuple(turn for turn in row.messages[:1] if turn.role == "system")


def _turns(row: Row, template: Template) -> tuple[Message, ...]:
    if row.form == "chat":
        return tuple(turn for turn in row.messages if turn.role != "system")
    task = template.task
    prompt = task.prompt(row, template.seed) if task else "\n\n".join(filter(None, (row.prompt, row.context)))
    return Message("user", prompt), Message("assistant", template.answer(row))
