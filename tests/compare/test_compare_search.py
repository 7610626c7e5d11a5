"""The search of the learning rate, on made-up scores; and what happens to lost workers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graft.compare.book import Book
from graft.compare.grid import Entry, Grid, Row, Unit
from graft.compare.run import _drive
from graft.compare.search import Chosen, best, flow, rungs
from graft.compare.settings import RATES, Compare, Search, make_compare

METHOD = {"method": "lora"}
STEPS = {"lora": 180}


def comparison(output: Path | str = "out", **search: Any) -> Compare:
    return make_compare(
        {
            "base": "embedded",
            "methods": ["lora"],
            "metrics": ["loss"],
            "data": {"train": "train.jsonl", "eval": 0.1},
            "search": search,
            "output": str(output),
        }
    )


def played(entry: Entry, grid: Grid, score: Callable[[Unit], float | None]) -> tuple[Chosen, list[Unit]]:
    """What a flow comes to where every unit has a made-up score (None: it fails), and the units that it asked for."""
    going, asked = flow(entry, grid), list[Unit]()
    units = next(going)
    while True:
        asked += units
        try:
            units = going.send([made(unit, score(unit)) for unit in units])
        except StopIteration as end:
            return end.value, asked


def made(unit: Unit, score: float | None) -> Row:
    ok = {"status": "ok", "why": None} if score is not None else {"status": "failed", "why": "the loss is nan"}
    return {**ok, "score": score, "seed": unit["seed"], "lr": unit["lr"], "wall_seconds": 1.0}


@pytest.mark.parametrize(
    ("count", "steps", "eta", "wanted"),
    [
        (9, 180, 3, [(9, 20), (3, 60)]),
        (8, 80, 2, [(8, 10), (4, 20), (2, 40)]),
        (5, 90, 3, [(5, 10), (2, 30)]),
        (2, 100, 3, [(2, 34)]),
        (1, 100, 3, []),
        (9, 20, 3, [(9, 10), (3, 10)]),  # no trial is shorter than least_steps
        (3, 5, 3, [(3, 5)]),  # nor longer than the run
    ],
)
def test_rungs(count: int, steps: int, eta: int, wanted: list[tuple[int, int]]) -> None:
    assert rungs(count, steps, Search(eta=eta)) == wanted


def test_halving_finds_what_the_whole_grid_finds_with_less() -> None:
    entry = Entry("lora", "method", METHOD, RATES)

    def score(unit: Unit) -> float:
        return -abs(RATES.index(unit["lr"]) - 4) - 1 / unit["steps"] + 0.01 * unit["seed"]

    short, few = played(entry, Grid(comparison(), {}, STEPS), score)
    whole, all_units = played(entry, Grid(comparison(kind="exhaustive"), {}, STEPS), score)
    assert short.lr == whole.lr == RATES[4]
    assert [unit["steps"] for unit in few] == [20] * 9 + [60] * 3 + [180] * 3
    assert len(all_units) == 27 and {unit["steps"] for unit in all_units} == {180}
    assert [row["seed"] for row in short.rows] == [row["seed"] for row in whole.rows] == [0, 1, 2]
    assert [each["lr"] for each in short.tried if each["rung"] == 1] == [RATES[4], RATES[3], RATES[5]]


def test_a_rate_that_fails_is_not_taken() -> None:
    entry = Entry("lora", "method", METHOD, (1e-3, 1e-2, 1e-1))
    found, _ = played(
        entry, Grid(comparison(), {}, {"lora": 30}), lambda unit: None if unit["lr"] > 5e-2 else unit["lr"]
    )
    assert found.lr == 1e-2
    assert [each["status"] for each in found.tried] == ["ok", "ok", "failed"]
    found, asked = played(entry, Grid(comparison(), {}, {"lora": 30}), lambda unit: None)
    assert found.lr is None and found.rows[0]["why"] == "the loss is nan" and len(asked) == 3


def test_a_rate_that_fails_on_the_whole_budget_gives_way_to_the_next() -> None:
    entry = Entry("lora", "method", METHOD, (1e-3, 1e-2, 1e-1))

    def score(unit: Unit) -> float | None:
        return None if unit["lr"] == 1e-2 and unit["kind"] == "final" else -abs(unit["lr"] - 1e-2)

    found, asked = played(entry, Grid(comparison(eta=2), {}, {"lora": 40}), score)
    assert found.lr == 1e-3 and "0.01" in str(found.note) and [row["status"] for row in found.rows] == ["ok"] * 3
    assert [unit["lr"] for unit in asked if unit["kind"] == "final"] == [1e-2] * 3 + [1e-3] * 3


def test_a_seed_that_fails_at_every_rate_leaves_the_other_seeds() -> None:
    """Of the rates with the most good seeds the best; a rate whose bad seed is not the first is no good rate either."""
    entry = Entry("lora", "method", METHOD, (1e-3, 1e-2, 1e-1))

    def score(unit: Unit) -> float | None:
        bad = unit["seed"] == 2 or (unit["lr"] == 1e-1 and unit["seed"] == 0)
        return None if bad else -abs(unit["lr"] - 1e-2)

    found, _ = played(entry, Grid(comparison(kind="exhaustive"), {}, STEPS), score)
    assert found.lr == 1e-2 and [row["status"] for row in found.rows] == ["ok", "ok", "failed"]
    assert [each["status"] for each in found.tried] == ["failed"] * 3
    assert [each["why"] for each in found.tried] == ["the loss is nan"] * 3
    assert [each["score"] for each in found.tried] == [pytest.approx(-9e-3), 0.0, None]
    found, _ = played(entry, Grid(comparison(kind="exhaustive"), {}, STEPS), lambda unit: None)
    assert found.lr is None and [row["why"] for row in found.rows] == ["the loss is nan"]


@pytest.mark.parametrize("kind", ["halving", "exhaustive"])
def test_a_score_that_is_no_number_is_a_failure(kind: str) -> None:
    """JSON has no NaN: it comes back as null."""
    entry = Entry("lora", "method", METHOD, (1e-3, 1e38))
    going = flow(entry, Grid(comparison(kind=kind), {}, STEPS))
    units = next(going)
    found: Chosen | None = None
    while found is None:
        try:
            units = going.send([made(unit, 0.5) | ({"score": None} if unit["lr"] > 1 else {}) for unit in units])
        except StopIteration as end:
            found = end.value
    assert found.lr == 1e-3 and len(found.rows) == 3
    assert [each["status"] for each in found.tried] == ["ok", "failed"] and "not finite" in found.tried[1]["why"]
    going = flow(entry, Grid(comparison(kind=kind), {}, STEPS))
    with pytest.raises(StopIteration) as ended:
        going.send([made(unit, 0.5) | {"score": None} for unit in next(going)])
    assert [row["status"] for row in ended.value.value.rows] == ["failed"]


@pytest.mark.parametrize(
    ("row", "metric", "words"),
    [
        ({"kind": "trial", "score": -6.17771}, "loss", "lora: lr 0.01, 10 steps: loss 6.1777"),
        ({"kind": "trial", "score": 0.75}, "accuracy", "lora: lr 0.01, 10 steps: accuracy 0.7500"),
        ({"kind": "trial", "score": None}, "loss", "lora: lr 0.01, 10 steps: loss –"),
        ({"kind": "final", "quality": {"loss": None}}, "loss", "lora: lr 0.01, seed 0: loss –"),
        ({"kind": "final", "quality": {"loss": 2.5}}, "loss", "lora: lr 0.01, seed 0: loss 2.5"),
    ],
)
def test_the_line_of_a_run(row: Row, metric: str, words: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    Book(comparison(tmp_path, metric=metric), [], tmp_path, console).say(
        {"label": "lora", "lr": 1e-2, "steps": 10, "seed": 0, **row}, {"status": "ok", **row}
    )
    assert console.file.getvalue() == f"{words}\n"  # type: ignore[attr-defined]


def test_a_warm_up_in_steps_is_the_same_share_of_a_trial() -> None:
    entry = Entry("lora", "method", METHOD, RATES)
    settings = comparison()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"warmup": 60})})
    grid = Grid(settings, {}, STEPS)
    assert grid.trial(entry, 1e-3, 20)["run"]["train"]["warmup"] == pytest.approx(1 / 3)
    assert grid.final(entry, 1e-3, 0)["run"]["train"]["warmup"] == 60


def test_only_without_a_bound_a_trial_is_evaluated_at_its_end_alone() -> None:
    entry, settings = Entry("lora", "method", METHOD, RATES), comparison()
    for bound, every in ((None, 20), (0.1, 5)):
        data = settings.data.model_copy(update={"general": "general.txt"})
        train = settings.train.model_copy(update={"eval_every": 5, "max_forgetting": bound})
        grid = Grid(settings.model_copy(update={"data": data, "train": train}), {}, STEPS)
        assert grid.trial(entry, 1e-3, 20)["run"]["train"]["eval_every"] == every


def test_the_edge_of_the_grid_is_named() -> None:
    entry = Entry("lora", "method", METHOD, RATES)
    found, _ = played(entry, Grid(comparison(), {}, STEPS), lambda unit: unit["lr"])
    assert found.lr == max(RATES) and "highest" in str(found.note)
    found, _ = played(entry, Grid(comparison(), {}, STEPS), lambda unit: -abs(unit["lr"] - 1e-3))
    assert found.note is None


def test_equal_scores_take_the_lower_rate() -> None:
    assert best([0.1, 0.01, 0.3], [1.0, 1.0, None]) == [0.01, 0.1]


class Dying:
    """An executor whose processes die as often as told."""

    def __init__(self, deaths: dict[str, int]) -> None:
        self.deaths, self.unit, self.started = deaths, None, list[str]()

    @property
    def free(self) -> int:
        return int(self.unit is None)

    def start(self, unit: Any) -> None:
        self.unit = unit
        self.started.append(unit["label"])

    def next(self) -> tuple[Unit, Row]:
        unit, self.unit = self.unit, None
        assert unit is not None
        if self.deaths.get(unit["label"], 0):
            self.deaths[unit["label"]] -= 1
            return unit, {"status": "lost", "why": "its process was killed"}
        return unit, {**made(unit, 1.0), "quality": {"loss": 1.0}, "folder": unit["folder"]}

    def close(self) -> None: ...


@pytest.mark.parametrize(("deaths", "status"), [(1, "ok"), (2, "failed")])
def test_a_lost_run_is_done_again_once(tmp_path: Path, deaths: int, status: str) -> None:
    settings = comparison(tmp_path, kind="none").model_copy(update={"seeds": 1})
    lines = [Entry(label, "method", METHOD, (1e-3,)) for label in ("a", "b")]
    grid = Grid(settings, {}, {"a": 10, "b": 10})
    book = Book(settings, lines, tmp_path, Console(quiet=True))
    book.found = {"machine": {}, "versions": {}}
    dying = Dying({"a": deaths})
    _drive({each.label: flow(each, grid) for each in lines}, {each.label: each for each in lines}, dying, book)
    assert [book.entries[label]["status"] for label in ("a", "b")] == [status, "ok"]
    assert dying.started == ["a", "a", "b"]


def test_entries_with_one_change_have_folders_of_their_own(tmp_path: Path) -> None:
    def folders(settings: Compare, hashes: dict[str, str] | None = None) -> Sequence[str]:
        entry = Entry("lora", "method", METHOD, (1e-3,))
        grid = Grid(settings, hashes or {"train": "a"}, {"lora": 30})
        return [grid.trial(entry, 1e-3, 10)["folder"], grid.final(entry, 1e-3, 0)["folder"]]

    first = comparison(tmp_path)
    assert folders(first) == folders(comparison(tmp_path))
    assert not set(folders(first)) & set(folders(first, {"train": "b"}))
    other = first.model_copy(update={"train": first.train.model_copy(update={"batch_size": 2})})
    assert not set(folders(first)) & set(folders(other))
    measured = first.model_copy(update={"max_new_tokens": 7})
    assert folders(first)[0] == folders(measured)[0] and folders(first)[1] != folders(measured)[1]
