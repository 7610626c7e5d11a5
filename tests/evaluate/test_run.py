"""Losses, labels and scores of entries side by side, against the model's own loss and against brute force."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from speaking import adapted, rows_of, speaking
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

import graft
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate import score
from graft.evaluate.opening import open_base
from graft.evaluate.run import default_metrics, evaluate, examine

PLAIN = Template(kind="plain")


def own_loss(model: Any, tokenizer: Any, rows: list[Row], template: Template, entry: Any) -> float:
    """The mean token loss by the model's own loss function, row by row without padding."""
    graft.use(model, entry)
    total, tokens = 0.0, 0
    for example in template.examples(rows, tokenizer):
        batch = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
        batch = graft.prepare(model, batch)
        count = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_losses_equal_the_models_own(name: str, tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    model = adapted(speaking(name), lora=graft.LoRA(targets="all-linear"), soft=graft.PromptTuning(length=3))
    template = Template(kind="plain", mode="seq2seq" if model.config.is_encoder_decoder else "causal")
    entries = [None, "lora", "soft"]
    found = evaluate(model, tokenizer, prompts, template, entries, ["perplexity", "loss"], batch_size=2)
    for label, entry in zip(["base", "lora", "soft"], entries, strict=True):
        expected = own_loss(model, tokenizer, prompts, template, entry)
        assert found[label]["loss"] == pytest.approx(expected, abs=1e-5)
        assert found[label]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert len({round(scores["loss"], 4) for scores in found.values()}) == 3


def test_labels_by_the_likelihood_of_their_words(tokenizer: PreTrainedTokenizerBase, labelled: list[Row]) -> None:
    model = adapted(speaking("llama"), 2.0, a=graft.LoRA(targets="all-linear"))
    words = {"positive": "good", "negative": "bad"}  # one token each: neither wins by its length
    template = Template.from_dict({"kind": "plain", "templates": ["{text}. This is"], "verbalizer": words})
    found = examine(model, tokenizer, labelled, template, [None, "a"], ["accuracy", "macro_f1"], batch_size=2)
    for label, entry in {"base": None, "a": "a"}.items():
        brute = []
        for row in labelled:
            scores = {}
            for word in words:
                one = [dataclasses.replace(row, label=word)]
                example = template.examples(one, tokenizer)[0]
                trained = sum(token != -100 for token in example.labels)
                scores[word] = -trained * own_loss(model, tokenizer, one, template, entry)
            brute.append(words[max(scores, key=lambda word: scores[word])])
        assert found.answers[label] == brute
        right = sum(chosen == words[str(row.label)] for chosen, row in zip(brute, labelled, strict=True)) / 5
        assert found.scores[label]["accuracy"] == pytest.approx(right)
    assert found.answers["base"] != found.answers["a"]


@pytest.mark.parametrize("name", ["bert", "llama_cls"])
def test_a_classification_head(name: str, tokenizer: PreTrainedTokenizerBase, labelled: list[Row]) -> None:
    model = adapted(speaking(name, num_labels=2), a=graft.LoRA())
    template = Template(mode="classification", label_names=("negative", "positive"))
    found = examine(model, tokenizer, labelled, template, [None, "a"], batch_size=2)
    for label, entry in {"base": None, "a": "a"}.items():
        graft.use(model, entry)
        chosen, losses = [], []
        for row in labelled:
            with torch.no_grad():
                logits = model(**tokenizer(row.text, return_tensors="pt")).logits[0]
            chosen.append(("negative", "positive")[int(logits.argmax())])
            losses.append(-float(logits.log_softmax(-1)[("negative", "positive").index(str(row.label))]))
        assert found.answers[label] == chosen
        assert found.scores[label]["loss"] == pytest.approx(sum(losses) / 5, abs=1e-5)
        assert set(found.scores[label]) == {"loss", "accuracy", "macro_f1"}
    with pytest.raises(ConfigError, match="the head has 2 outputs and the data 3 labels"):
        evaluate(model, tokenizer, labelled, Template(mode="classification", label_names=("negative", "positive", "x")))
    with pytest.raises(ConfigError, match="writes no text"):
        evaluate(model, tokenizer, labelled, template, metrics=["bleu"])


def test_a_random_head_is_called_so(tokenizer: PreTrainedTokenizerBase, labelled: list[Row], tmp_path: Path) -> None:
    model = adapted(graft.load_base("embedded", precision="fp32", num_labels=2), a=graft.LoRA())
    template = Template(mode="classification", label_names=("negative", "positive"))
    found = examine(model, tokenizer, labelled, template, [None, "a"])
    assert list(found.scores) == list(found.answers) == ["base (random head)", "a"]
    graft.save(model, "a", tmp_path / "a", template=template.to_dict())
    opened = open_base("embedded", {"a": str(tmp_path / "a")}, precision="fp32")
    again = evaluate(opened.model, tokenizer, labelled, template, [None, "a"])
    assert opened.random_head and list(again) == list(found.scores) and again["a"] == found.scores["a"]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    opened = open_base(str(tmp_path / "base"), {}, precision="fp32")
    assert not opened.random_head and list(evaluate(opened.model, tokenizer, labelled, template)) == ["base"]
    template = Template.from_dict({"kind": "plain", "templates": ["{text}"]})
    words = evaluate(graft.load_base("embedded", precision="fp32"), tokenizer, labelled, template, metrics=["accuracy"])
    assert list(words) == ["base"]


def test_rows_that_an_encoder_decoder_cannot_classify(tokenizer: PreTrainedTokenizerBase, labelled: list[Row]) -> None:
    config = speaking("t5", num_labels=2).config
    model = transformers.T5ForSequenceClassification(config).eval()
    template = Template(mode="classification", label_names=("negative", "positive"))
    with pytest.raises(DataError, match=r"rows\.jsonl row 1: no end token <\|end\|>"):
        evaluate(model, tokenizer, labelled, template)
    ended = [dataclasses.replace(row, text=f"{row.text}<|end|>") for row in labelled]
    assert set(evaluate(model, tokenizer, ended, template)["base"]) == {"loss", "accuracy", "macro_f1"}


def test_defaults_fit_the_rows(tokenizer: PreTrainedTokenizerBase, prompts: list[Row], tmp_path: Path) -> None:
    model = speaking("llama")
    scores = evaluate(model, tokenizer, prompts, PLAIN, max_new_tokens=3)["base"]
    assert list(scores) == ["loss", "perplexity", "exact_match", "bleu", "rouge_l"]
    text = rows_of(tmp_path, [{"text": "a cat"}, {"text": "a dog that ran"}])
    assert list(evaluate(model, tokenizer, text, PLAIN)["base"]) == ["loss", "perplexity"]


def test_all_references_count(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = speaking("llama")
    bare = rows_of(tmp_path, [{"prompt": "a red house", "completion": "x"}])
    says = examine(model, tokenizer, bare, PLAIN, metrics=["exact_match"], decoding=None).answers["base"][0]
    assert says
    rows = rows_of(tmp_path, [{"prompt": "a red house", "references": ["nothing", says]}])
    assert evaluate(model, tokenizer, rows, PLAIN, metrics=["exact_match"]) == {"base": {"exact_match": 1.0}}


def test_refusals_before_anything_runs(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speaking("llama")
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(DataError, match="no rows to evaluate"):
        evaluate(model, tokenizer, [], PLAIN)
    with pytest.raises(ConfigError, match="did you mean 'rouge_l'"):
        evaluate(model, tokenizer, prompts, PLAIN, metrics=["rouge"])
    with pytest.raises(DataError, match="accuracy and macro_f1 need a 'label' column"):
        evaluate(model, tokenizer, prompts, PLAIN, metrics=["accuracy"])
    with pytest.raises(ConfigError, match="needs a template of mode 'causal', not 'seq2seq'"):
        evaluate(model, tokenizer, prompts, Template(kind="plain", mode="seq2seq"))
    with pytest.raises(DataError, match="plain text has no prompt"):
        evaluate(model, tokenizer, rows_of(tmp_path, [{"text": "a"}]), PLAIN, metrics=["bleu"])
    cyrillic = rows_of(tmp_path, [{"prompt": "a cat", "completion": "кот"}])
    assert default_metrics(cyrillic, PLAIN) == ["loss", "perplexity", "exact_match", "bleu"]
    with pytest.raises(DataError, match=r"rouge_l: .*use bleu"):
        evaluate(model, tokenizer, cyrillic, PLAIN, metrics=["rouge_l"])


def test_rows_longer_than_the_context(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = speaking("gpt2", n_positions=16)
    rows = rows_of(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "the cat sat " * 9}])
    with pytest.raises(DataError, match=r"row 2: \d+ tokens, the context has 16"):
        evaluate(model, tokenizer, rows, PLAIN, metrics=["loss"])
    found = examine(model, tokenizer, rows, PLAIN, metrics=["loss"], truncate=True)
    assert math.isfinite(found.scores["base"]["loss"])


@pytest.mark.parametrize(("train_on", "begin"), [("completion", False), ("completion", True), ("all", False)])
def test_labels_of_rows_longer_than_the_context(
    train_on: str, begin: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt loses its beginning and keeps its begin token; the word stays whole, whichever is asked."""
    front = [tokenizer.bos_token_id] if begin else []
    if begin:
        tokenizer = copy.deepcopy(tokenizer)
        special: Any = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(f"{tokenizer.bos_token} $A", special_tokens=special)
    model = speaking("gpt2", n_positions=24)
    words = {"positive": "good", "negative": "really quite awful"}
    given = {"kind": "plain", "templates": ["{text}. This is"], "verbalizer": words, "train_on": train_on}
    template = Template.from_dict(given)
    texts = ["a cat", "red house sat " * 9, "bird and dog " * 9, "the end " * 9]
    rows = rows_of(tmp_path, [{"text": text, "label": "positive"} for text in texts])
    ids = {w: tokenizer(f" {w}", add_special_tokens=False).input_ids for w in words.values()}
    most = 24 - max(len(each) + 1 for each in ids.values())  # the end token
    right = []
    for row in rows:
        prompt = tokenizer(f"{row.text}. This is").input_ids
        assert (len(prompt) > most) == (row.index > 1) and prompt[: len(front)] == front
        kept = prompt if len(prompt) <= most else [*front, *prompt[len(front) - most :]]
        for word in words.values():
            answer = [*ids[word], tokenizer.eos_token_id]
            with torch.no_grad():
                logs_TV = model(torch.tensor([[*kept, *answer]])).logits[0].log_softmax(-1)
            right.append(-sum(float(logs_TV[len(kept) - 1 + n, token]) for n, token in enumerate(answer)))
    scored: list[list[score.Loss]] = []
    losses = score.losses
    monkeypatch.setattr(score, "losses", lambda *given, **more: scored.extend(f := losses(*given, **more)) or f)
    found = examine(model, tokenizer, rows, template, metrics=["accuracy"], truncate=True)
    assert [loss.total for pair in zip(*scored, strict=True) for loss in pair] == pytest.approx(right, abs=1e-3)
    best = [min(words.values(), key=dict(zip(words.values(), right[n : n + 2], strict=True)).get) for n in (0, 2, 4, 6)]  # type: ignore[arg-type]
    assert found.answers["base"] == best
    slots = Template.from_dict({**given, "templates": ["{slots:2} {text}. This is"]})
    adapted(model, soft=graft.PromptTuning(length=2))
    assert examine(model, tokenizer, rows, slots, [None], ["accuracy"], truncate=True).answers["base"]
    with pytest.raises(DataError, match=r"row 2: .* lose pseudo-tokens"):
        examine(model, tokenizer, rows, slots, ["soft"], ["accuracy"], truncate=True)


def test_a_word_that_is_longer_behind_another_prompt_has_room_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Behind a blank it is read without its own: 'negative' may be one token after a word, and two there."""
    words = {0: "bad", 1: "good"}
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (" bad", "bad", " good", "good")]
    assert max(map(len, ids[1::2])) > max(map(len, ids[::2]))
    template = Template.from_dict({"kind": "plain", "templates": ["{text}"], "verbalizer": words})
    texts = [("a cat", 0), ("red house sat " * 9, 1)]
    rows = rows_of(tmp_path, [{"text": text, "label": label} for text, label in texts])
    model = speaking("gpt2", n_positions=24)
    assert set(examine(model, tokenizer, rows, template, metrics=["accuracy"], truncate=True).answers["base"]) <= set(
        words.values()
    )


def test_progress_counts_every_row_of_every_entry(tokenizer: PreTrainedTokenizerBase, prompts: list[Row]) -> None:
    model = adapted(speaking("llama"), a=graft.LoRA())
    told: list[tuple[str, int, int]] = []
    settings: dict[str, Any] = {"progress": lambda *now: told.append(now), "batch_size": 3}
    examine(model, tokenizer, prompts, PLAIN, [None, "a"], ["loss"], **settings)
    assert told == [("likelihoods", 6, 10), ("likelihoods", 10, 10)]
