"""What a model is made of: its sites with roles and sizes, its adapters, and how many values it has and trains.

Counting reads sizes, never weights, so it works on the meta device. A storage that two modules share is counted once.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft import roles
from graft.adapter import Adapter
from graft.bank import Bank
from graft.base import load_config
from graft.errors import ConfigError
from graft.roles import Site
from graft.vocabulary import container_of, layer_of
from graft.weights import features, is_embedding, is_linear, quantized

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One place of the model."""

    path: str
    role: str | None
    """None: the vocabulary has no role for it, so methods reach it by its name or not at all."""
    layer: int | None
    kind: str
    """The module's class."""
    in_features: int
    out_features: int
    shapes: dict[str, Shape]
    """The shapes of its own parameters by name; a whole sub-layer has none of its own."""
    count: int
    """Values of all parameters inside, those of nested sites too, each storage once."""
    tied: str | None = None
    """The path of an earlier site that holds the very same weight."""


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """One adapter of the model."""

    name: str
    method: str
    trainable: int
    """Values that train now."""
    saved: int
    """Values that a saved folder holds."""
    in_use: bool


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `describe` found; `str()` is a table in plain text."""

    model: str
    """The model's class."""
    sites: list[SiteRow]
    """Every module with a role, in the model's order."""
    unnamed: list[SiteRow]
    """Modules that hold parameters and have no role: nothing is kept silent."""
    adapters: list[AdapterRow]
    total: int
    """Values of all parameters, those of the adapters too."""
    base: int
    """Values of the base's parameters alone."""
    trainable: int
    """Values of all parameters that train, wherever they are."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return dataclasses.asdict(self)

    def table(self) -> RenderableType:
        """For a rich console."""
        from rich.console import Group

        parts: list[RenderableType] = [self.model, _table(self.sites, "role")]
        if self.unnamed:
            parts += ["", "No role (methods reach these by name or not at all):", _table(self.unnamed, "kind")]
        if self.adapters:
            parts += ["", _adapter_table(self.adapters)]
        parts += [f"note: {note}" for note in self.notes]
        share = f"{self.trainable / self.total:.2%}" if self.total else "0%"
        parts.append(f"{self.total:,} parameters, {self.trainable:,} of them ({share}) train")
        return Group(*parts)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=160, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(self.table(), markup=False)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def describe(model: nn.Module) -> Description:
    """The sites, roles, adapters and parameter counts of a model.

    Args:
        model: any transformers model, with or without adapters, on any device, the meta device too.
    """
    bank = getattr(model, roles.BANK, None)
    bank = bank if isinstance(bank, Bank) else None
    named = roles.sites(model)
    modules = {path: module for path, module in model.named_modules() if path.split(".")[0] != roles.BANK}
    found = {site.path: site for site in named}
    nameless = [
        Site(path, roles.OTHER, layer_of(path, modules), module, *_sizes(module))
        for path, module in modules.items()
        if path not in found and any(True for _ in module.named_parameters(recurse=False)) and not _in_head(path, found)
    ]
    owners: dict[Any, str] = {}
    return Description(
        model=type(model).__name__,
        sites=[_row(site, owners) for site in named],
        unnamed=[row for site in nameless if (row := _row(site, owners)).tied is None],
        adapters=[_adapter(adapter, bank) for adapter in bank] if bank is not None else [],
        total=_count(model.modules()),
        base=_count(modules.values()),
        trainable=_count(model.modules(), only_trained=True),
        notes=_notes(model, named),
    )


def values(model: nn.Module) -> int:
    """How many values a model has, adapters too; tied ones once, a quantized weight as the matrix it stands for."""
    return _count(model.modules())


def _count(modules: Iterable[nn.Module], *, only_trained: bool = False) -> int:
    """Values of the modules' own parameters; a quantized weight counts as the matrix that it stands for."""
    values: dict[Any, int] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or not only_trained:
                packed = name == "weight" and quantized(module)
                values[_storage(parameter)] = math.prod(features(module)) if packed else parameter.numel()
    return sum(values.values())


def _storage(parameter: nn.Parameter) -> tuple[int, int, int]:
    """What is equal for two parameters that share their values; data pointers are all 0 on the meta device."""
    return parameter.untyped_storage()._cdata, int(parameter.storage_offset()), parameter.numel()


def _sizes(module: nn.Module) -> tuple[int, int]:
    return features(module) if is_linear(module) or is_embedding(module) else (0, 0)


def _in_head(path: str, found: dict[str, Site]) -> bool:
    """Whether the module is part of a head: a head is one site, whatever it is made of."""
    parts = path.split(".")
    above = (found.get(".".join(parts[:n])) for n in range(1, len(parts)))
    return any(site is not None and site.role == "head" for site in above)


