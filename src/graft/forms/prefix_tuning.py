"""peft's PREFIX_TUNING: one tensor `prompt_embeddings`, (P, 2 L K d): keys, then values, of each layer.

In encoder-decoders peft gives decoder layer l the slots (4l mod 2L, 4l+1 mod 2L): an odd number of layers L is only a
permutation, which is undone here; an even one is held with `peft_compat` alone.

Shape legend: P virtual tokens, L layers, K key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import Config, Slot, Unheld
from graft.forms.virtual import FIELDS, VirtualForm, length_of, stack_of, virtual
from graft.method import Build, Delta, Method
from graft.methods.p_tuning_v2 import PTuningV2
from graft.methods.prefix import PrefixDelta, PrefixTable, PrefixTuning, heads_of

ALIASED = (
    "peft gives decoder layer l the prefix slots (4l mod 2L, 4l+1 mod 2L), so that with an even number of layers L "
    "half of them are never read; only a prefix trained with peft_compat=True has that form"
)


class PrefixForm(VirtualForm):
    """peft's PREFIX_TUNING."""

    kind = "PREFIX_TUNING"
    fields = FIELDS | {"encoder_hidden_size", "prefix_projection", "init_weights", "modules_to_save"}
    methods = (PrefixTuning, PTuningV2)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        length, kept = length_of(config, model), targets.kept(config, model)
        if model is not None and roles.is_encoder_decoder(model) and config.get("num_transformer_submodules") == 1:
            raise AdapterFileError(
                "num_transformer_submodules = 1: peft's prefix then also catches the keys of the cross-attention in an "
                "encoder-decoder, which no other tool can follow; train it again with 2"
            )
        if model is not None:  # a folder holds the expanded result, whatever made it
            return PrefixTuning(length=length, **kept)
        if config.get("init_weights"):
            raise AdapterFileError(f"init_weights = {config['init_weights']!r} is not supported; leave it empty")
        if not config.get("prefix_projection"):
            return PrefixTuning(length=length, **kept)
        hidden = targets.value_of(config, "encoder_hidden_size", None, int)
        return PrefixTuning(length=length, hidden=hidden, **kept)

    def sizes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        build = Build(model, peft_compat=True)
        sites = PrefixTuning().sites(build)
        heads, size = heads_of(sites[0], build)
        own = {"token_dim": (heads * size,), "num_layers": (len(sites),), "num_attention_heads": (heads,)}
        if heads == stack_of(model)["num_attention_heads"]:
            return {**own}
        # Where key/value heads are fewer, peft puts their sizes in the place of the queries'.
        queries = super().sizes(model)
        return {field: values if field == "num_layers" else values + queries[field] for field, values in own.items()}

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        table = adapter.shared
        assert isinstance(method, PrefixTuning) and isinstance(table, PrefixTable)
        if method.layers is not None or (method.places or ("decoder",)) != ("decoder",):
            raise Unheld("peft's prefix stands in every layer's self-attention (the decoder's), this one elsewhere")
        deltas = _deltas(adapter)
        if len({(delta.heads, delta.size) for delta in deltas}) != 1:
            raise Unheld("its layers have key/value heads of unequal number or size")
        if roles.is_encoder_decoder(model) and len(deltas) % 2 == 0 and not adapter.peft_compat:
            raise Unheld(ALIASED)
        heads, size = deltas[0].heads, deltas[0].size
        out = virtual(model, config, method.length, heads * size, len(deltas), heads)
        return out | {"prefix_projection": False, "encoder_hidden_size": heads * size}

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        table = adapter.shared
        assert isinstance(table, PrefixTable)
        deltas = _deltas(adapter)
        own = {"num_layers": len(deltas), "num_attention_heads": deltas[0].heads}
        for field, value in (own | {"token_dim": deltas[0].heads * deltas[0].size}).items():
            if config.get(field) not in (None, value):
                raise AdapterFileError(f"{field} = {config[field]!r} in adapter_config.json, the model has {value}")
        count = len(table.widths)
        permuted = roles.is_encoder_decoder(model) and not adapter.peft_compat
        order = [2 * i % count for i in range(count)] if permuted else None
        return super().slots(model, adapter, config) | {"prompt_embeddings": _rows(table, order)}

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, PrefixDelta), type(delta)
        return {}


def _deltas(adapter: Adapter) -> list[Any]:
    return [delta for _, delta in adapter.items() if isinstance(delta, PrefixDelta)]


def _rows(table: PrefixTable, order: list[int] | None) -> Slot:
    """The (P, 2 L K d) rows of all layers; `order` says where each layer's stand in the file."""
    shape = (table.length, sum(table.widths))

    def read() -> Tensor:
        rows = table.expanded()
        if order is None:
            return rows
        parts = rows.split(table.widths, -1)
        return torch.cat([parts[order.index(i)] for i in range(len(parts))], -1)

    def fill(new: Tensor) -> None:
        assert table.table is not None
        parts = new.split(table.widths, -1)
        table.table.data.copy_(new if order is None else torch.cat([parts[i] for i in order], -1))

    return Slot(shape, read, fill)
