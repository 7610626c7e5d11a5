"""The checkpoint of LLaMA-Adapter's own code, in and out.

`adapter_query.weight` (L K, D) has the K prompt rows of each of the top L layers, from the lowest on, and
`layers.<i>.attention.gate` (1, H, 1, 1) the gates, of which those below the top L layers are zero and unused. That code
turns queries and keys pairwise where transformers' turns halves; both permute each head's rows alike, so that the
scores of prompts, which are not turned, are the same.

Shape legend: L adapted layers, K prompt rows, D width, H heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError, ConfigError
from graft.foreign.base import Slots, chosen, fill, filled, read_state, write_state
from graft.forms.base import Slot
from graft.methods.llama_adapter import LlamaAdapter, LlamaAdapterDelta
from graft.weights import features

FORM = "LLaMA-Adapter"
QUERY = "adapter_query.weight"


def read_llama_adapter(
    model: nn.Module,
    file: str | Path,
    name: str | None = None,
    *,
    layers: int | None = None,
    trainable: bool = False,
) -> Adapter:
    """Attach the prompts of a LLaMA-Adapter checkpoint.

    Args:
        model: the LLaMA that it was made for.
        file: of tensors alone.
        name: what routes call it; None: the file's name.
        layers: L, how many top layers have prompts; the file does not say it.
        trainable: whether it goes on training.

    Raises:
        ConfigError: no `layers`, or one that the file contradicts.
        AdapterFileError: a broken file, or a model with another attention than LLaMA's.
    """
    file = Path(file)
    if layers is None:
        raise ConfigError(f"layers: {file} does not hold it; give how many top layers have prompts (30 of 32 for 7B)")
    tensors = read_state(file)
    if QUERY not in tensors:
        raise AdapterFileError(f"{file}: no {QUERY} in it")
    rows = len(tensors[QUERY])
    if layers < 1 or rows % layers:
        raise ConfigError(f"layers: {layers} do not divide the {rows} rows of {QUERY} in {file}")
    method = LlamaAdapter(length=rows // layers, layers=layers, head=False)

    def take(adapter: Adapter) -> None:
        fill(_slots(model, _deltas(adapter)), tensors, file)

    return filled(model, method, file.stem if name is None else name, file, take, trainable=trainable)


def write_llama_adapter(model: nn.Module, name: str, file: str | Path) -> tuple[str, ...]:
    """Write zero-gated prompts as a checkpoint of LLaMA-Adapter's own code.

    Args:
        name: the adapter: `LlamaAdapter` with tanh gates, in the top layers.
        file: must not exist; `.pth` and the like are torch's form, `.safetensors` the other.

    Returns:
        What the file cannot hold and the code must be given: `adapter_len` and `adapter_layer`.

    Raises:
        AdapterFileError: that code would compute something else (it says what), or the file exists.
    """
    adapter = chosen(model, name, FORM)
    method = adapter.method
    if not isinstance(method, LlamaAdapter) or not method.tanh:
        what = "linear gates" if isinstance(method, LlamaAdapter) else method.name
        raise AdapterFileError(f"adapter {name!r}: {FORM}'s form is for prompts with tanh gates, not {what}")
    deltas = _deltas(adapter)
    depth = len(roles.blocks(model)["decoder"])
    if sorted(deltas) != list(range(depth - len(deltas), depth)):
        raise AdapterFileError(
            f"adapter {name!r} has prompts in layers {sorted(deltas)}; {FORM}'s stand in the top ones"
        )
    write_state(Path(file), _slots(model, deltas))
    return f"adapter_len={method.length}", f"adapter_layer={len(deltas)}"


def _deltas(adapter: Adapter) -> dict[int, LlamaAdapterDelta]:
    """The deltas by layer, from the lowest on.

    Raises:
        AdapterFileError: something else is trained too, or the attention is not LLaMA's.
    """
    found: dict[int, LlamaAdapterDelta] = {}
    for site, delta in adapter.items():
        if type(delta) is not LlamaAdapterDelta or site.layer is None:
            raise AdapterFileError(f"adapter {adapter.name!r} also trains {site.path}, which {FORM}'s form cannot hold")
        base, module = delta.base, site.module
        size_off = abs(float(getattr(module, "scaling", base.size**-0.5)) - base.size**-0.5) > 1e-9
        others = {
            "a fused qkv": base.fused is not None,
            "biases": any(getattr(linear, "bias", None) is not None for linear in base.modules.values()),
            "a norm of its keys": base.key_norm is not None,
            "fewer key and value heads": features(base.modules["key"]) != features(base.modules["query"]),
            "another scale": size_off,
            "a width that is not that of its heads": base.heads * base.size != base.width,
        }
        other = next((what for what, there in others.items() if there), None)
        if other is not None:
            raise AdapterFileError(f"{site.path} has {other}; {FORM}'s code has LLaMA's attention alone")
        found[site.layer] = delta
    return dict(sorted(found.items()))


def _slots(model: nn.Module, deltas: dict[int, LlamaAdapterDelta]) -> Slots:
    prompts: list[Tensor] = [delta.prompt for delta in deltas.values()]
    length, width = prompts[0].shape

    def spread(new: Tensor) -> None:
        for prompt, rows in zip(prompts, new.split(length), strict=True):
            prompt.data.copy_(rows)

    slots = {QUERY: Slot((len(prompts) * length, width), lambda: torch.cat(prompts), spread)}
    heads = next(iter(deltas.values())).base.heads
    for layer in range(len(roles.blocks(model)["decoder"])):
        key = f"layers.{layer}.attention.gate"
        slots[key] = _gate(deltas[layer]) if layer in deltas else _unused(layer, heads)
    return slots


def _gate(delta: LlamaAdapterDelta) -> Slot:
    """(1, H, 1, 1); one gate for a layer is the same for all its heads."""
    heads, gate = delta.base.heads, delta.gate

    def read() -> Tensor:
        return gate.expand(heads).view(1, heads, 1, 1)

    return Slot((1, heads, 1, 1), read, lambda new: gate.data.copy_(new.flatten()))


def _unused(layer: int, heads: int) -> Slot:
    """The gate of a layer without prompts."""

    def check(new: Tensor) -> Any:
        if bool(new.any()):
            raise AdapterFileError(
                f"the gate of layer {layer} is not zero, so it has prompts: layers is another number"
            )

    return Slot((1, heads, 1, 1), lambda: torch.zeros(1, heads, 1, 1), check, optional=True, expected=True)
