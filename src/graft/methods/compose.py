"""Compose: several methods as one adapter, trained together (He et al. 2022, arXiv 2110.04366).

    y = scale(W x + sum of the parts' changes),   in each module: copies, then sums, then scales, then serial modules

The parts keep parameters of their own; a prompt (P, D) stands at the input, prefixes (P, D) in attention, the rest at
modules, and the order in which they act does not depend on that of the parts. A task head trains once, as a part.

Shape legend: P virtual tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graft import roles
from graft.errors import ConfigError
from graft.method import Build, Method, SelectMethod, from_dict
from graft.methods.head import Head


@dataclass(frozen=True, kw_only=True, init=False)
class Compose(Method):
    """Several methods as one adapter: `Compose(LoRA(...), PromptTuning(...))` (He et al. 2022, arXiv 2110.04366).

    Routes name the whole ("a") or a part ("a/lora"); a part has its method's name, "lora-2" the second of its kind.
    Shapes are those of the parts.

    Args:
        parts: the methods, or their JSON forms; a part's `head` says nothing, the whole's does.
        rates: a factor on the learning rate for each part, in order; () for 1 everywhere.

    Raises:
        ConfigError: fewer than two parts, a part that trains the base itself or is composed, rates that do not fit, or
            parts that train the same thing.
    """

    parts: tuple[Any, ...] = ()
    rates: tuple[float, ...] = ()

    name: ClassVar[str] = "compose"
    place: ClassVar[str] = "several"
    peft_type: ClassVar[str] = "COMPOSE"
    paper: ClassVar[str] = "He et al. 2022, arXiv 2110.04366"
    trains: ClassVar[str] = "the sum of its parts"

    def __init__(
        self, *methods: Method, parts: Sequence[Any] = (), rates: Sequence[float] = (), **settings: Any
    ) -> None:
        made = parts_from([*methods, *parts], lambda part: from_dict(part) if isinstance(part, dict) else part)
        values = {field.name: field.default for field in dataclasses.fields(self)} | settings
        if unknown := set(settings) - {field.name for field in dataclasses.fields(self)}:
            raise TypeError(f"unknown setting {min(unknown)!r}")
        for key, value in (values | {"parts": made, "rates": tuple(rates)}).items():
            object.__setattr__(self, key, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = next((part for part in self.parts if not isinstance(part, Method)), None)
        if wrong is not None:
            raise ConfigError(f"Compose: parts are methods or their settings ({{method: lora, ...}}), not {wrong!r}")
        if len(self.parts) < 2:
            raise ConfigError(f"Compose: give at least two parts, not {len(self.parts)}")
        for part in self.parts:
            if isinstance(part, SelectMethod | Head) or part.place == self.place:
                raise ConfigError(f"Compose: {part.name} cannot be a part (a head trains along unless head=False)")
        object.__setattr__(self, "parts", tuple(dataclasses.replace(part, head=False) for part in self.parts))
        if self.rates and (len(self.rates) != len(self.parts) or min(self.rates) <= 0):
            raise ConfigError(
                f"Compose: rates has one positive factor for each of the {len(self.parts)} parts, not {self.rates}"
            )
        if self.layers is not None or self.modules_to_save:
            raise ConfigError("Compose: give layers and modules_to_save to a part, not to the whole")

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """Whether every part merges."""
        return all(part.merges for part in self.parts)

    @property
    def starts_equal(self) -> bool:  # type: ignore[override]
        """Whether every part starts equal to the base."""
        return all(part.starts_equal for part in self.parts)

    def parts_of(self, build: Build) -> dict[str, Method]:
        return self.named() | head_of(self, build)

    def part_rate(self, part: str) -> float:
        return dict(zip(self.named(), self.rates, strict=False)).get(part, 1.0)

    def named(self) -> dict[str, Any]:
        """The parts by name, in order."""
        found: dict[str, Any] = {}
        for part in self.parts:
            count = sum(other.name == part.name for other in found.values())
            found[f"{part.name}-{count + 1}" if count else part.name] = part
        return found

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        parts = [part.to_dict(full=full) for part in self.parts]
        return super().to_dict(full=full) | {
            "parts": [{key: value for key, value in part.items() if key != "head"} for part in parts]
        }

    def with_tokenizer(self, tokenizer: Any) -> Method:
        return dataclasses.replace(self, parts=tuple(part.with_tokenizer(tokenizer) for part in self.parts))

    def stretch(self, config: Any) -> float:
        return max(part.stretch(config) for part in self.parts)

    def saved_as(self, adapter: Any) -> Method:
        parts = [adapter.parts[key].method.saved_as(adapter.parts[key]) for key in self.named()]
        return dataclasses.replace(self, parts=tuple(parts))


def parts_from(given: Sequence[Any], read: Callable[[Any], Any]) -> tuple[Any, ...]:
    """What `read` makes of each part's settings.

    Raises:
        ConfigError: as `read` does, with the part's number, from 0.
    """
    made = []
    for number, part in enumerate(given):
        try:
            made.append(read(part))
        except ConfigError as error:
            key, dot, rest = str(error).partition("method")
            told = rest if dot and not key and rest[:1] in (".", ":") else f": {error}"
            raise ConfigError(f"method.parts[{number}]{told}") from None
    return tuple(made)


def head_of(method: Method, build: Build) -> dict[str, Method]:
    """The part that trains the task head of a composed method, where there is one."""
    return {"head": Head()} if method.head and roles.task_heads(build.model) else {}
