"""peft's LORA: `lora_A.weight` (r, I) and `lora_B.weight` (O, r) for each linear, `lora_embedding_A` and `_B`.

With `use_dora` also `lora_magnitude_vector` (O).

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
from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets, trainable_tokens
from graft.forms.base import LINEAR, ROOT, Config, Form, Slot, Unheld, checked, number, plain, whole
from graft.forms.targets import value_of
from graft.method import CopyDelta, Delta, Method
from graft.methods.compose import Compose
from graft.methods.dora import DoRA, DoRADelta, Magnitude
from graft.methods.lora import EmbeddingLoRADelta, LoRA, LoRADelta
from graft.methods.lora_fa import LoRAFA
from graft.methods.lora_init import kind_of
from graft.methods.qlora import QLoRA
from graft.methods.trainable_tokens import EmbeddingRowsDelta, HeadRowsDelta
from graft.weights import weight_OI

INITS = {True: "kaiming", False: "random", "gaussian": "gaussian"}
TRAINED_INITS = ("eva", "orthogonal")
"""Inits that leave the base alone, so that a trained adapter with them is an ordinary one."""
FROM_BASE = ("pissa", "olora")
"""Inits whose product stands in the file and is missing from the base's weight: the base gives it again."""
STARTS = {"lora_ga": ("lora_ga_config", {"stable_gamma": "gamma"}), "eva": ("eva_config", {"rho": "rho", "tau": "tau"})}
"""Starts from data, with the field of their settings and what Graft calls those; `FIXED` is all that others may be."""
FIXED = {"direction": "ArB2r", "scale": "stable", "use_label_mask": True, "label_mask_value": -100, "whiten": False}
FIXED |= {"adjust_scaling_factors": True}
OTHER_PRECISION = 0.1
"""How far the lengths of a base's rows may lie apart in two precisions, as a share; NF4 has 0.02 over 256 inputs."""


