"""Prefix tuning: P trained keys and values in every attention layer (Li and Liang 2021, arXiv 2101.00190).

    attention = softmax(q [PK; K]^T / sqrt(d) + mask) [PV; V]

The rows are used as stored (no rotation), and the real tokens stand at positions P, P+1, ... . Every query sees the
rows; through a sliding window it sees those that the window reaches, as if they were tokens in front (so does peft).
With `hidden`, rows come from an embedding through Linear(D, hidden), tanh, Linear(hidden, 2 L K d) while training; only
the result is kept. With `init="text"` they start as the base's own keys and values of real words, which is exactly the
model with these words in its cache. The table has peft's layout: (P, 2L, K, d) with slot 2l the keys of layer l and
2l+1 its values. `peft_compat=True` differs as peft does: in encoder-decoders decoder layer l reads the slots
(4l mod 2L, 4l+1 mod 2L), and the embedding in front of the MLP is K d wide instead of D.

Shape legend: P virtual tokens, L layers, K key/value heads, D width, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import attend, roles
from graft.errors import ConfigError, SiteError
from graft.method import AttentionDelta, Build, Delta, Expanded, Method
from graft.methods.prompt import text_ids
from graft.roles import Site

INITS = ("random", "text")
PLACES = ("encoder", "decoder", "cross")
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trained keys and values in front of each layer's own (Li and Liang 2021, arXiv 2101.00190); table (P, 2 L K d).

    Args:
        length: P; the count is P * 2 * K * d for each layer.
        hidden: width of the MLP that makes the rows while training; None trains them directly.
        where: which attentions of an encoder-decoder: any of "encoder", "decoder", "cross"; None is the decoder's
            self-attention there, and the only self-attention elsewhere.
        dropout: on the rows while training, drawn for each row of a batch.
        init: "random" (normal), or "text": the base's keys and values of `text`, repeated or cut to P tokens.
        text: the text for `init="text"`.
        tokenizer: the model's tokenizer, for `init="text"`.

    Raises:
        ConfigError: a value out of range.
        SiteError: the model's attention does not take prefix rows.
    """

    length: int = 20
    hidden: int | None = None
    where: tuple[str, ...] | str | None = None
    dropout: float = 0.0
    init: str = "random"
    text: str | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False, metadata={"json": False})

    name: ClassVar[str] = "prefix_tuning"
    place: ClassVar[str] = "attention"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    paper: ClassVar[str] = "Li and Liang 2021, arXiv 2101.00190"
    trains: ClassVar[str] = "2 P K d per layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.length < 1 or (self.hidden is not None and self.hidden < 1):
            raise ConfigError(f"{name}: length and hidden must be at least 1, not {self.length}, {self.hidden}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}: dropout must be in [0, 1), not {self.dropout}")
        unknown = sorted(set(self.places or ()) - set(PLACES))
        if unknown:
            raise ConfigError(f"{name}: where names {unknown[0]!r}; known: {', '.join(PLACES)}")
        if self.init not in INITS:
            raise ConfigError(f"{name}: init is one of {', '.join(INITS)}, not {self.init!r}")
        if bool(self.text) != (self.init == "text"):
            raise ConfigError(f"{name}: init='text' and text=... go together")
        if self.init == "text" and self.hidden is not None:
            raise ConfigError(f"{name}: init='text' sets the rows themselves; leave hidden out")

    @property
    def places(self) -> tuple[str, ...] | None:
        return (self.where,) if isinstance(self.where, str) else self.where

    def sites(self, build: Build) -> list[Site]:
        model = build.model
        both = roles.is_encoder_decoder(model)
        if self.places is not None and not both:
            raise SiteError(f"{type(self).__name__}: where is for encoder-decoders, and {type(model).__name__} is none")
        wanted = self.places or ("decoder",)
        found = roles.select(model, ("attention",), layers=self.layers)
        if both:
            found = [s for s in found if ("cross" if s.role == "cross_attention" else s.stack) in wanted]
        else:
            found = [s for s in found if s.role == "attention"]
        for site in found:
            attend.check(model, site)
        return found

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        widths = [2 * heads * size for heads, size in (heads_of(site, build) for site in sites)]
        slots = list(range(len(sites)))
        if build.peft_compat and roles.is_encoder_decoder(build.model):
            slots = [2 * i % len(sites) for i in slots]
        # peft's embedding is as wide as a layer's keys, which are narrower where key/value heads are few.
        width = widths[0] // 2 if build.peft_compat else roles.select(build.model, ("attention.query",))[0].in_features
        like = next(sites[0].module.parameters())
        table = PrefixTable(self.length, widths, slots, [s.path for s in sites], self.hidden, width, like)
        if self.init == "text":
            if len({*slots}) < len(slots):
                raise SiteError(f"{type(self).__name__}: init='text' gives each layer rows of its own, peft's form not")
            table.fill(activations(build.model, text_ids(self), sites))
        return table

    def delta(self, site: Site, build: Build) -> Delta:
        shift = 0 if site.role == "cross_attention" else self.length
        return PrefixDelta(site, *heads_of(site, build), shift=shift, dropout=self.dropout)

    def finish(self, shared: nn.Module | None) -> None:
        assert isinstance(shared, PrefixTable)
        shared.drop()


