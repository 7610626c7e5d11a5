"""What the seeds of several methods say: intervals, Welch's t-test for each pair, and a verdict in words.

Holm's correction runs over all pairs, not only those with the best: the best is chosen by the same data, and a
correction over all pairs holds whichever pairs are looked at afterwards (Holm 1979).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.errors import DataError

CONSTANT = 1e-12
"""Values that lie closer together than this share of their size differ by rounding alone."""
CANNOT = "without variance over the seeds no test can tell"
NAMED, SETS = 8, 6
"""How many methods of a set, and how many sets that do not differ, the sentences name; the fields have all."""
POWER, SEEDS = 0.8, 100
"""The chance at which a number of seeds is said to tell two groups apart, and the most that is looked for."""


@dataclass(frozen=True)
class Interval:
    """A mean and its interval (Student's t); `low` and `high` are None for one value, which gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Welch:
    """Welch's t-test of a against b (Welch 1947): mean(a) - mean(b) with its interval, and the two-sided p.

    The same means without variance in both have no t and p = 1, and `note` says so.
    """

    difference: float
    low: float
    high: float
    t: float | None
    df: float | None
    p: float
    note: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two groups, by name.

    Attributes:
        test: with the p of this pair alone; None where there is none, and `why`.
        adjusted: its p corrected by Holm over all pairs.
        differ: the corrected p is at most the level; None with one seed.
        undecided: neither "differ" nor "do not differ" can be said: only the p of this pair alone is at most the level,
            or there is no variance that a difference could be held against (and no test).
    """

    a: str
    b: str
    test: Welch | None
    adjusted: float | None
    differ: bool | None
    undecided: bool = False
    why: str | None = None


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


def interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """The mean of the values and its interval; None without values.

    Args:
        values: one number a seed.
        level: the share of such intervals that hold the true mean.

    Raises:
        DataError: a value is not finite.
    """
    from scipy import stats

    if not values:
        return None
    mean, variance = _moments(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Welch | None:
    """Test whether two groups have the same mean, whatever their variances; None where that cannot be tested: one has
    fewer than two values, or the means differ and neither has any variance.

    Args:
        a, b: one number a seed.
        level: of the interval of the difference.

    Raises:
        DataError: a value is not finite.
    """
    from scipy import stats

    if len(a) < 2 or len(b) < 2:
        return None
    (mean_a, variance_a), (mean_b, variance_b) = _moments(a), _moments(b)
    part_a, part_b = variance_a / len(a), variance_b / len(b)
    difference = mean_a - mean_b
    error = math.sqrt(part_a + part_b)
    if error == 0:
        if abs(difference) > CONSTANT * max(abs(mean_a), abs(mean_b)):
            return None
        note = "no variance in either: the same values in every seed"
        return Welch(difference, difference, difference, None, None, 1.0, note)
    share_a = part_a / (part_a + part_b)  # by shares: the squares of tiny variances would underflow
    df = 1 / (share_a**2 / (len(a) - 1) + (1 - share_a) ** 2 / (len(b) - 1))
    t = difference / error
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Welch(difference, difference - half, difference + half, t, df, float(2 * stats.t.sf(abs(t), df)))


def seeds_to_tell(a: Sequence[float], b: Sequence[float], level: float = 0.05, power: float = POWER) -> int | None:
    """How many seeds of each group Welch's test needs to tell them apart, if their true means and variances are those of
    the values that are there (noncentral t); None where more than `SEEDS` would be needed or none would do.

    Args:
        a, b: one number a seed, two or more of each.
        level: of the test; of one of several, what its correction leaves of it.
        power: the chance that the test then tells them apart.

    Raises:
        DataError: a value is not finite.
    """
    from scipy import stats

    (mean_a, variance_a), (mean_b, variance_b) = _moments(a), _moments(b)
    both = variance_a + variance_b
    if both == 0 or mean_a == mean_b:
        return None
    share_a = variance_a / both
    for count in range(2, SEEDS + 1):
        df = (count - 1) / (share_a**2 + (1 - share_a) ** 2)
        shift = abs(mean_a - mean_b) / math.sqrt(both / count)
        if stats.nct.sf(stats.t.isf(level / 2, df), df, shift) >= power:
            return count
    return None


def pairs(groups: Mapping[str, Sequence[float]], level: float = 0.05, fixed: Collection[str] = ()) -> list[Pair]:
    """Welch's test for each pair of groups, with Holm's correction over all pairs that can be tested.

    Args:
        groups: the values of each group, one a seed; one without values is left out.
        level: the chance of calling any pair different when none is (the family-wise error rate).
        fixed: groups whose value no seed changes, as of an untouched base: one value then is the true mean, and the
            test against it that of one sample.

    Raises:
        DataError: a value is not finite.
    """
    known = {
        name: list(values) * 2 if name in fixed and len(values) == 1 else values for name, values in groups.items()
    }
    couples = list(itertools.combinations([name for name, values in known.items() if values], 2))
    tests = [welch(known[a], known[b], 1 - level) for a, b in couples]
    corrected = iter(_holm([test.p for test in tests if test is not None]))
    found = []
    for (a, b), test in zip(couples, tests, strict=True):
        short = " and ".join(name for name in (a, b) if len(known[name]) < 2)
        if short:
            found.append(Pair(a, b, None, None, None, why=f"no test with one seed ({short})"))
        elif test is None:
            found.append(Pair(a, b, None, None, False, undecided=True, why=CANNOT))
        else:
            p = next(corrected)
            found.append(Pair(a, b, test, p, p <= level, test.p <= level < p))
    return found


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
    means = {name: _moments(values)[0] for name, values in groups.items() if values}
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
    if tied := [name for name in same if name not in undecided]:
        lines.append(_same_line(best, tied, against))
        lines.extend([] if cheapest is None else [_cheapest_line(best, cheapest, costs, cost, quality, means)])
    for words, tells in ((CANNOT, False), ("more seeds would tell", True)):
        if some := [name for name in undecided if (against[name].test is not None) == tells]:
            lines.append(f"Undecided against {best}, {words}: {_list(some)}.")
    lines.extend(_seeds_line(best, seeds))
    if worse and (same or untested):
        lines.append(f"Worse than {best}: {_list(worse)}.")
    if untested:
        lines.append(f"No test against {best}, which takes two seeds of both: {_list(untested)}.")
    lines.extend([*_tie_lines([tie for tie in ties if not {best, *same}.issuperset(tie)]), *_how(tested, level)])
    return Verdict(lines, best, cheapest, same, undecided, seeds, worse, untested, ties, tested)


# -------------------------------------------------------------------------------------------------- sentences


def _left_out_line(left_out: Sequence[str]) -> list[str]:
    whose = "its" if len(left_out) == 1 else "their"
    return [f"Left out, some of {whose} runs failed: {_list(left_out)}."] if left_out else []


def _all(others: list[str]) -> str:
    if len(others) == 1:
        return others[0]
    return "both others" if len(others) == 2 else f"all {len(others)} others"


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


def _seeds_line(best: str, seeds: Mapping[str, int | None]) -> Iterator[str]:
    """How many seeds would tell those that the tests do not tell from the best."""
    if near := [f"{name} {count}" for name, count in seeds.items() if count is not None]:
        far = [name for name, count in seeds.items() if count is None]
        rest = f"; over {SEEDS}: {_list(far)}" if far else ""
        yield f"So many seeds of each would tell them from {best}, if means and spread stay: {_list(near)}{rest}."


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


# ------------------------------------------------------------------------------------------------ arithmetic


def _varies(pair: Pair) -> bool:
    return pair.test is not None and pair.test.t is not None


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and variance (n - 1) of the values; one value, or values that differ by rounding alone, have variance 0."""
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"statistics: {list(values)} holds a value that is not finite; leave that run out")
    mean = math.fsum(values) / len(values)
    if max(values) - min(values) <= CONSTANT * abs(mean):
        return mean, 0.0
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the smallest p times the number of tests, the next times one less, never falling."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, ps[place] * (len(ps) - rank)))
        adjusted[place] = highest
    return adjusted


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
