"""The loss of a language model at its labelled tokens only, without the logits of a batch.

A hook keeps what enters the output head and hands the head no tokens, so the model makes no logits; of what was kept
only the rows that have a label meet the head, a chunk at a time. What cannot be done so takes the plain path: see
`graft.fast.head`.

Shape legend: B rows, T tokens, M = B * T places, N labelled ones, C those of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft import roles
from graft.bank import Bank, bank_of
from graft.errors import RouteError
from graft.fast.cross_entropy import losses, losses_through
from graft.fast.devices import autocast as in_dtype
from graft.fast.devices import autocast_of
from graft.fast.head import COMPILED, OutputHead, finish_of, head_of, shifted, tell, why_not
from graft.hooks import Replayed, Under
from graft.ids import IGNORED
from graft.method import CopyDelta
from graft.routes import Route
from graft.slots import accepts


def labelled_loss(
    model: Any, batch: dict[str, Any], *, num_items: Tensor | float | None = None, smoothing: float = 0.0
) -> Tensor:
    """The cross-entropy of a batch at its labels, in fp32; the logits of the batch never exist.

    A model whose own loss is another takes that one. Rows are routed as in any forward, by `graft.route`. The loss has
    gradients of the first order.

    Args:
        model: a model with adapters.
        batch: what the model would be called with, `labels` (B, T) among it, -100 where there is none.
        num_items: what the sum is divided by; None for the number of labels. Without any label the loss is 0.
        smoothing: the label smoothing, from 0 to 1.

    Raises:
        RouteError: the model has no adapters, or the batch does not fit the route.
    """
    loss = fast_loss(model, batch, num_items=num_items, smoothing=smoothing)
    if loss is not None:
        return loss
    labels, shifts = batch["labels"], roles.is_decoder(model)
    target = shifted(labels) if shifts and labels.dim() == 2 else labels
    count = (target != IGNORED).sum()
    if smoothing:
        logits = model(**_unlabelled(model, batch)).logits.float()
        total = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum", label_smoothing=smoothing)
        return total / (count.clamp(min=1) if num_items is None else num_items)
    if num_items is None:
        return model(**batch).loss
    return model(**batch, num_items_in_batch=num_items).loss if shifts else model(**batch).loss * count / num_items


def token_logprobs(model: Any, batch: dict[str, Any]) -> Tensor:
    """The log-probability of each label of a batch, in fp32; the logits of the batch never exist.

    Args:
        model: a model with adapters; rows are routed as in any forward, by `graft.route`.
        batch: what the model would be called with, `labels` (B, T) among it, -100 where there is none.

    Returns:
        (B, T - 1) for decoders, where column t is of the token t + 1; (B, T) for others; 0 where there is no label.
        Each has its own gradient, of the first order. If the head itself trains, the backward makes its logits again.

    Raises:
        RouteError: the model has no adapters, the batch does not fit the route, or has no labels (B, T).
    """
    if not isinstance(batch.get("labels"), Tensor) or batch["labels"].dim() != 2:
        raise RouteError("token_logprobs needs labels as a (B, T) tensor of token ids, -100 where there is none")
    head = _head(model, batch)
    if head is None:
        shifts = roles.is_decoder(model)
        target_BT = shifted(batch["labels"]) if shifts else batch["labels"]
        logits_BVT = model(**_unlabelled(model, batch)).logits.float().transpose(1, 2)
        found_BT = -F.cross_entropy(logits_BVT, target_BT, reduction="none")
        return found_BT[:, :-1] if shifts else found_BT
    rows = _labelled(model, head, batch, model)
    losses_N = _losses(model, head, rows, 0.0, summed=False)
    found_M = losses_N.new_zeros(rows.places).index_copy(0, rows.index_N, -losses_N if rows.labels else losses_N * 0.0)
    found_BT = found_M.view(-1, rows.tokens)
    return found_BT[:, :-1] if head.shifts else found_BT


def fast_loss(
    model: Any,
    batch: dict[str, Any],
    *,
    call: Any = None,
    num_items: Tensor | float | None = None,
    smoothing: float = 0.0,
    further: Callable[[Outputs], Tensor] | None = None,
) -> Tensor | None:
    """As `labelled_loss`; None where the plain path has to be taken.

    Args:
        call: what to call for a forward of the model, if it is wrapped.
        further: a sum over the labelled tokens to add to that of their losses.
    """
    head = _head(model, batch, call)
    if head is None:
        return None
    rows = _labelled(model, head, batch, model if call is None else call)
    found = _losses(model, head, rows, smoothing, summed=True)
    if further is not None:
        found = found + further(_outputs(model, head, rows))
    if not rows.labels:
        return found * 0.0
    return found / (num_items.to(found.device) if isinstance(num_items, Tensor) else num_items or rows.labels)


@dataclass(frozen=True)
class Outputs:
    """What a forward gives at the N labelled tokens of its batch, row by row; logits are made when they are asked for.

    Args:
        target_N: the labels.
        vocabulary: V.
        logits: from a slice of the N tokens to their logits (C, V), in fp32 or wider; as often as it is asked, and
            under the route of the forward, whatever holds meanwhile.
    """

    target_N: Tensor
    vocabulary: int
    logits: Callable[[slice], Tensor]


def outputs(model: Any, batch: dict[str, Any]) -> Outputs:
    """Run a batch and keep what enters the output head, or the logits themselves where that is not known how.

    Args:
        model: with or without adapters; rows are routed as in any forward, by `graft.route`.
        batch: what the model would be called with, `labels` (B, T) among it, -100 where there is none.
    """
    head = _head(model, batch) if isinstance(getattr(model, "adapters", None), Bank) else None
    if head is not None:
        return _outputs(model, head, _labelled(model, head, batch, model))
    target_BT = shifted(batch["labels"]) if roles.is_decoder(model) else batch["labels"]
    logits_BTV = model(**_unlabelled(model, batch)).logits
    kept_BT = target_BT != IGNORED
    logits_NV = logits_BTV[kept_BT]
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return Outputs(target_BT[kept_BT], logits_NV.shape[-1], lambda where: logits_NV[where].to(wide))


@dataclass(frozen=True)
class _Rows:
    """The rows that have a label.

    Args:
        hidden_ND: what enters the head.
        target_N: their labels.
        index_N: where they are among the places of the batch.
        tokens: T.
        places: B * T.
        labels: how many there are. Without any, one row stands in so that a graph is there; its loss counts 0.
        autocast: the dtype of the head's products, where its forward ran under autocast.
    """

    hidden_ND: Tensor
    target_N: Tensor
    index_N: Tensor
    tokens: int
    places: int
    labels: int
    autocast: torch.dtype | None


class _Keep:
    """Keeps what enters the head and hands it no tokens; adapters there sleep meanwhile."""

    def __init__(self, bank: Bank, head: OutputHead) -> None:
        self.bank, self.head = bank, head
        self.inputs: list[Tensor] = []
        self.autocast: torch.dtype | None = None
        self.slept = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD = args[0]
        self.inputs.append(x_BTD)
        self.autocast = autocast_of(x_BTD.device)
        self.bank.visit(self.head.path)
        self.slept, self.bank.asleep = self.bank.asleep, True
        return (x_BTD.new_empty(x_BTD.shape[0], 0, x_BTD.shape[2]), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.bank.asleep = self.slept


def _head(model: Any, batch: dict[str, Any], call: Any = None) -> OutputHead | None:
    """The head, if this batch can do without its logits."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None  # no labels of tokens: a classifier
    head = head_of(model)
    if head is None:
        return None
    reason = COMPILED if hasattr(call, "_orig_mod") else why_not(model, head, batch)
    if reason is not None:
        tell(model, reason)
    return head if reason is None else None


