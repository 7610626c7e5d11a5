"""Losses in fp32, whatever dtype the model computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graft import roles


def logits_head(model: nn.Module) -> nn.Module | None:
    """The module that gives the logits; None for a model whose head the vocabulary does not know."""
    heads = [site.module for site in roles.sites(model) if site.role == "head"]
    return heads[-1] if heads else None  # DistilBERT has two, one behind the other


@contextlib.contextmanager
def in_fp32(head: nn.Module | None) -> Iterator[None]:
    """Inside, a head hands its 16-bit logits out in fp32, so what is computed from them is fp32 too; gradients go back.

    Args:
        head: see `logits_head`; None changes nothing.
    """
    if head is None:
        yield
        return
    # Registered last, so that it sees what adapters made of the logits.
    hook = head.register_forward_hook(_upcast)
    try:
        yield
    finally:
        hook.remove()


def _upcast(module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
    half = isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16)
    return output.float() if half else None
