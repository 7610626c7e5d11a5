"""AdapterHub: folders of bottleneck adapters of the `adapters` library, in and out.

`adapter_config.json` has the settings under `config`, `adapter.safetensors` or `pytorch_adapter.bin` the tensors, and
`head_config.json` stands beside a head. Converted is what both compute alike: its double_seq_bn ("houlsby"), its seq_bn
("pfeiffer") and, in post-norm models, its par_bn ("parallel"); there par_bn reads what the feed-forward reads, in
pre-norm models it reads the stream, and ours the normed stream. The library keeps norms frozen. While training its
adapters act behind the dropout of their sub-layer and ours before it; without dropout the two are the same.

Shape legend: D width, S bottleneck size.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import nn

from graft import files_disk, roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError, ConfigError
from graft.foreign.base import (
    Slots,
    chosen,
    either,
    fill,
    filled,
    head_keys,
    head_outputs,
    head_slots,
    own_path,
    read_state,
    values,
    write_tensors,
)
from graft.forms.base import checked, plain
from graft.method import CopyDelta
from graft.methods.bottleneck import Bottleneck, BottleneckDelta
from graft.roles import Site
from graft.vocabulary import container_of

FORM = "AdapterHub"
CONFIG, TENSORS = files_disk.CONFIG, ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_CONFIG, HEAD_TENSORS = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
INTERFACE = "adapter_interface.json"
VERSION = "adapters.1.3.0"
"""The release whose files these are."""

IN_BLOCK = ("distilbert", "gpt2", "llama", "mistral", "bart")
"""Model types whose adapters are children of the block; elsewhere they are of a module around the sub-layer's end."""
ABOVE = {"bert": 1, "roberta": 1, "xlm-roberta": 1, "electra": 1, "t5": 2, "mt5": 2}
"""How many levels above the sub-layer's last linear that module stands."""
KINDS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "is_parallel": False, "original_ln_before": False},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "is_parallel": False, "original_ln_before": True},
    "parallel": {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "original_ln_before": False},
}
DEFAULTS = {"is_parallel": False, "original_ln_before": False, "cross_adapter": False, "leave_out": [], "scaling": 1.0}
DEFAULTS |= {"original_ln_after": True, "residual_before_ln": True}
"""What the library takes for a field that an older file lacks."""
INERT = {"architecture", "init_weights", "init_weights_seed", "adapter_residual_before_ln"}
INERT |= {"inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule"}
INERT |= {"factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank"}
INERT |= {"phm_bias"}
"""Fields of the start, and those that count only beside one that is refused."""
OFF = {"ln_before", "ln_after", "use_gating", "phm_layer", "inv_adapter", "dropout", "stochastic_depth"}
"""What an adapter of the library must not use."""
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "silu", "tanh": "tanh"}
LEGACY = {".attention_text_task_adapters.": ".adapters.", ".layer_text_task_adapters.": ".adapters."}
LEGACY |= {".attention_text_lang_adapters.": ".adapters.", ".layer_text_lang_adapters.": ".adapters."}
NAMES = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
LOST = ("how dropout acts while training: before the adapter here, behind it there",)


def read_adapter_hub(
    model: nn.Module, folder: str | Path, name: str | None = None, *, trainable: bool = False
) -> Adapter:
    """Attach a bottleneck adapter of the `adapters` library.

    Args:
        model: the base that it was made for.
        folder: with `adapter_config.json` and the tensors; a head beside them is taken too.
        name: what routes call it; None: the folder's own name.
        trainable: whether it goes on training.

    Raises:
        AdapterFileError: a field or a tensor that Graft does not honour, a head that this model lacks, or another base.
    """
    folder = files_disk.find(Path(folder))
    told = files_disk.read_json(folder / CONFIG)
    _check_told(model, told, folder)
    head_file = _head_file(folder)
    try:
        method = _method(model, told, head=head_file is not None)
    except (AdapterFileError, ConfigError) as error:
        raise AdapterFileError(f"{folder / CONFIG}: {error}") from error
    file = either(folder, TENSORS)
    tensors = read_state(file)
    for old, new in LEGACY.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    head = read_state(head_file) if head_file is not None else {}
    task = head_keys(model, head)
    if not task:
        method = dataclasses.replace(method, head=False)

    def take(adapter: Adapter) -> None:
        slots = {own_path(model, key): slot for key, slot in _slots(model, adapter, str(told["name"])).items()}
        fill(slots, {own_path(model, key): value for key, value in tensors.items()}, file)
        if head_file is not None:
            own = {key: checked(value, key) for key, value in model.state_dict().items() if key in head}
            fill(own | head_slots(model, adapter, FORM), head, head_file)

    place = folder.resolve().name if name is None else name
    return filled(model, method, place, folder, take, trainable=trainable)


