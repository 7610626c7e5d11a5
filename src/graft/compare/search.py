"""How the learning rate of an entry is chosen: which units it needs next, given what came of the last ones.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): every rate gets a small part of the budget, the best
of each `eta` get `eta` times as much, until one is left.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from graft.compare.grid import Entry, Grid, Row, Unit
from graft.compare.settings import BASE, Search

Flow = Generator[list[Unit], list[Row], "Chosen"]
"""Yields units that may run at once, is sent their rows in that order, and returns what came of the entry."""


@dataclass
class Chosen:
    """What came of an entry.

    Attributes:
        lr: the rate of its runs; None for what does not train, or where every rate failed.
        rows: of its runs, one for each seed.
        tried: of the search: rate, rung, steps, score (the higher the better), status and why.
        note: what the user should know of the search.
    """

    lr: float | None
    rows: list[Row]
    tried: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None


def rungs(count: int, steps: int, search: Search) -> list[tuple[int, int]]:
    """(rates, steps of each) of the rungs before the whole budget.

    >>> rungs(9, 180, Search())
    [(9, 20), (3, 60)]
    """
    depth = 0
    while search.eta**depth < count:
        depth += 1
    found = []
    for rung in range(depth):
        share = max(search.least_steps, math.ceil(steps / search.eta ** (depth - rung)))
        found.append((max(1, math.ceil(count / search.eta**rung)), min(steps, share)))
    return found


def flow(entry: Entry, grid: Grid) -> Flow:
    """The units of an entry: its search, then a run for each seed."""
    seeds = grid.settings.all_seeds
    if entry.kind != "method":
        # The bare base answers the same with every seed, unless its head is random.
        same = entry.kind == BASE and not grid.random_head
        rows = yield [grid.baseline(entry, seed) for seed in (seeds[:1] if same else seeds)]
        return Chosen(None, rows)
    if grid.settings.search.kind == "exhaustive" and len(entry.lrs) > 1:
        return (yield from _exhaustive(entry, grid, seeds))
    tried: list[dict[str, Any]] = []
    rates = list(entry.lrs)
    if len(rates) > 1:
        for rung, (count, steps) in enumerate(rungs(len(rates), grid.steps[entry.label], grid.settings.search)):
            rates = rates[:count]
            rows = [_judged(row) for row in (yield [grid.trial(entry, lr, steps) for lr in rates])]
            tried += [_tried([row], lr, rung, steps, row.get("score")) for row, lr in zip(rows, rates, strict=True)]
            if all(row["status"] != "ok" for row in rows):
                return Chosen(None, [_worst(rows)], tried)
            rates = best(rates, [row.get("score") for row in rows])
    first: Chosen | None = None
    for lr in rates:  # a rate may be good for a part of the budget and fail on the whole
        rows = yield [grid.final(entry, lr, seed) for seed in seeds]
        found = Chosen(lr, rows, tried, _edge(lr, entry.lrs))
        if first is not None:
            found.note = f"{first.lr:g}, the best rate of the trials, failed on the whole budget"
        if all(row["status"] == "ok" for row in rows) or any(row["status"] == "skipped" for row in rows):
            return found
        first = first or found
    assert first is not None
    return first


def _exhaustive(entry: Entry, grid: Grid, seeds: Sequence[int]) -> Flow:
    """Every rate and seed on the whole budget. Of the rates with the fewest bad seeds, which should be none, the one
    with the best mean evaluation is taken."""
    asked = [(lr, seed) for lr in entry.lrs for seed in seeds]
    rows = [_judged(row) for row in (yield [grid.final(entry, lr, seed) for lr, seed in asked])]
    by_rate = {lr: [row for row, (rate, _) in zip(rows, asked, strict=True) if rate == lr] for lr in entry.lrs}
    good = {lr: [row["score"] for row in found if row["status"] == "ok"] for lr, found in by_rate.items()}
    most = max(map(len, good.values()))
    scores = {lr: fmean(found) if found and len(found) == most else None for lr, found in good.items()}
    tried = [_tried(found, lr, 0, grid.steps[entry.label], scores[lr]) for lr, found in by_rate.items()]
    if not most:
        return Chosen(None, [_worst(rows)], tried)
    lr = best(entry.lrs, list(scores.values()))[0]
    return Chosen(lr, by_rate[lr], tried, _edge(lr, entry.lrs))


def best(rates: Sequence[float], scores: Sequence[float | None]) -> list[float]:
    """The rates with a score, the best first; of equal ones the lower rate."""
    known = [(score, rate) for score, rate in zip(scores, rates, strict=True) if score is not None]
    return [rate for _, rate in sorted(known, key=lambda each: (-each[0], each[1]))]


def measured(score: float | None, metric: str | None) -> float | None:
    """The metric that a score, of which more is better, stands for: the score of a loss is its negative."""
    return -score if score is not None and metric == "loss" else score


def _judged(row: Row) -> Row:
    """The row of a run whose score was no finite number is that of a failure."""
    if row["status"] != "ok" or row.get("score") is not None:
        return row
    return row | {"status": "failed", "why": "what the search goes by is not finite; lower the rate"}


def _tried(rows: Sequence[Row], lr: float, rung: int, steps: int, score: float | None) -> dict[str, Any]:
    """What came of a rate; the first bad run says the status and why."""
    tells = next((row for row in rows if row["status"] != "ok"), rows[0])
    found = {"lr": lr, "rung": rung, "steps": steps, "score": score, "status": tells["status"], "why": tells["why"]}
    return found | {"seconds": sum(row.get("wall_seconds") or 0.0 for row in rows)}


def _worst(rows: Sequence[Row]) -> Row:
    """The row that tells most about why all failed: one that was skipped, else the last."""
    return next((row for row in rows if row["status"] == "skipped"), rows[-1])


def _edge(lr: float, lrs: Sequence[float]) -> str | None:
    if len(lrs) < 3 or min(lrs) < lr < max(lrs):
        return None
    side = "lowest" if lr == min(lrs) else "highest"
    return f"the {side} rate that was tried won; a {'lower' if side == 'lowest' else 'higher'} one may be better"
