"""The attention seam: transformers' own attention interface, with the adapters of a row in between.

Shape legend: B rows, H query heads, K key/value heads, T queries, S keys, D head size, P virtual tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft import roles
from graft.errors import SiteError
from graft.hooks import Tap
from graft.method import AttentionDelta
from graft.roles import Site
from graft.texts import Texts, side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.bank import Bank

PREFIX = "graft_"
TAKEN = ("sdpa", "eager")
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function, for some rows or some queries.

    `mask` is None, a bool mask (True: visible) or an additive one, broadcastable to (B, H, T, S). `past` is the number
    of cached tokens before the first query. `options` goes to the model's own function as it came. `queries` says which
    of a packed batch's tokens the queries are, None for all; `front` how many rows stand in front of the keys. `input`
    (B, T, width), what the module was called with, and the `texts` (B, T) of the queries are there if a delta of the
    module reads texts.
    """

    module: nn.Module
    query_BHTD: Tensor
    key_BKSD: Tensor
    value_BKSD: Tensor
    mask: Tensor | None
    past: Any
    options: dict[str, Any]
    queries: Tensor | None = None
    front: int = 0
    input: Tensor | None = None
    texts: Texts | None = None


class Seat:
    """What an attention module knows of its bank: the attention-level deltas that sit here."""

    def __init__(self, bank: Bank, path: str, biased: nn.Module | None) -> None:
        self.bank = bank
        self.path = path
        self.deltas: dict[str, AttentionDelta] = {}
        self.biased: list[Any] = [biased]  # in a list: a seat is no module and must not be walked as one
        self.tap: Tap | None = None
        self.side = ""

    def acts(self, entry: Any) -> tuple[str, ...]:
        return tuple(name for name, _ in self.bank.leaves(entry) if name in self.deltas)

    def read(self) -> dict[str, Any]:
        """What a call has besides for deltas that read texts."""
        if self.tap is None or self.tap.value is None:
            return {}
        x, self.tap.value = self.tap.value, None
        names = {name for entry in set(self.bank.current.entries) for name in self.acts(entry)}
        if not any(self.deltas[name].reads_texts for name in names):
            return {}
        return {"input": x, "texts": self.bank.texts_at(self.side, x)}


def _through(kind: str) -> Callable[..., Result]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Result:
        seat: Seat | None = module.__dict__.get("_graft_seat")
        inner = _inner(module, kind)
        if seat is None or seat.bank.asleep:
            return inner(module, query, key, value, attention_mask, **options)
        seat.bank.visit(seat.path)
        call = AttentionCall(module, query, key, value, attention_mask, seat.bank.past, options, **seat.read())
        return _attend(seat, call, lambda c: _run(inner, c))

    return attention


def _inner(module: nn.Module, kind: str) -> Callable[..., Result]:
    if kind == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kind]


def _run(inner: Callable[..., Result], call: AttentionCall) -> Result:
    return inner(call.module, call.query_BHTD, call.key_BKSD, call.value_BKSD, call.mask, **call.options)


def _attend(seat: Seat, call: AttentionCall, base: Callable[[AttentionCall], Result]) -> Result:
    route = seat.bank.current
    if route.uniform is not None:
        return _chain(seat, seat.acts(route.uniform), base)(call)
    dim = 2 if route.by_token else 0
    size = call.query_BHTD.shape[dim]
    kinds: dict[tuple[str, ...], list[Tensor]] = {}
    for group in route.groups(size, call.query_BHTD.device):
        kinds.setdefault(seat.acts(group.entry), []).append(group.index)
    if set(kinds) == {()}:
        return base(call)
    outs, weights, order = [], [], []
    if route.by_token:
        call = dataclasses.replace(call, mask=explicit_mask(call))
    for names, parts in kinds.items():
        index = torch.cat(parts)
        out, weight = _chain(seat, names, base)(part_of(call, index, dim))
        outs.append(out)
        weights.append(weight)
        order.append(index)
    back = torch.cat(order).argsort()
    merged = torch.cat(outs, 1 if route.by_token else 0).index_select(1 if route.by_token else 0, back)
    if any(weight is None for weight in weights):
        return merged, None
    width = max(weight.shape[-1] for weight in weights if weight is not None)
    padded = [F.pad(weight, (width - weight.shape[-1], 0)) for weight in weights if weight is not None]
    return merged, torch.cat(padded, dim).index_select(dim, back)


