"""Merging adapters into the base's weights, and taking them out again bit for bit.

Shape legend: O out-features, I in-features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft import freeze, probe, roles
from graft.adapter import Adapter
from graft.bank import Bank, bank_of, known
from graft.errors import AdapterFileError, MergeError
from graft.hooks import Act, SiteHook
from graft.method import CopyDelta, Delta
from graft.routes import BASE, Entry, entry_of
from graft.weights import dense, is_embedding, is_linear, quantized, set_weight_OI, weight_OI

TIED = ("error", "untie")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What transformers leaves on a quantized model, and what makes it save one."""


@dataclass
class Kept:
    """What a merge replaced in one module: its parameters by name, as objects and as values."""

    module: nn.Module
    name: str
    parameter: nn.Parameter | None
    value: Tensor | None


def merge(model: nn.Module, entry: Any, *, into: str | None = None, tied: str = "error") -> nn.Module:
    """Add adapters into the base's weights, in place; the originals are kept for `unmerge`.

    Args:
        entry: a name, a tuple of names, or a dict of name to weight; they merge in the order in which they act.
        into: "bf16", "fp16" or "fp32" for a quantized base, whose packed weights cannot be changed: every quantized
            linear is replaced by a plain one, and the model is no longer quantized until `unmerge`.
        tied: "error" refuses to merge into a weight that another module shares; "untie" gives the site its own.

    Returns:
        The model, which runs without any adapter until `unmerge`.

    Raises:
        MergeError: a method that does not merge, a tied or quantized weight, a model that is merged already, or merged
            logits that differ from the unmerged ones.
        RouteError: an unknown name.
    """
    bank = bank_of(model)
    chosen = known(bank, entry_of(entry))
    if bank.originals is not None:
        raise MergeError("the model is merged already; call graft.unmerge first")
    if tied not in TIED:
        raise MergeError(f"tied is one of {', '.join(TIED)}, not {tied!r}")
    if bank.routes:
        raise MergeError("a route has not ended; merge after its block")
    if chosen == BASE:
        raise MergeError("name at least one adapter to merge")
    hooks = _hooks(bank, chosen)
    if into is not None and into not in DTYPES:
        raise MergeError(f"into: {into!r} is not one of {', '.join(DTYPES)}")
    _refuse(model, bank, chosen, hooks, into, tied)
    dialled = {name: weight * bank[name].scale for name, weight in chosen}
    before = probe.probe(model, dialled, every=True)
    kept: list[Any] = []
    try:
        freeze.select(model, bank, chosen)
        if into is not None:
            _unpack(model, DTYPES[into], kept)
        _write(model, [(hook.path, hook.acts(chosen)) for hook, _ in hooks], kept)
    except BaseException:
        _put_back(kept)
        freeze.select(model, bank, bank.used)
        raise
    bank.originals = kept
    bank.asleep = True
    try:
        probe.check_probe(model, before, dialled)
    except AdapterFileError as error:
        unmerge(model)
        raise MergeError(f"the merged model does not compute what the adapters did: {error}") from error
    except BaseException:
        unmerge(model)
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base its own weights back, bit for bit; what was in use is in use again.

    Raises:
        MergeError: the model is not merged.
    """
    bank = bank_of(model)
    if bank.originals is None:
        raise MergeError("the model is not merged")
    _put_back(bank.originals)
    bank.originals = None
    bank.asleep = False
    freeze.select(model, bank, bank.used)
    return model


def _hooks(bank: Bank, entry: Entry) -> list[tuple[SiteHook, nn.Module]]:
    found: dict[str, nn.Module] = {}
    for name, _ in entry:
        for site, _delta in bank[name].items():
            found.setdefault(site.path, site.module)
    return [(bank.hooks[path], module) for path, module in found.items() if path in bank.hooks]


def _refuse(
    model: nn.Module, bank: Bank, entry: Entry, hooks: list[tuple[SiteHook, nn.Module]], into: str | None, tied: str
) -> None:
    for name, weight in entry:
        adapter = bank[name]
        if (why := _unmergeable(adapter)) is not None:
            raise MergeError(f"adapter {name!r} ({adapter.method.name}) cannot be merged: {why}")
        for site, delta in adapter.items():
            part = weight * adapter.scale
            if isinstance(delta, CopyDelta) and part != 1.0 and any(site.module.children()):
                raise MergeError(
                    f"adapter {name!r} replaces {site.path}, which is not linear: it merges at weight 1 only"
                )
    if into is not None and not any(quantized(module) for module in model.modules()):
        raise MergeError(f"into: {into} is for a quantized base, and this one is none; leave it out")
    for hook, module in hooks:
        if quantized(module) and into is None:
            raise MergeError(
                f"{hook.path} is quantized and its packed weight cannot be changed; merge into plain weights with "
                "into='bf16', or load the base in 16 or 32 bit and the adapter there"
            )
        if tied == "error" and not _alike(hook.acts(entry)) and (others := _tied(model, module)):
            raise MergeError(
                f"{hook.path} shares its weight with {next(iter(others.values()))}: merging would change both, while "
                "unmerged only the first changes; merge with tied='untie' to give it a weight of its own"
            )


def _unmergeable(adapter: Adapter) -> str | None:
    """Why an adapter cannot be merged: the place, and of a composed one the part and what can be merged instead."""
    bad = {leaf: site.path for leaf, site, delta in reversed([*adapter.owned()]) if not _mergeable(delta)}
    first = next((leaf for leaf in adapter.leaves if leaf.name in bad), None)
    if first is None:
        return None
    if not adapter.parts:
        return f"see {bad[first.name]}"
    good = [repr(leaf.name) for leaf in adapter.leaves if leaf.name not in bad]
    advice = f"merge a part that can be, alone: {', '.join(good)}" if good else "nor can its other parts be"
    return f"its part {first.name!r} ({first.method.name}) is no change of weights, see {bad[first.name]}; {advice}"


def _mergeable(delta: Delta) -> bool:
    if isinstance(delta, CopyDelta):
        return True
    own = type(delta)
    return own.merged is not Delta.merged or own.weight_delta is not Delta.weight_delta


def _storage(module: nn.Module) -> int | None:
    """Where the module's weight lies; None where it has none."""
    weight = getattr(module, "weight", None)
    return weight.data_ptr() if isinstance(weight, Tensor) and not weight.is_meta and weight.numel() else None


