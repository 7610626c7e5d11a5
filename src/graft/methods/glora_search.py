"""The evolutionary search for the best path of a GLoRA supernet (Chavan et al. 2023, arXiv 2306.07967).

Genes are the forms of A to E at every site. A generation has as many mutants of the survivors as crossovers between
them, and random candidates to fill it up; no candidate is scored twice. The best of all generations survive.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from graft.adapt import attach, use
from graft.bank import Adapter, bank_of, known
from graft.errors import ConfigError, RouteError
from graft.methods.glora import FORMS, Genes, GLoRA, GLoRADelta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Flat = tuple[str, ...]
"""The genes of all sites, one after the other."""
TRIES = 10
"""How many candidates are tried for each that is wanted."""


@dataclass(frozen=True)
class Candidate:
    """One path of a supernet.

    Attributes:
        genes: the forms of A, B, C, D and E, by module path.
        cost: how many values it trains (a task head not counted).
        score: what `score` said of it.
    """

    genes: dict[str, Genes]
    cost: int
    score: float


@dataclass(frozen=True)
class GLoRASearch:
    """What a search found.

    Attributes:
        best: the candidate with the highest score; among equals the cheapest.
        survivors: the best `keep` of all generations, best first.
        history: the candidates that each generation scored.
    """

    best: Candidate
    survivors: tuple[Candidate, ...]
    history: tuple[tuple[Candidate, ...], ...]


def search_glora(
    model: PreTrainedModel,
    name: str,
    score: Callable[[], float],
    *,
    limit: int | None = None,
    population: int = 50,
    generations: int = 20,
    keep: int = 10,
    mutate: float = 0.2,
    seed: int = 0,
) -> GLoRASearch:
    """Search the best path of a trained GLoRA supernet, without gradients (Chavan et al. 2023, arXiv 2306.07967).

    Afterwards the path that was found is the adapter's set path: it acts outside of training and is saved along.

    Args:
        name: a supernet (`GLoRA(supernet=True)`); it is in use while `score` runs, in eval mode.
        score: called once for each candidate; higher is better. Let it measure on validation data: the path is chosen
            by it, so that on test data it would be a choice by the test.
        limit: how many values a path may train; None: as many as the widest.
        population: candidates in a generation.
        generations: at most; it ends before if no new candidate is found.
        keep: how many survive.
        mutate: the probability that a mutant's gene is drawn anew.
        seed: of the search's own generator; torch's is not used.

    Raises:
        ConfigError: `name` is no supernet, a number is out of range, no path fits the limit, or a score is not finite.
        RouteError: no such adapter, the model is merged, or a route has not ended.
    """
    adapter = _supernet(model, name)
    _check(population, generations, keep, mutate)
    space = _Space(adapter, limit, random.Random(seed))
    scores: dict[Flat, float] = {}
    history: list[tuple[Candidate, ...]] = []
    best: list[Flat] = []
    with _searching(model, adapter):
        for _ in range(generations):
            new = space.generation(best, set(scores), population, mutate)
            if not new:
                break
            for flat in new:
                set_genes(adapter, space.genes(flat))
                scores[flat] = _finite(score(), space.genes(flat))
            history.append(tuple(space.candidate(flat, scores[flat]) for flat in new))
            best = sorted(scores, key=lambda flat: (-scores[flat], space.cost(flat)))[:keep]
        if not best:
            raise ConfigError(f"limit = {limit}: no path was found that trains so few values; give more")
    survivors = tuple(space.candidate(flat, scores[flat]) for flat in best)
    set_genes(adapter, survivors[0].genes)
    return GLoRASearch(survivors[0], survivors, tuple(history))


def extract_glora(
    model: PreTrainedModel, name: str, new: str, genes: Mapping[str, Genes] | None = None, *, trainable: bool = True
) -> Adapter:
    """Attach one path of a supernet as a plain GLoRA adapter of its own; it computes what the supernet does on it.

    Args:
        name: the supernet; it stays as it is.
        new: the name of the new adapter.
        genes: the path (`Candidate.genes`); None: the supernet's set path.
        trainable: whether the new adapter trains, for example to fine-tune the winner.

    Raises:
        ConfigError: `name` is no supernet, `new` is taken, or the genes have a form that a part does not have.
        SiteError: the genes name what is no site of the supernet, or choose what it does not have.
        RouteError: no such adapter.
    """
    adapter = _supernet(model, name)
    method: Any = adapter.method
    if genes is not None:
        method = replace(method, genes=dict(genes))
    path = {site.path: method.genes_at(site) for site, delta in adapter.items() if isinstance(delta, GLoRADelta)}
    unknown = set(method.genes) - set(path)
    if unknown:
        raise ConfigError(f"genes: {min(unknown)!r} is no site of {name!r}")
    fixed: dict[str, Any] = {"supernet": False, "choices": {}, "genes": path}
    if len(set(path.values())) == 1:  # one word for each part says it, which is also what peft can hold
        fixed |= {"genes": {}, **dict(zip(FORMS, next(iter(path.values())), strict=True))}
    found = attach(model, replace(method, **fixed), new, peft_compat=adapter.peft_compat, trainable=trainable)
    with torch.no_grad():
        for site, delta in found.items():
            old = adapter.at(site.path)
            if not (isinstance(delta, GLoRADelta) and isinstance(old, GLoRADelta)):
                delta.load_state_dict(old.state_dict())
                continue
            for mine, theirs, form in zip(delta.parts, old.parts, path[site.path], strict=True):
                for value, sliced in zip(mine.parameters(), theirs.factors(form), strict=True):
                    value.copy_(sliced.reshape(value.shape))
    return found


def set_genes(adapter: Adapter, genes: Mapping[str, Genes]) -> None:
    """Let a supernet have this path outside of training; where no genes are given, the widest.

    Raises:
        ConfigError, SiteError: genes that the method or a site does not have.
    """
    assert isinstance(adapter.method, GLoRA)
    method = replace(adapter.method, genes=dict(genes))
    deltas = [(site, delta) for site, delta in adapter.items() if isinstance(delta, GLoRADelta)]
    chosen = [method.genes_at(site) for site, _ in deltas]
    for (_, delta), path in zip(deltas, chosen, strict=True):
        delta.genes = path
    adapter.method = method


class _Space:
    """All paths of a supernet: what each gene may be, and what it costs."""

    def __init__(self, adapter: Adapter, limit: int | None, rng: random.Random) -> None:
        self.rng = rng
        self.paths: list[str] = []
        self.costs: list[dict[str, int]] = []
        for site, delta in adapter.items():
            if isinstance(delta, GLoRADelta):
                self.paths.append(site.path)
                self.costs.extend(delta.costs())
        self.words = [list(costs) for costs in self.costs]
        self.limit = sum(max(costs.values()) for costs in self.costs) if limit is None else limit
        least = sum(min(costs.values()) for costs in self.costs)
        # A path that trains nothing is the base itself and no candidate.
        least = least or min(cost for costs in self.costs for cost in costs.values() if cost)
        if self.limit < least:
            raise ConfigError(f"limit = {self.limit}: the smallest path of the supernet trains {least} values")

    def cost(self, flat: Flat) -> int:
        return sum(costs[word] for costs, word in zip(self.costs, flat, strict=True))

    def genes(self, flat: Flat) -> dict[str, Genes]:
        size = len(FORMS)
        return {path: flat[i * size : (i + 1) * size] for i, path in enumerate(self.paths)}

    def candidate(self, flat: Flat, score: float) -> Candidate:
        return Candidate(self.genes(flat), self.cost(flat), score)

    def generation(self, best: list[Flat], seen: set[Flat], population: int, mutate: float) -> list[Flat]:
        """New candidates within the limit: half mutants and half crossovers where there are survivors, then random."""
        found: dict[Flat, None] = {}
        half = population // 2

        def fill(size: int, make: Callable[[], Flat]) -> None:
            for _ in range(TRIES * (size - len(found))):
                if len(found) == size:
                    return
                flat = make()
                if flat not in seen and 1 <= self.cost(flat) <= self.limit:
                    found[flat] = None

        if best:
            fill(half, lambda: self.mutant(self.rng.choice(best), mutate))
            fill(len(found) + half, lambda: self.crossed(self.rng.choice(best), self.rng.choice(best)))
        fill(population, self.drawn)
        return list(found)

    def mutant(self, flat: Flat, mutate: float) -> Flat:
        return tuple(
            self.rng.choice(words) if self.rng.random() < mutate else word
            for words, word in zip(self.words, flat, strict=True)
        )

    def crossed(self, one: Flat, other: Flat) -> Flat:
        return tuple(self.rng.choice(pair) for pair in zip(one, other, strict=True))

    def drawn(self) -> Flat:
        """A random path; where the limit is so low that none fits, genes are drawn cheaper until one does."""
        for _ in range(TRIES):
            flat = [self.rng.choice(words) for words in self.words]
            if self.cost(tuple(flat)) <= self.limit:
                return tuple(flat)
        total = self.cost(tuple(flat))
        while total > self.limit:
            i = self.rng.randrange(len(flat))
            costs, old = self.costs[i], flat[i]
            flat[i] = self.rng.choice([word for word in costs if costs[word] <= costs[old]])
            total += costs[flat[i]] - costs[old]
        return tuple(flat)


@contextmanager
def _searching(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """The adapter in use, in eval mode, without gradients; all as it was afterwards, and the path if it fails."""
    bank = bank_of(model)
    genes, used = adapter.method.genes, bank.used  # type: ignore[attr-defined]
    modes = [(module, module.training) for module in model.modules()]
    use(model, adapter.name)
    try:
        model.eval()
        with torch.no_grad():
            yield
    except BaseException:
        set_genes(adapter, genes)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        use(model, dict(used) or None)


def _supernet(model: PreTrainedModel, name: str) -> Adapter:
    bank = bank_of(model)
    known(bank, ((name, 1.0),))
    if bank.routes:
        raise RouteError("a route has not ended; search and extract after its block")
    adapter = bank[name]
    if not (isinstance(adapter.method, GLoRA) and adapter.method.supernet):
        raise ConfigError(f"adapter {name!r} is no GLoRA supernet; train one with GLoRA(supernet=True)")
    if adapter not in list(bank):  # the composition's own method, which its folder keeps, would not learn of the path
        raise ConfigError(f"{name!r} is a part of a composed adapter; search a supernet that stands alone")
    return adapter


def _check(population: int, generations: int, keep: int, mutate: float) -> None:
    for what, value in {"population": population, "generations": generations, "keep": keep}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{what} must be an integer of at least 1, not {value!r}")
    if not 0 < mutate <= 1:
        raise ConfigError(f"mutate is a probability above 0, not {mutate!r}")


def _finite(score: float, genes: dict[str, Genes]) -> float:
    value = float(score)
    if not math.isfinite(value):
        raise ConfigError(f"score is {value} for the genes {genes}; it must be finite")
    return value
