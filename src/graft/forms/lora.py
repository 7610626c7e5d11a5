"""peft's LORA: `lora_A.weight` (r, I) and `lora_B.weight` (O, r) for each linear, `lora_embedding_A` and `_B`.

LoRA on some parts of a fused linear stands in peft's file as one pair of rank n r with a block-diagonal B and an alpha
that leaves the factor as it is; our own load takes the blocks out again, bit for bit, and refuses a file with anything
outside of them.

Shape legend: I in, O out, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graft import vocabulary
from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import LINEAR, ROOT, Config, Form, Slot, Unheld, checked, number, plain, whole
from graft.forms.targets import value_of
from graft.method import CopyDelta, Delta, Method
from graft.methods.lora import EmbeddingLoRADelta, LoRA, LoRADelta

INITS = {True: "kaiming", False: "random", "gaussian": "gaussian"}
TRAINED_INITS = ("eva", "orthogonal")
"""Inits that leave the base alone, so that a trained adapter with them is an ordinary one."""


class LoRAForm(Form):
    """peft's LORA."""

    kind = "LORA"
    fields = LINEAR | {"r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_rslora", "init_lora_weights"}
    fields |= {"rank_pattern", "alpha_pattern", "ensure_weight_tying"}
    inert = {"megatron_core", "qalora_group_size"}
    methods = (LoRA,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        init = config.get("init_lora_weights", True)
        if not isinstance(init, bool | str) or (init not in INITS and (model is None or init not in TRAINED_INITS)):
            raise AdapterFileError(
                f"init_lora_weights = {init!r} changes the base, needs data or is not known; convert it with peft "
                "(path_initial_model_for_weight_conversion) to plain LoRA"
            )
        if config.get("ensure_weight_tying") and (model is None or targets.touches_embeddings(model, config)):
            raise AdapterFileError(
                "ensure_weight_tying ties the adapters of embedding and head, which Graft keeps apart"
            )
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in value_of(config, field, {}, dict):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise AdapterFileError(f"{field}: {pattern!r} is no regex: {error}") from error
        return LoRA(
            rank=value_of(config, "r", 8, int),
            alpha=value_of(config, "lora_alpha", 8, int, float),
            dropout=value_of(config, "lora_dropout", 0.0, int, float),
            bias=value_of(config, "bias", "none", str),
            lora_bias=value_of(config, "lora_bias", False, bool),
            rslora=value_of(config, "use_rslora", False, bool),
            rank_pattern=value_of(config, "rank_pattern", {}, dict),
            alpha_pattern=value_of(config, "alpha_pattern", {}, dict),
            init=INITS.get(init, "kaiming"),
            **targets.places(config, model),
        )

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, LoRA)
        inits = {name: init for init, name in INITS.items()}
        if method.init not in inits:
            raise Unheld(f"init={method.init!r} is not one of peft's")
        pairs = {s.path: delta for s, delta in adapter.items() if isinstance(delta, LoRADelta | EmbeddingLoRADelta)}
        names = targets.named(model, config, pairs)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        modules = [site.module for site, delta in adapter.items() if isinstance(delta, LoRADelta)]
        return {
            "target_modules": names,
            "lora_dropout": method.dropout,
            "bias": method.bias,
            "lora_bias": method.lora_bias,
            "use_rslora": method.rslora,
            "init_lora_weights": inits[method.init],
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules),
            **_ranks(method, pairs),
        }

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        if isinstance(delta, EmbeddingLoRADelta):
            return {"lora_embedding_A": plain(delta.A), "lora_embedding_B": plain(delta.B)}
        assert isinstance(delta, LoRADelta), type(delta)
        pair = {"lora_A.weight": plain(delta.A), "lora_B.weight": _blocks(delta)}
        if delta.B_bias is not None:
            pair["lora_B.bias"] = _block_bias(delta)
        return pair if delta.bias is None else pair | {"base_layer.bias": plain(delta.bias)}

    def of_base(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        slots = super().of_base(model, adapter, config)
        for site, delta in adapter.items() if config.get("bias") == "all" else ():
            if isinstance(delta, CopyDelta):  # each bias of a module that is kept whole stands in the file three times
                for place, module in (("original_module", site.module), ("modules_to_save", delta.copy)):
                    for key, value in module.named_parameters():
                        if key.rpartition(".")[2] == "bias":
                            slots[f"{ROOT}{site.path}.{place}.{key}"] = checked(value, site.path)
        return slots


def _ranks(method: LoRA, pairs: dict[str, Any]) -> Config:
    """Ranks and alphas; a pair in n blocks has rank n r, and an alpha that leaves its factor as it is."""
    ranks, alphas = dict(method.rank_pattern), dict(method.alpha_pattern)
    blocked = {path: delta.A.shape[0] // delta.rank for path, delta in pairs.items() if delta.A.shape[0] != delta.rank}
    for path, count in blocked.items():
        alpha = vocabulary.pattern_value(method.alpha_pattern, path, method.alpha)
        own = {re.escape(path): pairs[path].A.shape[0]}
        ranks = own | ranks
        alphas = {re.escape(path): number(alpha * (math.sqrt(count) if method.rslora else count))} | alphas
    # Where every module is blocked alike, numbers say it without a pattern for each.
    if len(blocked) == len(pairs) and len({*ranks.values()}) == len({*alphas.values()}) == 1:
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    return {"r": method.rank, "lora_alpha": number(method.alpha), "rank_pattern": ranks, "alpha_pattern": alphas}


def _blocks(delta: LoRADelta) -> Slot:
    """B as one (O, n r) matrix; what stands outside of the blocks must be zero."""
    if not delta.rows:
        return plain(delta.B)
    rank = delta.rank

    def fill(full: Tensor) -> None:
        parts = [full[rows, i * rank : (i + 1) * rank] for i, rows in enumerate(delta.rows)]
        delta.B.data.copy_(torch.cat(parts))
        whole(full, delta.full_B())

    return Slot((delta.site.out_features, delta.A.shape[0]), delta.full_B, fill)


def _block_bias(delta: LoRADelta) -> Slot:
    """The bias of B over all outputs (O)."""
    bias = delta.B_bias
    assert bias is not None
    if not delta.rows:
        return plain(bias)

    def read() -> Tensor:
        full = delta.full_B_bias()
        assert full is not None
        return full

    def fill(full: Tensor) -> None:
        bias.data.copy_(full[torch.cat(delta.rows)])
        whole(full, read())

    return Slot((delta.site.out_features,), read, fill)
