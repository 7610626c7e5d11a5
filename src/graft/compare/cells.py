"""The matrix of fine-tuning against in-context learning as numbers: accuracies, cells, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.compare.statistics import interval, welch

LEVEL = 0.05
NAMES = {"icl": "ICL", "icl_calibrated": "ICL calibrated", "zero_shot": "zero-shot"}
IN_CONTEXT = ("icl", "icl_calibrated")


def summary(
    settings: dict[str, Any], facts: dict[str, Any], results: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What `matrix.json` holds.

    Args:
        settings: of the matrix.
        facts: `patterns`, `pool` and `tests` (rows, `out_of_domain`, and the `shares` of the labels).
        results: one of each base, approach, pattern and seed.
        failed: what was skipped, and `why`.

    Returns:
        `settings`, `facts`, `failed`; `accuracies`, one entry for each approach of a base, pattern and test, with the
        `values` of its `seeds`, their `mean`, its 95 % interval `low` to `high`, and whether that is `near_chance`;
        `cells`, the `difference` of means, fine-tuning (`column`) minus in-context learning (`row`), with Welch's `t`
        and `p`, and whether both are `near_chance`; the `seconds` of all
        results; and `notes`, in words.
    """
    several = len(settings["bases"]) > 1
    values: dict[tuple[str, str, str, int], dict[int, float]] = {}
    for result in results:
        for approach, tests in result["accuracy"].items():
            for test, value in tests.items():
                values.setdefault((result["base"], approach, test, result["pattern"]), {})[result["seed"]] = value
    accuracies = []
    for (base, approach, test, pattern), by_seed in values.items():
        seeds = sorted(by_seed)
        named = NAMES.get(approach, approach)
        entry: dict[str, Any] = {"base": base, "approach": approach, "label": f"{named}, {base}" if several else named}
        entry |= {"test": test, "pattern": pattern, "seeds": seeds, "values": [by_seed[seed] for seed in seeds]}
        entry |= _mean(entry["values"], facts["tests"][test]["rows"])
        shares = facts["tests"][test]["shares"].values()
        entry["near_chance"] = near_chance(entry, min(shares), max(shares))
        accuracies.append(entry)
    found: dict[str, Any] = {"settings": settings, "facts": facts, "failed": list(failed)}
    found |= {"accuracies": accuracies, "cells": _cells(accuracies)}
    found["seconds"] = round(sum(result.get("seconds", 0.0) for result in results), 2)
    found["notes"] = _notes(found)
    return found


def t_and_p(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """(t, p) of Welch's test of a against b, two-sided; None with fewer than two values, or no variance at all."""
    found = welch(a, b)
    return (None, None) if found is None or found.t is None else (found.t, found.p)


def near_chance(interval: dict[str, Any], rarest: float, commonest: float) -> bool:
    """Whether an interval meets what always saying one label gets: from the rarest's share to the commonest's."""
    return bool(interval["low"] <= commonest and interval["high"] >= rarest)


def told(unit: dict[str, Any]) -> str:
    """Which result it is."""
    return f"{unit['base']}, {unit['approach']}, pattern {unit['pattern']}, seed {unit['seed']}"


def line(result: dict[str, Any]) -> str:
    """A result on one line."""
    parts = [
        f"{label} {', '.join(f'{name} {value:.3f}' for name, value in each.items())}"
        for label, each in result["accuracy"].items()
    ]
    return f"{told(result)}: {'; '.join(parts)} ({result['seconds']:.1f} s)"


def _mean(values: Sequence[float], rows: int) -> dict[str, float]:
    """The mean over the seeds and its 95 % interval (Student's t); of one value the interval over rows (Wilson)."""
    from scipy import stats

    found = interval(values, 1 - LEVEL)
    assert found is not None
    if found.low is not None and found.high is not None:
        return {"mean": found.mean, "low": found.low, "high": found.high}
    shares = stats.binomtest(round(found.mean * rows), rows).proportion_ci(1 - LEVEL, method="wilson")
    return {"mean": found.mean, "low": float(shares.low), "high": float(shares.high)}


def _cells(accuracies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fine-tuning against every in-context learning of the same test and pattern."""
    cells = []
    for row in accuracies:
        for column in accuracies if row["approach"] in IN_CONTEXT else ():
            same = (row["test"], row["pattern"]) == (column["test"], column["pattern"])
            if same and column["approach"] not in NAMES:
                t, p = t_and_p(column["values"], row["values"])
                cell: dict[str, Any] = {
                    "test": row["test"],
                    "pattern": row["pattern"],
                    "row": row["label"],
                    "column": column["label"],
                }
                cell |= {"difference": column["mean"] - row["mean"], "t": t, "p": p}
                cells.append(cell | {"near_chance": row["near_chance"] and column["near_chance"]})
    return cells


def _notes(found: dict[str, Any]) -> list[str]:
    accuracies, cells = found["accuracies"], found["cells"]
    notes = []
    near = [entry for entry in accuracies if entry["near_chance"]]
    if near:
        part = "Every" if len(near) == len(accuracies) else f"{len(near)} of {len(accuracies)}"
        noun = "accuracy is" if part == "Every" else "accuracies are"
        notes.append(
            f"{part} {noun} near chance: the 95 % interval over seeds (without seeds, over rows) "
            "meets what always saying one label gets. "
            "Differences between such accuracies say nothing about the approaches."
        )
    if not cells:
        notes.append("There is no cell: fine-tuning or in-context learning has no result.")
    tested = [cell for cell in cells if cell["p"] is not None]
    better = [cell for cell in tested if cell["p"] < LEVEL and cell["difference"] > 0]
    worse = [cell for cell in tested if cell["p"] < LEVEL and cell["difference"] < 0]
    if tested:
        notes.append(
            f"Of {len(tested)} cells fine-tuning is better in {len(better)} and in-context learning in {len(worse)} "
            f"(p < {LEVEL:g}, each cell for itself; by chance alone {LEVEL * len(tested):.1f} would be)."
        )
    if len(tested) < len(cells):
        notes.append(f"{len(cells) - len(tested)} cells have no test: fewer than two seeds, or no variance.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found["failed"]:
        reasons.setdefault((each["base"], each["approach"]), []).append(each["why"])
    for (base, approach), why in reasons.items():
        more = len(set(why)) - 1  # rows and seeds differ in what does not fit
        notes.append(f"Skipped: {approach} on {base}: {why[0]}" + (f" (and {more} more reasons)" if more else ""))
    return notes
