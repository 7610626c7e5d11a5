"""Pseudo-tokens anywhere in the input: against rows put into the embeddings by hand, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft import SLOT
from tiny import EOS, IDS, PAD, batch, tiny

P = 3
SHAPE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG = BertConfig(**IDS, **SHAPE, num_attention_heads=4, initializer_range=0.2)
METHOD = graft.PTuning(length=P, hidden=5, encoder="lstm")


def placed(data: dict[str, Tensor], places: tuple[int, ...] = (1, 3, 3)) -> dict[str, Tensor]:
    """Each row with a pseudo-token before its tokens `places` (clipped to its length), moved on by its number."""
    rows = []
    for b, (ids, mask) in enumerate(zip(data["input_ids"], data["attention_mask"], strict=True)):
        row = ids[mask.bool()].tolist()
        for n, place in enumerate(places):
            row.insert(min(place + n + b, len(row)), SLOT)
        rows.append(torch.tensor(row))
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"input_ids": ids_BT, "attention_mask": (ids_BT != PAD).long()}


def by_hand(hand: Any, ids_BT: Tensor, h_PD: Tensor) -> Tensor:
    """E[b, pos(b, i)] = h_i, one row and one pseudo-token after the other."""
    emb = hand.get_input_embeddings()(ids_BT.clamp(min=0)).clone()
    for b, ids in enumerate(ids_BT):
        for i, place in enumerate((ids == SLOT).nonzero().flatten().tolist()):
            emb[b, place] = h_PD[i]
    return emb


def rows_of(model: Any, name: str = "a") -> Tensor:
    (delta,) = (d for _, d in model.adapters[name].items() if hasattr(d, "rows_PD"))
    return delta.rows_PD()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bert", "mt5", "bart"])
def test_rows_stand_where_the_ids_say(arch: str) -> None:
    model, hand = adapted(arch, graft.PTuning(length=P, hidden=5, head=False)), lively(arch)
    data = placed(data_of(arch))
    extra = {"labels": batch(arch, 3)["labels"]} if arch in ("mt5", "bart") else {}
    decoder = arch in ("llama", "gpt2", "gemma3")
    ready = graft.prepare(model, {**data, **extra, **({"labels": data["input_ids"]} if decoder else {})})
    assert ready["input_ids"].shape == data["input_ids"].shape and bool((ready["input_ids"] >= 0).all())
    actual = model(**ready).logits
    emb = by_hand(hand, data["input_ids"], rows_of(model))
    expected = hand(inputs_embeds=emb, attention_mask=data["attention_mask"], **extra).logits
    if decoder:
        seen = data["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    close(actual, expected)


@pytest.mark.parametrize("arch", ["llama", "bert", "mt5"])
def test_moving_pseudo_tokens_changes_the_logits(arch: str) -> None:
    model, data = adapted(arch, METHOD), data_of(arch, rows=1)
    extra = {key: value for key, value in data.items() if key == "labels"}
    moved = model(**graft.prepare(model, {**placed(data), **extra})).logits
    far(moved[:, -1:], model(**graft.prepare(model, data)).logits[:, -1:])


def test_marks_in_front_are_the_same_as_none() -> None:
    model, data = adapted("llama", METHOD), data_of("llama")
    ids = torch.cat([torch.full((3, P), SLOT), data["input_ids"]], 1)
    marked = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    one, two = graft.prepare(model, marked), graft.prepare(model, data)
    assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_rows_equal_each_alone(padding: str) -> None:
    """Marks in a row, marks in a row of the base (left out), slots in front, and an adapter without a prompt."""
    model = adapted("llama", METHOD)
    perturb(graft.attach(model, graft.PromptTuning(length=2), "front"), 3)
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 4)
    data, plain = placed(data_of("llama", rows=2)), data_of("llama", rows=4)
    rows, texts = ["a", None, "front", ("lora", "a")], []
    for i, source in enumerate((data, data, plain, data)):
        row = source["input_ids"][i % 2]
        texts.append(row[row != PAD])
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    mixed: dict[str, Tensor] = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if padding == "right":
        mixed["labels"] = ids.masked_fill(ids == PAD, -100)
    with graft.route(model, rows):
        ready = graft.prepare(model, mixed)
        logits = model(**ready).logits
    lengths = [len(text) + more for text, more in zip(texts, (0, -P, 2, 0), strict=True)]
    assert ready["attention_mask"].sum(-1).tolist() == lengths
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if row is None:
            text = text[text != SLOT]
        with graft.route(model, [row]):
            alone = model(**graft.prepare(model, {"input_ids": text[None]})).logits[0]
        close(logits[i][ready["attention_mask"][i].bool()], alone)
        if row is None:
            close(alone, lively("llama")(text[None]).logits[0])


def test_packed_segments_equal_each_alone() -> None:
    model = adapted("llama", METHOD)
    rows = [row[row != PAD] for row in placed(data_of("llama"))["input_ids"]]
    packed = {"input_ids": torch.cat(rows)[None], "labels": torch.cat(rows)[None]}
    segments = [(entry, len(row)) for entry, row in zip(["a", None, "a"], rows, strict=True)]
    ready = graft.prepare(model, packed, segments=segments)
    segments = ready.pop("segments")
    assert [length for _, length in segments] == [len(rows[0]), len(rows[1]) - P, len(rows[2])]
    assert not ((ready["labels"] == SLOT).any() or (ready["input_ids"] == SLOT).any())
    labels = ready.pop("labels")
    with graft.route(model, segments=segments):
        logits = model(**ready, use_cache=False).logits[0]
    assert labels.shape == (1, len(logits)) and int((labels == -100).sum()) == 2 * P
    for entry, row, piece in zip(["a", None, "a"], rows, logits.split([n for _, n in segments]), strict=True):
        with graft.route(model, [entry]):
            close(piece, model(**graft.prepare(model, {"input_ids": row[None]})).logits[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mt5"])
def test_generate_equals_teacher_forcing(arch: str) -> None:
    model, data = adapted(arch, METHOD), placed(data_of(arch, rows=2))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    out = model.generate(**graft.prepare(model, data), **options)
    for b in range(2):
        text = data["input_ids"][b][data["input_ids"][b] != PAD]
        new = out[b, -5:]
        if arch == "mt5":
            inputs = graft.prepare(model, {"input_ids": text[None]})
            logits = model(**inputs, decoder_input_ids=out[b : b + 1, :-1]).logits
        else:
            logits = model(**graft.prepare(model, {"input_ids": torch.cat([text, new[:-1]])[None]})).logits
        logits[..., EOS] = -torch.inf
        assert new.tolist() == logits[0, -5:].argmax(-1).tolist()


def test_the_pooler_reads_cls_in_front_of_pseudo_tokens() -> None:
    """[CLS] P text: index 0 is the first real token, and stays what is read."""
    model, hand = adapted("bert", graft.PTuning(length=2, hidden=5, head=False)), lively("bert")
    ids = torch.tensor([[7, SLOT, SLOT, 11, 12, 13]])
    emb = by_hand(hand, ids, rows_of(model))
    close(model(**graft.prepare(model, {"input_ids": ids})).logits, hand(inputs_embeds=emb).logits)


def test_cloze_on_bert() -> None:
    """[CLS] P [MASK] P subject P [SEP]: the word that the verbalizer gives at [MASK] trains the encoder."""
    cls, mask, sep, good, bad = 6, 5, 4, 40, 41
    torch.manual_seed(0)
    model, hand = BertForMaskedLM(CONFIG).eval(), BertForMaskedLM(CONFIG).eval()
    hand.load_state_dict(model.state_dict())
    adapter = perturb(graft.attach(model, METHOD, "a"), 1, 0.3)
    ids = torch.tensor([[cls, SLOT, mask, SLOT, 20, 21, SLOT, sep], [cls, SLOT, mask, SLOT, 22, SLOT, sep, PAD]])
    labels = torch.full_like(ids, -100).masked_fill(ids == mask, good)
    data = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
    ready = graft.prepare(model, data)
    assert torch.equal(ready["labels"], labels) and "position_ids" not in ready
    out = model(**ready)
    emb = by_hand(hand, ids, rows_of(model))
    expected = hand(inputs_embeds=emb, attention_mask=data["attention_mask"], labels=labels)
    close(out.logits[ids == mask], expected.logits[ids == mask])
    close(out.loss, expected.loss)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for _ in range(60):
        model(**ready).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model(**ready).logits[ids == mask][:, [good, bad]]
    assert logits.argmax(-1).tolist() == [0, 0] and model(**ready).loss < 0.5 * out.loss


def test_spans_move_with_the_tokens() -> None:
    """Start and end of an answer, where slots come in front and where they stand already."""
    model = BertForQuestionAnswering(CONFIG).eval()
    graft.attach(model, graft.PTuning(length=2, head=False), "a")
    ids = torch.tensor([[10, 11, 12, 13, 14], [SLOT, 10, SLOT, 11, 12], [10, SLOT, 11, SLOT, 12]])
    spans = {"start_positions": torch.tensor([1, 3, 2]), "end_positions": torch.tensor([2, 4, 4])}
    with graft.route(model, ["a", "a", None]):
        ready = graft.prepare(model, {"input_ids": ids, **spans})
    assert ready["start_positions"].tolist() == [3, 3, 1] and ready["end_positions"].tolist() == [4, 4, 2]
    assert ready["input_ids"][2].tolist() == [10, 11, 12, PAD, PAD, PAD, PAD]


def test_no_real_token_is_taken_for_a_slot() -> None:
    """The id that fills slots is none of the batch's: batches which differ in their places differ in ids."""
    model = adapted("llama", graft.PTuning(length=1, hidden=5))
    first, second = ({"input_ids": torch.tensor([ids])} for ids in ([3, SLOT, 11], [SLOT, 3, 11]))
    one, two = graft.prepare(model, first), graft.prepare(model, second)
    assert not torch.equal(one["input_ids"], two["input_ids"])
    far(model(**one).logits[0, -1], model(**two).logits[0, -1])


