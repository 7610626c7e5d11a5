"""LoRA beside fused experts: peft takes some names for the experts, so these are refused or kept in our own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graft
from examples import perturb
from tiny import IDS, VOCAB, batch

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
DENSE = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
"""The feed-forward of a layer without experts."""


def moe() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **IDS, mlp_only_layers=[0])).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch("llama", rows=2)["input_ids"]).logits


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys", "ignore:The following alpha_pattern keys")
def test_peft_adapts_the_experts_for_the_names_of_a_dense_layer() -> None:
    model = peft.get_peft_model(moe(), peft.LoraConfig(target_modules=DENSE, r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".layers.1.mlp.experts." in name for name in trained)


def test_a_dense_layer_is_kept_in_our_own_form(tmp_path: Path) -> None:
    model = moe()
    perturb(graft.attach(model, graft.LoRA(rank=2, targets=("q_proj", *DENSE)), "a"))
    with pytest.raises(graft.AdapterFileError, match=r"cannot be a peft folder: peft may take .* fused experts"):
        graft.save(model, "a", tmp_path / "a", form="peft")
    graft.save(model, "a", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "GRAFT_LORA"
    again = moe()
    graft.load(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))


def test_attention_alone_is_peft_s(tmp_path: Path) -> None:
    model = moe()
    perturb(graft.attach(model, graft.LoRA(rank=2), "a"))
    graft.save(model, "a", tmp_path / "a", form="peft")
    theirs = peft.PeftModel.from_pretrained(moe(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(moe())).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], DENSE, "all-linear", r".*\.q_proj"], ids=str)
def test_such_targets_of_peft_are_refused(targets: Any, tmp_path: Path) -> None:
    with pytest.raises(graft.ConfigError, match=r"^LoraConfig: target_modules: .* fused experts"):
        graft.attach(moe(), peft.LoraConfig(target_modules=targets))
    peft.get_peft_model(moe(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    with pytest.raises(graft.AdapterFileError, match=r"target_modules: .* fused experts"):
        graft.load(moe(), tmp_path)
