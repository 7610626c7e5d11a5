"""Forwards that start above the frozen trunk give what whole ones give, and compute each text once."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import graft
from graft import roles
from graft.bank import bank_of
from graft.data.collate import flatten
from graft.errors import SiteError
from graft.fast.store import Store
from graft.fast.trunk import Trunk
from graft.freeze import first_block
from tiny import batch as batch_of
from tiny import checkpointed, tiny

MODELS = ("llama", "gpt2", "gemma2", "mixtral", "bert")


def model_of(name="llama", method=None, layers=1):
    torch.manual_seed(0)
    model = tiny(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
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


DECODER = {"t5": r"decoder\.block\.1\..*\.(q|v)", "bart": r"model\.decoder\.layers\.1\..*(q|v)_proj"}
DECODER["mt5"] = r"decoder\..*\.(q|v)"


@pytest.mark.parametrize("cut", [None, "mask"])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", DECODER)
def test_the_encoder_of_an_encoder_decoder(name, checkpoints, cut):
    model = model_of(name, graft.LoRA(rank=2, targets=DECODER[name], init="random"))
    if checkpoints:
        checkpointed(model, use_reentrant=False)
    trunk, ran = Trunk(model), []
    model.get_encoder().register_forward_hook(lambda *_: ran.append(1))
    roles.blocks(model)["encoder"][0][1].register_forward_hook(lambda *_: ran.append("whole"))
    batch = {key: value for key, value in batch_of(name).items() if key != f"attention_{cut}"}
    batch["decoder_input_ids"] = batch.pop("labels").clamp(min=0)
    tokens = int(batch["attention_mask"].sum()) if cut is None else 36
    for _ in range(2):
        loss, expected = grads(model, batch, slice(None))
        ran.clear()
        with trunk.serving(batch):
            got_loss, got = grads(model, batch, slice(None))
        torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
        assert got.keys() == expected.keys() and got
        for key in got:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)
    assert (trunk.computed, trunk.served) == (tokens, tokens)
    assert "whole" not in ran and (trunk.depth, trunk.blocks) == (2, 4)


BIG = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
BIG |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
SWITCH = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 8, "num_layers": 3, "num_heads": 4, "num_experts": 2}


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("LED", BIG | {"attention_window": 4, "attention_dropout": 0.0}, None),
        ("BigBirdPegasus", BIG, "block-sparse attention"),
        ("SwitchTransformers", SWITCH | {"dropout_rate": 0.0}, "drop out .*Router"),
        ("SwitchTransformers", SWITCH | {"dropout_rate": 0.0, "router_jitter_noise": 0.0}, "experts have a capacity"),
    ],
)
def test_encoders_with_more_than_hidden_states(name, fields, says):
    """LED hands on an output of its own class; the others make another thing of a text in another batch."""
    config = getattr(transformers, f"{name}Config")(**fields, pad_token_id=0, decoder_start_token_id=0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    graft.attach(model.train(), graft.LoRA(rank=2, targets=r".*decoder.*(q|q_proj)", init="random"), "a")
    if says is not None:
        with pytest.raises(SiteError, match=says):
            Trunk(model)
        return
    trunk, batch = Trunk(model), {**rows(model), "decoder_input_ids": torch.tensor([[0, 7, 8]] * 3)}
    for _ in range(2):
        whole = model(**batch).logits
        with trunk.serving(batch):
            torch.testing.assert_close(model(**batch).logits, whole, rtol=1e-5, atol=1e-6)
    assert trunk.served == 17


def test_an_encoder_that_was_handed_over_or_is_adapted_by_a_route_runs_as_ever():
    model = model_of("t5", graft.LoRA(rank=2, targets=DECODER["t5"], init="random"))
    trunk, batch = Trunk(model), batch_of("t5")
    graft.attach(model, graft.LoRA(rank=2, targets=r"encoder\..*\.q", init="random"), "deep")
    states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for entries, more in ((["a", "deep", None, "a"], {}), (["a"] * 4, {"encoder_outputs": states})):
        with graft.route(model, entries):
            whole = model(**batch, **more).logits
            with trunk.serving({**batch, **more}):
                torch.testing.assert_close(model(**batch, **more).logits, whole)
    assert trunk.computed == 0


def test_one_that_is_new_is_seen_whole_first():
    model = model_of()
    trunk, batch = Trunk(model), rows(model)
    graft.attach(model, graft.LoRA(rank=2, init="random"), "deep")
    for tokens in (0, 17):
        with graft.route(model, ["a"] * 3), trunk.serving(batch):
            model(**batch)
        assert trunk.computed == tokens


def test_under_autocast_other_states_are_kept():
    model = model_of()
    trunk, batch = Trunk(model), rows(model)
    real = batch["attention_mask"].bool()
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            whole = model(**batch).logits[real]
            with trunk.serving(batch):
                torch.testing.assert_close(model(**batch).logits[real], whole, rtol=0.01, atol=0.01)
    same(model, trunk, batch)
    assert (trunk.computed, trunk.served) == (51, 17)


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
    assert first_block(model, bank["embedding"]) == -1


def test_the_last_norm_of_an_encoder_is_below_the_decoder():
    model = model_of("t5", graft.LoRA(rank=2, targets=DECODER["t5"], init="random"))
    adapter = bank_of(model)["a"]
    assert first_block(model, adapter) == 3
    for name, first in {
        "lm_head": 3,
        "decoder.final_layer_norm": 3,
        "encoder.final_layer_norm": 1,
        "shared": -1,
    }.items():
        adapter.selected = {f"{name}.weight": model.get_parameter(f"{name}.weight")}
        assert first_block(model, adapter) == first
    adapter.selected = {}


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("llama", graft.LoRA(), "first block"),
        ("llama", graft.PromptTuning(length=2), "first block"),
        ("llama", graft.PrefixTuning(length=2, layers=1), "first block"),
        ("t5", graft.LoRA(), "first block"),
        ("t5", graft.LoRA(layers=1), "acts in the encoder"),
        ("t5", graft.IA3(targets=r"encoder\.block\.1\..*\.k|decoder\..*\.v"), "acts in the encoder"),
        ("bart", graft.PromptTuning(length=2), "first block"),
    ],
)
def test_what_has_no_trunk_is_refused(name, method, says):
    model = tiny(name)
    graft.attach(model, method, "a")
    with pytest.raises(SiteError, match=says):
        Trunk(model)


def test_dropped_layers_are_refused():
    """A block that is left out at random could be the one that hands on the kept states."""
    model = tiny("opt", dropout=0.0, layerdrop=0.5)
    graft.attach(model.train(), graft.LoRA(layers=1), "a")
    with pytest.raises(SiteError, match="layerdrop"):
        Trunk(model, dropout=True)


@pytest.mark.parametrize("name", ["opt", "bart"])
def test_dropout_by_a_number_is_seen(name):
    """OPT's and BART's blocks have no Dropout module: they hand a number to a function."""
    model = tiny(name, dropout=0.1, attention_dropout=0.0)
    method = graft.LoRA(layers=1) if name == "opt" else graft.LoRA(targets=DECODER[name])
    graft.attach(model.train(), method, "a")
    with pytest.raises(SiteError, match="drop out"):
        Trunk(model)
    Trunk(model, dropout=True)


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
    model.model.embed_tokens.register_forward_hook(lambda *_: last.__dict__.__setitem__("extra", 0.0))
    first.mlp.register_forward_hook(lambda _m, _a, output: last.__dict__.__setitem__("extra", output.abs().sum()))
    inner = type(last).forward
    last.forward = lambda *args, **kwargs: inner(last, *args, **kwargs) * (1 + last.extra)
    replaced = last.forward
    with pytest.raises(SiteError, match="hands more"):
        Trunk(model)
    assert last.forward is replaced


def test_a_copied_model_keeps_its_own_blocks():
    model = model_of()
    other = copy.deepcopy(model)
    trunk = Trunk(other)
    same(other, trunk, rows(other))
    assert all("forward" not in block.__dict__ for block in [*model.model.layers, *other.model.layers])


def test_the_key_is_of_what_the_states_depend_on():
    key = Trunk(model_of()).key
    assert Trunk(model_of()).key == Trunk(model_of(method=graft.IA3(layers=1))).key == key
    for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight"):
        model = model_of()
        with torch.no_grad():
            model.model.get_parameter(name)[-1, -1] += 1e-3
        assert Trunk(model).key != key
    above = model_of()
    with torch.no_grad():
        above.model.layers[1].mlp.up_proj.weight.zero_()
    assert Trunk(above).key == key
    other = model_of()
    other.config.rms_norm_eps = 1e-3
    assert len({key, Trunk(other).key, Trunk(model_of().bfloat16()).key, Trunk(model_of("gpt2")).key}) == 4


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
