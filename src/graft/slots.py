"""Slot tokens: where soft prompts stand in the data, and how a batch gets them.

Lengths, positions, masks and `generate()` are right because the data is right: a slot is an ordinary valid token whose
embedding the embedding site overwrites.

Shape legend: B rows, T tokens, P slots.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import RouteError
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


def add_slots(
    batch: dict[str, Any],
    counts: Sequence[int],
    *,
    slot_id: int,
    pad_id: int,
    side: str,
    positions: bool,
    keep_labels: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """A new batch with `counts[b]` slots in front of row b's first real token, and the (B, T) slot mask.

    Args:
        batch: `input_ids` (B, T), and if present `attention_mask`, `labels`, `token_type_ids`, (B, T) each.
        side: "left" or "right", where the shorter rows are padded.
        positions: whether to add `position_ids`, counted over real tokens.
        keep_labels: leave `labels` as they are (an encoder-decoder's or a classifier's).
    """
    ids_BT = batch["input_ids"]
    mask_BT = batch.get("attention_mask")
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    rows = []
    for ids, mask, count in zip(ids_BT, mask_BT, counts, strict=True):
        real = mask.bool().nonzero().flatten()
        if len(real) and int(real[-1] - real[0]) + 1 != len(real):
            raise RouteError("attention_mask has a gap inside a row; slots can only stand before one run of tokens")
        start, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        rows.append((ids[start:stop], start, stop, count))
    width = max(count + stop - start for _, start, stop, count in rows)
    new = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask", "position_ids")}
    new_ids = ids_BT.new_full((len(rows), width), pad_id)
    new_mask = mask_BT.new_zeros((len(rows), width))
    slots = torch.zeros((len(rows), width), dtype=torch.bool, device=ids_BT.device)
    extra = {
        key: value.new_full((len(rows), width), -100 if key == "labels" else 0)
        for key, value in batch.items()
        if _per_token(key, value, ids_BT) and not (keep_labels and key == "labels")
    }
    for b, (ids, start, stop, count) in enumerate(rows):
        length = count + stop - start
        first = width - length if side == "left" else 0
        new_ids[b, first : first + count] = slot_id
        new_ids[b, first + count : first + length] = ids
        new_mask[b, first : first + length] = 1
        slots[b, first : first + count] = True
        for key, value in extra.items():
            value[b, first + count : first + length] = batch[key][b, start:stop]
        for key in ("start_positions", "end_positions"):
            if isinstance(new.get(key), Tensor):
                new[key] = new[key].clone()
                new[key][b] += first + count - start
    new = {"input_ids": new_ids, "attention_mask": new_mask, **new, **extra}
    if positions:
        new["position_ids"] = (new_mask.cumsum(-1) - 1).clamp(min=0)
    return new, slots


def add_segment_slots(
    batch: dict[str, Any], segments: Sequence[tuple[Any, int]], counts: Sequence[int], *, slot_id: int
) -> tuple[dict[str, Any], Tensor]:
    """A packed batch with `counts[i]` slots in front of segment i, and the (1, T) slot mask.

    Args:
        batch: `input_ids` (1, T), and if present `labels` (1, T). Positions restart at each segment.
        segments: (entry, length) of each run of tokens; the new batch has them with their new lengths.
    """
    lengths = [length for _, length in segments]
    if batch["input_ids"].shape != (1, sum(lengths)):
        raise RouteError(f"the segments have {sum(lengths)} tokens, input_ids {tuple(batch['input_ids'].shape)}")
    new = {**batch, "segments": [(entry, n + count) for (entry, n), count in zip(segments, counts, strict=True)]}
    fills = {"input_ids": slot_id, "labels": -100}
    for key in fills.keys() & batch.keys():
        runs = zip(batch[key][0].split(lengths), counts, strict=True)
        new[key] = torch.cat([part for run, n in runs for part in (run.new_full((n,), fills[key]), run)])[None]
    device = batch["input_ids"].device
    sizes = [length for _, length in new["segments"]]
    new["position_ids"] = torch.cat([torch.arange(size, device=device) for size in sizes])[None]
    pairs = zip(sizes, counts, strict=True)
    return new, torch.cat([torch.arange(size, device=device) < count for size, count in pairs])[None]


def _per_token(key: str, value: Any, ids_BT: Tensor) -> bool:
    named = key in ("labels", "token_type_ids", "special_tokens_mask")
    return named and isinstance(value, Tensor) and value.shape == ids_BT.shape and not value.is_floating_point()


def slot_token(config: Any) -> int:
    """An ordinary valid id that no model treats as special: the first that is not pad, bos, eos, ... ."""
    special: set[Any] = set()
    for name in ("pad", "bos", "eos", "sep", "cls", "mask", "unk", "decoder_start", "forced_eos", "image"):
        value = getattr(config, f"{name}_token_id", None)
        special |= set(value) if isinstance(value, list | tuple) else {value}
    return next(i for i in range(int(config.vocab_size)) if i not in special)


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
