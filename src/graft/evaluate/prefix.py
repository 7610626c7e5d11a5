"""Likelihoods of answers behind a text that all rows share: it goes through the model once, as keys and values.

Answers of one prompt share a forward too, wherever one's input is the beginning of another's. The plain way, by
`score.losses`, gives the same numbers; it serves models whose cache is not all keys and values, and adapters that act
in attention or on inputs.

Shapes: B rows, T tokens behind the prefix, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from graft import roles
from graft.data.collate import pad_id
from graft.data.encode import Example
from graft.evaluate import score
from graft.evaluate.batches import Progress, bank_or_none, by_length, check_length, on_device, quiet, routed
from graft.evaluate.shots import room
from graft.ids import IGNORED, SLOT
from graft.method import AttentionDelta, InputDelta
from graft.routes import entry_of

LEAST = 8
"""Shared tokens below which a forward of their own is not worth it."""


class _Answer(NamedTuple):
    """A sequence without its last token, which nothing reads; the targets stand at its end."""

    read: tuple[int, ...]
    targets: tuple[int, ...]


def log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    entry: Any = None,
    *,
    mode: str = "causal",
    batch_size: int = 16,
    shared: bool = True,
    progress: Progress | None = None,
) -> list[float]:
    """The log-probability of each example's labelled tokens, in nats.

    Args:
        examples: of one template; the labelled tokens of a decoder's are its last ones.
        entry: None for the base, or what `graft.use` takes.
        mode: "causal" or "seq2seq".
        shared: False goes through every sequence whole.

    Raises:
        DataError: a row longer than the context.
        RouteError: an unknown adapter.
    """
    limit = room(model, tokenizer, [entry])
    for example in examples:
        check_length(example.row.where, max(len(example), len(example.labels)), limit)
    if shared and mode == "causal" and examples and _plain_entry(model, entry):
        found = _shared(model, tokenizer, examples, entry, batch_size, progress)
        if found is not None:
            return found
    columns = [[example] for example in examples]
    losses = score.losses(model, tokenizer, columns, [entry], mode=mode, batch_size=batch_size, progress=progress)
    return [-loss.total for loss in losses[0]]


def without_end(example: Example, end: int | None) -> Example:
    """A decoder's example up to the end token: between demonstrations stands something else."""
    if not example.input_ids or example.input_ids[-1] != end:
        return example
    return dataclasses.replace(example, input_ids=example.input_ids[:-1], labels=example.labels[:-1])


def _plain_entry(model: Any, entry: Any) -> bool:
    """Whether the entry acts on each token alone, so that keys and values of a prefix are what they are."""
    if roles.is_encoder_decoder(model):
        return False
    bank = bank_or_none(model)
    if bank is None or not entry_of(entry):
        return True
    deltas = [delta for leaf, _ in bank.leaves(entry_of(entry)) for _, delta in bank[leaf].items()]
    return not any(
        isinstance(delta, AttentionDelta | InputDelta) or delta.reads_texts or delta.reads_width for delta in deltas
    )


def _shared(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    entry: Any,
    batch_size: int,
    progress: Progress | None,
) -> list[float] | None:
    """As `log_likelihoods`; None if a labelled token has no place behind another, or the model's cache holds something
    else than all keys and values."""
    answers = [answer for answer in map(_answer, examples) if answer is not None]
    if len(answers) < len(examples):
        return None
    hosts, place = _hosts([answer.read for answer in answers])
    differ = (n for n, tokens in enumerate(zip(*hosts, strict=False)) if len(set(tokens)) > 1)
    shared = min(next(differ, len(hosts[0])), *(len(a.read) - len(a.targets) for a in answers))
    shared = shared if shared >= LEAST else 0
    guests: list[list[int]] = [[] for _ in hosts]
    for number, host in enumerate(place):
        guests[host].append(number)
    found = [0.0] * len(answers)
    done = 0
    with quiet(model):
        cache = None
        if shared:
            cache = _forward(model, [hosts[0][:shared]], entry, None, tokenizer, keep=True).past_key_values
            if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
                return None
        for numbers in by_length([len(host) for host in hosts], batch_size):
            rows = [hosts[number][shared:] for number in numbers]
            starts = [len(answers[g].read) - len(answers[g].targets) for number in numbers for g in guests[number]]
            width = max(map(len, rows)) + shared - min(starts)
            logits_BTV = _forward(model, rows, entry, cache, tokenizer, width=width).logits
            skipped = shared + max(map(len, rows)) - logits_BTV.shape[1]
            for b, number in enumerate(numbers):
                for guest in guests[number]:
                    stop = len(answers[guest].read) - skipped
                    targets = torch.tensor(answers[guest].targets, device=logits_BTV.device)
                    logits = logits_BTV[b, stop - len(targets) : stop].float()
                    found[guest] = -float(F.cross_entropy(logits, targets, reduction="sum"))
                done += len(guests[number])
            if progress is not None:
                progress("likelihoods", done, len(answers))
    return found


def _answer(example: Example) -> _Answer | None:
    """None where the labels are not the last tokens, or the first of all is one, which nothing predicts."""
    ids, targets = tuple(example.input_ids), tuple(label for label in example.labels if label != IGNORED)
    if not 0 < len(targets) < len(ids) or ids[-len(targets) :] != targets or SLOT in ids:
        return None
    return _Answer(ids[:-1], targets)


def _hosts(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Inputs that are the beginning of no other, and for each input the number of one that begins with it."""
    hosts: list[tuple[int, ...]] = []
    host_of: dict[tuple[int, ...], int] = {}
    for each in sorted(set(inputs), reverse=True):  # what begins with `each` stands right before it
        if not hosts or hosts[-1][: len(each)] != each:
            hosts.append(each)
        host_of[each] = len(hosts) - 1
    return hosts, [host_of[each] for each in inputs]


def _forward(
    model: Any,
    rows: Sequence[Sequence[int]],
    entry: Any,
    cache: DynamicCache | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int = 1,
    keep: bool = False,
) -> Any:
    """What the model makes of rows, padded right, behind the prefix in `cache`, which stays as it is.

    Args:
        width: how many of the last places need logits; a model that cannot leave some out gives all.
        keep: make a cache.
    """
    longest, past = max(map(len, rows)), 0 if cache is None else cache.get_seq_length()
    fill = pad_id(tokenizer)
    ids_BT = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * (past + len(row)) + [0] * (longest - len(row)) for row in rows])
    batch: dict[str, Any] = on_device({"input_ids": ids_BT, "attention_mask": mask}, model)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = width
    with routed(model, [entry] * len(rows)):
        return model(**batch, past_key_values=cache, use_cache=keep or cache is not None)
