"""Which text each token of a batch is of, and which tokens are padding: for changes that depend on a text as a whole.

A text is a row of the batch, or a segment of a packed batch. Padding is what the forward's own mask says; in an
encoder-decoder the decoder's mask, or the tokens behind the last label. At a step that goes on from a cache only the
tokens of this step are there.

Shape legend: B rows, T tokens, S tokens with those in the cache, N any leading dimensions, K values.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.errors import RouteError
from graft.ids import IGNORED
from graft.roles import Site
from graft.routes import Route

ENCODED, DECODED, LABELS = "attention_mask", "decoder_attention_mask", "labels"
"""What tells of padding; a model with one stack has the first mask alone."""


@dataclass(frozen=True)
class Texts:
    """The text of each token.

    Args:
        index: (N), from 0 to count - 1; padding has the number of its row too.
        count: the number of texts of the whole batch, of which `index` may have some only.
        real: (N) bool, False at padding; None where there is none.
        packed: whether one row holds several texts.
    """

    index: Tensor
    count: int
    real: Tensor | None = None
    packed: bool = False

    def pick(self, places: Tensor, dim: int = 0) -> Texts:
        """Some places of one dimension."""
        real = None if self.real is None else self.real.index_select(dim, places)
        return dataclasses.replace(self, index=self.index.index_select(dim, places), real=real)

    def means(self, value_NK: Tensor) -> Tensor:
        """The mean over the real tokens of each text, (count, K); 0 for a text that has none here."""
        value_NK, flat_N = value_NK.flatten(0, -2), self.index.flatten()
        ones_N1 = torch.ones_like(value_NK[:, :1])
        if self.real is not None:
            padding_N1 = ~self.real.reshape(-1, 1)
            value_NK, ones_N1 = value_NK.masked_fill(padding_N1, 0), ones_N1.masked_fill(padding_N1, 0)
        sums = value_NK.new_zeros(self.count, value_NK.shape[-1]).index_add(0, flat_N, value_NK)
        sizes = value_NK.new_zeros(self.count, 1).index_add(0, flat_N, ones_N1)
        return sums / sizes.clamp(min=1)

    def mean(self, value_NK: Tensor) -> Tensor:
        """For each token the mean over its own text, in the shape of `value_NK`."""
        return self.means(value_NK)[self.index]


def side(model: nn.Module, site: Site) -> str:
    """The name of the mask that says which tokens of a site's input are padding."""
    reads_encoder = site.stack == "encoder" or site.role in ("cross_attention.key", "cross_attention.value")
    return DECODED if roles.is_encoder_decoder(model) and not reads_encoder else ENCODED


def masks_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward of `module` was given that tells of padding; None where it takes something and got nothing."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: given.get(name) for name in (ENCODED, DECODED, LABELS) if name in names}


def mask_at(masks: dict[str, Any], side: str) -> Any:
    """The mask that `side` names; a decoder's without one says by its labels what is padding."""
    mask, labels = masks.get(side), masks.get(LABELS)
    if mask is not None or side != DECODED or not isinstance(labels, Tensor) or labels.dim() != 2:
        return mask
    # The decoder reads the labels, moved by one: what stands behind the last one is padding.
    return (labels != IGNORED).flip(1).cummax(1)[0].flip(1)


def texts_of(route: Route, mask: Any, batch: int, x_NI: Tensor) -> Texts:
    """The texts of a module's input.

    Args:
        route: the current one.
        mask: (B, S) or None; of a longer one the last T columns count.
        batch: B.
        x_NI: (B, T, I), or (B * T, I) where a model flattens; the index has its shape without the last dimension.

    Raises:
        RouteError: a mask of another kind.
    """
    shape, device = x_NI.shape[:-1], x_NI.device
    if route.lengths is not None:
        lengths = torch.tensor(route.lengths, device=device)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=route.tokens)
        return Texts(owner.view(shape), len(lengths), packed=True)
    tokens = shape.numel() // batch
    index_BT = torch.arange(batch, device=device)[:, None].expand(batch, tokens)
    real = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            told = f"one of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise RouteError(
                f"an adapter in use averages over each text and needs the mask of padding as (rows, tokens), not {told}"
            )
        real = (mask[:, mask.shape[1] - tokens :].to(device) != 0).reshape(shape)
    return Texts(index_BT.reshape(shape), batch, real)
