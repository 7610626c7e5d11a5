"""Runs whose template places pseudo-tokens: trained, evaluated, generated from and chatted with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graft
from graft import base, files
from graft.chat import Chat
from graft.data.rows import load_rows
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate.generate import Decoding, generate
from graft.evaluate.run import examine
from graft.ids import SLOT
from graft.train.config import Run
from graft.train.run import data_report, train

Settings = Callable[..., Run]
PLACED = "{slots:2} {prompt} {slots:3} answer:"
METHOD = {"method": "p_tuning", "length": 5, "encoder": "lstm", "hidden": 8, "dropout": 0.1}
PLAIN = {"kind": "plain", "templates": [PLACED]}


def quiet(run: Run) -> Any:
    return train(run, console=Console(quiet=True))


def opened(run: Run, result: Any) -> tuple[Any, Any, Template]:
    """A fresh base with the saved adapter, as any later command has it."""
    model, tokenizer = base.load_base(run.base, precision="fp32"), base.load_tokenizer(run.base)
    files.load(model, result.adapter, "a")
    return model, tokenizer, Template.from_dict(files.read_card(result.adapter)["template"])


@pytest.mark.parametrize(("kind", "packing"), [("llama", True), ("gpt2", False), ("t5", False)])
def test_a_run_and_what_it_leaves(kind: str, packing: bool, settings: Settings) -> None:
    """The loss that the run says is that of each row by itself, with the rows put into the embeddings by hand."""
    run = settings(kind, data={"template": PLAIN, "packing": packing}, method=METHOD)
    result = quiet(run)
    assert result.saved == 5 * 32 < result.trainable
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert json.loads((result.adapter / "adapter_config.json").read_text())["peft_type"] == "GRAFT_P_TUNING"
    model, tokenizer, template = opened(run, result)
    hand = base.load_base(run.base, precision="fp32")
    (delta,) = (delta for _, delta in model.adapters["a"].items())
    sums, count = {"a": 0.0, "base": 0.0}, 0
    rows = load_rows(str(run.data.eval))
    for row in rows:
        example = template.example(row, tokenizer)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        emb = hand.get_input_embeddings()(ids.clamp(min=0)).clone()
        emb[0, ids[0] == SLOT] = delta.rows_PD()
        text = ids != SLOT
        base_labels = labels if kind == "t5" else labels[text][None]
        tokens = int((labels[:, 0 if kind == "t5" else 1 :] != -100).sum())
        count += tokens
        with torch.no_grad():
            sums["a"] += float(hand(inputs_embeds=emb, labels=labels).loss) * tokens
            sums["base"] += float(hand(ids[text][None], labels=base_labels).loss) * tokens
    assert result.metrics["eval_loss"] == pytest.approx(sums["a"] / count, abs=2e-4)
    scores = examine(model, tokenizer, rows, template, [None, "a"], ["loss"]).scores
    for name, total in sums.items():  # the base reads the text without pseudo-tokens
        assert scores[name]["loss"] == pytest.approx(total / count, abs=2e-4)


def test_answers_beside_the_base(settings: Settings) -> None:
    """In one batch with the base, and in a conversation; the base reads no pseudo-token, with adapters or without."""
    run = settings(data={"template": PLAIN, "eval": None}, method=METHOD)
    model, tokenizer, template = opened(run, quiet(run))
    rows, decoding = load_rows(run.data.train)[:4], Decoding(max_new_tokens=5)
    found = generate(model, tokenizer, rows, template, [None, "a"], decoding=decoding)
    for row, text in zip(rows, found["a"], strict=True):
        ids = torch.tensor([template.prompt_ids(row, tokenizer)])
        ready = graft.prepare(model, {"input_ids": ids})
        out = model.generate(**ready, max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=0)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == text
    plain = base.load_base(run.base, precision="fp32")
    assert generate(plain, tokenizer, rows, template, decoding=decoding)["base"] == found["base"]
    said: list[str] = []
    chat = Chat(model, tokenizer, {"a": template, None: template}, said.append, entry="a", decoding=decoding)
    answer = chat.reply(rows[0].prompt)
    assert answer.split() == found["a"][0].split()


def test_a_classifier_with_pseudo_tokens_in_its_text(settings: Settings, sources: dict[str, str]) -> None:
    template = {"mode": "classification", "templates": ["{slots:2} {text} {slots:1}"]}
    data = {"train": sources["labels"], "eval": 0.2, "template": template}
    run = settings("bert", data=data, method={**METHOD, "length": 3})
    result = quiet(run)
    model = base.load_base(run.base, precision="fp32", num_labels=2)
    files.load(model, result.adapter, "a")
    again = Template.from_dict(files.read_card(result.adapter)["template"])
    assert again.slots == 3 and again.label_names == ("bad", "good")
    example = again.example(load_rows(sources["labels"])[0], base.load_tokenizer(run.base))
    ids = torch.tensor([example.input_ids])
    ready = graft.prepare(model, {"input_ids": ids})
    assert ready["input_ids"].shape == ids.shape and model(**ready).logits.shape == (1, 2)


def test_prompt_tuning_takes_the_same_templates(settings: Settings) -> None:
    run = settings(data={"template": PLAIN}, method={"method": "prompt_tuning", "length": 5, "init": "vocab"})
    result = quiet(run)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ({**METHOD, "length": 4}, r"5 pseudo-tokens, and method\.length is 4 \(p_tuning\)"),
        ({"method": "lora"}, "5 pseudo-tokens, lora gives none"),
        ({"method": "prefix_tuning", "length": 5}, "5 pseudo-tokens, prefix_tuning gives none"),
    ],
)
def test_the_count_must_be_the_methods(method: dict[str, Any], match: str, settings: Settings) -> None:
    run = settings(data={"template": PLAIN}, method=method)
    with pytest.raises(ConfigError, match=match):
        quiet(run)
    assert not (Path(run.output) / "run.yaml").exists()


def test_room_counts_them_once(settings: Settings, tmp_path: Path) -> None:
    """In front they come beside the row's tokens, in the template they are some of them."""
    longest = data_report(settings(data={"template": PLAIN})).train.longest
    data = {"template": {"kind": "plain", "templates": [f"{PLACED}{' a' * (127 - longest)}"]}}
    assert data_report(settings(data=data)).train.longest in (127, 128)
    quiet(settings(data=data, method=METHOD, train={"max_steps": 1}))
    with pytest.raises(DataError, match="it would lose pseudo-tokens"):
        short = {"template": PLAIN, "max_length": 5, "truncate": True}
        quiet(settings(data=short, method=METHOD, output=str(tmp_path / "short")))


def test_a_run_goes_on_bit_for_bit(settings: Settings, tmp_path: Path) -> None:
    """A checkpoint holds the encoder: a run that stopped ends where the whole one ends."""
    whole = quiet(settings(data={"template": PLAIN}, method=METHOD, output=str(tmp_path / "whole")))
    run = settings(data={"template": PLAIN}, method=METHOD, output=str(tmp_path / "cut"))

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, console=Console(quiet=True), callbacks=[Stop()])
    cut = quiet(run)
    ours, theirs = ((r.adapter / "adapter_model.safetensors").read_bytes() for r in (whole, cut))
    assert ours == theirs
