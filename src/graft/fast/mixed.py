"""Many low-rank deltas in one batch: y_n += w_n B_n A_n x_n, row by row, in a few products for all of them.

Forms:

* loop: each group's rows are picked, changed and put back by the delta itself; any delta, in training with dropout too.
* stacked: the rows in pieces of equal length, each with one delta; A and B of the pieces stand in two tensors, and two
  batched products do all. Ranks are padded, over several pairs of tensors where that would waste much.
* grouped: rows sorted by delta, no piece and no padding of rows; torch's grouped GEMM.

Stacked is taken wherever it can be: with 4 and 64 deltas for 64 rows on one CPU thread it was the fastest or level in
every decode step, and in prefills but one (fp32, 64 deltas, 8 tokens a row: grouped). Grouped is a loop inside torch
there. Other devices have not been measured; `prefer` takes another form.

A and B are gathered once for a route and kept while it lasts: the tables of the last route of each bank, in the dtype
of the activations, at most one A and B for each row. On CPU, where one row has a delta of its own, they are kept in
fp32: its batched product of one token a row is the faster one there, for bf16 activations too. The first forward with
more tokens a row keeps them in bf16 beside.
Kept are only frozen adapters' tables, in eval mode, without gradients; they are made anew when a tensor that they come
from has been written to (torch's version counter; it misses writes into `.data`), replaced, moved or cast, when a dial
was set, a delta put into training mode, or an adapter attached or detached. Looking at thousands of tensors takes as
long as a linear: a forward that goes on from a cache, a step of `generate`, looks for writes at the first site of each
set of adapters alone, which sees who writes to a whole adapter; the next text looks at all.

Shape legend: N leading size (rows, or flattened tokens), T what stands between, I in, O out, R rank, K deltas,
P pieces, M rows in a piece.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.method import Delta

Part = tuple[Delta, float, Tensor]
"""A delta, its weight, and the rows (an index) where it acts with that weight."""

FORMS = ("loop", "stacked", "grouped")
TRAIN_FROM = 3
"""Groups in a batch from which training stacks; a loop keeps less for the backward."""
PIECE = 2
"""What reading A and B for one more piece costs, in rows."""
WASTE, WASTE_LOW = 1.5, 3.0
"""Padded over real ranks, above which ranks are stacked apart; in 16 bit, where products cost more than what they read,
for pieces of several rows."""
PLANS = 64
"""How many plans a route keeps: one for each set of rows that some site has deltas for."""
ALIGNED = 8
"""What torch's grouped GEMM wants sizes to be a multiple of: 16 bytes."""
LOW = (torch.bfloat16, torch.float16)

_form = "stacked"
_changes = 0
_version, _pointer, _training = attrgetter("_version"), methodcaller("data_ptr"), attrgetter("training")


def changes() -> int:
    """Counts the calls of `changed`."""
    return _changes


def changed() -> None:
    """Let every kept table be made anew: an adapter came or went, or a dial was set."""
    global _changes
    _changes += 1


@contextlib.contextmanager
def prefer(form: str) -> Iterator[None]:
    """Take this form inside wherever it can be; for tests and measurements, one thread at a time."""
    global _form
    before, _form = _form, form
    changed()
    try:
        yield
    finally:
        _form = before
        changed()


def split(acts: Sequence[tuple[list[tuple[Delta, float]], Tensor]], x: Tensor) -> tuple[list[Part], list[Any]]:
    """The parts that one sum of low rank does, and the groups that are left for the loop.

    Args:
        acts: for each group its deltas with their weights, and its rows.
        x: the input (N, ..., I).
    """
    low: list[Any] = []
    rest: list[Any] = []
    for group in acts:
        (low if all(delta.sums for delta, _ in group[0]) else rest).append(group)
    few = torch.is_grad_enabled() and (len(low) < TRAIN_FROM or x.dim() != 3)
    if _form == "loop" or few:
        return [], list(acts)
    found: dict[tuple[int, float], tuple[Delta, float, list[Tensor]]] = {}
    for group_acts, rows in low:
        for delta, weight in group_acts:
            found.setdefault((id(delta), weight), (delta, weight, []))[2].append(rows)
    return [(delta, weight, _cat(rows)) for delta, weight, rows in found.values()], rest


