"""Many adapters in one batch: every form equals the loop, rows equal their own runs, and nothing kept is stale."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import graft
from graft.fast import mixed
from graft.fast.mixed import Tables
from tiny import FIRST_TOKEN, VOCAB, tiny

RANKS = (2, 4, 16, 3)
ROWS: list[Any] = ["a0", "a1", None, "a2", "a0", {"a0": 0.5, "a1": -1.5}, "a3", ("a1", "a2"), "a0"]
EVEN: list[Any] = ["a0", "a0", "a1", "a1", "a2", "a2"]
ALONE: list[Any] = ["a3", "a2", "a1", "a0"]
TURNS: list[Any] = ["a0", "a1", "a2", "a3"] * 2


def filled(arch: str = "llama", dtype: torch.dtype = torch.float32, trainable: bool = False) -> PreTrainedModel:
    """A model with four adapters of different ranks and values."""
    model = tiny(arch).to(dtype)
    for i, rank in enumerate(RANKS):
        adapter = graft.attach(model, graft.LoRA(rank=rank, targets="all-linear"), f"a{i}", trainable=trainable)
        values = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0.0, 0.3, generator=values)
    return model.eval()


def ids(rows: int, tokens: int = 5) -> Tensor:
    return torch.randint(FIRST_TOKEN, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(7))


def run(model: PreTrainedModel, rows: list[Any], tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad(), graft.route(model, rows):
        return model(input_ids=tokens, **more).logits


def kept(model: PreTrainedModel) -> Tables:
    tables: Tables = model.adapters.last.tables
    return tables


def looped(model: PreTrainedModel, rows: list[Any], tokens: Tensor, **more: Any) -> Tensor:
    with mixed.prefer("loop"):
        return run(model, rows, tokens, **more)


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    yield filled()


@pytest.mark.parametrize("form", ["stacked", "grouped"])
@pytest.mark.parametrize("rows", [ROWS, EVEN, ALONE, ["a0", None, None]], ids=["mixed", "even", "alone", "two"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_each_form_equals_the_loop_and_each_row_its_own_run(arch: str, rows: list[Any], form: str) -> None:
    model, tokens = filled(arch), ids(len(rows))
    more = {"decoder_input_ids": ids(len(rows), 3)} if arch == "t5" else {}
    expected = looped(model, rows, tokens, **more)
    with mixed.prefer(form):
        found = [run(model, rows, tokens, **more) for _ in range(2)]
        assert len(kept(model)) > 0
    near: dict[str, Any] = {"atol": 2e-5 * max(1.0, float(expected.abs().max())), "rtol": 1e-4}
    torch.testing.assert_close(found[0], expected, **near)
    assert torch.equal(found[1], found[0])
    for i, row in enumerate(rows):
        own = {key: value[i : i + 1] for key, value in more.items()}
        alone = run(model, [row], tokens[i : i + 1], **own)[0]
        torch.testing.assert_close(found[0][i], alone, **near)


@pytest.mark.parametrize("rows", [ROWS, ALONE, TURNS, sorted(TURNS)], ids=["mixed", "alone", "turns", "sorted"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_bf16_equals_the_loop_to_its_rounding(rows: list[Any], tokens: int) -> None:
    """The median over tokens: there are some that any rounding moves far, the loop's as well."""
    model, batch = filled(dtype=torch.bfloat16), ids(len(rows), tokens)
    found, loop = run(model, rows, batch).float(), looped(model, rows, batch).float()
    exact = run(filled(dtype=torch.bfloat16).float(), rows, batch)
    errors = [(each - exact).norm(dim=-1).median() for each in (found, loop)]
    assert errors[0] <= 1.2 * errors[1]
    torch.testing.assert_close(found, loop, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("rows", [ALONE, TURNS], ids=["alone", "turns"])
def test_what_is_kept_in_bf16_serves_one_token_and_many_and_is_made_anew(rows: list[Any]) -> None:
    model, shapes = filled(dtype=torch.bfloat16), (5, 1)
    before = [run(model, rows, ids(len(rows), tokens)) for tokens in shapes]
    for tokens, expected in zip(shapes, before, strict=True):
        assert torch.equal(run(model, rows, ids(len(rows), tokens)), expected)
    write(model)
    for tokens, old in zip(shapes, before, strict=True):
        batch = ids(len(rows), tokens)
        found = run(model, rows, batch)
        torch.testing.assert_close(found, looped(model, rows, batch), atol=0.2, rtol=0.1)
        changed = [not torch.equal(mine, theirs) for mine, theirs in zip(found, old, strict=True)]
        assert changed == [row == "a1" for row in rows]


def test_rows_of_the_base_are_the_bare_base_bit_for_bit(model: PreTrainedModel) -> None:
    for tokens in (1, 5):
        batch = ids(len(ROWS), tokens)
        with torch.no_grad():
            bare = tiny("llama")(input_ids=batch).logits
        for _ in range(2):
            found = run(model, ROWS, batch)
            assert torch.equal(found[2], bare[2]) and not torch.equal(found[0], bare[0])
        assert torch.equal(run(model, [None] * len(ROWS), batch), bare)


def test_decoding_with_a_cache_equals_one_forward(model: PreTrainedModel) -> None:
    tokens = ids(len(ROWS), 6)
    whole, cache = run(model, ROWS, tokens), DynamicCache(config=model.config)
    for i in range(6):
        step = run(model, ROWS, tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step[:, 0], whole[:, i], atol=2e-5, rtol=1e-4)


def write(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.adapters["a1"].parameters():
            parameter.mul_(1.5)


def write_once(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.adapters["a1"].at("model.layers.1.mlp.down_proj").B.mul_(-1.0)


def replace(model: PreTrainedModel) -> None:
    delta = model.adapters["a1"].at("model.layers.1.mlp.down_proj")
    delta.A = torch.nn.Parameter(-2 * delta.A.detach(), requires_grad=False)


def swap_data(model: PreTrainedModel) -> None:
    for parameter in model.adapters["a1"].parameters():
        parameter.data = 1.5 * parameter.data


def turn(model: PreTrainedModel) -> None:
    model.adapters["a1"].scale = 3.0


def change(model: PreTrainedModel) -> None:
    graft.detach(model, "a1")
    graft.attach(model, graft.LoRA(rank=4, targets="all-linear", init="random"), "a1", trainable=False)


def move(model: PreTrainedModel) -> None:
    model.to(torch.float64)
    write(model)


def drop(model: PreTrainedModel) -> None:
    model.adapters.drop(model.adapters["a1"], "model.layers.0.self_attn.q_proj")


CHANGES = [write, write_once, replace, swap_data, turn, change, move, drop]


@pytest.mark.parametrize("act", CHANGES, ids=lambda act: act.__name__)
def test_what_is_kept_is_made_anew_after_a_change(model: PreTrainedModel, act: Any) -> None:
    tokens = ids(len(ROWS))
    before = run(model, ROWS, tokens)
    assert len(kept(model)) == 14
    act(model)
    found = run(model, ROWS, tokens)
    torch.testing.assert_close(found, looped(model, ROWS, tokens), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found[1].float(), before[1], atol=1e-3)


@pytest.mark.parametrize("act", [write, turn], ids=["write", "turn"])
def test_a_change_between_two_steps_of_one_text_is_seen(model: PreTrainedModel, act: Any) -> None:
    found = []
    for form in ("stacked", "loop"):
        other, cache, tokens = copy.deepcopy(model), DynamicCache(config=model.config), ids(len(ROWS), 6)
        with mixed.prefer(form):
            run(other, ROWS, tokens[:, :4], past_key_values=cache, use_cache=True)
            run(other, ROWS, tokens[:, 4:5], past_key_values=cache, use_cache=True)
            act(other)
            found.append(run(other, ROWS, tokens[:, 5:], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_a_copy_starts_with_nothing_and_shares_nothing(model: PreTrainedModel) -> None:
    tokens = ids(len(ROWS))
    before = run(model, ROWS, tokens)
    twin = copy.deepcopy(model)
    assert len(kept(twin)) == 0 and len(kept(model)) == 14
    write(twin)
    assert not torch.allclose(run(twin, ROWS, tokens)[1], before[1], atol=1e-3)
    assert torch.equal(run(model, ROWS, tokens), before)


def test_only_the_last_route_is_kept_and_an_equal_one_goes_on_with_it(model: PreTrainedModel) -> None:
    run(model, ROWS, ids(len(ROWS)))
    first = kept(model)
    tables = dict(first)
    run(model, list(ROWS), ids(len(ROWS)))
    assert kept(model) is first and all(first[path] is table for path, table in tables.items())
    run(model, EVEN, ids(len(EVEN)))
    assert len(first) == 0 and len(kept(model)) == 14
    graft.detach(model, "a3")
    assert len(kept(model)) == 0


def test_nothing_is_kept_of_what_trains_or_of_training_mode(model: PreTrainedModel) -> None:
    tokens = ids(len(ROWS))
    trained = filled(trainable=True)
    run(trained, ROWS, tokens)
    assert len(kept(trained)) == 0
    run(model.train(), ROWS, tokens)
    assert len(kept(model)) == 0
    run(model.eval(), ROWS, tokens)
    with graft.route(model, ROWS):
        model(input_ids=tokens)
    assert len(kept(model)) == 0


def test_dropout_in_training_mode_is_not_lost(model: PreTrainedModel) -> None:
    graft.attach(model, graft.LoRA(rank=4, targets="all-linear", dropout=0.5, init="random"), "drops", trainable=False)
    rows, tokens = ["a0", "drops", "a1"], ids(3)
    first = run(model, rows, tokens)
    model.adapters["drops"].train()
    found = run(model, rows, tokens)
    assert not torch.allclose(found[1], first[1], atol=1e-4)
    torch.testing.assert_close(found[[0, 2]], first[[0, 2]], atol=2e-5, rtol=1e-4)


def test_other_methods_act_beside_the_sum(model: PreTrainedModel) -> None:
    graft.attach(model, graft.IA3(), "ia3", trainable=False)
    graft.attach(model, graft.DoRA(rank=4, targets="all-linear", init="random"), "dora", trainable=False)
    with torch.no_grad():
        for parameter in model.adapters["ia3"].parameters():
            parameter.normal_(1.0, 0.3)
    rows, tokens = ["a0", "ia3", "dora", None, "a1", ("a0", "ia3")], ids(6)
    found = run(model, rows, tokens)
    torch.testing.assert_close(found, looped(model, rows, tokens), atol=2e-5, rtol=1e-4)
    assert torch.equal(run(model, rows, tokens), found)


def test_gradients_of_the_stacked_form_equal_the_loop() -> None:
    model, tokens = filled(trainable=True), ids(len(ROWS))
    found = []
    for form in ("stacked", "loop"):
        model.zero_grad()
        with mixed.prefer(form), graft.route(model, ROWS):
            model(input_ids=tokens).logits.square().mean().backward()
        found.append([p.grad.clone() for a in model.adapters for p in a.parameters() if p.grad is not None])
    assert len(found[0]) == 4 * 14 * 2
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_gradients_of_rows_in_turns_equal_the_loop_in_bf16_to_its_rounding() -> None:
    tokens, found = ids(len(TURNS)), []
    for form, dtype in (("stacked", torch.bfloat16), ("loop", torch.bfloat16), ("loop", torch.float32)):
        model = filled(dtype=torch.bfloat16, trainable=True).to(dtype)
        with mixed.prefer(form), graft.route(model, TURNS):
            model(input_ids=tokens).logits.float().square().mean().backward()
        gradients = [p.grad.float().flatten() for a in model.adapters for p in a.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    stacked, loop, exact = found
    assert 0 < (stacked - loop).norm() <= (loop - exact).norm() < 0.6 * exact.norm()


@pytest.mark.parametrize("counts", [(1,), (4, 4, 4), (49, *[1] * 15), (64, 1), (3, 5, 2, 7)])
def test_pieces_hold_every_row_and_are_never_more_than_rows(counts: tuple[int, ...]) -> None:
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    rows = list(order.split(list(counts)))
    plan = mixed._plan(rows, sum(counts), {})
    places = plan.gather if plan.real is None else plan.gather[plan.real]
    assert torch.equal(places, torch.cat(rows)) and torch.equal(plan.rows, torch.cat(rows))
    assert len(plan.gather) // plan.length <= sum(counts)
    assert len(set(counts)) > 1 or (plan.length, plan.owner) == (counts[0], None)
