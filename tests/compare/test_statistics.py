"""Intervals, Welch's test, Holm's correction and the verdict: against scipy, by hand, and over simulated grids."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from graft.compare.statistics import Pair, _holm, interval, pairs, seeds_to_tell, welch
from graft.compare.verdict import verdict
from graft.errors import DataError

GRIDS, METHODS, LEVEL = 200, 8, 0.05
MOST = int(stats.binom.ppf(0.999, GRIDS, LEVEL))
"""False alarms in 200 grids that a true rate of 5 % exceeds once in a thousand times."""


def test_interval_is_that_of_scipy() -> None:
    values = [54.1, 55.9, 55.0, 57.3]
    found = interval(values)
    assert found is not None and found.n == 4
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-12)


def test_interval_by_hand() -> None:
    """With two degrees of freedom t has a closed form: .95 * sqrt(2 / (1 - .95^2)) = 4.302653."""
    found = interval([1.0, 2.0, 3.0])
    assert found is not None and found.high == pytest.approx(2 + 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3))


def test_one_value_has_no_interval() -> None:
    found = interval([3.0])
    assert found is not None and (found.mean, found.low, found.high, found.n) == (3.0, None, None, 1)
    assert interval([]) is None


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (10, 4)])
def test_welch_is_that_of_scipy(sizes: tuple[int, int]) -> None:
    draw = np.random.default_rng(sum(sizes))
    a, b = draw.normal(50, 1, sizes[0]), draw.normal(51, 4, sizes[1])
    found, right = welch(list(a), list(b)), stats.ttest_ind(a, b, equal_var=False)
    assert found is not None
    between = right.confidence_interval(0.95)
    assert (found.t, found.p, found.df) == pytest.approx((right.statistic, right.pvalue, right.df), rel=1e-10)
    assert (found.low, found.high) == pytest.approx((between.low, between.high), rel=1e-10)


def test_welch_by_hand() -> None:
    """Means 2 and 5, variances 1 and 20/3: t = -3 / sqrt(1/3 + 5/3) and
    df = 2^2 / ((1/3)^2 / 2 + (5/3)^2 / 3) = 216/53."""
    found = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])
    assert found is not None and found.difference == -3
    assert (found.t, found.df) == pytest.approx((-3 / math.sqrt(2), 216 / 53))


def test_welch_by_hand_down_to_p() -> None:
    """A group without variance leaves df = 2, where p = 1 - |t| / sqrt(2 + t^2); here t = 3 / sqrt(1/3) = 3 sqrt(3)."""
    found = welch([9.0, 10.0, 11.0], [7.0, 7.0, 7.0])
    assert found is not None
    assert (found.t, found.df, found.p) == pytest.approx((3 * math.sqrt(3), 2, 1 - math.sqrt(27 / 29)))
    one_sample = stats.ttest_1samp([9.0, 10.0, 11.0], 7.0)
    assert found.p == pytest.approx(one_sample.pvalue)


def test_no_variance() -> None:
    found = welch([0.5] * 3, [0.5] * 3)
    assert found is not None and found.p == 1 and found.t is None and "same" in (found.note or "")
    assert welch([0.5] * 3, [0.6] * 3) is None


def test_other_values_without_variance_are_undecided() -> None:
    """Ten rows, two seeds each: they differ by one row. Nothing was tested, so no correction of others counts it."""
    found = verdict({"a": [0.8, 0.8], "b": [0.9, 0.9]}, {"a": 1.0, "b": 2.0}, quality="accuracy")
    assert (found.best, found.same_as_best, found.undecided, found.worse) == ("b", ["a"], ["a"], [])
    assert found.lines == [
        "Best by accuracy: b (accuracy 0.9, mean of 2 seeds).",
        "Undecided against b, without variance over the seeds no test can tell: a.",
    ]
    groups = {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.3, 2.1]}
    alone = pairs(groups)[0]
    constant = {"c": [5.0] * 3, "d": [6.0] * 3}
    both = pairs(groups | constant)
    assert both[0].adjusted == pytest.approx(max(p * (5 - k) for k, p in enumerate(_ps(both)) if p <= _p(alone)))
    assert both[-1].test is None and both[-1].undecided and both[-1].differ is False
    assert "no test can tell" in (both[-1].why or "")


def _ps(found: list[Pair]) -> list[float]:
    return sorted(pair.test.p for pair in found if pair.test is not None)


def _p(pair: Pair) -> float:
    assert pair.test is not None
    return pair.test.p


def test_rounding_is_no_variance() -> None:
    found = welch([0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.1 + 0.2])
    assert found is not None and found.p == 1.0


def test_one_seed_has_no_test() -> None:
    assert welch([1.0], [1.0, 2.0]) is None
    (pair,) = pairs({"a": [1.0], "b": [1.0, 2.0]})
    assert pair.test is None and pair.differ is None and pair.why == "no test with one seed (a)"


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        verdict({"a": [1.0, math.nan], "b": [1.0, 2.0]}, {})


def test_holm_by_hand() -> None:
    """.005 * 4, .01 * 3, .03 * 2, and .04 * 1, which may not fall below the one before it."""
    assert _holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _holm([0.6, 0.9]) == [1.0, 1.0]


def test_pairs_are_corrected_over_all_pairs() -> None:
    draw = np.random.default_rng(4)
    groups = {name: list(draw.normal(mean, 1, 4)) for name, mean in zip("abcd", (0, 1, 3, 9), strict=True)}
    found = pairs(groups)
    raw = [stats.ttest_ind(groups[a], groups[b], equal_var=False).pvalue for a, b in itertools.combinations("abcd", 2)]
    for pair, p in zip(found, raw, strict=True):
        # by definition: the largest, over the p's up to this one, of p times the tests that are left
        holm = max(min(1.0, q * sum(other >= q for other in raw)) for q in raw if q <= p)
        assert pair.adjusted == pytest.approx(holm) and pair.test is not None and pair.test.p == pytest.approx(p)
        assert pair.differ == (holm <= 0.05) and pair.undecided == (p <= 0.05 < holm)
    assert {pair.differ for pair in found} == {True, False} and any(pair.undecided for pair in found)


def test_a_base_that_no_seed_changes_is_a_known_number() -> None:
    (pair,) = pairs({"lora": [9.0, 10.0, 11.0], "base": [7.0]}, fixed={"base"})
    assert pair.test is not None and pair.test.p == pytest.approx(stats.ttest_1samp([9.0, 10.0, 11.0], 7.0).pvalue)


# ----------------------------------------------------------------------------------------- simulated grids


def grid(draw: np.random.Generator, winner: float = 0.0) -> dict[str, list[float]]:
    """8 methods with the same mean, 3 to 5 seeds each, spreads that differ; m3 may be better by so many spreads."""
    return {
        f"m{k}": list(draw.normal(50 + (winner if k == 3 else 0), draw.uniform(0.5, 1.0), draw.integers(3, 6)))
        for k in range(METHODS)
    }


def test_a_planted_tie_is_a_tie() -> None:
    """None is called worse, at the family-wise rate; without the correction this would fail."""
    draw = np.random.default_rng(5)
    alarms = uncorrected = 0
    for _ in range(GRIDS):
        found = verdict(grid(draw), {})
        alarms += any(pair.differ for pair in found.pairs)
        uncorrected += any(pair.test is not None and pair.test.p <= LEVEL for pair in found.pairs)
        if not any(pair.differ for pair in found.pairs):
            assert {found.best, *found.same_as_best} == {f"m{k}" for k in range(METHODS)} and not found.worse
            assert any("do not differ from" in line for line in found.lines)
            assert not any(line.startswith("Worse") for line in found.lines)
    assert alarms <= MOST < uncorrected


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_winner_wins(sign: int) -> None:
    draw = np.random.default_rng(7)
    wins = alarms = 0
    for _ in range(GRIDS // 2):
        groups = grid(draw, winner=60.0 * sign)
        found = verdict(groups, {}, higher_is_better=sign > 0)
        wins += found.best == "m3" and len(found.worse) == METHODS - 1 and found.cheapest is None
        alarms += any(pair.differ for pair in found.pairs if "m3" not in (pair.a, pair.b))
    assert wins == GRIDS // 2
    assert alarms <= int(stats.binom.ppf(0.999, GRIDS // 2, LEVEL))


# ------------------------------------------------------------------------------------------------- verdict

TIED = {"full": [55.0, 55.4, 54.7], "lora": [54.8, 55.3, 54.9], "ia3": [40.0, 40.3, 39.8], "prompt": [39.9, 40.2, 40.1]}
COSTS = {"full": 3_300_000.0, "lora": 65_536.0, "ia3": 3_072.0, "prompt": 2_560.0}


def test_verdict_in_words() -> None:
    found = verdict(TIED, COSTS, quality="bleu")
    assert (found.best, found.cheapest) == ("full", "lora")
    assert (found.same_as_best, found.worse, found.undecided) == (["lora"], ["prompt", "ia3"], [])
    assert found.ties == [["full", "lora"], ["prompt", "ia3"]]
    most = max(map(abs, stats.ttest_ind(TIED["full"], TIED["lora"], equal_var=False).confidence_interval(0.95)))
    assert found.lines == [
        "Best by bleu: full (bleu 55.03, mean of 3 seeds).",
        "lora does not differ from full by more than the seeds do "
        f"(true differences of up to {most:.4g} are not ruled out).",
        "The cheapest of these: lora (65,536 trainable parameters against 3,300,000 of full; "
        f"bleu {np.mean(TIED['lora']):.4g} against {np.mean(TIED['full']):.4g}).",
        "More than 100 seeds of each would be needed to tell lora from full, if means and spread stay.",
        "Worse than full: prompt and ia3.",
        "These do not differ from each other: prompt and ia3.",
        "By Welch's t-test with Holm's correction over 6 pairs, at 5 %.",
    ]


@pytest.mark.parametrize(("spread", "difference", "level"), [(1.0, 1.5, 0.05), (3.0, 4.0, 0.01), (0.1, 1.0, 0.001)])
def test_seeds_to_tell_by_simulation(spread: float, difference: float, level: float) -> None:
    """With that many seeds scipy's test finds the difference in 80 % of 4,000 draws, with one less in fewer."""
    ready = np.array([-1.0, 0.0, 1.0])  # mean 0, variance 1
    count = seeds_to_tell(list(ready), list(spread * ready + difference), level)
    assert count is not None and count > 3

    def power(seeds: int) -> float:
        draw = np.random.default_rng(seeds)
        a, b = draw.normal(0, 1, (4000, seeds)), draw.normal(difference, spread, (4000, seeds))
        return float((stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue <= level).mean())

    assert power(count) > 0.78 and power(count - 1) < 0.81


