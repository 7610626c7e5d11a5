"""A route says, for each row of a batch or each token of a packed batch, whose deltas act.

*The adapter is a column of the batch*: an entry is `None` (the base), a name, a tuple of names, or a dict of name to
weight. A route over rows is the special case; packed batches route runs of flattened tokens.

Shape legend: N leading size of a tensor (rows, or rows times tokens where a model flattens), T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import RouteError
from graft.fast.mixed import Tables

Entry = tuple[tuple[str, float], ...]
"""Names with weights, in order; the empty entry is the base."""

BASE: Entry = ()


def entry_of(value: Any) -> Entry:
    """The normal form of what a user writes for one row.

    Raises:
        RouteError: not None, a name, names or a dict of name to weight; or a name twice.
    """
    if value is None:
        return BASE
    if isinstance(value, str):
        return ((value, 1.0),)
    if isinstance(value, Mapping):
        pairs = [(name, weight) for name, weight in value.items()]
    elif isinstance(value, Iterable):
        pairs = [(name, 1.0) for name in value]
    else:
        raise RouteError(f"an entry is None, a name, names or a dict of name to weight, not {value!r}")
    for name, weight in pairs:
        if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RouteError(f"an entry is None, a name, names or a dict of name to weight, not {value!r}")
        if not math.isfinite(weight):
            raise RouteError(f"the weight of {name!r} is {weight}; give a finite number")
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise RouteError(f"the entry {value!r} names an adapter twice; give it a weight instead")
    return tuple((name, float(weight)) for name, weight in pairs)


@dataclass(frozen=True)
class Group:
    """The rows (or flattened tokens) that share one entry."""

    entry: Entry
    index: Tensor


@dataclass(frozen=True)
class Route:
    """Which entry each row, or each run of tokens, has.

    Args:
        entries: one per row; or one per run when `lengths` is given.
        lengths: tokens in each run of a packed batch, or None.
    """

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...] | None = None
    uniform: Entry | None = field(init=False, compare=False, repr=False)
    """The one entry that all rows have, or None if they differ."""
    tables: Tables = field(default_factory=Tables, compare=False, repr=False)
    """What the sites keep for this route."""
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        first = self.entries[0]
        same = all(entry == first for entry in self.entries)
        object.__setattr__(self, "uniform", first if same else None)

    @classmethod
    def everywhere(cls, entry: Entry) -> Route:
        """The route that gives every row the same entry, whatever the batch."""
        return cls((entry,))

    @classmethod
    def of_rows(cls, rows: Sequence[Any]) -> Route:
        """One entry per row, as a user writes them."""
        if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
            raise RouteError(f"rows is a list with one entry per row, not {rows!r}")
        if not rows:
            raise RouteError("rows is empty; give one entry per row of the batch")
        return cls(tuple(entry_of(row) for row in rows))

    @classmethod
    def of_segments(cls, segments: Sequence[tuple[Any, int]]) -> Route:
        """One (entry, length) for each run of flattened tokens."""
        if not segments:
            raise RouteError("segments is empty; give one (entry, length) per run of tokens")
        lengths = tuple(int(length) for _, length in segments)
        if min(lengths) < 1:
            raise RouteError(f"segment lengths must be at least 1, not {min(lengths)}")
        return cls(tuple(entry_of(entry) for entry, _ in segments), lengths)

    def take_over(self, other: Route) -> None:
        """Go on with what the sites keep for an equal route."""
        object.__setattr__(self, "tables", other.tables)

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that acts somewhere, in order of appearance."""
        return tuple(dict.fromkeys(name for entry in self.entries for name, _ in entry))

    @property
    def by_token(self) -> bool:
        """Whether flattened tokens, not rows, are routed."""
        return self.lengths is not None

    @property
    def tokens(self) -> int:
        """The number of flattened tokens of a packed batch."""
        return sum(self.lengths or ())

    def check(self, inputs: Tensor) -> None:
        """Raise RouteError unless the (B, T, ...) inputs of a forward fit.

        A uniform list must fit too: three entries for a batch of four are a mistake, whatever they say.
        """
        if self.lengths is not None:
            size = inputs.shape[0] * (inputs.shape[1] if inputs.dim() > 1 else 1)
            if size != self.tokens:
                raise RouteError(f"the segments have {self.tokens} tokens and the packed batch {size}")
        elif len(self.entries) > 1:
            self.check_rows(inputs.shape[0])

    def check_packed(self, model: nn.Module, options: dict[str, Any]) -> None:
        """Raise RouteError where transformers would let the texts of a packed batch see each other."""
        if self.lengths is None or len(self.lengths) < 2:
            return
        default = getattr(getattr(model, "config", None), "use_cache", False)
        if options.get("use_cache", default) and options.get("past_key_values") is None:
            raise RouteError("a packed batch needs use_cache=False; with a cache its texts would see each other")
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            raise RouteError("a packed batch takes no (B, T) attention_mask; with one its texts would see each other")

    def check_rows(self, batch: int) -> None:
        """Raise RouteError unless a batch of that many rows is a whole multiple of the route's rows."""
        rows = len(self.entries)
        if batch < rows or batch % rows:
            raise RouteError(f"the route has {rows} rows and the batch {batch}; give one entry per row")

    def groups(self, size: int, device: torch.device) -> list[Group]:
        """Index tensors of each distinct entry over a leading dimension of `size`.

        A list that divides `size` repeats each entry consecutively: that serves beams, and models that flatten rows
        and tokens into one dimension.

        Raises:
            RouteError: the sizes do not fit.
        """
        if torch.compiler.is_compiling():
            return self._groups(size, device)
        key = (size, device, torch.is_inference_mode_enabled())
        if key not in self._cache:
            self._cache[key] = self._groups(size, device)
        return self._cache[key]

    def _groups(self, size: int, device: torch.device) -> list[Group]:
        owner = self.owner(size)
        rows: dict[Entry, list[int]] = {}
        for place, i in enumerate(owner):
            rows.setdefault(self.entries[i], []).append(place)
        return [Group(entry, torch.tensor(index, device=device)) for entry, index in rows.items()]

    def owner(self, size: int) -> list[int]:
        """For each of `size` leading places, the number of its entry."""
        if self.lengths is not None:
            if size != self.tokens:
                raise RouteError(f"the segments have {self.tokens} tokens and the packed batch {size}")
            return [i for i, length in enumerate(self.lengths) for _ in range(length)]
        self.check_rows(size)
        rows = len(self.entries)
        return [i for i in range(rows) for _ in range(size // rows)]
