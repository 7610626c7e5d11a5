"""One adapter of a model: a method, and its parameters at the model's sites; or several methods that act as one."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from graft.errors import ConfigError, RouteError, SiteError
from graft.fast import mixed
from graft.method import SCALE, AttentionDelta, CopyDelta, Delta, InputDelta, Method
from graft.positions import PositionDelta
from graft.roles import Site
from graft.routes import Entry

log = logging.getLogger("graft")


class Adapter(nn.Module):
    """One adapter: a method, and its parameters at the sites of one model.

    A composed adapter has parts, adapters of their own, each with one method; routes may name a part as "name/part".

    Attributes:
        name: what routes call it.
        method: the recipe.
        peft_compat: whether it has peft's form where that differs from the method.
        parts: a composed adapter's, by name.
        dropped: paths that the method chose and then left out, after it had seen data.
    """

    def __init__(self, name: str, method: Method, *, peft_compat: bool) -> None:
        super().__init__()
        self.name = name
        self.method = method
        self._scale = 1.0
        self.peft_compat = peft_compat
        self.deltas = nn.ModuleDict()
        self.parts = nn.ModuleDict()
        self.shared: nn.Module | None = None
        self.sites: dict[str, Site] = {}
        self.dropped: list[str] = []
        self.shift: dict[str, int] = {}
        self.stretch = 1.0
        self.starts: int | None = None
        self.inputs: list[str] = []
        self.selected: dict[str, nn.Parameter] = {}
        self.other: dict[str, Tensor] = {}
        self.note: str | None = None
        self.card: dict[str, Any] | None = None
        self.ignored: set[str] = set()
        self.acting = False
        self.trains = False
        self.guided = False
        """Whether a trainer asks the method what it wants to do while training."""

    def warn_unguided(self) -> None:
        """Say once that whoever trains this adapter does not ask its method for its part in training."""
        for leaf in self.leaves:
            if leaf.guided or not leaf.trainable:
                continue
            leaf.guided = True
            wants = _wants(leaf)
            if wants:
                log.warning(
                    "adapter %r (%s) trains outside of GraftTrainer, which would have called %s of its method; without "
                    "them it trains as something else (docs/python.md, a plain loop)",
                    leaf.name,
                    leaf.method.name,
                    ", ".join(wants),
                )

    @property
    def leaves(self) -> list[Adapter]:
        """The parts of a composed adapter; the adapter itself if it is none."""
        return [*self.parts.values()] or [self]  # type: ignore[list-item]

    def resolved(self, weight: float) -> Entry:
        """Its leaves as an entry, the dial of a composed adapter in their weights."""
        if not self.parts:
            return ((self.name, weight),)
        return tuple((part.name, weight * self._scale) for part in self.leaves)

    @property
    def scale(self) -> float:
        """The dial: what multiplies the adapter's weight wherever it acts; soft prompts and prefixes have none."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not math.isfinite(value):
            raise RouteError(f"adapter {self.name!r}: its scale cannot be {value}; give a finite number")
        if value != 1.0 and self.unweighted:
            raise RouteError(f"adapter {self.name!r} ({self.method.name}) has no dial; its scale can only be 1")
        if value != self._scale:
            self._scale = float(value)
            mixed.changed()

    @property
    def unweighted(self) -> bool:
        """Whether it can only act with weight 1: prompts, prefixes and what trains the base itself."""
        return bool(self.selected) or any(not delta.weighted for _, delta in self.items())

    @property
    def trainable(self) -> int:
        """How many values train now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def saved(self) -> int:
        """How many values a saved folder holds."""
        count = sum(p.numel() for p in self.selected.values())
        for leaf in self.leaves:
            shared = getattr(leaf.shared, "saved_numel", None)
            if leaf.shared is not None and shared is None:
                shared = sum(tensor.numel() for tensor in leaf.shared.state_dict().values())
            count += sum(delta.saved_numel for _, delta in leaf.items()) + (shared or 0)
        return count

    def at(self, path: str) -> Delta:
        """The delta at the site with this path; of a composed adapter the first part's that has one."""
        leaf = next((leaf for leaf in self.leaves if path in leaf.sites), self)
        return leaf.deltas[key_of(path)]  # type: ignore[return-value]

    def items(self) -> Iterator[tuple[Site, Delta]]:
        """Each site with its delta, in the model's order; of a composed adapter part by part."""
        for _, site, delta in self.owned():
            yield site, delta

    def owned(self) -> Iterator[tuple[str, Site, Delta]]:
        """As `items`, with the name of the part that each delta belongs to."""
        for leaf in self.leaves:
            for path, site in leaf.sites.items():
                yield leaf.name, site, leaf.deltas[key_of(path)]  # type: ignore[misc]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The adapter's parameters; for a selection method those of the base that it trains."""
        yield from super().parameters(recurse)
        yield from self.selected.values()

    def add(self, site: Site, delta: Delta) -> None:
        """Own the delta of one more site."""
        if site.path in self.sites:
            raise SiteError(f"{self.method.name}: two deltas of one adapter at {site.path}; name each place once")
        delta.bind(self.shared)
        self.deltas[key_of(site.path)] = delta
        self.sites[site.path] = site
        if isinstance(delta, InputDelta):
            self.inputs.append(site.path)
        if isinstance(delta, PositionDelta):
            self.stretch = delta.divisor
        if isinstance(delta, AttentionDelta) and delta.shift:
            for stack in (site.stack, ""):  # "" is the only one of a model with one stack
                self.shift[stack] = max(delta.shift, self.shift.get(stack, 0))

    def drop(self, path: str) -> None:
        """Own the delta of a site no longer; the path is noted in `dropped`, for the files."""
        del self.deltas[key_of(path)], self.sites[path]
        self.dropped.append(path)

    def join(self, part: str, adapter: Adapter) -> None:
        """Take one more part in.

        Raises:
            ConfigError: it trains what another part trains too, or two parts scale one output.
        """
        for other in self.parts.values():
            for site, delta in adapter.items():
                for their, theirs in other.items():  # type: ignore[operator]
                    if what := _conflict(site.path, delta, their.path, theirs):
                        names = f"{other.method.name} and {adapter.method.name}"  # type: ignore[union-attr]
                        raise ConfigError(f"{self.method.name}: {names} do not go together: {what}; leave it out")
        if 1.0 != adapter.stretch != self.stretch != 1.0:
            raise ConfigError(
                f"{self.method.name}: parts divide positions by {self.stretch:g} and by {adapter.stretch:g}; choose one"
            )
        self.stretch = self.stretch if adapter.stretch == 1.0 else adapter.stretch
        self.parts[part] = adapter
        self.sites |= adapter.sites
        for stack, shift in adapter.shift.items():
            self.shift[stack] = self.shift.get(stack, 0) + shift


