"""Which tensor of a folder belongs where, in peft's form and in our own.

A `Slot` joins a tensor of the file to a place in the adapter: saving reads all slots, loading fills each exactly once.
LoRA on some parts of a fused linear stands in peft's file as one pair with a block-diagonal B; our own load takes the
blocks out again, bit for bit, and refuses a file with anything outside of them.

Shape legend: I in, O out, R rank, V vocabulary, P virtual tokens, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft import files_peft, roles
from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.method import CopyDelta, Delta
from graft.methods.ia3 import InputScaleDelta, OutputScaleDelta
from graft.methods.lora import BiasDelta, EmbeddingLoRADelta, LoRADelta
from graft.methods.prefix import PrefixDelta, PrefixTable
from graft.methods.prompt import PromptDelta
from graft.weights import is_embedding, weight_OI

ROOT = "base_model.model."
Config = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One tensor of a folder: its shape, where values come from and go to; optional ones are not written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    fill: Callable[[Tensor], Any]
    optional: bool = False


def own_slots(adapter: Adapter) -> dict[str, Slot]:
    """Our own form: parameters by site and name, what sites share once, and base parameters by their own names."""
    slots = {name: _selected(adapter, name) for name in adapter.selected}
    for site, delta in adapter.items():
        for key, value in _state(delta).items():
            slots[f"{ROOT}{site.path}.{key}"] = _plain(value)
    if isinstance(adapter.shared, PrefixTable):
        slots["prompt_embeddings"] = _table(adapter.shared)
    elif adapter.shared is not None:
        for key, value in adapter.shared.state_dict(keep_vars=True).items():
            slots[f"base_model.shared.{key}"] = _plain(value)
    return slots


def peft_slots(model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
    """peft's form. `config` is the folder's: its fields say how many rows a prompt has."""
    virtual = config["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING")
    root = "base_model." if virtual else ROOT
    slots: dict[str, Slot] = {}
    for site, delta in adapter.items():
        slots |= {f"{root}{site.path}.{key}": slot for key, slot in _delta_slots(delta).items()}
        if isinstance(delta, PromptDelta):
            stacks = config.get("num_transformer_submodules") or (2 if roles.is_encoder_decoder(model) else 1)
            slots["prompt_embeddings"] = _prompt(delta, stacks)
    if isinstance(adapter.shared, PrefixTable):
        _check_heads(adapter, config)
        count = len(adapter.shared.widths)
        permuted = roles.is_encoder_decoder(model) and not adapter.peft_compat
        slots["prompt_embeddings"] = _table(adapter.shared, [2 * i % count for i in range(count)] if permuted else None)
    if not virtual:
        slots = _base_slots(model, adapter, config) | slots
    return slots


def _delta_slots(delta: Delta) -> dict[str, Slot]:
    if isinstance(delta, LoRADelta):
        pair = {"lora_A.weight": _plain(delta.A), "lora_B.weight": _blocks(delta)}
        if delta.B_bias is not None:
            pair["lora_B.bias"] = _block_bias(delta)
        return pair if delta.bias is None else pair | {"base_layer.bias": _plain(delta.bias)}
    if isinstance(delta, EmbeddingLoRADelta):
        return {"lora_embedding_A": _plain(delta.A), "lora_embedding_B": _plain(delta.B)}
    if isinstance(delta, InputScaleDelta):
        return {"ia3_l": _plain(delta.scale, (1, len(delta.scale)))}
    if isinstance(delta, OutputScaleDelta):
        return {"ia3_l": _scales(delta)}
    if isinstance(delta, CopyDelta | BiasDelta):
        return {key: _plain(value) for key, value in _state(delta).items()}
    assert isinstance(delta, PromptDelta | PrefixDelta), type(delta)
    return {}


def _base_slots(model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
    """What peft writes of the base itself, by the way: embeddings that are targeted, biases of modules kept whole."""
    slots = {}
    for path, module in files_peft.embeddings(model).items():
        for name in ("base_layer.weight", "weight"):
            slots[f"{ROOT}{path}.{name}"] = _own_weight(module, path)
    for site, delta in adapter.items() if config.get("bias") == "all" else ():
        if isinstance(delta, CopyDelta):  # each bias of a module that is kept whole stands in the file three times
            for place, module in (("original_module", site.module), ("modules_to_save", delta.copy)):
                for key, value in module.named_parameters():
                    if key.rpartition(".")[2] == "bias":
                        slots[f"{ROOT}{site.path}.{place}.{key}"] = _check(value, site.path)
    return slots


def _own_weight(module: nn.Module, path: str) -> Slot:
    weight: Any = module.weight if is_embedding(module) else weight_OI(module)
    return _check(weight, path)


def _check(own: Tensor, path: str) -> Slot:
    """A tensor of the base that a file may hold and that must be the model's own."""

    def same(new: Tensor) -> None:
        mine, new = own.detach().float(), new.to(own.device).float()
        if not own.is_meta and not torch.allclose(mine, new, rtol=2**-7, atol=1e-6):
            raise AdapterFileError(f"it holds another {path} than the model's: the adapter belongs to a changed base")

    return Slot(tuple(own.shape), lambda: own.detach(), same, optional=True)


