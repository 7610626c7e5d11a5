"""`describe` against the models' own parameters: every storage once, nothing kept silent, no weights needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

import graft
from graft.description import Description, describe
from tiny import CONTRACT, IDS, MODELS, tiny

NAMES = [*CONTRACT, "llama_tied", "llama_cls", "roberta", "distilbert", "gpt_neox", "opt", "bloom", "mistral", "qwen2"]
NAMES += ["qwen3", "gemma3", "phi3", "falcon", "falcon_new", "vit"]


def empty(name: str) -> Any:
    """The model of `tiny(name)` on the meta device."""
    model_class, config_class, fields = MODELS[name]
    with torch.device("meta"):
        return getattr(transformers, model_class)(
            getattr(transformers, config_class)(**({} if name == "vit" else IDS), **fields)
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_counted_once(name: str) -> None:
    model = tiny(name)
    found = describe(model)
    assert found.total == found.base == found.trainable == sum(p.numel() for p in model.parameters())
    leaves = [row for row in [*found.sites, *found.unnamed] if row.shapes and row.tied is None]
    inner = [row for row in leaves if not any(row.path.startswith(f"{o.path}.") for o in leaves)]
    heads = [row for row in found.sites if row.role == "head" and not row.shapes]
    assert sum(row.count for row in [*inner, *heads]) == found.total, "a parameter stands in no row, or in two"


@pytest.mark.parametrize("name", NAMES)
def test_no_weights_are_needed(name: str) -> None:
    with_weights, without = describe(tiny(name)), describe(empty(name))
    assert without.to_dict() == with_weights.to_dict()


def test_a_site_has_its_role_layer_and_shapes() -> None:
    rows = {row.path: row for row in describe(tiny("llama")).sites}
    key = rows["model.layers.1.self_attn.k_proj"]
    assert (key.role, key.layer, key.kind, key.shapes) == ("attention.key", 1, "Linear", {"weight": (16, 32)})
    assert (key.in_features, key.out_features, key.count, key.tied) == (32, 16, 512, None)
    attention = rows["model.layers.1.self_attn"]
    assert attention.shapes == {} and attention.count == 2 * 512 + 2 * 1024


def test_tied_weights_say_whose_they_are() -> None:
    rows = {row.path: row for row in describe(tiny("llama_tied")).sites}
    assert rows["lm_head"].tied == "model.embed_tokens"
    assert rows["model.embed_tokens"].tied is None


def test_what_has_no_role_is_said() -> None:
    mixtral = describe(tiny("mixtral"))
    unnamed = {row.path.rpartition(".")[2]: row for row in mixtral.unnamed if row.layer == 0}
    assert set(unnamed) == {"gate", "experts"} and unnamed["experts"].kind == "MixtralExperts"
    assert "No role" in str(mixtral) and "MixtralExperts" in str(mixtral)
    t5 = [row.path for row in describe(tiny("t5")).unnamed]
    assert [path.rpartition(".")[2] for path in t5] == ["relative_attention_bias"] * 2
    assert "No role" not in str(describe(tiny("llama")))
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4))
    assert [row.path for row in describe(plain).unnamed] == ["0"]


def test_attention_that_bypasses_the_interface_is_said() -> None:
    assert "bypasses transformers' attention interface" in describe(tiny("falcon")).notes[0]
    assert not describe(tiny("llama")).notes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters(device: str) -> None:
    model = tiny("llama") if device == "cpu" else empty("llama")
    base = sum(p.numel() for p in model.parameters())
    graft.attach(model, graft.LoRA(rank=4), "first")
    graft.attach(model, graft.PromptTuning(length=5), "second", trainable=False)
    found = describe(model)
    lora, prompt = 2 * (4 * (32 + 32) + 4 * (32 + 16)), 5 * 32
    first, second = found.adapters
    assert (first.name, first.method, first.trainable, first.saved, first.in_use) == ("first", "lora", lora, lora, True)
    assert (second.trainable, second.saved, second.in_use) == (0, prompt, False)
    assert (found.base, found.total, found.trainable) == (base, base + lora + prompt, lora)
    assert not any("adapters" in row.path for row in [*found.sites, *found.unnamed])


def test_an_adapter_that_changes_the_base_is_counted_in_it() -> None:
    model = tiny("llama")
    graft.attach(model, graft.FullFineTuning(), "full")
    found = describe(model)
    assert found.base == found.total == found.trainable == found.adapters[0].trainable


def test_json_holds_everything() -> None:
    model = tiny("bert")
    graft.attach(model, graft.LoRA(), "a")
    data = json.loads(json.dumps(describe(model).to_dict()))
    assert data["model"] == "BertForSequenceClassification"
    assert set(data) == {"model", "sites", "unnamed", "adapters", "total", "base", "trainable", "notes"}
    assert data["sites"][0]["path"] == "bert.embeddings.word_embeddings"


def lines(found: Description) -> list[str]:
    return [" ".join(line.split()) for line in str(found).splitlines()]


def test_the_table_shows_equal_layers_once() -> None:
    table = lines(describe(tiny("llama", num_hidden_layers=3)))
    assert table[:2] == ["LlamaForCausalLM", "path role shape parameters"]
    assert "model.layers.0-2 x 3 layers" in table
    assert table.count(".self_attn.q_proj attention.query 32 -> 32 1,024") == 1
    assert "lm_head head 32 -> 99 3,168" in table
    assert not any("\x1b" in line for line in table)


def test_the_table_parts_layers_that_differ() -> None:
    model = tiny("llama", num_hidden_layers=3)
    model.model.layers[1].mlp.gate_proj = torch.nn.Linear(32, 48, bias=True)
    table = lines(describe(model))
    assert "model.layers.0,2 x 2 layers" in table and "model.layers.1 1 layer" in table
    assert ".mlp.gate_proj ffn.gate 32 -> 48 + bias 1,584" in table


def test_the_table_says_what_trains() -> None:
    model = tiny("llama")
    total = sum(p.numel() for p in model.parameters())
    graft.attach(model, graft.LoRA(rank=1), "a")
    table = lines(describe(model))
    assert "a lora 224 224 yes" in table
    assert table[-1].startswith(f"{total + 224:,} parameters, 224 of them (")
