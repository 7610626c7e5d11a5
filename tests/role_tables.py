"""What `sites` must say of each tiny model, written by hand: the roles of layer 0, and of what lies outside.

And the models whose fused query, key and value are split.
"""

from __future__ import annotations

from typing import Any

Roles = dict[str, str]


def _attention(names: str, module: str, output: str | None = None, cross: bool = False) -> Roles:
    """`names` are of query, key, value and output, or of qkv and output, under the path `module`."""
    role = "cross_attention" if cross else "attention"
    split = names.split()
    parts = ("query", "key", "value", "output") if len(split) == 4 else ("qkv", "output")
    under = {f"{module}.{name}": f"{role}.{part}" for name, part in zip(split, parts, strict=True)}
    if output is not None:
        del under[f"{module}.{split[-1]}"]
        under[output] = f"{role}.output"
    return {module: role, **under}


_LLAMA_ATTENTION = _attention("q_proj k_proj v_proj o_proj", "self_attn")
_LLAMA_FFN = {
    "mlp": "ffn",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
_LLAMA_NORMS = {"input_layernorm": "norm.attention", "post_attention_layernorm": "norm.ffn"}
_QK_NORMS = {"self_attn.q_norm": "norm.query", "self_attn.k_norm": "norm.key"}
_LLAMA = {**_LLAMA_ATTENTION, **_LLAMA_FFN, **_LLAMA_NORMS}
_GEMMA = {
    **_LLAMA_ATTENTION,
    **_LLAMA_FFN,
    "input_layernorm": "norm.attention",
    "post_attention_layernorm": "norm.attention_post",
    "pre_feedforward_layernorm": "norm.ffn",
    "post_feedforward_layernorm": "norm.ffn_post",
}
_MEGATRON_FFN = {"mlp": "ffn", "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"}
_FALCON = {**_attention("query_key_value dense", "self_attention"), **_MEGATRON_FFN}
_GPT2 = {
    **_attention("c_attn c_proj", "attn"),
    "ln_1": "norm.attention",
    "ln_2": "norm.ffn",
    "mlp": "ffn",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}
_BERT = {
    **_attention("query key value dense", "attention.self", output="attention.output.dense"),
    "attention.output.LayerNorm": "norm.attention",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
    "output.LayerNorm": "norm.ffn",
}
_BART_ENCODER = {
    **_attention("q_proj k_proj v_proj out_proj", "self_attn"),
    "self_attn_layer_norm": "norm.attention",
    "fc1": "ffn.up",
    "fc2": "ffn.down",
    "final_layer_norm": "norm.ffn",
}
_BART_DECODER = {
    **_BART_ENCODER,
    **_attention("q_proj k_proj v_proj out_proj", "encoder_attn", cross=True),
    "encoder_attn_layer_norm": "norm.cross_attention",
}


def _t5(gated: bool) -> dict[str, Roles]:
    def ffn(layer: int) -> Roles:
        path = f"layer.{layer}.DenseReluDense"
        into = {f"{path}.wi_0": "ffn.gate", f"{path}.wi_1": "ffn.up"} if gated else {f"{path}.wi": "ffn.up"}
        return {path: "ffn", **into, f"{path}.wo": "ffn.down", f"layer.{layer}.layer_norm": "norm.ffn"}

    attention = {**_attention("q k v o", "layer.0.SelfAttention"), "layer.0.layer_norm": "norm.attention"}
    cross = {
        **_attention("q k v o", "layer.1.EncDecAttention", cross=True),
        "layer.1.layer_norm": "norm.cross_attention",
    }
    return {"encoder.block.0.": {**attention, **ffn(1)}, "decoder.block.0.": {**attention, **cross, **ffn(2)}}


# name -> path of layer 0 -> path below it -> role
LAYERS: dict[str, dict[str, Roles]] = {
    **{name: {"model.layers.0.": _LLAMA} for name in ("llama", "llama_tied", "llama_cls", "mistral", "qwen2")},
    "qwen3": {"model.layers.0.": {**_LLAMA, **_QK_NORMS}},
    "gemma2": {"model.layers.0.": _GEMMA},
    "gemma3": {"model.layers.0.": {**_GEMMA, **_QK_NORMS}},
    "phi3": {
        "model.layers.0.": {
            **_attention("qkv_proj o_proj", "self_attn"),
            **_LLAMA_NORMS,
            "mlp": "ffn",
            "mlp.gate_up_proj": "ffn.gate_up",
            "mlp.down_proj": "ffn.down",
        }
    },
    "falcon": {"transformer.h.0.": {**_FALCON, "input_layernorm": "norm.attention"}},
    "falcon_new": {"transformer.h.0.": {**_FALCON, "ln_attn": "norm.attention", "ln_mlp": "norm.ffn"}},
    "mixtral": {"model.layers.0.": {**_LLAMA_ATTENTION, **_LLAMA_NORMS, "mlp": "ffn"}},
    "gpt2": {"transformer.h.0.": _GPT2},
    "gpt2_cls": {"transformer.h.0.": _GPT2},
    "gpt_neox": {
        "gpt_neox.layers.0.": {**_attention("query_key_value dense", "attention"), **_LLAMA_NORMS, **_MEGATRON_FFN}
    },
    "opt": {"model.decoder.layers.0.": _BART_ENCODER},
    "bloom": {"transformer.h.0.": {**_FALCON, **_LLAMA_NORMS}},
    "bert": {"bert.encoder.layer.0.": _BERT},
    "bert_base": {"encoder.layer.0.": _BERT},
    "roberta": {"roberta.encoder.layer.0.": _BERT},
    "distilbert": {
        "distilbert.transformer.layer.0.": {
            **_attention("q_lin k_lin v_lin out_lin", "attention"),
            "sa_layer_norm": "norm.attention",
            "ffn": "ffn",
            "ffn.lin1": "ffn.up",
            "ffn.lin2": "ffn.down",
            "output_layer_norm": "norm.ffn",
        }
    },
    "t5": _t5(gated=False),
    "mt5": _t5(gated=True),
    "bart": {"model.encoder.layers.0.": _BART_ENCODER, "model.decoder.layers.0.": _BART_DECODER},
    "vit": {
        "vit.layers.0.": {
            **_attention("q_proj k_proj v_proj o_proj", "attention"),
            "layernorm_before": "norm.attention",
            "layernorm_after": "norm.ffn",
            "mlp": "ffn",
            "mlp.fc1": "ffn.up",
            "mlp.fc2": "ffn.down",
        }
    },
}

_LLAMA_TOP = {"model.embed_tokens": "embedding", "model.norm": "norm.final", "model.rotary_emb": "position"}
_GPT2_TOP = {"transformer.wte": "embedding", "transformer.wpe": "position", "transformer.ln_f": "norm.final"}
_FALCON_TOP = {
    "transformer.word_embeddings": "embedding",
    "transformer.rotary_emb": "position",
    "transformer.ln_f": "norm.final",
    "lm_head": "head",
}
_T5_TOP = {
    "encoder.embed_tokens": "embedding",
    "decoder.embed_tokens": "embedding",
    "encoder.final_layer_norm": "norm.final",
    "decoder.final_layer_norm": "norm.final",
    "lm_head": "head",
}


def _bert_top(prefix: str) -> Roles:
    return {
        f"{prefix}embeddings.word_embeddings": "embedding",
        f"{prefix}embeddings.position_embeddings": "position",
        f"{prefix}embeddings.token_type_embeddings": "token_type",
        f"{prefix}embeddings.LayerNorm": "norm.embedding",
    }


# name -> path -> role
OUTSIDE: dict[str, Roles] = {
    **{
        name: {**_LLAMA_TOP, "lm_head": "head"}
        for name in ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral")
    },
    "llama_cls": {**_LLAMA_TOP, "score": "head"},
    "gpt2": {**_GPT2_TOP, "lm_head": "head"},
    "gpt2_cls": {**_GPT2_TOP, "score": "head"},
    "gpt_neox": {
        "gpt_neox.embed_in": "embedding",
        "gpt_neox.rotary_emb": "position",
        "gpt_neox.final_layer_norm": "norm.final",
        "lm_head": "head",
    },
    "falcon": _FALCON_TOP,
    "falcon_new": _FALCON_TOP,
    "opt": {
        "model.decoder.embed_tokens": "embedding",
        "model.decoder.embed_positions": "position",
        "model.decoder.final_layer_norm": "norm.final",
        "lm_head": "head",
    },
    "bloom": {
        "transformer.word_embeddings": "embedding",
        "transformer.word_embeddings_layernorm": "norm.embedding",
        "transformer.ln_f": "norm.final",
        "lm_head": "head",
    },
    "bert": {**_bert_top("bert."), "bert.pooler.dense": "pooler", "classifier": "head"},
    "bert_base": {**_bert_top(""), "pooler.dense": "pooler"},
    "roberta": {**_bert_top("roberta."), "classifier": "head"},
    "distilbert": {
        "distilbert.embeddings.word_embeddings": "embedding",
        "distilbert.embeddings.position_embeddings": "position",
        "distilbert.embeddings.LayerNorm": "norm.embedding",
        "pre_classifier": "head",
        "classifier": "head",
    },
    "t5": _T5_TOP,
    "mt5": _T5_TOP,
    "bart": {
        **{f"model.{stack}.embed_tokens": "embedding" for stack in ("encoder", "decoder")},
        **{f"model.{stack}.embed_positions": "position" for stack in ("encoder", "decoder")},
        **{f"model.{stack}.layernorm_embedding": "norm.embedding" for stack in ("encoder", "decoder")},
        "lm_head": "head",
    },
    "vit": {"vit.layernorm": "norm.final", "classifier": "head"},
}

# name -> (stacks, cross-attention linears)
COUNTS: dict[str, tuple[int, int]] = {name: (1, 0) for name in LAYERS} | {
    name: (2, 8) for name in ("t5", "mt5", "bart")
}

# Models with a fused query, key and value: tiny ones with overrides, and more that only this test needs.
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "phi3_plain": ("phi3", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "falcon_many": ("falcon", {"multi_query": False}),
    "falcon_new": ("falcon_new", {}),
}
SMALL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32}),
    "bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {"n_embd": 32, "n_head": 4, "n_layer": 1}),
    "bigcode_many": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"n_embd": 32, "n_head": 4, "n_layer": 1, "multi_query": False},
    ),
    "persimmon": (
        "PersimmonForCausalLM",
        "PersimmonConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "qk_layernorm": False,
        },
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 1,
        },
    ),
}