class PrefixTable(Expanded):
    """What all layers share: the (P, sum of 2 K d) table, or the embedding and MLP that make it while training."""

    def __init__(
        self,
        length: int,
        widths: list[int],
        slots: list[int],
        paths: list[str],
        hidden: int | None,
        width: int,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.length = length
        self.widths = widths
        self.slot = dict(zip(paths, slots, strict=True))
        options: dict[str, Any] = {"device": like.device, "dtype": torch.float32}
        self.table: nn.Parameter | None = None
        self.embedding: nn.Embedding | None = None
        if hidden is None:
            self.table = nn.Parameter(torch.randn(length, sum(widths), **options))
        else:
            self.embedding = nn.Embedding(length, width, **options)
            self.inner = nn.Linear(width, hidden, **options)
            self.outer = nn.Linear(hidden, sum(widths), **options)

    @property
    def saved_numel(self) -> int:
        return self.length * sum(self.widths)

    def rows(self, path: str) -> Tensor:
        """The (P, 2 K d) rows of the layer at `path`."""
        slot = self.slot[path]
        start, width = sum(self.widths[:slot]), self.widths[slot]
        if self.table is not None:
            return self.table[:, start : start + width]
        assert self.embedding is not None
        low = torch.tanh(self.inner(self.embedding.weight))
        return F.linear(low, self.outer.weight[start : start + width], self.outer.bias[start : start + width])

    def expanded(self) -> Tensor:
        """The whole (P, sum of 2 K d) table, whatever makes it."""
        if self.table is not None:
            return self.table
        assert self.embedding is not None
        return self.outer(torch.tanh(self.inner(self.embedding.weight)))

    @torch.no_grad()
    def fill(self, rows: dict[str, Tensor]) -> None:
        """Set the table from the (P, 2 K d) rows of each path."""
        assert self.table is not None
        parts = self.table.split(self.widths, -1)
        for path, slot in self.slot.items():
            parts[slot].copy_(rows[path])

    def drop(self) -> None:
        """Keep the result and forget the MLP."""
        if self.embedding is None:
            return
        trains = self.embedding.weight.requires_grad
        self.table = nn.Parameter(self.expanded().detach().clone(), requires_grad=trains)
        self.embedding = None
        del self.inner, self.outer


class PrefixDelta(AttentionDelta):
    """The prefix of one attention layer; its rows live in the shared table."""

    def __init__(self, site: Site, heads: int, size: int, *, shift: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.path = site.path
        self.heads = heads
        self.size = size
        self.shift = shift
        self.dropout = dropout

    def attend(self, call: Any, base: Any) -> tuple[Tensor, Tensor | None]:
        assert isinstance(self.shared, PrefixTable)
        rows = self.shared.rows(self.path).unflatten(-1, (2, self.heads, self.size))
        if self.dropout and self.training:
            rows = F.dropout(rows.expand(attend.texts_of(call), *rows.shape), self.dropout)
        return base(attend.prepend(call, rows[..., 0, :, :], rows[..., 1, :, :]))


def heads_of(site: Site, build: Build) -> tuple[int, int]:
    """Key/value heads and head size of an attention module, from its weights."""
    module = site.module
    size = next((getattr(module, name) for name in HEAD_SIZES if hasattr(module, name)), 0)
    inside = [s for s in roles.sites(build.model) if s.path.startswith(f"{site.path}.")]
    for inner in inside:
        if inner.role.endswith("attention.key"):
            return inner.out_features // size, size
        if inner.role.endswith("attention.qkv"):
            return len(roles.part_rows(inner, "key", build.model.config)) // size, size
    raise SiteError(f"{site.path}: cannot tell its key/value heads; no prefix can stand there")


@torch.no_grad()
def activations(model: nn.Module, ids: list[int], sites: list[Site]) -> dict[str, Tensor]:
    """The (P, 2 K d) keys and values of the frozen base at each site's path, from one run over P tokens.

    An encoder-decoder reads the tokens on both sides.

    Raises:
        SiteError: a site's attention did not run.
    """
    base: Any = getattr(model, "base_model", model)
    ids_BT = torch.tensor([ids], device=next(sites[0].module.parameters()).device)
    inputs = {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if roles.is_encoder_decoder(model) else {})
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with attend.recorded(model) as seen:
            base(**inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    missed = [site.path for site in sites if site.module not in seen]
    if missed:
        raise SiteError(f"{missed[0]}: its attention did not run over the text; take init='random'")
    pairs = {site.path: seen[site.module] for site in sites}
    return {path: torch.cat([x[0].transpose(0, 1).flatten(1) for x in pair], -1) for path, pair in pairs.items()}