def _chain(seat: Seat, names: tuple[str, ...], base: Callable[[AttentionCall], Result]) -> Any:
    run: Callable[[AttentionCall], Result] = base
    for delta in sorted((seat.deltas[name] for name in names), key=_order)[::-1]:
        run = _Link(delta, run)
    return run


def _order(delta: AttentionDelta) -> int:
    return delta.order


class _Link:
    def __init__(self, delta: AttentionDelta, rest: Callable[[AttentionCall], Result]) -> None:
        self.delta, self.rest = delta, rest

    def __call__(self, call: AttentionCall) -> Result:
        return self.delta.attend(call, self.rest)


def part_of(call: AttentionCall, index: Tensor, dim: int) -> AttentionCall:
    """The call for some rows (dim 0), or for some queries that still see all keys (dim 2)."""
    size = call.query_BHTD.shape[dim]

    def cut(tensor: Any) -> Any:
        wanted = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[dim] == size
        return tensor.index_select(dim, index) if wanted else tensor

    whole = dim == 2
    queries = index if call.queries is None else call.queries.index_select(0, index)
    return dataclasses.replace(
        call,
        query_BHTD=cut(call.query_BHTD),
        key_BKSD=call.key_BKSD if whole else cut(call.key_BKSD),
        value_BKSD=call.value_BKSD if whole else cut(call.value_BKSD),
        mask=cut(call.mask),
        queries=queries if whole else call.queries,
        input=None if call.input is None else call.input.index_select(int(whole), index),
        texts=None if call.texts is None else call.texts.pick(index, int(whole)),
        options={**call.options, "position_bias": cut(call.options["position_bias"])}
        if "position_bias" in call.options
        else call.options,
    )


def explicit_mask(call: AttentionCall) -> Tensor | None:
    """The mask, written out where None would have meant causal."""
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    size, keys = call.query_BHTD.shape[2], call.key_BKSD.shape[2]
    if call.mask is not None or not causal or size == 1:
        return call.mask
    seen = torch.ones(size, keys, dtype=torch.bool, device=call.query_BHTD.device).tril(keys - size)
    return seen[None, None]


def prepend(call: AttentionCall, key_PKD: Tensor, value_PKD: Tensor) -> AttentionCall:
    """The call with P rows in front of keys and values that every query sees, whatever window or mask there is.

    Args:
        key_PKD, value_PKD: (P, K, D) for all rows or (B, P, K, D), used as stored: no rotation.
    """
    batch, length = call.key_BKSD.shape[0], key_PKD.shape[-3]
    key = key_PKD.to(call.key_BKSD.dtype).transpose(-3, -2).expand(batch, -1, -1, -1)
    value = value_PKD.to(call.value_BKSD.dtype).transpose(-3, -2).expand(batch, -1, -1, -1)
    mask = explicit_mask(call)
    if mask is not None:
        if mask.shape[-1] != call.key_BKSD.shape[2]:
            mask = mask[..., : call.key_BKSD.shape[2]]
        mask = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    options = dict(call.options)
    if options.get("position_bias") is not None:
        options["position_bias"] = _biased(call, length)
    return dataclasses.replace(
        call,
        key_BKSD=torch.cat([key, call.key_BKSD], 2),
        value_BKSD=torch.cat([value, call.value_BKSD], 2),
        mask=mask,
        options=options,
        front=call.front + length,
    )


def _biased(call: AttentionCall, length: int) -> Tensor:
    """T5's position bias with columns for the prefix, whose rows stand where a cache would have put them."""
    bias = call.options["position_bias"]
    seat: Seat = call.module.__dict__["_graft_seat"]
    source = seat.biased[0]
    if source is None:
        return F.pad(bias, (length, 0))
    size = call.query_BHTD.shape[2]
    extra = source.compute_bias(size, length, device=bias.device, past_seen_tokens=call.past + length)
    extra = extra.to(bias.dtype).expand(bias.shape[0], -1, bias.shape[2], -1)
    return torch.cat([extra, bias], -1)


