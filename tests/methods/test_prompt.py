"""Prompt tuning against rows put in front of the embeddings by hand, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import adapted, close, copy_into, data_of, far, lively, peft_twin

import graft
from graft.method import from_dict
from tiny import PAD, tiny

WORDS = {"good": [7], "very bad": [8, 10], "so so": [20, 21, 23], "": []}


class Words:
    """A tokenizer of four texts."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(WORDS[text]) if not add_special_tokens else [1, *WORDS[text], 2]}


def rows(**settings: Any) -> Tensor:
    """The prompt right after attach, on a tiny Llama."""
    torch.manual_seed(0)
    (delta,) = (delta for _, delta in graft.attach(tiny("llama"), graft.PromptTuning(**settings)).items())
    return delta.rows_PD().detach()


def test_random_rows_are_uniform() -> None:
    prompt = rows(length=200)
    assert prompt.shape == (200, 32) and prompt.dtype == torch.float32
    assert 0.49 < prompt.max() <= 0.5 and -0.5 <= prompt.min() < -0.49 and prompt.mean().abs() < 0.02


def test_vocab_rows_are_distinct_embeddings() -> None:
    table = tiny("llama").get_input_embeddings().weight
    found = [int((table == row).all(-1).nonzero()) for row in rows(length=50, init="vocab")]
    assert len(set(found)) == 50


def test_text_rows_are_repeated_or_cut() -> None:
    table = tiny("llama").get_input_embeddings().weight
    for length, ids in ((2, [20, 21]), (5, [20, 21, 23, 20, 21]), (6, [20, 21, 23] * 2)):
        assert torch.equal(rows(length=length, init="text", text="so so", tokenizer=Words()), table[ids])


def test_label_rows_are_means() -> None:
    table = tiny("llama").get_input_embeddings().weight
    prompt = rows(length=4, init="labels", labels=("good", "very bad"), tokenizer=Words())
    close(prompt[:2], torch.stack([table[7], table[[8, 10]].mean(0)]))
    assert all((table == row).all(-1).any() for row in prompt[2:])


