"""LongLoRA: LoRA, trained embeddings and norms, and attention in shifted segments (Chen et al. 2023, arXiv 2309.12307).

While it trains, head h lets query i see key j <= i if both are of one segment: floor((i + o) / G) equals
floor((j + o) / G), with o = 0 in the first half of the heads and o = G / 2 in the second. So the first half cuts the
text at G, 2G, ... and the second at G/2, 3G/2, ... . Positions count from the start of each text. In eval mode, without
gradients (as in `generate`) and frozen beside another adapter that trains, attention is the model's own. LoRA sits on
q, k, v and o; the input embedding and all norms are trained as copies. An embedding that is tied to the head changes as
an embedding alone: the head stays the base's.

The paper's code rolls the second half of the heads instead, so that the last segment joins the text's end and its start
and the first G/2 tokens see the last ones. `rolled=True` computes that, for comparison with such models alone.

Positions may be divided by a factor, so that a longer text has the angles of a shorter one (Chen et al. 2023, arXiv
2306.15595); that holds in eval mode too, for the rows of this adapter.

Shape legend: B rows, H query heads, K key/value heads, T queries, S keys, G tokens of a segment, N tokens, D head size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import attend, roles
from graft.errors import ConfigError, RouteError, SiteError
from graft.method import SERIAL, AttentionDelta, Build, CopyDelta, Delta, Method
from graft.methods.lora import LoRA
from graft.positions import PositionDelta
from graft.roles import Site

MOVING = ("dynamic", "longrope")
"""Rotary kinds whose angles change with the length of the batch."""


@dataclass(frozen=True, kw_only=True)
class LongLoRA(LoRA):
    """LoRA for longer texts: shifted segments in training, trained embedding and norms (Chen et al. 2023, arXiv
    2309.12307).

    Args:
        group: G, tokens of a segment (even); None takes `ratio` of each batch's width, rounded up to an even number.
        ratio: the part of a batch's width that a segment has, where `group` is None.
        rolled: the paper's code, whose first tokens see the last ones; for whole, unpadded groups alone.
        embedding, norms: whether the input embedding and all norms train.
        rope_factor: what positions are divided by, on top of the base's own scaling; 1 leaves them.
        context: the length to reach instead: the factor is then ceil(context / the base's own length), at least 1.

    Raises:
        ConfigError: a value out of range, or both `rope_factor` and `context`.
        SiteError: the model is not one causal stack, or (with a factor) has no rotary positions that can be divided.
    """

    targets: tuple[str, ...] | str = ("attention.query", "attention.key", "attention.value", "attention.output")
    group: int | None = None
    ratio: float = 0.25
    rolled: bool = False
    embedding: bool = True
    norms: bool = True
    rope_factor: float = 1.0
    context: int | None = None

    name: ClassVar[str] = "long_lora"
    peft_type: ClassVar[str] = ""
    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2309.12307"
    trains: ClassVar[str] = "r (I + O) per linear, V D for the embedding, D per norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ConfigError(f"LongLoRA: group must be even and at least 2, not {self.group}")
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(f"LongLoRA: ratio must be in (0, 1], not {self.ratio}")
        if not 1.0 <= self.rope_factor < math.inf:
            raise ConfigError(f"LongLoRA: rope_factor must be at least 1, not {self.rope_factor}")
        if self.context is not None and (self.context < 1 or self.rope_factor != 1.0):
            raise ConfigError("LongLoRA: context is a length of at least 1, and stands in the place of rope_factor")
        if self.layers is not None:
            raise ConfigError("LongLoRA: layers has no meaning, segments cut the attention of every layer")

    def sites(self, build: Build) -> list[Site]:
        if not roles.is_decoder(build.model):
            raise SiteError(
                f"LongLoRA: {type(build.model).__name__} is no decoder alone, and segments are for causal "
                "self-attention; take LoRA"
            )
        return super().sites(build)

    def extras(self, build: Build) -> list[tuple[Site, Delta]]:
        found = roles.sites(build.model)
        copied = [site for site in found if site.role == "embedding" and self.embedding]
        copied += [site for site in found if site.role.startswith("norm.") and self.norms]
        whole = {site.path for site in copied}
        out: list[tuple[Site, Delta]] = [pair for pair in super().extras(build) if pair[0].path not in whole]
        out += [(site, CopyDelta(site.module)) for site in copied]
        for site in found:
            if site.role == "attention":
                attend.check(build.model, site)
                if hasattr(site.module, "sinks"):
                    raise SiteError(f"LongLoRA: {site.path} has a sink for each head, which segments would tear apart")
                out.append((site, SegmentDelta(self)))
        factor = self.stretch(build.model.config)
        if factor != 1.0:
            out += [(site, PositionDelta(factor)) for site in _rotary(build.model)]
        return out

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """Whether no positions are divided: no weight holds that."""
        return self.context is None and self.rope_factor == 1.0

    @property
    def starts_equal(self) -> bool:  # type: ignore[override]
        """Whether positions start as the base's."""
        return self.merges

    def stretch(self, config: Any) -> float:
        if self.context is None:
            return self.rope_factor
        text = config.get_text_config()
        length = getattr(text, "max_position_embeddings", None)
        if not isinstance(length, int):
            raise SiteError("LongLoRA: the base's config says no max_position_embeddings; give rope_factor")
        scaling = getattr(text, "rope_parameters", None) or {}
        if scaling.get("rope_type") == "linear":
            length = length * scaling.get("factor", 1.0)
        return float(max(1, math.ceil(self.context / length)))

    def saved_as(self, adapter: Any) -> Method:
        """With the factor that `context` gave on this base."""
        return self if self.context is None else dataclasses.replace(self, rope_factor=adapter.stretch, context=None)


class SegmentDelta(AttentionDelta):
    """Attention in segments while training; nothing of its own is trained or kept."""

    order = SERIAL  # the innermost: others see all heads
    weighted = True  # it is there or it is not, whatever the weight of the LoRA beside it

    def __init__(self, method: LongLoRA) -> None:
        super().__init__()
        self.group = method.group
        self.ratio = method.ratio
        self.rolled = method.rolled
        self.reads_width = method.group is None

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight_OI, bias_O  # merged models run as in eval mode

    def attend(self, call: Any, base: Any) -> tuple[Tensor, Tensor | None]:
        if not self._cuts(call):
            return base(call)
        if attend.packed(call):
            return attend.by_text(call, lambda one: self.attend(one, base))
        self._check(call, base)
        heads, kept = call.query_BHTD.shape[1], call.key_BKSD.shape[1]
        half, repeats = heads // 2, heads // kept
        first = _heads(call, 0, -(-half // repeats))
        second = _heads(call, half // repeats, kept)
        size = self._size(call)
        whole = call.mask is None and call.front == 0 and call.queries is None
        if self.rolled:
            out_first, out_second = _cut(first, 0, size, base), _roll(second, size, base)
        elif whole:
            out_first, out_second = _cut(first, 0, size, base), _cut(second, size // 2, size, base)
        else:
            out_first, out_second = _masked(first, 0, size, base), _masked(second, size // 2, size, base)
        # A half that is no multiple of the repeats brings heads of the other one along.
        skipped = half - half // repeats * repeats
        return torch.cat([out_first[:, :, :half], out_second[:, :, skipped:]], 2), None

    def _cuts(self, call: Any) -> bool:
        """Whether this forward trains the adapter; a frozen one beside another that trains acts as in eval mode."""
        return self.training and torch.is_grad_enabled() and attend.trains(call, self)

    def _check(self, call: Any, base: Any) -> None:
        if not isinstance(call.past, int) or call.past:
            raise RouteError("LongLoRA: training cannot go on from a cache; pass whole texts, or call model.eval()")
        inner = [delta for delta in attend.inner(base) if isinstance(delta, SegmentDelta)]
        if any(delta._cuts(call) for delta in inner):
            raise RouteError("LongLoRA: two adapters of one row cut its attention; train one at a time")
        tokens = call.key_BKSD.shape[2] - call.front
        if self.rolled and (
            call.mask is not None or call.front or call.queries is not None or tokens % self._size(call)
        ):
            raise RouteError(
                f"LongLoRA: rolled=True takes whole segments of {self._size(call)} tokens, unpadded, not packed, with "
                f"attn_implementation='sdpa'; these are {tokens} tokens{' with a mask' * (call.mask is not None)}"
            )

    def _size(self, call: Any) -> int:
        if self.group is not None:
            return self.group
        return 2 * math.ceil((call.key_BKSD.shape[2] - call.front) * self.ratio / 2)


def _heads(call: Any, start: int, stop: int) -> Any:
    """The call for some key/value heads and the queries that read them."""
    heads = call.query_BHTD.shape[1]
    repeats = heads // call.key_BKSD.shape[1]
    wanted = slice(start * repeats, stop * repeats)
    mask = call.mask
    return dataclasses.replace(
        call,
        query_BHTD=call.query_BHTD[:, wanted],
        key_BKSD=call.key_BKSD[:, start:stop],
        value_BKSD=call.value_BKSD[:, start:stop],
        mask=mask[:, wanted] if mask is not None and mask.shape[1] == heads else mask,
    )


def _cut(call: Any, lead: int, size: int, base: Any) -> Tensor:
    """Causal attention in segments of `size` tokens behind a first one of `lead`: (B, T, H, D)."""
    tokens = call.query_BHTD.shape[2]
    lead = min(lead, tokens)
    last = lead + (tokens - lead) // size * size
    outs = [
        _alike(call, start, stop, length, base)
        for start, stop, length in ((0, lead, lead), (lead, last, size), (last, tokens, tokens - last))
        if stop > start
    ]
    return torch.cat(outs, 1)


def _alike(call: Any, start: int, stop: int, length: int, base: Any) -> Tensor:
    """Causal attention in the segments of one length from `start` to `stop`, as rows of one batch."""
    rows = call.query_BHTD.shape[0]

    def folded(tensor_BHTD: Tensor) -> Tensor:
        return tensor_BHTD[:, :, start:stop].unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)

    parts = {name: folded(getattr(call, name)) for name in ("query_BHTD", "key_BKSD", "value_BKSD")}
    return base(dataclasses.replace(call, **parts))[0].unflatten(0, (rows, -1)).flatten(1, 2)


def _roll(call: Any, size: int, base: Any) -> Tensor:
    """The paper's code: half a segment to the left, cut, and back; the last segment holds the end and the start."""
    shift = size // 2
    names = ("query_BHTD", "key_BKSD", "value_BKSD")
    rolled = dataclasses.replace(call, **{name: getattr(call, name).roll(-shift, 2) for name in names})
    return _cut(rolled, 0, size, base).roll(shift, 1)


def _masked(call: Any, shift: int, size: int, base: Any) -> Tensor:
    """The same segments as a mask, counted from the start of each text; rows in front of the keys stay visible."""
    mask_BHTS = attend.explicit_mask(call)
    tokens = call.key_BKSD.shape[2] - call.front
    device = call.query_BHTD.device
    column_N = torch.arange(tokens, device=device)
    own_T = column_N if call.queries is None else call.queries
    if mask_BHTS is None:  # a text of one token
        return base(call)[0]
    mask_BHTS = mask_BHTS[..., : call.key_BKSD.shape[2]]
    seen_BHTS = mask_BHTS if mask_BHTS.dtype == torch.bool else mask_BHTS > torch.finfo(mask_BHTS.dtype).min / 2
    # A token that does not see the one before it begins a text.
    before_T = (own_T - 1).clamp(min=0) + call.front
    goes_on_BT = seen_BHTS[:, 0, torch.arange(len(own_T), device=device), before_T] & (own_T > 0)
    start_BN = column_N.repeat(len(seen_BHTS), 1).index_copy(1, own_T, torch.where(goes_on_BT, 0, own_T)).cummax(1)[0]
    segment_BN = (column_N - start_BN + shift) // size
    same_BTN = segment_BN[:, own_T, None] == segment_BN[:, None]
    self_TN = own_T[:, None] == column_N  # padding must see something
    same = nn.functional.pad(same_BTN, (call.front, 0), value=True)[:, None]
    alone = nn.functional.pad(self_TN, (call.front, 0), value=False)
    if mask_BHTS.dtype == torch.bool:
        mask = mask_BHTS & same | alone
    else:
        mask = mask_BHTS.masked_fill(~same, torch.finfo(mask_BHTS.dtype).min).masked_fill(alone, 0.0)
    return base(dataclasses.replace(call, mask=mask))[0]


def _rotary(model: nn.Module) -> list[Site]:
    """The rotary modules of a model.

    Raises:
        SiteError: it has none, or one whose angles change with the length.
    """
    found = [site for site in roles.sites(model) if site.role == "position"]
    rotary = [site for site in found if any(name.endswith("inv_freq") for name, _ in site.module.named_buffers())]
    if not rotary:
        raise SiteError(f"LongLoRA: {type(model).__name__} has no rotary positions; leave rope_factor and context out")
    for site in rotary:
        kinds = getattr(site.module, "rope_type", "default")
        moving = sorted(set(kinds.values() if isinstance(kinds, dict) else (kinds,)) & set(MOVING))
        if moving:
            raise SiteError(
                f"LongLoRA: {site.path} scales by {moving[0]!r}, which changes with the length of the batch; "
                "positions cannot be divided on top of it"
            )
    return rotary