def _tied(model: nn.Module, module: nn.Module) -> dict[int, str]:
    """Where each weight in the module lies that a module outside has too, and the path of the latter."""
    inside = set(module.modules())
    own = {_storage(each) for each in inside} - {None}
    outside = [(_storage(each), path) for path, each in roles.modules_of_base(model).items() if each not in inside]
    return {place: path for place, path in outside if place is not None and place in own}


@torch.no_grad()
def _write(model: nn.Module, sites: list[tuple[str, list[Act]]], kept: list[Any]) -> None:
    """Merge what acts at each site; before the first is written, all are kept and what changes alone is untied."""
    every = [(model.get_submodule(path), acts, path) for path, acts in sites]
    for module, _, _ in every:
        for child in module.modules():
            kept.extend(
                Kept(child, name, p, None if p is None else p.detach().clone()) for name, p in child._parameters.items()
            )
    for module, acts, _ in every:
        if not _alike(acts):
            _untie(model, module)
    written: set[int | None] = set()
    for module, acts, path in every:
        _merge_site(module, acts, path, written)


def _alike(acts: list[Act]) -> bool:
    """Whether every module that has the site's weight changes in the same way."""
    return all(delta.everywhere for delta, _ in acts)


def _untie(model: nn.Module, module: nn.Module) -> None:
    """Give a module weights of its own where others have them too."""
    tied = _tied(model, module)
    own: dict[int, nn.Parameter] = {}
    for child in module.modules():
        place = _storage(child)
        if place in tied:
            weight = child.get_parameter("weight").detach().clone()
            child.weight = own.setdefault(place, nn.Parameter(weight, requires_grad=False))