def _row(site: Site, owners: dict[Any, str]) -> SiteRow:
    module = site.module
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if quantized(module):
        shapes["weight"] = (site.out_features, site.in_features)
    weight = getattr(module, "weight", None)
    owner = owners.setdefault(_storage(weight), site.path) if isinstance(weight, nn.Parameter) else site.path
    return SiteRow(
        path=site.path,
        role=None if site.role == roles.OTHER else site.role,
        layer=site.layer,
        kind=type(module).__name__,
        in_features=site.in_features,
        out_features=site.out_features,
        shapes=shapes,
        count=_count(module.modules()),
        tied=None if owner == site.path else owner,
    )


def _adapter(adapter: Adapter, bank: Bank) -> AdapterRow:
    return AdapterRow(
        name=adapter.name,
        method=adapter.method.name,
        trainable=adapter.trainable,
        saved=adapter.saved,
        in_use=any(name == adapter.name for name, _ in bank.used),
    )


def _notes(model: nn.Module, named: list[Site]) -> list[str]:
    attentions = [site for site in named if site.role in ("attention", "cross_attention")]
    around = [site for site in attentions if not roles.uses_attention_interface(site.module)]
    if not around:
        return []
    kind = type(around[0].module).__name__
    return [f"{kind} bypasses transformers' attention interface, so methods inside attention refuse this model"]


def skeleton(path: str | Path) -> Any:
    """The model of a base on the meta device, from its config alone: sizes without weights.

    Raises:
        ConfigError: no config there, or one of which transformers has no model.
    """
    import transformers

    config = load_config(path)
    classes = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((each for each in classes if each is not None), None)
    try:
        with torch.device("meta"):
            return kind._from_config(config) if kind else transformers.AutoModel.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"base {path}: no model can be built from its config ({why})") from error


# The table: layers of equal make are shown once. ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    name: str
    word: str
    shape: str
    count: str


def _table(rows: list[SiteRow], column: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("path", "left"), (column, "left"), ("shape", "left"), ("parameters", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for line in _lines(rows, column):
        table.add_row(line.name, line.word, line.shape, line.count)
    return table


def _lines(rows: list[SiteRow], column: str) -> Iterator[_Line]:
    """A line for each site outside of layers; for each list of layers one block per kind of layer."""
    done: set[str] = set()
    for row in rows:
        container = _container(row)
        if container is None:
            yield _line(row, row.path, column)
        elif container not in done:
            done.add(container)
            yield from _layer_lines(container, [r for r in rows if _container(r) == container], column)


def _layer_lines(container: str, rows: list[SiteRow], column: str) -> Iterator[_Line]:
    layers: dict[int, list[SiteRow]] = {}
    for row in rows:
        layers.setdefault(row.layer or 0, []).append(row)
    kinds: dict[tuple[_Line, ...], list[int]] = {}
    for layer, members in layers.items():
        cut = len(f"{container}.{layer}")
        lines = tuple(_line(row, "  " + row.path[cut:], column) for row in members)
        kinds.setdefault(lines, []).append(layer)
    for lines, numbers in kinds.items():
        times = f"x {len(numbers)} layers" if len(numbers) > 1 else "1 layer"
        yield _Line(f"{container}.{_ranges(numbers)}", times, "", "")
        yield from lines


def _container(row: SiteRow) -> str | None:
    """`model.layers` for `model.layers.3.mlp`; None outside of layers."""
    return None if row.layer is None else container_of(row.path)


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _line(row: SiteRow, name: str, column: str) -> _Line:
    count = f"tied to {row.tied}" if row.tied else f"{row.count:,}" if row.shapes or row.role is None else ""
    return _Line(name, str(getattr(row, column)), _shape(row), count)


def _shape(row: SiteRow) -> str:
    """`4096 -> 1024` for what maps one width to another, else the shapes of its parameters."""
    if row.in_features and row.out_features and row.role is not None and not row.role.startswith("norm"):
        if not row.shapes and row.in_features == row.out_features:
            return f"width {row.in_features}"
        return f"{row.in_features} -> {row.out_features}" + (" + bias" if "bias" in row.shapes else "")
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in row.shapes.items())


def _adapter_table(adapters: list[AdapterRow]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("adapter", "left"), ("method", "left"), ("trainable", "right"), ("saved", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("in use")
    for row in adapters:
        table.add_row(row.name, row.method, f"{row.trainable:,}", f"{row.saved:,}", "yes" if row.in_use else "no")
    return table
