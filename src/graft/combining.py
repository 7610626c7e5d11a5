"""A new adapter from a weighted sum of others, exactly.

Shape legend: R rank, I in-features, O out-features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.adapt import attach
from graft.adapter import Adapter
from graft.bank import bank_of, known
from graft.errors import ConfigError
from graft.method import from_dict
from graft.routes import entry_of

HOW = ("cat",)


@torch.no_grad()
def combine(model: nn.Module, entry: Any, name: str, how: str = "cat") -> Adapter:
    """Attach a new low-rank adapter that is the weighted sum of others.

    Args:
        entry: a dict of name to weight, for example {"a": 0.5, "b": 0.5}.
        name: of the new adapter.
        how: "cat" puts the factors side by side: exact, and the ranks add up.

    Returns:
        The new adapter; the others stay as they are.

    Raises:
        ConfigError: an adapter that is not a plain low-rank change, or that holds a head or biases of its own.
        RouteError: an unknown name.
    """
    bank = bank_of(model)
    chosen = known(bank, entry_of(entry))
    if how not in HOW:
        raise ConfigError(f"how is one of {', '.join(HOW)}, not {how!r}")
    if not chosen:
        raise ConfigError("name at least one adapter to combine")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for each, weight in chosen:
        for site, delta in bank[each].items():
            factors = delta.factors()
            if factors is None:
                kind = bank[each].method.name
                raise ConfigError(f"adapter {each!r} ({kind}) cannot be summed: {site.path} holds more than B A")
            parts.setdefault(site.path, []).append((factors[0], weight * bank[each].scale * factors[1]))
    ranks = {path: sum(A.shape[0] for A, _ in pairs) for path, pairs in parts.items()}
    top = max(ranks.values())
    pattern = {path: rank for path, rank in ranks.items() if rank != top}
    settings: dict[str, Any] = {"targets": tuple(parts), "rank": top, "alpha": top, "head": False}
    method = from_dict({"method": "lora", **settings, "rank_pattern": pattern, "alpha_pattern": pattern})
    adapter = attach(model, method, name, peft_compat=True)
    for site, delta in adapter.items():
        pairs = parts[site.path]
        delta.A.copy_(torch.cat([A for A, _ in pairs]))  # type: ignore[operator]
        delta.B.copy_(torch.cat([B for _, B in pairs], 1))  # type: ignore[operator]
    return adapter