def test_rows_share_no_storage_with_the_base() -> None:
    model = tiny("llama")
    before = model.get_input_embeddings().weight.clone()
    adapter = graft.attach(model, graft.PromptTuning(length=3, init="vocab"))
    with torch.no_grad():
        next(adapter.parameters()).fill_(9.0)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"init": "words"}, "init is one of"),
        ({"init": "text"}, "needs text"),
        ({"init": "labels"}, "needs labels"),
        ({"init": "text", "text": "good"}, "needs tokenizer"),
        ({"init": "text", "text": "", "tokenizer": Words()}, "needs text"),
        ({"length": 1, "init": "labels", "labels": ("good", "so so"), "tokenizer": Words()}, "do not fit"),
        ({"length": 0}, "at least 1"),
        ({"layers": 1}, "no meaning"),
    ],
)
def test_errors(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(graft.ConfigError, match=match):
        graft.attach(tiny("llama"), graft.PromptTuning(**settings))


def test_json_leaves_the_tokenizer_out() -> None:
    method = graft.PromptTuning(length=3, init="text", text="good", tokenizer=Words())
    assert method.to_dict() == {"method": "prompt_tuning", "length": 3, "init": "text", "text": "good"}
    assert from_dict(method.to_dict()) == method


# ---------------------------------------------------------------------------------------------------------- prepare

IDS = torch.tensor([[11, 12, 13, PAD], [14, 15, PAD, PAD]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_prepare_pads_right_when_there_are_labels() -> None:
    model = adapted("llama", graft.PromptTuning(length=2))
    slot = 3  # the first id that no config field names
    labels = torch.tensor([[11, 12, 13, -100], [-100, 15, -100, -100]])
    out = graft.prepare(model, {"input_ids": IDS, "attention_mask": MASK, "labels": labels}, ["a", None])
    assert out["input_ids"].tolist() == [[slot, slot, 11, 12, 13], [14, 15, PAD, PAD, PAD]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert out["labels"].tolist() == [[-100, -100, 11, 12, 13], [-100, 15, -100, -100, -100]]
    assert out["position_ids"][0].tolist() == [0, 1, 2, 3, 4] and out["position_ids"][1, :2].tolist() == [0, 1]


def test_prepare_pads_left_without_labels() -> None:
    model = adapted("llama", graft.PromptTuning(length=2))
    out = graft.prepare(model, {"input_ids": IDS, "attention_mask": MASK}, [None, "a"])
    assert out["input_ids"].tolist() == [[PAD, 11, 12, 13], [3, 3, 14, 15]]
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert out["position_ids"][0, 1:].tolist() == [0, 1, 2] and out["position_ids"][1].tolist() == [0, 1, 2, 3]
    assert "labels" not in out


def test_prepare_moves_the_encoders_input_alone() -> None:
    model, data = adapted("mt5", graft.PromptTuning(length=2)), data_of("mt5")
    out = graft.prepare(model, data)
    assert out["input_ids"].shape[1] == data["input_ids"].shape[1] + 2
    assert torch.equal(out["labels"], data["labels"]) and "position_ids" not in out


def test_prepare_without_soft_prompts_is_the_batch_itself() -> None:
    model, data = adapted("llama", graft.LoRA()), data_of("llama")
    assert graft.prepare(model, data) is data
    gap = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])}
    graft.attach(model, graft.PromptTuning(length=2), "p")
    with pytest.raises(graft.RouteError, match="gap"):
        graft.prepare(model, gap, ["p", "p"])


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_bare_ids_are_refused(arch: str) -> None:
    model, data = adapted(arch, graft.PromptTuning(length=2)), data_of(arch)
    with pytest.raises(graft.RouteError, match=r"graft\.prepare"):
        model(**data)
    if arch == "llama":
        with pytest.raises(graft.RouteError, match=r"graft\.prepare"):
            model.generate(input_ids=data["input_ids"], max_new_tokens=2, pad_token_id=PAD)
    with graft.route(model, [None]):
        close(model(**data).logits, lively(arch)(**data).logits)


# ---------------------------------------------------------------------------------------------------- by hand, peft


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mt5", "bart"])
def test_rows_stand_in_front_of_the_embeddings(arch: str) -> None:
    model, data = adapted(arch, graft.PromptTuning(length=3)), data_of(arch)
    hand = lively(arch)
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    emb = hand.get_input_embeddings()(data["input_ids"])
    emb = torch.cat([delta.rows_PD().expand(len(emb), -1, -1), emb], 1)
    mask = torch.cat([torch.ones(len(emb), 3, dtype=torch.long), data["attention_mask"]], 1)
    expected = hand(inputs_embeds=emb, attention_mask=mask, labels=data.get("labels")).logits
    ready = graft.prepare(model, {**data, "labels": data.get("labels", data["input_ids"])})  # labels: pads right
    actual = model(**ready).logits
    if arch in ("mt5", "bart"):
        close(actual, expected)
    else:
        assert actual.shape == expected.shape
        close(actual[mask.bool()], expected[mask.bool()])


def test_a_classifier_pools_behind_the_slots() -> None:
    """BERT reads index 0; with P rows in front it shall read the first real token, at index P."""
    model, data = adapted("bert", graft.PromptTuning(length=3, head=False)), data_of("bert")
    hand = lively("bert")
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    emb = hand.bert.embeddings.word_embeddings(data["input_ids"])
    emb = torch.cat([delta.rows_PD().expand(len(emb), -1, -1), emb], 1)
    mask = torch.cat([torch.ones(len(emb), 3, dtype=torch.long), data["attention_mask"]], 1)
    hidden = hand.bert(inputs_embeds=emb, attention_mask=mask).last_hidden_state
    expected = hand.classifier(torch.tanh(hand.bert.pooler.dense(hidden[:, 3])))
    close(model(**graft.prepare(model, data)).logits, expected)


@pytest.mark.parametrize(
    ("arch", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("mt5", "SEQ_2_SEQ_LM")],
)
def test_equals_peft(arch: str, task: str) -> None:
    import peft

    model, data = adapted(arch, graft.PromptTuning(length=3, head=False), peft_compat=True), data_of(arch)
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    other = peft_twin(arch, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    copy_into(other.prompt_encoder["default"].embedding.weight, delta.prompt)
    assert delta.prompt.shape[0] == (6 if arch == "mt5" else 3)
    ready = graft.prepare(model, data if arch in ("bert", "mt5") else {**data, "labels": data["input_ids"]})
    actual, expected = model(**ready).logits, other(**data).logits
    far(expected[..., :1, :], lively(arch)(**data).logits[..., :1, :])
    if arch in ("llama", "gpt2"):
        seen = ready["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    close(actual, expected)


def test_encoder_decoders_hold_p_rows_that_all_train() -> None:
    model, data = adapted("mt5", graft.PromptTuning(length=3)), data_of("mt5")
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    model(**graft.prepare(model, data)).loss.backward()
    assert delta.prompt.shape == (3, 32) and bool((delta.prompt.grad.abs().sum(-1) > 0).all())


def test_gradients_are_the_same_bits_every_time() -> None:
    """With several threads: rows gathered by plain indexing sum their gradients in any order."""
    torch.manual_seed(0)
    model = tiny("llama", hidden_size=128)
    attached = graft.attach(model, graft.PromptTuning(length=4))
    data = graft.prepare(model, data_of("llama", labels=True, rows=64))
    (prompt,) = (delta.prompt for _, delta in attached.items())
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(8):
            prompt.grad = None
            model(**data).loss.backward()
            found.append(prompt.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for each in found[1:])