def write_adapter_hub(model: nn.Module, name: str, folder: str | Path) -> tuple[str, ...]:
    """Write a bottleneck adapter as a folder of the `adapters` library, with its task head.

    It is loaded there with `model.load_adapter(folder, use_safetensors=True)`.

    Args:
        name: the adapter, here and in the folder.
        folder: must not exist, or be empty.

    Returns:
        What the folder cannot hold, though it computes the same.

    Raises:
        AdapterFileError: the library would compute something else (it says what), or the folder exists.
    """
    adapter, folder = chosen(model, name, FORM), Path(folder)
    config = _config(model, adapter)
    tensors = values(_slots(model, adapter, name), f"adapter {name!r}")
    head = values(head_slots(model, adapter, FORM), f"adapter {name!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterFileError(f"{folder} exists; take another folder")
    common = {
        "hidden_size": model.config.hidden_size,  # type: ignore[union-attr]
        "model_class": type(model).__name__,
        "model_name": str(getattr(model.config, "_name_or_path", "") or ""),
        "model_type": _kind(model),
        "version": VERSION,
    }
    with files_disk.fresh(folder) as new:
        new.mkdir()
        write_tensors(new / TENSORS[0], tensors)
        files_disk.write_json(new / CONFIG, common | {"name": name, "config": config})
        if head:
            labels = {str(label): int(number) for label, number in model.config.label2id.items()}  # type: ignore
            told = {"name": None, "config": None, "label2id": labels, "num_labels": head_outputs(head)}
            write_tensors(new / HEAD_TENSORS[0], head)
            files_disk.write_json(new / HEAD_CONFIG, common | told)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    return LOST


def labels_of(source: str | Path) -> int | None:
    """How many outputs the classification head of a folder has, for the base to be built; None: it has none."""
    file = _head_file(files_disk.find(Path(source)))
    return None if file is None else head_outputs(read_state(file))


# ------------------------------------------------------------------------------------------------- tensors


def _slots(model: nn.Module, adapter: Adapter, name: str) -> Slots:
    kind = _kind(model)
    slots: Slots = {}
    for site, delta in adapter.items():
        if isinstance(delta, BottleneckDelta):
            for key, own in NAMES.items():
                slots[f"{_place(site, kind)}.{name}.{key}"] = plain(getattr(delta, own))
    return slots


def _place(site: Site, kind: str) -> str:
    """The dictionary of adapters that the library has for a sub-layer."""
    if kind in ABOVE:
        return ".".join([*site.path.split(".")[: -ABOVE[kind]], "adapters"])
    part = "output" if site.role.startswith("ffn") else site.role.partition(".")[0]
    return f"{container_of(site.path)}.{site.layer}.{part}_adapters.adapters"


def _kind(model: nn.Module) -> str:
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in ABOVE and kind not in IN_BLOCK:
        known = ", ".join(sorted((*ABOVE, *IN_BLOCK)))
        raise AdapterFileError(f"{FORM}'s files are known for {known}; not for {kind or type(model).__name__}")
    return kind


def _head_file(folder: Path) -> Path | None:
    """The tensors of a head that has the model's own names.

    Raises:
        AdapterFileError: the head is one of the library's own.
    """
    path = folder / HEAD_CONFIG
    if not path.exists():
        return None
    config = files_disk.read_json(path).get("config")
    if config is not None:
        kind = config.get("head_type") if isinstance(config, dict) else config
        raise AdapterFileError(
            f"{path}: a {kind!r} head of the library's own, which no transformers model has; take the file away to "
            "convert the adapter alone"
        )
    return either(folder, HEAD_TENSORS)


# ------------------------------------------------------------------------------------------------- settings


def _check_told(model: nn.Module, told: dict[str, Any], folder: Path) -> None:
    where = folder / CONFIG
    if "peft_type" in told:
        raise AdapterFileError(f"{where}: an adapter of peft's or Graft's own; it is not of {FORM}")
    if (folder / INTERFACE).is_file():
        raise AdapterFileError(f"{folder / INTERFACE}: a model that the library knows by an interface alone")
    if not isinstance(told.get("config"), dict) or not isinstance(told.get("name"), str):
        raise AdapterFileError(f"{where}: it has no name, or no settings under config")
    for field, own in (("model_type", _kind(model)), ("hidden_size", model.config.hidden_size)):  # type: ignore
        if told.get(field) not in (None, own):
            raise AdapterFileError(f"{where}: made for a base with {field} {told[field]!r}, this one has {own!r}")


def _method(model: nn.Module, told: dict[str, Any], *, head: bool) -> Bottleneck:
    """The method that the settings describe.

    Raises:
        AdapterFileError: a field that changes what is computed in a way that Graft lacks.
    """
    config: dict[str, Any] = DEFAULTS | told["config"]
    if config.get("architecture"):
        raise AdapterFileError(f"architecture {config['architecture']!r} is no bottleneck adapter")
    known = {*DEFAULTS, *INERT, *OFF, "mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}
    for field, value in config.items():
        if (field in OFF or field not in known) and value:
            raise AdapterFileError(f"{field} = {value!r} is not supported and may change what the adapter computes")
    if config["original_ln_after"] is not True:
        raise AdapterFileError("original_ln_after = false leaves out the base's own residual sum; Graft keeps it")
    kind = next((k for k, wanted in KINDS.items() if all(config.get(f) == v for f, v in wanted.items())), None)
    residual = config["residual_before_ln"]
    if kind is None or (kind != "parallel" and residual is not True and not (kind == "houlsby" and residual is False)):
        fields = ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before", "residual_before_ln")
        found = ", ".join(f"{field} = {config.get(field)!r}" for field in fields)
        raise AdapterFileError(f"{found}: none of the forms {', '.join(KINDS)}")
    _refuse_stream(model, kind)
    if type(config["scaling"]) not in (int, float):
        raise AdapterFileError(f"scaling = {config['scaling']!r} is trained; Graft's factor is a fixed number")
    return Bottleneck(
        kind=kind,
        size=_size(config.get("reduction_factor"), model.config.hidden_size),  # type: ignore
        activation=_activation(config.get("non_linearity"), old="version" not in told),
        scale=float(config["scaling"]),
        train_norms=False,
        cross=bool(config["cross_adapter"]),
        layers=_layers(model, config["leave_out"] or []),
        head=head,
    )


def _refuse_stream(model: nn.Module, kind: str) -> None:
    if kind == "parallel" and roles.norm_order(model) == "pre":
        raise AdapterFileError(
            f"a parallel adapter reads the normed stream in Graft and the stream itself in {FORM}; in a pre-norm "
            f"{type(model).__name__} they differ"
        )


def _size(factor: Any, width: int) -> int:
    """S = D // reduction_factor, at least 1."""
    factors = list(factor.values()) if isinstance(factor, dict) and factor else [factor]
    if any(other != factors[0] for other in factors):
        raise AdapterFileError("reduction_factor differs by layer; Graft's bottleneck has one size")
    factor = factors[0]
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise AdapterFileError(f"reduction_factor = {factor!r} is no positive number")
    return max(1, int(width // factor))


def _factor(size: int, width: int) -> int | float:
    """A reduction_factor that gives this size."""
    exact = width // size if width % size == 0 else width / size
    return exact if int(width // exact) == size else math.nextafter(exact, 0.0)


def _activation(name: Any, *, old: bool) -> str:
    """Our word for theirs; files of the library's first releases mean others by "gelu"."""
    if old:
        name = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(name, name)
    found = ACTIVATIONS.get(str(name).lower())
    if found is None:
        raise AdapterFileError(f"non_linearity = {name!r} is none of {', '.join(ACTIVATIONS)}")
    return found


def _layers(model: nn.Module, left_out: list[int]) -> tuple[int, ...] | None:
    if not left_out:
        return None
    stacks = roles.blocks(model)
    if len(stacks) > 1:
        raise AdapterFileError("leave_out counts encoder and decoder layers in one row; Graft's layers cannot say that")
    return tuple(layer for layer in range(len(next(iter(stacks.values())))) if layer not in left_out)


def _config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The library's settings for an adapter.

    Raises:
        AdapterFileError: they cannot say it.
    """
    method = adapter.method
    if not isinstance(method, Bottleneck):
        raise AdapterFileError(f"adapter {adapter.name!r}: {FORM}'s form is for bottleneck adapters, not {method.name}")
    sites = [site for site, delta in adapter.items() if isinstance(delta, BottleneckDelta)]
    copies = [site.role for site, delta in adapter.items() if isinstance(delta, CopyDelta)]
    if any(role.startswith("norm.") for role in copies):
        raise AdapterFileError(
            f"adapter {adapter.name!r} trains the base's norms, which {FORM} keeps frozen; train with train_norms=False"
        )
    _refuse_stream(model, method.kind)
    stacks = roles.blocks(model)
    if len(stacks) > 1 and method.layers is not None:
        raise AdapterFileError(
            f"adapter {adapter.name!r} leaves layers out, which {FORM} counts in one row for both stacks"
        )
    layers = {site.layer for site in sites}
    left_out = [layer for layer in range(max(map(len, stacks.values()))) if layer not in layers]
    return DEFAULTS | {
        **KINDS[method.kind],
        "cross_adapter": any(site.role.startswith("cross_") for site in sites),
        "init_weights": "mam_adapter" if method.kind == "parallel" else "bert",
        "leave_out": left_out,
        "non_linearity": method.activation,
        "reduction_factor": _factor(max(1, method.size), sites[0].out_features),
        "scaling": float(method.factor),
    }
