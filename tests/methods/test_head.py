"""The task head alone: a trained copy, beside the frozen original."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from twins import adapted, close, data_of, far, lively

import graft
from tiny import tiny


@pytest.mark.parametrize(("arch", "head"), [("bert", "classifier"), ("llama_cls", "score"), ("gpt2_cls", "score")])
def test_only_the_head_answers_anew(arch: str, head: str) -> None:
    model, data = adapted(arch, graft.Head()), data_of(arch)
    adapter = model.adapters["a"]
    assert list(adapter.sites) == [head]
    copy = adapter.at(head).copy
    assert adapter.trainable == adapter.saved == sum(p.numel() for p in copy.parameters())
    hand = lively(arch)
    hand.get_submodule(head).load_state_dict(copy.state_dict())
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_rows_have_their_own_heads() -> None:
    model, data = adapted("bert", graft.Head()), data_of("bert")
    graft.attach(model, graft.LoRA(rank=2), "b")
    with torch.no_grad():
        model.adapters["b"].at("classifier").copy.bias.fill_(7.0)
    with graft.route(model, ["a", "b", None]):
        mixed = model(**data).logits
    base = lively("bert")(**data).logits
    close(mixed[2], base[2])
    close(mixed[1], base[1] + 7.0 - lively("bert").classifier.bias)
    far(mixed[0], base[0])


def test_training_moves_the_head_alone_and_features_keep_no_graph() -> None:
    model = tiny("bert")
    adapter = graft.attach(model, graft.Head())
    data = data_of("bert", labels=True)
    out = model(**data, output_hidden_states=True)
    assert not any(hidden.requires_grad for hidden in out.hidden_states)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits, data["labels"]))
    out.loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("adapters."))


def test_errors() -> None:
    with pytest.raises(graft.SiteError, match="no task head"):
        graft.attach(tiny("llama"), graft.Head())
    with pytest.raises(graft.ConfigError, match="head=False"):
        graft.Head(head=False)
