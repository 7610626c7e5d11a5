"""What a method is: a recipe that puts deltas at sites, and the registry that finds it by name.

Shape legend: B rows, T tokens, I in-features, O out-features, P virtual tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import roles
from graft.copies import answer, clean_copy
from graft.errors import ConfigError, SiteError
from graft.roles import Site
from graft.settings import check_types, nearest

REPLACE, ADD, SCALE, SERIAL = 0, 1, 2, 3
"""The order in which deltas act on one output: a copy of the module first, then sums, scales, serial modules."""

REGISTRY: dict[str, type[Method]] = {}


class Delta(nn.Module):
    """One adapter's change at one site.

    `before` may change the site's input, `after` its output; both see only the rows (or tokens) that the route gives
    to this adapter. Parameters are fp32 and are cast down to the activations' dtype at use.
    """

    order: ClassVar[int] = ADD
    from_base: ClassVar[bool] = False
    """Whether `after` and `merged` read the base's own output and weight, whatever other adapters act on the row."""
    whole: ClassVar[bool] = False
    """Whether it holds all of the module that it answers for, so that the base's own values there do not count."""
    everywhere: ClassVar[bool] = False
    """Whether the same change acts at every module that has this site's weight, so that a tied weight may be merged."""
    weighted: ClassVar[bool] = True
    """Whether an entry may give it another weight than 1."""
    reads_texts: ClassVar[bool] = False
    """Whether `after` takes a third argument, the `graft.texts.Texts` of its tokens; in attention the call has them."""
    reads_width: bool = False  # on how long the rows of a batch are, padding counted: then they must stay rows
    tap: str | None = None
    """Path of a module whose *input* is handed to `after` as x, for a delta that spans a sub-layer."""
    shared: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "shared", None)

    def bind(self, shared: nn.Module | None) -> None:
        """Remember what all sites of this adapter share, without owning it a second time."""
        object.__setattr__(self, "shared", shared)

    def before(self, x_BTI: Tensor) -> Tensor:
        """Change the site's input; the default leaves it."""
        return x_BTI

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """Change the site's output; the default leaves it."""
        return y_BTO

    def into(self, x_BTI: Tensor, y_BTO: Tensor, weight: float) -> Tensor | None:
        """y + weight * (after(x, y) - y) where y is a frozen base's own and may be written into; None: not here."""
        return None

    def weight_delta(self) -> Tensor | None:
        """The (O, I) change of the weight in fp32, or None if the change is not one of the weight."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (R, I) and B (O, R) whose product B A is the whole change, or None if it is not of that form."""
        return None

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The weight and bias (fp32) with this delta merged in, or None if it cannot be merged."""
        delta_OI = self.weight_delta()
        return None if delta_OI is None else (weight_OI + delta_OI, bias_O)

    def penalty(self) -> Tensor | None:
        """A term to add to the loss, if the method has one."""
        return None

    @property
    def sums(self) -> bool:
        """Whether all that it does now is to add the product of `factors`, so that many go in one (`fast.mixed`)."""
        return False

    def kept(self) -> dict[str, Tensor]:
        """The tensors by name that a saved folder holds: parameters, and buffers that are frozen parts of the delta."""
        return self.state_dict(keep_vars=True)

    @property
    def saved_numel(self) -> int:
        """How many values of this delta a saved folder holds."""
        return sum(tensor.numel() for tensor in self.kept().values())


class Expanded(nn.Module):
    """A shared module that training reparameterises: `expanded` gives the rows, and after `finish` only they are left.

    `table` holds the rows (a parameter) once the rest is dropped, None before.
    """

    table: nn.Parameter | None

    def expanded(self) -> Tensor:
        """The rows as they act, as a saved folder holds them (`prompt_embeddings`)."""
        raise NotImplementedError(type(self).__name__)

    @property
    def saved_numel(self) -> int:
        """How many values of it a saved folder holds."""
        raise NotImplementedError(type(self).__name__)


class Drawn(nn.Module):
    """A shared module that draws at random once for each training forward; a recomputed layer finds the draw again."""

    drawn: Any = None

    def draw(self) -> None:
        """Draw anew, from torch's own CPU generator (checkpoints keep its state), and set `drawn`."""
        raise NotImplementedError(type(self).__name__)


