"""peft's VERA: `vera_lambda_b` (O) and `vera_lambda_d` (r) for each linear, and the shared `vera_A` and `vera_B` once.

We always write the pair. A file of peft may lack it (`save_projection` false): the seed then gives the same pair, drawn
as peft draws it. VeRA on some parts of a fused linear is written whole, with zeros in the other rows of `lambda_b`.

Shape legend: I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import LINEAR, Config, Form, Slot, Unheld, plain, whole
from graft.forms.targets import value_of
from graft.method import Delta, Method
from graft.methods.vera import Projection, VeRA, VeRADelta


class VeRAForm(Form):
    """peft's VERA."""

    kind = "VERA"
    fields = LINEAR | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias"}
    fields |= {"init_weights"}
    methods = (VeRA,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        bias = config.get("bias", "none")
        if bias != "none":
            raise AdapterFileError(f"bias = {bias!r} trains biases of the base too, which VeRA in Graft does not")
        if model is None and not value_of(config, "init_weights", True, bool):
            raise AdapterFileError("init_weights = false (random vectors) is not supported; leave it true")
        seed = value_of(config, "projection_prng_key", 0, int)
        if not -(2**63) <= seed < 2**63:
            raise AdapterFileError(f"projection_prng_key = {seed} is no seed of 64 bits")
        return VeRA(
            rank=value_of(config, "r", 256, int),
            d_initial=value_of(config, "d_initial", 0.1, int, float),
            seed=seed,
            dropout=value_of(config, "vera_dropout", 0.0, int, float),
            **targets.places(config, model),
        )

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, VeRA)
        modules = {site.path: site.module for site, delta in adapter.items() if isinstance(delta, VeRADelta)}
        names = targets.named(model, config, modules)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        return {
            "target_modules": names,
            "r": method.rank,
            "d_initial": method.d_initial,
            "projection_prng_key": method.seed,
            "save_projection": True,
            "vera_dropout": method.dropout,
            "bias": "none",
            "init_weights": True,
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules.values()),
        }

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        shared = adapter.shared
        assert isinstance(shared, Projection)
        slot: Any = plain if value_of(config, "save_projection", True, bool) else _drawn
        pair = {f"base_model.vera_{name}": slot(getattr(shared, name)) for name in ("A", "B")}
        return super().slots(model, adapter, config) | pair

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, VeRADelta), type(delta)
        return {"vera_lambda_b": _outputs(delta), "vera_lambda_d": plain(delta.lambda_d)}


def _drawn(own: Tensor) -> Slot:
    """A matrix that the seed gives: a file may hold it nevertheless, but no other, because peft would not read it."""

    def same(new: Tensor) -> None:
        if not own.is_meta and not torch.equal(new.to(own.dtype), own.cpu()):
            raise AdapterFileError("it holds another pair than projection_prng_key gives, and save_projection is false")

    return Slot(tuple(own.shape), lambda: own, same, optional=True)


def _outputs(delta: VeRADelta) -> Slot:
    """lambda_b over all outputs (O); 0 in the rows of other parts."""
    rows = delta.rows
    if rows is None:
        return plain(delta.lambda_b)

    def fill(full: Tensor) -> None:
        delta.lambda_b.data.copy_(full[rows])
        whole(full, delta.spread(delta.lambda_b.detach()))

    return Slot((delta.site.out_features,), lambda: delta.spread(delta.lambda_b), fill)