def test_seeds_that_tell_nothing() -> None:
    assert seeds_to_tell([1.0, 1.0], [2.0, 2.0]) is None and seeds_to_tell([1.0, 2.0], [2.0, 1.0]) is None
    assert seeds_to_tell([1.0, 2.0, 3.0], [1.01, 2.01, 3.01]) is None  # far over a hundred
    assert seeds_to_tell([0.0, 0.1, 0.2], [99.0, 99.1, 99.2]) == 2


def test_lower_is_better() -> None:
    found = verdict(TIED, COSTS, higher_is_better=False)
    assert found.best == "ia3" and found.same_as_best == ["prompt"] and found.worse == ["lora", "full"]


def test_too_few_seeds_to_tell_is_no_tie() -> None:
    """Far off but noisy: the corrected test cannot tell it from the best, and it is not recommended as the cheapest."""
    groups = TIED | {"16 shots": [21.0, 31.0, 24.0]}
    found = verdict(groups, COSTS | {"16 shots": 0.0})
    assert "16 shots" in found.undecided and found.cheapest == "lora"
    assert any(line.startswith("Undecided against full") and "16 shots" in line for line in found.lines)
    assert found.seeds == {"lora": None, "16 shots": seeds_to_tell(groups["full"], groups["16 shots"], LEVEL / 10)}
    assert f"16 shots ({found.seeds['16 shots']})." in next(line for line in found.lines if line.startswith("So many"))


