"""The output head of a language model: what becomes of its output, and whether the loss is the cross-entropy of that.

A soft cap, a scale and a bias are read from the config and tried once per model, with two tokens and made-up logits:
the model's own logits and loss must be what is computed from them here.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles
from graft.bank import Bank, bank_of
from graft.fast.cross_entropy import Finish
from graft.ids import IGNORED
from graft.routes import BASE, Route
from graft.slots import accepts

log = logging.getLogger("graft")

PROBED = 20.0
"""The size of the made-up logits: one at which a soft cap shows."""

COMPILED = "the model is compiled, and its graph has them"
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of a config that multiply logits; `logits_scaling` divides them."""


@dataclass(frozen=True)
class OutputHead:
    """The output head of a model, and whether a label stands one place behind the token that predicts it (`shifts`)."""

    path: str
    module: nn.Linear
    shifts: bool


_heads: weakref.WeakKeyDictionary[nn.Module, OutputHead | str] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def head_of(model: Any) -> OutputHead | None:
    """The head, if the model's loss is the cross-entropy of what it gives; else None, and the log says why, once.

    The first call runs the model on two tokens, with adapters asleep, and leaves no trace.
    """
    if getattr(model, "_compiled_call_impl", None) is not None or torch.compiler.is_compiling():
        tell(model, COMPILED)
        return None
    if model not in _heads:
        _heads[model] = _tried(model)
    found = _heads[model]
    if isinstance(found, str):
        if found:
            tell(model, found)
        return None
    return found


def assume(model: Any) -> None:
    """Take the loss of a model on the meta device, which cannot be tried, for the cross-entropy of its logits."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.is_meta:
        path = next(path for path, each in model.named_modules() if each is head)
        _heads[model] = OutputHead(path, head, roles.is_decoder(model))


def tell(model: nn.Module, reason: str) -> None:
    """Say once why a model's losses are computed from the logits of whole batches."""
    told = _told.setdefault(model, set())
    if reason not in told:
        told.add(reason)
        log.warning("the loss takes the logits of whole batches: %s", reason)


def why_not(model: Any, head: OutputHead, batch: dict[str, Any]) -> str | None:
    """Why this batch needs the plain path, by rules that hold now and may not later; None if it does not."""
    bank, module = bank_of(model), head.module
    config = model.config.get_text_config()
    if "_loss_function" in model.__dict__:
        return "its loss_function was replaced"
    if batch.get("output_router_logits", getattr(config, "output_router_logits", False)):
        return "its loss has a part of its routers (output_router_logits)"
    if batch.get("logits_to_keep") is not None:
        return "the batch has logits_to_keep"
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.shape != (module.out_features, module.in_features):
        return f"the weight of {head.path} is not a plain tensor"
    if weight.is_meta and not all(parameter.is_meta for parameter in model.parameters()):
        return f"{head.path} is not in memory"
    own = {handle.id for handles in bank.handles.values() for handle in handles}
    if not own.issuperset([*module._forward_hooks, *module._forward_pre_hooks]):
        return f"{head.path} has a hook of somebody else's"
    above = next((path for path in bank.hooks if head.path.startswith(f"{path}.")), None)
    if above is not None:
        return f"an adapter answers for all of {above}"
    hook = bank.hooks.get(head.path)
    entries = set(bank.current.entries)
    if hook is not None and any(delta.reads_texts for entry in entries for delta, _ in hook.acts(entry)):
        return f"an adapter at {head.path} reads whole texts"
    if roles.is_encoder_decoder(model):
        if bank.averages and batch.get("decoder_attention_mask") is None:
            return "an adapter averages over the decoder's texts, and only the labels tell where they end"
        if batch.get("decoder_input_ids") is None and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return "it makes decoder_input_ids from labels in a way of its own"
    return None


def finish_of(model: Any) -> Finish:
    """What the model makes of its head's output, as far as its config says it."""
    config = model.config.get_text_config(decoder=True)
    scale = math.prod(_number(config, name) or 1.0 for name in SCALES) / (_number(config, "logits_scaling") or 1.0)
    bias = getattr(model, "final_logits_bias", None)
    cap = _number(config, "final_logit_softcapping")
    return Finish(scale, cap or None, bias.flatten() if isinstance(bias, Tensor) else None)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


def _tried(model: Any) -> OutputHead | str:
    """The head, or why the loss cannot be computed from its input; "" where the model is none of language."""
    what = type(model).__name__
    try:
        module = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        module = None
    if module is None:
        return ""
    if type(module) is not nn.Linear:
        return f"{what} has no output head that is a plain linear"
    if type(module.weight) not in (Tensor, nn.Parameter) or module.weight.is_meta:
        return f"the head of {what} is not in memory as a plain tensor"
    path = next(path for path, each in model.named_modules() if each is module)
    probe = _Probe()
    ids_BT = torch.tensor([[1, 2]], device=module.weight.device) + module.out_features // 2
    batch = {"input_ids": ids_BT, "labels": ids_BT}
    if accepts(model, "use_cache"):
        batch["use_cache"] = False  # type: ignore[assignment]
    with _undisturbed(model), contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_hook(probe.after).remove)
        try:
            output = model(**batch)
            logits_BTV, loss = output.logits.float(), float(output.loss)
        except Exception as error:  # what two tokens run into is no matter: the plain path takes this model
            return f"{what} cannot be tried on two tokens ({' '.join(str(error).split())[:80]})"
    if len(probe.outputs) != 1 or probe.outputs[0].shape[:2] != ids_BT.shape:
        return f"{what} does not run its head once over all tokens"
    near = 1e-4 if probe.outputs[0].dtype == torch.float32 else 2e-2
    expected_BTV = finish_of(model)(probe.outputs[0]).float()
    if logits_BTV.shape != expected_BTV.shape or (logits_BTV - expected_BTV).abs().max() > near * PROBED:
        return f"{what} changes its head's output in a way that is not known"
    for shifts in (True, False):
        target_BT = shifted(ids_BT) if shifts else ids_BT
        own = F.cross_entropy(expected_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED)
        if math.isclose(loss, float(own), rel_tol=near):
            return OutputHead(path, module, shifts)
    return f"the loss of {what} is not the cross-entropy of its logits alone"


def shifted(labels_BT: Tensor) -> Tensor:
    """The label of the next token in the place of each."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


class _Probe:
    """Puts made-up logits in the place of a head's output."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        steps = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
        self.outputs.append((PROBED * steps.sin()).to(output.dtype).view(output.shape))
        return self.outputs[-1]


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the base runs alone, in eval mode, without a graph; modes, random state and route are then put back."""
    bank: Bank = bank_of(model)
    modes = [(module, module.training) for module in model.modules()]
    state, active = bank.snapshot(), bank.slots.active
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            bank.asleep, bank.current = True, Route.everywhere(BASE)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            bank.restore(state)
            bank.slots.active = active