def _merge_site(module: nn.Module, acts: list[Act], path: str, written: set[int | None]) -> None:
    """`written`: where the weights lie that are merged already, of modules that stay tied."""
    rest = [(delta, weight) for delta, weight in acts if not isinstance(delta, CopyDelta)]
    copies = [(delta, weight) for delta, weight in acts if isinstance(delta, CopyDelta)]
    if rest and copies:
        raise MergeError(f"{path}: a trained copy and another change meet here; merge one of the two adapters")
    for copied, weight in copies:
        for own, new in zip(module.parameters(), copied.copy.parameters(), strict=True):
            own.copy_(new if weight == 1.0 else own.float() + weight * (new - own.float()))
    if not rest:
        return
    # All sums first, one write behind: deltas of biases look at the base's own bias.
    matrix = is_linear(module) or is_embedding(module)
    stored = weight_OI(module) if matrix else module.get_parameter("weight")
    weight_now = base_weight = stored if stored.dtype == torch.float64 else stored.float()
    bias = getattr(module, "bias", None)
    bias_now = base_bias = None if bias is None else bias.detach().float()
    for delta, weight in rest:
        # `from_base` deltas change the base's own weight, whatever merged before them.
        from_weight, from_bias = (base_weight, base_bias) if delta.from_base else (weight_now, bias_now)
        merged = delta.merged(from_weight, from_bias)
        if merged is None:
            raise MergeError(f"{path}: this adapter's change is not one of the weight and cannot be merged")
        weight_now = _moved(weight_now, from_weight, merged[0], weight)
        if merged[1] is not None:
            zero = torch.zeros_like(merged[1])
            old = zero if bias_now is None else bias_now
            bias_now = _moved(old, zero if from_bias is None else from_bias, merged[1], weight)
    place = _storage(module)
    if matrix and place not in written:
        set_weight_OI(module, weight_now)
        written.add(place)
    elif not matrix:
        module.get_parameter("weight").copy_(weight_now)
    if bias_now is not None and bias is None:
        raise MergeError(f"{path} has no bias that this adapter's could be merged into; a saved model would lose it")
    if bias_now is not None:
        bias.copy_(bias_now)  # type: ignore[union-attr]


def _moved(now: Tensor, start: Tensor, new: Tensor, weight: float) -> Tensor:
    """What a change from `start` to `new` makes of `now`; the new values themselves where nothing else counts."""
    return new if weight == 1.0 and start is now else now + weight * (new - start)


@dataclass
class Unpacked:
    """The quantized linears that a merge replaced, and what told transformers of them."""

    model: nn.Module
    modules: dict[str, nn.Module]
    marks: dict[str, Any]
    config: Any
    others: list[tuple[Tensor, Tensor]]

    def back(self) -> None:
        for tensor, value in self.others:
            tensor.data = value
        for path, module in self.modules.items():
            self.model.set_submodule(path, module)
        for name, value in self.marks.items():
            setattr(self.model, name, value)
        if self.config is not None:
            self.model.config.quantization_config = self.config  # type: ignore[union-attr]


def _unpack(model: nn.Module, dtype: torch.dtype, kept: list[Any]) -> None:
    """Put a plain linear in the place of every quantized one, without the hooks, which sleep while merged."""
    found = {path: module for path, module in model.named_modules() if quantized(module)}
    marks = {name: getattr(model, name) for name in MARKS if name in model.__dict__}
    config: Any = model.config
    item = Unpacked(model, found, marks, getattr(config, "quantization_config", None), [])
    kept.append(item)
    for path, module in found.items():
        model.set_submodule(path, dense(module, dtype))
    for name, tensor in model.named_parameters():  # buffers, such as rotary tables, keep their precision
        if tensor.is_floating_point() and tensor.dtype != dtype and not name.startswith(f"{roles.BANK}."):
            item.others.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)
    for name in marks:
        delattr(model, name)
    if item.config is not None:
        del config.quantization_config


@torch.no_grad()
def _put_back(kept: list[Any]) -> None:
    for item in reversed(kept):
        if isinstance(item, Unpacked):
            item.back()
            continue
        if item.parameter is None or item.value is None:
            item.module.register_parameter(item.name, None)
            continue
        item.parameter.copy_(item.value)  # not .data: autograd shall see a graph that has become stale
        item.module.register_parameter(item.name, item.parameter)
