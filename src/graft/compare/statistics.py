"""What the seeds of several methods say: intervals, and Welch's t-test for each pair (`verdict` puts them into words).

Holm's correction runs over all pairs, not only those with the best: the best is chosen by the same data, and a
correction over all pairs holds whichever pairs are looked at afterwards (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from graft.errors import DataError

CONSTANT = 1e-12
"""Values that lie closer together than this share of their size differ by rounding alone."""
CANNOT = "without variance over the seeds no test can tell"
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
    """How many seeds of each group Welch's test needs to tell them apart, if their true means and variances are those
    of the values that are there (noncentral t); None where more than `SEEDS` would be needed or none would do.

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


# ------------------------------------------------------------------------------------------------ arithmetic


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