class Table:
    """A and B of the deltas of one site for the rows of one route, and what has to hold for them to be right."""

    def __init__(self, parts: list[Part], x: Tensor, plans: dict[Any, _Plan]) -> None:
        self.kind = x.dtype, x.device, x.shape[0]
        self.changes = _changes
        self.deltas = [delta for delta, _, _ in parts]
        self.who = tuple(id(rows) for _, _, rows in parts)
        self.places = [(store, key) for delta in self.deltas for store, key in _tensors(delta)]
        now = [store[key] for store, key in self.places]
        self.keeps = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or any(map(_training, self.deltas)))
        # Who trains may write where no version is counted, as fused optimizers do.
        self.keeps = self.keeps and not any(tensor.requires_grad or tensor.is_inference() for tensor in now)
        self.now: list[Tensor] = now if self.keeps else []
        self.state = (list(map(_version, now)), list(map(_pointer, now))) if self.keeps else ([], [])
        self.held = [tensor.detach() for tensor in self.now]  # so that no other tensor gets their addresses
        pairs = [(*_pair(delta, weight), rows) for delta, weight, rows in parts]
        self.sums: list[_Grouped | _Stacked] = []
        for some in _by_rank(pairs, x.dtype):
            aligned = all(size % ALIGNED == 0 for size in (some[0][0].shape[1], len(some[0][1])))
            take_grouped = _form == "grouped" and aligned
            self.sums.append(_Grouped(some, x) if take_grouped else _Stacked(some, x, plans))

    def fits(self, x: Tensor) -> bool:
        """Whether it is for an input like x, and no adapter came or went, and no dial was set since."""
        same = self.changes == _changes and self.kind == (x.dtype, x.device, x.shape[0])
        return same and not torch.is_grad_enabled()

    def holds(self, whole: bool) -> bool:
        """Whether nobody has written to the tensors that it comes from; `whole`: nor replaced or moved one."""
        if list(map(_version, self.now)) != self.state[0]:
            return False
        if not whole:
            return True
        now = [store[key] for store, key in self.places]
        same = all(map(is_, now, self.now)) and list(map(_pointer, now)) == self.state[1]
        return same and not any(map(_training, self.deltas))

    def add(self, x: Tensor, y: Tensor, own: bool) -> Tensor:
        """y with every row's change added.

        Args:
            x: the input (N, ..., I).
            y: the output (N, ..., O).
            own: whether y may be written into.
        """
        if not (own and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        x_NTI, y_NTO = _three(x), _three(y)
        for each in self.sums:
            y_NTO = each.add(x_NTI, y_NTO)
        return y_NTO.view(y.shape)


class Tables(dict[str, Table]):
    """The kept tables of one route, by the path of their site. A copy of a model starts without."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[Any, _Plan] = {}
        self.looked: set[Any] = set()
        self.goes_on = False

    def __deepcopy__(self, memo: Any) -> Tables:
        return Tables()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tables, ()

    def begin(self, goes_on: bool) -> None:
        """A forward begins; `goes_on`: from a cache, so that one site for each set of adapters is looked at closely."""
        self.goes_on = goes_on
        self.looked.clear()

    def find(self, path: str, x: Tensor) -> Table | None:
        """The table of a site, if it still holds."""
        table = self.get(path)
        if table is None or torch.compiler.is_compiling():
            return None
        if not table.fits(x):
            del self[path]
            return None
        if self.goes_on and table.who in self.looked:
            return table
        self.looked.add(table.who)
        if table.holds(whole=not self.goes_on):
            return table
        self.clear()
        return None

    def make(self, path: str, parts: list[Part], x: Tensor) -> Table:
        """A new table, kept where it may be."""
        table = Table(parts, x, {} if torch.compiler.is_compiling() else self.plans)
        if table.keeps:
            self[path] = table
        return table


class _Plan:
    """Rows cut into pieces of one length, each of which has one of the deltas."""

    def __init__(self, rows: list[Tensor], size: int) -> None:
        self.all = rows
        device = rows[0].device
        self.length = length = _length(tuple(len(each) for each in rows))
        pieces = [(k, piece) for k, each in enumerate(rows) for piece in each.split(length)]
        self.rows = torch.cat(rows)
        self.gather = torch.cat([F.pad(piece, (0, length - len(piece))) for _, piece in pieces])
        """Where each place's input is from; that of padding is read for nothing."""
        self.owner = torch.tensor([k for k, _ in pieces], device=device) if len(pieces) > len(rows) else None
        self.real: Tensor | None = None
        """The places that are not padding, None if all are."""
        if len(self.gather) > len(self.rows):
            spans = [torch.arange(length * i, length * i + len(piece)) for i, (_, piece) in enumerate(pieces)]
            self.real = torch.cat(spans).to(device)
        fits = len(self.rows) == size and self.real is None and not torch.compiler.is_compiling()
        self.whole = fits and torch.equal(self.rows, torch.arange(size, device=device))
        """Whether the places are the rows of the batch, one after the other."""
        every = fits and not self.whole and torch.equal(self.rows.sort().values, torch.arange(size, device=device))
        self.back = self.rows.argsort() if every else None
        """Each row's place, if each row of the batch has just one; else None."""


def _plan(rows: list[Tensor], size: int, plans: dict[Any, _Plan]) -> _Plan:
    key = tuple(map(id, rows))  # the plan holds them, so nobody else gets their ids
    if key not in plans:
        if len(plans) >= PLANS:
            plans.clear()
        plans[key] = _Plan(rows, size)
    return plans[key]


class _Stacked:
    def __init__(self, pairs: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, plans: dict[Any, _Plan]) -> None:
        self.plan = plan = _plan([rows for _, _, rows in pairs], x.shape[0], plans)
        alone = x.device.type == "cpu" and x.dtype in LOW and plan.length == 1 and not torch.is_grad_enabled()
        dtype = torch.float32 if alone else x.dtype
        A_KRI, B_KOR = _padded(pairs, dtype)
        if plan.owner is not None:
            A_KRI, B_KOR = A_KRI[plan.owner], B_KOR[plan.owner]
        # In these layouts CPUs read A and B at memory speed for one row, in no other.
        self.A_PIR, self.B_PRO = A_KRI.transpose(1, 2).contiguous(), B_KOR.transpose(1, 2)
        self.low: tuple[Tensor, Tensor] | None = None
        """Both in the dtype of the activations, for more than one token a row, where they are kept in fp32."""

    def factors(self, dtype: torch.dtype, many: int) -> tuple[Tensor, Tensor]:
        """A (P, I, R) and B (P, R, O) for pieces of so many tokens of this dtype."""
        if many == 1 or self.A_PIR.dtype == dtype:
            return self.A_PIR, self.B_PRO
        if self.low is None:
            self.low = self.A_PIR.to(dtype), self.B_PRO.to(dtype)
        return self.low

    def add(self, x_NTI: Tensor, y_NTO: Tensor) -> Tensor:
        plan, many = self.plan, self.plan.length * x_NTI.shape[1]
        A_PIR, B_PRO = self.factors(x_NTI.dtype, many)
        picked = x_NTI if plan.whole else x_NTI.index_select(0, plan.gather)
        x_PMI = picked.reshape(len(A_PIR), many, -1).to(A_PIR.dtype)
        h_PMR = torch.bmm(x_PMI, A_PIR)
        plain = h_PMR.dtype == B_PRO.dtype == y_NTO.dtype
        if plan.whole and plain:
            y_NTO.view(len(A_PIR), many, -1).baddbmm_(h_PMR, B_PRO)
            return y_NTO
        if plan.back is not None and plain and y_NTO.dtype in LOW and many > 1:
            sorted_NTO = y_NTO.index_select(0, plan.gather)
            sorted_NTO.view(len(A_PIR), many, -1).baddbmm_(h_PMR, B_PRO)
            return sorted_NTO.index_select(0, plan.back)
        up = torch.bmm(h_PMR, B_PRO).to(y_NTO.dtype)
        up_NTO = up.view(-1, *y_NTO.shape[1:])
        if plan.whole:
            y_NTO += up_NTO
        else:
            y_NTO.index_add_(0, plan.rows, up_NTO if plan.real is None else up_NTO.index_select(0, plan.real))
        return y_NTO


class _Grouped:
    def __init__(self, pairs: list[tuple[Tensor, Tensor, Tensor]], x: Tensor) -> None:
        self.rows = torch.cat([rows for _, _, rows in pairs])
        ends = list(itertools.accumulate(len(rows) for _, _, rows in pairs))
        self.ends_K = torch.tensor(ends, dtype=torch.int32, device=x.device)
        A_KRI, B_KOR = _padded(pairs, x.dtype, ALIGNED)
        self.A_KIR, self.B_KRO = A_KRI.transpose(1, 2).contiguous(), B_KOR.transpose(1, 2).contiguous()

    def add(self, x_NTI: Tensor, y_NTO: Tensor) -> Tensor:
        ends = self.ends_K * x_NTI.shape[1]
        x = x_NTI.index_select(0, self.rows).flatten(0, 1)
        up = F.grouped_mm(F.grouped_mm(x, self.A_KIR, offs=ends), self.B_KRO, offs=ends)
        return y_NTO.index_add_(0, self.rows, up.view(-1, *y_NTO.shape[1:]).to(y_NTO.dtype))


def _length(counts: tuple[int, ...]) -> int:
    """How long the pieces are: few pieces, each of which reads its own A and B, and few padded rows."""
    lengths = sorted({1, 2, 4, 8, 16, 32, *counts})[:64]
    return min(lengths, key=lambda m: sum(-(-count // m) for count in counts) * (m + PIECE))


def _by_rank(
    pairs: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """The pairs together, or by the next power of two of their ranks where padding would waste much."""
    ranks = [len(A) for A, _, _ in pairs]
    long = _length(tuple(len(rows) for _, _, rows in pairs)) > 1
    if max(ranks) * len(ranks) <= (WASTE_LOW if long and dtype in LOW else WASTE) * sum(ranks):
        return [pairs]
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for rank, pair in zip(ranks, pairs, strict=True):
        found.setdefault((rank - 1).bit_length(), []).append(pair)
    return list(found.values())


def _padded(pairs: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """A (K, R, I) and B (K, O, R) of ranks that are padded with zeros to the highest, or the next multiple."""
    width = -(-max(len(A) for A, _, _ in pairs) // multiple) * multiple
    A_KRI = torch.stack([F.pad(A, (0, 0, 0, width - len(A))) if len(A) < width else A for A, _, _ in pairs])
    B_KOR = torch.stack([F.pad(B, (0, width - B.shape[1])) if B.shape[1] < width else B for _, B, _ in pairs])
    return A_KRI.to(dtype), B_KOR.to(dtype)


def _pair(delta: Delta, weight: float) -> tuple[Tensor, Tensor]:
    factors = delta.factors()
    assert factors is not None, type(delta)
    A, B = factors
    return A, B if weight == 1.0 else weight * B


def _tensors(delta: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a delta, and what its sites share, keep their tensors."""
    shared = getattr(delta, "shared", None)
    for module in (*delta.modules(), *(shared.modules() if shared is not None else ())):
        for store in (module._parameters, module._buffers):
            yield from ((store, key) for key, tensor in store.items() if tensor is not None)


def _cat(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _three(tensor: Tensor) -> Tensor:
    return (
        tensor if tensor.dim() == 3 else tensor.view(len(tensor), 1, -1) if tensor.dim() == 2 else tensor.flatten(1, -2)
    )
