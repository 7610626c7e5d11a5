"""A new low-rank adapter from others: their exact weighted sum, or peft's ways of mixing them.

    cat           the sum of w_i s_i B_i A_i, factors side by side: exact, ranks add up
    svd           the same sum, cut to a rank by its singular values
    linear        A = sum of +-sqrt(|w_i s_i|) A_i, B = sum of sqrt(|w_i s_i|) B_i, which is not the sum of the products
    magnitude_prune, ties, dare_linear, dare_ties
                  as linear, and before it A_i and B_i lose values: the smallest, or random ones (the rest grows);
                  ties then keeps at each place only the values of the sign that wins there, and takes their mean
    ..._svd       the same done to the whole changes s_i B_i A_i instead of factors, then cut to a rank

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099. Names and formulas are those of
peft's `add_weighted_adapter`.

Shape legend: K adapters, R rank, I in-features, O out-features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapt import attach
from graft.adapter import Adapter
from graft.bank import bank_of, known
from graft.errors import ConfigError
from graft.method import from_dict, nearest
from graft.routes import entry_of

PRUNING: dict[str, str | None] = {"linear": None, "magnitude_prune": "magnitude", "ties": "magnitude"}
PRUNING |= {"dare_linear": "random", "dare_ties": "random"}
"""What loses values before it is mixed, and how."""
HOW = ("cat", "svd", *PRUNING, *(f"{each}_svd" for each in PRUNING if each != "linear"))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Rule:
    """How values are mixed: `base` is a key of `PRUNING`."""

    base: str
    density: float
    majority_sign_method: str
    generator: torch.Generator

    def mix(self, values: list[Tensor], weights: list[float]) -> Tensor:
        """One tensor from K of the same shape."""
        kept_K = torch.stack([self._pruned(each) for each in values])
        weights_K = torch.tensor(weights, dtype=kept_K.dtype, device=kept_K.device)
        weighted_K = kept_K * weights_K.view(-1, *[1] * values[0].dim())
        if "ties" not in self.base:
            return weighted_K.sum(0)
        votes_K = kept_K if self.majority_sign_method == "total" else kept_K.sign()
        winner = torch.where(votes_K.sum(0) >= 0, 1, -1)
        agrees_K = kept_K.sign() == winner
        return (weighted_K * agrees_K).sum(0) / agrees_K.sum(0).clamp(min=1)

    def _pruned(self, values: Tensor) -> Tensor:
        how = PRUNING[self.base]
        if how is None or self.density == 1:
            return values
        if how == "random":
            drawn = torch.bernoulli(torch.full(values.shape, self.density), generator=self.generator)
            return values * drawn.to(values) / self.density
        count = int(self.density * values.numel())
        if count == 0:
            raise ConfigError(f"density: {self.density} of {values.numel()} values is none; give more")
        kept = values.abs().flatten().topk(count).indices
        return torch.zeros_like(values).flatten().index_copy(0, kept, values.flatten()[kept]).view_as(values)


@dataclass(frozen=True)
class Source:
    """One adapter's change at a site, weight * scaled_B A, in fp32; `scale` is what B was multiplied by."""

    name: str
    A_RI: Tensor
    scaled_B_OR: Tensor
    scale: float
    weight: float


@torch.no_grad()
def combine(
    model: nn.Module,
    entry: Any,
    name: str,
    how: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> Adapter:
    """Attach a new low-rank adapter that is made of others, weighted.

    Args:
        entry: a dict of name to weight, for example {"a": 0.5, "b": 0.5}.
        name: of the new adapter.
        how: "cat" (exact, the ranks add up), "svd" (exact, then cut to `rank`), or one of peft's ways of mixing:
            "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties", and each but the first with "_svd".
        rank: of the result, for the ways that end in svd; None for the highest rank among the sources.
        density: for the ways that prune, the share of values that stays, in (0, 1].
        majority_sign_method: for ties, whether the "total" of the values or the "frequency" of signs decides.
        seed: of the values that dare drops.

    Returns:
        The new adapter; the others stay as they are.

    Raises:
        ConfigError: an adapter that is not a plain low-rank change, or that holds a head or biases of its own; ranks
            that cannot be mixed; a setting that this way does not have.
        RouteError: an unknown name.
    """
    chosen = known(bank_of(model), entry_of(entry))
    _check(how, rank, density, majority_sign_method)
    if not chosen:
        raise ConfigError("name at least one adapter to combine")
    sources = _sources(model, chosen)
    rule = Rule(how.removesuffix("_svd"), density or 1.0, majority_sign_method, torch.Generator().manual_seed(seed))
    highest = max(len(source.A_RI) for parts in sources.values() for source in parts)
    pairs = {path: _pair(parts, path, how, rule, rank or highest) for path, parts in sources.items()}
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    top = max(ranks.values())
    pattern = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != top}
    settings: dict[str, Any] = {"targets": tuple(pairs), "rank": top, "alpha": top, "head": False}
    method = from_dict({"method": "lora", **settings, "rank_pattern": pattern, "alpha_pattern": pattern})
    adapter = attach(model, method, name, peft_compat=True)
    for site, delta in adapter.items():
        delta.A.copy_(pairs[site.path][0])  # type: ignore[operator]
        delta.B.copy_(pairs[site.path][1])  # type: ignore[operator]
    return adapter


