"""UniPELT: LoRA, a prefix and a bottleneck, each times a gate (Mao et al. 2022, arXiv 2110.07577).

    G = mean over the tokens t of a text of sigmoid(w x_t + b),   for each text, layer and sub-module
    lora            W x + G s B A x                         x: the linear's input; in a fused qkv a gate for each part
    prefix_tuning   attention(q, [G PK; K], [G PV; V])      x: what enters the attention
    bottleneck      h1 + u + G Up relu(Down z)              x: z, what Down reads; Pfeiffer's place (see `bottleneck`)

w (1, D) starts from N(0, 0.02), b (1) at zero. A and B have s = alpha / r; PK, PV (P, K d) are made by an MLP while
training. In encoder-decoders the encoder's, the decoder's and the cross-attention have a prefix each.

The paper's code and AdapterHub's differ in this: there padding counts in the mean, and the gate stands in the place of
s (alpha = rank computes that). AdapterHub's bottleneck gate reads u instead of z; the paper's reads z, as here.

A mean over a text looks ahead: in a decoder's training the gates see the answer. In generation with a cache they see
the prompt at its step, and then at each step the new token alone.

Shape legend: B rows, T tokens, I in, O out, D width, P virtual tokens, K key/value heads, d head size, G gates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import attend, roles
from graft.errors import ConfigError, SiteError
from graft.method import SERIAL, Build, Delta, Method, nearest, parameter
from graft.methods.bottleneck import Bottleneck, BottleneckDelta
from graft.methods.compose import head_of
from graft.methods.lora import LoRA, LoRADelta
from graft.methods.prefix import PLACES, PrefixDelta, PrefixTable, PrefixTuning, heads_of
from graft.roles import Site
from graft.texts import Texts

SUBMODULES = ("lora", "prefix_tuning", "bottleneck")
STD = 0.02


@dataclass(frozen=True, kw_only=True)
class UniPELT(Method):
    """Gated LoRA, prefix and bottleneck as one adapter (Mao et al. 2022, arXiv 2110.07577); gates (1, D) and a bias.

    Args:
        rank: r of LoRA on queries and values.
        alpha: LoRA's factor is alpha / rank, times the gate.
        length: P, the prefix's rows.
        hidden: width of the MLP that makes the prefix while training; None trains the rows themselves.
        reduction: the bottleneck's width is the model's divided by it (at least 1).
        size: the bottleneck's width itself; None for what `reduction` gives.
        submodules: which of the three; without "lora" it is the paper's UniPELT (AP).

    Raises:
        ConfigError: a value out of range, an unknown or repeated sub-module, `layers` or `modules_to_save`.
        SiteError: the model lacks a place that a sub-module needs.
    """

    rank: int = 8
    alpha: float = 2
    length: int = 10
    hidden: int | None = 512
    reduction: int = 16
    size: int | None = None
    submodules: tuple[str, ...] | str = SUBMODULES

    name: ClassVar[str] = "unipelt"
    place: ClassVar[str] = "several"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "UNIPELT"
    paper: ClassVar[str] = "Mao et al. 2022, arXiv 2110.07577"
    trains: ClassVar[str] = "its LoRA, its prefix with the MLP, its bottleneck, and D + 1 per gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None or self.modules_to_save:
            raise ConfigError("UniPELT: layers and modules_to_save are not for a recipe; leave them out")
        if self.reduction < 1 or (self.size is not None and self.size < 1):
            raise ConfigError(f"UniPELT: reduction and size must be at least 1, not {self.reduction}, {self.size}")
        if isinstance(self.submodules, str):
            object.__setattr__(self, "submodules", (self.submodules,))
        unknown = next((each for each in self.submodules if each not in SUBMODULES), None)
        if unknown is not None:
            raise ConfigError(f"UniPELT: submodules names {unknown!r}; {nearest(unknown, SUBMODULES)}")
        if not self.submodules or len({*self.submodules}) < len(self.submodules):
            raise ConfigError("UniPELT: submodules names each of its sub-modules once, and at least one")
        # LoRA alone starts at the base, whatever its gate is.
        object.__setattr__(self, "starts_equal", self.submodules == ("lora",))
        self._plain(width=1, both=False)

    def parts_of(self, build: Build) -> dict[str, Method]:
        if len(self.submodules) == 1:
            return {}
        size = self.size or max(1, _width(build) // self.reduction)
        parts = {each: dataclasses.replace(self, submodules=(each,), size=size, head=False) for each in self.submodules}
        return parts | head_of(self, build)

    def sites(self, build: Build) -> list[Site]:
        return self._only(build).sites(build)

    def shared(self, sites: list[Site], build: Build) -> nn.Module | None:
        return self._only(build).shared(sites, build)

    def delta(self, site: Site, build: Build) -> Delta:
        if self.submodules == ("prefix_tuning",):
            return GatedPrefixDelta(site, build, self.length)
        inner = self._only(build).delta(site, build)
        if isinstance(inner, BottleneckDelta):
            return GatedBottleneckDelta(site, inner)
        if not isinstance(inner, LoRADelta):
            raise SiteError(f"{site.path}: UniPELT gates linears, not {type(site.module).__name__}")
        return GatedLoRADelta(site, inner)

    def finish(self, shared: nn.Module | None) -> None:
        if isinstance(shared, PrefixTable):
            shared.drop()

    def _only(self, build: Build) -> Method:
        """The one sub-module of a part, without its gate."""
        return self._plain(width=_width(build), both=roles.is_encoder_decoder(build.model))[self.submodules[0]]

    def _plain(self, *, width: int, both: bool) -> dict[str, Method]:
        """The sub-modules without gates, for a model of that width, with two stacks or one."""
        size = self.size or max(1, width // self.reduction)
        where = PLACES if both else None
        return {
            "lora": LoRA(rank=self.rank, alpha=self.alpha, head=False),
            "prefix_tuning": PrefixTuning(length=self.length, hidden=self.hidden, where=where, head=False),
            "bottleneck": Bottleneck(kind="pfeiffer", size=size, activation="relu", head=False),
        }


def _width(build: Build) -> int:
    return roles.select(build.model, ("attention.query",))[0].in_features


class Gate(nn.Module):
    """`count` gates on hidden states: weight (G, D), bias (G)."""

    def __init__(self, count: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.weight = parameter(count, width, like=like)
        self.bias = parameter(count, like=like)
        nn.init.normal_(self.weight, std=STD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """sigmoid(W x + b) of each token, (B, T, G), in fp32 at least: means of many tokens need it."""
        open_BTG = F.linear(x_BTD, self.weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype))
        return open_BTG.to(torch.promote_types(x_BTD.dtype, torch.float32)).sigmoid()


class GatedLoRADelta(Delta):
    """y + G s B A x; a fused linear has a gate for each part that is asked."""

    reads_texts = True

    def __init__(self, site: Site, inner: LoRADelta) -> None:
        super().__init__()
        self.inner = inner
        self.gate = Gate(max(1, len(inner.rows)), site.in_features, inner.A)
        owner_O = torch.zeros(site.out_features, dtype=torch.long)
        for i, rows in enumerate(inner.rows):
            owner_O[rows] = i
        self.owner = owner_O if len(inner.rows) > 1 else None

    def after(self, x_BTI: Tensor, y_BTO: Tensor, texts: Texts | None = None) -> Tensor:
        assert texts is not None
        gate_BTG = texts.mean(self.gate(x_BTI)).to(y_BTO.dtype)
        if self.owner is not None:
            gate_BTG = gate_BTG.index_select(-1, self.owner.to(gate_BTG.device))
        return y_BTO + gate_BTG * self.inner.after(x_BTI, torch.zeros_like(y_BTO))


class GatedBottleneckDelta(Delta):
    """y + G Up relu(Down z)."""

    order = SERIAL
    reads_texts = True

    def __init__(self, site: Site, inner: BottleneckDelta) -> None:
        super().__init__()
        self.inner = inner
        self.tap = inner.tap
        self.gate = Gate(1, site.out_features, inner.down)

    def after(self, x_BTI: Tensor, y_BTO: Tensor, texts: Texts | None = None) -> Tensor:
        assert texts is not None
        z_BTD = self.inner.reads(x_BTI, y_BTO)
        return y_BTO + texts.mean(self.gate(z_BTD)).to(y_BTO.dtype) * self.inner.added(z_BTD)


class GatedPrefixDelta(PrefixDelta):
    """The prefix of one attention layer, its keys and values times the gate of the text that reads them."""

    reads_texts = True

    def __init__(self, site: Site, build: Build, length: int) -> None:
        super().__init__(site, *heads_of(site, build), shift=0 if site.role == "cross_attention" else length)
        self.gate = Gate(1, _width(build), next(site.module.parameters()))

    def attend(self, call: Any, base: Any) -> tuple[Tensor, Tensor | None]:
        texts: Texts = call.texts
        if attend.packed(call):
            return self._gated(call, texts.index[0, call.mask.starts], base)
        if not texts.packed:
            return self._gated(call, texts.index[:, 0], base)
        call = dataclasses.replace(call, mask=attend.explicit_mask(call))
        found = texts.index.unique().tolist()
        places = [(texts.index[0] == text).nonzero()[:, 0] for text in found]
        runs = [self._gated(attend.part_of(call, place, 2), texts.index[0, place[:1]], base) for place in places]
        back = torch.cat(places).argsort()
        out = torch.cat([out for out, _ in runs], 1).index_select(1, back)
        weights = [weight for _, weight in runs if weight is not None]
        return out, torch.cat(weights, 2).index_select(2, back) if weights else None

    def _gated(self, call: Any, text_B: Tensor, base: Any) -> tuple[Tensor, Tensor | None]:
        """Attention of queries of which each row is of one text."""
        assert isinstance(self.shared, PrefixTable)
        gate_B = call.texts.means(self.gate(call.input))[text_B, 0]
        rows_P2Kd = self.shared.rows(self.path).unflatten(-1, (2, self.heads, self.size))
        rows_BP2Kd = gate_B[:, None, None, None, None] * rows_P2Kd
        return base(attend.prepend(call, rows_BP2Kd[..., 0, :, :], rows_BP2Kd[..., 1, :, :]))
