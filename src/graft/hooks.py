"""The hooks that let deltas act. Objects, never closures: a deepcopied model keeps its own adapters.

Shape legend: N leading size, B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.errors import RouteError
from graft.fast import low_rank, mixed
from graft.method import CopyDelta, Delta, InputDelta
from graft.routes import BASE, Entry
from graft.texts import Texts

if TYPE_CHECKING:
    from graft.bank import Bank

Act = tuple[Delta, float]
ENTRIES = 256
"""How many entries' deltas a site remembers."""
Run = Callable[[list[Act], Sequence[Tensor], Texts | None], Tensor]


class Tap:
    """Keeps the input of one module, its first argument, until who asked for it has used it."""

    def __init__(self, bank: Bank, name: str = "") -> None:
        self.bank = bank
        self.name = name
        self.value: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if not self.bank.asleep:
            self.value = args[0] if args else (kwargs or {})[self.name]


class SiteHook:
    """Runs the deltas of one site for the rows (or tokens) that the route gives to each."""

    def __init__(self, bank: Bank, path: str) -> None:
        self.bank = bank
        self.path = path
        self.deltas: dict[str, Delta] = {}
        self.taps: dict[str, Tap] = {}
        self.known: tuple[int, dict[Entry, list[Act]]] = (-1, {})
        self.side: str | None = None
        """The mask of its input's padding, if a delta here reads texts."""

    def acts(self, entry: Entry) -> list[Act]:
        """The deltas of an entry at this site with their weights, in the order in which they act."""
        changes, compiling = mixed.changes(), torch.compiler.is_compiling()
        if not compiling and self.known[0] == changes and entry in self.known[1]:
            return self.known[1][entry]
        leaves = self.bank.leaves(entry)
        all_ = [(self.deltas[name], weight * self.bank[name].scale) for name, weight in leaves if name in self.deltas]
        found = sorted([(delta, weight) for delta, weight in all_ if not isinstance(delta, InputDelta)], key=_order)
        if not compiling:
            before = self.known[1] if self.known[0] == changes and len(self.known[1]) < ENTRIES else {}
            self.known = changes, {**before, entry: found}
        return found

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.bank.asleep:
            return None
        self._need(args)
        self.bank.visit(self.path)
        x = self._map(self._run_before, (args[0],))
        return None if x is None else (x, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.bank.asleep:
            return None
        self._need(args)
        self.bank.visit(self.path)
        if self.bank.current.uniform == BASE and not self.taps:
            return None
        y = output[0] if isinstance(output, tuple) else output
        copies = self._copies() if kwargs or len(args) > 1 else []
        new = self._spanning(args, kwargs, y, copies) if self.taps or copies else self._added(module, args[0], y)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _added(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """The output with the changes, written into the base's own where that is allowed."""
        entry = self.bank.current.uniform
        if entry is None:
            own = not torch.is_grad_enabled() and low_rank.takes(module, self.after, x, y)
            return self._map(self._run_after, (x, y), own)
        acts = self.acts(entry)
        writes = len(acts) == 1 and type(acts[0][0]).into is not Delta.into
        new = acts[0][0].into(x, y, acts[0][1]) if writes and low_rank.takes(module, self.after, x, y) else None
        return self._map(self._run_after, (x, y)) if new is None else new

    def _need(self, args: tuple[Any, ...]) -> None:
        if not args:
            raise RouteError(f"{self.path} is called with keywords alone; no delta can act there, name what is inside")

    def _copies(self) -> list[CopyDelta]:
        """The trained copies that act now."""
        acts = [act for entry in self.bank.current.entries for act in self.acts(entry)]
        return list(dict.fromkeys(delta for delta, _ in acts if isinstance(delta, CopyDelta)))

    def _spanning(self, args: Any, kwargs: Any, y: Tensor, copies: list[CopyDelta]) -> Tensor | None:
        """As `after`, where deltas read the input of another module too, or copies all that this one is called with."""
        inputs = [args[0]]
        for path, tap in self.taps.items():
            if tap.value is None:
                raise RouteError(f"{self.path}: the module {path} that its adapter reads did not run before it")
            inputs.append(tap.value)
        inputs += [copied.answer(args, kwargs).to(y.dtype) for copied in copies]
        new = self._map(partial(self._run_after, copies=copies), (*inputs, y))
        for tap in self.taps.values():
            tap.value = None
        return new

    def _run_before(self, acts: list[Act], tensors: Sequence[Tensor], texts: Texts | None) -> Tensor:
        (x,) = tensors
        for delta, weight in acts:
            new = delta.before(x)
            x = new if weight == 1.0 or new is x else x + weight * (new - x)
        return x

    def _run_after(
        self, acts: list[Act], tensors: Sequence[Tensor], texts: Texts | None, copies: Sequence[Delta] = ()
    ) -> Tensor:
        base = y = tensors[-1]
        inputs = dict(zip(("", *self.taps), tensors, strict=False))
        for delta, weight in acts:
            from_base = delta.from_base and y is not base
            more = (texts,) if delta.reads_texts else ()
            if delta in copies:
                new = tensors[1 + len(self.taps) + copies.index(delta)]
            else:
                new = delta.after(inputs[delta.tap or ""], base if from_base else y, *more)
            if from_base:
                y = y + weight * (new - base)
            else:
                y = new if weight == 1.0 else y + weight * (new - y)
        return y

    def _map(self, run: Run, tensors: Sequence[Tensor], own: bool = False) -> Tensor | None:
        """Apply `run` to each group's slice of the tensors; the last is the one that changes, in place if it is `own`.

        Changes of low rank are made for all groups at once.
        """
        route = self.bank.current
        if route.uniform is not None:
            acts = self.acts(route.uniform)
            return run(acts, tensors, self._texts([acts], tensors[-1])) if acts else None
        if not route.by_token:
            tensors = [_spread(tensor, self.bank.batch) for tensor in tensors]
        flat = [_flat(tensor, route.tokens) if route.by_token else tensor for tensor in tensors]
        target, sums = flat[-1], run == self._run_after
        if sums and (table := route.tables.find(self.path, flat[0])) is not None:
            return _like(table.add(flat[0], target, own), tensors[-1], route.by_token, route.tokens)
        parts = []
        for group in route.groups(target.shape[0], target.device):
            acts = self.acts(group.entry)
            if acts:
                parts.append((acts, group.index))
        if not parts:
            return None
        low, rest = mixed.split(parts, flat[0]) if sums else ([], parts)
        if rest:
            target, own = self._looped(run, rest, flat), True
        if low:
            # A table is all that a site needs the next time, unless there are others beside it.
            table = mixed.Table(low, flat[0], {}) if rest else route.tables.make(self.path, low, flat[0])
            target = table.add(flat[0], target, own)
        return _like(target, tensors[-1], route.by_token, route.tokens)

    def _looped(self, run: Run, parts: list[tuple[list[Act], Tensor]], flat: list[Tensor]) -> Tensor:
        """Each group's rows one group after the other."""
        target = flat[-1]
        texts = self._texts([acts for acts, _ in parts], target)
        news = []
        for acts, index in parts:
            part = [tensor.index_select(0, index) for tensor in flat]
            news.append(run(acts, part, None if texts is None else texts.pick(index)))
        index = torch.cat([index for _, index in parts])
        return target.index_copy(0, index, torch.cat(news).to(target.dtype))

    def _texts(self, groups: list[list[Act]], x: Tensor) -> Texts | None:
        """The texts of the site's input, if a delta that acts reads them."""
        if self.side is None or not any(delta.reads_texts for acts in groups for delta, _ in acts):
            return None
        return self.bank.texts_at(self.side, x)


class ContiguousHook:
    """Hands a frozen head a contiguous input: F.linear on a slice copies the weight for every row on CPU."""

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        return None if x.is_contiguous() else (x.contiguous(), *args[1:])


class BarrierHook:
    """Detaches what enters the first trained layer, so that no graph is kept below it."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        cut = {key: _detached(value) if key == "hidden_states" else value for key, value in kwargs.items()}
        return (_detached(args[0]), *args[1:]) if args else args, cut


class RootHook:
    """Notes what a forward of the model brings: rows, cached length, and which sites ran."""

    def __init__(self, bank: Bank, check: bool) -> None:
        self.bank = bank
        self.check = check

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bank.begin(args, kwargs, root=self.check, module=module)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.bank.end(module)


class Replayed:
    """A checkpointing function whose recompute, later and perhaps under another route, runs under its own route."""

    def __init__(self, bank: Bank, inner: Callable[..., Any]) -> None:
        self.bank = bank
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.inner(Under(self.bank, self.bank.snapshot(), function), *args, **kwargs)


class Under:
    """A function that runs under a snapshot of the bank, whatever route holds when it is called."""

    def __init__(self, bank: Bank, state: Any, function: Callable[..., Any]) -> None:
        self.bank, self.state, self.function = bank, state, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self.bank.snapshot()
        self.bank.restore(self.state)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.bank.restore(now)


def _order(act: Act) -> int:
    return act[0].order


def _flat(tensor: Tensor, tokens: int) -> Tensor:
    """A tensor of a packed batch with its tokens in one leading dimension; heads may stand in front of them."""
    shape = tensor.shape
    if _heads_first(tensor, tokens):
        return tensor.transpose(1, 2).flatten(0, 1)
    if tensor.dim() > 1 and shape[0] * shape[1] == tokens:
        return tensor.flatten(0, 1)
    if shape[0] == tokens:
        return tensor
    raise RouteError(f"a packed batch of {tokens} tokens reached a module with an input of {tuple(shape)}")


def _spread(tensor: Tensor, rows: int) -> Tensor:
    """A table of positions may run once for the whole batch: each row then gets its own."""
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 < rows else tensor


def _like(flat: Tensor, tensor: Tensor, by_token: bool, tokens: int) -> Tensor:
    """`_flat` undone."""
    if by_token and _heads_first(tensor, tokens):
        return flat.view(tensor.transpose(1, 2).shape).transpose(1, 2)
    return flat.view(tensor.shape)


def _heads_first(tensor: Tensor, tokens: int) -> bool:
    shape = tensor.shape
    if tensor.dim() != 4 or shape[0] != 1 or shape[2] != tokens:
        return False
    if shape[1] == tokens:
        raise RouteError(f"a packed batch of {tokens} tokens cannot be told from as many heads; add a token")
    return True


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
