"""Where the time of training steps goes: each moment belongs to one part, so the parts sum to the whole.

Modules, adapters and the trainer's own functions say when they begin and end. The graph's nodes are given to the part
whose forward made them, and say it again when the backward reaches them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graft import attend, roles
from graft.bank import bank_of
from graft.fast import low_rank, mixed
from graft.train.loss import logits_head
from graft.weights import is_linear

DATA, LINEARS, ADAPTERS, ATTENTION = "data wait", "linears", "adapters", "attention"
LAYERS, LOSS, OPTIMIZER, REST, OWN = "other layers", "loss", "optimizer", "rest", "measuring"
PARTS = {
    LINEARS: "the base's linears in the blocks, forward and backward",
    ADAPTERS: "what the method adds, forward and backward",
    ATTENTION: "attention without its linears: scores, masks, positions",
    LAYERS: "embeddings, norms, activations, residuals",
    LOSS: "the output head and the loss, forward and backward",
    OPTIMIZER: "clipping, the step, the schedule of the rate, what the method does after a step",
    DATA: "reading and collating the batch, bringing it to the device",
    REST: "the trainer's loop and the edges of forward and backward",
    OWN: "this profile's own work, which a run does not have",
}
ATTENTIONS = ("attention", "cross_attention")
DELTA = ("before", "after", "into", "attend", "rows_PD")
"""Methods of a delta in which it computes."""


class Clock:
    """Seconds of each part, while it runs.

    Args:
        device: of the model; a GPU is waited for where one part ends and another begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running = False
        self._stack = [REST]
        self._since = 0.0
        self._owner: dict[Any, str] = {}

    def start(self) -> None:
        """Begin to count."""
        self._mark()
        self.running = True

    def stop(self) -> None:
        """Count no more."""
        self._mark()
        self.running = False

    def switch(self, part: str) -> None:
        """From here on the innermost part is this one."""
        self._mark()
        self._stack[-1] = part

    @contextlib.contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """What runs inside is this part, except for what parts within it take."""
        self._push(part)
        try:
            yield
        finally:
            self._pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part, its backward too."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.inside(part):
                given = _nodes((args, kwargs))
                result = function(*args, **kwargs)
                self._claim(part, result, given)
            return result

        return run

    def watch(self, module: nn.Module, part: str) -> list[Any]:
        """The module as a part, its backward too; hooks behind those that are there."""
        open_calls: list[list[Any]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._push(part)
            open_calls.append(_nodes((args, kwargs)))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._claim(part, output, open_calls.pop())
            self._pop()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(
                after, with_kwargs=True, always_call=True
            ),  # a checkpoint's recompute stops short
        ]

    def forget(self) -> None:
        """Let the graph of a finished backward go."""
        self._owner.clear()

    def _mark(self) -> None:
        if self.running:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.seconds[self._stack[-1]] += now - self._since
            self._since = now
        else:
            self._since = time.perf_counter()

    def _push(self, part: str) -> None:
        self._mark()
        self._stack.append(part)

    def _pop(self) -> None:
        self._mark()
        self._stack.pop()

    def _claim(self, part: str, result: Any, given: list[Any]) -> None:
        """Give the nodes between a part's input and its output to it, but for those that an inner part has."""
        if not torch.is_grad_enabled():
            return
        self._push(OWN)
        seen, waiting = set(given), _nodes(result)
        while waiting:
            node = waiting.pop()
            if node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            if node not in self._owner:
                self._owner[node] = part
                node.register_prehook(lambda _: self.switch(part))
            waiting += [each for each, _ in node.next_functions if each is not None]
        self._pop()


def _nodes(values: Any) -> list[Any]:
    """The graph's nodes that made the tensors somewhere in these values."""
    found = []
    for leaf in tree_leaves(values):
        tensors = (
            (leaf.query_BHTD, leaf.key_BKSD, leaf.value_BKSD) if isinstance(leaf, attend.AttentionCall) else (leaf,)
        )
        found += [each.grad_fn for each in tensors if isinstance(each, Tensor) and each.grad_fn is not None]
    return found


@contextlib.contextmanager
def measuring(trainer: Any) -> Iterator[Clock]:
    """Inside, each part of the trainer's steps says when it begins and ends; the caller starts and stops the clock."""
    model = trainer.model
    clock = Clock(model.device)
    places = [(delta, name, ADAPTERS) for delta in _deltas(model) for name in DELTA if hasattr(delta, name)]
    places += [(mixed.Table, "add", ADAPTERS), (low_rank, "through_base", LINEARS), (attend, "_run", ATTENTION)]
    places += [
        (trainer, "compute_loss", LOSS),
        (trainer, "get_batch_samples", DATA),
        (trainer, "_prepare_inputs", DATA),
    ]
    with contextlib.ExitStack() as stack:
        for module, part in _watched(model):
            for handle in clock.watch(module, part):
                stack.callback(handle.remove)
        for owner, name, part in places:
            stack.enter_context(_replaced(owner, name, clock.timed(part, getattr(owner, name))))
        stack.enter_context(_replaced(trainer, "training_step", _step(clock, trainer.training_step)))
        yield clock


def _step(clock: Clock, step: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward; what the trainer does behind them is the optimizer's, until the step ends."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with clock.inside(REST):
            result = step(*args, **kwargs)
        clock.forget()
        clock.switch(OPTIMIZER)
        return result

    return run


def _watched(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules that are a part; never the head, for the fast loss wants it without hooks of others."""
    blocks = {block for stack in roles.blocks(model).values() for _, block in stack}
    attentions = {site.module for site in roles.sites(model) if site.role in ATTENTIONS}
    for body in _bodies(model, logits_head(model), blocks):
        yield body, LAYERS
        for module in body.modules():
            if module in attentions:
                yield module, ATTENTION
            elif is_linear(module):
                yield module, LINEARS


def _bodies(module: nn.Module, head: nn.Module | None, blocks: set[nn.Module]) -> list[nn.Module]:
    """The largest modules that hold blocks and not the head; of the model itself at most its children."""
    held = set(module.modules())
    if not held & blocks:
        return []
    whole = not isinstance(module, nn.ModuleList) and not hasattr(module, roles.BANK)
    if whole and head not in held:
        return [module]
    return [body for child in module.children() for body in _bodies(child, head, blocks)]


def _deltas(model: nn.Module) -> list[Any]:
    leaves = {leaf for adapter in bank_of(model) for leaf in adapter.leaves}
    return [delta for leaf in leaves for _, delta in leaf.items()]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, of this one object where its class has it."""
    own = name in owner.__dict__
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)
