"""Odd folders and configs of peft: computed as peft does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from tiny import BOS, EOS, PAD, batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"vocab_size": 99, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2}
BART |= {"decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 3}
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def masked_lm() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()


def bart_classifier() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.BartForSequenceClassification(transformers.BartConfig(**BART, **IDS)).eval()


@torch.no_grad()
def written(base: Any, config: Any, folder: Path) -> Any:
    """A peft model with trained-looking values, saved."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    data = batch("llama", rows=2)
    return model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("targets", [["query"], ["query", "decoder"]])
def test_a_bias_that_two_modules_hold_acts_once(targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = written(masked_lm(), peft.LoraConfig(target_modules=targets, bias="all"), tmp_path / "a")
    model = masked_lm()
    graft.load(model, tmp_path / "a", "a")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    graft.save(model, "a", tmp_path / "b", form="peft")
    again = peft.PeftModel.from_pretrained(masked_lm(), tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


def test_all_biases_beside_a_head_of_several_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], bias="all", task_type="SEQ_CLS")
    theirs = written(tiny("roberta"), config, tmp_path / "a")
    model = tiny("roberta")
    graft.load(model, tmp_path / "a", "a")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_token_rows_that_the_model_never_reads_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(bart_classifier(), peft.TrainableTokensConfig(token_indices=[5, 7], task_type="SEQ_CLS"), tmp_path / "a")
    with pytest.raises(graft.AdapterFileError, match=r"rows at .*shared, and leaves .*encoder\.embed_tokens"):
        graft.load(bart_classifier(), tmp_path / "a", "a")


def test_module_names_that_are_roles_here() -> None:
    peft = pytest.importorskip("peft")
    adapter = graft.attach(tiny("llama"), peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]))
    assert [site.path.rpartition(".")[2] for site, _ in adapter.items()] == ["input_layernorm"] * 2 + ["norm"]


@pytest.mark.parametrize(("field", "value"), [("lora_alpha", float("nan")), ("lora_dropout", float("inf"))])
def test_numbers_are_finite(field: str, value: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "a")
    edit(tmp_path / "a", **{field: value})
    with pytest.raises(graft.AdapterFileError, match=f"{field} = .* is not a finite number"):
        graft.load(tiny("llama"), tmp_path / "a", "a")


def test_a_seed_has_64_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(tiny("llama"), peft.VeraConfig(target_modules=["q_proj"], r=3), tmp_path / "a")
    edit(tmp_path / "a", projection_prng_key=2**63)
    with pytest.raises(graft.AdapterFileError, match="projection_prng_key"):
        graft.load(tiny("llama"), tmp_path / "a", "a")


def test_a_prompt_of_another_task(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(tiny("t5"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"), tmp_path / "a")
    edit(tmp_path / "a", task_type="CAUSAL_LM")
    with pytest.raises(graft.AdapterFileError, match="SEQ_2_SEQ_LM"):
        graft.load(tiny("t5"), tmp_path / "a", "a")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_patterns_that_fit_no_target_are_ignored(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"k_proj": 2, "q_proj": 3}, "alpha_pattern": {"nothing": 5}}
    theirs = written(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], **patterns), tmp_path / "a")
    model = tiny("llama")
    method: Any = graft.load(model, tmp_path / "a", "a").method
    assert (method.rank_pattern, method.alpha_pattern) == ({"q_proj": 3}, {})
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    graft.save(model, "a", tmp_path / "b", form="peft")
    graft.load(tiny("llama"), tmp_path / "b")
    with pytest.raises(graft.SiteError, match="'k_proj' fits none"):
        graft.attach(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], **patterns))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
        ("llama_cls", {"task_type": "SEQ_CLS"}),
        ("llama_cls", {"modules_to_save": ["score"]}),
        ("bart_cls", {"task_type": "SEQ_CLS"}),
        ("bart_cls", {"modules_to_save": ["head"]}),
    ],
    ids=str,
)
def test_an_object_trains_what_it_trains_in_peft(name: str, fields: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    fields = {"target_modules": ["q_proj"], **fields}
    base, twin = (bart_classifier() if name == "bart_cls" else tiny(name) for _ in range(2))
    theirs = peft.get_peft_model(twin, peft.LoraConfig(**fields))
    adapter = graft.attach(base, peft.LoraConfig(**fields))
    assert adapter.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_an_object_names_modules_that_are_there() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(graft.ConfigError, match=r"^LoraConfig: modules_to_save: the model has no module 'nothing'"):
        graft.attach(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["nothing"]))
