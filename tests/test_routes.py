"""Routes: what an entry may be, how rows and runs of tokens become groups, and every way to get it wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from examples import perturb
from graft.routes import Route, entry_of
from tiny import batch, tiny

CPU = torch.device("cpu")


def model_with(*names: str, arch: str = "llama") -> Any:
    model = tiny(arch)
    for i, name in enumerate(names):
        perturb(graft.attach(model, graft.LoRA(rank=2), name), i)
    return model


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (None, ()),
        ("a", (("a", 1.0),)),
        (("a", "b"), (("a", 1.0), ("b", 1.0))),
        (["a"], (("a", 1.0),)),
        ({"a": 0.5, "b": 2}, (("a", 0.5), ("b", 2.0))),
        ((), ()),
    ],
)
def test_entries(value: Any, entry: Any) -> None:
    assert entry_of(value) == entry


@pytest.mark.parametrize("value", [3, ("a", "a"), {"a": "x"}, {"a": True}, (1, 2)])
def test_bad_entries(value: Any) -> None:
    with pytest.raises(graft.RouteError, match="entry"):
        entry_of(value)


def test_a_list_that_divides_the_batch_repeats_each_entry_consecutively() -> None:
    groups = Route.of_rows(["a", None]).groups(6, CPU)
    assert [(g.entry, g.index.tolist()) for g in groups] == [((("a", 1.0),), [0, 1, 2]), ((), [3, 4, 5])]


def test_equal_entries_share_a_group() -> None:
    groups = Route.of_rows(["a", "b", "a", "b"]).groups(4, CPU)
    assert [g.index.tolist() for g in groups] == [[0, 2], [1, 3]]


def test_segments_are_runs_of_tokens() -> None:
    groups = Route.of_segments([("a", 2), (None, 1), ("a", 3)]).groups(6, CPU)
    assert [g.index.tolist() for g in groups] == [[0, 1, 3, 4, 5], [2]]


@pytest.mark.parametrize("rows", [["a", "a", "a"], ["a", None, "a"], ["a"] * 8])
def test_a_list_of_another_length_is_an_error(rows: list[Any]) -> None:
    model = model_with("a")
    with pytest.raises(graft.RouteError, match="rows"), graft.route(model, rows):
        model(**batch("llama"))


def test_segments_of_another_length_are_an_error() -> None:
    model = model_with("a")
    with pytest.raises(graft.RouteError, match="segments have 5 tokens"), graft.route(model, segments=[("a", 5)]):
        model(input_ids=torch.arange(5, 11)[None])
    with (
        pytest.raises(graft.RouteError, match="segments have 9 tokens"),
        graft.route(model, segments=[("a", 5), (None, 4)]),
    ):
        model(input_ids=torch.arange(5, 11)[None])


@pytest.mark.parametrize("rows", [[], "a", {"a": 1.0}])
def test_rows_are_a_list(rows: Any) -> None:
    model = model_with("a")
    with pytest.raises(graft.RouteError, match="rows"):
        graft.route(model, rows)


def test_unknown_names_are_refused_at_once() -> None:
    model = model_with("a")
    for call in (
        lambda: graft.use(model, "b"),
        lambda: graft.route(model, ["b"]),
        lambda: graft.detach(model, "b"),
        lambda: graft.prepare(model, {"input_ids": torch.ones(1, 2)}, ["b"]),
    ):
        with pytest.raises(graft.RouteError, match="no adapter is named 'b'; attached: a"):
            call()
    with pytest.raises(graft.RouteError, match="no adapters"):
        graft.use(tiny("llama"), "a")
    with pytest.raises(graft.RouteError, match="either rows or segments"):
        graft.route(model)


@torch.no_grad()
def test_the_inner_route_holds_and_both_end_even_on_errors() -> None:
    model, data = model_with("a", "b"), batch("llama")
    graft.use(model, "a")
    used = model(**data).logits
    with graft.route(model, ["b"]):
        outer = model(**data).logits
        with pytest.raises(KeyError), graft.route(model, [None]):
            base = model(**data).logits
            raise KeyError
        assert torch.equal(model(**data).logits, outer)
    assert torch.equal(model(**data).logits, used)
    assert not torch.equal(used, outer) and not torch.equal(outer, base)


@torch.no_grad()
def test_use_inside_a_route_takes_effect_after_it() -> None:
    model, data = model_with("a", "b"), batch("llama")
    graft.use(model, "b")
    b = model(**data).logits
    graft.use(model, "a")
    with graft.route(model, [None]):
        base = model(**data).logits
        graft.use(model, "b")
        assert torch.equal(model(**data).logits, base)
    assert torch.equal(model(**data).logits, b)


@torch.no_grad()
def test_weights_and_the_dial_scale_the_change() -> None:
    """On one linear, LoRA's change is linear in its weight: compare with a hand-scaled B."""
    model, data = model_with("a"), batch("llama")
    with graft.route(model, [{"a": 0.25}]):
        weighted = model(**data).logits
    model.adapters["a"].scale = 0.25
    dialled = model(**data).logits
    model.adapters["a"].scale = 1.0
    for _, delta in model.adapters["a"].items():
        delta.B.mul_(0.25)
    by_hand = model(**data).logits
    assert torch.allclose(weighted, by_hand, atol=1e-6) and torch.allclose(dialled, by_hand, atol=1e-6)


def test_prompts_and_prefixes_have_no_weight() -> None:
    model = tiny("llama")
    graft.attach(model, graft.PrefixTuning(length=2), "p")
    with pytest.raises(graft.RouteError, match="can only have weight 1"):
        graft.use(model, {"p": 0.5})


@torch.no_grad()
def test_beams_repeat_rows() -> None:
    model, data = model_with("a"), batch("llama", rows=2)
    data.pop("labels", None)
    twice = {key: value.repeat_interleave(2, 0) for key, value in data.items()}
    with graft.route(model, ["a", None]):
        short = model(**data).logits
        assert torch.allclose(model(**twice).logits, short.repeat_interleave(2, 0), atol=1e-6)
