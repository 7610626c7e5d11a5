"""What a file form is: how peft keeps one kind of adapter in a folder, and the registry that finds it.

A `Slot` joins a tensor of the file to a place in the adapter: saving reads all slots, loading fills each exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.method import CopyDelta, Delta, Method
from graft.methods.lora import BiasDelta
from graft.weights import is_embedding, weight_OI

Config = dict[str, Any]
ROOT = "base_model.model."
COMMON = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
COMMON |= {"peft_version"}
LINEAR = {"target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out"}
LINEAR |= {"layers_to_transform", "layers_pattern"}
"""Fields of every form that names modules."""

FORMS: dict[str, Form] = {}
"""peft_type -> form."""


class Unheld(Exception):
    """peft's form cannot hold this adapter exactly; the message says why."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a folder: its shape, where values come from and go to.

    A file may lack an optional one, and it is only written if it is `expected` by peft.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    fill: Callable[[Tensor], Any]
    optional: bool = False
    expected: bool = False

    @property
    def written(self) -> bool:
        """Whether saving writes it."""
        return self.expected or not self.optional


class Form:
    """How peft keeps one kind of adapter. A subclass with a `kind` is registered, one instance of it.

    Every field of a config is in `fields` (honoured), in `inert` (counts only beside a field that is refused), at its
    empty value, or refused by name before `read` is asked.
    """

    kind: ClassVar[str] = ""
    """The `peft_type`."""
    fields: ClassVar[set[str]] = set()
    inert: ClassVar[set[str]] = set()
    methods: ClassVar[tuple[type[Method], ...]] = ()
    """The methods whose adapters this form may hold."""
    sometimes: ClassVar[tuple[type[Method], ...]] = ()
    """Methods of which it holds few adapters; `write` says of the others why not."""
    root: ClassVar[str] = ROOT
    """What stands in front of module paths in the names of tensors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            FORMS[cls.kind] = cls()

    def fitted(self, config: Config, model: nn.Module) -> Config:
        """A config object's fields with those that peft fills in from the model; `read` gets the result.

        Raises:
            AdapterFileError: a field that contradicts the model.
        """
        return config

    def read(self, config: Config, model: nn.Module | None) -> Method:
        """The method that a config describes.

        Args:
            model: the model of the folder's adapter; None for a config object whose adapter is yet to be trained.

        Raises:
            AdapterFileError: a value that we do not honour (`files_forms.method_of` says where).
        """
        raise NotImplementedError(type(self).__name__)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        """The form's own fields for an adapter; `config` has the common ones, `method` is the one to be named.

        Raises:
            Unheld: peft's form would compute something else.
        """
        raise NotImplementedError(type(self).__name__)

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        """All tensors of the folder with this config; on loading some may have to take the file's shapes first."""
        slots = self.of_base(model, adapter, config) if self.root == ROOT else {}
        for site, delta in adapter.items():
            found = copied(delta) if isinstance(delta, CopyDelta | BiasDelta) else self.of_delta(delta)
            slots |= {f"{self.root}{site.path}.{key}": slot for key, slot in found.items()}
        return slots

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        """The tensors of one delta, by their names behind the module's path."""
        raise NotImplementedError(type(self).__name__)

    def of_base(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        """What peft writes of the base itself, by the way: embeddings that are targeted."""
        return {
            f"{ROOT}{path}.{name}": own_weight(module, path, name)
            for path, module in targets.embeddings(model).items()
            for name in ("base_layer.weight", "weight")
        }


def form_of(method: Method) -> Form:
    """The form that holds adapters of this method.

    Raises:
        Unheld: peft has no such method.
    """
    found = next((form for form in FORMS.values() if type(method) in (*form.methods, *form.sometimes)), None)
    if found is None:
        raise Unheld(f"peft has no {method.name} as Graft computes it")
    return found


def plain(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Slot:
    """The slot of a parameter or buffer, in the file perhaps of another shape."""
    shape = tuple(tensor.shape) if shape is None else shape
    return Slot(shape, lambda: tensor.detach().view(shape), lambda new: tensor.data.copy_(new.view(tensor.shape)))


def copied(delta: Delta) -> dict[str, Slot]:
    """A trained copy of a module: its tensors under the names that they have in the module."""
    return {key: plain(value) for key, value in delta.kept().items()}


def own_weight(module: nn.Module, path: str, name: str) -> Slot:
    """The slot of a module's frozen weight, which a file may hold by this name and which must be the model's own."""
    weight: Any = module.weight if is_embedding(module) else weight_OI(module)
    return checked(weight, path, f"{ROOT}{path}.{name}")


def checked(own: Tensor, path: str, key: str = "") -> Slot:
    """A tensor of the base that a file may hold and that must be the model's own.

    Args:
        key: its name in the file, if it is a table with a row for each token.
    """

    def same(new: Tensor) -> None:
        mine, new = own.detach().float(), new.to(own.device).float()
        if own.is_meta or torch.allclose(mine, new, rtol=2**-7, atol=1e-6):
            return
        if key and (first := _new_rows(mine, new)):
            raise AdapterFileError(
                f"rows {first} to {len(new) - 1} of {path} are others than the model's: those of new tokens start at "
                "random, and the adapter was trained with the file's; put the file's in first: "
                f"model.get_submodule({path!r}).weight.data[{first}:] = tensors[{key!r}][{first}:], where tensors is "
                "safetensors.torch.load_file of it"
            )
        raise AdapterFileError(f"it holds another {path} than the model's: the adapter belongs to a changed base")

    return Slot(tuple(own.shape), lambda: own.detach(), same, optional=True)


def _new_rows(mine_VD: Tensor, theirs_VD: Tensor) -> int:
    """The first row from which on all differ, behind rows that are all equal; 0 where they differ otherwise."""
    equal_V = torch.isclose(mine_VD, theirs_VD, rtol=2**-7, atol=1e-6).all(dim=1)
    count = int(equal_V.sum())
    return count if bool(equal_V[:count].all()) else 0


def whole(full: Tensor, kept: Tensor) -> None:
    """Refuse a file's tensor of which the adapter could keep a part only."""
    if not kept.is_meta and not torch.equal(full.to(kept.dtype), kept.cpu()):
        raise AdapterFileError("it changes parts of a fused linear that graft.json does not name")


def number(value: float) -> float:
    """An int where it is one, as peft's files have it."""
    return int(value) if float(value).is_integer() else float(value)
