"""DoRA and peft's: logits, gradients, folders both ways, config objects."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from graft.methods.dora import EmbeddingDoRADelta
from tiny import tiny

PEFT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    (
        "llama",
        {"targets": ("lm_head", "embed_tokens", "k_proj")},
        {"target_modules": ["lm_head", "embed_tokens", "k_proj"]},
    ),
    ("gpt2", {"targets": ("wte", "c_attn", "c_proj")}, {"target_modules": ["wte", "c_attn", "c_proj"]}),
    ("gemma3", {"targets": ("embed_tokens",)}, {"target_modules": ["embed_tokens"]}),
    ("bert", {"bias": "lora_only"}, {"bias": "lora_only"}),
    ("bert", {"targets": ("dense",), "rslora": True}, {"target_modules": ["dense"], "use_rslora": True}),
    ("t5", {}, {}),
    ("mt5", {"rank_pattern": {"q": 2}}, {"rank_pattern": {"q": 2}}),
    ("bart", {}, {}),
]


def config_of(**settings: Any) -> Any:
    import peft

    return peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **settings)


@pytest.mark.parametrize(("arch", "ours", "theirs"), PEFT)
def test_equals_peft(arch: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Logits and gradients."""
    model = adapted(arch, graft.DoRA(rank=4, alpha=6, head=False, **ours), peft_compat=True)
    other, data = peft_twin(arch, config_of(**theirs)), data_of(arch, rows=1)  # peft trains no padding token's column
    pairs = [pair for site, delta in model.adapters["a"].items() for pair in pairs_of(inner(other, site.path), delta)]
    assert len(pairs) == sum(p.requires_grad for p in other.parameters()) == sum(1 for _ in model.adapters.parameters())
    for own, their in pairs:
        copy_into(their, own)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, other(**data).logits)
    model(**data).logits.square().mean().backward()
    other(**data).logits.square().mean().backward()
    for own, their in pairs:
        close(own.grad, their.grad)


def pairs_of(module: Any, delta: Any) -> list[tuple[Any, Any]]:
    """Our parameters of a site beside peft's."""
    found = [(delta.magnitude, module.lora_magnitude_vector["default"].weight)]
    if isinstance(delta, EmbeddingDoRADelta):
        return [*found, (delta.A, module.lora_embedding_A["default"]), (delta.B, module.lora_embedding_B["default"])]
    found += [(delta.A, module.lora_A["default"].weight), (delta.B, module.lora_B["default"].weight)]
    return found if delta.bias is None else [*found, (delta.bias, module.base_layer.bias)]


def read_by_peft(arch: str, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(lively(arch), folder).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "mt5", "bart"])
@pytest.mark.parametrize("names", [None, "all-linear"])
def test_folders_of_peft_and_back(arch: str, names: str | None, tmp_path: Path) -> None:
    other, data = peft_twin(arch, config_of(target_modules=names)), data_of(arch)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    other.save_pretrained(tmp_path / "theirs")
    model = lively(arch)
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert isinstance(adapter.method, graft.DoRA) and adapter.peft_compat
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, other(**data).logits)
    graft.save(model, "a", tmp_path / "ours", form="peft")
    close(read_by_peft(arch, tmp_path / "ours")(**data).logits, model(**data).logits)
    for card in (True, False):
        if not card:
            (tmp_path / "ours" / "graft.json").unlink()
        again = lively(arch)
        graft.load(again, tmp_path / "ours", "b")
        assert torch.equal(again(**data).logits, model(**data).logits)


@pytest.mark.filterwarnings("ignore")
def test_folder_of_parts_of_a_fused_linear(tmp_path: Path) -> None:
    """One pair for the whole; rows that no part has keep the base's length."""
    model, data = adapted("gpt2", graft.DoRA(rank=4, targets=("attention.query", "attention.value"))), data_of("gpt2")
    graft.save(model, "a", tmp_path / "a", form="peft")
    close(read_by_peft("gpt2", tmp_path / "a")(**data).logits, model(**data).logits)
    again = lively("gpt2")
    adapter = graft.load(again, tmp_path / "a", "a")
    assert adapter.method == model.adapters["a"].method and not adapter.peft_compat
    assert torch.equal(again(**data).logits, model(**data).logits)
    from safetensors.torch import load_file, save_file

    card = json.loads((tmp_path / "a" / "graft.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_magnitude_vector"
    tensors[key][40] *= 1.3  # a row of the keys
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "graft.json").write_text(json.dumps({**card, "tensors_sha256": ""}))
    with pytest.raises(graft.AdapterFileError, match="parts of a fused linear"):
        graft.load(lively("gpt2"), tmp_path / "a", "a")


def test_parts_of_a_fused_linear_in_another_precision(tmp_path: Path) -> None:
    """The lengths of the other rows are those of the base that the folder was made on."""
    model = adapted("gpt2", graft.DoRA(rank=4, targets=("attention.query", "attention.value")))
    graft.save(model, "a", tmp_path / "a")
    again = lively("gpt2").bfloat16()
    adapter = graft.load(again, tmp_path / "a", "a", check="off")
    for site, delta in adapter.items():
        assert torch.equal(delta.magnitude, model.adapters["a"].at(site.path).magnitude)  # type: ignore[union-attr]


def test_attach_takes_a_config_of_peft() -> None:
    model = tiny("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = graft.attach(model, config_of(task_type="SEQ_CLS", lora_dropout=0.1))
    expected = graft.DoRA(rank=4, alpha=6, dropout=0.1)
    assert adapter.method == expected and adapter.peft_compat
