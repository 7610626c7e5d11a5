"""MultiLoRA against its sum added to the weights by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_counts import meta
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import CopyDelta, from_dict
from graft.methods.multi_lora import MultiLoRADelta
from tiny import tiny


def change_of(delta: Any, factor: float) -> torch.Tensor:
    """(alpha / r) sum_i diag(s_i) B_i A_i."""
    scaling = delta.lora_scaling.view(len(delta.lora_A), -1)
    parts = zip(scaling, delta.lora_B, delta.lora_A, strict=True)
    return sum(factor * torch.diag(s.expand(len(B))) @ B @ A for s, B, A in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
@pytest.mark.parametrize("per_output", [True, False])
def test_adds_the_scaled_sum_to_each_weight(arch: str, per_output: bool) -> None:
    method = graft.MultiLoRA(rank=2, count=3, alpha=5, per_output=per_output, head=False)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    for path in model.adapters["a"].sites:
        module, change = hand.get_submodule(path), change_of(model.adapters["a"].at(path), 5 / 2)
        with torch.no_grad():
            module.weight += change.T if isinstance(module, Conv1D) else change
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_start() -> None:
    """A and B kaiming uniform, each of the n over its own columns; s zero. Only s moves in the first step, then all."""
    torch.manual_seed(0)
    model, data = lively("llama"), data_of("llama", labels=True)
    adapter = graft.attach(model, graft.MultiLoRA(rank=16, count=3, targets=("ffn.down",)))
    delta = adapter.at("model.layers.0.mlp.down_proj")
    assert delta.lora_A.shape == (3, 16, 48) and delta.lora_B.shape == (3, 32, 16) and not delta.lora_scaling.any()
    for one in (*delta.lora_A, *delta.lora_B):
        assert 0.95 * one.shape[1] ** -0.5 < one.abs().max() <= one.shape[1] ** -0.5
    assert not torch.equal(delta.lora_A[0], delta.lora_A[1])
    model(**data).loss.backward()
    assert not delta.lora_A.grad.any() and not delta.lora_B.grad.any() and delta.lora_scaling.grad.any()
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    model.zero_grad()
    model(**data).loss.backward()
    assert delta.lora_A.grad.any() and delta.lora_B.grad.any()


def test_without_scales_of_their_own_n_modules_are_one_lora() -> None:
    """s = 1 everywhere is a LoRA of rank n r with alpha n times as large."""
    model, data = adapted("llama", graft.MultiLoRA(rank=2, count=3, alpha=4)), data_of("llama")
    other = lively("llama")
    lora = graft.attach(other, graft.LoRA(rank=6, alpha=12, targets="all-linear"))
    with torch.no_grad():
        for site, delta in model.adapters["a"].items():
            delta.lora_scaling.fill_(1.0)
            lora.at(site.path).A.copy_(torch.cat(list(delta.lora_A)))
            lora.at(site.path).B.copy_(torch.cat(list(delta.lora_B), 1))
    close(model(**data).logits, other(**data).logits)


def test_parts_of_a_fused_linear() -> None:
    model, data = adapted("gpt2", graft.MultiLoRA(rank=2, alpha=4, targets=("attention.value",))), data_of("gpt2")
    hand = lively("gpt2")
    for i, block in enumerate(hand.transformer.h):
        delta = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn")
        assert delta.lora_B.shape == (3, 32, 2)
        with torch.no_grad():
            block.attn.c_attn.weight[:, 64:] += change_of(delta, 2.0).T
    far(model(**data).logits, lively("gpt2")(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_dropout_acts_in_training_on_its_own_branch_only() -> None:
    model = adapted("llama", graft.MultiLoRA(rank=2, alpha=2, dropout=0.5))
    delta = model.adapters["a"].at("model.layers.0.self_attn.q_proj")
    x_BTI, y_BTO = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    model.train()
    torch.manual_seed(7)
    dropped = delta.after(x_BTI, y_BTO)
    torch.manual_seed(7)
    close(dropped, y_BTO + F.dropout(x_BTI, 0.5) @ change_of(delta, 1.0).T)


def test_combines_to_one_lora() -> None:
    """Ranks add up: n r of this one, and those of the others."""
    model = adapted("gpt2", graft.MultiLoRA(rank=2, targets=("attention.value", "ffn.up")))
    data = data_of("gpt2")
    perturb(graft.attach(model, graft.LoRA(rank=2, targets=("ffn.up",)), "lora"), 3, 0.3)
    graft.use(model, {"a": 0.5, "lora": 2.0})
    expected = model(**data).logits
    combined = graft.combine(model, {"a": 0.5, "lora": 2.0}, "sum")
    assert {delta.A.shape[0] for _, delta in combined.items()} == {6, 8}
    graft.use(model, "sum")
    close(model(**data).logits, expected)


def test_counts() -> None:
    """n (r (in + out) + out); one number for each module with per_output off."""
    llama, linears = meta("Llama-2-7B"), 32 * 7
    per_rank = 19_988_480 // 8
    outputs = 32 * (5 * 4096 + 2 * 11008)
    adapter = graft.attach(llama, graft.MultiLoRA(rank=8, count=3))
    assert adapter.trainable == adapter.saved == 3 * (8 * per_rank + outputs) == 64_045_056
    scalar = graft.attach(llama, graft.MultiLoRA(rank=8, count=3, per_output=False), "b")
    assert scalar.trainable == 3 * (8 * per_rank + linears)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_folder_has_names_of_its_own(arch: str, tmp_path: Path) -> None:
    model, data = adapted(arch, graft.MultiLoRA(rank=2, count=3)), data_of(arch)
    folder = graft.save(model, "a", tmp_path / "a")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for site, delta in model.adapters["a"].items():
        if isinstance(delta, CopyDelta):
            continue
        key = f"base_model.model.{site.path}"
        into, out = site.in_features, site.out_features
        assert tensors[f"{key}.lora_A"].shape == (3, 2, into) and tensors[f"{key}.lora_B"].shape == (3, out, 2)
        assert tensors[f"{key}.lora_scaling"].shape == (3, out)
    again = lively(arch)
    graft.load(again, folder)
    assert torch.equal(again(**data).logits, model(**data).logits)


def test_scales_are_vectors_for_trainers() -> None:
    """Weight decay spares what has one axis."""
    adapter = graft.attach(tiny("llama"), graft.MultiLoRA(rank=2, count=3))
    for _, delta in adapter.items():
        assert isinstance(delta, MultiLoRADelta) and delta.lora_scaling.dim() == 1


def test_errors() -> None:
    for settings, message in (
        ({"rank": 0}, "rank must be"),
        ({"count": 0}, "count must be"),
        ({"count": 1.5}, "count: input should be"),
        ({"alpha": 0}, "not 0"),
        ({"alpha": float("nan")}, "finite"),
        ({"dropout": -0.1}, "dropout"),
    ):
        with pytest.raises(graft.ConfigError, match=message):
            graft.MultiLoRA(**settings)  # type: ignore[arg-type]
    with pytest.raises(graft.SiteError, match="MultiLoRA acts on linears"):
        graft.attach(tiny("llama"), graft.MultiLoRA(targets=("embedding", "ffn.down")))
    method = graft.MultiLoRA(rank=3, count=2, per_output=False, targets=("ffn.down",))
    assert from_dict(method.to_dict()) == method


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_saves_as_plain_lora_on_request(arch: str, tmp_path: Path) -> None:
    import peft

    model, data = adapted(arch, graft.MultiLoRA(rank=2, count=3, modules_to_save=("lm_head",))), data_of(arch)
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 6, ["lm_head"])
    close(peft.PeftModel.from_pretrained(lively(arch), folder).eval()(**data).logits, model(**data).logits)
    again = lively(arch)
    graft.load(again, folder)
    close(again(**data).logits, model(**data).logits)