def seat(model: PreTrainedModel, bank: Bank, site: Site, name: str, delta: AttentionDelta) -> None:
    """Put an attention-level delta at an attention module.

    Raises:
        SiteError: the model's attention does not go through the interface, or uses a kernel that takes no mask.
    """
    check(model, site)
    install(model, bank)
    here: Seat | None = site.module.__dict__.get("_graft_seat")
    if here is None:
        here = Seat(bank, site.path, _bias_source(model, site))
        site.module.__dict__["_graft_seat"] = here
    here.deltas[name] = delta
    if delta.reads_texts and here.tap is None:
        first = list(inspect.signature(type(site.module).forward).parameters)[1]
        here.tap, here.side = Tap(bank, first), side(model, site)
        bank.hook(f"{site.path}:input", site.module.register_forward_pre_hook(here.tap.before, with_kwargs=True))


def check(model: PreTrainedModel, site: Site) -> None:
    """Raise SiteError unless the attention of this site can take attention-level methods."""
    if not roles.uses_attention_interface(site.module):
        raise SiteError(
            f"{site.path}: {type(site.module).__name__} does not call transformers' attention interface, so no "
            "attention-level method can act there; take a method on linears, for example LoRA"
        )
    kind = model.config._attn_implementation.removeprefix(PREFIX)
    if kind not in TAKEN:
        raise SiteError(
            f"attn_implementation={kind!r} takes no prefix rows; load the model with attn_implementation='sdpa'"
        )


def unseat(model: nn.Module, bank: Bank, site: Site, name: str) -> None:
    """Take a delta away; the last one takes the seat, and the last seat the functions."""
    here: Seat | None = site.module.__dict__.get("_graft_seat")
    if here is None:
        return
    here.deltas.pop(name, None)
    if here.tap is not None and not any(delta.reads_texts for delta in here.deltas.values()):
        here.tap = None
        for handle in here.bank.handles.pop(f"{site.path}:input", []):
            handle.remove()
    if not here.deltas:
        del site.module.__dict__["_graft_seat"]
    if not any("_graft_seat" in module.__dict__ for module in model.modules()):
        uninstall(bank)


def install(model: nn.Module, bank: Bank) -> None:
    """Point every config of the model at our functions, and the mask functions along with them."""
    if bank.attention:
        return
    for kind in TAKEN:
        if PREFIX + kind not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(PREFIX + kind, _through(kind))
            AttentionMaskInterface.register(PREFIX + kind, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        now = getattr(config, "_attn_implementation", None)
        if now in TAKEN:
            bank.attention.append((config, now))
    for config, old in bank.attention:
        config._attn_implementation = PREFIX + old


def keep(bank: Bank) -> None:
    """Put our functions back where something else has set the attention since; a kernel that we lack is refused."""
    for i, (config, _) in enumerate(bank.attention):
        now = config._attn_implementation
        if not now.startswith(PREFIX):
            if now not in TAKEN:
                raise SiteError(f"attn_implementation={now!r} was set since; prefix rows need 'sdpa' or 'eager'")
            bank.attention[i] = (config, now)
            config._attn_implementation = PREFIX + now


def uninstall(bank: Bank) -> None:
    """Give the configs their own attention back."""
    for config, kind in bank.attention:
        config._attn_implementation = kind
    bank.attention = []


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Inside, the base alone runs, and each attention's keys and values (B, K, S, D), as attended to, are noted."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    before = [(config, now) for config in configs.values() if (now := getattr(config, "_attn_implementation", None))]
    bank, name = getattr(model, roles.BANK, None), f"{PREFIX}recorded"
    asleep = getattr(bank, "asleep", False)
    whole: Any = model.config
    kind = whole._attn_implementation.removeprefix(PREFIX)

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Result:
        seen[module] = key, value
        return _inner(module, kind)(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = record
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])  # masks are looked up among these only
    try:
        for config, _ in before:
            config._attn_implementation = name
        if bank is not None:
            bank.asleep = True
        yield seen
    finally:
        for config, now in before:
            config._attn_implementation = now
        if bank is not None:
            bank.asleep = asleep
        del ALL_ATTENTION_FUNCTIONS[name]


def _bias_source(model: nn.Module, site: Site) -> nn.Module | None:
    """The module that computes relative position biases for this stack's self-attention, if there is one."""
    if site.role != "attention" or not hasattr(site.module, "compute_bias"):
        return None
    if getattr(site.module, "has_relative_attention_bias", False):
        return site.module
    stack = [other for other in roles.sites(model) if other.role == "attention" and other.stack == site.stack]
    return next((s.module for s in stack if getattr(s.module, "has_relative_attention_bias", False)), None)
