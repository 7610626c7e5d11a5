"""Top layers: what trains, where the graph ends, and that the base comes back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import close, data_of, far, lively

import graft
from graft.method import Build
from tiny import checkpointed, tiny

# arch -> settings, and what trains: beginnings of parameter names.
TRAINED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"count": 1}, ("model.layers.1.", "model.norm.")),
    "llama_cls": ({"decoder": 1}, ("model.layers.1.", "model.norm.", "score.")),
    "gpt2": ({"count": 1}, ("transformer.h.1.", "transformer.ln_f.")),
    "gemma2": ({"count": 1, "norm": False}, ("model.layers.1.",)),
    "mixtral": ({"count": 1}, ("model.layers.1.", "model.norm.")),
    "bert": ({"count": 1}, ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")),
    "roberta": ({"encoder": 1, "head": False}, ("roberta.encoder.layer.1.",)),
    "t5": ({"count": 1}, ("encoder.block.1.", "encoder.final_", "decoder.block.1.", "decoder.final_")),
    "bart": ({"decoder": 1}, ("model.decoder.layers.1.",)),
}


class Seen:
    """Remembers whether what entered a module required gradients."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.flags: list[bool] = []
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.flags.append(hidden.requires_grad)


@pytest.mark.parametrize("arch", sorted(TRAINED))
def test_what_trains(arch: str) -> None:
    settings, beginnings = TRAINED[arch]
    model = tiny(arch)
    expected = {name for name, _ in model.named_parameters() if name.startswith(beginnings)}
    adapter = graft.attach(model, graft.TopLayers(**settings))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected == set(adapter.selected)
    assert adapter.trainable == sum(p.numel() for name, p in tiny(arch).named_parameters() if name in expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("spoilt", ["plain", "inputs", "checkpointing"])
def test_no_graph_below(arch: str, spoilt: str) -> None:
    model = tiny(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 3}).train()
    if spoilt == "checkpointing":
        checkpointed(model)
    method = graft.TopLayers(count=1)
    adapter = graft.attach(model, method)
    if spoilt != "plain":
        model.enable_input_require_grads()
    *below, first = (Seen(module) for _, module in blocks(model))
    model(**data_of(arch, labels=True)).loss.backward()
    assert first.flags and not any(first.flags)
    assert not any(flag for seen in below[1:] for flag in seen.flags)
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == set(adapter.selected)


def blocks(model: Any) -> list[tuple[str, torch.nn.Module]]:
    names = ("model.layers", "transformer.h", "bert.encoder.layer")
    path = next(name for name in names if any(found == name for found, _ in model.named_modules()))
    return list(model.get_submodule(path).named_children())


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_gradients_are_those_of_the_whole_graph(arch: str) -> None:
    """Also where frozen decoder blocks must hand gradients on to a trained encoder (T5)."""
    model, whole, data = lively(arch), lively(arch), data_of(arch, labels=True)
    graft.attach(model, graft.TopLayers(count=1))
    model(**data).loss.backward()
    whole(**data).loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected[name])
            assert parameter.grad.abs().max() > 0


def test_encoder_decoders() -> None:
    """Without a trained encoder block the encoder has no graph; with one, every decoder block must have one."""
    for arch, stack in (("t5", "decoder.block"), ("bart", "model.decoder.layers")):
        model = tiny(arch)
        graft.attach(model, graft.TopLayers(decoder=1))
        model.enable_input_require_grads()
        seen = Seen(model.get_submodule(f"{stack}.1"))
        out = model(**data_of(arch))
        assert not out.encoder_last_hidden_state.requires_grad and seen.flags == [False] and out.logits.requires_grad
        model = tiny(arch)
        graft.attach(model, graft.TopLayers(encoder=1))
        seen = Seen(model.get_submodule(f"{stack}.1"))
        out = model(**data_of(arch))
        assert out.encoder_last_hidden_state.requires_grad and seen.flags == [True]
    barriers = graft.TopLayers(encoder=1, decoder=1).barriers(Build(tiny("t5")))
    assert barriers == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert graft.TopLayers(decoder=1).barriers(Build(tiny("t5"))) == [
        "encoder.block.0",
        "decoder.block.0",
        "decoder.block.1",
    ]


def test_the_base_comes_back_bit_for_bit() -> None:
    model, data = tiny("llama"), data_of("llama", labels=True)
    keys = list(model.state_dict())
    base = model(**data).logits
    adapter = graft.attach(model, graft.TopLayers(count=1), "top")
    torch.testing.assert_close(model(**data).logits, base, rtol=0, atol=0)
    model(**data).loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=0.5).step()
    model.zero_grad()
    tuned = model(**data).logits
    far(tuned, base)
    for _ in range(2):
        graft.use(model, None)
        assert torch.equal(model(**data).logits, base)
        graft.use(model, "top")
        assert torch.equal(model(**data).logits, tuned)
    graft.detach(model)
    assert torch.equal(model(**data).logits, base) and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(**data).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_lm_head_only_if_asked_and_untied() -> None:
    model = tiny("llama")
    assert "lm_head.weight" in graft.attach(model, graft.TopLayers(count=1, lm_head=True)).selected
    for arch in ("gpt2", "llama_tied"):
        with pytest.raises(graft.ConfigError, match="lm_head shares its weight"):
            graft.attach(tiny(arch), graft.TopLayers(count=1, lm_head=True))
    with pytest.raises(graft.ConfigError, match="lm_head does not exist"):
        graft.attach(tiny("bert"), graft.TopLayers(count=1, lm_head=True))


def test_stands_alone() -> None:
    model = tiny("llama")
    graft.attach(model, graft.LoRA())
    with pytest.raises(graft.ConfigError, match="cannot stand beside"):
        graft.attach(model, graft.TopLayers(count=1), "top")
    graft.detach(model)
    graft.attach(model, graft.TopLayers(count=1), "top")
    with pytest.raises(graft.RouteError, match="cannot be routed"):
        graft.route(model, ["top", None])


@pytest.mark.parametrize(
    ("settings", "arch", "match"),
    [
        ({}, "llama", "give count"),
        ({"count": 1, "decoder": 1}, "llama", "give count"),
        ({"count": 0}, "llama", "at least one"),
        ({"count": 3}, "llama", "3 blocks of the decoder asked, and it has 2"),
        ({"encoder": 1}, "llama", "has no encoder"),
        ({"count": 1, "layers": 1}, "llama", "mean nothing"),
        ({"count": 1, "modules_to_save": ("norm",)}, "llama", "mean nothing"),
    ],
)
def test_errors(settings: dict[str, Any], arch: str, match: str) -> None:
    model = tiny(arch)
    with pytest.raises(graft.ConfigError, match=match):
        graft.attach(model, graft.TopLayers(**settings))
    assert not hasattr(model, "adapters") and all(p.requires_grad for p in model.parameters())


def test_shared_blocks_are_refused() -> None:
    """ALBERT runs one block many times: cutting its input would lose gradients."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=99, num_hidden_layers=3, **sizes))
    with pytest.raises(graft.ConfigError, match="runs one block many times"):
        graft.attach(model, graft.TopLayers(count=1))
