"""BitFit against the same biases written into the base by hand, and the paper's counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_counts import meta, total
from torch import Tensor, nn
from twins import adapted, close, data_of, far, lively

import graft
from graft.method import CopyDelta, from_dict
from graft.methods.bitfit import BitFitDelta
from tiny import IDS, VOCAB, tiny

WITH_BIASES = ("bert", "gpt2", "bart", "qwen2", "opt", "gpt_neox")


@torch.no_grad()
def by_hand(arch: str, adapter: Any) -> nn.Module:
    """The tiny model with every trained bias in place of its own."""
    model = lively(arch)
    for site, delta in adapter.items():
        module = model.get_submodule(site.path)
        assert isinstance(delta, BitFitDelta) and module.bias.shape == delta.bias.shape
        module.bias.copy_(delta.bias)
    return model


@pytest.mark.parametrize("arch", WITH_BIASES)
def test_equals_biases_written_into_the_base(arch: str) -> None:
    model, data = adapted(arch, graft.BitFit(head=False)), data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, by_hand(arch, model.adapters["a"])(**data).logits)


@pytest.mark.parametrize("arch", WITH_BIASES)
def test_takes_every_bias_of_the_base_and_nothing_else(arch: str) -> None:
    model = tiny(arch)
    heads = ("classifier.", "score.")
    wanted = {n for n, _ in model.named_parameters() if n.endswith(".bias") and not n.startswith(heads)}
    adapter = graft.attach(model, graft.BitFit(head=False))
    assert {f"{site.path}.bias" for site, _ in adapter.items()} == wanted
    assert all(set(dict(delta.named_parameters())) == {"bias"} for _, delta in adapter.items())


def test_gradients_are_those_of_the_base_s_own_biases() -> None:
    model, data = adapted("gpt2", graft.BitFit()), data_of("gpt2")
    hand = by_hand("gpt2", model.adapters["a"])
    for each in (model, hand):
        each(**data).logits.square().sum().backward()
    for site, delta in model.adapters["a"].items():
        expected = hand.get_submodule(site.path).bias.grad
        close(delta.bias.grad, expected, 1e-4)


def test_the_query_of_a_fused_linear_alone() -> None:
    model, data = adapted("gpt2", graft.BitFit(biases="query_ffn")), data_of("gpt2")
    hand, adapter = lively("gpt2"), model.adapters["a"]
    assert [delta.bias.numel() for _, delta in adapter.items()] == [32, 128, 32, 128]
    with torch.no_grad():
        for i, block in enumerate(hand.transformer.h):
            block.attn.c_attn.bias[:32] = adapter.at(f"transformer.h.{i}.attn.c_attn").bias
            block.mlp.c_fc.bias.copy_(adapter.at(f"transformer.h.{i}.mlp.c_fc").bias)
    expected = hand(**data).logits
    close(model(**data).logits, expected)
    graft.merge(model, "a")
    close(model(**data).logits, expected)
    graft.unmerge(model)
    with graft.route(model, ["a", None, "a"]):
        close(model(**data).logits[0], expected[0])


def test_the_head_trains_along_and_an_old_head_s_bias_never_counts() -> None:
    with_head = graft.attach(tiny("bert"), graft.BitFit())
    assert [site.path for site, delta in with_head.items() if isinstance(delta, CopyDelta)] == ["classifier"]
    alone = graft.attach(tiny("bert"), graft.BitFit(head=False))
    assert with_head.trainable - alone.trainable == 3 * 32 + 3
    assert "classifier" not in alone.sites


def test_the_language_model_s_own_head_has_biases_too() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, **IDS
    )
    torch.manual_seed(0)
    adapter = graft.attach(transformers.BertForMaskedLM(config).eval(), graft.BitFit())
    inside = {path for path in adapter.sites if path.startswith("cls.")}
    names = ("transform.dense", "transform.LayerNorm", "decoder")
    assert inside == {f"cls.predictions.{name}" for name in names}


def test_layers_and_modules_to_save() -> None:
    top = graft.attach(tiny("bert"), graft.BitFit(layers=1, head=False))
    assert {site.layer for site, _ in top.items()} == {1} and len(top.sites) == 8
    whole = graft.attach(tiny("gpt2"), graft.BitFit(modules_to_save=("ln_f",)))
    kept = [(site.path, type(delta)) for site, delta in whole.items() if site.path.endswith("ln_f")]
    assert kept == [("transformer.ln_f", CopyDelta)]


def test_two_biases_on_one_row_add_up_their_changes() -> None:
    model, data = adapted("bert", graft.BitFit(head=False)), data_of("bert")
    other = graft.attach(model, graft.BitFit(head=False), "b")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2)
    hand = lively("bert")
    with torch.no_grad():
        for site, delta in model.adapters["a"].items():
            bias = hand.get_submodule(site.path).bias
            bias += (delta.bias - bias) + 0.5 * (other.at(site.path).bias - bias)
    graft.use(model, {"a": 1.0, "b": 0.5})
    close(model(**data).logits, hand(**data).logits)


def test_a_half_precision_base_keeps_its_dtype() -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    adapter = graft.attach(model, graft.BitFit())
    logits: Tensor = model(**data_of("gpt2")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_saved_and_loaded(arch: str, tmp_path: Any) -> None:
    model, data = adapted(arch, graft.BitFit()), data_of(arch)
    graft.save(model, "a", tmp_path / "a")
    again = lively(arch)
    loaded = graft.load(again, tmp_path / "a", "a")
    assert loaded.method == graft.BitFit() and loaded.saved == model.adapters["a"].trainable
    assert torch.equal(again(**data).logits, model(**data).logits)


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        ("bert-base", graft.BitFit(head=False), 102_912),
        ("bert-large", graft.BitFit(head=False), 272_384),
        ("bert-large", graft.BitFit(head=False, biases="query_ffn"), 122_880),
        ("gpt2", graft.BitFit(), 102_144),
        ("bart-large", graft.BitFit(), 333_824),
        ("Qwen2.5-0.5B", graft.BitFit(), 27_648),
    ],
)
def test_counts(name: str, method: graft.BitFit, count: int) -> None:
    model = meta(name)
    adapter = graft.attach(model, method)
    assert adapter.trainable == adapter.saved == count
    if name == "bert-base":
        assert count - adapter.at("bert.pooler.dense").bias.numel() == 102_144
    if count == 272_384:
        assert total(model) - (2 * 1024 + 2) == 335_141_888 and round(100 * count / 335_141_888, 2) == 0.08


def test_errors() -> None:
    for arch in ("llama", "t5", "gemma2"):  # T5's relative_attention_bias is a table, not a bias vector
        with pytest.raises(graft.SiteError, match="has no biases at all"):
            graft.attach(tiny(arch), graft.BitFit())
    with pytest.raises(graft.SiteError, match=r"Qwen2ForCausalLM has no bias at ffn.up"):
        graft.attach(tiny("qwen2"), graft.BitFit(biases="query_ffn"))
    with pytest.raises(graft.ConfigError, match="biases is one of all, query_ffn, not 'lora_only'"):
        graft.BitFit(biases="lora_only")
    with pytest.raises(graft.ConfigError, match="did you mean 'biases'"):
        from_dict({"method": "bitfit", "bias": "all"})
    with pytest.raises(graft.SiteError, match="leave no bias"):
        graft.attach(tiny("gpt2"), graft.BitFit(modules_to_save=("transformer",)))
    with pytest.raises(graft.SiteError, match="no layer 7"):
        graft.attach(tiny("gpt2"), graft.BitFit(layers=(7,)))


def test_experts_with_biases_are_refused() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(graft.SiteError, match=r"experts.0 is an expert"):
        graft.attach(model, graft.BitFit())


def test_json() -> None:
    method = graft.BitFit(biases="query_ffn", layers=2)
    assert from_dict(method.to_dict()) == method and from_dict({"method": "bitfit"}) == graft.BitFit()
