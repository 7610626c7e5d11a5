"""Attention within each text of a packed row: no T x T mask is made, and no product with other texts.

transformers finds the texts of one unpadded row by positions that do not go up by one, and makes a block-diagonal mask
(T, T) of them. Here the same positions are read when a forward begins, the mask functions hand on `Segments` in the
place of that mask, and attention runs once for each text: by PyTorch's variable-length kernel on a GPU in 16 bits where
nothing but causality is asked, else text by text. `Segments` travel with the mask, so what a checkpoint computes again
finds them again.

The mask stays where something wants it: under `torch.compile`, with `output_attentions`, with a cache, with an
`attention_mask`, with several rows, and where a route cuts texts otherwise than their positions do.

Shape legend: H query heads, K key/value heads, T tokens of the row, t tokens of one text, D head size, n texts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.backends import cuda
from transformers.masking_utils import and_masks, packed_sequence_mask_function

if TYPE_CHECKING:
    from graft.attend import AttentionCall, Result

WIDEST = 256
"""The largest head that the variable-length kernel takes."""
MULTIPLE = 8
"""Of its size: PyTorch pads heads in `scaled_dot_product_attention` alone."""


@dataclass(frozen=True, eq=False)
class Segments:
    """What stands in the place of a mask where one row holds several texts.

    Args:
        lengths: tokens of each text.
        masks: (1, 1, t, t) of each text; None: causal or not, as the module is.
        whole: makes the (1, 1, T, T) mask of the row.
        fronts: rows in front of the keys and values of each text, pairs of (P, K, D) or (n, P, K, D).
    """

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    whole: Callable[[], Tensor]
    fronts: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def starts(self) -> list[int]:
        """The place of the first token of each text."""
        return [0, *itertools.accumulate(self.lengths[:-1])]

    def behind(self, key_PKD: Tensor, value_PKD: Tensor) -> Segments:
        """The same texts with more rows in front of each."""
        return dataclasses.replace(self, fronts=(*self.fronts, (key_PKD, value_PKD)))


class _Now(threading.local):
    lengths: tuple[int, ...] | None = None


NOW = _Now()
"""The texts of the forward that runs in this thread, between its beginning and its masks."""


def end() -> None:
    """Forget the texts of the forward."""
    if not torch.compiler.is_compiling():
        NOW.lengths = None


def lengths_of(config: Any, inputs: dict[str, Any]) -> tuple[int, ...] | None:
    """The lengths of the texts of a packed forward, found as transformers finds them; None for any other forward."""
    position_ids_BT = inputs.get("position_ids")
    if not isinstance(position_ids_BT, Tensor) or position_ids_BT.dim() != 2 or len(position_ids_BT) != 1:
        return None
    if inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    for key in ("use_cache", "output_attentions"):
        asked = inputs.get(key)
        if getattr(config, key, False) if asked is None else asked:
            return None
    starts = (position_ids_BT[0].diff() != 1).nonzero()[:, 0].tolist()
    edges = [0, *(start + 1 for start in starts), position_ids_BT.shape[1]]
    return tuple(b - a for a, b in itertools.pairwise(edges)) if starts else None


# ------------------------------------------------------------------------------------------------- masks


def masks(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function of an attention: `Segments` where texts were noted, else what `real` makes."""

    def make(**asked: Any) -> Any:
        lengths = None if torch.compiler.is_compiling() else NOW.lengths
        if lengths is None or not _fits(asked, sum(lengths)):
            return real(**asked)
        return _segments(kind, real, lengths, asked)

    return make


def _fits(asked: dict[str, Any], tokens: int) -> bool:
    """Whether the mask is that of one whole row over itself."""
    sizes = (asked["batch_size"], asked["q_length"], asked["kv_length"])
    whole = not asked.get("q_offset") and not asked.get("kv_offset") and asked.get("attention_mask") is None
    return sizes == (1, tokens, tokens) and whole


def _segments(kind: str, real: Callable[..., Any], lengths: tuple[int, ...], asked: dict[str, Any]) -> Segments:
    blocks: list[Tensor | None] = []
    start = 0
    for length in lengths:
        place = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        blocks.append(real(**asked | place))
        start += length
    if kind == "sdpa":
        blocks = _without_causal(blocks)

    def whole() -> Tensor:
        texts = torch.arange(len(lengths), device=asked["device"])
        owner_1T = texts.repeat_interleave(torch.tensor(lengths, device=asked["device"]))[None]
        both = and_masks(asked["mask_function"], packed_sequence_mask_function(owner_1T))
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return real(**asked | skips | {"mask_function": both})

    return Segments(lengths, tuple(blocks), whole)


