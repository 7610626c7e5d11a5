"""peft's GLORA: `glora_A` to `glora_E`, each `.Xd` and `.Xu`, or `.X`; A and B share one form, D and E another.

A part that is not used stands in peft's files as a buffer `.zeros`, which peft misses with a warning. We write those of
C, D and E, but not the (O, I) zeros of A and B.

Shape legend: I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import ROOT, Config, Form, Slot, Unheld, plain
from graft.forms.targets import value_of
from graft.method import Delta, Method
from graft.methods.glora import FORMS, GLoRA, GLoRADelta
from graft.weights import features


class GLoRAForm(Form):
    """peft's GLORA."""

    kind = "GLORA"
    fields = {"target_modules", "modules_to_save", "r", "config_A_B", "config_C", "config_D_E", "bias", "init_weights"}
    methods = (GLoRA,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        if value_of(config, "bias", "none", str) != "none":
            raise AdapterFileError(f"bias = {config['bias']!r} is not supported; leave it 'none'")
        if model is None and not value_of(config, "init_weights", True, bool):
            raise AdapterFileError("init_weights = false (a random start) is not supported; leave it true")
        both, last = value_of(config, "config_A_B", "lora", str), value_of(config, "config_D_E", "constant", str)
        return GLoRA(
            rank=value_of(config, "r", 8, int),
            a=both,
            b=both,
            c=value_of(config, "config_C", "lora", str),
            d=last,
            e=last,
            **targets.places(config, model),
        )

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, GLoRA)
        if method.supernet or method.genes:
            raise Unheld("peft's GLoRA has one form for all layers, and no supernet")
        if (method.a, method.d) != (method.b, method.e):
            raise Unheld("peft's GLoRA has one form for A and B, and one for D and E")
        if any(form.startswith("lora_") for form in (method.a, method.c)):
            raise Unheld("peft's GLoRA has one rank")
        deltas = {site.path: (site, delta) for site, delta in adapter.items() if isinstance(delta, GLoRADelta)}
        for path, (site, delta) in deltas.items():
            if type(site.module) is not nn.Linear:
                raise Unheld(f"peft's GLoRA acts on plain linears, and {path} is a {type(site.module).__name__}")
            if delta.rows is not None:
                raise Unheld(f"peft's GLoRA takes the fused {path} whole")
            if site.module.bias is None and set(delta.genes[2:]) != {"none"}:
                raise Unheld(f"peft's GLoRA adds no bias to {path}")
        names = targets.named(model, config, deltas)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        return {
            "target_modules": names,
            "r": method.rank,
            "config_A_B": method.a,
            "config_C": method.c,
            "config_D_E": method.d,
            "bias": "none",
            "init_weights": True,
        }

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        slots = super().slots(model, adapter, config)
        modules = targets.modules(model)
        for path in targets.targeted(model, config):
            inputs, outputs = features(modules[path])
            shapes = ((outputs, inputs), (outputs, inputs), (inputs, 1), (outputs,), (outputs,))
            for part, shape in zip(FORMS, shapes, strict=True):
                key = f"{ROOT}{path}.glora_{part.upper()}"
                if not {f"{key}.X", f"{key}.Xd"} & set(slots):
                    slots[f"{key}.zeros"] = _zeros(shape, expected=part in "cde")
        return slots

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, GLoRADelta), type(delta)
        return {key: plain(value) for key, value in delta.kept().items()}


def _zeros(shape: tuple[int, ...], *, expected: bool) -> Slot:
    """peft's buffer for a part that is not used."""

    def fill(new: Tensor) -> None:
        if new.any():
            raise AdapterFileError("the zeros of a part that the config does not use are not zero")

    return Slot(shape, lambda: torch.zeros(shape), fill, optional=True, expected=expected)
