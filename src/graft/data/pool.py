"""The rows of all sources without duplicates and test questions, rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graft.data.items import Item, compared, manners, render
from graft.data.mixing import contaminated, repeated
from graft.data.recipe import AgainstSettings, Recipe
from graft.data.rows import Row


@dataclass(frozen=True)
class Pool:
    """What is left of the sources before the mix."""

    rows: Mapping[str, list[Row]]
    items: dict[str, list[Item]]
    duplicates: list[tuple[str, str]]
    """(a row that was left out, the row that it repeats)."""
    against: dict[str, Counter[str]]
    """For each test set, how many rows of each source were left out."""


def pooled(recipe: Recipe, sources: Mapping[str, list[Row]], questions: Sequence[Sequence[str]]) -> Pool:
    """The rows that are left, and their items.

    Args:
        sources: the rows of each source, by its name.
        questions: of each test set, in the order of `recipe.against`.
    """
    called = {source.called: source for source in recipe.sources}
    flat = [(name, row) for name, rows in sources.items() for row in rows]
    ways = [each for name, rows in sources.items() for each in manners(called[name], rows, recipe)]
    double = repeated([row for _, row in flat], recipe.deduplicate, recipe.near, ways)
    gone = set(double)
    texts = [compared(called[name], row) for name, row in flat] if questions else []
    against: dict[str, Counter[str]] = {}
    for each, asked in zip(recipe.against, questions, strict=True):
        hit = contaminated(texts, asked, recipe.near) - gone
        against.setdefault(_name(each), Counter()).update(flat[number][0] for number in hit)
        gone |= hit
    left: dict[str, list[Row]] = {name: [] for name in sources}
    for number, (name, row) in enumerate(flat):
        if number not in gone:
            left[name].append(row)
    items = {name: render(called[name], rows, recipe) if rows else [] for name, rows in left.items()}
    places = [f"{name} row {row.index}" for name, row in flat]
    return Pool(sources, items, [(places[one], places[other]) for one, other in double.items()], against)


def _name(each: str | AgainstSettings) -> str:
    """A test set in the report: its file, and what of it."""
    if isinstance(each, str):
        return each
    parts = [f"split {each.split}"] if each.split else []
    parts += [f"{ours}: {column}" for ours, column in each.columns.items()]
    return f"{each.data} ({', '.join(parts)})" if parts else each.data
