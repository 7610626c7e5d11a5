"""Merging into weights that several modules share: each gets exactly what acts there, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from twins import close, data_of, far, lively

import graft
from examples import perturb
from graft import merging, probe
from graft.base import load_base
from graft.convert import merge_folder
from tiny import VOCAB

TIED = ("llama_tied", "gpt2", "t5", "bart")
ROWS = (7, 20, 21, VOCAB - 2)
PLACES = (("embedding",), ("head",), ("embedding", "head"))


def moved(arch: str, *methods: Any) -> Any:
    """A tiny model with one adapter, of several methods a composed one, whose parameters have moved."""
    model = lively(arch)
    method = graft.Compose(*methods) if len(methods) > 1 else methods[0]
    perturb(graft.attach(model, method, "a"), 1, 0.3)
    return model


def reading(arch: str) -> dict[str, torch.Tensor]:
    """A batch in which every row of `ROWS` stands."""
    data = data_of(arch)
    data["input_ids"][0, : len(ROWS)] = torch.tensor(ROWS)
    return data


@torch.no_grad()
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("places", PLACES, ids="-".join)
@pytest.mark.parametrize("arch", TIED)
def test_rows_of_tokens_beside_lora_on_the_same_table(arch: str, places: tuple[str, ...], weight: float) -> None:
    lora = graft.LoRA(rank=2, targets=places, init="random")
    model, data = moved(arch, lora, graft.TrainableTokens(tokens=ROWS)), reading(arch)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    graft.use(model, {"a": weight})
    want = model(**data).logits
    with pytest.raises(graft.MergeError, match="shares its weight"):
        graft.merge(model, {"a": weight})
    graft.merge(model, {"a": weight}, tied="untie")
    close(model(**data).logits, want)
    graft.unmerge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_a_copy_that_holds_a_tied_weight_inside_is_untied_too() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    lora = graft.LoRA(rank=2, targets=("attention.query",), modules_to_save=("cls.predictions",))
    perturb(graft.attach(model, lora, "a"), 1, 0.3)
    data = reading("bert")
    want = model(**data).logits
    with pytest.raises(graft.MergeError, match=r"cls.predictions shares its weight with bert.embeddings"):
        graft.merge(model, "a")
    graft.merge(model, "a", tied="untie")
    close(model(**data).logits, want)
    graft.unmerge(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("arch", ["llama_tied", "t5", "bert"])
def test_the_probe_reads_the_tokens_whose_rows_train(arch: str) -> None:
    model = moved(arch, graft.LoRA(rank=2), graft.TrainableTokens(tokens=(*ROWS, 1)))
    found = probe.probe(model, "a")
    assert found is not None and tuple(found["ids"][: len(ROWS)]) == ROWS, "and not token 1, which means something"
    assert probe.probe(model, None)["ids"] == found["ids"][len(ROWS) :]  # type: ignore[index]


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_a_merge_that_misses_one_row_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary of 99 one output is wrong, or one input."""
    lora = graft.LoRA(rank=2, targets=("embedding", "head"))
    model = moved("llama_tied", lora, graft.TrainableTokens(tokens=ROWS))
    honest = merging._merge_site

    def forgetful(module: nn.Module, acts: Any, at: str, written: Any) -> None:
        row = module.weight[ROWS[2]].clone()  # type: ignore[index]
        honest(module, acts, at, written)
        if at == path:
            module.weight[ROWS[2]] = row  # type: ignore[index, operator]

    monkeypatch.setattr(merging, "_merge_site", forgetful)
    with pytest.raises(graft.MergeError, match="does not compute what the adapters did"):
        graft.merge(model, "a", tied="untie")


@torch.no_grad()
@pytest.mark.parametrize("stage", ["write", "check"])
def test_a_merge_that_fails_leaves_what_is_in_use(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of a method that trains the base itself are chosen for the merge, and put aside again."""
    model, data = lively("llama"), data_of("llama")
    want = model(**data).logits
    perturb(graft.attach(model, graft.TopLayers(count=1), "top"), 2, 0.3)
    far(model(**data).logits, want)
    graft.use(model, None)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"write": (merging, "_write"), "check": (probe, "check_probe")}[stage], broken)
    with pytest.raises(KeyboardInterrupt):
        graft.merge(model, "top")
    assert torch.equal(model(**data).logits, want)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    graft.use(model, "top")  # it is not merged


@torch.no_grad()
def test_a_folder_whose_tables_stay_tied_is_written_although_untying_is_allowed(tmp_path: Path) -> None:
    model = load_base("embedded", precision="fp32")
    perturb(graft.attach(model, graft.TrainableTokens(tokens=(300, 301)), "a"), 1, 0.3)
    ids = torch.tensor([[300, 5, 301, 7]])
    want = model(ids).logits
    graft.save(model, "a", tmp_path / "a")
    merge_folder("embedded", str(tmp_path / "a"), str(tmp_path / "out"), precision="fp32", untie=True)
    close(load_base(str(tmp_path / "out"), precision="fp32")(ids).logits, want)