class LoRAForm(Form):
    """peft's LORA."""

    kind = "LORA"
    fields = LINEAR | {"r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_rslora", "init_lora_weights"}
    fields |= {"rank_pattern", "alpha_pattern", "ensure_weight_tying", "use_dora", "eva_config", "lora_ga_config"}
    fields |= {"trainable_token_indices"}
    inert = {"megatron_core", "qalora_group_size"}
    methods = (LoRA, DoRA, LoRAFA, QLoRA)
    sometimes = (Compose,)

    def fitted(self, config: Config, model: nn.Module) -> Config:
        """A config object on this model; peft's own targets are none of those that it takes for experts."""
        if why := targets.in_experts(model, config.get("target_modules")):
            raise AdapterFileError(f"target_modules: {why}")
        return config

    def read(self, config: Config, model: nn.Module | None) -> Method:
        start = _start(config, model)
        if model is not None:
            self.fitted(config, model)
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
        used = None if model is None else targets.targeted(model, config)
        kind = DoRA if value_of(config, "use_dora", False, bool) else LoRA
        made = kind(
            rank=value_of(config, "r", 8, int),
            alpha=value_of(config, "lora_alpha", 8, int, float),
            dropout=value_of(config, "lora_dropout", 0.0, int, float),
            bias=value_of(config, "bias", "none", str),
            lora_bias=value_of(config, "lora_bias", False, bool),
            rslora=value_of(config, "use_rslora", False, bool),
            rank_pattern=_used(config, "rank_pattern", used),
            alpha_pattern=_used(config, "alpha_pattern", used),
            **start,
            **targets.places(config, model),
        )
        return trainable_tokens.beside(made, config, model)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        method, tokens = trainable_tokens.split(model, method, adapter)
        if not isinstance(method, LoRA):
            raise Unheld(f"peft has no {method.name} beside trainable tokens")
        inits = {name: init for init, name in INITS.items()}
        if method.init not in inits:
            raise Unheld(f"init={method.init!r} is not one of peft's")
        pairs = {s.path: delta for s, delta in adapter.items() if isinstance(delta, LoRADelta | EmbeddingLoRADelta)}
        names = targets.named(model, config, pairs)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        if why := targets.in_experts(model, names):
            raise Unheld(why)
        modules = [site.module for site, delta in adapter.items() if isinstance(delta, LoRADelta)]
        return {
            "target_modules": names,
            "lora_dropout": method.dropout,
            "bias": method.bias,
            "lora_bias": method.lora_bias,
            "use_rslora": method.rslora,
            "use_dora": isinstance(method, DoRA),
            "init_lora_weights": inits[method.init],
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules),
            **_ranks(method, pairs),
            **tokens,
        }

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        slots = super().slots(model, adapter, config) | trainable_tokens.beside_slots(model, adapter)
        if config.get("init_lora_weights") in FROM_BASE:  # peft's own file: the trained pair, without what it replaces
            for site, delta in adapter.items():
                if isinstance(delta, LoRADelta):
                    own = {"lora_A.weight": plain(delta.A), "lora_B.weight": plain(delta.B)}
                    slots |= {f"{ROOT}{site.path}.{key}": slot for key, slot in own.items()}
        return slots

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        length = {"lora_magnitude_vector": _lengths(delta)} if isinstance(delta, Magnitude) else {}
        if isinstance(delta, EmbeddingLoRADelta):
            return {"lora_embedding_A": plain(delta.A), "lora_embedding_B": plain(delta.B)} | length
        if isinstance(delta, EmbeddingRowsDelta | HeadRowsDelta):
            return {}  # of all sites at once: `slots`
        assert isinstance(delta, LoRADelta), type(delta)
        pair = {"lora_A.weight": plain(delta.pair()[0]), "lora_B.weight": _blocks(delta)} | length
        if delta.B_bias is not None:
            pair["lora_B.bias"] = _block_bias(delta)
        return pair if delta.bias is None else pair | {"base_layer.bias": plain(delta.bias)}

    def of_base(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        slots = super().of_base(model, adapter, config)
        if config.get("bias") != "all":
            return slots
        biases: dict[int, Any] = {}
        for site, delta in adapter.items():
            biases[id(getattr(site.module, "bias", None))] = getattr(delta, "bias", None)
            if isinstance(delta, CopyDelta):  # each bias of a module that is kept whole stands in the file three times
                copies = dict.fromkeys(("modules_to_save", "modules_to_save.default"), delta.copy)
                for place, module in ({"original_module": site.module} | copies).items():
                    for key, value in module.named_parameters():
                        if key.rpartition(".")[2] == "bias":
                            slots[f"{ROOT}{site.path}.{place}.{key}"] = checked(value, site.path)
        for path, module in targets.modules(model).items():  # a bias that two modules hold stands in the file twice
            twin = biases.get(id(getattr(module, "bias", None)))
            if twin is not None and path not in adapter.sites:
                slots[f"{ROOT}{path}.bias"] = checked(twin, path)
        return slots


def _start(config: Config, model: nn.Module | None) -> dict[str, Any]:
    """`init` and `init_options` of a method."""
    init: Any = config.get("init_lora_weights", True)
    if isinstance(init, bool | str) and init in INITS:
        return {"init": INITS[init]}
    if model is not None and init in TRAINED_INITS:
        return {"init": "kaiming"}
    if init in FROM_BASE and not (model is not None and init == "olora" and _transposed(model, config)):
        return {"init": init}
    if model is not None or not (init == "orthogonal" or init in STARTS or kind_of(str(init)) == "pissa"):
        raise AdapterFileError(
            f"init_lora_weights = {init!r} cannot be computed again from the base, or is not known; convert it with "
            "peft (save_pretrained(..., path_initial_model_for_weight_conversion=...)) to plain LoRA"
        )
    field, names = STARTS.get(init, ("", {}))
    given = value_of(config, field, {}, dict) if field else {}
    for key, value in given.items():
        if key not in names and value is not None and value != FIXED.get(key):
            raise AdapterFileError(f"{field}: {key} = {value!r} is not supported; leave it out")
    return {"init": init, "init_options": {ours: given[key] for key, ours in names.items() if key in given}}


def _used(config: Config, field: str, paths: set[str] | None) -> dict[str, Any]:
    """A pattern field of a folder without the keys that fit none of its targets: peft ignores them."""
    given = value_of(config, field, {}, dict)
    if paths is None:
        return given
    fits = vocabulary.pattern_value
    return {key: value for key, value in given.items() if any(fits({key: True}, path, False) for path in paths)}


def _transposed(model: nn.Module, config: Config) -> bool:
    """Whether a target is a Conv1D, whose weight peft's OLoRA decomposes the wrong way round."""
    return any(isinstance(model.get_submodule(path), Conv1D) for path in targets.targeted(model, config))


def _ranks(method: LoRA, pairs: dict[str, Any]) -> Config:
    """Ranks and alphas; a pair in n blocks has rank n r, and an alpha that leaves its factor as it is."""
    ranks, alphas = dict(method.rank_pattern), dict(method.alpha_pattern)
    parts = {path: len(delta.rows) for path, delta in pairs.items() if isinstance(delta, LoRADelta)}
    blocked = {path: count for path, count in parts.items() if count > 1}
    for path, count in blocked.items():
        alpha = vocabulary.pattern_value(method.alpha_pattern, path, method.alpha)
        own = {re.escape(path): len(pairs[path].pair()[0])}
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
        return plain(delta.pair()[1])
    rank = delta.rank

    def fill(full: Tensor) -> None:
        parts = [full[rows, i * rank : (i + 1) * rank] for i, rows in enumerate(delta.rows)]
        delta.B.data.copy_(torch.cat(parts))
        whole(full, delta.full_B())

    return Slot((delta.site.out_features, len(delta.pair()[0])), delta.full_B, fill)


def _lengths(delta: Magnitude) -> Slot:
    """The magnitudes over all outputs (O); in the rows of other parts the base's own, which leaves them as they are."""
    if not (isinstance(delta, DoRADelta) and delta.rows):
        return plain(delta.magnitude)
    module, rows = delta.site.module, torch.cat(delta.rows)

    def read() -> Tensor:
        lengths_O = torch.linalg.vector_norm(weight_OI(module).float(), dim=1)
        return lengths_O.index_copy(0, rows.to(lengths_O.device), delta.magnitude.detach().to(lengths_O.device))

    def fill(full: Tensor) -> None:
        delta.magnitude.data.copy_(full[rows])
        mine = read()
        if not mine.is_meta and not torch.allclose(full.to(mine), mine, rtol=OTHER_PRECISION):
            raise AdapterFileError("it changes parts of a fused linear that graft.json does not name")

    return Slot((delta.site.out_features,), read, fill)


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
