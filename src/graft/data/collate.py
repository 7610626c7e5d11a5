"""Examples to batches: padded rows, or several examples in one row without contamination.

Shapes: B rows, T tokens. The adapter of each row (or segment) travels with the batch as a plain list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from graft.data.encode import Example
from graft.data.order import LengthGrouped, bins, order, packed_order
from graft.errors import ConfigError, DataError, GraftError
from graft.ids import IGNORED, SLOT

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Collator",
    "LengthGrouped",
    "bins",
    "check_ends",
    "check_packing",
    "flatten",
    "order",
    "pack",
    "packed_order",
    "pad",
    "truncate",
]

Mode = Literal["causal", "seq2seq", "classification"]
Side = Literal["right", "left"]


def truncate(example: Example, max_length: int, mode: str = "causal") -> Example:
    """The example cut at its end to `max_length` tokens; an encoder-decoder's input and target are cut each for itself.

    A classifier's text keeps its last special token ([SEP]).

    Raises:
        DataError: pseudo-tokens stand where it would be cut.
    """
    if SLOT in example.input_ids[max_length - (mode == "classification") :]:
        raise DataError(
            f"{example.row.where}: cut to {max_length} tokens it would lose pseudo-tokens; raise data.max_length"
        )
    if mode == "seq2seq":
        return dataclasses.replace(
            example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length]
        )
    if len(example.input_ids) <= max_length:
        return example
    if mode == "classification":
        types = example.token_type_ids and [*example.token_type_ids[: max_length - 1], example.token_type_ids[-1]]
        ids = [*example.input_ids[: max_length - 1], example.input_ids[-1]]
        return dataclasses.replace(example, input_ids=ids, token_type_ids=types)
    return dataclasses.replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])


def check_ends(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse rows that an encoder-decoder cannot classify: it reads the last end token, and needs as many in each row.

    Raises:
        DataError: a row without an end token, or with more of them than another.
    """
    end = config.eos_token_id
    if not config.is_encoder_decoder or not examples or end is None:
        return
    counts = [example.input_ids.count(end) for example in examples]
    least, token = min(counts), tokenizer.decode([end])
    for example, count in zip(examples, counts, strict=True):
        if count == 0:
            raise DataError(
                f"{example.row.where}: no end token {token}, by which an encoder-decoder classifies; take the "
                f"tokenizer that belongs to the base, or write it with data.template.templates: ['{{text}}{token}']"
            )
        if count > max(least, 1):
            raise DataError(
                f"{example.row.where}: {count} end tokens {token}, another row has {least}, and an encoder-decoder "
                "classifies by as many in each; remove them from the text, or raise data.max_length if rows are cut"
            )


def pad(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    side: Side = "right",
    multiple: int | None = None,
    mode: str = "causal",
) -> dict[str, Any]:
    """A padded batch.

    Returns:
        `input_ids`, `attention_mask` (B, T); `labels` (B, T), -100 where nothing is trained, in an encoder-decoder
        (B, T of the targets), in a classifier (B,); `token_type_ids` if the tokenizer gives them; `adapter`, a list of
        B names, None for a row that names none, if any names one. T is rounded up to `multiple`.
    """
    _some(examples)
    ids = [example.input_ids for example in examples]
    batch: dict[str, Any] = {
        "input_ids": _padded(ids, pad_id(tokenizer), side, multiple),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0, side, multiple),
    }
    types = [e.token_type_ids for e in examples if e.token_type_ids is not None]
    if len(types) == len(examples):
        batch["token_type_ids"] = _padded(types, tokenizer.pad_token_type_id, side, multiple)
    if mode == "classification":
        batch["labels"] = torch.tensor([example.labels[0] for example in examples])
    else:
        # An encoder-decoder's targets are always padded right: the decoder's input is made from them by a shift.
        labels_side: Side = "right" if mode == "seq2seq" else side
        batch["labels"] = _padded([example.labels for example in examples], IGNORED, labels_side, multiple)
    return batch | _adapters(examples)


