"""A copy of a whole module that answers in its place: how it is made, and what it gives for a call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from graft.errors import RouteError


def clean_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` without forward hooks: they would drag the whole bank along and act twice."""
    kept = []
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    for child in module.modules():
        kept.append((child, {name: getattr(child, name) for name in names}))
        for name in names:
            setattr(child, name, type(getattr(child, name))())
    try:
        return copy.deepcopy(module)
    finally:
        for child, hooks in kept:
            for name, value in hooks.items():
                setattr(child, name, value)


def answer(copied: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a copy gives for a call of its module; floats are cast to the dtype of its parameters.

    Raises:
        RouteError: the call brings a cache, which the module itself has written to, or the answer is not one tensor.
    """
    what = f"a {type(copied).__name__} is trained whole (modules_to_save)"
    if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        raise RouteError(f"{what}, and its copy would write to the cache once more; run with use_cache=False")
    dtype = next(copied.parameters()).dtype
    out = copied(*_cast(args, dtype), **{key: _cast(value, dtype) for key, value in kwargs.items()})
    if not isinstance(out, Tensor):
        raise RouteError(f"{what} but does not give one tensor; name the modules inside it")
    return out


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
