"""A low-rank adapter of a method that peft does not have, as the plain LoRA that computes the same.

Shape legend: R rank, I in, O out.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from graft import probe
from graft.adapter import Adapter
from graft.forms.base import FORMS
from graft.method import Build, CopyDelta
from graft.methods.lora import LoRA


@torch.no_grad()
def exported(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter as plain LoRA, attached nowhere; itself if peft has its method, or a change is not of low rank.

    It has the pairs of `Delta.factors`, A (R, I) and B (O, R), with alpha = R, and the same trained copies.
    """
    if adapter.parts or any(type(adapter.method) in form.methods for form in FORMS.values()):
        return adapter
    pairs = {site.path: delta.factors() for site, delta in adapter.items() if not isinstance(delta, CopyDelta)}
    ranks = {path: pair[0].shape[0] for path, pair in pairs.items() if pair is not None}
    if not pairs or len(ranks) < len(pairs):
        return adapter
    top, kept = max(ranks.values()), adapter.method
    others: dict[str, int] = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != top}
    method = LoRA(
        rank=top,
        alpha=top,
        targets=tuple(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        head=kept.head,
        modules_to_save=kept.modules_to_save,
    )
    lora = Adapter(adapter.name, method, peft_compat=True)
    lora.card = adapter.card
    for site, delta in adapter.items():
        pair = pairs.get(site.path)
        if pair is None:
            lora.add(site, copy.copy(delta))  # shallow: the same tensors
            continue
        with probe.random_kept(model):
            made = method.delta(site, Build(model, peft_compat=True))
        for name, value in zip("AB", pair, strict=True):
            getattr(made, name).copy_(value)
        lora.add(site, made)
    return lora
