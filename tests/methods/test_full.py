"""Full fine-tuning: every storage once, one step equals a plain optimizer's, and the base comes back."""

from __future__ import annotations

import pytest
import torch
from twins import data_of, far

import graft
from tiny import checkpointed, tiny


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2", "bert", "mt5", "bart"])
def test_every_parameter_trains_once(arch: str) -> None:
    model = tiny(arch)
    expected = sum(p.numel() for p in model.parameters())
    adapter = graft.attach(model, graft.FullFineTuning())
    assert adapter.trainable == adapter.saved == expected
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_trains_as_without_us_and_gives_the_base_back(arch: str) -> None:
    model, plain, data = tiny(arch), tiny(arch), data_of(arch, labels=True)
    base = plain(**data).logits
    adapter = graft.attach(model, graft.FullFineTuning(), "full")
    for each, parameters in ((model, adapter.parameters()), (plain, plain.parameters())):
        optimizer = torch.optim.AdamW(list(parameters), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            each(**data).loss.backward()
            optimizer.step()
    tuned = plain(**data).logits
    far(tuned, base)
    assert torch.equal(model(**data).logits, tuned)
    graft.use(model, None)
    assert torch.equal(model(**data).logits, base)
    graft.use(model, "full")
    assert torch.equal(model(**data).logits, tuned)
    graft.detach(model)
    assert torch.equal(model(**data).logits, base)


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for on in (False, True):
        model = tiny("llama").train()
        if on:
            checkpointed(model)
        graft.attach(model, graft.FullFineTuning())
        model(**data_of("llama", labels=True)).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-6)


def test_nothing_can_be_left_out_or_stand_beside() -> None:
    with pytest.raises(graft.ConfigError, match="TopLayers"):
        graft.FullFineTuning(layers=1)
    model = tiny("llama")
    graft.attach(model, graft.FullFineTuning())
    with pytest.raises(graft.ConfigError, match="cannot stand beside"):
        graft.attach(model, graft.LoRA(), "lora")
