"""What a user does to an attached model: compile, low precision, loops, pipelines, checkpoints, odd names, mistakes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graft
from examples import label, perturb, routable
from tiny import batch, checkpointed, tiny

METHODS = [graft.LoRA(rank=3), graft.PrefixTuning(length=3), graft.PromptTuning(length=3)]


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_what_is_in_use_compiles_without_graph_breaks(arch: str) -> None:
    model, data = tiny(arch), dict(batch(arch))
    if arch != "t5":
        data.pop("labels", None)
    for i, method in enumerate(METHODS):
        perturb(graft.attach(model, method, f"m{i}"), i)
    for rows in (["m0"], ["m1"], ["m2"], ["m0", "m1", None, ("m2", "m0")]):
        torch._dynamo.reset()
        with graft.route(model, rows):
            ready = graft.prepare(model, data)
            expected = model(**ready).logits
            # Whose slots a batch has depends on its ids, which no graph holds: soft prompts break it, and stay right.
            compiled = torch.compile(model, backend="eager", fullgraph=not model.adapters.prompted)
            assert torch.allclose(compiled(**ready).logits, expected, atol=1e-6)


@pytest.mark.parametrize("method", routable("llama"), ids=label)
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_train_over_a_bf16_base(method: Any, autocast: bool) -> None:
    model = tiny("llama") if autocast else tiny("llama").to(torch.bfloat16)
    adapter = perturb(graft.attach(model, method))
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    perturb(graft.attach(model, graft.LoRA(), "other"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), graft.route(model, ["default", "other", None, None]):
        out = model(**graft.prepare(model, batch("llama")))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("method", routable("llama"), ids=label)
def test_a_plain_loop_learns_one_batch(method: Any) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = graft.attach(model, method)
    data = graft.prepare(model, batch("llama"))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_a_pipeline_runs_on_an_attached_model(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(99)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w3")
    model = tiny("llama")
    perturb(graft.attach(model, graft.LoRA(rank=3, targets="all-linear")), size=0.3)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    adapted = run("w7 w8 w9", **options)
    graft.use(model, None)
    assert run("w7 w8 w9", **options) != adapted


@torch.no_grad()
@pytest.mark.parametrize("name", ["a.b", "lora", "type", "training", "keys", "0", "dö ü"])
def test_any_name_will_do(name: str) -> None:
    model, data = tiny("gpt2"), batch("gpt2")
    base = model(**data).logits
    perturb(graft.attach(model, graft.LoRA(rank=2), name))
    assert model.adapters[name].name == name
    with graft.route(model, [name, None, name, None]):
        mixed = model(**data).logits
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0])


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", 3])
def test_names_that_cannot_be_folders_are_refused(name: Any) -> None:
    with pytest.raises(graft.ConfigError, match="name"):
        graft.attach(tiny("gpt2"), graft.LoRA(), name)


def test_a_taken_name_is_an_error_and_changes_nothing() -> None:
    model = tiny("gpt2")
    graft.attach(model, graft.LoRA())
    keys = list(model.state_dict())
    with pytest.raises(graft.ConfigError, match="attached already"):
        graft.attach(model, graft.LoRA())
    assert list(model.state_dict()) == keys


def test_a_failed_first_attach_leaves_the_model_alone() -> None:
    model = tiny("gpt2")
    with pytest.raises(graft.SiteError, match="nonsense"):
        graft.attach(model, graft.LoRA(targets=("nonsense",)))
    assert not hasattr(model, "adapters") and all(p.requires_grad for p in model.parameters())


def test_something_else_than_a_method_is_refused() -> None:
    with pytest.raises(graft.ConfigError, match="Graft method or a peft config"):
        graft.attach(tiny("gpt2"), {"rank": 8})


@pytest.mark.parametrize("arch", ["bloom", "falcon"])
def test_attention_that_bypasses_the_interface_is_refused(arch: str) -> None:
    with pytest.raises(graft.SiteError, match="attention interface"):
        graft.attach(tiny(arch), graft.PrefixTuning(length=2))


def test_a_kernel_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(graft.SiteError, match="sdpa"):
        graft.attach(model, graft.PrefixTuning(length=2))


def test_bare_ids_and_embeddings_under_a_soft_prompt_are_errors() -> None:
    model, data = tiny("llama"), batch("llama")
    graft.attach(model, graft.PromptTuning(length=3))
    with pytest.raises(graft.RouteError, match=r"graft\.prepare"):
        model(**data)
    with pytest.raises(graft.RouteError, match=r"graft\.prepare"):
        model.generate(data["input_ids"], max_new_tokens=2)
    with pytest.raises(graft.RouteError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    ready = graft.prepare(model, data)
    graft.attach(model, graft.PromptTuning(length=5), "longer")
    with pytest.raises(graft.RouteError, match="other rows"), graft.route(model, ["longer"]):
        model(**ready)


def test_a_site_that_never_runs_is_an_error() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    graft.attach(model, graft.LoRA(targets=("ffn.down",)))
    with pytest.raises(graft.RouteError, match=r"did not run.*layers\.1\.mlp\.down_proj"):
        model(**batch("llama"))


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny("llama").train()
    graft.attach(model, graft.LoRA())
    checkpointed(model, use_reentrant=True)
    with pytest.raises(graft.ConfigError, match="use_reentrant"):
        model(**batch("llama"))


def test_attention_implementation_comes_back() -> None:
    model = tiny("t5")
    before = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    graft.attach(model, graft.PrefixTuning(length=2), "p")
    graft.attach(model, graft.LoRA(), "l")
    assert model.config._attn_implementation.startswith("graft_")
    graft.detach(model, "p")
    assert {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == before
    graft.detach(model)


def test_flags_come_back_as_they_were() -> None:
    model = tiny("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    graft.attach(model, graft.LoRA())
    assert sum(p.requires_grad for p in model.parameters()) == 4
    graft.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@torch.no_grad()
def test_a_head_trains_and_routes_like_any_delta() -> None:
    model, data = tiny("bert"), batch("bert")
    base = model(**data).logits
    adapter = graft.attach(model, graft.LoRA(rank=2), "a")
    assert "classifier" in adapter.sites
    adapter.at("classifier").copy.bias.add_(1.0)
    with graft.route(model, ["a", None, "a", None]):
        mixed = model(**data).logits
    assert torch.allclose(mixed[0], base[0] + 1.0, atol=1e-6) and torch.allclose(mixed[1], base[1], atol=1e-6)
    assert "classifier" not in graft.attach(model, graft.LoRA(head=False), "b").sites


@torch.no_grad()
def test_modules_to_save_are_copies() -> None:
    model, data = tiny("llama"), batch("llama")
    base = model(**data).logits
    adapter = graft.attach(model, graft.LoRA(modules_to_save=("lm_head",)))
    assert torch.allclose(model(**data).logits, base, atol=1e-6)
    adapter.at("lm_head").copy.weight.zero_()
    assert model(**data).logits.abs().max() == 0 and model.lm_head.weight.abs().max() > 0
    with pytest.raises(graft.SiteError, match="nothing_such"):
        graft.attach(model, graft.LoRA(modules_to_save=("nothing_such",)), "b")


def test_a_deepcopied_submodule_does_not_drag_the_bank_along() -> None:
    model = tiny("bert")
    graft.attach(model, graft.LoRA())
    graft.attach(model, graft.LoRA(), "again")
    inner = model.adapters["again"].at("classifier").copy
    assert not inner._forward_hooks
    assert copy.deepcopy(model.classifier)._forward_hooks


def test_dtype_and_device_moves_keep_working() -> None:
    model, data = tiny("llama"), batch("llama")
    perturb(graft.attach(model, graft.LoRA()))
    model.double()
    assert model(**data).logits.dtype == torch.float64
    model.float()
    model(**data).loss.backward()


def test_switching_adapters_while_training_keeps_gradients_apart() -> None:
    model, data = tiny("llama"), batch("llama")
    perturb(graft.attach(model, graft.LoRA(), "a"))
    perturb(graft.attach(model, graft.LoRA(), "b"))
    graft.use(model, "b")
    model(**data).loss.backward()
    assert all(p.grad is None for p in model.adapters["a"].parameters())
    assert all(p.grad is not None for p in model.adapters["b"].parameters())


def test_a_merged_model_refuses_to_change() -> None:
    model = tiny("llama")
    graft.attach(model, graft.LoRA(), "a")
    graft.merge(model, "a")
    for call in (
        lambda: graft.use(model, None),
        lambda: graft.route(model, [None]),
        lambda: graft.attach(model, graft.LoRA(), "b"),
        lambda: graft.detach(model),
        lambda: graft.merge(model, "a"),
    ):
        with pytest.raises(graft.GraftError, match="merged"):
            call()
    graft.unmerge(model)
    with pytest.raises(graft.MergeError, match="not merged"):
        graft.unmerge(model)


@torch.no_grad()
def test_a_tied_weight_is_only_merged_on_request() -> None:
    model, data = tiny("llama_tied"), batch("llama_tied")
    perturb(graft.attach(model, graft.LoRA(targets=("embedding",))), size=0.3)
    adapted = model(**data).logits
    with pytest.raises(graft.MergeError, match="shares its weight"):
        graft.merge(model, "default")
    graft.merge(model, "default", tied="untie")
    assert torch.allclose(model(**data).logits, adapted, atol=1e-4)
    graft.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bart"])
def test_every_way_to_generate_gives_the_same_greedy_tokens(arch: str) -> None:
    """With a dynamic cache, a static one and none, over rows with a prefix, a prompt, both and neither."""
    model = tiny(arch)
    data = {key: value for key, value in batch(arch).items() if key in ("input_ids", "attention_mask")}
    data["input_ids"], data["attention_mask"] = data["input_ids"][:, :4], torch.ones_like(data["input_ids"][:, :4])
    perturb(graft.attach(model, graft.PrefixTuning(length=3), "prefix"), 1, 0.3)
    perturb(graft.attach(model, graft.PromptTuning(length=2), "prompt"), 2, 0.3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
    with graft.route(model, ["prefix", "prompt", ("prefix", "prompt"), None]):
        ready = graft.prepare(model, data)
        expected = model.generate(**ready, **options)[:, -6:]
        assert torch.equal(model.generate(**ready, **options, use_cache=False)[:, -6:], expected)
        assert torch.equal(model.generate(**ready, **options, cache_implementation="static")[:, -6:], expected)
        sampled = model.generate(**ready, **{**options, "do_sample": True}, num_return_sequences=3)
        assert sampled.shape[0] == 12
    assert len({tuple(row.tolist()) for row in expected}) > 1


def test_a_merge_that_changes_the_logits_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    adapter = perturb(graft.attach(model, graft.LoRA(), "a"), size=0.3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = type(adapter.at("model.layers.0.self_attn.q_proj"))
    monkeypatch.setattr(wrong, "weight_delta", lambda self: torch.ones(self.B.shape[0], self.A.shape[1]))
    with pytest.raises(graft.MergeError, match="does not compute"):
        graft.merge(model, "a")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    graft.use(model, "a")
