"""Slot tokens: where soft prompts stand in the data, and how a batch gets them.

Lengths, positions, masks and `generate()` are right because the data is right: a slot is an ordinary valid token whose
embedding the embedding site overwrites.

Shape legend: B rows, T tokens, P slots.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import RouteError
from graft.ids import IGNORED, SLOT
from graft.routes import Entry, Route

REMEMBERED = 512
"""Prepared batches whose slots are known: a loader may prepare many before the first is used."""


@dataclass(frozen=True)
class Prepared:
    """The ids of one prepared batch, its slot mask, and how many slots each row has."""

    ids_BT: Tensor
    mask_BT: Tensor


class Slots:
    """Finds the slots of a batch again by its ids, so that nothing but ids has to travel to the model."""

    def __init__(self) -> None:
        self.known: deque[Prepared] = deque(maxlen=REMEMBERED)
        self.active: Tensor | None = None

    def note(self, ids_BT: Tensor, mask_BT: Tensor) -> None:
        """Remember where the slots of these ids are; both (B, T)."""
        self.known.appendleft(Prepared(ids_BT.detach().clone(), mask_BT.clone()))

    @torch.compiler.disable  # which batch it is depends on the ids: a compiled graph would guess
    def find(self, ids_BT: Tensor) -> Tensor | None:
        """The (B, T) slot mask of these ids, or None if they were never prepared.

        Rows may be repeated consecutively (beams), and columns may have been appended (generation without a cache).
        """
        self.active = None
        if ids_BT.dim() != 2:
            return None
        for prepared in self.known:
            mask_BT = _fit(prepared, ids_BT)
            if mask_BT is not None:
                self.active = mask_BT
                return mask_BT
        return None


def _fit(prepared: Prepared, ids_BT: Tensor) -> Tensor | None:
    rows, length = prepared.ids_BT.shape
    if ids_BT.shape[1] < length or ids_BT.shape[0] % rows:
        return None
    times = ids_BT.shape[0] // rows
    device = ids_BT.device
    if ids_BT.is_meta or not torch.equal(prepared.ids_BT.to(device).repeat_interleave(times, 0), ids_BT[:, :length]):
        return None
    mask = prepared.mask_BT.to(device).repeat_interleave(times, 0)
    return torch.nn.functional.pad(mask, (0, ids_BT.shape[1] - length))


def marked(batch: Mapping[str, Any]) -> bool:
    """Whether a batch says itself where its slots are, by the id `SLOT`."""
    ids = batch.get("input_ids")
    return isinstance(ids, Tensor) and not ids.is_floating_point() and not ids.is_meta and bool((ids == SLOT).any())


def refuse_marked(ids_BT: Tensor | None) -> None:
    """Raise RouteError for ids that still mark pseudo-tokens: no embedding has a row for them."""
    if marked({"input_ids": ids_BT}):
        raise RouteError(
            f"input_ids holds pseudo-tokens (id {SLOT}) as they are in the data; call graft.prepare(model, batch) first"
        )


def add_slots(
    batch: dict[str, Any],
    counts: Sequence[int | None],
    *,
    slot_id: int,
    pad_id: int,
    side: str,
    positions: bool,
    keep_labels: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """A new batch with `counts[b]` slots in row b, and the (B, T) slot mask.

    They stand where the row has the id `SLOT`, and in front of its first real token if it has none.

    Args:
        batch: `input_ids` (B, T), and if present `attention_mask`, `labels`, `token_type_ids`, (B, T) each.
        counts: for each row; None for a row of the base, which loses its pseudo-tokens.
        side: "left" or "right", where the shorter rows are padded.
        positions: whether to add `position_ids`, counted over real tokens.
        keep_labels: leave `labels` as they are (an encoder-decoder's or a classifier's).

    Raises:
        RouteError: a row whose pseudo-tokens are not as many as its slots, or whose mask has a gap.
    """
    ids_BT = batch["input_ids"]
    mask_BT = batch.get("attention_mask")
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    rows = _runs(ids_BT, mask_BT, counts)
    width = max(len(order) for _, _, order in rows)
    fills = {"input_ids": pad_id, "labels": IGNORED}
    new = {key: value for key, value in batch.items() if key not in ("attention_mask", "position_ids")}
    moved = {
        key: value.new_full((len(rows), width), fills.get(key, 0))
        for key, value in batch.items()
        if _per_token(key, value, ids_BT) and not (keep_labels and key == "labels")
    }
    new_mask_BT = mask_BT.new_zeros((len(rows), width))
    slots_BT = torch.zeros((len(rows), width), dtype=torch.bool, device=ids_BT.device)
    fills["input_ids"] = slot_id
    for b, (start, stop, order) in enumerate(rows):
        first = width - len(order) if side == "left" else 0
        place, old = slice(first, first + len(order)), order.clamp(min=0) + start
        inserted, slots = order < 0, (order < 0) | (ids_BT[b, old] == SLOT)
        new_mask_BT[b, place], slots_BT[b, place] = 1, slots
        for key, value in moved.items():
            where = slots if key in fills else inserted
            value[b, place] = batch[key][b, old].masked_fill(where, fills.get(key, 0))
        for key in ("start_positions", "end_positions"):
            if isinstance(new.get(key), Tensor):
                new[key] = new[key].clone()
                asked = int(new[key][b]) - start
                new[key][b] = first + int((order < asked).sum()) + max(asked - (stop - start), 0)
    new |= moved | {"attention_mask": new_mask_BT}
    if positions:
        new["position_ids"] = (new_mask_BT.cumsum(-1) - 1).clamp(min=0)
    return new, slots_BT


def add_segment_slots(
    batch: dict[str, Any], segments: Sequence[tuple[Any, int]], counts: Sequence[int | None], *, slot_id: int
) -> tuple[dict[str, Any], Tensor]:
    """A packed batch with `counts[i]` slots in segment i, as `add_slots` places them, and the (1, T) slot mask.

    Args:
        batch: `input_ids` (1, T), and if present `labels` (1, T). Positions restart at each segment.
        segments: (entry, length) of each run of tokens; the new batch has them with their new lengths.
        counts: for each segment; None for one of the base, which loses its pseudo-tokens.
    """
    lengths = [length for _, length in segments]
    if batch["input_ids"].shape != (1, sum(lengths)):
        raise RouteError(f"the segments have {sum(lengths)} tokens, input_ids {tuple(batch['input_ids'].shape)}")
    runs = batch["input_ids"][0].split(lengths)
    orders = [_order(run, count, f"segment {i + 1}") for i, (run, count) in enumerate(zip(runs, counts, strict=True))]
    sizes = [len(order) for order in orders]
    new = {**batch, "segments": [(entry, size) for (entry, _), size in zip(segments, sizes, strict=True)]}
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    old = torch.cat([order.clamp(min=0) + start for order, start in zip(orders, starts, strict=True)])
    slots_T = (torch.cat(orders) < 0) | (batch["input_ids"][0, old] == SLOT)
    fills = {"input_ids": slot_id, "labels": IGNORED}
    for key in fills.keys() & batch.keys():
        new[key] = batch[key][:, old].masked_fill(slots_T, fills[key])
    device = batch["input_ids"].device
    new["position_ids"] = torch.cat([torch.arange(size, device=device) for size in sizes])[None]
    return new, slots_T[None]


def refuse_unseen(batch: dict[str, Any], slots_BT: Tensor) -> None:
    """Raise RouteError for a slot behind the last label of its row or segment: no decoder sees it there.

    Args:
        batch: a decoder's, with its slots; `labels` are (B, T) if they are per token.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != slots_BT.shape:
        return
    sizes = [size for _, size in batch["segments"]] if "segments" in batch else [1] * len(slots_BT)
    what = "segment" if "segments" in batch else "row"
    axis = 1 if "segments" in batch else 0
    pairs = zip(slots_BT.split(sizes, axis), labels.split(sizes, axis), strict=True)
    for number, (slots, trained) in enumerate(pairs, start=1):
        last_slot, last_label = (found.flatten().nonzero().flatten()[-1:] for found in (slots, trained != IGNORED))
        if len(last_slot) and len(last_label) and last_slot > last_label:
            raise RouteError(
                f"{what} {number} has a pseudo-token behind its last label; a decoder cannot see it there, put it in "
                "front of the answer"
            )