def test_one_seed_each() -> None:
    found = verdict({"a": [1.0], "b": [2.0]}, {"a": 1.0, "b": 2.0})
    assert (found.best, found.cheapest, found.untested, found.same_as_best) == ("b", "b", ["a"], [])
    assert any("No test against b" in line for line in found.lines) and not any("Welch" in line for line in found.lines)


def test_nothing_and_one() -> None:
    assert verdict({"a": []}, {}).lines == ["Nothing to compare: no run has a value."]
    assert "nothing to test it against" in verdict({"a": [1.0, 2.0], "b": []}, {}).lines[1]


def test_the_best_of_two() -> None:
    found = verdict({"a": [1.0, 1.1, 0.9], "b": [9.0, 9.1, 8.9]}, {})
    assert found.lines[1] == "It differs from a."
    far = {"a": [1.0, 1.1, 0.9], "b": [9.0, 9.1, 8.9], "c": [5.0, 5.1, 4.9]}
    assert verdict(far, {}).lines[1] == "It differs from both others."
    assert verdict(far | {"d": [0.0, 0.1, 0.2]}, {}).lines[1] == "It differs from all 3 others."


def test_ties_are_all_largest_sets() -> None:
    """Against every subset of seven groups."""
    draw = np.random.default_rng(3)
    groups = {f"g{k}": list(draw.normal(k * 1.2, draw.uniform(0.2, 3), 4)) for k in range(7)}
    found = verdict(groups, {})
    near = {frozenset((p.a, p.b)) for p in found.pairs if p.differ is False and not p.undecided}
    subsets = [set(s) for n in range(2, 8) for s in itertools.combinations(groups, n)]
    whole = [s for s in subsets if all(frozenset(pair) in near for pair in itertools.combinations(s, 2))]
    largest = [s for s in whole if not any(s < other for other in whole)]
    assert sorted(map(sorted, found.ties)) == sorted(map(sorted, largest)) and len(largest) > 1
