"""Bottleneck adapters against a clean model whose sub-layers are rewritten by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from twins import adapted, close, data_of, far, lively

import graft
from graft.adapter import Adapter
from graft.method import CopyDelta, from_dict
from tiny import tiny

# arch -> ends of the paths that Houlsby's adapters follow, the norm behind the feed-forward's sum, or the block's end.
OUTPUTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "mixtral": ("self_attn.o_proj", ".mlp"),
    "bert": ("attention.output.dense", "output.dense"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
}
POST_NORM = {"bert": "output.LayerNorm", "bart": "final_layer_norm"}
ENDS = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense", "t5": "wo", "bart": "fc2"}


def mlp(delta: Any, h: Tensor, f: Any = F.gelu) -> Tensor:
    """Up f(Down h), each product written out."""
    return f(h @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias


class Then(nn.Module):
    """A module and a function of its input and output."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module, self.function = module, function

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.module(x, *args, **kwargs)
        return (self.function(x, y[0]), *y[1:]) if isinstance(y, tuple) else self.function(x, y)


def rewritten(model: Any, path: str, function: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Then(model.get_submodule(path), function))


def own(adapter: Adapter) -> dict[str, Any]:
    return {site.path: delta for site, delta in adapter.items() if not isinstance(delta, CopyDelta)}


@pytest.mark.parametrize("arch", sorted(OUTPUTS))
def test_houlsby_follows_each_output_projection(arch: str) -> None:
    model, data = adapted(arch, graft.Bottleneck(size=5, train_norms=False, head=False)), data_of(arch)
    hand, deltas = lively(arch), own(model.adapters["a"])
    paths = [path for path, _ in hand.named_modules() if path.endswith(OUTPUTS[arch])]
    assert sorted(paths) == sorted(deltas)
    for path in paths:
        rewritten(hand, path, lambda x, y, delta=deltas[path]: y + mlp(delta, y))
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_pfeiffer_reads_the_stream_of_pre_norm_models(arch: str) -> None:
    """h2 = v + Up f(Down v) with v = h1 + u, which is what leaves the block (T5: its feed-forward layer)."""
    model, data = adapted(arch, graft.Bottleneck(size=5, kind="pfeiffer")), data_of(arch)
    hand = lively(arch)
    for path, delta in own(model.adapters["a"]).items():
        assert path.endswith(ENDS[arch])
        block = path.removesuffix(".DenseReluDense.wo") if arch == "t5" else path.rsplit(".", 2)[0]
        rewritten(hand, block, lambda x, y, delta=delta: y + mlp(delta, y))
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@pytest.mark.parametrize("arch", ["bert", "bart"])
@pytest.mark.parametrize("norms", [False, True])
def test_pfeiffer_uses_the_norm_twice_in_post_norm_models(arch: str, norms: bool) -> None:
    """h2 = LN2(v + Up f(Down LN2(v))) with v = h1 + u; the inner LN2 is the frozen one, whatever the outer one is."""
    model = adapted(arch, graft.Bottleneck(size=5, kind="pfeiffer", train_norms=norms, head=False))
    data, hand, adapter = data_of(arch), lively(arch), model.adapters["a"]
    copies = {site.path: delta.copy for site, delta in adapter.items() if isinstance(delta, CopyDelta)}
    assert bool(copies) == norms
    for path, copy in copies.items():
        if path not in [block_norm(arch, end) for end in own(adapter)]:
            hand.get_submodule(path).load_state_dict(copy.state_dict())
    for path, delta in own(adapter).items():
        norm = hand.get_submodule(block_norm(arch, path))
        outer = copies.get(block_norm(arch, path), norm)

        def twice(v: Tensor, z: Tensor, delta: Any = delta, outer: Any = outer) -> Tensor:
            return outer(v + mlp(delta, z))

        rewritten(hand, block_norm(arch, path), twice)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def block_norm(arch: str, path: str) -> str:
    return path.removesuffix(ENDS[arch]) + POST_NORM[arch]


@pytest.mark.parametrize(
    ("arch", "end"), [("llama", "mlp"), ("gpt2", "mlp"), ("t5", "DenseReluDense"), ("mixtral", "mlp")]
)
def test_parallel_reads_the_normalized_input(arch: str, end: str) -> None:
    model, data = adapted(arch, graft.Bottleneck(size=5, kind="parallel", activation="relu")), data_of(arch)
    hand = lively(arch)
    for path, delta in own(model.adapters["a"]).items():
        assert path.endswith(end)
        rewritten(hand, path, lambda n, y, delta=delta: y + 4 * mlp(delta, n, F.relu))
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_parallel_spans_two_modules_where_no_one_holds_both() -> None:
    """BERT: h2 = LN2(h1 + FFNOut(h1) + s Up f(Down h1)), with the span's own rows in a mixed batch too."""
    model = adapted("bert", graft.Bottleneck(size=5, kind="parallel", scale=0.5, head=False))
    data, hand = data_of("bert"), lively("bert")
    for i, layer in enumerate(hand.bert.encoder.layer):
        delta = model.adapters["a"].at(f"bert.encoder.layer.{i}.output.dense")
        dense, norm = layer.output.dense, layer.output.LayerNorm

        def forward(inside: Tensor, h1: Tensor, delta: Any = delta, dense: Any = dense, norm: Any = norm) -> Tensor:
            return norm(h1 + dense(inside) + 0.5 * mlp(delta, h1))

        layer.output.forward = forward
    expected = hand(**data).logits
    close(model(**data).logits, expected)
    with graft.route(model, ["a", None, "a"]):
        mixed = model(**data).logits
    close(mixed[[0, 2]], expected[[0, 2]])
    close(mixed[1], lively("bert")(**data).logits[1])