def _runs(ids_BT: Tensor, mask_BT: Tensor, counts: Sequence[int | None]) -> list[tuple[int, int, Tensor]]:
    """Where each row's real tokens begin and end, and their new order."""
    rows = []
    for b, (ids, mask, count) in enumerate(zip(ids_BT, mask_BT, counts, strict=True)):
        real = mask.bool().nonzero().flatten()
        if len(real) and int(real[-1] - real[0]) + 1 != len(real):
            raise RouteError("attention_mask has a gap inside a row; slots can only stand in one run of tokens")
        start, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        rows.append((start, stop, _order(ids[start:stop], count, f"row {b + 1}")))
    return rows


def _order(ids: Tensor, count: int | None, where: str) -> Tensor:
    """The places of a run's tokens in their new order, -1 for each slot put in front."""
    marks = ids == SLOT
    found = int(marks.sum())
    every = torch.arange(len(ids), device=ids.device)
    if found and count is not None and found != count:
        raise RouteError(
            f"{where} holds {found} pseudo-tokens and the soft prompt of its entry {count}; give it as many, or none "
            "for slots in front"
        )
    if found or not count:
        return every[~marks] if count is None else every
    return torch.cat([every.new_full((count,), -1), every])


def _per_token(key: str, value: Any, ids_BT: Tensor) -> bool:
    named = key in ("input_ids", "labels", "token_type_ids", "special_tokens_mask")
    return named and isinstance(value, Tensor) and value.shape == ids_BT.shape and not value.is_floating_point()


def slot_token(config: Any, ids_BT: Tensor | None = None) -> int:
    """An ordinary valid id that no model treats as special: the first that is not pad, bos, eos, ... .

    Nor one of `ids_BT` if there is another: then ids alone tell slots from tokens.
    """
    special: set[Any] = set()
    for name in ("pad", "bos", "eos", "sep", "cls", "mask", "unk", "decoder_start", "forced_eos", "image"):
        value = getattr(config, f"{name}_token_id", None)
        special |= set(value) if isinstance(value, list | tuple) else {value}
    taken = set() if ids_BT is None or ids_BT.is_meta else set(ids_BT.unique().tolist())
    ordinary = [i for i in range(int(config.vocab_size)) if i not in special]
    return next((i for i in ordinary if i not in taken), ordinary[0])


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(type(model).forward).parameters


def entries_of(rows: Sequence[Any] | None, current: Route, batch: int) -> list[Entry]:
    """One entry for each of `batch` rows: those given, or what is in use."""
    route = current if rows is None else Route.of_rows(rows)
    if route.by_token:
        raise RouteError("prepare needs rows; a packed batch gets its slots while it is packed")
    route.check_rows(batch)
    return [route.entries[i] for i in route.owner(batch)]
