"""LLaMA-Adapter's checkpoint against its own model, in dense algebra, with LLaMA's pairwise rotary form.

Shape legend: B rows, T tokens, D width, H heads, h head size, L adapted layers, K prompt rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import attached, logits, logits_of_plain
from torch import Tensor
from torch.nn import functional as F

import graft
from graft.foreign.llama_adapter import read_llama_adapter, write_llama_adapter
from tiny import batch, tiny

HEADS, LENGTH = 4, 3


def llama() -> Any:
    return tiny("llama", num_key_value_heads=HEADS, num_hidden_layers=3)


def checkpoint(layers: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    gates = {f"layers.{i}.attention.gate": torch.randn(1, HEADS, 1, 1) * (i >= 3 - layers) for i in range(3)}
    return {"adapter_query.weight": torch.randn(layers * LENGTH, 32), **gates}


def pairwise(weight_DD: Tensor) -> Tensor:
    """A projection of transformers' LLaMA with the rows of each head as Meta's checkpoints have them."""
    return weight_DD.view(HEADS, 2, -1, 32).transpose(1, 2).reshape(32, 32)


@torch.no_grad()
def official(model: Any, ids_BT: Tensor, state: dict[str, Tensor], layers: int) -> Tensor:
    """Logits of LLaMA-Adapter's own model: complex rotary on pairs, one scores tensor, two softmaxes."""
    inner, tokens = model.model, ids_BT.shape[1]
    size = 32 // HEADS
    angle_Th = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, size, 2) / size))
    turn_T1h = torch.polar(torch.ones_like(angle_Th), angle_Th)[:, None]

    def norm(module: Any, x_BTD: Tensor) -> Tensor:
        return x_BTD * torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    def rotated(x_BTD: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_BTD.view(*x_BTD.shape[:2], HEADS, -1, 2))
        return torch.view_as_real(pairs * turn_T1h).flatten(3)

    mask_TT = torch.full((tokens, tokens), float("-inf")).triu(1)
    prompts_LKD = state["adapter_query.weight"].view(layers, LENGTH, 32)
    x_BTD = inner.embed_tokens(ids_BT)
    for number, layer in enumerate(inner.layers):
        attention, n_BTD = layer.self_attn, norm(layer.input_layernorm, x_BTD)
        wq, wk, wv = pairwise(attention.q_proj.weight), pairwise(attention.k_proj.weight), attention.v_proj.weight
        q, k = rotated(F.linear(n_BTD, wq)), rotated(F.linear(n_BTD, wk))
        v = F.linear(n_BTD, wv).view(*n_BTD.shape[:2], HEADS, -1)
        mask, count = mask_TT, 0
        if number >= len(inner.layers) - layers:
            prompt_KD, count = prompts_LKD[number - len(inner.layers) + layers], LENGTH
            pk, pv = (
                F.linear(prompt_KD, w).view(1, LENGTH, HEADS, -1).expand(len(ids_BT), -1, -1, -1) for w in (wk, wv)
            )
            k, v, mask = torch.cat([pk, k], 1), torch.cat([pv, v], 1), F.pad(mask_TT, (count, 0))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / size**0.5 + mask
        gate = state[f"layers.{number}.attention.gate"].tanh()
        share = torch.cat([gate * scores[..., :count].softmax(-1), scores[..., count:].softmax(-1)], -1)
        x_BTD = x_BTD + attention.o_proj(torch.einsum("bhts,bshd->bthd", share, v).flatten(2))
        x_BTD = x_BTD + layer.mlp(norm(layer.post_attention_layernorm, x_BTD))
    return model.lm_head(norm(inner.norm, x_BTD))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_the_official_model(tmp_path: Path, layers: int) -> None:
    state = checkpoint(layers)
    torch.save({"model": state}, tmp_path / "x.pth")
    model = llama()
    ids_BT = batch("llama", rows=1)["input_ids"]
    want = official(model, ids_BT, state, layers)
    adapter = read_llama_adapter(model, tmp_path / "x.pth", layers=layers)
    assert adapter.name == "x" and adapter.method.length == LENGTH  # type: ignore[attr-defined]
    with torch.no_grad():
        found = model(ids_BT).logits
    assert (want - logits_of_plain(llama(), "llama")[:1]).abs().max() > 1e-2
    assert torch.allclose(found, want, atol=2e-5)
    assert write_llama_adapter(model, "x", tmp_path / "y.pth") == (f"adapter_len={LENGTH}", f"adapter_layer={layers}")
    again = torch.load(tmp_path / "y.pth", weights_only=True)
    assert set(again) == set(state) and all(torch.equal(again[key], state[key]) for key in state)


