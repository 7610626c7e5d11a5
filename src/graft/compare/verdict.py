"""A verdict in words: the best by quality, the cheapest that does not differ from it, and which do not differ.

What differs is said by `statistics`: Welch's t-test for each pair, corrected by Holm over all pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.compare.statistics import CANNOT, SEEDS, Pair, interval, pairs, seeds_to_tell

NAMED, SETS = 8, 6
"""How many methods of a set, and how many sets that do not differ, the sentences name; the fields have all."""


@dataclass(frozen=True)
class Verdict:
    """What the pairs come to.

    Attributes:
        lines: the same in words.
        best: the group with the best mean.
        cheapest: the cheapest among the best and those that do not differ from it and are not undecided; None if no
            cost is known.
        same_as_best: those that the corrected tests do not tell from the best, without it, best first.
        undecided: those of them that the test of the pair alone does tell from it, or that no test can.
        seeds: how many seeds of each would tell one of these from the best, by `seeds_to_tell`.
        worse: those that differ from it. untested: those that could not be tested against it.
        ties: the largest sets within which no two groups differ or are undecided, best first; from two groups on.
        pairs: every pair.
    """

    lines: list[str]
    best: str | None
    cheapest: str | None
    same_as_best: list[str]
    undecided: list[str]
    seeds: dict[str, int | None]
    worse: list[str]
    untested: list[str]
    ties: list[list[str]]
    pairs: list[Pair]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verdict(
    groups: Mapping[str, Sequence[float]],
    costs: Mapping[str, float | None],
    higher_is_better: bool = True,
    level: float = 0.05,
    *,
    fixed: Collection[str] = (),
    quality: str = "quality",
    cost: str = "trainable parameters",
    left_out: Sequence[str] = (),
) -> Verdict:
    """Say which group is best, which is the cheapest that does not differ from it, and which do not differ.

    Args:
        groups: the quality of each, one value a seed.
        costs: one number for each group, less is cheaper; None where it is not known.
        higher_is_better: of the quality.
        level, fixed: as for `pairs`.
        quality, cost: the names in the sentences.
        left_out: those that are not among the groups since some of their runs failed, for the sentences.

    Raises:
        DataError: a value is not finite.
    """
    tested = pairs(groups, level, fixed)
    means = {name: known.mean for name, values in groups.items() if (known := interval(values)) is not None}
    ranked = sorted(means, key=lambda name: -means[name] if higher_is_better else means[name])
    out = _left_out_line(left_out)
    if not ranked:
        why = "no entry came to its end with every seed" if out else "no run has a value"
        return Verdict([f"Nothing to compare: {why}.", *out], None, None, [], [], {}, [], [], [], [])
    best, others = ranked[0], ranked[1:]
    by_names = {frozenset((pair.a, pair.b)): pair for pair in tested}
    against = {name: by_names[frozenset((best, name))] for name in others}
    same = [name for name in others if against[name].differ is False]
    undecided = [name for name in same if against[name].undecided]
    worse = [name for name in others if against[name].differ]
    untested = [name for name in others if against[name].differ is None]
    priced = [name for name in (best, *same) if costs.get(name) is not None and name not in undecided]
    cheapest = min(priced, key=lambda name: costs[name] or 0.0, default=None)
    ties = _ties(ranked, tested)
    share = level / max(1, sum(pair.test is not None for pair in tested))
    seeds = {name: seeds_to_tell(groups[best], groups[name], share) for name in same if _varies(against[name])}
    lines = [f"Best by {quality}: {best} ({quality} {_number(means[best])}, {_seeds(len(groups[best]))}).", *out]
    if not others:
        which = "that is left" if out else "with a value"
        lines.append(f"It is the only one {which}, so there is nothing to test it against.")
    if worse and not (same or untested):
        lines.append(f"It differs from {_all(worse)}.")
    told = [_cheapest_line(best, cheapest, costs, cost, quality, means)] if cheapest is not None else []
    lines.extend([*_near_lines(best, same, undecided, against, told), *_seeds_lines(best, seeds)])
    if worse and (same or untested):
        lines.append(f"Worse than {best}: {_list(worse)}.")
    if untested:
        lines.append(f"No test against {best}, which takes two seeds of both: {_list(untested)}.")
    lines.extend([*_tie_lines([tie for tie in ties if not {best, *same}.issuperset(tie)]), *_how(tested, level)])
    return Verdict(lines, best, cheapest, same, undecided, seeds, worse, untested, ties, tested)


def _ties(ranked: Sequence[str], tested: Sequence[Pair]) -> list[list[str]]:
    """The largest sets of which no two differ or are undecided: maximal cliques (Bron and Kerbosch 1973)."""
    near: dict[str, set[str]] = {name: set() for name in ranked}
    for pair in tested:
        if pair.differ is False and not pair.undecided:
            near[pair.a].add(pair.b)
            near[pair.b].add(pair.a)

    def grow(held: set[str], candidates: set[str], done: set[str]) -> Iterator[set[str]]:
        if not candidates and not done:
            yield held
            return
        pivot = max(sorted(candidates | done), key=lambda name: len(near[name] & candidates))
        for name in sorted(candidates - near[pivot]):
            yield from grow(held | {name}, candidates & near[name], done & near[name])
            candidates, done = candidates - {name}, done | {name}

    place = {name: number for number, name in enumerate(ranked)}
    found = [sorted(each, key=place.__getitem__) for each in grow(set(), set(ranked), set()) if len(each) > 1]
    return sorted(found, key=lambda each: [place[name] for name in each])


def _varies(pair: Pair) -> bool:
    return pair.test is not None and pair.test.t is not None


# -------------------------------------------------------------------------------------------------- sentences


def _left_out_line(left_out: Sequence[str]) -> list[str]:
    whose = "its" if len(left_out) == 1 else "their"
    return [f"Left out, some of {whose} runs failed: {_list(left_out)}."] if left_out else []


def _all(others: list[str]) -> str:
    if len(others) == 1:
        return others[0]
    return "both others" if len(others) == 2 else f"all {len(others)} others"


def _near_lines(
    best: str, same: list[str], undecided: list[str], against: Mapping[str, Pair], cheapest: list[str]
) -> Iterator[str]:
    """Those that the tests do not tell from the best."""
    if tied := [name for name in same if name not in undecided]:
        yield _same_line(best, tied, against)
        yield from cheapest
    for words, tells in ((CANNOT, False), ("more seeds would tell", True)):
        if some := [name for name in undecided if (against[name].test is not None) == tells]:
            yield f"Undecided against {best}, {words}: {_list(some)}."


def _same_line(best: str, same: list[str], against: Mapping[str, Pair]) -> str:
    """Those that do not differ from the best, and how large a difference the seeds would still allow."""
    tests = [test for name in same if (test := against[name].test) is not None]
    most = max(max(abs(test.low), abs(test.high)) for test in tests)
    verb = "does not differ" if len(same) == 1 else "do not differ"
    room = f" (true differences of up to {_number(most)} are not ruled out)" if most > 0 else ""
    return f"{_list(same)} {verb} from {best} by more than the seeds do{room}."


def _cheapest_line(
    best: str,
    cheapest: str,
    costs: Mapping[str, float | None],
    cost: str,
    quality: str,
    means: Mapping[str, float],
) -> str:
    price, top = costs[cheapest], costs.get(best)
    if cheapest == best:
        return f"The cheapest of these: {best} itself ({_number(price)} {cost})."
    beside = "" if top is None else f" against {_number(top)} of {best}"
    both = f"{quality} {_number(means[cheapest])} against {_number(means[best])}"
    return f"The cheapest of these: {cheapest} ({_number(price)} {cost}{beside}; {both})."


def _seeds_lines(best: str, seeds: Mapping[str, int | None]) -> Iterator[str]:
    """How many seeds would tell those that the tests do not tell from the best."""
    if_so = f"from {best}, if means and spread stay"
    if near := [f"{name} ({count})" for name, count in seeds.items() if count is not None]:
        yield f"So many seeds of each would tell them {if_so}: {_list(near)}."
    if far := [name for name, count in seeds.items() if count is None]:
        yield f"More than {SEEDS} seeds of each would be needed to tell {_list(far)} {if_so}."


def _tie_lines(ties: list[list[str]]) -> Iterator[str]:
    for tie in ties[:SETS]:
        yield f"These do not differ from each other: {_list(tie)}."
    if len(ties) > SETS:
        yield f"{len(ties) - SETS} more such sets follow from the table of pairs."


def _how(tested: Sequence[Pair], level: float) -> Iterator[str]:
    if count := sum(pair.test is not None for pair in tested):
        words = "one pair" if count == 1 else f"{count} pairs"
        yield f"By Welch's t-test with Holm's correction over {words}, at {100 * level:g} %."


def _list(names: Sequence[str]) -> str:
    """The names in words; those with commas inside are kept apart by semicolons, and of many the last are counted."""
    comma = "; " if any("," in name for name in names) else ", "
    if len(names) > NAMED + 1:
        return f"{comma.join(names[:NAMED])}{comma}and {len(names) - NAMED} others"
    if len(names) < 3:
        return " and ".join(names)
    return f"{comma.join(names[:-1])}{comma.rstrip() if comma == '; ' else ''} and {names[-1]}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean of {count} seeds"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:,.4g}"
