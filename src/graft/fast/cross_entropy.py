"""The cross-entropy of hidden states under an output head, a chunk of rows at a time: no logits of a batch ever exist.

Shape legend: N rows, C rows of a chunk, D hidden width, R rows of the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graft.fast.devices import autocast, is_cpu
from graft.fast.products import linear

CHUNK_BYTES = 32 << 20
"""The fp32 logits of a chunk. On one core with a vocabulary of 32,000, chunks of 8 MB take 1.2 to 1.3 times as long, of
128 MB 1.05 to 1.4 times."""
BLOCK_BYTES = 2 << 20
"""The fp32 logits that a CPU takes from the product to the gradient at once, so that they stay in its cache. With 384
rows of 32,000 all at once take 2.4 times as long in fp32 and 3.9 times in bf16 (two cores)."""
SUMMED = 8192
"""Rows of a head whose gradients are added at once."""
LEAST_ROWS = 128
"""Of a chunk: each reads the whole head twice. With a vocabulary of 151,936, chunks of 13 rows take twice as long as
these, of 51 rows 1.1 times. Not measured on a GPU."""


@dataclass(frozen=True)
class Finish:
    """What a model makes of its head's output: logits = cap * tanh(scale * (output + bias) / cap).

    Args:
        bias_V: None for none.
        cap: None for no soft cap.
    """

    scale: float = 1.0
    cap: float | None = None
    bias_V: Tensor | None = None

    def __call__(self, output_CV: Tensor) -> Tensor:
        """The logits in fp32 (or wider), by operations that autograd follows."""
        logits_CV = output_CV.to(torch.promote_types(output_CV.dtype, torch.float32))
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V
        logits_CV = logits_CV * self.scale
        return logits_CV if self.cap is None else torch.tanh(logits_CV / self.cap) * self.cap


def chunk_rows(vocabulary: int) -> int:
    """How many rows a chunk has."""
    return max(LEAST_ROWS, CHUNK_BYTES // (4 * vocabulary))


def losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    finish: Finish,
    smoothing: float = 0.0,
    *,
    summed: bool = False,
) -> Tensor:
    """The loss of each row (N), or their sum (), in fp32 whatever the dtype of the products.

    The gradients are made in the forward. Of rows: of each its own, scaled in the backward by what comes from above. Of
    the head: of the sum in the forward; of single losses in the backward, which makes the logits again.

    Args:
        hidden_ND: what enters the head.
        weight_VD, bias_V: the head's, of the same dtype.
        target_N: token ids.
        finish: what the model makes of the head's output; its own bias does not train.
        smoothing: the label smoothing, as `torch.nn.functional.cross_entropy` has it.
    """
    if finish.bias_V is not None:
        bias_V = finish.bias_V if bias_V is None else bias_V + finish.bias_V
    settings = (finish.scale, finish.cap, smoothing, summed, torch.is_grad_enabled())
    return _Losses.apply(hidden_ND, weight_VD, bias_V, target_N, settings)


def losses_through(
    run: Callable[[Tensor, slice], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    vocabulary: int,
    finish: Finish,
    smoothing: float = 0.0,
    checkpoint: Callable[..., Any] | None = None,
) -> Tensor:
    """The loss of each row (N), in fp32, under a head of any kind.

    Args:
        run: from hidden rows (C, D), and where they are among the N, to the head's output (C, V).
        checkpoint: as `torch.utils.checkpoint.checkpoint`; None where no gradient is wanted.
    """

    def part(hidden_CD: Tensor, target_C: Tensor, where: slice) -> Tensor:
        return F.cross_entropy(finish(run(hidden_CD, where)), target_C, reduction="none", label_smoothing=smoothing)

    found, size = [], chunk_rows(vocabulary)
    for first in range(0, len(target_N), size):
        where = slice(first, min(first + size, len(target_N)))
        given = hidden_ND[where], target_N[where], where
        found.append(part(*given) if checkpoint is None else checkpoint(part, *given, use_reentrant=False))
    return torch.cat(found)


class _Losses(torch.autograd.Function):
    """See `losses`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, settings: Any
    ) -> Tensor:
        *rule, summed, grad = settings
        rows, weight, bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        now = (weight and summed, bias and summed)
        sums = _Sums(weight_VD, bias_V, *now)
        rows_ND = torch.empty_like(hidden_ND) if rows else None
        losses_N = hidden_ND.new_empty(len(target_N), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        with autocast(hidden_ND.device, None):
            least = hidden_ND.shape[1] if now[0] else 0
            parts = _chunks(hidden_ND, weight_VD, bias_V, target_N, *rule, grad=rows or any(now), least=least)
            for where, loss_C, grad_CV in parts:
                losses_N[where] = loss_C
                if grad_CV is None:
                    continue
                if rows_ND is not None:
                    rows_ND[where] = linear(grad_CV, weight_VD.t())
                sums.add(grad_CV, hidden_ND[where])
        again = (hidden_ND, weight_VD, bias_V, target_N) if (weight or bias) and not summed else (None,) * 4
        ctx.save_for_backward(rows_ND, sums.weight_VD, sums.bias_V, *again)
        ctx.summed, ctx.rule = summed, rule
        return losses_N.sum() if summed else losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        rows_ND, weight, bias, hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        rows = None
        if rows_ND is not None:
            rows = (rows_ND * (above if ctx.summed else above[:, None])).to(rows_ND.dtype)
        if ctx.summed:
            return rows, None if weight is None else weight * above, None if bias is None else bias * above, None, None
        if hidden_ND is not None:
            sums = _Sums(weight_VD, bias_V, *ctx.needs_input_grad[1:3])
            with autocast(hidden_ND.device, None):
                for where, _, grad_CV in _chunks(hidden_ND, weight_VD, bias_V, target_N, *ctx.rule, grad=True):
                    assert grad_CV is not None
                    sums.add(grad_CV.mul_(above[where, None]), hidden_ND[where])
            weight, bias = sums.weight_VD, sums.bias_V
        return rows, weight, bias, None, None


class _Sums:
    """The gradients of a head, summed over chunks in fp32 and handed out in its dtype."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, of_weight: bool, of_bias: bool) -> None:
        self.like = weight_VD if of_weight else None
        self.weight: Tensor | None = None
        self.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        self.wide = torch.promote_types(weight_VD.dtype, torch.float32)
        self.bias = torch.zeros_like(bias_V, dtype=self.wide) if of_bias and bias_V is not None else None

    def add(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.like is not None and self.weight is None:
            self.weight = grad_CV.t() @ hidden_CD  # of one chunk that is all: no sum in fp32
        elif self.weight is not None:
            self.weight = self.weight.to(self.wide)
            if self.wide == grad_CV.dtype:
                self.weight.addmm_(grad_CV.t(), hidden_CD)
            else:
                more_VD = grad_CV.t() @ hidden_CD
                for sum_RD, part_RD in zip(self.weight.split(SUMMED), more_VD.split(SUMMED), strict=True):
                    sum_RD += part_RD  # at once, a CPU would copy the whole to fp32 first
        if self.bias is not None:
            self.bias += grad_CV.sum(0, dtype=self.bias.dtype)

    @property
    def weight_VD(self) -> Tensor | None:
        if self.weight is None:
            return None if self.like is None else torch.zeros_like(self.like)
        return self.weight.to(self.dtypes[0])

    @property
    def bias_V(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(self.dtypes[1])


def _chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    scale: float,
    cap: float | None,
    smoothing: float,
    *,
    grad: bool,
    least: int = 0,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Of each chunk where it is, its losses (C), and the gradient of their sum by the head's output (C, V).

    The gradient stands in a buffer that the next chunk takes.
    """
    vocabulary = weight_VD.shape[0]
    # The gradient of a head that trains is as large as the logits of D rows, and each chunk reads and writes it.
    size = min(max(chunk_rows(vocabulary), least), len(target_N))
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    narrow = hidden_ND.dtype != wide
    few = min(size, max(1, BLOCK_BYTES // (4 * vocabulary))) if is_cpu(hidden_ND.device) else size
    logits = hidden_ND.new_empty(few, vocabulary, dtype=wide) if narrow else None
    logp = hidden_ND.new_empty(few if narrow else size, vocabulary, dtype=wide)
    for first in range(0, len(target_N), max(size, 1)):
        where = slice(first, min(first + size, len(target_N)))
        target_C1 = target_N[where, None]
        count = len(target_C1)
        output = linear(hidden_ND[where], weight_VD)
        loss_C = logp.new_empty(count)
        for top in range(0, count, few):
            block = slice(top, min(top + few, count))
            mine = block if logits is None else slice(block.stop - block.start)
            logits_CV = output[block] if logits is None else logits[mine].copy_(output[block])
            finish = Finish(scale, cap, bias_V)
            loss_C[block] = _softmax(logits_CV, logp[mine], target_C1[block], finish, smoothing, grad=grad)
            if narrow and grad:
                output[block].copy_(logp[mine])
        yield where, loss_C, (output if narrow else logp)[:count] if grad else None


def _softmax(
    logits_CV: Tensor, logp_CV: Tensor, target_C1: Tensor, finish: Finish, smoothing: float, *, grad: bool
) -> Tensor:
    """The losses (C) of a head's output, which is written over; the gradient of their sum then stands in `logp_CV`."""
    if finish.bias_V is not None:
        logits_CV += finish.bias_V
    if finish.scale != 1.0:
        logits_CV *= finish.scale
    if finish.cap is not None:
        logits_CV.div_(finish.cap).tanh_().mul_(finish.cap)
    torch.log_softmax(logits_CV, -1, out=logp_CV)
    loss_C = -logp_CV.gather(1, target_C1)[:, 0]
    if smoothing:
        loss_C = (1 - smoothing) * loss_C - smoothing * logp_CV.mean(-1)
    if not grad:
        return loss_C
    grad_CV = logp_CV.exp_()
    if smoothing:
        grad_CV -= smoothing / logits_CV.shape[1]
    grad_CV.scatter_add_(1, target_C1, grad_CV.new_full((len(target_C1), 1), smoothing - 1.0))
    if finish.cap is not None:
        grad_CV *= logits_CV.div_(finish.cap).square_().neg_().add_(1.0)
    if finish.scale != 1.0:
        grad_CV *= finish.scale
    return loss_C