class InputDelta(Delta):
    """Rows of embeddings that overwrite the slot tokens at the embedding site."""

    weighted = False

    def rows_PD(self) -> Tensor:
        """The (P, D) embeddings of the slots, in slot order."""
        raise NotImplementedError(type(self).__name__)

    @property
    def length(self) -> int:
        """How many slots a row needs."""
        raise NotImplementedError(type(self).__name__)

    pools_after_slots: bool = True
    """Whether a pooler that reads index 0 shall read the first real token instead (peft reads the slot)."""


class AttentionDelta(Delta):
    """A change inside the attention function: see `graft.attend`. The one of the highest `order` is the innermost."""

    weighted = False
    shift: int = 0
    """How many positions the real tokens of the row move up (prefix rows take the first ones)."""

    def attend(self, call: Any, base: Any) -> tuple[Tensor, Tensor | None]:
        """Compute attention for the rows of this adapter.

        Args:
            call: a `graft.attend.AttentionCall`.
            base: function of one call that runs the next adapter of the row, or the model's own attention.
        """
        return base(call)


class CopyDelta(Delta):
    """A trained copy of a whole module (a task head, a norm) that answers in its place; the original stays frozen."""

    order = REPLACE
    whole = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.copy = clean_copy(module).float().requires_grad_(True)

    def kept(self) -> dict[str, Tensor]:
        return self.copy.state_dict(keep_vars=True)

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return self.answer((x_BTI,), {}).to(y_BTO.dtype)

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the copy gives for a call of the module, whatever it is called with."""
        return answer(self.copy, args, kwargs)


@dataclass(frozen=True)
class Build:
    """What a method may look at while it is attached: the model, and whether peft's form is wanted."""

    model: nn.Module
    peft_compat: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: a frozen, keyword-only dataclass whose fields are the hyper-parameters.

    Args:
        layers: None for all; an int n for the top n layers; a range, list or tuple for those layers.
        head: whether a task head (`score`, `classifier`, `qa_outputs`) trains along.
        modules_to_save: names of further modules that are trained whole, as copies.
    """

    layers: int | range | tuple[int, ...] | None = None
    head: bool = True
    modules_to_save: tuple[str, ...] = ()

    name: ClassVar[str] = ""
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = False
    starts_equal: ClassVar[bool] = True
    peft_type: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains: ClassVar[str] = ""
    """How many values train with the default settings, a head left out, in the letters of docs/methods.md."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | set):
                object.__setattr__(self, field.name, tuple(value))
        check_types(self)

    def sites(self, build: Build) -> list[Site]:
        """The sites where this method puts a delta; by default those that `targets` names."""
        targets = getattr(self, "targets", ())
        if not targets:
            raise ConfigError(f"{type(self).__name__}: targets is empty; name roles or modules")
        chosen = roles.select(build.model, targets, exclude=getattr(self, "exclude", ()), layers=self.layers)
        kept = [site for site in chosen if not inside(site.path, self.modules_to_save)]
        if not kept:
            raise SiteError(f"{type(self).__name__}: every target is excluded or stands in modules_to_save")
        return kept

    def shared(self, sites: list[Site], build: Build) -> nn.Module | None:
        """A module that all sites of the adapter share, or None."""
        return None

    def delta(self, site: Site, build: Build) -> Delta | None:
        """The delta for one site, with its parameters initialised; None leaves the site alone."""
        raise NotImplementedError(type(self).__name__)

    def extras(self, build: Build) -> list[tuple[Site, Delta]]:
        """Further deltas that go with the method, for example trained copies of norms."""
        return []

    def parts_of(self, build: Build) -> dict[str, Method]:
        """The methods that this one is composed of, by name; nothing for a method of its own."""
        return {}

    def part_rate(self, part: str) -> float:
        """The factor on the learning rates of a part."""
        return 1.0

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """The method with the tokenizer that its start needs, where it does."""
        named = any(field.name == "tokenizer" for field in dataclasses.fields(self))
        return dataclasses.replace(self, tokenizer=tokenizer) if named else self  # type: ignore[call-arg]

    def finish(self, shared: nn.Module | None) -> None:
        """Drop what only training needs (a prefix's MLP); called when an adapter stops training for good."""

    # What training asks. `adapter` is a `graft.Adapter`; `step` counts optimizer steps from 0, `steps` is their number.

    def wants_batches(self) -> int:
        """How many training batches `start` wants to see before the first step."""
        return 0

    def start(self, model: nn.Module, adapter: Any, batches: Sequence[dict[str, Tensor]]) -> None:
        """Initialise from data, before the first step; a resumed run calls it with the same batches again."""

    def start_bytes(self, adapter: Any) -> int:
        """What `start` holds at once beside the weights, at least."""
        return 0

    def begin(self, adapter: Any, steps: int) -> None:
        """Training begins and will take `steps` optimizer steps in all.

        Raises:
            ConfigError: the method's schedule does not fit into them.
        """

    def rate(self, name: str, parameter: Tensor) -> float:
        """The factor on the learning rate for a parameter of the adapter, by its name in `named_parameters`."""
        return 1.0

    def before_step(self, adapter: Any, step: int, steps: int) -> None:
        """The gradients are there and clipped, the optimizer has not stepped."""

    def after_step(self, adapter: Any, step: int, steps: int) -> None:
        """The optimizer has stepped, and the gradients are still there."""

    def stretch(self, config: Any) -> float:
        """How many times longer texts become than a base with this config takes by itself."""
        return 1.0

    def saved_as(self, adapter: Any) -> Method:
        """The method that a saved folder names, where that is simpler than the one that trained."""
        return self

    def to_dict(self, *, full: bool = False) -> dict[str, Any]:
        """The JSON form: `method` and every field that is not at its default; `full`: every field, as files keep it."""
        out: dict[str, Any] = {"method": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (full or value != _default(field)) and field.metadata.get("json", True):
                out[field.name] = _plain(value)
        return out


@dataclass(frozen=True, kw_only=True)
class SelectMethod(Method):
    """A method that trains parameters of the base itself: it cannot be routed beside others."""

    place: ClassVar[str] = "select"

    def chosen(self, build: Build) -> list[str]:
        """Names of the base parameters that train."""
        raise NotImplementedError(type(self).__name__)

    def barriers(self, build: Build) -> list[str]:
        """Paths of the modules whose inputs are detached, so that no graph is kept below them."""
        return []


def from_dict(data: dict[str, Any]) -> Method:
    """A method from its JSON form.

    Raises:
        ConfigError: an unknown method or field, with the nearest known name.
    """
    data = dict(data)
    name = data.pop("method", None)
    import graft.methods  # noqa: F401  fills the registry

    cls = REGISTRY.get(str(name).replace("-", "_").lower()) or _by_class_name(str(name))
    if cls is None:
        raise ConfigError(f"method: unknown method {name!r}; {nearest(str(name), REGISTRY)}")
    known = {field.name for field in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"method.{key}: {cls.__name__} has no such setting; {nearest(key, known)}")
    try:
        return cls(**{key: _parsed(value) for key, value in data.items()})
    except TypeError as error:
        raise ConfigError(f"method: {cls.__name__}: {error}") from error


def parameter(*shape: int, like: Tensor) -> nn.Parameter:
    """A new fp32 parameter of zeros on the device of `like`."""
    return nn.Parameter(torch.zeros(*shape, device=like.device, dtype=torch.float32))


def _by_class_name(name: str) -> type[Method] | None:
    return next((cls for cls in REGISTRY.values() if cls.__name__.lower() == name.lower()), None)


def inside(path: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of those named, or stands inside one."""
    return any(f".{name}." in f".{path}." for name in names)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return list(value) if isinstance(value, tuple) else value


def _parsed(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"range"}:
        return range(*value["range"])
    return tuple(value) if isinstance(value, list) else value
