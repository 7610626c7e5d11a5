"""peft's LN_TUNING: a copy of each norm, `ln_tuning_layers.weight` (D) and, where it has one, `ln_tuning_layers.bias`.

Shape legend: D width.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import LINEAR, Config, Form, Slot, Unheld, copied
from graft.method import Method
from graft.methods.norm_tuning import NormDelta, NormTuning
from graft.vocabulary import kind_of


class LNTuningForm(Form):
    """peft's LN_TUNING."""

    kind = "LN_TUNING"
    fields = LINEAR - {"fan_in_fan_out", "layers_to_transform", "layers_pattern"}
    methods = (NormTuning,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        return NormTuning(**targets.places(config, model, _norms))

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        names = targets.named(model, config, [s.path for s, delta in adapter.items() if isinstance(delta, NormDelta)])
        if names is None:
            raise Unheld("peft's rules cannot name exactly these norms")
        return {"target_modules": names}

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for site, delta in adapter.items():
            place = f"{site.path}.ln_tuning_layers" if isinstance(delta, NormDelta) else site.path
            slots |= {f"{self.root}{place}.{key}": slot for key, slot in copied(delta).items()}
        return slots


def _norms(model: nn.Module, config: Config) -> set[str]:
    """The paths that peft copies, if all of them are norms."""
    found = targets.matched(model, config)
    here: dict[str, Any] = targets.modules(model)
    wrong = next((path for path in sorted(found) if kind_of(here[path]) != "norm"), None)
    if wrong is not None:
        raise AdapterFileError(
            f"target_modules: {wrong} is a {type(here[wrong]).__name__} and no norm; peft trains a copy of it, which "
            "is modules_to_save here"
        )
    return found
