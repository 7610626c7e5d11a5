"""How many bytes a training step, or an answer, holds at its peak, and what they are.

Weights, gradients and optimizer state are counted; what a step holds besides is read off a step in shapes alone (see
`shapes`), with the very batch, method and paths that training would take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graft import roles
from graft.adapt import prepare, route
from graft.bank import Bank, bank_of
from graft.fast import head, loss
from graft.planning.shapes import Shapes, kernels
from graft.slots import accepts
from graft.train import state as states

COLUMNS = ("adapter", "segments")
"""What a batch has besides the model's own inputs."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of one step."""

    weights: int
    """Of the base and its adapters."""
    gradients: int = 0
    optimizer: int = 0
    """The optimizer's state, as it is from the second step on."""
    activations: int = 0
    """What the forward keeps for the backward; at inference what is being computed."""
    cache: int = 0
    """Keys and values of the tokens so far, at inference."""
    logits: int = 0
    """What the loss allocates; at inference the logits."""
    other: int = 0
    """What the backward, the trainer (a copy of the adapter as it began) or the device's own libraries hold besides."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """JSON."""
        return asdict(self) | {"total": self.total}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, each storage once."""
    sizes = {id(tensor): tensor for tensor in tensors}.values()
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in sizes}
    return sum(found.values())


def standing(model: Any) -> list[Tensor]:
    """All that stands beside a step: weights, buffers, and the base's own values of what a selection method trains."""
    kept = [tensor for adapter in bank_of(model) for leaf in adapter.leaves for tensor in leaf.other.values()]
    return [*model.parameters(), *model.buffers(), *kept]


def optimizer_bytes(parameters: Iterable[Tensor], optimizer: str) -> int:
    """The state of AdamW (two values for each), Adafactor (one for each row and column) or SGD (none)."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    return sum(4 * (p.shape[-1] + p.numel() // p.shape[-1] if p.dim() > 1 else p.numel()) for p in parameters)


def step_bytes(parameters: Iterable[Tensor], optimizer: str) -> int:
    """What an optimizer makes in its step, beside its state and the gradients.

    transformers' Adafactor, of one tensor after the other: the square of the gradient with and without its epsilon, and
    of 16 bits the gradient and the weight in 32.
    """
    if optimizer != "adafactor":
        return 0
    return max((p.numel() * (8 if p.element_size() > 2 else 16) for p in parameters), default=0)


def training(
    model: Any,
    batch: dict[str, Any],
    *,
    optimizer: str,
    accumulate: int,
    on_cpu: bool,
    compute: torch.dtype | None = None,
) -> tuple[Memory, int]:
    """The peak of a training step from the second one on, and the arithmetic of a batch.

    Args:
        model: on the meta device, with its adapter, in the dtype that it will have.
        batch: as the collator gives it, with real ids.
        optimizer: "adamw", "adafactor" or "sgd".
        accumulate: batches in a step.
        on_cpu: whether it will run on a CPU; else on a GPU.
        compute: what its forwards are autocast to, if they are.
    """
    stands = standing(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head.assume(model)
    model.train()
    with kernels(on_cpu, compute) as casts, Shapes() as shapes, _phases(shapes):
        shapes.know(stands)
        shapes.phase = "backward"
        for parameter in trained if accumulate > 1 else ():
            parameter.grad = torch.empty_like(parameter)  # of the batches before
        shapes.phase = "activations"
        found = _loss(model, batch)
        casts.clear()
        shapes.phase = "backward"
        found.backward()
        del found
    model.zero_grad()
    peak = shapes.at_peak
    backward = peak.get("backward", 0)
    gradients = min(bytes_of(trained), backward)
    kept = _starting(model, stands)
    memory = Memory(
        weights=bytes_of(stands),
        gradients=gradients,
        optimizer=optimizer_bytes(trained, optimizer),
        activations=peak.get("activations", 0),
        logits=peak.get("logits", 0),
        other=backward - gradients + kept,
    )
    makes = step_bytes(trained, optimizer)
    step = replace(memory, gradients=bytes_of(trained), activations=0, logits=0, other=kept + makes)
    if makes and step.total > memory.total:
        memory = step
    starts = memory.weights + sum(a.method.start_bytes(a) for adapter in bank_of(model) for a in adapter.leaves)
    memory = replace(memory, other=memory.other + max(0, starts - memory.total))
    return memory, shapes.arithmetic


def evaluating(
    model: Any, batch: dict[str, Any], *, optimizer: str, on_cpu: bool, compute: torch.dtype | None = None
) -> Memory:
    """The peak of an evaluation in the middle of training; the arguments are those of `training`."""
    stands = standing(model)
    head.assume(model)
    model.eval()
    with torch.no_grad(), kernels(on_cpu, compute), Shapes() as shapes, _phases(shapes):
        shapes.know(stands)
        _loss(model, batch)
    return Memory(
        weights=bytes_of(stands),
        optimizer=optimizer_bytes([p for p in model.parameters() if p.requires_grad], optimizer),
        activations=shapes.at_peak.get("activations", 0),
        logits=shapes.at_peak.get("logits", 0),
        other=_starting(model, stands),
    )


def _starting(model: Any, stands: list[Tensor]) -> int:
    """Bytes of the copy of the adapter as it began, where that is no tensor which stands anyway."""
    return bytes_of([*stands, *states.starting(model).values()]) - bytes_of(stands)


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The loss as training has it."""
    bank = bank_of(model)
    segments = _used(bank, batch)
    if _prompts(bank):
        batch = prepare(model, batch, segments=segments)
        segments = _used(bank, batch)
    inputs = {key: value for key, value in batch.items() if key not in COLUMNS}
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    routing: Any = contextlib.nullcontext()
    if segments is not None and not any(adapter.selected for adapter in bank):
        routing = route(model, segments=segments)
    with routing:
        found = loss.fast_loss(model, inputs)
        return model(**inputs).loss if found is None else found


