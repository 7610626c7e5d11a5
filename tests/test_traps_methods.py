"""What reviews found silently wrong in the methods beside LoRA: each was a wrong number without a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import graft
from examples import perturb
from tiny import batch, tiny


def test_a_head_replaced_after_the_attach_is_refused() -> None:
    model = tiny("llama")
    perturb(graft.attach(model, graft.LoRA(targets=("attention.query", "head")), "a"))
    model.resize_token_embeddings(104)
    with pytest.raises(graft.RouteError, match=r"were replaced after the first attach \(resize_token_embeddings"):
        model(**batch("llama"))


def test_a_whole_and_its_part_do_not_act_twice() -> None:
    model = tiny("llama")
    graft.attach(model, graft.Compose(graft.LoRA(), graft.IA3()), "a")
    with pytest.raises(graft.RouteError, match="whose part it is"):
        graft.use(model, ("a", "a/lora"))
    graft.use(model, ("a/ia3", "a/lora"))


def test_the_graph_goes_on_where_somebody_wants_its_gradient() -> None:
    """An adapter in the top block cuts the graph below while training; not the gradient of a weight or input there."""
    model = tiny("llama")
    perturb(graft.attach(model, graft.LoRA(layers=1), "a"))
    model.train()
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model(**batch("llama")).loss.backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0
    weight.requires_grad_(False)
    embedded = torch.randn(2, 5, 32, requires_grad=True)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().max() > 0
    model.enable_input_require_grads()
    held: dict[str, Any] = {}
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: held.update(graph=(args or tuple(kwargs.values()))[0].requires_grad),
        with_kwargs=True,
    )
    model(input_ids=batch("llama")["input_ids"])
    handle.remove()
    assert held == {"graph": False}


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (graft.AdaLoRA(rank=4, target_rank=2), "after_step, penalty"),
        (graft.LoRA(b_ratio=16.0), "rate"),
        (graft.LoRAFA(projected=True), "before_step"),
        (graft.LoRA(), ""),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_stock_trainer_is_told_what_it_leaves_out(
    method: Any, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    graft.attach(model, method, "a")
    rows = [{key: value[i].tolist() for key, value in batch("llama").items()} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    with caplog.at_level(logging.WARNING, logger="graft"):
        Trainer(model, args, train_dataset=rows).train()
    told = [record.getMessage() for record in caplog.records if "outside of GraftTrainer" in record.getMessage()]
    assert len(told) == bool(named) and all(named in text for text in told)
    caplog.clear()
    again = tiny("llama")
    graft.attach(again, method, "a")
    with caplog.at_level(logging.WARNING, logger="graft"):
        graft.GraftTrainer(again, args, train_dataset=rows).train()
    assert not [record for record in caplog.records if "outside of GraftTrainer" in record.getMessage()]


def test_a_setting_that_is_no_number() -> None:
    for made in (lambda: graft.Bottleneck(scale=float("nan")), lambda: graft.MAM(scale=float("inf"))):
        with pytest.raises(graft.ConfigError, match="scale must be a finite number"):
            made()
