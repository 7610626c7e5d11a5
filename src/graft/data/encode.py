"""Rendered text to token ids and labels: exact boundaries, one end token, one begin token.

Training must show the model the very tokens that `generate()` will start from. So the text is cut where a trained part
begins and ends; where the tokens of each prefix are a prefix of the whole text's tokens, the whole is used as it is
(what a pretrained model saw); where they are not, because a token would straddle the cut, each part is tokenized alone.
Character offsets are not used: byte-level tokenizers trim leading blanks from them, which hides such a token.

Pseudo-tokens have the id `SLOT` until `graft.prepare` takes it; the text around each is tokenized apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from graft.data.rows import Row
from graft.data.tasks import MARK
from graft.errors import ConfigError
from graft.ids import IGNORED, SLOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as tokens. `labels`: a decoder's as long as `input_ids`; an encoder-decoder's target; one class number."""

    input_ids: list[int]
    labels: list[int]
    row: Row
    token_type_ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many tokens have a label (a decoder's first token gives no loss all the same: nothing predicts it)."""
        return sum(label != IGNORED for label in self.labels)


class Rendered(NamedTuple):
    """Text, the (start, end) characters that are the completion, and whether the begin token must be put in front."""

    text: str
    spans: tuple[tuple[int, int], ...]
    begin: bool


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] if this tokenizer begins every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, begin: bool) -> list[int]:
    """The tokens of a prompt as training shows them: what `generate()` must start from."""
    return _begun(token_ids([text], tokenizer)[0], tokenizer, begin)


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text without special tokens, and `SLOT` for each pseudo-token."""
    split = [text.split(MARK) for text in texts]
    pieces = [piece for parts in split for piece in parts if piece]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids if pieces else [])
    found = []
    for parts in split:
        ids: list[int] = []
        for number, piece in enumerate(parts):
            ids += [SLOT] if number else []
            ids += next(encoded) if piece else []
        found.append(ids)
    return found


def whole_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """As `token_ids`, with the tokenizer's own special tokens around each text."""
    if not any(MARK in text for text in texts):
        return list(tokenizer(list(texts), verbose=False).input_ids)
    alone, around = token_ids(["a"], tokenizer)[0], tokenizer("a").input_ids
    start = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    front, back = around[:start], around[start + len(alone) :]
    return [[*front, *ids, *back] for ids in token_ids(texts, tokenizer)]


def without_slots(ids: Sequence[int]) -> list[int]:
    """The ids without pseudo-tokens: what the base reads."""
    return [token for token in ids if token != SLOT]


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Ids as text, pseudo-tokens as the template has them: {slots:3}."""
    runs = itertools.groupby(ids, lambda token: token == SLOT)
    return "".join(f"{{slots:{len(list(run))}}}" if slot else tokenizer.decode(list(run)) for slot, run in runs)


def causal_examples(
    rows: Sequence[Row], rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, everything: bool
) -> list[Example]:
    """Ids and labels for a decoder; labels are -100 outside the completion unless `everything` is trained."""
    end = end_id(tokenizer)
    examples = []
    for row, (ids, trained), item in zip(rows, _tokenize(rendered, tokenizer), rendered, strict=True):
        while ids[-2:] == [end, end]:
            ids.pop(), trained.pop()
        if ids[-1:] != [end]:
            ids, trained = [*ids, end], [*trained, True]
        ids = _begun(ids, tokenizer, item.begin)
        trained = [False] * (len(ids) - len(trained)) + trained[-len(ids) :]
        wanted = [(everything or t) and i != SLOT for i, t in zip(ids, trained, strict=True)]
        labels = [i if w else IGNORED for i, w in zip(ids, wanted, strict=True)]
        examples.append(Example(input_ids=ids, labels=labels, row=row))
    return examples


def seq2seq_examples(
    rows: Sequence[Row], prompts: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The prompt for the encoder, the answer for the decoder, each with the tokenizer's own special tokens."""
    end = end_id(tokenizer)
    inputs = whole_ids(prompts, tokenizer)
    targets = tokenizer(text_target=list(answers), verbose=False).input_ids
    examples = []
    for row, ids, target in zip(rows, inputs, targets, strict=True):
        while target[-1:] == [end]:
            target = target[:-1]
        examples.append(Example(input_ids=ids, labels=[*target, end], row=row))
    return examples


def classifier_examples(
    rows: Sequence[Row],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | None = None,
) -> list[Example]:
    """A text or a pair of texts, or what a template made of them, and the number of its label."""
    examples = []
    if texts is not None:
        typed = "token_type_ids" in tokenizer.model_input_names
        for row, number, ids in zip(rows, numbers, whole_ids(texts, tokenizer), strict=True):
            types = [0] * len(ids) if typed else None
            examples.append(Example(input_ids=ids, labels=[number], row=row, token_type_ids=types))
        return examples
    for row, number in zip(rows, numbers, strict=True):
        encoded = tokenizer(row.text, row.pair, verbose=False)
        types = encoded.get("token_type_ids")
        examples.append(Example(input_ids=encoded.input_ids, labels=[number], row=row, token_type_ids=types))
    return examples


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end token, which every completion must have."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end token (eos_token), so a completion could never end; set one")
    return int(tokenizer.eos_token_id)


def _begun(ids: list[int], tokenizer: PreTrainedTokenizerBase, begin: bool) -> list[int]:
    """Exactly one begin token in front, if the text should have one, and never two."""
    bos = tokenizer.bos_token_id
    if begin and ids[:1] != [bos]:
        return [*begin_ids(tokenizer), *ids]
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _tokenize(items: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[bool]]]:
    """(ids, whether each is in a trained span) of each text, by one call of the tokenizer where boundaries hold."""
    cuts = [sorted({c for span in item.spans for c in span} - {0, len(item.text)}) for item in items]
    texts = [item.text[:c] for item, cs in zip(items, cuts, strict=True) for c in [*cs, len(item.text)]]
    encoded = iter(token_ids(texts, tokenizer))
    result = []
    for item, places in zip(items, cuts, strict=True):
        prefixes = [next(encoded) for _ in places]
        ids = next(encoded)
        if all(ids[: len(prefix)] == prefix for prefix in prefixes):
            ends = [len(prefix) for prefix in prefixes]
        else:
            ids, ends = _by_parts(item.text, places, tokenizer)
        token = dict(zip([0, *places, len(item.text)], [0, *ends, len(ids)], strict=True)) if item.text else {0: 0}
        trained = [False] * len(ids)
        for start, stop in item.spans:
            trained[token[start] : token[stop]] = [True] * (token[stop] - token[start])
        result.append((list(ids), trained))
    return result


def _by_parts(text: str, places: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the parts between cuts, joined, and the number of ids before each cut."""
    starts, stops = [0, *places], [*places, len(text)]
    parts = [text[a:b] for a, b in zip(starts, stops, strict=True)]
    ids: list[int] = []
    ends: list[int] = []
    for part in token_ids(parts, tokenizer):
        ids += part
        ends.append(len(ids))
    return ids, ends[:-1]
