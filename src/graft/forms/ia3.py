"""peft's IA3: `ia3_l`, (O, 1) on an output and (1, I) on the input of a feed-forward's last linear.

(IA)^3 on some parts of a fused linear is written whole, with ones in the other rows.

Shape legend: I in, O out.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import LINEAR, Config, Form, Slot, Unheld, plain, whole
from graft.forms.targets import value_of
from graft.method import Delta, Method
from graft.methods.ia3 import IA3, InputScaleDelta, OutputScaleDelta
from graft.weights import is_embedding


class IA3Form(Form):
    """peft's IA3."""

    kind = "IA3"
    fields = LINEAR - {"layers_to_transform", "layers_pattern"} | {"feedforward_modules", "init_ia3_weights"}
    methods = (IA3,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        if model is None and not value_of(config, "init_ia3_weights", True, bool):
            raise AdapterFileError("init_ia3_weights = false (random scales) is not supported; leave it true")
        places = targets.places(config, model)
        names = config.get("feedforward_modules")
        if model is None:
            if "targets" in places:
                places["feedforward"] = targets.names_of(names)
            return IA3(**places)
        scaled = sorted(path for path in targets.targeted(model, config) if _feeds(path, names))
        return IA3(**places, feedforward=tuple(scaled))

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        scaled = {s.path: (s, d) for s, d in adapter.items() if isinstance(d, InputScaleDelta | OutputScaleDelta)}
        if any(is_embedding(site.module) for site, _ in scaled.values()):
            raise Unheld("peft's (IA)^3 does not act on embeddings")
        fed = {path for path, (_, delta) in scaled.items() if isinstance(delta, InputScaleDelta)}
        names = targets.named(model, config, scaled, fed)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        return {
            "target_modules": names,
            "feedforward_modules": targets.feeding(names, fed),
            "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site, _ in scaled.values()),
            "init_ia3_weights": True,
        }

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        if isinstance(delta, InputScaleDelta):
            return {"ia3_l": plain(delta.scale, (1, len(delta.scale)))}
        assert isinstance(delta, OutputScaleDelta), type(delta)
        return {"ia3_l": _scales(delta)}


def _scales(delta: OutputScaleDelta) -> Slot:
    """The vector over all outputs, as (O, 1); 1 in the rows of other parts."""
    rows = delta.rows
    if rows is None:
        return plain(delta.scale, (delta.size, 1))

    def fill(full: Tensor) -> None:
        delta.scale.data.copy_(full[rows, 0])
        whole(full, delta.full_scale()[:, None])

    return Slot((delta.size, 1), lambda: delta.full_scale()[:, None], fill)


def _feeds(path: str, names: Any) -> bool:
    """peft's (IA)^3 looks at the end of the path, dot or not."""
    return bool(re.fullmatch(names, path)) if isinstance(names, str) else any(path.endswith(n) for n in names or ())