def _check(how: str, rank: int | None, density: float | None, majority_sign_method: str) -> None:
    if how not in HOW:
        raise ConfigError(f"how is one of {', '.join(HOW)}, not {how!r}; {nearest(how, HOW)}")
    base = how.removesuffix("_svd")
    if rank is not None and (not how.endswith("svd") or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank: {rank} does not fit how={how!r}; it is for svd and the ways that end in _svd, from 1")
    if PRUNING.get(base) is None and density is not None:
        raise ConfigError(f"density: how={how!r} prunes nothing; leave it out")
    if PRUNING.get(base) is not None and (density is None or not 0 < density <= 1):
        raise ConfigError(f"density: how={how!r} needs the share of values that stays, in (0, 1], not {density}")
    if majority_sign_method not in SIGNS:
        raise ConfigError(f"majority_sign_method is one of {', '.join(SIGNS)}, not {majority_sign_method!r}")


def _sources(model: nn.Module, chosen: tuple[tuple[str, float], ...]) -> dict[str, list[Source]]:
    """What each site is made of, in the model's order as far as one adapter's sites say it."""
    bank = bank_of(model)
    found: dict[str, list[Source]] = {}
    for name, weight in chosen:
        for site, delta in bank[name].items():
            factors = delta.factors()
            if factors is None:
                kind = bank[name].method.name
                raise ConfigError(f"adapter {name!r} ({kind}) cannot be summed: {site.path} holds more than B A")
            scale = getattr(delta, "scale", 1.0)
            scale = scale if isinstance(scale, float | int) else 1.0
            source = Source(name, factors[0].float(), factors[1].float(), scale, weight * bank[name].scale)
            found.setdefault(site.path, []).append(source)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _pair(parts: list[Source], path: str, how: str, rule: Rule, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of the result at one site."""
    if how in ("cat", "svd"):
        A_RI = torch.cat([source.A_RI for source in parts])
        B_OR = torch.cat([source.weight * source.scaled_B_OR for source in parts], 1)
        return (A_RI, B_OR) if how == "cat" else _cut_product(A_RI, B_OR, rank)
    if how.endswith("_svd"):
        changes = [source.scaled_B_OR @ source.A_RI for source in parts]
        U, S, Vh = torch.linalg.svd(rule.mix(changes, [source.weight for source in parts]), full_matrices=False)
        return Vh[:rank], U[:, :rank] * S[:rank]
    ranks = [(source.name, len(source.A_RI)) for source in parts]
    if len({rank for _, rank in ranks}) > 1:
        told = ", ".join(f"{name!r} {rank}" for name, rank in ranks)
        raise ConfigError(f"{path}: how={how!r} mixes factors of one rank, and they have {told}; take svd or cat")
    factors = [source.weight * source.scale for source in parts]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    A_RI = rule.mix([source.A_RI for source in parts], signed)
    return A_RI, rule.mix([source.scaled_B_OR / source.scale for source in parts], roots)


def _cut_product(A_RI: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of that rank, from the factors: the product itself is never made."""
    Q_OK, left = torch.linalg.qr(B_OR)
    P_IK, right = torch.linalg.qr(A_RI.T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    return Vh[:rank] @ P_IK.T, Q_OK @ U[:, :rank] * S[:rank]
