"""Forwards that start above the frozen trunk give what whole ones give, and compute each text once."""

from __future__ import annotations

import copy

import pytest
import torch

import graft
from graft.bank import bank_of
from graft.data.collate import flatten
from graft.errors import ConfigError, SiteError
from graft.fast.store import Store
from graft.fast.trunk import Trunk, first_block
from tiny import checkpointed, tiny

MODELS = ("llama", "gpt2", "gemma2", "mixtral", "bert")


def model_of(name="llama", method=None, layers=1):
    torch.manual_seed(0)
    model = tiny(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in ("attention_dropout", "dropout_p"):
            if hasattr(module, key):
                setattr(module, key, 0.0)
    graft.attach(model, method or graft.LoRA(rank=2, targets="all-linear", layers=layers, init="random"), "a")
    return model.train()


def rows(model, lengths=(7, 4, 6), side="right"):
    torch.manual_seed(1)
    width = max(lengths)
    ids = torch.randint(5, 60, (len(lengths), width))
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        mask[i, slice(0, length) if side == "right" else slice(width - length, width)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def grads(model, batch, labels):
    model.zero_grad()
    loss = model(**batch).logits[labels].float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(model, trunk, batch, lengths=None):
    """The loss and all gradients of a batch, with and without the trunk."""
    labels = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    if "attention_mask" in batch:
        labels = batch["attention_mask"].bool()
    if model(**batch).logits.dim() == 2:
        labels = slice(None)
    loss, expected = grads(model, batch, labels)
    with trunk.serving(batch, lengths):
        got_loss, got = grads(model, batch, labels)
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
    assert got.keys() == expected.keys() and got
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows(name, side):
    model = model_of(name)
    trunk, batch = Trunk(model), rows(model, side=side)
    assert trunk.depth == trunk.blocks - 1
    same(model, trunk, batch)
    tokens = 17 if side == "right" or name != "bert" else 21  # an encoder's padding on the left may be pooled
    assert (trunk.computed, trunk.served) == (tokens, 0)
    same(model, trunk, batch)
    assert (trunk.computed, trunk.served) == (tokens, tokens)


def test_a_text_is_found_in_another_batch_and_only_the_new_one_is_computed():
    model = model_of()
    trunk, batch = Trunk(model), rows(model)
    same(model, trunk, {key: value[:2] for key, value in batch.items()})
    same(model, trunk, {key: value[[2, 0]] for key, value in batch.items()})
    assert (trunk.computed, trunk.served) == (17, 7)


def test_the_skipped_blocks_do_not_run():
    model = model_of()
    trunk, batch, ran = Trunk(model), rows(model), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(3):
        with trunk.serving(batch):
            model(**batch)
    assert len(ran) == 1


class Row:
    adapter, source, index = "a", "test", 0


class Text:
    def __init__(self, ids):
        self.input_ids, self.labels, self.row = ids, ids, Row()

    def __len__(self):
        return len(self.input_ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_texts_are_those_of_padded_rows(name):
    model = model_of(name)
    trunk, padded = Trunk(model), rows(model)
    with trunk.serving(padded):
        model(**padded)
    lengths = padded["attention_mask"].sum(1).tolist()
    texts = [Text(ids[:n].tolist()) for ids, n in zip(padded["input_ids"], lengths, strict=True)]
    batch = flatten([texts[2], texts[0]])
    segments = batch.pop("segments")
    batch.pop("labels")
    with graft.route(model, segments=segments):
        same(model, trunk, batch)
    assert trunk.computed == 17
    fresh = Trunk(model)
    with graft.route(model, segments=segments):
        same(model, fresh, batch)
    assert (fresh.computed, fresh.served) == (13, 0)


@pytest.mark.parametrize(
    "method",
    [graft.TopLayers(count=1), graft.IA3(layers=1), graft.Bottleneck(layers=1), graft.DoRA(layers=1, init="random")],
    ids=lambda method: method.name,
)
def test_other_methods(method):
    model = model_of(method=method)
    trunk = Trunk(model)
    for _ in range(2):
        same(model, trunk, rows(model))
    assert trunk.served == 17


def test_under_checkpointing():
    model = model_of()
    checkpointed(model)
    trunk = Trunk(model)
    for _ in range(2):
        same(model, trunk, rows(model))


def test_a_mixed_batch_with_an_adapter_further_down_runs_whole():
    model = model_of()
    trunk = Trunk(model)
    graft.attach(model, graft.LoRA(rank=2, init="random"), "deep")
    batch = rows(model)
    for entries in (["a", None, "a"], ["a", "deep", "a"]):
        with graft.route(model, entries):
            same(model, trunk, batch)
    assert trunk.computed == 17


def test_it_is_as_deep_as_the_lowest_adapter():
    model = model_of(layers=1)
    top = Trunk(model).depth
    bank = bank_of(model)
    graft.attach(model, graft.LoRA(targets=("head",)), "head")
    assert first_block(model, bank["head"]) == top + 1
    graft.attach(model, graft.LoRA(targets=("embedding",)), "embedding")
    assert first_block(model, bank["embedding"]) == 0


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("llama", graft.LoRA(), "first block"),
        ("llama", graft.PromptTuning(length=2), "first block"),
        ("llama", graft.PrefixTuning(length=2, layers=1), "first block"),
        ("t5", graft.LoRA(layers=1), "not one stack"),
    ],
)
def test_what_has_no_trunk_is_refused(name, method, says):
    model = tiny(name)
    graft.attach(model, method, "a")
    with pytest.raises(SiteError, match=says):
        Trunk(model)


def test_dropout_below_is_refused_unless_it_is_to_be_off():
    model = tiny("gpt2")
    model.config.resid_pdrop = 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    graft.attach(model.train(), graft.LoRA(layers=1), "a")
    with pytest.raises(SiteError, match="drop out"):
        Trunk(model)
    trunk, batch = Trunk(model, dropout=True), rows(model)
    with trunk.serving(batch):
        model(**batch)
    state = trunk.store.get(next(iter(trunk.store.kept)))
    model.eval()
    seen = []
    hook = model.transformer.h[trunk.depth - 1].register_forward_hook(lambda m, a, o: seen.append(o))
    model(**batch)
    hook.remove()
    torch.testing.assert_close(seen[0][0, :7], state)
    assert all(m.p == 0.5 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_a_model_that_hands_on_more_than_hidden_states_is_refused():
    model = model_of()
    first, last = model.model.layers[0], model.model.layers[-1]
    first.register_forward_hook(lambda module, args, output: last.__dict__.__setitem__("extra", output.abs().sum()))
    inner = type(last).forward
    last.forward = lambda *args, **kwargs: inner(last, *args, **kwargs) * (1 + last.extra)
    with pytest.raises(SiteError, match="hands more"):
        Trunk(model)


def test_a_copied_model_keeps_its_own_blocks():
    model = model_of()
    other = copy.deepcopy(model)
    trunk = Trunk(other)
    same(other, trunk, rows(other))
    assert all("forward" not in block.__dict__ for block in [*model.model.layers, *other.model.layers])


def test_the_store_goes_to_disk_and_then_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.fast.store.SHARD", 64)
    one = torch.arange(8.0)
    store = Store(memory=40, folder=tmp_path / "trunk", disk=100, key="k")
    assert [store.put(bytes([i]), one + i) for i in range(5)] == [True, True, True, True, False]
    assert (store.in_memory, store.on_disk, len(store)) == (32, 96, 4)
    for i in range(4):
        torch.testing.assert_close(store.get(bytes([i])), one + i, rtol=0, atol=0)
    assert store.get(b"x") is None
    store.close(delete=False)
    again = Store(memory=0, folder=tmp_path / "trunk", disk=1000, key="k")
    assert len(again) == 3 and torch.equal(again.get(bytes([2])), one + 2)
    assert len(Store(folder=tmp_path / "trunk", key="other")) == 0
    store.close()
    assert not (tmp_path / "trunk").exists()


def test_the_store_touches_no_folder_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        Store(folder=tmp_path, key="k")


def test_states_from_disk_give_the_same_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.fast.store.SHARD", 1)
    model = model_of()
    trunk = Trunk(model, Store(memory=0, folder=tmp_path / "t", disk=2**20, key="k"))
    for _ in range(2):
        same(model, trunk, rows(model))
    assert trunk.served == 17 and len(trunk.store.places) == 3


def test_a_full_store_computes_again():
    model = model_of()
    trunk = Trunk(model, Store(memory=0))
    for _ in range(2):
        same(model, trunk, rows(model))
    assert (trunk.computed, trunk.served) == (34, 0)
