"""Modules that are trained whole: their copies get all that the module is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graft
from tiny import IDS, VOCAB, batch, tiny


def mamba2() -> Any:
    """Its gated norm is called with the states and the gate."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "expand": 2}
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**sizes, **IDS, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
    return transformers.Mamba2ForCausalLM(config).eval()


def made(arch: str) -> Any:
    return mamba2() if arch == "mamba2" else tiny(arch)


CASES = [
    ("bart", "embed_positions", "q_proj"),
    ("mamba2", "mixer.norm", "out_proj"),
    ("bert", "encoder.layer.1", "layer.0.attention.self.query"),
    ("llama", "layers.1", "layers.0.self_attn.q_proj"),
]
"""Called with positions behind a cache, a gate, a mask, and nearly everything."""


def inputs(arch: str) -> dict[str, Any]:
    data = dict(batch("bart" if arch == "bart" else "llama"))
    if arch != "bart":
        del data["labels"]
    return {**data, "use_cache": False} if arch in ("llama", "mamba2") else data


@torch.no_grad()
def both(arch: str, name: str, target: str) -> tuple[Any, Any]:
    """A model with a changed copy as adapter "a", and one that has these weights itself."""
    ours, theirs = made(arch), made(arch)
    adapter = graft.attach(ours, graft.LoRA(targets=(target,), modules_to_save=(name,), head=False), "a")
    copies = [(site, delta) for site, delta in adapter.items() if hasattr(delta, "copy")]
    assert copies
    generator = torch.Generator().manual_seed(5)
    for site, delta in copies:
        own = theirs.get_submodule(site.path)
        for mine, other in zip(delta.copy.parameters(), own.parameters(), strict=True):
            mine.add_(torch.randn(mine.shape, generator=generator) * 0.5)
            other.copy_(mine)
    return ours, theirs


def logits(model: Any, arch: str) -> Tensor:
    return model(**inputs(arch)).logits


@pytest.mark.parametrize(("arch", "name", "target"), CASES)
@torch.no_grad()
def test_a_copy_is_called_as_its_module_is(arch: str, name: str, target: str) -> None:
    ours, theirs = both(arch, name, target)
    expected, base = logits(theirs, arch), logits(made(arch), arch)
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, arch), expected, atol=1e-5, rtol=1e-5)
    with graft.route(ours, ["a", None, None, "a"]):
        mixed = logits(ours, arch)
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[[1, 2]], base[[1, 2]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_go_on_behind_a_cache() -> None:
    ours, theirs = both(*CASES[0])
    data = {"input_ids": batch("bart", rows=2)["input_ids"]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    got, want = (
        model.generate(**data, **options, return_dict_in_generate=True, use_cache=True) for model in (ours, theirs)
    )
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_that_would_write_to_the_cache_again_is_refused() -> None:
    ours, _ = both(*CASES[3])
    with pytest.raises(graft.RouteError, match=r"LlamaDecoderLayer is trained whole .* use_cache=False"):
        ours(input_ids=batch("llama")["input_ids"])


@torch.no_grad()
def test_a_copy_of_a_module_that_gives_several_tensors_is_refused() -> None:
    model = tiny("mixtral")
    graft.attach(model, graft.LoRA(modules_to_save=("gate",)), "a")
    with pytest.raises(graft.RouteError, match=r"is trained whole .* does not give one tensor"):
        model(**batch("mixtral"))


def test_a_gate_gets_gradients_through_the_copy() -> None:
    ours, theirs = both(*CASES[1])
    for model in (ours, theirs):
        model(**inputs("mamba2")).logits.square().sum().backward()
    path = "backbone.layers.1.mixer.norm"
    torch.testing.assert_close(
        ours.adapters["a"].at(path).copy.weight.grad, theirs.get_submodule(path).weight.grad, atol=1e-3, rtol=1e-4
    )