def _plain(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Slot:
    """The slot of a parameter or buffer, in the file perhaps of another shape."""
    shape = tuple(tensor.shape) if shape is None else shape
    return Slot(shape, lambda: tensor.detach().view(shape), lambda new: tensor.data.copy_(new.view(tensor.shape)))


def _blocks(delta: LoRADelta) -> Slot:
    """B as one (O, n r) matrix; what stands outside of the blocks must be zero."""
    if not delta.rows:
        return _plain(delta.B)
    rank = delta.rank

    def fill(full: Tensor) -> None:
        parts = [full[rows, i * rank : (i + 1) * rank] for i, rows in enumerate(delta.rows)]
        delta.B.data.copy_(torch.cat(parts))
        _whole(full, delta.full_B())

    return Slot((delta.site.out_features, delta.A.shape[0]), delta.full_B, fill)


def _block_bias(delta: LoRADelta) -> Slot:
    """The bias of B over all outputs (O)."""
    bias = delta.B_bias
    assert bias is not None
    if not delta.rows:
        return _plain(bias)

    def read() -> Tensor:
        full = delta.full_B_bias()
        assert full is not None
        return full

    def fill(full: Tensor) -> None:
        bias.data.copy_(full[torch.cat(delta.rows)])
        _whole(full, read())

    return Slot((delta.site.out_features,), read, fill)


def _scales(delta: OutputScaleDelta) -> Slot:
    """The vector over all outputs, as (O, 1); 1 in the rows of other parts."""
    rows = delta.rows
    if rows is None:
        return _plain(delta.scale, (delta.size, 1))

    def fill(full: Tensor) -> None:
        delta.scale.data.copy_(full[rows, 0])
        _whole(full, delta.full_scale()[:, None])

    return Slot((delta.size, 1), lambda: delta.full_scale()[:, None], fill)


def _whole(full: Tensor, kept: Tensor) -> None:
    if not kept.is_meta and not torch.equal(full.to(kept.dtype), kept.cpu()):
        raise AdapterFileError("it changes parts of a fused linear that graft.json does not name")


def _prompt(delta: PromptDelta, stacks: int) -> Slot:
    """peft's (P * stacks, D) rows, of which the first P act; where we hold P alone, the others are zero."""
    rows, width = delta.length * stacks, delta.prompt.shape[1]

    def read() -> Tensor:
        full = delta.prompt.new_zeros(rows, width)
        full[: len(delta.prompt)] = delta.prompt[:rows]
        return full

    def fill(new: Tensor) -> None:
        delta.prompt.data.zero_()
        delta.prompt.data[: len(new)].copy_(new[: len(delta.prompt)])

    return Slot((rows, width), read, fill)


def _table(table: PrefixTable, order: list[int] | None = None) -> Slot:
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


def _check_heads(adapter: Adapter, config: Config) -> None:
    deltas = [delta for _, delta in adapter.items() if isinstance(delta, PrefixDelta)]
    heads, size = deltas[0].heads, deltas[0].size
    for field, own in {"num_layers": len(deltas), "num_attention_heads": heads, "token_dim": heads * size}.items():
        if config.get(field) not in (None, own):
            raise AdapterFileError(f"{field} = {config[field]!r} in adapter_config.json, the model has {own}")


def _selected(adapter: Adapter, name: str) -> Slot:
    parameter = adapter.selected[name]

    def values() -> Tensor:
        return parameter.data if adapter.acting else adapter.other[name]

    return Slot(tuple(parameter.shape), values, lambda new: values().copy_(new))


def _state(delta: Delta) -> dict[str, Tensor]:
    """A delta's tensors by name; those of a module's copy have the names that they have in the module."""
    inner = delta.copy if isinstance(delta, CopyDelta) else delta
    return inner.state_dict(keep_vars=True)
