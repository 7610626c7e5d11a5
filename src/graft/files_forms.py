"""The config beside an adapter's tensors: peft's wherever its form computes exactly the same, else our own.

What peft's form cannot hold is `Unheld`, with the reason; it is never approximated. Fused linears of which an adapter
changes some parts are written whole: LoRA as one pair of rank n r with alpha scaled so that the factor stays the same,
(IA)^3 with ones in the other rows.

Shape legend: R rank, P virtual tokens, L layers, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graft import files_peft, hooks, roles, vocabulary
from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.method import CopyDelta, Method
from graft.methods.ia3 import IA3, InputScaleDelta, OutputScaleDelta
from graft.methods.lora import EmbeddingLoRADelta, LoRA, LoRADelta
from graft.methods.prefix import PrefixDelta, PrefixTable, PrefixTuning
from graft.methods.prompt import PromptDelta, PromptTuning
from graft.weights import is_embedding

Config = dict[str, Any]
FORMAT = 1
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
INITS = {name: init for init, name in files_peft.INITS.items()}
ALIASED = (
    "peft gives decoder layer l the prefix slots (4l mod 2L, 4l+1 mod 2L), so that with an even number of layers L "
    "half of them are never read; only a prefix trained with peft_compat=True has that form"
)


class Unheld(Exception):
    """peft's form cannot hold this adapter exactly; the message says why."""


def own_config(model: nn.Module, adapter: Adapter) -> Config:
    """The config of our own form: a `peft_type` that peft does not have, so that it refuses the folder."""
    kind = type(adapter.method).peft_type or type(adapter.method).name.upper()
    return {
        "peft_type": f"GRAFT_{kind}" if kind in files_peft.READERS else kind,
        "format_version": FORMAT,
        "method": adapter.method.to_dict(full=True),
        "peft_compat": adapter.peft_compat,
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
    }


def peft_config(model: nn.Module, adapter: Adapter) -> Config:
    """The peft config of an adapter.

    Raises:
        Unheld: peft has no such method, or its form would compute something else.
    """
    writer = WRITERS.get(type(adapter.method))
    if writer is None:
        raise Unheld(f"peft has no {adapter.method.name} as Graft computes it")
    kept = sorted(site.path for site, delta in adapter.items() if isinstance(delta, CopyDelta))
    config: Config = {
        "peft_type": type(adapter.method).peft_type,
        "task_type": _task(model, set(kept)),
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "modules_to_save": kept or None,
    }
    if files_peft.saved_whole(model, config) != set(kept):
        raise Unheld("peft's rule for modules_to_save would take other modules too")
    return config | writer(model, adapter, config)


def _write_lora(model: nn.Module, adapter: Adapter, config: Config) -> Config:
    method = adapter.method
    assert isinstance(method, LoRA)
    if method.init not in INITS:
        raise Unheld(f"init={method.init!r} is not one of peft's")
    pairs = {site.path: delta for site, delta in adapter.items() if isinstance(delta, LoRADelta | EmbeddingLoRADelta)}
    modules = [site.module for site, delta in adapter.items() if isinstance(delta, LoRADelta)]
    return {
        "target_modules": _names(model, config, pairs),
        "lora_dropout": method.dropout,
        "bias": method.bias,
        "lora_bias": method.lora_bias,
        "use_rslora": method.rslora,
        "init_lora_weights": INITS[method.init],
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules),
        **_ranks(method, pairs),
    }


