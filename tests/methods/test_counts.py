"""Exact counts on public shapes, without weights: methods of peft's at `peft_compat=True`, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graft
from graft.method import CopyDelta, Method
from tiny import MT0_LARGE

_GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12}
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
_BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_BART_LARGE = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "vocab_size": 50265,
}
_QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_QWEN_HALF = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_T5_BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
_LLAMA_3 = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}

# name -> (class, config class, config)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("BertForSequenceClassification", "BertConfig", {"num_labels": 2}),
    "bert-large": ("BertForSequenceClassification", "BertConfig", {**_BERT_LARGE, "num_labels": 2}),
    "roberta-base": ("RobertaForSequenceClassification", "RobertaConfig", _ROBERTA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-medium": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "Llama-2-7B": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "vocab_size": 32000, "intermediate_size": 11008}),
    "Llama-3-8B": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, **_LLAMA_3}),
    "Qwen2.5-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", _QWEN_HALF),
    "Qwen2.5-7B": ("Qwen2ForCausalLM", "Qwen2Config", _QWEN_7B),
    "t5-base": ("T5ForConditionalGeneration", "T5Config", _T5_BASE),
    "bart-large": ("BartForConditionalGeneration", "BartConfig", _BART_LARGE),
    "mt0-large": ("MT5ForConditionalGeneration", "MT5Config", MT0_LARGE),
}

QV, ALL = graft.LoRA(rank=8), graft.LoRA(rank=8, targets="all-linear")
PROMPT, PREFIX = graft.PromptTuning(length=20), graft.PrefixTuning(length=20)
# name -> base, LoRA q,v, LoRA all-linear, (IA)^3, prompt, prefix
TABLE = {
    "bert-base": (109_483_778, 296_450, 1_340_930, 66_050, 16_898, 370_178),
    "bert-large": (335_143_938, 788_482, 3_557_378, 174_082, 22_530, 985_090),
    "roberta-base": (124_647_170, 887_042, 1_919_234, 656_642, 607_490, 960_770),
    "gpt2": (124_439_808, 294_912, 1_179_648, 64_512, 15_360, 368_640),
    "gpt2-medium": (354_823_168, 786_432, 3_145_728, 172_032, 20_480, 983_040),
    "gpt2-large": (774_030_080, 1_474_560, 5_898_240, 322_560, 25_600, 1_843_200),
    "Llama-2-7B": (6_738_415_616, 4_194_304, 19_988_480, 614_400, 81_920, 5_242_880),
    "Llama-3-8B": (8_030_261_248, 3_407_872, 20_971_520, 524_288, 81_920, 1_310_720),
    "Qwen2.5-0.5B": (494_032_768, 540_672, 4_399_104, 141_312, 17_920, 122_880),
    "Qwen2.5-7B": (7_615_616_512, 2_523_136, 20_185_088, 645_120, 71_680, 573_440),
    "t5-base": (222_903_552, 884_736, 3_244_032, 129_024, 30_720, 368_640),
    "bart-large": (406_291_456, 1_179_648, 4_325_376, 172_032, 40_960, 491_520),
}


def meta(name: str) -> Any:
    """A model of public shape without weights. mt0's head is untied, which its config cannot say."""
    model_class, config_class, fields = SHAPES[name]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
        if name == "mt0-large":
            model.lm_head = nn.Linear(1024, 250112, bias=False)
    return model


def total(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("adapters."))


def trainable(model: Any, method: Method, peft_compat: bool = True) -> int:
    """What the model trains with the adapter on, and that nothing is left of it afterwards."""
    adapter = graft.attach(model, method, peft_compat=peft_compat)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.trainable == adapter.saved == count
    assert all(p.is_meta for p in model.parameters())
    graft.detach(model)
    return count


@pytest.mark.parametrize("name", sorted(TABLE))
def test_table_of_public_shapes(name: str) -> None:
    model = meta(name)
    base, *expected = TABLE[name]
    assert total(model) == base
    assert [trainable(model, method) for method in (QV, ALL, graft.IA3(), PROMPT, PREFIX)] == expected


def test_table_of_mt0_large() -> None:
    model = meta("mt0-large")
    assert total(model) == 1_229_581_312
    counts = [trainable(model, method) for method in (QV, PROMPT, PREFIX, graft.IA3())]
    assert counts == [2_359_296, 40_960, 983_040, 282_624]
    # While an MLP of 1024 makes the prefix, 51,450,880 train.
    adapter = graft.attach(model, graft.PrefixTuning(length=20, hidden=1024), peft_compat=True)
    assert (adapter.trainable, adapter.saved) == (51_450_880, 983_040)


