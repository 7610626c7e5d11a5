"""GLoRA and peft's GLORA: the same logits, folders in both directions, config objects, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft

peft = pytest.importorskip("peft")
# peft's own use of what transformers deprecates, and its note on (O, I) zeros, which we do not write
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Found missing adapter keys.*glora_A.*zeros")

ARCHS = ("llama", "bert", "t5", "mt5", "bart")
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "mt5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
FORMS = [
    {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
]


def biased(model: Any) -> Any:
    """The model with biases that are not zero."""
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if name.endswith("bias") and p.dim() == 1:
            p.data += torch.randn(p.shape, generator=generator)
    return model


CASES = [(arch, {}) for arch in ARCHS] + [(arch, fields) for arch in ("llama", "bert") for fields in FORMS]


@pytest.mark.parametrize(("arch", "fields"), CASES)
def test_equals_peft(arch: str, fields: dict[str, str]) -> None:
    """The same values in both; the config object is what is attached."""
    config = peft.GloraConfig(r=3, target_modules=["query", "value"] if arch == "bert" else None, **fields)
    model = lively(arch)
    adapter = graft.attach(model, config, "a")
    assert adapter.peft_compat and isinstance(adapter.method, graft.GLoRA)
    assert adapter.method.rank == 3 and adapter.method.a == fields.get("config_A_B", "lora")
    twin = peft_twin(arch, config)
    generator = torch.Generator().manual_seed(1)
    names = set()
    for site, delta in adapter.items():
        theirs = inner(twin, site.path)
        for name, p in delta.named_parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
            part, _, leaf = name.partition(".")
            copy_into(getattr(theirs.get_submodule(part)["default"], leaf), p)  # type: ignore[index]
            names.add(f"{site.path}.{part}.default.{leaf}")
    assert {n.removeprefix("base_model.model.") for n, p in twin.named_parameters() if p.requires_grad} == names
    data = data_of(arch)
    expected = biased(twin)(**data).logits
    far(expected, biased(lively(arch))(**data).logits)
    close(biased(model)(**data).logits, expected)


def logits(model: Any, arch: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**data_of(arch)).logits


@pytest.mark.parametrize(("arch", "fields"), [*CASES, ("bert", {"config_A_B": "none", "config_C": "vector"})])
def test_folders_in_both_directions(arch: str, fields: dict[str, str], tmp_path: Path) -> None:
    names = {"target_modules": ["query", "value"]} if arch == "bert" else {}
    twin = peft_twin(arch, peft.GloraConfig(r=3, task_type=TASKS[arch], **fields, **names))
    torch.manual_seed(2)
    for p in twin.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    expected = logits(twin, arch)
    twin.save_pretrained(tmp_path / "theirs")
    model = lively(arch)
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert adapter.peft_compat
    close(logits(model, arch), expected)
    folder = graft.save(model, "a", tmp_path / "ours", form="peft")
    written = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    large = {key for key in theirs if key.endswith(("glora_A.zeros", "glora_B.zeros"))}
    assert set(written) == set(theirs) - large and bool(large) == (fields.get("config_A_B") == "none")
    close(logits(peft.PeftModel.from_pretrained(lively(arch), folder), arch), expected)
    for card in (True, False):
        if not card:
            (folder / "graft.json").unlink()
        again = lively(arch)
        graft.load(again, folder, "b")
        assert torch.equal(logits(again, arch), logits(model, arch))


def test_ours_is_written_as_pefts_where_it_is_the_same(tmp_path: Path) -> None:
    folder = graft.save(adapted("llama", graft.GLoRA()), "a", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "GLORA" and config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 4
    assert (config["config_A_B"], config["config_C"], config["config_D_E"]) == ("lora", "lora", "vector")
    path = "model.layers.1.self_attn.v_proj"
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"supernet": True}, "no supernet"),
        ("llama", {"genes": {path: ("lora", "lora", "none", "none", "none")}}, "one form for all layers"),
        ("llama", {"a": "vector"}, "one form for A and B"),
        ("bert", {"e": "none"}, "one for D and E"),
        ("llama", {"a": "lora_2", "b": "lora_2"}, "one rank"),
        ("llama", {"add_bias": True}, "adds no bias to model.layers.0"),
        ("gpt2", {}, "plain linears"),
        ("phi3", {}, "takes the fused .* whole"),
    ]
    for i, (arch, fields, match) in enumerate(kinds):
        model = adapted(arch, graft.GLoRA(**fields))
        with pytest.raises(graft.AdapterFileError, match=match):
            graft.save(model, "a", tmp_path / "peft", form="peft")
        folder = graft.save(model, "a", tmp_path / f"own{i}")
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "GRAFT_GLORA"
        again = lively(arch)
        assert graft.load(again, folder, "a").method == model.adapters["a"].method
        close(logits(again, arch), logits(model, arch), 1e-6)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"r": 0}, "rank must be"),
        ({"config_A_B": "dora"}, "a is one of"),
        ({"config_C": "constant"}, "c is one of"),
        ({"config_D_E": None}, None),
        ({"use_rslora": True}, "use_rslora"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["norm"]}, "norm"),
    ],
)
def test_fields_of_folders(fields: dict[str, Any], match: str | None, tmp_path: Path) -> None:
    folder = graft.save(
        adapted("llama", graft.GLoRA(d="constant", e="constant"), peft_compat=True), "a", tmp_path / "a"
    )
    (folder / "graft.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    model = lively("llama")
    if match is None:  # null is peft's default
        graft.load(model, folder)
        return
    with pytest.raises(graft.AdapterFileError, match=match):
        graft.load(model, folder)
    assert not hasattr(model, "adapters")


def test_zeros_are_optional_but_must_be_zero(tmp_path: Path) -> None:
    model = adapted("llama", graft.GLoRA())
    folder = graft.save(model, "a", tmp_path / "a")
    (folder / "graft.json").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    zeros = sorted(key for key in tensors if key.endswith(".zeros"))
    assert len(zeros) == 4 * 3 and all(not tensors[key].any() for key in zeros)
    shutil.copytree(folder, tmp_path / "bad")
    safetensors.torch.save_file({key: t for key, t in tensors.items() if key not in zeros}, file)
    again = lively("llama")
    graft.load(again, folder, "a")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    bad = tensors | {zeros[0]: torch.ones_like(tensors[zeros[0]])}
    safetensors.torch.save_file(bad, tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(graft.AdapterFileError, match="the config does not use are not zero"):
        graft.load(lively("llama"), tmp_path / "bad", "a")


def test_config_objects_that_are_refused() -> None:
    for fields, match in (({"init_weights": False}, "init_weights"), ({"bias": "glora_only"}, "bias = 'glora_only'")):
        with pytest.raises(graft.ConfigError, match=match):
            graft.attach(lively("llama"), peft.GloraConfig(**fields))