def test_start() -> None:
    """Near the base for the serial kinds (std 1e-3, cut at two), exactly at it for parallel."""
    for arch in ("llama", "bert"):
        data = data_of(arch)
        for kind, start in (("houlsby", 1e-3), ("pfeiffer", 1e-3), ("parallel", 0.0)):
            model = tiny(arch)
            base = model(**data).logits
            torch.manual_seed(0)
            method = graft.Bottleneck(size=64, kind=kind)
            adapter = graft.attach(model, method)
            moved = (model(**data).logits - base).abs().max().item()
            assert method.starts_equal == (start == 0.0)
            assert moved <= 1e-2 if start else moved == 0.0
            for delta in own(adapter).values():
                assert not delta.down_bias.any() and not delta.up_bias.any()
                if start:
                    both = torch.cat([delta.down.flatten(), delta.up.flatten()])
                    assert both.abs().max() <= 2e-3 and 0.7e-3 < both.std() < 1.0e-3
                else:
                    assert not delta.up.any() and 0.9 < delta.down.abs().max() * math.sqrt(32) <= 1


def test_houlsby_trains_copies_of_every_norm_and_the_head() -> None:
    model = lively("bert")
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    adapter = graft.attach(model, graft.Bottleneck(size=3))
    copied = {site.path for site, delta in adapter.items() if isinstance(delta, CopyDelta)}
    assert copied == {*norms, "classifier"}
    assert adapter.trainable == 4 * (2 * 3 * 32 + 32 + 3) + len(norms) * 64 + 33 * 3
    for site, delta in adapter.items():
        if site.path in norms:
            assert all(p.requires_grad for p in delta.copy.parameters())
            torch.nn.init.constant_(delta.copy.bias, 0.25)
    hand, data = lively("bert"), data_of("bert")
    deltas = {path: adapter.at(path) for path in adapter.sites if path.endswith("output.dense")}
    for path, delta in deltas.items():
        rewritten(hand, path, lambda x, y, delta=delta: y + mlp(delta, y))
    for path in norms:
        torch.nn.init.constant_(hand.get_submodule(path).bias, 0.25)
    close(model(**data).logits, hand(**data).logits)


def test_layers_and_cross() -> None:
    top = graft.attach(lively("bert"), graft.Bottleneck(size=3, layers=1))
    assert {site.layer for site in top.sites.values()} == {1, None} and "classifier" in top.sites
    alone = graft.attach(lively("bart"), graft.Bottleneck(size=3, cross=False))
    assert not any("encoder_attn.out_proj" in path for path in alone.sites)
    assert len(own(alone)) == 8 and len(own(graft.attach(lively("bart"), graft.Bottleneck(size=3)))) == 10


def test_size_is_at_least_one_and_words_are_checked() -> None:
    adapter = graft.attach(lively("llama"), graft.Bottleneck(size=0, train_norms=False))
    assert adapter.trainable == 4 * (2 * 32 + 32 + 1)
    for setting, word in (({"kind": "houlsbi"}, "houlsby"), ({"activation": "gelo"}, "gelu"), ({"size": -1}, "size")):
        with pytest.raises(graft.ConfigError, match=word):
            graft.Bottleneck(**setting)
    method = graft.Bottleneck(size=3, kind="pfeiffer", scale=2.0)
    assert from_dict(method.to_dict()) == method and method.factor == 2.0


def test_where_the_place_is_unknown_it_says_so() -> None:
    """Falcon's one norm serves attention and feed-forward; a bare linear has no sub-layers at all."""
    with pytest.raises(graft.SiteError, match="Pfeiffer"):
        graft.attach(tiny("falcon"), graft.Bottleneck(kind="pfeiffer"))
    with pytest.raises(graft.SiteError, match="no feed-forward"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), graft.Bottleneck())


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_overfits_one_batch(kind: str) -> None:
    model, data = lively("llama"), data_of("llama", labels=True)
    torch.manual_seed(0)
    adapter = graft.attach(model, graft.Bottleneck(size=16, kind=kind))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
    first = last = math.inf
    for step in range(80):
        loss = model(**data).loss
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last < 0.1 * first