def _ranks(method: LoRA, pairs: dict[str, LoRADelta | EmbeddingLoRADelta]) -> Config:
    """Ranks and alphas; a pair in n blocks has rank n r, and an alpha that leaves its factor as it is."""
    ranks, alphas = dict(method.rank_pattern), dict(method.alpha_pattern)
    blocked = {path: delta.A.shape[0] // delta.rank for path, delta in pairs.items() if delta.A.shape[0] != delta.rank}
    for path, count in blocked.items():
        alpha = vocabulary.pattern_value(method.alpha_pattern, path, method.alpha)
        own = {re.escape(path): pairs[path].A.shape[0]}
        ranks = own | ranks
        alphas = {re.escape(path): _number(alpha * (math.sqrt(count) if method.rslora else count))} | alphas
    # Where every module is blocked alike, numbers say it without a pattern for each.
    if len(blocked) == len(pairs) and len({*ranks.values()}) == len({*alphas.values()}) == 1:
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    return {"r": method.rank, "lora_alpha": _number(method.alpha), "rank_pattern": ranks, "alpha_pattern": alphas}


def _write_ia3(model: nn.Module, adapter: Adapter, config: Config) -> Config:
    scaled = {site.path: (site, d) for site, d in adapter.items() if isinstance(d, InputScaleDelta | OutputScaleDelta)}
    if any(is_embedding(site.module) for site, _ in scaled.values()):
        raise Unheld("peft's (IA)^3 does not act on embeddings")
    fed = {path for path, (_, delta) in scaled.items() if isinstance(delta, InputScaleDelta)}
    names = _names(model, config, scaled, fed)
    return {
        "target_modules": names,
        "feedforward_modules": _feeding(names, fed),
        "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site, _ in scaled.values()),
        "init_ia3_weights": True,
    }


def _write_prompt(model: nn.Module, adapter: Adapter, config: Config) -> Config:
    method = adapter.method
    assert isinstance(method, PromptTuning)
    if hooks.pooled(model) and not adapter.peft_compat:
        raise Unheld("peft pools at the first virtual token, this prompt was made to pool behind it (peft_compat=True)")
    width = next(delta.prompt.shape[1] for _, delta in adapter.items() if isinstance(delta, PromptDelta))
    heads = int(getattr(_text_config(model), "num_attention_heads", 0))
    layers = int(getattr(_text_config(model), "num_hidden_layers", 0))
    return {"prompt_tuning_init": "RANDOM"} | _virtual(model, adapter, config, method.length, layers, heads, width)


def _write_prefix(model: nn.Module, adapter: Adapter, config: Config) -> Config:
    method, table = adapter.method, adapter.shared
    assert isinstance(method, PrefixTuning) and isinstance(table, PrefixTable)
    if method.layers is not None or (method.places or ("decoder",)) != ("decoder",):
        raise Unheld("peft's prefix stands in every layer's self-attention (the decoder's), this one elsewhere")
    deltas = [delta for _, delta in adapter.items() if isinstance(delta, PrefixDelta)]
    if len({(delta.heads, delta.size) for delta in deltas}) != 1:
        raise Unheld("its layers have key/value heads of unequal number or size")
    if roles.is_encoder_decoder(model) and len(deltas) % 2 == 0 and not adapter.peft_compat:
        raise Unheld(ALIASED)
    heads, size = deltas[0].heads, deltas[0].size
    out = _virtual(model, adapter, config, method.length, len(deltas), heads, heads * size)
    return out | {"prefix_projection": False, "encoder_hidden_size": heads * size}


def _virtual(
    model: nn.Module, adapter: Adapter, config: Config, length: int, layers: int, heads: int, width: int
) -> Config:
    task = config["task_type"]
    if task is None:
        raise Unheld("peft's prompts and prefixes need a task with a trained head, or a language model")
    if config["modules_to_save"] and task not in files_peft.HEADS:
        raise Unheld("peft's prompts and prefixes train no further modules beside a task head")
    return {
        "num_virtual_tokens": length,
        "num_transformer_submodules": 2 if roles.is_encoder_decoder(model) else 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": width,
    }


WRITERS: dict[type[Method], Callable[[nn.Module, Adapter, Config], Config]] = {
    LoRA: _write_lora,
    IA3: _write_ia3,
    PromptTuning: _write_prompt,
    PrefixTuning: _write_prefix,
}


def _names(model: nn.Module, config: Config, paths: Any, fed: set[str] | None = None) -> list[str]:
    """Module names that peft resolves to exactly these paths: the last parts where they do, else whole paths."""
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        try:
            found = files_peft.targeted(model, {**config, "target_modules": names})
        except AdapterFileError:
            continue
        ends = tuple(_feeding(names, fed or set()))
        if found == set(paths) and {path for path in paths if path.endswith(ends)} == (fed or set()):
            return names
    raise Unheld("peft's rules cannot name exactly these modules")


def _feeding(names: list[str], fed: set[str]) -> list[str]:
    return [name for name in names if any(path == name or path.endswith(f".{name}") for path in fed)]


def _task(model: nn.Module, kept: set[str]) -> str | None:
    """peft's task type; None where it would add a head that this adapter does not train."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if task in files_peft.HEADS:
        heads = files_peft.saved_whole(model, {"task_type": task})
        return task if heads and heads <= kept else None
    if task == "CAUSAL_LM" and roles.is_encoder_decoder(model):
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if task is None and getattr(model, "base_model", None) is model else task


def base_name(model: nn.Module) -> str:
    """What the base calls itself: a path or hub name, "" if it was built from a config."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)
