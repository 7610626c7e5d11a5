"""What an adapter has forgotten: loss and KL to the base on general text, adapter off and on in the same batches.

    kl = mean over tokens of sum_v p_v (log p_v - log q_v)      p the base, q base and adapter, in nats

Entries and the base are rows of one batch. What trains the base itself (full fine-tuning, top layers) keeps the
originals in memory, so each batch runs first with them in place, and what enters its output head is kept (N x D); the
trained values come after. Logits exist for a chunk of tokens at a time.

Decoders are measured on every token of a piece but the first; encoder-decoders on the second half of a piece, given
the first.

Shape legend: E entries with the base, N labelled tokens of a batch, C those of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from graft import roles
from graft.adapt import prepare
from graft.data.collate import pad
from graft.data.rows import Row
from graft.data.template import Example
from graft.errors import ConfigError
from graft.evaluate.batches import (
    Progress,
    bank_or_none,
    by_length,
    check_length,
    context_of,
    labels_of,
    on_device,
    quiet,
    routed,
)
from graft.evaluate.general import LIMIT, pieces
from graft.fast.kl import chunks, divergence
from graft.fast.loss import Outputs, outputs
from graft.ids import IGNORED
from graft.routes import entry_of

TEXTS = 4
"""Pieces in a batch, each once for each entry and once for the base."""


@dataclass(frozen=True)
class Forgetting:
    """What one entry makes of general text.

    Args:
        loss: nats a token.
        base_loss: the base's, on the same tokens.
        kl: KL(base || entry), nats a token; 0 for the base itself.
        tokens: how many.
    """

    loss: float
    base_loss: float
    kl: float
    tokens: int


def forgetting(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Sequence[Sequence[int]],
    entries: Sequence[Any] = (None,),
    *,
    limit: int = LIMIT,
    seed: int = 0,
    batch_size: int = TEXTS,
    progress: Progress | None = None,
) -> list[Forgetting]:
    """Loss and KL to the base on general text, for each entry, in the order of `entries`.

    Args:
        model: a decoder or an encoder-decoder with a language model head.
        text: a source (see `general.pieces`), or pieces of it.
        entries: None for the base, a name, names, or a dict of name to weight.
        limit: tokens of the sample, at most.
        seed: of the sample.
        batch_size: pieces in a batch, each of them once for each entry and once for the base.

    Raises:
        ConfigError: a model that sees whole texts (masked language models, classifiers).
        DataError: text that cannot be read, or a piece that is longer than the context.
        RouteError: an unknown adapter.
    """
    labels = labels_of(entries)
    check_model(model)
    if isinstance(text, str | Path):
        text = pieces(text, tokenizer, model.config, limit=limit, seed=seed)
    examples = _examples(model, tokenizer, text, entries)
    batches = by_length([max(len(each), len(each.labels)) for each in examples], batch_size)
    sums = torch.zeros(len(labels) + 1, 2, dtype=torch.float64)  # loss and KL, the base in front
    count = done = 0
    with quiet(model):
        for numbers, sides in _sides(model, tokenizer, examples, batches, entries):
            sums += _summed(sides)
            count += len(sides[0].target_N)
            done += len(numbers) * len(sides)
            if progress is not None:
                progress("general text", done, len(examples) * len(sides))
    means = (sums / count).tolist()
    return [Forgetting(loss, means[0][0], kl, count) for loss, kl in means[1:]]


def check_model(model: Any) -> None:
    """Refuse what has no next token to predict.

    Raises:
        ConfigError: the model has no language model head, or its tokens see each other both ways.
    """
    name = type(model).__name__
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ConfigError(
            f"{name} has no language model head, so general text has no loss; forgetting needs a decoder or an "
            "encoder-decoder, or measure another task with graft evaluate"
        )
    if not roles.is_encoder_decoder(model) and not roles.is_decoder(model):
        raise ConfigError(
            f"{name} is a masked language model, which sees the tokens that it shall predict; forgetting needs a "
            "decoder or an encoder-decoder"
        )


def _examples(model: Any, tokenizer: Any, found: Sequence[Sequence[int]], entries: Sequence[Any]) -> list[Example]:
    two = roles.is_encoder_decoder(model)
    limit, made = context_of(model, tokenizer), []
    bank = bank_or_none(model)
    if limit is not None and bank is not None and not two:
        limit -= max((sum(d.length for d in bank.prompts(entry_of(each))) for each in entries), default=0)
    for number, piece in enumerate(found, 1):
        ids, row = list(piece), Row(form="text", index=number, source="general text")
        half = len(ids) // 2
        # The first token has no predictor, except behind a soft prompt, which the base has not.
        inputs, labels = (ids[:half], ids[half:]) if two else (ids, [IGNORED, *ids[1:]])
        check_length(row.where, len(inputs), limit)
        made.append(Example(input_ids=inputs, labels=labels, row=row))
    return made


def _sides(
    model: Any, tokenizer: Any, examples: list[Example], batches: list[list[int]], entries: Sequence[Any]
) -> Iterator[tuple[list[int], list[Outputs]]]:
    """For each batch the outputs of the base and of every entry, over the same tokens in the same order."""
    bank = bank_or_none(model)
    rows = {i: [examples[number] for number in numbers] for i, numbers in enumerate(batches)}
    if bank is None or not any(adapter.selected for adapter in bank):
        every = [None, *entries]
        for i, numbers in enumerate(batches):
            batch = [example for _ in every for example in rows[i]]
            given = [entry for entry in every for _ in rows[i]]
            yield numbers, _split(_run(model, tokenizer, batch, given), len(every))
        return
    if len({entry_of(entry) for entry in entries} - {()}) > 1:
        raise ConfigError("an adapter that changes the base itself stands alone; measure one entry beside the base")
    for i, numbers in enumerate(batches):
        base = _of_base(model, _run(model, tokenizer, rows[i], [None] * len(rows[i])))
        given = [[entry] * len(rows[i]) for entry in entries]
        yield (
            numbers,
            [base, *(_run(model, tokenizer, rows[i], each) if entry_of(each[0]) else base for each in given)],
        )


def _run(model: Any, tokenizer: Any, examples: list[Example], given: list[Any]) -> Outputs:
    batch = pad(examples, tokenizer, mode="seq2seq" if roles.is_encoder_decoder(model) else "causal")
    with routed(model, given):
        if bank_or_none(model) is not None:
            batch = prepare(model, batch, given)
        return outputs(model, on_device(batch, model))


def _split(whole: Outputs, parts: int) -> list[Outputs]:
    """Outputs of a batch with one block of rows for each entry."""
    count = len(whole.target_N) // parts

    def part(first: int) -> Callable[[slice], Tensor]:
        return lambda where: whole.logits(slice(first + where.start, first + where.stop))

    starts = range(0, count * parts, count)
    return [Outputs(whole.target_N[at : at + count], whole.vocabulary, part(at)) for at in starts]


def _of_base(model: Any, found: Outputs) -> Outputs:
    """Outputs whose logits are the base's even while its head holds trained values."""
    head = model.get_output_embeddings()
    adapter = next(adapter for adapter in bank_or_none(model) or () if adapter.selected)
    names = {id(parameter): name for name, parameter in adapter.selected.items()}

    def logits(where: slice) -> Tensor:
        if not adapter.acting:
            return found.logits(where)
        with _originals(
            head, {key: adapter.other[names[id(p)]] for key, p in head.named_parameters() if id(p) in names}
        ):
            return found.logits(where)

    return Outputs(found.target_N, found.vocabulary, logits)


@contextlib.contextmanager
def _originals(head: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a head computes with these tensors."""
    own = head.__dict__.get("forward")
    head.forward = lambda x: F.linear(x, tensors.get("weight", head.weight), tensors.get("bias", head.bias))
    try:
        yield
    finally:  # an attribute of the instance that was not there before would count as somebody's own forward
        if own is None:
            del head.forward
        else:
            head.forward = own


def _summed(sides: list[Outputs]) -> Tensor:
    """(E, 2): loss and KL of each side summed over the tokens, in fp64; the first side is the base."""
    base = sides[0]
    sums = torch.zeros(len(sides), 2, dtype=torch.float64)
    for where in chunks(len(base.target_N), base.vocabulary, 2):
        p_CV = base.logits(where).log_softmax(-1)
        for i, side in enumerate(sides):
            q_CV = p_CV if i == 0 else side.logits(where).log_softmax(-1)
            loss = F.nll_loss(q_CV, base.target_N[where], reduction="sum")
            sums[i] += torch.stack([loss, divergence(p_CV, q_CV).sum()]).double().cpu()
    return sums
