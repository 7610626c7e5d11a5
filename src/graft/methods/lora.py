"""LoRA: a low-rank sum on a frozen weight (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + s * B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt(r), arXiv 2312.03732)

Linear and Conv1D: A (r, I) from U(-1/sqrt(I), 1/sqrt(I)), B (O, r) zero. Embedding: A (r, V) zero, B (D, r) from
N(0, 1), y = E[x] + s * A^T[x] B^T. A fused qkv of which only some parts are asked has one pair per part: A (n r, I),
and B's blocks write to the rows of their part alone (microsoft/LoRA's MergedLinear); peft has one pair for the whole.

A start that is not zero (`lora_init`: PiSSA, OLoRA, LoRA-GA) is taken off again, so the base stays as it is:

    y = W x + b + s * (B A dropout(x) - B0 A0 x),   B A - B0 A0 = [B - B0, B0] [A; A - A0], the pair that is saved

Shape legend: N rows, T tokens, I in, O out, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles, vocabulary
from graft.errors import ConfigError, SiteError
from graft.fast import low_rank
from graft.method import Build, Delta, Method, inside, parameter
from graft.methods import lora_init
from graft.roles import Site
from graft.weights import is_embedding, is_linear

BIASES = ("none", "all", "lora_only")


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
        init: "kaiming", "gaussian" (A from N(0, 1/r)), or "random" (B too; for tests). From the weights: "pissa",
            "pissa_niter_<k>" (faster, randomised), "olora", "orthogonal". From data: "lora_ga", "eva"; see `start`.
        init_options: of lora_ga: batches (8) and gamma (16); of eva: batches (16 at most), rho (2), tau (0.99).
        b_ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B and all vectors learn at b_ratio times the rate of A.

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
    init_options: dict[str, float] = field(default_factory=dict)
    b_ratio: float = 1.0

    name: ClassVar[str] = "lora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    trains: ClassVar[str] = "r (I + O) per linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks, alphas = (self.rank, *self.rank_pattern.values()), (self.alpha, *self.alpha_pattern.values())
        if any(rank < 1 for rank in ranks):
            raise ConfigError(f"LoRA: rank must be at least 1, not {min(ranks)}")
        if 0 in alphas or not all(map(math.isfinite, alphas)):
            raise ConfigError("LoRA: alpha must be a finite number and not 0, which would never act")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA: dropout must be in [0, 1), not {self.dropout}")
        if self.bias not in BIASES:
            raise ConfigError(f"LoRA: bias is one of {', '.join(BIASES)}, not {self.bias!r}")
        lora_init.check(type(self).__name__, self.init, self.init_options, ranks, alphas)
        if not 0 < self.b_ratio < math.inf:
            raise ConfigError(f"{type(self).__name__}: b_ratio must be a positive number, not {self.b_ratio}")

    def rate(self, name: str, parameter: Tensor) -> float:
        return self.b_ratio if name.rpartition(".")[2] == "B" or parameter.dim() == 1 else 1.0

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
            if self.init not in lora_init.RANDOM:
                raise ConfigError(f"LoRA: init={self.init!r} has no form for the embedding {site.path}; exclude it")
            return self.on_embedding(site, rank, scale)
        if not is_linear(site.module):
            raise SiteError(f"{site.path}: LoRA acts on linears and embeddings, not {type(site.module).__name__}")
        parts = () if build.peft_compat else roles.parts_asked(site, self.targets)
        rows = [roles.part_rows(site, part, _config(build)) for part in parts]
        return self.on_linear(site, rank, scale, rows)

    def on_linear(self, site: Site, rank: int, scale: float, rows: list[Tensor]) -> Delta:
        """The delta of a linear; `rows` are the rows of each asked part of a fused one, none for the whole."""
        return LoRADelta(site, self, rank, scale, rows)

    def on_embedding(self, site: Site, rank: int, scale: float) -> Delta:
        """The delta of an embedding."""
        return EmbeddingLoRADelta(site, rank, scale, self.init)

    def wants_batches(self) -> int:
        return int((lora_init.OPTIONS.get(self.init, {}) | self.init_options).get("batches", 0))

    def start(self, model: nn.Module, adapter: Any, batches: Sequence[dict[str, Any]]) -> None:
        """Let `lora_ga` or `eva` make the pairs from training batches (inputs with labels); the base stays as it is.

        Raises:
            ConfigError: no batches, or none with a loss.
            SiteError: a site that the batches do not reach, or a rank that is too high for it.
        """
        lora_init.start(self, model, adapter, batches)

    def start_bytes(self, adapter: Any) -> int:
        """The gradients of all its linears at once, in fp32, for `lora_ga`."""
        if self.init != "lora_ga":
            return 0
        return sum(4 * site.module.weight.numel() for site in adapter.sites.values())

    def begin(self, adapter: Any, steps: int) -> None:
        lora_init.refuse_waiting(self, adapter)

    def saved_as(self, adapter: Any) -> Method:
        """LoRA with a start as plain LoRA: rank and alpha for the pair as it is saved, whatever the start was."""
        return lora_init.saved_as(self, adapter)

    def extras(self, build: Build) -> list[tuple[Site, Delta]]:
        if self.bias != "all":
            return []
        taken = {site.path for site in self.sites(build)}
        whole = {site.path for site in roles.task_heads(build.model)} if self.head else set()
        # BERT's language head has no weight, and its bias is the very one that the decoder inside it adds
        own = {id(getattr(module, "bias", None)) for module in build.model.modules() if hasattr(module, "weight")}
        for path, module in build.model.named_modules():
            if getattr(module, "bias", None) is not None and getattr(module, "weight", torch.empty(0)).dim() > 2:
                raise SiteError(f"LoRA: bias='all' cannot train the bias of {path}, a {type(module).__name__}")
        return [
            (Site(path, "other", None, module, 0, module.bias.shape[0]), BiasDelta(module))
            for path, module in build.model.named_modules()
            if isinstance(getattr(module, "bias", None), nn.Parameter)
            and (hasattr(module, "weight") or id(module.bias) not in own)
            and not path.startswith("adapters.")
            and path not in taken
            and not inside(path, self.modules_to_save)
            and not any(path == each or path.startswith(f"{each}.") for each in whole)
        ]


class LoRADelta(Delta):
    """The pair of one linear; parameters A (n r, I) and B (O, r), n the number of parts (1 for a whole linear).

    A0 and B0 are the start that is taken off again, None where it was zero. `waits`: the pair is to start from data.
    """

    A0: Tensor | None
    B0: Tensor | None

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
        self.waits = method.init in lora_init.OPTIONS
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if lora_init.is_filled(method.init):
            return
        if method.init == "gaussian":
            nn.init.normal_(self.A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if method.init == "random":
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        elif method.init not in lora_init.RANDOM and not self.waits:
            lora_init.from_base(self, method.init)

    @torch.no_grad()
    def begin(self, matrix_OI: Tensor, make: Callable[[Tensor, int], lora_init.Pair], *, take_off: bool) -> None:
        """Start from the pair that `make` gives for a matrix of the weight's shape; for each part from its own rows.

        Args:
            take_off: subtract the product again, so that the change starts at zero.

        Raises:
            SiteError: `make` cannot give this rank.
        """
        blocks = [matrix_OI[rows.to(matrix_OI.device)] for rows in self.rows] or [matrix_OI]
        try:
            pairs = [make(block, self.rank) for block in blocks]
        except ConfigError as error:
            raise SiteError(f"{self.site.path}: {error}; take a lower rank, or leave it out") from error
        self.A.copy_(torch.cat([A for A, _ in pairs]))
        self.B.copy_(torch.cat([B for _, B in pairs]))
        if take_off:
            self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()
        self.waits = False

    def pair(self) -> lora_init.Pair:
        """A (n k, I) and B (O, k) whose product is the change; k = r, or 2 r if the start is taken off again.

        Both halves are of what has changed since the start, so nothing has to cancel.
        """
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        parts = max(1, len(self.rows))
        halves = [A.unflatten(0, (parts, self.rank)) for A in (self.A, self.A - self.A0)]
        return torch.cat(halves, 1).flatten(0, 1), torch.cat([self.B - self.B0, self.B0], 1)

    def kept(self) -> dict[str, Tensor]:
        if self.A0 is None:
            return super().kept()
        A, B = self.pair()
        return {key: value for key, value in super().kept().items() if key not in ("A0", "B0")} | {"A": A, "B": B}

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        up = self._low_rank(x_BTI)
        if self.B_bias is not None:
            up = up + self.B_bias.to(up.dtype)
        up = up * self.scale
        if self.rows:
            y_BTO = y_BTO.index_add(-1, torch.cat(self.rows).to(up.device), up.to(y_BTO.dtype))
        else:
            y_BTO = y_BTO + up.to(y_BTO.dtype)
        change_O = self.bias_change()
        return y_BTO if change_O is None else y_BTO + change_O.to(y_BTO.dtype)

    def bias_change(self) -> Tensor | None:
        """What training has changed of the base's bias (O), or None if it does not train."""
        return None if self.bias is None else self.bias - self.site.module.bias  # type: ignore[operator]

    def into(self, x_BTI: Tensor, y_BTO: Tensor, weight: float) -> Tensor | None:
        drops = self.dropout > 0 and self.training
        if type(self).after is not LoRADelta.after or (drops and self.A0 is not None):
            return None
        dropped = F.dropout(x_BTI, self.dropout) if drops else None
        A, B = self.pair()
        y_BTO = low_rank.add(self.site.module, x_BTI, y_BTO, A, self.full_B(B), weight * self.scale, dropped)
        for change_O, factor in ((self.full_B_bias(), self.scale), (self.bias_change(), 1.0)):
            if change_O is not None:
                y_BTO = y_BTO + (weight * factor * change_O).to(y_BTO.dtype)
        return y_BTO

    def _low_rank(self, x: Tensor) -> Tensor:
        """B A dropout(x) - B0 A0 x: dropout is for what trains, never for what is taken off the base's own product."""
        dropped = F.dropout(x, self.dropout, self.training)
        if self.A0 is not None and self.B0 is not None and self.dropout > 0 and self.training:
            trained = self._up(F.linear(dropped, self.A.to(x.dtype)), self.B)
            return trained - self._up(F.linear(x, self.A0.to(x.dtype)), self.B0)
        A, B = self.pair()
        return self._up(F.linear(dropped, A.to(x.dtype)), B)

    def _up(self, down: Tensor, B: Tensor | None = None) -> Tensor:
        B = self.B if B is None else B
        if not self.rows:
            return F.linear(down, B.to(down.dtype))
        blocks = B.to(down.dtype).split([len(rows) for rows in self.rows])
        return torch.cat([F.linear(h, B) for h, B in zip(down.split(B.shape[1], -1), blocks, strict=True)], -1)

    def full_B(self, B: Tensor | None = None) -> Tensor:
        """B of `pair` as one (O, n k) matrix: block-diagonal over the parts, zero in the rows of the others."""
        B = self.pair()[1] if B is None else B
        if not self.rows:
            return B
        width = B.shape[1]
        full = B.new_zeros(self.site.out_features, len(self.rows) * width)
        at = 0
        for i, rows in enumerate(self.rows):
            full[rows.to(full.device), i * width : (i + 1) * width] = B[at : at + len(rows)]
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
        return self.scale * (self.full_B().float() @ self.pair()[0].float())

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.bias is not None or self.B_bias is not None:
            return None
        return self.pair()[0], self.scale * self.full_B()

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.bias is not None and bias_O is not None:
            bias_O = bias_O + (self.bias - self.site.module.bias.float())  # type: ignore[operator]
        extra = self.full_B_bias()
        if extra is not None:
            bias_O = self.scale * extra + (0 if bias_O is None else bias_O)
        return weight_OI + self.weight_delta(), bias_O

    @property
    def sums(self) -> bool:
        drops = self.dropout > 0 and self.training
        plain = self.bias is None and self.B_bias is None and not self.rows
        return plain and not drops and type(self).after is LoRADelta.after


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
