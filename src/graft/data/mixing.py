"""Pure functions of rows and items: duplicates, test questions, weights, and a split without leaks."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any

from graft.data.items import Item, Manner, question
from graft.data.read import near as nearest
from graft.data.recipe import Recipe, SplitSettings
from graft.data.rows import Row
from graft.data.similar import Groups, jaccard, near_pairs, normalised
from graft.errors import ConfigError, DataError


def repeated(
    rows: Sequence[Row], kind: str | None, threshold: float | None, manners: Sequence[Manner] | None = None
) -> dict[int, int]:
    """The numbers of rows that repeat an earlier row which is asked in the same way, each with that row's number.

    Args:
        kind: exact (question, answer and what templates show are equal), normalised (they are, up to case and
            punctuation), near (question and answer together, and each column shown, are nearly equal; labels must be
            equal), or None.
        threshold: of the Jaccard index, for near.
        manners: how each row is asked; None: all alike.
    """
    if kind is None:
        return {}
    same = normalised if kind in ("normalised", "near") else str
    manners = manners or [Manner()] * len(rows)
    first: dict[Hashable, int] = {}
    found = {}
    for number, (row, manner) in enumerate(zip(rows, manners, strict=True)):
        key = (manner.how, same(question(row)), same(row.answer), *map(same, manner.shown))
        if key in first:
            found[number] = first[key]
        else:
            first[key] = number
    if kind == "near" and threshold is not None:
        found |= _nearly(rows, manners, list(first.values()), threshold)
    return dict(sorted(found.items()))


def _nearly(rows: Sequence[Row], manners: Sequence[Manner], numbers: Sequence[int], threshold: float) -> dict[int, int]:
    classes: dict[tuple[str, int | str | None], list[int]] = defaultdict(list)
    for number in numbers:
        classes[manners[number].how, rows[number].label].append(number)
    found: dict[int, int] = {}
    for (_, label), members in classes.items():
        texts = [question(rows[n]) + ("" if label is not None else f"\n{rows[n].answer}") for n in members]
        parts = [tuple(map(normalised, (text, *manners[n].shown))) for text, n in zip(texts, members, strict=True)]
        earlier: dict[int, list[int]] = defaultdict(list)
        for i, j in _near_in_all(parts, threshold):
            earlier[members[j]].append(members[i])
        for number in members:
            kept = [other for other in sorted(earlier[number]) if other not in found]
            if kept:
                found[number] = kept[0]
    return found


def _near_in_all(parts: Sequence[tuple[str, ...]], threshold: float) -> Iterator[tuple[int, int]]:
    """Every pair (i, j), i < j, whose normalised parts are all nearly equal, part by part."""
    # Pairs are looked for by the part that tells most rows apart, so that few are left to compare in the others.
    by = max(range(len(parts[0])), key=lambda part: len({each[part] for each in parts}))
    places: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(parts):
        places[each[by]].append(place)
    texts = list(places)
    alike = (product(places[texts[i]], places[texts[j]]) for i, j in near_pairs(texts, threshold))
    equal = (combinations(found, 2) for found in places.values())
    for one, other in chain.from_iterable(chain(alike, equal)):
        both = zip(parts[one], parts[other], strict=True)
        if all(a == b or k == by or jaccard(a, b) >= threshold for k, (a, b) in enumerate(both)):
            yield min(one, other), max(one, other)


def contaminated(texts: Sequence[Sequence[str]], questions: Sequence[str], threshold: float | None) -> set[int]:
    """The numbers of rows of whose texts one stands among `questions`, up to case, punctuation and `threshold`."""
    test = {normalised(text) for text in questions}
    mine = [[normalised(text) for text in each] for each in texts]
    every = {text for each in mine for text in each}
    hit = test & every
    if threshold is not None:
        both = [*sorted(test), *sorted(every - test)]
        hit |= {both[j] for i, j in near_pairs(both, threshold) if i < len(test) <= j}
    return {number for number, each in enumerate(mine) if not hit.isdisjoint(each)}


@dataclass(frozen=True)
class Taken:
    """What one source gave to the mix."""

    there: int
    taken: int
    asked: float | None
    """Its share of the mix by the weights; None: there are none."""


def mix(pools: dict[str, list[Item]], recipe: Recipe) -> tuple[list[Item], dict[str, Taken]]:
    """The items of the mix, shuffled by the seed, and how many each source gave.

    With weights and no size, the mix is as large as the weights allow without repeating (with `repeat`: as small as
    they allow without leaving any row out). With a size, a source that has too little gives all that it has, and the
    others fill up in proportion to their weights; with `repeat` it gives its rows again.
    """
    there = {name: len(pool) for name, pool in pools.items()}
    weighted = any(source.weight is not None for source in recipe.sources)
    weights = {s.called: float(s.weight or 1.0) for s in recipe.sources if there[s.called]}
    whole = sum(weights.values())
    if not weights:
        raise DataError("sources: no rows are left to mix; all repeat others, stand in against, or were not invented")
    if recipe.size is not None:
        wanted = _apportioned(recipe.size, weights, None if recipe.repeat else there)
    elif weighted:
        sizes = [there[name] * whole / weight for name, weight in weights.items()]
        wanted = _apportioned(int((max if recipe.repeat else min)(sizes) + 1e-9), weights, None)
        bound = max if recipe.repeat else min
        wanted = {name: bound(count, there[name]) for name, count in wanted.items()}
    else:
        wanted = there
    chosen: list[Item] = []
    for name, pool in pools.items():
        order = list(pool)
        random.Random(f"mix {recipe.seed} {name}").shuffle(order)
        rounds, rest = divmod(wanted.get(name, 0), len(pool)) if pool else (0, 0)
        chosen += order * rounds + order[:rest]
    random.Random(f"order {recipe.seed}").shuffle(chosen)
    asked = weighted or recipe.size is not None
    shares = {name: weights.get(name, 0) / whole if asked else None for name in pools}
    return chosen, {name: Taken(there[name], wanted.get(name, 0), shares[name]) for name in pools}


def _apportioned(size: int, weights: dict[str, float], limits: dict[str, int] | None) -> dict[str, int]:
    """`size` shared out by weight (largest remainders); who has less than its share gives all, the others fill up."""
    given: dict[str, int] = {}
    open_ = dict(weights)
    while limits is not None and open_:
        left, whole = size - sum(given.values()), sum(open_.values())
        short = [name for name, weight in open_.items() if left * weight / whole > limits[name]]
        if not short:
            break
        for name in short:
            given[name] = limits[name]
            del open_[name]
    left, whole = size - sum(given.values()), sum(open_.values())
    exact = {name: left * weight / whole for name, weight in open_.items()}
    given |= {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in by_remainder[: size - sum(given.values()) if open_ else 0]:
        if limits is None or given[name] < limits[name]:
            given[name] += 1
    return given


def split(
    items: Sequence[Item], settings: SplitSettings, threshold: float | None, seed: int
) -> tuple[list[Item], list[Item], int]:
    """(training, evaluation, number of groups) without a question on both sides.

    One group, which stays on one side: the items of equal questions (so of one row) or prompts, up to case and
    punctuation; of questions whose Jaccard index reaches `threshold` (chains too); of one value in the column
    `settings.group`. Evaluation takes whole groups in an order by seed, as far as its share reaches. What the mix
    repeats stands there once.
    """
    groups = Groups(len(items))
    questions = [normalised(question(item.row)) for item in items]
    groups.join_equal(questions)
    groups.join_equal([normalised(_shown(item)) for item in items])
    if settings.group is not None:
        groups.join_equal([_value(item, settings.group) for item in items])
    if threshold is not None and settings.eval:
        for i, j in near_pairs(questions, threshold):
            groups.join(i, j)
    members: dict[int, list[int]] = defaultdict(list)
    for number in range(len(items)):
        members[groups.of(number)].append(number)
    if not settings.eval:
        return list(items), [], len(members)
    held = _held(members, round(settings.eval * len(items)), seed)
    train = [item for number, item in enumerate(items) if number not in held]
    evaluation = {_identity(items[number]): items[number] for number in sorted(held)}
    return train, list(evaluation.values()), len(members)


def _held(members: dict[int, list[int]], target: int, seed: int) -> set[int]:
    order = list(members.values())
    random.Random(f"split {seed}").shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= max(1, target):
            held |= set(group)
    if not held or len(members) < 2:
        sizes = Counter(len(group) for group in order).most_common(1)[0]
        raise DataError(
            f"split.eval: no group of rows that ask the same is small enough for {target} evaluation rows (there are "
            f"{len(order)} groups, most of {sizes[0]} rows); raise split.eval or near, or give more rows"
        )
    return held


def _shown(item: Item) -> str:
    return "\n".join(turn.content for turn in item.messages if turn.role != "system") or item.prompt


def _identity(item: Item) -> tuple[Any, ...]:
    return item.source, item.row.index, item.template, item.completion


def _value(item: Item, column: str) -> str:
    if column not in item.row.fields:
        there = list(map(str, item.row.fields))
        raise ConfigError(
            f"split.group: {item.row.where} has no column '{column}'{nearest(column, there)}; "
            f"there are: {', '.join(there)}"
        )
    return str(item.row.fields[column])
