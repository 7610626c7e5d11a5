"""peft's ADALORA: `lora_A` (R, I), `lora_E` (R, 1) and `lora_B` (O, R), without the triplets that have been cut.

`rank_pattern` has a list of booleans for each `<path>.lora_E`: which of the `init_r` triplets the tensors hold.

Shape legend: I in, O out, R triplets that are left.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import LINEAR, Config, Form, Slot, Unheld, number
from graft.forms.targets import value_of
from graft.method import Delta, Method
from graft.methods.adalora import AdaLoRA, AdaLoRADelta

SCHEDULE = {"tinit": "tinit", "tfinal": "tfinal", "deltaT": "delta_t"}
RATES = {"beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "gamma"}
END = ".lora_E"


class AdaLoRAForm(Form):
    """peft's ADALORA."""

    kind = "ADALORA"
    fields = LINEAR | {"init_r", "target_r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "total_step"}
    fields |= {"rank_pattern", *SCHEDULE, *RATES}
    inert = {"r", "megatron_core", "qalora_group_size"}
    methods = (AdaLoRA,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        if value_of(config, "bias", "none", str) != "none":
            raise AdapterFileError(f"bias = {config['bias']!r}: Graft's AdaLoRA trains no biases; load one without")
        if model is None and value_of(config, "init_lora_weights", True, bool) is False:
            raise AdapterFileError("init_lora_weights = false (random values) is not supported; leave it true")
        if model is None and targets.empty(config.get("target_modules")):
            raise AdapterFileError("target_modules is empty: peft's AdaLoRA has its own for each model; name them")
        default = AdaLoRA().to_dict(full=True).__getitem__
        rank = value_of(config, "init_r", default("rank"), int)
        alpha = value_of(config, "lora_alpha", 8, int, float)
        numbers = {ours: value_of(config, key, default(ours), int) for key, ours in SCHEDULE.items()}
        numbers |= {ours: value_of(config, key, default(ours), int, float) for key, ours in RATES.items()}
        return AdaLoRA(
            rank=rank,
            target_rank=value_of(config, "target_r", default("target_rank"), int),
            alpha=alpha if alpha > 0 else rank,
            dropout=value_of(config, "lora_dropout", 0.0, int, float),
            steps=value_of(config, "total_step", None, int) if model is None else None,
            rank_pattern={_path(key): mask for key, mask in value_of(config, "rank_pattern", {}, dict).items()},
            **numbers,
            **targets.places(config, model),
        )

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, AdaLoRA)
        modules = {site.path: site.module for site, delta in adapter.items() if isinstance(delta, AdaLoRADelta)}
        names = targets.named(model, config, modules)
        if names is None:
            raise Unheld("peft's rules cannot name exactly these modules")
        return {
            "target_modules": names,
            "init_r": method.rank,
            "target_r": method.target_rank,
            "lora_alpha": number(method.alpha),
            "lora_dropout": method.dropout,
            "bias": "none",
            "init_lora_weights": True,
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in modules.values()),
            "total_step": method.steps or method.tinit + method.tfinal + 1,  # peft refuses a config without it
            "rank_pattern": {path + END: list(mask) for path, mask in method.rank_pattern.items()} or None,
            **{key: getattr(method, ours) for key, ours in (SCHEDULE | RATES).items()},
        }

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, AdaLoRADelta), type(delta)
        left = delta.left()
        return {
            "lora_A": _some(delta.A, left, delta.count),
            "lora_E": _some(delta.E, left, delta.count),
            "lora_B": _some(delta.B.T, left, delta.count, transposed=True),
        }


def _some(triplets: Tensor, left: Tensor, count: int, transposed: bool = False) -> Slot:
    """The slot of those rows that are left; B's triplets are columns in the file."""

    def read() -> Tensor:
        rows = triplets.detach()[left]
        return rows.T if transposed else rows

    def fill(new: Tensor) -> None:
        triplets.data[left] = (new.T if transposed else new).to(triplets)

    shape = (count, triplets.shape[1])
    return Slot(shape[::-1] if transposed else shape, read, fill)


def _path(key: str) -> str:
    if not key.endswith(END):
        raise AdapterFileError(f"rank_pattern: {key!r} does not name a {END.removeprefix('.')}")
    return key.removesuffix(END)