def _used(bank: Bank, batch: dict[str, Any]) -> list[tuple[Any, int]] | None:
    """The texts of a packed batch, each with the adapter in use."""
    segments = batch.get("segments")
    return None if segments is None else [(dict(bank.used), length) for _, length in segments]


def _prompts(bank: Bank) -> bool:
    return any(bank.prompts(((name, 1.0),)) for name in bank.names)


@contextlib.contextmanager
def _phases(shapes: Shapes) -> Iterator[None]:
    """Inside, what the loss allocates behind the last hidden states belongs to the logits."""
    real = loss._losses

    def losses(*args: Any, **kwargs: Any) -> Tensor:
        before, shapes.phase = shapes.phase, "logits"
        try:
            return real(*args, **kwargs)
        finally:
            shapes.phase = before

    loss._losses = losses
    try:
        yield
    finally:
        loss._losses = real


def answering(model: Any, rows: int, prompt: int, new: int, *, on_cpu: bool) -> Memory:
    """The peak of generating: the prefill of all rows, or the last step with the whole cache.

    Args:
        model: on the meta device, a decoder or an encoder-decoder.
        rows: texts at once.
        prompt, new: tokens of a prompt and of an answer.
        on_cpu: whether it will run on a CPU; else on a GPU.
    """
    stands = standing(model)
    both = roles.is_encoder_decoder(model)
    model.eval()
    with torch.no_grad(), kernels(on_cpu), Shapes() as shapes:
        shapes.know(stands)
        batch: dict[str, Any] = {"input_ids": torch.zeros(rows, prompt, dtype=torch.long), "use_cache": True}
        if _prompts(bank_of(model)):
            batch = prepare(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
        if both:
            batch["decoder_input_ids"] = torch.zeros(rows, 1, dtype=torch.long)
        elif accepts(model, "logits_to_keep"):
            batch["logits_to_keep"] = 1
        out = model(**batch)
        cache = out.past_key_values
        own = _kept(cache.self_attention_cache if both else cache)
        read = _kept(cache.cross_attention_cache) if both else 0
        logits = out.logits[:, -1].numel() * (out.logits.element_size() + 4)  # and in fp32, to choose the next
        layers = max(1, len((cache.self_attention_cache if both else cache).layers))
    grown = own * (new if both else prompt + new) // (1 if both else max(1, prompt))
    last = grown + read + grown // layers  # a layer's keys and values are copied to longer ones
    weights = bytes_of(stands)
    if shapes.peak > last + logits:
        kept = own + read
        return Memory(weights=weights, activations=shapes.peak - kept - logits, cache=kept, logits=logits)
    return Memory(weights=weights, activations=grown // layers, cache=grown + read, logits=logits)


def _kept(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))