def _wants(adapter: Adapter) -> list[str]:
    """What of its own an adapter's method does while it trains, by the names of its methods."""
    method, names = adapter.method, ("before_step", "after_step")
    own = [name for name in names if getattr(type(method), name) is not getattr(Method, name)]
    own += ["start"] if method.wants_batches() else []
    own += ["rate"] if any(method.rate(name, p) != 1.0 for name, p in adapter.named_parameters()) else []
    penalised = any(type(delta).penalty is not Delta.penalty for _, delta in adapter.items())
    return own + (["penalty"] if penalised else [])


def _conflict(path: str, delta: Delta, other_path: str, other: Delta) -> str | None:
    """Why two deltas of two parts cannot act together, or None."""
    if path == other_path and (isinstance(delta, InputDelta) or isinstance(other, InputDelta)):
        return None  # a prompt's rows stand in slots, whose own embeddings nobody reads
    for whole, inner, each in ((path, other_path, delta), (other_path, path, other)):
        if isinstance(each, CopyDelta) and f"{inner}.".startswith(f"{whole}."):
            return f"{whole} is trained whole by one of them"
    if path != other_path:
        return None
    if delta.order == other.order == SCALE:
        return f"both scale {path}"
    if getattr(delta, "bias", None) is not None and getattr(other, "bias", None) is not None:
        return f"both train the bias of {path}"
    return None


def key_of(path: str) -> str:
    """A path or name as a child's name: no dots, and never that of a method of nn.Module."""
    return ":" + path.replace(".", "/")