def test_one_gate_for_a_layer_is_the_same_for_all_heads(tmp_path: Path) -> None:
    model = llama()
    adapter = graft.attach(model, graft.LlamaAdapter(length=LENGTH, layers=2, gate="per_layer"), "a")
    with torch.no_grad():
        for _, delta in adapter.items():
            delta.gate.fill_(0.7)  # type: ignore[operator, union-attr]
    write_llama_adapter(model, "a", tmp_path / "x.safetensors")
    again = llama()
    read_llama_adapter(again, tmp_path / "x.safetensors", layers=2)
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def refused(file: Path, match: str, model: Any = None, error: Any = graft.AdapterFileError, **options: Any) -> None:
    model = model or llama()
    with pytest.raises(error, match=match) as caught:
        read_llama_adapter(model, file, **({"layers": 2} | options))
    assert "\n" not in str(caught.value) and not hasattr(model, "adapters")


def test_refused(tmp_path: Path) -> None:
    good, file = checkpoint(), tmp_path / "x.pth"
    torch.save(good, file)
    refused(file, "layers: .* does not hold it", error=graft.ConfigError, layers=None)
    refused(file, "layers: 4 do not divide the 6 rows", error=graft.ConfigError, layers=4)
    refused(file, "the gate of layer 1 is not zero", layers=1)
    refused(file, "layers=6", layers=6)
    refused(file, "has fewer key and value heads", tiny("llama"))
    refused(file, "has biases", tiny("qwen2", num_key_value_heads=HEADS))
    refused(file, "a norm of its keys", tiny("qwen3", num_key_value_heads=HEADS, head_dim=8))
    refused(file, "a fused qkv", tiny("gpt2"))
    refused(file, "is an encoder", tiny("bert"))
    for bad, match in (
        ({k: v for k, v in good.items() if "query" not in k}, "no adapter_query.weight"),
        ({k: v for k, v in good.items() if "layers.2" not in k}, "1 tensors are missing, the first is layers.2"),
        (good | {"layers.2.attention.gate": torch.zeros(1, 8, 1, 1)}, r"has shape \(1, 8, 1, 1\), this model"),
        (good | {"adapter_query.weight": torch.zeros(6, 31)}, r"has shape \(6, 31\)"),
        (good | {"layers.2.attention.wq.bias": torch.zeros(32)}, "wq.bias .* has no place"),
    ):
        torch.save(bad, file)
        refused(file, match)


WRITES = [
    (graft.LlamaAdapter(length=2, layers=1, tanh=False), "tanh gates, not linear gates"),
    (graft.LlamaAdapter(length=2, layers=(0,)), r"in layers \[0\]; .* the top ones"),
    (graft.LlamaAdapter(length=2, layers=1, modules_to_save=("norm",)), "also trains model.norm"),
    (graft.LoRA(rank=2), "tanh gates, not lora"),
]


@pytest.mark.parametrize(("method", "match"), WRITES, ids=lambda value: getattr(value, "name", None))
def test_what_the_form_cannot_hold(tmp_path: Path, method: Any, match: str) -> None:
    model = llama()
    graft.attach(model, method, "a")
    with pytest.raises(graft.AdapterFileError, match=match):
        write_llama_adapter(model, "a", tmp_path / "x.pth")
    with pytest.raises(graft.AdapterFileError, match="fewer key and value heads"):
        write_llama_adapter(attached("llama", graft.LlamaAdapter(length=2, layers=1)), "a", tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())