def _unlabelled(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without its labels, but with what a model makes of them."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    makes = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    given = any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    if roles.is_encoder_decoder(model) and makes is not None and not given:
        inputs["decoder_input_ids"] = makes(labels=batch["labels"])
    if "use_cache" not in inputs and accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _labelled(model: Any, head: OutputHead, batch: dict[str, Any], call: Any) -> _Rows:
    """Run the model without its head."""
    labels_BT = batch["labels"]
    target_BT = shifted(labels_BT) if head.shifts else labels_BT
    if head.shifts and isinstance(batch.get("shift_labels"), Tensor):
        target_BT = batch["shift_labels"]
    keep = _Keep(bank_of(model), head)
    with contextlib.ExitStack() as stack:
        stack.callback(head.module.register_forward_pre_hook(keep.before, prepend=True).remove)
        stack.callback(head.module.register_forward_hook(keep.after, always_call=True).remove)
        call(**_unlabelled(model, batch))
    (hidden_BTD,) = keep.inputs
    if hidden_BTD.shape[:2] != target_BT.shape:
        raise RouteError(f"labels are {tuple(target_BT.shape)} and the head has inputs {tuple(hidden_BTD.shape)}")
    target_M = target_BT.to(hidden_BTD.device).flatten()
    index_N = (target_M != IGNORED).nonzero()[:, 0]
    labels = len(index_N)
    if not labels:
        index_N, target_M = index_N.new_zeros(1), torch.zeros_like(target_M)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, index_N)
    tokens, places = target_BT.shape[1], target_M.numel()
    # With a `device_map` a head that is tied to the embedding is where that is, and not behind the last block.
    hidden_ND, target_N, index_N = (x.to(head.module.weight.device) for x in (hidden_ND, target_M[index_N], index_N))
    return _Rows(hidden_ND, target_N, index_N, tokens, places, labels, keep.autocast)