def test_our_own_forms_of_mt0_and_gpt2() -> None:
    """P rows and not 2P; the paper's (IA)^3 targets, on GPT-2 without a vector for the queries."""
    mt0 = meta("mt0-large")
    assert trainable(mt0, PROMPT, False) == 20 * 1024
    assert trainable(mt0, graft.IA3(), False) == 282_624
    gpt2 = meta("gpt2")
    assert trainable(gpt2, graft.IA3(), False) == 12 * (2 * 768 + 3072)
    assert trainable(gpt2, QV, False) == 12 * 2 * 8 * (768 + 768)
    bart = meta("bart-large")
    everywhere = graft.PrefixTuning(length=30, where=("encoder", "decoder", "cross"))
    assert trainable(bart, everywhere, False) == 2_211_840


def adapters_alone(model: Any, method: Method) -> int:
    """The bottlenecks' values, without norms and heads."""
    adapter = graft.attach(model, method)
    count = sum(d.saved_numel for _, d in adapter.items() if not isinstance(d, CopyDelta))
    graft.detach(model)
    return count


def test_bottlenecks() -> None:
    """2 m d + d + m each; BERT-large's 49 norms beside them."""
    base, large = meta("bert-base"), meta("bert-large")
    for size, count in ((64, 2_379_264), (8, 313_536), (256, 9_461_760)):
        assert adapters_alone(base, graft.Bottleneck(size=size)) == count == 24 * (2 * size * 768 + 768 + size)
    for kind in ("pfeiffer", "parallel"):
        assert adapters_alone(base, graft.Bottleneck(size=64, kind=kind)) == 1_189_632
    assert adapters_alone(large, graft.Bottleneck(size=64)) == 6_343_680
    assert trainable(large, graft.Bottleneck(size=64, head=False)) == 6_444_032
    bart = meta("bart-large")
    assert adapters_alone(bart, graft.Bottleneck(size=512, kind="parallel")) == 25_202_688
    assert adapters_alone(bart, graft.Bottleneck(size=64)) == (12 * 2 + 12 * 3) * (2 * 64 * 1024 + 1024 + 64)


def test_selections() -> None:
    """Blocks of 202,383,360 (Llama-2-7B) and 7,087,872 (BERT-base, GPT-2) values, and everything."""
    llama = meta("Llama-2-7B")
    assert trainable(llama, graft.TopLayers(count=2)) == 404_770_816 == 2 * 202_383_360 + 4096
    assert trainable(llama, graft.TopLayers(count=2, lm_head=True)) == 404_770_816 + 131_072_000
    assert trainable(llama, graft.FullFineTuning()) == 6_738_415_616
    assert trainable(meta("gpt2"), graft.TopLayers(count=1, norm=False)) == 7_087_872
    bert = meta("bert-base")
    assert trainable(bert, graft.TopLayers(count=1, head=False)) == 7_087_872 + 768 * 769
    assert trainable(bert, graft.Head()) == 2 * 769 and trainable(meta("roberta-base"), graft.Head()) == 592_130


def test_papers() -> None:
    """LoRA's "0.3M" and "0.8M", (IA)^3's T0-3B, prompt tuning's "20,480"."""
    roberta = meta("roberta-base")
    assert trainable(roberta, graft.LoRA(rank=8, head=False)) == 294_912
    assert trainable(meta("Llama-2-7B"), graft.LoRA(rank=64, targets="all-linear")) == 159_907_840
    sizes = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "d_kv": 64, "vocab_size": 32128}
    with torch.device("meta"):
        config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")
        t0 = transformers.T5ForConditionalGeneration(config)
    assert trainable(t0, graft.IA3()) == 540_672 == trainable(t0, graft.IA3(), False)


def test_gpt3() -> None:
    """LoRA's "4.7M" and "37.7M": q and v of the fused qkv, each with a pair of its own."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=64, vocab_size=64)
        model = transformers.GPT2LMHeadModel(config)
    counts = [trainable(model, graft.LoRA(rank=rank), False) for rank in (1, 4, 8)]
    assert counts == [4_718_592, 18_874_368, 37_748_736]
