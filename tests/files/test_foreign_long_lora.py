"""LongLoRA's folders against the steps of its own merging script: load the trained modules, then merge the pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import logits, logits_of_plain
from torch import Tensor
from transformers import LlamaForCausalLM

import graft
from graft.foreign.long_lora import read_long_lora
from tiny import tiny

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FACTOR, ALPHA, RANK = 2.0, 16, 2


def state_of(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `get_trainable_weights.py` writes: the pairs, and the modules with "embed" or "norm" in their names."""
    torch.manual_seed(2)
    weights = model.state_dict()
    pairs = {}
    for key, weight in weights.items():
        if key.split(".")[-2] in LINEARS:
            path = f"base_model.model.{key.removesuffix('.weight')}"
            pairs[f"{path}.lora_A.weight"] = 0.3 * torch.randn(RANK, weight.shape[1])
            pairs[f"{path}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], RANK)
    named = {key: value for key, value in weights.items() if "embed" in key or "norm" in key}
    return pairs, {key: value + 0.3 * torch.randn_like(value) for key, value in named.items()}


def folder_of(tmp_path: Path, arch: str = "llama", **fields: Any) -> Path:
    folder = tmp_path / "long"
    folder.mkdir()
    pairs, trained = state_of(tiny(arch))
    torch.save(pairs, folder / "adapter_model.bin")
    torch.save(trained, folder / "trainable_params.bin")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(LINEARS), "bias": "none"}
    config |= {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", "inference_mode": True, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def scaled(factor: float = FACTOR, **overrides: Any) -> Any:
    """The base with its positions divided, as LongLoRA's scripts set it up."""
    source = tiny("llama", **overrides)
    config = type(source.config)(**source.config.to_dict())
    config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(source.state_dict())
    return model


def merged() -> Any:
    """`merge_lora_weights_and_save_hf_model.py`, line by line."""
    model = scaled()
    pairs, trained = state_of(tiny("llama"))
    model.load_state_dict(trained, strict=False)
    for key, A in pairs.items():
        if "lora_A" in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight.data += ALPHA / RANK * pairs[key.replace("lora_A", "lora_B")] @ A
    return model


@pytest.mark.parametrize("told", ["given", "rope_scaling", "rope_parameters", "the base's"])
def test_equals_the_merged_model(tmp_path: Path, told: str) -> None:
    folder = folder_of(tmp_path)
    if told in ("rope_scaling", "rope_parameters"):
        name = "type" if told == "rope_scaling" else "rope_type"
        (folder / "config.json").write_text(json.dumps({told: {name: "linear", "factor": FACTOR}}))
    if told == "the base's":
        (folder / "config.json").write_text(json.dumps({"rope_scaling": {"type": "linear", "factor": FACTOR}}))
    model = scaled() if told == "the base's" else tiny("llama")
    adapter = read_long_lora(model, folder, rope_factor=FACTOR if told == "given" else None)
    method: Any = adapter.method
    assert method.name == "long_lora" and method.embedding and method.norms
    assert method.rope_factor == (1.0 if told == "the base's" else FACTOR)
    want = logits_of_plain(merged(), "llama")
    assert (want - logits_of_plain(tiny("llama"), "llama")).abs().max() > 1e-2
    assert torch.allclose(logits(model, "llama"), want, rtol=1e-4, atol=1e-5)


def test_saved_again_in_our_form(tmp_path: Path) -> None:
    model = tiny("llama")
    read_long_lora(model, folder_of(tmp_path), "a", rope_factor=FACTOR)
    again = tiny("llama")
    graft.load(again, graft.save(model, "a", tmp_path / "ours"), "a")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_norms_alone_and_other_modules(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    trained = torch.load(folder / "trainable_params.bin", weights_only=True)
    norms = {key: value for key, value in trained.items() if "norm" in key}
    torch.save(norms | {"lm_head.weight": torch.ones(99, 32)}, folder / "trainable_params.bin")
    model = tiny("llama")
    method: Any = read_long_lora(model, folder, rope_factor=1).method
    assert (method.embedding, method.norms, method.modules_to_save) == (False, True, ("lm_head",))
    found = logits(model, "llama")
    assert torch.allclose(found, found[..., :1].expand_as(found), atol=1e-4)  # a head of ones: all logits alike


def refused(
    folder: Path, match: str, error: Any = graft.AdapterFileError, arch: str = "llama", factor: float | None = 1.0
) -> None:
    model = tiny(arch)
    with pytest.raises(error, match=match) as caught:
        read_long_lora(model, folder, rope_factor=factor)
    assert "\n" not in str(caught.value) and not hasattr(model, "adapters")


def test_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    refused(folder, "rope_factor: .* no config.json", graft.ConfigError, factor=None)
    refused(folder, "rope_factor", graft.ConfigError, factor=0.5)
    (folder / "config.json").write_text(json.dumps({"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    refused(folder, "does not divide positions by a number", factor=None)
    refused(folder, "is tied to the embedding", arch="llama_tied")
    good = torch.load(folder / "trainable_params.bin", weights_only=True)
    for bad, match in (
        (good | {"model.layers.9.norm.weight": torch.zeros(32)}, "model.layers.9.norm is no module"),
        ({k: v for k, v in good.items() if "layers.1.input" not in k}, "1 tensors are missing"),
        (good | {"model.norm.weight": torch.zeros(33)}, r"model.norm.weight has shape \(33,\)"),
        (good | {"model.embed_tokens.weight": torch.zeros(100, 32)}, r"has shape \(100, 32\), this model needs \(99"),
        (good | {"model.norm.weight": {}}, "norm.weight is a dict"),
    ):
        torch.save(bad, folder / "trainable_params.bin")
        refused(folder, match)
    (folder / "trainable_params.bin").unlink()
    refused(folder, "neither trainable_params.safetensors nor trainable_params.bin")


def test_another_kind_of_adapter(tmp_path: Path) -> None:
    refused(folder_of(tmp_path, use_dora=True), "is LoRA with more beside it, not dora")


def test_a_leftover_pair(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, target_modules=["q_proj"])
    refused(folder, "k_proj.lora_A.weight .* has no place")
