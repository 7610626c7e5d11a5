"""One or two small instances of every registered method, for the suites that run over all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import graft.methods  # noqa: F401  fills the registry
from graft.adapter import Adapter
from graft.method import REGISTRY, Method, SelectMethod

SMALL: dict[str, Any] = {"rank": 4, "size": 5, "length": 3, "count": 1, "target_rank": 2}
EXTRA: dict[str, list[dict[str, Any]]] = {
    "lora": [{"targets": "all-linear", "rslora": True}, {"init": "pissa"}],
    "dora": [{"targets": "all-linear", "bias": "all"}],
    "bottleneck": [{"kind": "pfeiffer"}, {"kind": "parallel"}],
    "prefix_tuning": [{"hidden": 6}],
    "intrinsic": [{"kind": "did", "head": False}],
    "p_tuning": [{"encoder": "lstm", "hidden": 5}],
    "llama_adapter": [{"gate": "per_layer", "tanh": False}],
    "compose": [
        {"parts": ({"method": "lora", "rank": 4}, {"method": "lora", "rank": 2, "targets": "all-linear"})},
        {"parts": ({"method": "bottleneck", "size": 5}, {"method": "prefix_tuning", "length": 3})},
    ],
    "lora_fa": [{"targets": "all-linear", "projected": True}],
    "tied_lora": [{"train_A": False, "train_B": False, "share_A": False}, {"train_uv": False}],
    "vera": [{"targets": "all-linear"}],
    "unipelt": [{"submodules": (part,), "hidden": None} for part in ("lora", "prefix_tuning", "bottleneck")],
    "multi_lora": [{"count": 3}, {"count": 3, "per_output": False}],
    # The gradient of a constant or vector B is a sum that cancels; the contract's bound in fp32 is too tight for it.
    "glora": [
        {"supernet": True, "choices": {"b": ("lora", "lora_2", "none")}},
        {"a": "vector", "b": "none"},
    ],
}
NEEDED: dict[str, dict[str, Any]] = {
    "compose": {"parts": ({"method": "lora", "rank": 4}, {"method": "prompt_tuning", "length": 3})},
    "trainable_tokens": {"tokens": tuple(range(5, 45))},
    "intrinsic": {"size": 200},
}
"""What a method has no default for."""
OWN: dict[str, dict[str, Any]] = {"llama_adapter": {"layers": 2}}
"""What an instance of one method needs on models of two layers."""
_ENCODERS = ("bert", "roberta", "distilbert")
ALL = ("llama", "gpt2", "gemma2", "mixtral", "bert", "t5", "mt5", "bart", "llama_tied", "mistral", "qwen2", "qwen3")
ALL += ("gemma3", "phi3", "gpt_neox", "opt", "roberta", "distilbert", "llama_cls", "gpt2_cls")
CANNOT: dict[str, dict[str, str]] = {
    "qlora": dict.fromkeys(ALL, "the base is not quantized"),
    "llama_adapter": dict.fromkeys(_ENCODERS, "is an encoder"),
    "long_lora": dict.fromkeys((*_ENCODERS, "t5", "mt5", "bart"), "is no decoder alone"),
    "intrinsic": {"mixtral": "is no linear, embedding or norm"},
    "bitfit": dict.fromkeys(
        ("llama", "gemma2", "mixtral", "t5", "mt5", "llama_tied", "mistral", "qwen3", "gemma3", "phi3", "llama_cls"),
        "no biases at all",
    ),
    "head": dict.fromkeys(
        ("llama", "gpt2", "gemma2", "mixtral", "t5", "mt5", "bart", "llama_tied", "mistral", "qwen2")
        + ("qwen3", "gemma3", "phi3", "gpt_neox", "opt"),
        "no task head",
    ),
}
"""Which architectures refuse a method, and what the error says."""
BIASED = {"c": "vector", "d": "constant", "e": "constant"}
"""What GLoRA's last variant has besides, where the base has biases."""
ROUGH = {("unipelt", "mt5"): 10.0}
"""(method, architecture) -> how much looser fp32 gradients are compared, where they are sums that cancel.

A gate's is a sum over all outputs and tokens, and mT5's terms reach 400; in fp64 they agree to 1e-12 (test_unipelt).
"""
ATTENTION_ONLY = {"ia3": {"targets": ("attention.key", "attention.value"), "feedforward": ()}}


def instances(name: str, arch: str) -> list[Method]:
    """Small instances of a registered method that fit the architecture."""
    cls = REGISTRY[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    base = {key: value for key, value in SMALL.items() if key in fields} | NEEDED.get(name, {})
    base |= OWN.get(name, {})
    if arch == "mixtral":
        base |= ATTENTION_ONLY.get(name, {})
    more = BIASED if name == "glora" and arch not in CANNOT["bitfit"] else {}
    extras = [extra | (more if "a" in extra else {}) for extra in EXTRA.get(name, [])]
    return [cls(**{**base, **extra}) for extra in ({}, *extras)]


def routable(arch: str) -> list[Method]:
    """Every routable method's instances for one architecture."""
    return [
        method
        for name, cls in sorted(REGISTRY.items())
        if not issubclass(cls, SelectMethod) and arch not in CANNOT.get(name, {})
        for method in instances(name, arch)
    ]


def first(method: Method) -> bool:
    """Whether this is the method's plain instance, not one of `EXTRA`."""
    return not any(
        all(getattr(method, key) == value for key, value in extra.items()) for extra in EXTRA.get(method.name, [])
    )


def label(method: Method) -> str:
    """A short name for a test id."""
    return "-".join(str(value) for value in method.to_dict().values() if isinstance(value, str))


@torch.no_grad()
def perturb(adapter: Adapter, seed: int = 0, size: float = 0.05) -> Adapter:
    """Move every parameter of an adapter a little, so that no start value hides an error."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return adapter
