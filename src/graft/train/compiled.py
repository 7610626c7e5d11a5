"""`train.compile`: torch.compile on each block of the base, while training steps run.

Blocks of one class share their graphs, so one forward and one backward compile and not one for each block. What stands
outside of the blocks stays as it is: embeddings, the head, the loss on labelled rows, hooks on the blocks themselves,
evaluation. Inside, our hooks are traced; the graphs have guards on the route and compile anew when it is another.

Attention text by text (`fast.segments`) breaks the graph, for its pieces differ from batch to batch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import modeling_layers

from graft import roles
from graft.bank import Bank, bank_of
from graft.errors import ConfigError
from graft.hooks import Replayed
from graft.method import Drawn

log = logging.getLogger("graft")

KEY = "train.compile"
LIMIT = 16
"""Graphs of one function, for blocks that share them; each block more may bring two of its own."""
_backend = "inductor"
DYNAMO = logging.getLogger("torch._dynamo.convert_frame")


class Compiled:
    """The blocks of a model, ready to be compiled.

    Args:
        model: with its adapter.
        plain: modules that are not to be compiled, such as those of a frozen trunk.

    Attributes:
        seconds: of the first pass, which compiles; 0 before it.

    Raises:
        ConfigError: this model or method cannot be compiled.
    """

    def __init__(self, model: Any, plain: Iterable[nn.Module] = ()) -> None:
        self.bank, left_out = bank_of(model), set(plain)
        blocks = [block for stack in roles.blocks(model).values() for _, block in stack if block not in left_out]
        _check(model, self.bank, blocks)
        self.kind = type(model).__name__
        self.limit = LIMIT + 2 * len(blocks)
        self.seconds = 0.0
        self.told = False
        try:
            made = {cls: torch.compile(_forward(cls), backend=_backend, dynamic=True) for cls in set(map(type, blocks))}
        except RuntimeError as error:  # this Python or this system has no torch.compile
            raise self._failed(error) from error
        self.blocks = [(block, made[type(block)]) for block in blocks]

    def first_pass(self, run: Callable[[], None]) -> None:
        """Run a forward and backward compiled, and take its time.

        Raises:
            ConfigError: nothing can be compiled on this machine.
        """
        begun = time.perf_counter()
        with self.running():
            run()
        self.seconds = time.perf_counter() - begun

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Blocks run compiled inside, in a forward and in what a checkpoint computes again.

        Raises:
            ConfigError: the compiler failed.
        """
        import torch._dynamo
        from torch._dynamo.exc import TorchDynamoException
        from torch.utils.checkpoint import CheckpointError

        patched = torch._dynamo.config.patch(recompile_limit=self.limit, suppress_errors=False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched)
            stack.enter_context(self._listening())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", message="The .grad attribute of a Tensor that is not a leaf"
            )  # dynamo's own
            for block, compiled in self.blocks:
                stack.enter_context(_replaced(block, *self._call(block, compiled)))
            try:
                yield
            except (
                TorchDynamoException,
                CheckpointError,
            ) as error:  # a recompute may meet another graph than its forward
                raise self._failed(error) from error

    def _call(self, block: Any, compiled: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
        """The attribute of a block through which its forward is called, and what to put there."""
        inner = getattr(block, "_gradient_checkpointing_func", None)
        inside = _checkpoints(type(block).forward) and getattr(block, "gradient_checkpointing", False)
        if inner is None or not inside:
            return "forward", functools.partial(compiled, block)
        return "_gradient_checkpointing_func", _Checkpointed(self.bank, inner, compiled)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Say in our words, and once, that dynamo has had enough."""
        DYNAMO.addFilter(self._said)
        try:
            yield
        finally:
            DYNAMO.removeFilter(self._said)

    def _said(self, record: logging.LogRecord) -> bool:
        if "recompile_limit" not in record.getMessage():
            return True
        if not self.told:
            log.warning(
                "%s: the blocks of %s were compiled %d times and batches still differ; what is new runs uncompiled",
                KEY,
                self.kind,
                self.limit,
            )
        self.told = True
        return False

    def _failed(self, error: Exception) -> ConfigError:
        inner = getattr(error, "inner_exception", error)  # what the compiler said, without dynamo's words around it
        reason = next(iter(str(inner).strip().splitlines()), type(inner).__name__)
        return ConfigError(f"{KEY}: the blocks of {self.kind} cannot be compiled here ({reason}); say {KEY}: false")


class _Checkpointed(Replayed):
    """A checkpointing function whose block runs compiled, the first time and when it is computed again."""

    def __init__(self, bank: Bank, inner: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        super().__init__(bank, inner.inner if isinstance(inner, Replayed) else inner)
        self.compiled = compiled

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """`function` is a partial of the block's forward with the block and its keywords."""
        call = functools.partial(self.compiled, *function.args, **function.keywords)
        return super().__call__(call, *args, **kwargs)


def _check(model: Any, bank: Bank, blocks: list[nn.Module]) -> None:
    import torch._dynamo

    reason = None
    if not blocks:
        reason = f"{type(model).__name__} has no blocks that are known"
    elif len(bank) > 1:
        reason = "several adapters train, and each mix of rows would compile again"
    elif any(isinstance(leaf.shared, Drawn) for adapter in bank for leaf in adapter.leaves):
        reason = f"{next(iter(bank)).method.name} draws another path at each step, which would compile again"
    elif getattr(model, "is_quantized", False):
        reason = "the base is quantized"
    elif any("forward" in block.__dict__ for block in blocks):
        reason = "the forward of a block was replaced"
    elif torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        reason = "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set"
    if reason is not None:
        raise ConfigError(f"{KEY}: {reason}; say {KEY}: false")


def _checkpoints(forward: Any) -> bool:
    """Whether this forward is the one that transformers (from 5.23 on) puts around a class's own, for checkpoints."""
    return getattr(forward, "__globals__", {}).get("__name__") == modeling_layers.__name__


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class of blocks, without transformers' checkpoint around it."""
    forward: Any = cls.forward
    while _checkpoints(forward) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


@contextlib.contextmanager
def _replaced(block: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another attribute of this one block, past nn.Module's own."""
    own, before = name in block.__dict__, block.__dict__.get(name)
    block.__dict__[name] = value
    try:
        yield
    finally:
        if own:
            block.__dict__[name] = before
        else:
            block.__dict__.pop(name, None)
