"""Where our functions stand in transformers' attention interface, and since when.

An attention-level delta brings a seat at its module and, with the first one, our functions; so does the first packed
row, whose texts then attend one by one, and the first forward that `fast.short` may serve. They go with the last seat,
and all of them with the last adapter.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft import roles
from graft.attend import PREFIX, TAKEN, Seat, check, through
from graft.errors import SiteError
from graft.fast import segments, short
from graft.hooks import Tap
from graft.method import AttentionDelta
from graft.roles import Site
from graft.texts import side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.bank import Bank


def seat(model: PreTrainedModel, bank: Bank, site: Site, name: str, delta: AttentionDelta) -> None:
    """Put an attention-level delta at an attention module.

    Raises:
        SiteError: the model's attention does not go through the interface, or uses a kernel that takes no mask.
    """
    check(model, site)
    install(model, bank)
    here: Seat | None = site.module.__dict__.get("_graft_seat")
    if here is None:
        here = Seat(bank, site.path, _bias_source(model, site))
        site.module.__dict__["_graft_seat"] = here
    here.deltas[name] = delta
    if delta.reads_texts and here.tap is None:
        first = list(inspect.signature(type(site.module).forward).parameters)[1]
        here.tap, here.side = Tap(bank, first), side(model, site)
        bank.hook(f"{site.path}:input", site.module.register_forward_pre_hook(here.tap.before, with_kwargs=True))


def unseat(model: nn.Module, bank: Bank, site: Site, name: str) -> None:
    """Take a delta away; the last one takes the seat, and the last seat the functions."""
    here: Seat | None = site.module.__dict__.get("_graft_seat")
    if here is None:
        return
    here.deltas.pop(name, None)
    if here.tap is not None and not any(delta.reads_texts for delta in here.deltas.values()):
        here.tap = None
        for handle in here.bank.handles.pop(f"{site.path}:input", []):
            handle.remove()
    if not here.deltas:
        del site.module.__dict__["_graft_seat"]
    if not any("_graft_seat" in module.__dict__ for module in model.modules()):
        uninstall(bank)


def install(model: nn.Module, bank: Bank) -> None:
    """Point every config of the model at our functions, and the mask functions along with them."""
    if bank.attention:
        return
    for kind in TAKEN:
        if PREFIX + kind not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(PREFIX + kind, through(kind))
            AttentionMaskInterface.register(PREFIX + kind, segments.masks(kind, ALL_MASK_ATTENTION_FUNCTIONS[kind]))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        # Another model may share the config and have our functions there already.
        now = str(getattr(config, "_attn_implementation", None)).removeprefix(PREFIX)
        if now in TAKEN:
            bank.attention.append((config, now))
    for config, old in bank.attention:
        config._attn_implementation = PREFIX + old


def begin(bank: Bank, module: nn.Module, inputs: dict[str, Any], *, root: bool) -> None:
    """Note the texts of a packed forward: attention then runs text by text, in every model whose attention can.

    Our functions stay from the first such forward, or the first one that `fast.short` may serve, until the last adapter
    goes: a recompute needs them too.
    """
    if torch.compiler.is_compiling():
        return
    lengths = segments.lengths_of(getattr(module, "config", None), inputs)
    if root and (lengths is not None or short.may(module)):
        if bank.by_text is None:
            bank.by_text = runs_by_text(module)
        if bank.by_text:
            install(module, bank)
    segments.NOW.lengths = lengths if bank.by_text and bank.attention else None


def runs_by_text(model: Any) -> bool:
    """Whether attention of this model can run text by text: it has one stack and goes through the interface."""
    found = [site for site in roles.sites(model) if site.role == "attention"]
    try:
        for site in found:
            check(model, site)
    except SiteError:
        return False
    return bool(found) and not roles.is_encoder_decoder(model)


def makes_no_mask(model: Any) -> bool:
    """Whether a packed row costs no T x T mask: text by text, or by kernels that know of texts themselves."""
    return model.config._attn_implementation.startswith(("flash", "flex")) or runs_by_text(model)


def keep(bank: Bank, model: nn.Module) -> None:
    """Put our functions back where something else has set the attention since; a kernel that we lack is refused."""
    for i, (config, _) in enumerate(bank.attention):
        now = config._attn_implementation
        if not now.startswith(PREFIX):
            if now not in TAKEN:
                if not any("_graft_seat" in module.__dict__ for module in model.modules()):
                    bank.attention, bank.by_text = [], None  # they were there for packed rows alone
                    return
                raise SiteError(f"attn_implementation={now!r} was set since; prefix rows need 'sdpa' or 'eager'")
            bank.attention[i] = (config, now)
            config._attn_implementation = PREFIX + now


def uninstall(bank: Bank) -> None:
    """Give the configs their own attention back."""
    for config, kind in bank.attention:
        config._attn_implementation = kind
    bank.attention = []


def _bias_source(model: nn.Module, site: Site) -> nn.Module | None:
    """The module that computes relative position biases for this stack's self-attention, if there is one."""
    if site.role != "attention" or not hasattr(site.module, "compute_bias"):
        return None
    if getattr(site.module, "has_relative_attention_bias", False):
        return site.module
    stack = [other for other in roles.sites(model) if other.role == "attention" and other.stack == site.stack]
    return next((s.module for s in stack if getattr(s.module, "has_relative_attention_bias", False)), None)