def _losses(model: Any, head: OutputHead, rows: _Rows, smoothing: float, *, summed: bool) -> Tensor:
    """The loss of each row (N), or their sum (), as the route says."""
    bank, finish = bank_of(model), finish_of(model)
    whole = _whole(bank, head)
    if whole is not None:
        weight_VD, bias_V = whole.weight, whole.bias
        dtype = rows.autocast or weight_VD.dtype
        hidden_ND, weight_VD = rows.hidden_ND.to(dtype), weight_VD.to(dtype)
        return losses(hidden_ND, weight_VD, bias_V, rows.target_N, finish, smoothing, summed=summed)
    run = functools.partial(_run, bank, head, rows.autocast, _owners(bank, rows))
    again = Replayed(bank, checkpoint) if torch.is_grad_enabled() else None
    found_N = losses_through(
        run, rows.hidden_ND, rows.target_N, head.module.out_features, finish, smoothing, checkpoint=again
    )
    return found_N.sum() if summed else found_N


def _whole(bank: Bank, head: OutputHead) -> nn.Linear | None:
    """The one linear that answers at the head: its own, or a trained copy; None where deltas act."""
    hook = bank.hooks.get(head.path)
    if hook is None or bank.asleep:
        return head.module
    acts = {entry: hook.acts(entry) for entry in bank.current.entries}
    if not any(acts.values()):
        return head.module
    only = acts[bank.current.uniform] if bank.current.uniform is not None else []
    if len(only) == 1 and isinstance(only[0][0], CopyDelta) and only[0][1] == 1.0:
        copy = only[0][0].copy
        return copy if type(copy) is nn.Linear else None
    return None


def _outputs(model: Any, head: OutputHead, rows: _Rows) -> Outputs:
    """The rows with what makes their logits, under the route that holds now."""
    bank, finish = bank_of(model), finish_of(model)
    run = functools.partial(_run, bank, head, rows.autocast, _owners(bank, rows))
    under = Under(bank, bank.snapshot(), lambda where: finish(run(rows.hidden_ND[where], where)))
    return Outputs(rows.target_N[: rows.labels], head.module.out_features, under)


def _owners(bank: Bank, rows: _Rows) -> list[int] | None:
    """For each row the number of its entry in the current route; None where all have the same."""
    current = bank.current
    if current.uniform is not None:
        return None
    if current.by_token:
        owner, places = current.owner(rows.places), rows.index_N
    else:
        owner, places = current.owner(rows.places // rows.tokens), rows.index_N // rows.tokens
    return [owner[place] for place in places.tolist()]


def _run(
    bank: Bank,
    head: OutputHead,
    autocast: torch.dtype | None,
    owners: list[int] | None,
    hidden_CD: Tensor,
    where: slice,
) -> Tensor:
    """The head's output for some rows, with the adapters of each row."""
    outer = bank.current
    if owners is not None:
        runs = [(number, len(list(run))) for number, run in itertools.groupby(owners[where])]
        entries = tuple(outer.entries[number] for number, _ in runs)
        bank.current = Route(entries, tuple(length for _, length in runs))
    try:
        with in_dtype(hidden_CD.device, autocast):
            return head.module(hidden_CD)
    finally:
        bank.current = outer
