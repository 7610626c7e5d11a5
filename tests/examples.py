"""One or two small instances of every registered method, for the suites that run over all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import graft.methods  # noqa: F401  fills the registry
from graft.bank import Adapter
from graft.method import REGISTRY, Method, SelectMethod

SMALL: dict[str, Any] = {"rank": 4, "size": 5, "length": 3, "count": 1}
EXTRA: dict[str, list[dict[str, Any]]] = {
    "lora": [{"targets": "all-linear", "rslora": True}],
    "bottleneck": [{"kind": "pfeiffer"}, {"kind": "parallel"}],
    "prefix_tuning": [{"hidden": 6}],
}
CANNOT: dict[str, dict[str, str]] = {
    "head": dict.fromkeys(
        ("llama", "gpt2", "gemma2", "mixtral", "t5", "mt5", "bart", "llama_tied", "mistral", "qwen2")
        + ("qwen3", "gemma3", "phi3", "gpt_neox", "opt"),
        "no task head",
    ),
}
"""Which architectures refuse a method, and what the error says."""
ATTENTION_ONLY = {"ia3": {"targets": ("attention.key", "attention.value"), "feedforward": ()}}


def instances(name: str, arch: str) -> list[Method]:
    """Small instances of a registered method that fit the architecture."""
    cls = REGISTRY[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    base = {key: value for key, value in SMALL.items() if key in fields}
    if arch == "mixtral":
        base |= ATTENTION_ONLY.get(name, {})
    return [cls(**{**base, **extra}) for extra in ({}, *EXTRA.get(name, []))]


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
