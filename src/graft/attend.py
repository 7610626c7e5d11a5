"""The attention seam: transformers' own attention interface, with the adapters of a row in between.

Shape legend: B rows, H query heads, K key/value heads, T queries, S keys, D head size, P virtual tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft import roles
from graft.errors import SiteError
from graft.fast import segments, short
from graft.fast.segments import Segments
from graft.hooks import Tap
from graft.method import AttentionDelta
from graft.roles import Site
from graft.texts import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.bank import Bank

PREFIX = "graft_"
TAKEN = ("sdpa", "eager")
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function, for some rows or some queries.

    `mask` is None, a bool mask (True: visible) or an additive one, broadcastable to (B, H, T, S); or the `Segments` of
    a packed row, each of which sees itself and the rows in front of it alone. `past` is the number of cached tokens
    before the first query. `options` goes to the model's own function as it came. `queries` says which of a packed
    batch's tokens the queries are, None for all; `front` how many rows stand in front of the keys. `input`
    (B, T, width), what the module was called with, and the `texts` (B, T) of the queries are there if a delta of the
    module reads texts.
    """

    module: nn.Module
    query_BHTD: Tensor
    key_BKSD: Tensor
    value_BKSD: Tensor
    mask: Any
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


def through(kind: str) -> Callable[..., Result]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Result:
        if isinstance(attention_mask, Segments) and torch.compiler.is_compiling():
            return uncompiled(module, query, key, value, attention_mask, **options)
        seat: Seat | None = module.__dict__.get("_graft_seat")
        inner = _inner(module, kind)
        if seat is None or seat.bank.asleep:
            return _run(inner, AttentionCall(module, query, key, value, attention_mask, 0, options))
        seat.bank.visit(seat.path)
        call = AttentionCall(module, query, key, value, attention_mask, seat.bank.past, options, **seat.read())
        return _attend(seat, call, lambda c: _run(inner, c))

    uncompiled = torch.compiler.disable(attention)  # the texts of each batch would make another graph
    return attention


def _inner(module: nn.Module, kind: str) -> Callable[..., Result]:
    if kind == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kind]


def _run(inner: Callable[..., Result], call: AttentionCall) -> Result:
    if isinstance(call.mask, Segments):
        if inner is ALL_ATTENTION_FUNCTIONS["sdpa"] and segments.takes_varlen(call):
            return segments.varlen(call)
        return by_text(call, lambda one: _run(inner, one))
    if inner is ALL_ATTENTION_FUNCTIONS["sdpa"] and short.takes(call):
        return short.attention(call)
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
    apart = isinstance(call.mask, Segments) and call.mask.lengths == route.lengths
    if route.by_token and not apart:
        call = dataclasses.replace(call, mask=explicit_mask(call))
    for names, parts in kinds.items():
        index = torch.cat(parts)
        if apart:
            mine = [number for number, entry in enumerate(route.entries) if seat.acts(entry) == names]
            part, index = segments.select(call, mine)
        else:
            part = part_of(call, index, dim)
        out, weight = _chain(seat, names, base)(part)
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


def inner(run: Any) -> Iterator[AttentionDelta]:
    """The deltas that the `base` of `AttentionDelta.attend` runs, outermost first."""
    while isinstance(run, _Link):
        yield run.delta
        run = run.rest


def trains(call: AttentionCall, delta: AttentionDelta) -> bool:
    """Whether any parameter of the adapter that this delta belongs to trains."""
    here: Seat = call.module.__dict__["_graft_seat"]
    name = next(name for name, each in here.deltas.items() if each is delta)
    return any(parameter.requires_grad for parameter in here.bank[name].parameters())


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


def by_text(call: AttentionCall, run: Callable[[AttentionCall], Result]) -> Result:
    """Run each text of a call whose mask is `Segments` as a row of its own; the outputs stand end to end."""
    return segments.each(call, run, prepend)


def packed(call: AttentionCall) -> bool:
    """Whether the mask of a call is `Segments`."""
    return isinstance(call.mask, Segments)


def texts_of(call: AttentionCall) -> int:
    """How many texts the rows of a call are, as far as its mask says."""
    return len(call.mask.lengths) if isinstance(call.mask, Segments) else call.key_BKSD.shape[0]


def explicit_mask(call: AttentionCall) -> Tensor | None:
    """The mask, written out where None would have meant causal, or `Segments` several texts."""
    if isinstance(call.mask, Segments):
        return call.mask.whole()
    size, keys = call.query_BHTD.shape[2], call.key_BKSD.shape[2]
    if call.mask is not None or size == 1 or not _causal(call):
        return call.mask
    seen = torch.ones(size, keys, dtype=torch.bool, device=call.query_BHTD.device).tril(keys - size)
    return seen[None, None]


def prepend(call: AttentionCall, key_PKD: Tensor, value_PKD: Tensor) -> AttentionCall:
    """The call with P rows in front of keys and values, as if they stood in the cache.

    Every query sees them, whatever mask there is, unless they lie behind its window.

    Args:
        key_PKD, value_PKD: (P, K, D) for all rows or (B, P, K, D), used as stored: no rotation. Of a packed row B are
            its texts.
    """
    if isinstance(call.mask, Segments):
        return dataclasses.replace(
            call, mask=call.mask.behind(key_PKD, value_PKD), front=call.front + key_PKD.shape[-3]
        )
    batch, length = call.key_BKSD.shape[0], key_PKD.shape[-3]
    key = key_PKD.to(call.key_BKSD.dtype).transpose(-3, -2).expand(batch, -1, -1, -1)
    value = value_PKD.to(call.value_BKSD.dtype).transpose(-3, -2).expand(batch, -1, -1, -1)
    options = dict(call.options)
    if options.get("position_bias") is not None:
        options["position_bias"] = _biased(call, length)
    return dataclasses.replace(
        call,
        key_BKSD=torch.cat([key, call.key_BKSD], 2),
        value_BKSD=torch.cat([value, call.value_BKSD], 2),
        mask=_widened(call, length),
        options=options,
        front=call.front + length,
    )


def _widened(call: AttentionCall, length: int) -> Tensor | None:
    """The mask with columns for P rows in front.

    A window of W tokens is W keys: those of its own that a query sees, and then rows in front, the last ones first.
    """
    mask, keys, window = explicit_mask(call), call.key_BKSD.shape[2], _window(call)
    if window is not None and keys + length <= window:
        window = None
    if mask is None and window is None:
        return None
    if mask is None:
        mask = call.query_BHTD.new_ones(1, 1, call.query_BHTD.shape[2], keys, dtype=torch.bool)
    mask = mask[..., :keys]
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    wide = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if window is None:
        return wide
    seen_BHT1 = (mask if mask.dtype == torch.bool else mask > lowest / 2).sum(-1, keepdim=True)
    place_P = torch.arange(length, 0, -1, device=mask.device)
    hidden_BHTP = F.pad(seen_BHT1 + place_P > window, (0, keys), value=False)
    return wide.masked_fill(hidden_BHTP, lowest)


def _window(call: AttentionCall) -> int | None:
    """How many keys a query sees in this causal attention at most; None where there is no window."""
    if not _causal(call):
        return None
    config = getattr(call.module, "config", None)
    of_all = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    own = getattr(call.module, "sliding_window", of_all)  # where the call does not say
    window: int | None = call.options.get("sliding_window", own)
    return window or None


def _causal(call: AttentionCall) -> bool:
    causal = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if causal is None else causal)


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
