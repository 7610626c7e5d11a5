"""peft's ADAPTION_PROMPT: `adaption_prompt` (1, P, D) and `adaption_gate` (1), linear, in the top layers' attention.

A tanh gate is written as its value and read back through its inverse. Gates that differ by head have no place there.

Shape legend: P prompt rows, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms.base import Config, Form, Slot, Unheld, plain
from graft.forms.targets import modules, value_of
from graft.method import Delta, Method
from graft.methods.llama_adapter import LlamaAdapter, PromptedDelta, UnprojectedDelta

KNOWN = {"LlamaConfig": "self_attn", "MistralConfig": "self_attn", "GPT2Config": "attn"}
"""The configs of the models that peft's adaption prompts are for, and the name of their attention."""
BELOW_ONE = 1.0 - 2**-24


class AdaptionPromptForm(Form):
    """peft's ADAPTION_PROMPT."""

    kind = "ADAPTION_PROMPT"
    fields = {"adapter_len", "adapter_layers", "target_modules"}
    methods = (LlamaAdapter,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        length, count = (value_of(config, field, None, int) for field in ("adapter_len", "adapter_layers"))
        if count < 1:
            raise AdapterFileError(f"adapter_layers = {count} names no layer")
        if model is not None:
            name = _known(model)
            if name is None:
                raise AdapterFileError(f"peft has no adaption prompts for {type(model).__name__}")
            if config.get("target_modules") not in (None, name):
                raise AdapterFileError(
                    f"target_modules = {config['target_modules']!r}, and it can only be {name!r} here"
                )
        return LlamaAdapter(length=length, layers=count, gate="per_layer", tanh=False, head=False)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, LlamaAdapter)
        name = _known(model)
        if name is None:
            raise Unheld(f"peft has no adaption prompts for {type(model).__name__}")
        everywhere = [path for path in modules(model) if path.endswith(f".{name}")]
        if list(adapter.sites) != everywhere[-len(adapter.sites) :]:
            raise Unheld("peft's adaption prompts stand in the top layers, these in others")
        for site, delta in adapter.items():
            assert isinstance(delta, PromptedDelta), type(delta)
            gate_H = delta.gate.detach()
            if len(gate_H) > 1 and (gate_H.is_meta or not bool((gate_H == gate_H[0]).all())):
                raise Unheld("its gates differ by head, and peft has one for each layer")
            if name == "attn" and not isinstance(delta, UnprojectedDelta):
                raise Unheld(
                    "peft adds GPT-2's prompts behind the output projection; only peft_compat=True has that form"
                )
            scale: Any = site.module.scaling
            if delta.base.heads * delta.base.size != delta.base.width or abs(scale - delta.base.size**-0.5) > 1e-9:
                raise Unheld(f"peft would compute other heads or another scale in {site.path}")
        return {"adapter_len": method.length, "adapter_layers": len(adapter.sites), "target_modules": name}

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, PromptedDelta), type(delta)
        return {"adaption_prompt": plain(delta.prompt, (1, *delta.prompt.shape)), "adaption_gate": _gate(delta)}


def _gate(delta: PromptedDelta) -> Slot:
    """One linear gate for all heads."""

    def read() -> Tensor:
        gate_H = delta.gate.detach()
        return (gate_H.tanh() if delta.tanh else gate_H)[:1]

    def fill(new: Tensor) -> None:
        if delta.tanh and not bool((new.abs() <= 1).all()):
            raise AdapterFileError(f"a gate of {float(new.abs().max()):g} is out of reach of tanh")
        inverse = torch.atanh(new.float().clamp(-BELOW_ONE, BELOW_ONE)) if delta.tanh else new
        delta.gate.data.copy_(inverse.expand(len(delta.gate)))

    return Slot((1,), read, fill)


def _known(model: nn.Module) -> str | None:
    """What peft calls the attention of this model, if it knows it and it is all the self-attention there is."""
    name = KNOWN.get(type(getattr(model, "config", None)).__name__)
    if name is None:
        return None
    own = {site.path for site in roles.sites(model) if site.role == "attention"}
    return name if own == {path for path in modules(model) if path.endswith(f".{name}")} else None
