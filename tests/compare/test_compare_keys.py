"""Which runs a change makes anew: those whose result it may change, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_here import Here
from rich.console import Console

from graft.compare import before
from graft.compare.grid import Entry, Grid, entries, read_row
from graft.compare.run import compare
from graft.compare.settings import BASE, ICL, Compare
from graft.errors import ConfigError

QUIET = Console(quiet=True)
FACTS = {"base": "b", "train": "t", "test": "x", "forgetting": "f"}
ALL = {"trial", "final", "base", "icl"}

Build = Callable[..., Compare]


def keys(settings: Compare, facts: dict[str, str] = FACTS) -> dict[str, str]:
    """The folder of a unit of each kind."""
    grid, lora = Grid(settings, facts, {"lora": 30}), Entry("lora", "method", {"method": "lora"}, (1e-3, 1e-2))
    units = {"trial": grid.trial(lora, 1e-3, 10), "final": grid.final(lora, 1e-3, 0)}
    units |= {kind: grid.baseline(Entry(kind, kind), 0) for kind in (BASE, ICL)}
    return {kind: unit["folder"] for kind, unit in units.items()}


TRAIN = {"max_steps": 4, "batch_size": 4, "log_every": 2, "save_every": 2}


@pytest.mark.parametrize(
    ("parts", "anew"),
    [
        ({"title": "another"}, set()),
        ({"keep": "results"}, set()),
        ({"search": {"metric": "accuracy"}}, {"trial"}),
        ({"baselines": {"full": False, "icl": {"shots": 2}}}, {"icl"}),
        ({"baselines": {"full": False, "icl": {"template": {"task": "sentiment"}}}}, {"icl", "base"}),
        ({"train": TRAIN | {"epochs": 2}}, {"trial", "final"}),
        ({"train": TRAIN | {"lr": 1}}, set()),
        ({"train": TRAIN | {"eval_batch_size": 2}}, ALL),
        ({"train": TRAIN | {"eval_batch_size": 4}}, {"trial", "final"}),
        ({"test": "another.jsonl"}, {"final", "base", "icl"}),
        ({"metrics": ["perplexity"]}, {"final", "base", "icl"}),
        ({"forgetting": "general.txt"}, {"final"}),
        ({"latency": True}, {"final", "icl"}),
        ({"precision": "bf16"}, ALL),
        ({"device": "cpu"}, ALL),
    ],
    ids=lambda each: None if isinstance(each, set) else str(each),  # a set has no order
)
def test_a_change_makes_new_what_it_concerns(settings: Build, parts: dict[str, Any], anew: set[str]) -> None:
    first, second = keys(settings()), keys(settings(**parts))
    assert {kind for kind in first if first[kind] != second[kind]} == anew


@pytest.mark.parametrize(
    ("fact", "anew"),
    [("base", ALL), ("train", ALL), ("test", {"final", "base", "icl"}), ("forgetting", {"final"})],
)
def test_so_does_another_content(settings: Build, fact: str, anew: set[str]) -> None:
    asked = settings(forgetting="general.txt")
    first, second = keys(asked), keys(asked, FACTS | {fact: "another"})
    assert {kind for kind in first if first[kind] != second[kind]} == anew


def test_whole_runs_that_choose_the_rate_go_by_the_metric(settings: Build) -> None:
    loss, accuracy = (keys(settings(search={"kind": "exhaustive", "metric": name})) for name in ("loss", "accuracy"))
    assert loss["final"] != accuracy["final"] and loss["base"] == accuracy["base"]


def test_which_gpu_it_is_makes_nothing_new(settings: Build) -> None:
    """The worker sees one alone, as `cuda`."""
    assert keys(settings(device="cuda:1")) == keys(settings(device="cuda:0")) == keys(settings(device="cuda"))
    unit = Grid(settings(device="cuda:1"), {}, {}).baseline(Entry(BASE, BASE), 0)
    assert unit["run"]["device"] == "cuda"


def test_adapters_that_an_earlier_start_did_not_keep_are_made(settings: Build, here: Here, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"seeds": 1, "search": {"kind": "none"}, "baselines": {"full": False, "icl": False}}
    compare(settings(keep="results", **parts), console=QUIET)
    assert [unit["kind"] for unit in here.done] == ["final", "base"] and not list(tmp_path.rglob("adapter"))
    compare(settings(keep="adapters", **parts), console=QUIET)
    assert [unit["kind"] for unit in here.done[2:]] == ["final"] and len(list(tmp_path.rglob("adapter"))) == 1
    compare(settings(keep="results", **parts), console=QUIET)
    compare(settings(keep="adapters", **parts), console=QUIET)
    assert len(here.done) == 3
    row = read_row(here.done[2])
    assert row is not None and row["status"] == "ok"


# -------------------------------------------------------------------------------------------------- on Ray


def on_ray(settings: Compare, gpus: float) -> Compare:
    asked = settings.executor.model_copy(update={"kind": "ray", "gpus": gpus})
    return settings.model_copy(update={"executor": asked})


def test_under_ray_a_gpu_makes_new_rows(settings: Build) -> None:
    run, data, rows = before.checked(settings())
    found = [before.facts_of(on_ray(settings(), gpus), run, data, rows) for gpus in (0, 1, 0.5)]
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize("parts", [{"device": "cuda"}, {"precision": "nf4"}], ids=str)
def test_under_ray_this_machine_need_not_have_what_a_run_needs(
    settings: Build, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither a GPU nor bitsandbytes; on this machine alone the same is refused."""
    monkeypatch.setattr("graft.base.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = settings(**parts)
    with pytest.raises(ConfigError):
        before.checked(asked)
    asked = on_ray(asked, 1)
    _, data, _ = before.checked(asked)
    steps, unfit = before.fits(entries(asked), asked, data, tmp_path)
    assert steps == {"lora": 4} and unfit == {}


def test_what_no_machine_can_take_is_skipped_under_ray_too(settings: Build, tmp_path: Path) -> None:
    asked = on_ray(settings(methods=["bitfit"]), 1)
    _, data, _ = before.checked(asked)
    assert "bias" in before.fits(entries(asked), asked, data, tmp_path)[1]["bitfit"]


# -------------------------------------------------------------------------------------------------- the machine


def test_every_row_says_where_it_was_made(settings: Build, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, Any] = {"seeds": 1, "search": {"kind": "none"}, "baselines": {"full": False, "icl": False}}
    found = compare(settings(**parts), console=QUIET)
    rows = [json.loads((Path(unit["folder"]) / "row.json").read_text()) for unit in here.done]
    assert [row["kind"] for row in rows] == ["final", "base"] and rows[0]["machine"] == rows[1]["machine"]
    assert rows[0]["versions"] == rows[1]["versions"] and rows[0]["machine"]["processor"]
    assert not any("one machine" in note for note in found["notes"])
    monkeypatch.setattr("graft.train.result._cpu", lambda: "another")
    found = compare(settings(**parts | {"methods": ["ia3"]}), console=QUIET)
    assert [unit["label"] for unit in here.done[2:]] == ["ia3"]  # the base's row is the first machine's
    assert any("one machine" in note for note in found["notes"])
