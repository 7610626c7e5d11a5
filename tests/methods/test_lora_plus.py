"""LoRA+ (`b_ratio`): the rate of each parameter, beside peft's optimizer and in the trainer's groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from twins import adapted, lively, peft_twin

import graft
from tiny import tiny

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", graft.LoRA(rank=4, b_ratio=16), {}),
    (
        "bert",
        graft.LoRA(rank=4, b_ratio=16, bias="lora_only", lora_bias=True),
        {"bias": "lora_only", "lora_bias": True},
    ),
    ("bert", graft.LoRA(rank=4, b_ratio=16), {"task_type": "SEQ_CLS"}),
    ("llama", graft.DoRA(rank=4, b_ratio=16), {"use_dora": True}),
    ("bert", graft.LoRA(rank=4, b_ratio=16, modules_to_save=("LayerNorm",)), {"modules_to_save": ["LayerNorm"]}),
    ("llama", graft.LoRA(rank=4, b_ratio=16, modules_to_save=("model.norm",)), {"modules_to_save": ["model.norm"]}),
    ("gpt2", graft.DoRA(rank=4, b_ratio=16, bias="all"), {"use_dora": True, "bias": "all"}),
]


def rates(adapter: Any) -> dict[str, float]:
    """Each parameter's rate by its site and name."""
    found = {}
    for site, delta in adapter.items():
        for name, parameter in delta.named_parameters():
            full = next(key for key, value in adapter.named_parameters() if value is parameter)
            found[f"{site.path}.{name.removeprefix('copy.')}"] = adapter.method.rate(full, parameter)
    return found


@pytest.mark.parametrize(("arch", "method", "settings"), CASES)
def test_rates_are_those_of_peft(arch: str, method: Any, settings: dict[str, Any]) -> None:
    """B and everything with one dimension; A and a head's matrix at the plain rate."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    head = "task_type" in settings
    adapter = adapted(arch, type(method)(**{**method.__dict__, "head": head}), peft_compat=True).adapters["a"]
    other = peft_twin(arch, peft.LoraConfig(r=4, **settings))
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    expected = {
        named_as_ours(names[id(parameter)]): group["lr"] / 0.01
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates(adapter) == expected
    assert {1.0, 16.0} == set(expected.values())


def named_as_ours(name: str) -> str:
    """peft's name of a parameter in our terms."""
    name = name.removeprefix("base_model.model.")
    for theirs, ours in (
        ("lora_A.default.weight", "A"),
        ("lora_B.default.weight", "B"),
        ("lora_B.default.bias", "B_bias"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        ("base_layer.bias", "bias"),
        ("modules_to_save.default.", ""),
    ):
        name = name.replace(theirs, ours)
    return name


def test_default_is_one_rate_for_all() -> None:
    adapter = adapted("bert", graft.LoRA(rank=4, lora_bias=True)).adapters["a"]
    assert set(rates(adapter).values()) == {1.0}


@pytest.mark.parametrize("method", [graft.LoRA(rank=4, b_ratio=8, bias="all"), graft.DoRA(rank=4, b_ratio=8)])
def test_groups_of_the_trainer(method: Any, tmp_path: Path) -> None:
    """Each parameter in one group, with its rate; vectors are not decayed."""
    model = tiny("bert")
    adapter = graft.attach(model, method)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=0.01, weight_decay=0.1)
    optimizer = graft.GraftTrainer(model, args).create_optimizer()
    grouped = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    found = {id(p): (group["lr"], group["weight_decay"]) for p, group in grouped}
    assert len(found) == len(grouped) == sum(1 for _ in adapter.parameters())
    fast = 0
    for name, parameter in adapter.named_parameters():
        lr, decay = found[id(parameter)]
        assert lr == pytest.approx(0.08 if name.endswith((".B", ".magnitude", "bias")) else 0.01), name
        assert decay == (0.1 if parameter.dim() > 1 else 0.0), name
        fast += lr > 0.05
    assert 0 < fast < len(grouped)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [graft.LoRA, graft.DoRA])
def test_a_ratio_that_is_no_factor(ratio: float, kind: Any) -> None:
    with pytest.raises(graft.ConfigError, match=f"{kind.__name__}: b_ratio must be a (positive|finite) number"):
        kind(b_ratio=ratio)


def test_a_saved_folder_keeps_it(tmp_path: Path) -> None:
    model = adapted("llama", graft.LoRA(rank=4, b_ratio=16))
    graft.save(model, "a", tmp_path / "a", form="peft")
    assert graft.load(lively("llama"), tmp_path / "a").method == graft.LoRA(rank=4, b_ratio=16)
