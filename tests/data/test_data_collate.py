"""Batches: padded equals alone, packed equals alone (logits, loss, gradients), bins and order are exact functions."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tiny
from graft.data.collate import (
    Collator,
    LengthGrouped,
    bins,
    check_ends,
    check_packing,
    flatten,
    order,
    pack,
    packed_order,
    pad,
    truncate,
)
from graft.data.encode import Example
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError


def example(length: int, seed: int = 0, prompt: int = 2, adapter: str | None = None) -> Example:
    chance = random.Random(1000 * seed + length)
    ids = [chance.randrange(5, 99) for _ in range(length)]
    labels = [-100] * min(prompt, length) + ids[prompt:]
    return Example(input_ids=ids, labels=labels, row=Row(form="prompt", index=seed, source="a.jsonl", adapter=adapter))


def examples(*lengths: int) -> list[Example]:
    return [example(length, number) for number, length in enumerate(lengths)]


def model_of(name: str, attention: str) -> PreTrainedModel:
    model = tiny.tiny(name)
    model.set_attn_implementation(attention)
    return model.eval()


def alone(model: PreTrainedModel, one: Example) -> torch.Tensor:
    return model(input_ids=torch.tensor([one.input_ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad(bpe: PreTrainedTokenizerBase, side: Any) -> None:
    batch = pad(examples(3, 5), bpe, side=side, multiple=4)
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 8)
    )
    for number, one in enumerate(examples(3, 5)):
        real = batch["attention_mask"][number].bool()
        expected = [True] * len(one) + [False] * (8 - len(one))
        assert real.tolist() == (expected if side == "right" else expected[::-1])
        assert batch["input_ids"][number][real].tolist() == one.input_ids
        assert batch["labels"][number][real].tolist() == one.labels
        assert set(batch["labels"][number][~real].tolist()) == {-100}
        assert set(batch["input_ids"][number][~real].tolist()) == {bpe.pad_token_id}


def test_adapter_is_a_column(bpe: PreTrainedTokenizerBase) -> None:
    mixed = [example(3, adapter="a"), example(4), example(2, adapter="b")]
    assert pad(mixed, bpe)["adapter"] == ["a", None, "b"]
    assert "adapter" not in pad(examples(3), bpe)
    assert flatten(mixed)["segments"] == [("a", 3), (None, 4), ("b", 2)]


def test_pad_other_modes(words: PreTrainedTokenizerBase) -> None:
    row = Row(form="label", index=1, source="a")
    ones = [
        Example(input_ids=[2, 5, 3], labels=[1], row=row, token_type_ids=[0, 0, 1]),
        Example(input_ids=[2, 3], labels=[0], row=row, token_type_ids=[0, 0]),
    ]
    batch = pad(ones, words, mode="classification")
    assert batch["labels"].tolist() == [1, 0] and batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    two = [Example(input_ids=[5], labels=[6, 7, 3], row=row), Example(input_ids=[5, 6], labels=[3], row=row)]
    batch = pad(two, words, mode="seq2seq", side="left")
    assert batch["input_ids"].tolist() == [[0, 5], [5, 6]] and batch["labels"].tolist() == [[6, 7, 3], [3, -100, -100]]


def test_bad_batches(bpe: PreTrainedTokenizerBase, words: PreTrainedTokenizerBase) -> None:
    import copy

    for empty in (lambda: pad([], bpe), lambda: flatten([])):
        with pytest.raises(DataError, match="empty batch"):
            empty()
    with pytest.raises(ConfigError, match="decoders only"):
        Collator(bpe, packed=True, mode="seq2seq")
    bare = copy.deepcopy(words)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        Collator(bare)
    with pytest.raises(
        DataError, match=r"a\.jsonl row 0: 9 tokens do not fit a pack of 8; raise max_length or set truncate"
    ):
        pack(examples(9), 8)
    with pytest.raises(DataError, match="9 tokens do not fit"):
        bins([9], 8)
    with pytest.raises(ConfigError, match="batch size 0"):
        order([1], 0, 0, 0)


def test_truncate() -> None:
    cut = truncate(example(9), 4)
    assert cut.input_ids == example(9).input_ids[:4] and cut.labels == example(9).labels[:4]
    assert truncate(example(3), 4) == example(3)
    row = example(3).row
    head = truncate(
        Example(input_ids=[2, 7, 8, 9, 3], labels=[1], row=row, token_type_ids=[0, 0, 1, 1, 1]), 3, "classification"
    )
    assert (head.input_ids, head.token_type_ids, head.labels) == ([2, 7, 3], [0, 0, 1], [1])
    both = truncate(Example(input_ids=[1, 2, 3], labels=[4, 5, 6], row=row), 2, "seq2seq")
    assert (both.input_ids, both.labels) == ([1, 2], [4, 5])


# Packing ----------------------------------------------------------------------------------------------------------

PACKING = [
    (name, how)
    for name in ("llama", "gpt2", "gemma2", "mixtral")
    for how in ("sdpa", "eager")
    if (name, how) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("name", "attention"), PACKING)
def test_packed_equals_alone(name: str, attention: str) -> None:
    """Logits, the loss over all trained tokens and its gradients, against each example run by itself."""
    model, ones = model_of(name, attention), examples(6, 1, 9, 4)
    check_packing(model)
    batch = flatten(ones)
    segments = batch.pop("segments")
    packed = model(**batch)
    separate = [alone(model, one) for one in ones]
    torch.testing.assert_close(packed.logits[0], torch.cat(separate), atol=1e-5, rtol=1e-5)
    packed.loss.backward()
    gradient = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = [
        (logits[:-1], torch.tensor(one.labels[1:], dtype=torch.long))
        for logits, one in zip(separate, ones, strict=True)
    ]
    flat = torch.cat([w for w, _ in wanted]), torch.cat([t for _, t in wanted])
    loss = torch.nn.functional.cross_entropy(*flat, ignore_index=-100)
    torch.testing.assert_close(packed.loss, loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[key], parameter.grad, atol=1e-5, rtol=1e-4)
    assert sum(length for _, length in segments) == batch["input_ids"].shape[1]


@pytest.mark.parametrize("wrong", [{"use_cache": True}, {"attention_mask": torch.ones(1, 10, dtype=torch.long)}])
def test_why_the_batch_says_what_it_says(wrong: dict[str, Any]) -> None:
    """With a cache, or with a mask of ones, transformers lets the segments see each other. If this fails, simplify."""
    model, ones = model_of("llama", "sdpa"), examples(6, 4)
    batch = flatten(ones)
    batch.pop("segments")
    mixed = model(**batch | wrong).logits[0, 6:]
    assert (mixed - alone(model, ones[1])).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon", "bert", "t5", "bart"])
def test_models_that_cannot_pack_are_refused(name: str) -> None:
    if name not in tiny.MODELS:
        pytest.skip(f"no tiny {name}")
    with pytest.raises(ConfigError, match=r"lets packed examples see each other.*turn packing off"):
        check_packing(tiny.tiny(name))


def test_check_packing_leaves_the_model_alone() -> None:
    model = tiny.tiny("llama").train()
    model.get_input_embeddings().eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    check_packing(model)
    assert modes == [module.training for module in model.modules()] and torch.equal(state, torch.get_rng_state())


def test_check_packing_in_half_precision() -> None:
    check_packing(tiny.tiny("llama").to(torch.bfloat16))
    with pytest.raises(ConfigError):
        check_packing(tiny.tiny("opt").to(torch.bfloat16))


def test_bins_are_first_fit_decreasing() -> None:
    chance = random.Random(0)
    for capacity in (8, 50, 128):
        lengths = [chance.randrange(1, capacity + 1) for _ in range(300)]
        plain: list[tuple[int, list[int]]] = []  # the textbook's loop
        for number in sorted(range(300), key=lambda n: -lengths[n]):
            place = next((i for i, (used, _) in enumerate(plain) if used + lengths[number] <= capacity), None)
            if place is None:
                plain.append((lengths[number], [number]))
            else:
                plain[place] = (plain[place][0] + lengths[number], [*plain[place][1], number])
        assert bins(lengths, capacity) == [numbers for _, numbers in plain]
    assert bins([], 8) == []


def test_pack_holds_every_example_once() -> None:
    ones = examples(*(random.Random(1).randrange(1, 20) for _ in range(50)))
    packs = pack(ones, 20)
    assert all(p["input_ids"].shape[1] <= 20 for p in packs)
    tokens = sorted(t for p in packs for t in p["input_ids"][0].tolist())
    assert tokens == sorted(t for one in ones for t in one.input_ids)
    assert len(packs) <= -(-sum(map(len, ones)) // 20) * 1.3


# Order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False])
def test_order(group: bool) -> None:
    lengths = [random.Random(n).randrange(5, 200) for n in range(1003)]
    batches = order(lengths, 8, seed=1, epoch=2, group=group)
    assert sorted(n for batch in batches for n in batch) == list(range(1003))
    assert [len(b) for b in batches] == [8] * 125 + [3]
    assert batches == order(lengths, 8, seed=1, epoch=2, group=group)
    assert batches != order(lengths, 8, seed=1, epoch=3, group=group) != order(lengths, 8, seed=2, epoch=2, group=group)
    waste = sum(len(b) * max(lengths[n] for n in b) for b in batches) / sum(lengths)
    assert (waste < 1.1) == group
    assert order([], 8, 0, 0) == []


def test_packed_order() -> None:
    lengths = [random.Random(n).randrange(5, 60) for n in range(200)]
    batches = packed_order(lengths, 64, seed=0, epoch=0)
    assert sorted(n for batch in batches for n in batch) == list(range(200))
    assert max(sum(lengths[n] for n in batch) for batch in batches) <= 64
    assert batches == packed_order(lengths, 64, seed=0, epoch=0) != packed_order(lengths, 64, seed=0, epoch=1)


def test_data_loader_resumes(bpe: PreTrainedTokenizerBase) -> None:
    ones = examples(*(3 + n % 7 for n in range(20)))
    for max_length in (None, 24):
        sampler = LengthGrouped([len(one) for one in ones], 4, seed=5, max_length=max_length)
        sampler.set_epoch(1)
        collator = Collator(bpe, packed=max_length is not None)
        seen = [batch["input_ids"] for batch in DataLoader(ones, batch_sampler=sampler, collate_fn=collator)]  # type: ignore[arg-type]
        again = [collator([ones[n] for n in batch])["input_ids"] for batch in sampler.batches()]
        assert len(seen) == len(sampler) == len(again)
        assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))


def test_an_encoder_decoder_needs_as_many_end_tokens_in_each_row(words: PreTrainedTokenizerBase) -> None:
    def rows(*texts: str) -> list[Example]:
        made = [Row(form="label", index=n, source="a.jsonl", text=text, label="x") for n, text in enumerate(texts, 1)]
        return Template(mode="classification", label_names=("x",)).examples(made, words)

    config = tiny.tiny("t5", eos_token_id=words.eos_token_id).config
    good, twice = rows("the fox", "the quick fox"), rows("the fox", "the [SEP] fox")
    check_ends(good, words, config)
    check_ends([], words, config)
    check_ends(twice[1:], words, config)
    with pytest.raises(DataError, match=r"^a\.jsonl row 2: 2 end tokens \[SEP\], another row has 1") as caught:
        check_ends(twice, words, config)
    assert "\n" not in str(caught.value)
    none = [dataclasses.replace(one, input_ids=one.input_ids[:-1]) for one in good]
    with pytest.raises(DataError, match=r"^a\.jsonl row 1: no end token \[SEP\]"):
        check_ends(none, words, config)
    check_ends(none, words, tiny.tiny("bert").config)  # reads no end token
