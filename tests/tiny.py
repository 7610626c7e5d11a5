"""Tiny seeded models, one per architecture, built from their configs (no download), and batches for them."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

PAD, BOS, EOS, FIRST_TOKEN, VOCAB = 0, 1, 2, 5, 99
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

CONTRACT = ("llama", "gpt2", "gemma2", "mixtral", "bert", "t5", "mt5", "bart")

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_labels": 3,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
MT0_LARGE = {
    "vocab_size": 250112,
    "d_model": 1024,
    "d_kv": 64,
    "num_heads": 16,
    "d_ff": 2816,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
"""The shape of mt0-large, which is counted and never made."""
_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}

# name -> (model class, config class, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama_cls": ("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 64}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 64}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_FALCON, "multi_query": True}),
    "falcon_new": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_cls": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "num_labels": 3}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", _BERT),
    "bert_base": ("BertModel", "BertConfig", _BERT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_BERT, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 128,
            "num_labels": 3,
        },
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": (
        "MT5ForConditionalGeneration",
        "MT5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 3,
        },
    ),
}


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """Build a tiny model: fp32, eval mode, the same weights every time.

    Args:
        name: a key of `MODELS`.
        overrides: config fields; `attn_implementation` chooses the attention.
    """
    model_class, config_class, fields = MODELS[name]
    attention = overrides.pop("attn_implementation", None)
    ids = {} if name == "vit" else IDS
    config = getattr(transformers, config_class)(**{**ids, **fields, **overrides})
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def batch(model_name: str, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for `tiny(model_name)`: ids (rows, 9) with a right-padded mask, and labels of the model's own kind.

    Row r has 9 - r real tokens (at least 3); padded places are -100 in token labels. Encoder-decoders get labels of
    (rows, 6); classifiers (rows,); bare models and ViT get what they can take.
    """
    model_class = MODELS[model_name][0]
    generator = torch.Generator().manual_seed(seed)
    if model_name == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (rows,), generator=generator)}
    ids_BT, mask_BT = _padded(rows, 9, generator)
    out = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if "Classification" in model_class:
        out["labels"] = torch.randint(0, 3, (rows,), generator=generator)
    elif "ConditionalGeneration" in model_class:
        labels_BT, label_mask_BT = _padded(rows, 6, generator)
        out["labels"] = labels_BT.masked_fill(label_mask_BT == 0, -100)
    elif "CausalLM" in model_class or "LMHead" in model_class:
        out["labels"] = ids_BT.masked_fill(mask_BT == 0, -100)
    return out


def _padded(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ids (rows, length) and their right-padded mask."""
    ids_BT = torch.randint(FIRST_TOKEN, VOCAB, (rows, length), generator=generator)
    real_B1 = torch.tensor([[max(length - row, 3)] for row in range(rows)])
    mask_BT = (torch.arange(length)[None] < real_B1).long()
    return ids_BT.masked_fill(mask_BT == 0, PAD), mask_BT


logging.getLogger("transformers").setLevel(logging.ERROR)


def checkpointed(model: Any, **options: Any) -> None:
    """Turn activation checkpointing on, whatever this transformers calls it."""
    call = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    call(options or None)
