"""LoRA: a low-rank sum on a frozen weight (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + s * B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt(r), arXiv 2312.03732)

Linear and Conv1D: A (r, I) from U(-1/sqrt(I), 1/sqrt(I)), B (O, r) zero. Embedding: A (r, V) zero, B (D, r) from
N(0, 1), y = E[x] + s * A^T[x] B^T. A fused qkv of which only some parts are asked has one pair per part: A (n r, I),
and B's blocks write to the rows of their part alone (microsoft/LoRA's MergedLinear); peft has one pair for the whole.

Shape legend: N rows, T tokens, I in, O out, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles, vocabulary
from graft.errors import ConfigError, SiteError
from graft.method import Build, Delta, Method, inside, parameter
from graft.roles import Site
from graft.weights import is_embedding, is_linear

BIASES = ("none", "all", "lora_only")
INITS = ("kaiming", "gaussian", "random")
STACK_FROM = 3
"""Groups in a batch from which stacked products are taken instead of a loop over the groups."""


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linears and embeddings (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: r; the count per site is r * (in + out).
        alpha: the factor on the sum is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        dropout: on the input of A only, while training.
        targets: roles, module names, "all-linear", or a regex as one string.
        exclude: roles or module names to leave out.
        rslora: rank-stabilised scale.
        bias: "none", "lora_only" (biases of the targets train too) or "all" (every bias of the model).
        lora_bias: a bias on B, starting at zero.
        rank_pattern, alpha_pattern: module-name regex to rank or alpha; the first that matches counts.
        init: "kaiming", "gaussian" (A from N(0, 1/r)), or "random" (B too; for tests).

    Raises:
        ConfigError: a value out of range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ("attention.query", "attention.value")
    exclude: tuple[str, ...] | str = ()
    rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: str = "kaiming"

    name: ClassVar[str] = "lora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(rank < 1 for rank in (self.rank, *self.rank_pattern.values())):
            raise ConfigError(f"LoRA: rank must be at least 1, not {self.rank}")
        if 0 in (self.alpha, *self.alpha_pattern.values()):
            raise ConfigError("LoRA: alpha=0 would never act")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA: dropout must be in [0, 1), not {self.dropout}")
        if self.bias not in BIASES:
            raise ConfigError(f"LoRA: bias is one of {', '.join(BIASES)}, not {self.bias!r}")
        if self.init not in INITS:
            raise ConfigError(f"LoRA: init is one of {', '.join(INITS)}, not {self.init!r}")

    def sites(self, build: Build) -> list[Site]:
        found = super().sites(build)
        for field_name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field_name):
                if not any(vocabulary.pattern_value({key: True}, site.path, False) for site in found):
                    raise SiteError(f"{field_name}: {key!r} fits none of the {len(found)} targets")
        return found

    def delta(self, site: Site, build: Build) -> Delta:
        rank = vocabulary.pattern_value(self.rank_pattern, site.path, self.rank)
        alpha = vocabulary.pattern_value(self.alpha_pattern, site.path, self.alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        if is_embedding(site.module):
            if self.lora_bias:
                raise ConfigError(f"LoRA: lora_bias cannot be used on the embedding {site.path}; exclude it")
            return EmbeddingLoRADelta(site, rank, scale, self.init)
        if not is_linear(site.module):
            raise SiteError(f"{site.path}: LoRA acts on linears and embeddings, not {type(site.module).__name__}")
        parts = () if build.peft_compat else roles.parts_asked(site, self.targets)
        rows = [roles.part_rows(site, part, _config(build)) for part in parts]
        return LoRADelta(site, self, rank, scale, rows)

    def extras(self, build: Build) -> list[tuple[Site, Delta]]:
        if self.bias != "all":
            return []
        taken = {site.path for site in self.sites(build)}
        whole = {site.path for site in roles.task_heads(build.model)} if self.head else set()
        for path, module in build.model.named_modules():
            if getattr(module, "bias", None) is not None and getattr(module, "weight", torch.empty(0)).dim() > 2:
                raise SiteError(f"LoRA: bias='all' cannot train the bias of {path}, a {type(module).__name__}")
        return [
            (Site(path, "other", None, module, 0, module.bias.shape[0]), BiasDelta(module))
            for path, module in build.model.named_modules()
            if isinstance(getattr(module, "bias", None), nn.Parameter)
            and not path.startswith("adapters.")
            and path not in taken
            and not inside(path, self.modules_to_save)
            and not any(path == each or path.startswith(f"{each}.") for each in whole)
        ]


class LoRADelta(Delta):
    """The pair of one linear; parameters A (n r, I) and B (O, r), n the number of parts (1 for a whole linear)."""

    def __init__(self, site: Site, method: LoRA, rank: int, scale: float, rows: list[Tensor]) -> None:
        super().__init__()
        self.site = site
        self.rank = rank
        self.scale = scale
        self.rows = rows
        self.dropout = method.dropout
        weight = weight_of(site)
        count = max(1, len(rows))
        self.A = parameter(count * rank, site.in_features, like=weight)
        self.B = parameter(sum(map(len, rows)) or site.out_features, rank, like=weight)
        self.B_bias = parameter(self.B.shape[0], like=weight) if method.lora_bias else None
        base = getattr(site.module, "bias", None)
        self.bias = None
        if method.bias != "none" and base is not None:
            self.bias = nn.Parameter(base.detach().clone().float())
        if method.init == "gaussian":
            nn.init.normal_(self.A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if method.init == "random":
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        x = F.dropout(x_BTI, self.dropout, self.training)
        down = F.linear(x, self.A.to(x.dtype))
        up = self._up(down) * self.scale
        if self.rows:
            y_BTO = y_BTO.index_add(-1, torch.cat(self.rows).to(up.device), up.to(y_BTO.dtype))
        else:
            y_BTO = y_BTO + up.to(y_BTO.dtype)
        if self.bias is not None:
            y_BTO = y_BTO + (self.bias - self.site.module.bias).to(y_BTO.dtype)  # type: ignore[operator]
        return y_BTO

    def _up(self, down: Tensor) -> Tensor:
        bias = None if self.B_bias is None else self.B_bias.to(down.dtype)
        if not self.rows:
            return F.linear(down, self.B.to(down.dtype), bias)
        blocks = self.B.to(down.dtype).split([len(rows) for rows in self.rows])
        up = torch.cat([F.linear(h, B) for h, B in zip(down.split(self.rank, -1), blocks, strict=True)], -1)
        return up if bias is None else up + bias

    def full_B(self) -> Tensor:
        """B as one (O, n r) matrix: block-diagonal over the parts, zero in the rows of the others."""
        if not self.rows:
            return self.B
        full = self.B.new_zeros(self.site.out_features, self.A.shape[0])
        at = 0
        for i, rows in enumerate(self.rows):
            full[rows.to(full.device), i * self.rank : (i + 1) * self.rank] = self.B[at : at + len(rows)]
            at += len(rows)
        return full

    def full_B_bias(self) -> Tensor | None:
        """The bias of B over all outputs (O), or None."""
        if self.B_bias is None or not self.rows:
            return self.B_bias
        return self.B_bias.new_zeros(self.site.out_features).index_copy(
            0, torch.cat(self.rows).to(self.B_bias.device), self.B_bias
        )

    def weight_delta(self) -> Tensor:
        return self.scale * (self.full_B().float() @ self.A.float())

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.bias is not None or self.B_bias is not None:
            return None
        return self.A, self.scale * self.full_B()

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.bias is not None and bias_O is not None:
            bias_O = bias_O + (self.bias - self.site.module.bias.float())  # type: ignore[operator]
        extra = self.full_B_bias()
        if extra is not None:
            bias_O = self.scale * extra + (0 if bias_O is None else bias_O)
        return weight_OI + self.weight_delta(), bias_O

    @classmethod
    def stack(cls, parts: list[tuple[Any, float, Tensor]], x_NTI: Tensor, y_NTO: Tensor) -> Tensor | None:
        deltas: list[LoRADelta] = [delta for delta, _, _ in parts]
        if len(parts) < STACK_FROM or x_NTI.dim() != 3 or any(_special(delta) for delta in deltas):
            return None
        width = max(delta.rank for delta in deltas)
        A_KRI = torch.stack([F.pad(d.A, (0, 0, 0, width - d.rank)) for d in deltas]).to(x_NTI.dtype)
        B_KOR = torch.stack([F.pad(d.B * (d.scale * w), (0, width - d.rank)) for d, w, _ in parts]).to(x_NTI.dtype)
        rows = torch.cat([index for _, _, index in parts])
        owner = torch.cat([torch.full_like(index, k) for k, (_, _, index) in enumerate(parts)])
        down = torch.bmm(x_NTI.index_select(0, rows), A_KRI[owner].transpose(1, 2))
        up = torch.bmm(down, B_KOR[owner].transpose(1, 2))
        return y_NTO.index_add(0, rows, up.to(y_NTO.dtype))


class EmbeddingLoRADelta(Delta):
    """The pair of an embedding: A (r, V) zero, B (D, r) from N(0, 1)."""

    def __init__(self, site: Site, rank: int, scale: float, init: str) -> None:
        super().__init__()
        self.site = site
        self.rank = rank
        self.scale = scale
        weight = weight_of(site)
        self.A = parameter(rank, site.in_features, like=weight)
        self.B = parameter(site.out_features, rank, like=weight)
        nn.init.normal_(self.B)
        if init == "random":
            nn.init.normal_(self.A)

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        low = F.embedding(x_BTI, self.A.T)
        factor = self.scale * embed_scale(self.site.module)
        return y_BTO + (factor * F.linear(low, self.B)).to(y_BTO.dtype)

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B.float() @ self.A.float())

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.A, self.scale * self.B


class BiasDelta(Delta):
    """A trained copy of a module's bias beside the frozen original: y + (b' - b)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base = [module.bias]  # in a list: the base owns it
        self.bias = nn.Parameter(module.bias.detach().clone().float())  # type: ignore[operator]

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return y_BTO + (self.bias - self.base[0]).to(y_BTO.dtype)  # type: ignore[operator]

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.bias - self.base[0].float()  # type: ignore[operator]
        return weight_OI, None if bias_O is None else bias_O + change


def weight_of(site: Site) -> Tensor:
    """A tensor on the site's device, for new parameters to sit beside."""
    return site.module.weight  # type: ignore[return-value]


def embed_scale(module: nn.Module) -> float:
    """The factor that a scaled embedding (Gemma 3, BART) applies to its rows; 1 where there is none."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale)


def _config(build: Build) -> Any:
    return build.model.config


def _special(delta: LoRADelta) -> bool:
    drops = delta.dropout > 0 and delta.training
    return bool(delta.rows) or delta.bias is not None or delta.B_bias is not None or drops
