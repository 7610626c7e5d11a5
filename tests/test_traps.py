"""What a review found wrong without a word: each stays a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graft
from examples import perturb
from tiny import batch, tiny


def ready(arch: str = "llama") -> dict[str, Any]:
    data = dict(batch(arch))
    data.pop("labels", None)
    return data


@torch.no_grad()
def test_a_second_prompt_after_a_detach_still_moves_the_pooler() -> None:
    model, data = tiny("bert"), ready("bert")
    perturb(graft.attach(model, graft.LoRA(targets=("embedding",)), "l"), 1, 0.3)
    perturb(graft.attach(model, graft.PromptTuning(length=3), "p"), 2, 0.3)
    with graft.route(model, ["p"]):
        expected = model(**graft.prepare(model, data)).logits
    kept = model.adapters["p"].at("bert.embeddings.word_embeddings").prompt.clone()
    graft.detach(model, "p")
    again = graft.attach(model, graft.PromptTuning(length=3), "q")
    again.at("bert.embeddings.word_embeddings").prompt.copy_(kept)
    perturbed = perturb(graft.attach(tiny("bert"), graft.PromptTuning(length=3), "p"), 2, 0.3)
    again.at("classifier").copy.load_state_dict(perturbed.at("classifier").copy.state_dict())
    with graft.route(model, ["q"]):
        assert torch.allclose(model(**graft.prepare(model, data)).logits, expected, atol=1e-6)


@pytest.mark.parametrize("method", [graft.FullFineTuning(), graft.TopLayers(count=1)], ids=lambda m: m.name)
@pytest.mark.parametrize("trainable", [True, False])
def test_flags_come_back_after_methods_that_train_the_base(method: Any, trainable: bool) -> None:
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    graft.attach(model, method, trainable=trainable)
    graft.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@torch.no_grad()
def test_preparing_twice_adds_slots_once() -> None:
    model, data = tiny("llama"), ready()
    graft.attach(model, graft.PromptTuning(length=3))
    once = graft.prepare(model, data)
    assert graft.prepare(model, once)["input_ids"].shape == once["input_ids"].shape


@torch.no_grad()
def test_a_prepared_batch_is_refused_under_another_route() -> None:
    model, data = tiny("llama"), ready()
    graft.attach(model, graft.PromptTuning(length=3), "p")
    graft.attach(model, graft.LoRA(), "l")
    with graft.route(model, ["p"]):
        prepared = graft.prepare(model, data)
    for rows in ([None], ["l"], ["p", "p", None, "p"]):
        with graft.route(model, rows), pytest.raises(graft.RouteError, match="other rows"):
            model(**prepared)
    with graft.route(model, [None]):
        model(**data)


@torch.no_grad()
def test_a_prefix_survives_a_change_of_the_attention() -> None:
    model, data = tiny("llama"), ready()
    perturb(graft.attach(model, graft.PrefixTuning(length=3)), 1, 0.3)
    expected = model(**data).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(**data).logits, expected, atol=1e-5)
    graft.detach(model)
    assert model.config._attn_implementation == "eager"


def test_answers_to_questions_move_with_the_slots() -> None:
    model = tiny("llama")
    graft.attach(model, graft.PromptTuning(length=3))
    data = {"input_ids": torch.arange(5, 15).view(2, 5), "start_positions": torch.tensor([1, 2])}
    data["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    data["labels"] = data["input_ids"].clone()  # labels: padded on the right
    new = graft.prepare(model, data)
    assert new["start_positions"].tolist() == [4, 4]
    assert new["input_ids"][1, 4] == data["input_ids"][1, 2]


def test_routes_end_by_themselves_and_merges_wait_for_them() -> None:
    model = tiny("llama")
    graft.attach(model, graft.LoRA(), "a")
    first, second = graft.route(model, ["a"]), graft.route(model, [None])
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert model.adapters.current is second.route
    with pytest.raises(graft.MergeError, match="has not ended"):
        graft.merge(model, "a")
    second.__exit__()
    assert not model.adapters.routes
    stale = graft.route(model, ["a"])
    graft.merge(model, "a")
    with pytest.raises(graft.RouteError, match="merged"), stale:
        pass
    graft.unmerge(model)
    with stale, pytest.raises(graft.RouteError, match="not ended"):
        graft.detach(model, "a")


def test_a_graph_from_before_a_merge_is_refused_by_autograd() -> None:
    model = tiny("llama")
    perturb(graft.attach(model, graft.LoRA(targets="all-linear")))
    loss = model(**batch("llama")).loss
    graft.merge(model, "default")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_trained_whole_takes_nothing_inside_it() -> None:
    for method in (
        graft.Bottleneck(size=3, modules_to_save=("mlp",)),
        graft.PromptTuning(length=2, modules_to_save=("embed_tokens",)),
        graft.LoRA(modules_to_save=("mlp", "down_proj")),
    ):
        with pytest.raises(graft.SiteError, match="trained whole"):
            graft.attach(tiny("llama"), method)


def test_packed_texts_that_would_see_each_other_are_refused() -> None:
    model = tiny("llama")
    graft.attach(model, graft.LoRA(), "a")
    ids, positions = torch.arange(5, 12)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with graft.route(model, segments=[("a", 4), (None, 3)]):
        with pytest.raises(graft.RouteError, match="use_cache=False"):
            model(input_ids=ids, position_ids=positions)
        with pytest.raises(graft.RouteError, match="attention_mask"):
            model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)


def test_a_bias_that_a_saved_model_would_lose_is_not_merged() -> None:
    model = tiny("llama")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    perturb(graft.attach(model, graft.LoRA(lora_bias=True)))
    with pytest.raises(graft.MergeError, match="no bias"):
        graft.merge(model, "default")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items() if key in weights)


def test_an_attach_that_fails_half_way_undoes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise graft.SiteError("on purpose")

    model = tiny("llama")
    monkeypatch.setattr("graft.interface.seat", fails)
    with pytest.raises(graft.SiteError, match="on purpose"):
        graft.attach(model, graft.PrefixTuning(length=2))
    assert not hasattr(model, "adapters") and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mistakes_that_did_nothing_are_errors() -> None:
    model = tiny("gpt2")
    wrong: list[tuple[Any, str]] = [
        (graft.LoRA, "not the class"),
        (graft.LoRA(rank_pattern={"nope": 3}), "nope"),
        (graft.LoRA(layers=99), "from 1 to 2"),
        (graft.LoRA(targets="c_attn"), r"\[c_attn\]"),
    ]
    for method, match in wrong:
        with pytest.raises(graft.GraftError, match=match):
            graft.attach(model, method)
    for settings in ({"text": "Hello"}, {"labels": ("a",)}):
        with pytest.raises(graft.ConfigError, match="only read with"):
            graft.PromptTuning(**settings)
    with pytest.raises(graft.ConfigError, match="alpha"):
        graft.LoRA(alpha=0)
    with pytest.raises(graft.SiteError, match="relative_attention_bias"):
        graft.attach(tiny("t5"), graft.LoRA(targets=("relative_attention_bias",)))


def test_gradients_through_a_checkpointed_base_model_keep_their_route() -> None:
    from tiny import checkpointed

    grads = []
    for on in (False, True):
        model = tiny("llama").train()
        perturb(graft.attach(model, graft.LoRA(), "a"))
        if on:
            checkpointed(model)
        graft.use(model, None)
        with graft.route(model, ["a"]):
            out: torch.Tensor = model.model(input_ids=torch.arange(5, 11)[None]).last_hidden_state
        nn.functional.mse_loss(out, torch.zeros_like(out)).backward()
        grads.append([p.grad for p in model.adapters["a"].parameters()])
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*grads, strict=True) if x is not None)
    assert any(x is not None for x in grads[1])


@pytest.mark.parametrize("arch", ["t5", "mt5", "bart"])
@pytest.mark.parametrize(
    "method",
    [
        graft.LoRA(targets=("shared",)),
        graft.DoRA(targets=("shared", "attention.query")),
        graft.LoRA(modules_to_save=("shared",)),
        graft.Compose(graft.LoRA(targets=("shared",)), graft.PrefixTuning(length=2)),
    ],
    ids=lambda method: method.name,
)
def test_a_table_that_never_runs_is_refused_at_once(arch: str, method: Any) -> None:
    """T5's `shared` owns the weight that its stacks' own embeddings read; those can be adapted."""
    model, data = tiny(arch), batch(arch)
    with pytest.raises(graft.SiteError, match=r"shared does not run: .* reads .*encoder.embed_tokens and .*name those"):
        graft.attach(model, method)
    assert not hasattr(model, "adapters")
    adapter = graft.attach(model, graft.LoRA(targets=("embedding",)))
    assert len(adapter.sites) == 2
    model(**data)


@torch.no_grad()
def test_what_was_in_use_beside_a_detached_adapter_stays_in_use(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny("llama"), batch("llama")
    for i, name in enumerate("abc"):
        perturb(graft.attach(model, graft.LoRA(rank=2), name), i, 0.3)
    perturb(graft.attach(model, graft.Compose(graft.LoRA(rank=2), graft.IA3()), "whole"), 4, 0.3)
    with graft.route(model, [{"a": 0.5, "c": 1.0}] * 4):
        expected = model(**data).logits
    graft.use(model, {"a": 0.5, "b": 1.0, "whole/lora": 1.0, "c": 1.0, "whole/ia3": 2.0})
    graft.detach(model, "whole")
    assert "adapter 'whole' was in use with others; now a and b and c act without it" in caplog.text
    graft.detach(model, "b")
    assert "adapter 'b' was in use with others; now a and c act without it" in caplog.text
    assert torch.equal(model(**data).logits, expected)
    caplog.clear()
    graft.use(model, "a")
    graft.detach(model, "a")
    assert torch.equal(model(**data).logits, tiny("llama")(**data).logits)
    graft.attach(model, graft.LoRA(rank=2), "d")
    graft.use(model, ("c", "d"))
    graft.detach(model)
    assert not caplog.text and not hasattr(model, "adapters")
