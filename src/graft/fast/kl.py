"""KL(p || q) a token between two forwards at the labelled tokens of one batch, a chunk of logits at a time.

    KL = sum_v p_v (log p_v - log q_v)      in nats, p the reference (the base), q what trains

Shape legend: N labelled tokens, C those of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft.errors import RouteError
from graft.fast.cross_entropy import chunk_rows
from graft.fast.loss import Outputs


def chunks(count: int, vocabulary: int, sides: int) -> Iterator[slice]:
    """Slices of `count` tokens, so that the logits of all `sides` at once are as large as the loss's own chunks."""
    size = max(1, chunk_rows(vocabulary) // sides)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def divergence(p_CV: Tensor, q_CV: Tensor) -> Tensor:
    """KL(p || q) of each token (C) from log-probabilities."""
    return F.kl_div(q_CV, p_CV, reduction="none", log_target=True).sum(-1)


def kl_sum(reference: Outputs, trained: Outputs) -> Tensor:
    """KL(reference || trained) summed over the labelled tokens; gradients go to `trained` alone.

    Raises:
        RouteError: the two are of different tokens.
    """
    if len(reference.target_N) != len(trained.target_N):
        raise RouteError(f"{len(reference.target_N)} labelled tokens against {len(trained.target_N)}; give one batch")

    def part(target_C: Tensor, where: slice) -> Tensor:
        with torch.no_grad():
            p_CV = reference.logits(where).log_softmax(-1)
        return divergence(p_CV, trained.logits(where).log_softmax(-1)).sum()

    total = trained.target_N.new_zeros((), dtype=torch.float32)
    for where in chunks(len(trained.target_N), trained.vocabulary, 2):
        # The device whose random state is kept for the second forward is that of the tensors given.
        total = total + checkpoint(part, trained.target_N[where], where, use_reentrant=False)
    return total