def flatten(examples: Sequence[Example]) -> dict[str, Any]:
    """One packed batch: the examples end to end in a single row, each blind to the others.

    Returns:
        `input_ids`, `position_ids` (from 0 in each segment), `labels` (1, T), -100 at the first token of each segment
        (it has no predictor: the token before it belongs to another example); `segments`, a list of (adapter or None,
        length), for `graft.route(model, segments=...)`: None is a row that names no adapter, so put the trained one
        there first (to a route None is the base); `use_cache`, False.

    There is no `attention_mask`, on purpose. transformers 5.23 (`masking_utils._preprocess_mask_arguments`) finds the
    segments by itself from positions that do not go up by one, and builds a block-diagonal causal mask, if

    * the model hands `position_ids` to the mask (Llama, GPT-2 and most decoders; not OPT, Falcon, Bloom, MPT, BERT; no
      encoder-decoder);
    * `attention_mask` is None (also not all ones);
    * there is no cache: with `use_cache=True`, the default of most configs, it makes an empty one and **silently lets
      the segments see each other**; that is why the batch says `use_cache=False`;
    * the attention is one that it knows: eager, sdpa, flex, or one registered with `AttentionMaskInterface`; flash
      attention finds the segments by itself, but only with one row;
    * layers carry no state from token to token (Mamba and other recurrent ones do).

    A model with adapters whose attention goes through transformers' interface (OPT and BERT too) finds them by the same
    positions, makes no mask, and runs attention text by text (`graft.fast.segments`). Elsewhere a mask of T x T is
    made, so memory grows with T squared, except by flash and flex attention. `check_packing(model)` tries it on the
    model at hand.
    """
    _some(examples)
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in [IGNORED, *example.labels[1:]]]
    positions = [position for example in examples for position in range(len(example))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
        "segments": [(example.row.adapter, len(example)) for example in examples],
        "use_cache": False,
    }


def pack(examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """Packed batches of at most `max_length` tokens, by first-fit-decreasing; a pure function."""
    for example in examples:
        if len(example) > max_length:
            raise DataError(
                f"{example.row.where}: {len(example)} tokens do not fit a pack of {max_length}; "
                "raise max_length or set truncate"
            )
    return [flatten([examples[i] for i in one]) for one in bins([len(e) for e in examples], max_length)]


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise a ConfigError if packed examples would see each other in this model.

    Two short segments are run: packed they must give the logits that each gives alone, and another first segment must
    not move the second one's logits (measured against how far it moves them when both are one text, in any dtype).
    """
    modes = {module: module.training for module in model.modules()}
    bank: Any = getattr(model, "adapters", None)
    asleep = getattr(bank, "asleep", False)
    model.eval()
    try:
        if bank is not None:
            bank.asleep = True  # the base by the attention that it has with adapters, which may need other batches
        holds = _isolates(model)
    except GraftError:  # the model's adapters cannot take these tokens: not a matter of packing
        raise
    except (TypeError, ValueError):  # no position_ids, an encoder-decoder
        holds = False
    finally:
        for module, training in modes.items():
            module.training = training
        if bank is not None:
            bank.asleep = asleep
    if not holds:
        raise ConfigError(
            f"{type(model).__name__} lets packed examples see each other (it makes no mask from position_ids); "
            "turn packing off"
        )


def _isolates(model: PreTrainedModel) -> bool:
    vocabulary = model.get_input_embeddings().num_embeddings
    first, other, second = ([n % vocabulary for n in ids] for ids in ((5, 7, 11, 13), (19, 23, 29, 31), (3, 17, 2)))
    restart, onward = [0, 1, 2, 3, 0, 1, 2], list(range(7))

    def logits(ids: list[int], positions: list[int]) -> torch.Tensor:
        tensors = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        return model(**{k: v.to(model.device) for k, v in tensors.items()}, use_cache=False).logits[0].float()

    def moved(positions: list[int]) -> torch.Tensor:
        return (logits([*first, *second], positions) - logits([*other, *second], positions))[-3:].abs().max()

    packed = logits([*first, *second], restart)
    alone = torch.cat([logits(first, onward[:4]), logits(second, onward[:3])])
    if packed.shape != alone.shape:  # no logits for each token: a classifier
        return False
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    same = (packed - alone).abs().max() <= tolerance * alone.abs().max().clamp(min=1)
    return bool(same and moved(restart) <= 0.1 * moved(onward))


@dataclass(frozen=True)
class Collator:
    """Examples to a batch, for a DataLoader: padded, or `packed` into one row (the batch sampler makes the packs)."""

    tokenizer: PreTrainedTokenizerBase
    packed: bool = False
    mode: str = "causal"
    side: Side = "right"
    multiple: int | None = None

    def __post_init__(self) -> None:
        if self.packed and self.mode != "causal":
            raise ConfigError(f"packing works for decoders only, not in mode '{self.mode}'; turn packing off")
        if not self.packed:
            pad_id(self.tokenizer)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.packed:
            return flatten(examples)
        return pad(examples, self.tokenizer, side=self.side, multiple=self.multiple, mode=self.mode)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows; the end token where there is no padding token (the mask hides it either way)."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ConfigError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
    return int(token)


def _some(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("an empty batch: give at least one example")


def _adapters(examples: Sequence[Example]) -> dict[str, Any]:
    names = [example.row.adapter for example in examples]
    return {"adapter": names} if any(name is not None for name in names) else {}


def _padded(rows: Sequence[Sequence[int]], fill: int, side: Side, multiple: int | None) -> torch.Tensor:
    """(B, T): rows of numbers filled to the longest."""
    width = max(len(row) for row in rows)
    if multiple:
        width = -(-width // multiple) * multiple
    table = torch.full((len(rows), width), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        table[number, place] = torch.tensor(row, dtype=torch.long)
    return table
