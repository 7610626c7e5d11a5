"""LongLoRA's folders, in: a LoRA in peft's form, and `trainable_params.bin` with the embeddings and norms beside it.

`trainable_params.bin` has whole modules under the base's names. A tied head would train along with the embedding there;
here it stays the base's, so a base with a tied head is refused. Positions are divided by a factor that stands in the
config of the base that was trained; a copy of it (`config.json`) in the folder is read, else the user says it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from graft import files, files_disk, files_forms, roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError, ConfigError
from graft.foreign.base import Slots, either, fill, filled, read_state
from graft.forms.base import FORMS, ROOT, copied
from graft.method import CopyDelta
from graft.methods.long_lora import LongLoRA
from graft.methods.lora import LoRA, LoRADelta

FORM = "LongLoRA"
TENSORS = (files_disk.TENSORS, "adapter_model.bin")
TRAINED = ("trainable_params.safetensors", "trainable_params.bin")


def read_long_lora(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    rope_factor: float | None = None,
    trainable: bool = False,
) -> Adapter:
    """Attach an adapter that LongLoRA's code trained.

    Args:
        model: the base that it was made for, with the vocabulary resized as it was.
        folder: with `adapter_config.json`, its tensors and `trainable_params.bin`.
        name: what routes call it; None: the folder's own name.
        rope_factor: what positions are divided by, on top of the base's own scaling; None: as `config.json` says.
        trainable: whether it goes on training.

    Raises:
        ConfigError: the factor is not given and not in the folder.
        AdapterFileError: a file is missing, broken or holds something without a place in this model.
    """
    folder = files_disk.find(Path(folder))
    where = folder / files_disk.CONFIG
    read = files_forms.method_of(files.read_config(folder), model, str(where))
    if type(read) is not LoRA:
        raise AdapterFileError(f"{where}: {FORM} is LoRA with more beside it, not {read.name}")
    lora_file, trained_file = either(folder, TENSORS), either(folder, TRAINED)
    pairs, trained = read_state(lora_file), read_state(trained_file)
    method = _method(model, read, _factor(model, folder, rope_factor), set(trained), trained_file)

    def take(adapter: Adapter) -> None:
        lora: Slots = {}
        whole: Slots = {}
        for site, delta in adapter.items():
            if isinstance(delta, LoRADelta):
                own = FORMS["LORA"].of_delta(delta)
                lora |= {f"{ROOT}{site.path}.{key}": slot for key, slot in own.items()}
            elif isinstance(delta, CopyDelta):
                whole |= {f"{site.path}.{key}": slot for key, slot in copied(delta).items()}
        fill(lora, pairs, lora_file)
        fill(whole, trained, trained_file)

    place = folder.resolve().name if name is None else name
    return filled(model, method, place, folder, take, trainable=trainable)


def _method(model: nn.Module, lora: LoRA, factor: float, keys: set[str], where: Path) -> LongLoRA:
    """The method, with copies of exactly those modules that stand in the file."""
    modules = dict(model.named_modules())
    paths = {key.rpartition(".")[0] for key in keys}
    lost = sorted(path for path in paths if path not in modules)
    if lost:
        raise AdapterFileError(f"{where}: {lost[0]} is no module of this model")
    by_role = {site.path: site.role for site in roles.sites(model)}
    embeddings = {path for path in paths if by_role.get(path) == "embedding"}
    norms = {path for path in paths if by_role.get(path, "").startswith("norm.")}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if any(getattr(head, "weight", None) is modules[path].weight for path in embeddings):
        raise AdapterFileError(f"{where}: the head of this base is tied to the embedding, which {FORM} trains with it")
    fields = {field.name: getattr(lora, field.name) for field in dataclasses.fields(LoRA)}
    rest = tuple(sorted(paths - embeddings - norms))
    fields["modules_to_save"] = (*lora.modules_to_save, *rest)
    return LongLoRA(**fields, embedding=bool(embeddings), norms=bool(norms), rope_factor=factor)


def _factor(model: nn.Module, folder: Path, given: float | None) -> float:
    """What positions are divided by, beside what the base does itself."""
    if given is not None:
        return given
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"rope_factor: {folder} has no config.json that says it; give ceil(the trained length / the base's own), "
            "or 1"
        )
    own: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    told = _linear(files_disk.read_json(path), str(path))
    return told / _linear({"rope_scaling": getattr(own, "rope_parameters", None)}, "the base's config")


def _linear(config: dict[str, Any], where: str) -> float:
    """The factor of linear scaling; 1 without scaling."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor", 1.0) if kind == "linear" else 1.0
    if kind not in ("default", "linear") or type(factor) not in (int, float) or factor <= 0:
        raise AdapterFileError(
            f"{where}: rope_scaling {scaling!r} does not divide positions by a number; give rope_factor"
        )
    return float(factor)