def test_refusals() -> None:
    model = adapted("llama", METHOD)
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 4)
    two = {"input_ids": torch.tensor([[10, SLOT, 11, SLOT, 12]])}
    with pytest.raises(graft.RouteError, match="row 1 holds 2 pseudo-tokens and the soft prompt of its entry 3"):
        graft.prepare(model, two, ["a"])
    with pytest.raises(graft.RouteError, match="row 1 holds 2 pseudo-tokens and the soft prompt of its entry 0"):
        graft.prepare(model, two, ["lora"])
    with pytest.raises(graft.RouteError, match=r"segment 2 holds 2 pseudo-tokens .* 3"):
        graft.prepare(model, {"input_ids": two["input_ids"].repeat(1, 2)}, segments=[(None, 5), ("a", 5)])
    with pytest.raises(graft.RouteError, match=r"call graft\.prepare"):
        model(input_ids=torch.tensor([[10, SLOT, SLOT, SLOT]]))
    late = torch.tensor([[SLOT, SLOT, 10, 11, SLOT]])
    with pytest.raises(graft.RouteError, match="row 1 has a pseudo-token behind its last label"):
        graft.prepare(model, {"input_ids": late, "labels": late})
    with pytest.raises(graft.RouteError, match="segment 1 has a pseudo-token behind its last label"):
        graft.prepare(model, {"input_ids": late, "labels": late}, segments=[("a", 5)])
    graft.prepare(model, {"input_ids": late, "labels": torch.full_like(late, -100)})  # nothing trains: nothing is lost
    bert = tiny("bert")
    graft.attach(bert, METHOD)
    graft.prepare(bert, {"input_ids": late})  # an encoder sees them all
