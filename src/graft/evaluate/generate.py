"""Answers in batches, with an entry for each row: adapters and the base beside each other in one batch.

Decoders are padded left, the inputs of encoder-decoders right; soft prompts get their slots here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from graft import roles
from graft.adapt import prepare
from graft.data.collate import pad_id
from graft.data.encode import without_slots
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError
from graft.evaluate.batches import (
    Progress,
    bank_or_none,
    by_length,
    check_length,
    context_of,
    labels_of,
    on_device,
    passes,
    quiet,
    routed,
)
from graft.routes import entry_of


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are chosen."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """No answer ends before it has so many."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy), anything above samples."""
    top_p: float = 1.0
    seed: int | None = 0
    """For sampling; None goes on from the random state as it is."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens}: give at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens}: give 0 to max_new_tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature}, top_p {self.top_p}: temperature >= 0 and 0 < top_p <= 1"
            )


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template | Sequence[Template],
    entries: Sequence[Any] = (None,),
    *,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """The answer to each row by each entry; a batch has `batch_size` rows times the number of entries.

    Args:
        model: a decoder or an encoder-decoder.
        template: what makes prompts of rows, one for all entries or one for each.
        entries: None for the base, a name, names, or a dict of name to weight.

    Returns:
        Label of the entry ("base", a name) to the texts, in the order of `rows`, without white space at the ends.

    Raises:
        DataError: a prompt that does not leave room for a single token.
        RouteError: an unknown adapter.
        ConfigError: a model that cannot generate.
    """
    labels = labels_of(entries)
    templates = templates_of(template, len(labels))
    decoding = decoding or Decoding()
    prompts = [[each.prompt_ids(row, tokenizer) for each in templates] for row in rows]
    lengths = [max(map(len, row)) for row in prompts]
    limit, room = context_of(model, tokenizer), 0 if roles.is_encoder_decoder(model) else 1
    for row, length in zip(rows, lengths, strict=True):
        check_length(row.where, length + room, limit)
    texts: dict[str, list[str]] = {label: [""] * len(rows) for label in labels}
    done = 0
    with quiet(model), _seeded(decoding):
        for together in passes(model, entries):
            for numbers in by_length(lengths, batch_size):
                asked = [prompts[n][i] for n in numbers for i in together]
                given = [entries[i] for _ in numbers for i in together]
                answers = iter(answer_ids(model, tokenizer, asked, given, decoding))
                for number in numbers:
                    for i in together:
                        texts[labels[i]][number] = tokenizer.decode(next(answers), skip_special_tokens=True).strip()
                done += len(asked)
                if progress is not None:
                    progress("answers", done, len(rows) * len(labels))
    return texts


def answer_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    entries: Sequence[Any],
    decoding: Decoding,
    streamer: Any = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with the end token; one batch, `entries[b]` acts on row b.

    Args:
        streamer: one of transformers', for a single prompt.
    """
    check_generates(model)
    encoder_decoder = roles.is_encoder_decoder(model)
    prompts = [p if entry_of(entry) else without_slots(p) for p, entry in zip(prompts, entries, strict=True)]
    width = max(map(len, prompts))
    fill = pad_id(tokenizer)
    ids, mask = [], []
    for prompt in prompts:
        gap = [fill] * (width - len(prompt))
        ids.append([*prompt, *gap] if encoder_decoder else [*gap, *prompt])
        real, hidden = [1] * len(prompt), [0] * len(gap)
        mask.append([*real, *hidden] if encoder_decoder else [*hidden, *real])
    batch: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with routed(model, entries):
        if bank_or_none(model) is not None:
            batch = prepare(model, batch, list(entries))
        batch = on_device(batch, model)
        start = 1 if encoder_decoder else batch["input_ids"].shape[1]
        config = generation_config(model, tokenizer, decoding, 0 if encoder_decoder else start)
        out = model.generate(**batch, generation_config=config, streamer=streamer)
    return [_until_end(row[start:].tolist(), config.eos_token_id) for row in out]


def check_generates(model: Any) -> None:
    """Raise a ConfigError for a model that writes no text."""
    if not hasattr(model, "generate") or not model.can_generate():
        raise ConfigError(f"{type(model).__name__} cannot generate text; measure it by loss, accuracy or macro_f1")


def templates_of(template: Template | Sequence[Template], count: int) -> list[Template]:
    """One template for each of `count` entries."""
    templates = [template] * count if isinstance(template, Template) else list(template)
    if len(templates) != count:
        raise ConfigError(f"template: {len(templates)} templates for {count} entries; give one, or one for each")
    return templates


def generation_config(model: Any, tokenizer: Any, decoding: Decoding, length: int) -> GenerationConfig:
    """Exactly what was asked: penalties and sampling settings that a model brings along would change the result."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    eos = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    limit = context_of(model, tokenizer)
    room = decoding.max_new_tokens if limit is None else min(decoding.max_new_tokens, max(1, limit - length))
    sampled = decoding.temperature > 0
    return GenerationConfig(
        max_new_tokens=room,
        min_new_tokens=min(decoding.min_new_tokens, room) or None,
        do_sample=sampled,
        temperature=decoding.temperature if sampled else 1.0,
        top_p=decoding.top_p if sampled else 1.0,
        top_k=0 if sampled else 50,
        num_beams=1,
        use_cache=True,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=sorted({token for token in eos if token is not None}),
    )


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens up to and with the first end token: rows that end early are filled."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextlib.contextmanager
def _seeded(decoding: Decoding) -> Iterator[None]:
    """Sampling that repeats itself and leaves the random state as it was."""
    if decoding.temperature == 0 or decoding.seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        yield