def _without_causal(blocks: list[Tensor | None]) -> list[Tensor | None]:
    """None for masks that are causal and nothing else: a window no shorter than the text, no window at all."""
    given = [(number, block) for number, block in enumerate(blocks) if block is not None]
    if not given:
        return blocks
    plain = torch.stack([(block == torch.ones_like(block).tril()).all() for _, block in given]).tolist()
    dropped = {number for (number, _), same in zip(given, plain, strict=True) if same}
    return [None if number in dropped else block for number, block in enumerate(blocks)]


# ------------------------------------------------------------------------------------------------- attention


def each(
    call: AttentionCall,
    run: Callable[[AttentionCall], Result],
    prepend: Callable[[AttentionCall, Tensor, Tensor], AttentionCall],
) -> Result:
    """Run each text of a packed call as a row of its own; their outputs (1, T, H, D) stand end to end.

    Args:
        call: its mask is `Segments`.
        run: attention of one text.
        prepend: puts rows in front of a call's keys and values.
    """
    segments: Any = call.mask
    sizes = list(segments.lengths)
    rows = zip(*(x.split(sizes, 2) for x in (call.query_BHTD, call.key_BKSD, call.value_BKSD)), strict=True)
    outs = []
    for number, ((query, key, value), start) in enumerate(zip(rows, segments.starts, strict=True)):
        places = torch.arange(start, start + sizes[number], device=query.device) if call.texts is not None else None
        one = dataclasses.replace(
            call,
            query_BHTD=query,
            key_BKSD=key,
            value_BKSD=value,
            mask=segments.masks[number],
            front=0,
            input=None if call.input is None else call.input[:, start : start + sizes[number]],
            texts=None if call.texts is None or places is None else call.texts.pick(places, 1),
        )
        for key_PKD, value_PKD in segments.fronts:
            one = prepend(one, _of(key_PKD, number), _of(value_PKD, number))
        outs.append(run(one)[0])
    return torch.cat(outs, 1), None


def select(call: AttentionCall, numbers: Sequence[int]) -> tuple[AttentionCall, Tensor]:
    """The call for some of its texts, a packed row of its own; and their tokens' places."""
    segments: Any = call.mask
    starts, lengths = segments.starts, segments.lengths
    device = call.query_BHTD.device
    index = torch.cat([torch.arange(starts[i], starts[i] + lengths[i], device=device) for i in numbers])
    mine = Segments(
        tuple(lengths[i] for i in numbers),
        tuple(segments.masks[i] for i in numbers),
        lambda: segments.whole().index_select(2, index).index_select(3, index),
    )
    part = dataclasses.replace(
        call,
        query_BHTD=call.query_BHTD.index_select(2, index),
        key_BKSD=call.key_BKSD.index_select(2, index),
        value_BKSD=call.value_BKSD.index_select(2, index),
        mask=mine,
        input=None if call.input is None else call.input.index_select(1, index),
        texts=None if call.texts is None else call.texts.pick(index, 1),
    )
    return part, index


def takes_varlen(call: AttentionCall) -> bool:
    """Whether PyTorch's variable-length kernel computes this call: nothing but causality, on a GPU, in 16 bits."""
    segments: Any = call.mask
    query, value = call.query_BHTD, call.value_BKSD
    plain = not segments.fronts and all(mask is None for mask in segments.masks)
    asked = call.options.get("dropout") or call.options.get("softcap") is not None
    sizes = query.shape[-1] == value.shape[-1] <= WIDEST and query.shape[-1] % MULTIPLE == 0
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return plain and not asked and sizes and fits and kernel() is not None and _flash(call)


def _flash(call: AttentionCall) -> bool:
    """Whether flash attention, which that kernel is, was built and runs on this GPU with these heads (sm80 on)."""
    query, key, value = call.query_BHTD, call.key_BKSD, call.value_BKSD
    params = cuda.SDPAParams(query, key, value, None, 0.0, False, query.shape[1] != key.shape[1])
    return cuda.can_use_flash_attention(params)


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, where this PyTorch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        return None
    return varlen_attn


def varlen(call: AttentionCall) -> Result:
    """All texts in one call of the variable-length kernel: (1, T, H, D)."""
    segments: Any = call.mask
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    edges = torch.tensor([*segments.starts, sum(segments.lengths)], dtype=torch.int32, device=call.query_BHTD.device)
    query_THD, key_TKD, value_TKD = (
        x[0].transpose(0, 1).contiguous() for x in (call.query_BHTD, call.key_BKSD, call.value_BKSD)
    )
    longest, run = max(segments.lengths), kernel()
    assert run is not None
    out_THD = run(
        query_THD,
        key_TKD,
        value_TKD,
        edges,
        edges,
        longest,
        longest,
        scale=call.options.get("scaling"),
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
    )
    return out_THD[None], None


def _of(rows_PKD: Tensor, number: int) -> Tensor:
    """The rows of one text, if each has its own."""
    own = rows_PKD.dim() == 4 and len(rows_PKD) > 1
    return rows_PKD[number : number + 1] if own else rows_PKD
