"""LoRA-FA against LoRA, what autograd keeps for it, and its projected gradient against dense algebra and peft's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_counts import meta
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from graft.method import from_dict
from graft.methods.lora import LoRADelta
from graft.methods.lora_fa import LoRAFADelta
from tiny import batch, tiny


@torch.no_grad()
def share(source: Any, target: Any) -> None:
    """A and B of one adapter into another."""
    for site, delta in source.items():
        target.at(site.path).A.copy_(delta.A)
        target.at(site.path).B.copy_(delta.B)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
def test_computes_and_merges_as_lora_and_trains_b_alone(arch: str) -> None:
    settings: dict[str, Any] = {"rank": 3, "alpha": 7, "rslora": True, "head": False}
    model, other = adapted(arch, graft.LoRAFA(**settings)), adapted(arch, graft.LoRA(**settings), seed=2)
    adapter, data = model.adapters["a"], data_of(arch)
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"B"}
    assert {name.rpartition(".")[2] for name, _ in adapter.named_buffers()} == {"A"}
    share(adapter, other.adapters["a"])
    logits = model(**data).logits
    far(logits, lively(arch)(**data).logits)
    close(logits, other(**data).logits)
    logits.square().sum().backward()
    other(**data).logits.square().sum().backward()
    for site, delta in adapter.items():
        close(delta.B.grad, other.adapters["a"].at(site.path).B.grad)
    graft.merge(model, "a")
    close(model(**data).logits, logits.detach())


def kept_by_autograd(model: Any, data: dict[str, Tensor]) -> int:
    """Elements of all activations that the backward of one loss keeps, each storage once; no weights."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**data).loss.backward()
    found = [tensor for at, tensor in kept.items() if at not in weights]
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in found)


def test_autograd_does_not_keep_the_inputs() -> None:
    """On all linears of a Llama: two norms' outputs and the gated product of each layer; the rest others keep too."""
    data = batch("llama")
    kept = {}
    for kind in (graft.LoRA, graft.LoRAFA):
        model = tiny("llama").train()
        graft.attach(model, kind(rank=4, targets="all-linear"))
        kept[kind] = kept_by_autograd(model, data)
    tokens = data["input_ids"].numel()
    assert kept[graft.LoRA] - kept[graft.LoRAFA] == 2 * tokens * (2 * 32 + 48)


@pytest.mark.parametrize(("kind", "size"), [(graft.LoRA, 4 * 6 + 32 * 6), (graft.LoRAFA, 4 * 6)])
def test_one_site_keeps_rank_numbers_for_a_token(kind: Any, size: int) -> None:
    model = tiny("llama")
    delta = graft.attach(model, kind(rank=4)).at("model.layers.0.self_attn.q_proj")
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if (
            tensor.dim() == 3 or tensor.shape[0] == 6
        ):  # activations of 2 x 3 tokens; A and B have 2 dims and 4 or 32 rows
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_BTO = delta.after(torch.randn(2, 3, 32), torch.zeros(2, 3, 32))
    assert y_BTO.requires_grad and sum(sizes) == size


# -------------------------------------------------------------------------------------------------- projected gradient


def test_projected_gradient_is_the_full_gradient_on_the_rows_of_a() -> None:
    """s g_B' A = G A^T (A A^T)^-1 A, with G the gradient of the weight itself."""
    method = graft.LoRAFA(rank=4, alpha=6, projected=True, alpha_pattern={"v_proj": 3})
    model, data = adapted("llama", method), data_of("llama", labels=True)
    adapter = model.adapters["a"]
    weights = [site.module.weight.requires_grad_(True) for site, _ in adapter.items()]
    model(**data).loss.backward()
    plain = [delta.B.grad.clone() for _, delta in adapter.items()]
    method.before_step(adapter, 0, 1)
    for (_, delta), weight, before in zip(adapter.items(), weights, plain, strict=True):
        s, A, G = delta.scale, delta.A, weight.grad
        close(before, s * G @ A.T)
        close(s * delta.B.grad @ A, G @ A.T @ torch.linalg.inv(A @ A.T) @ A)


def test_parts_of_a_fused_linear_are_projected_each_on_its_own_rows() -> None:
    method = graft.LoRAFA(rank=4, projected=True)
    model = adapted("gpt2", method)
    model(**data_of("gpt2", labels=True)).loss.backward()
    delta = model.adapters["a"].at("transformer.h.0.attn.c_attn")
    g, A, s = delta.B.grad.clone(), delta.A, delta.scale
    method.before_step(model.adapters["a"], 0, 1)
    for rows, part in ((slice(0, 32), A[:4]), (slice(32, 64), A[4:])):
        close(delta.B.grad[rows], g[rows] @ torch.linalg.inv(part @ part.T) / s**2)
    method.before_step(model.adapters["a"], 0, 1)
    model.zero_grad()
    method.before_step(model.adapters["a"], 1, 1)  # nothing to project
    assert delta.B.grad is None


def test_the_inverse_is_computed_once_for_one_a() -> None:
    delta = graft.attach(tiny("llama"), graft.LoRAFA(rank=4, projected=True)).at("model.layers.0.self_attn.q_proj")
    delta.B.grad = torch.ones_like(delta.B)
    delta.project()
    first = delta.inverse[1]
    delta.project()
    assert delta.inverse[1] is first and first.dtype == torch.float32
    with torch.no_grad():
        delta.state_dict()["A"].mul_(2)  # as a checkpoint is read
    delta.project()
    close(delta.inverse[1], first / 4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_steps_equal_pefts_optimizer(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of Adam, with a scale of its own for one module; peft is told not to multiply in bf16."""
    import peft
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    pattern = {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}} if arch == "llama" else {}
    method = graft.LoRAFA(rank=4, alpha=6, projected=True, init="random", **pattern)
    config = peft.LoraConfig(r=4, lora_alpha=6, **pattern)
    model, other = lively(arch).double(), peft_twin(arch, config).double()
    adapter = graft.attach(model, method, "a", peft_compat=True).double()
    for site, delta in adapter.items():
        copy_into(inner(other, site.path).lora_A["default"].weight, delta.A)
        copy_into(inner(other, site.path).lora_B["default"].weight, delta.B)
    start = {site.path: delta.B.detach().clone() for site, delta in adapter.items()}
    data = data_of(arch, labels=True)
    theirs = create_lorafa_optimizer(other, 4, 6, lr=1e-2)
    ours = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for step in range(4):
        # Theirs is added before the bias correction, torch's behind it.
        ours.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** (step + 1))
        for each, optimizer in ((other, theirs), (model, ours)):
            each.zero_grad()
            each(**data).loss.backward()
            if each is model:
                method.before_step(adapter, step, 4)
            optimizer.step()
    for site, delta in adapter.items():
        far(delta.B, start[site.path])
        close(delta.B, inner(other, site.path).lora_B["default"].weight)


def test_graft_trainer_projects(tmp_path: Path) -> None:
    """One step of SGD from B = 0: both forms see the same gradient."""
    rows = batch("llama", rows=4)
    data = [{key: value[i].tolist() for key, value in rows.items()} for i in range(4)]
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0}
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    found = []
    for projected in (False, True):
        model = tiny("llama")
        torch.manual_seed(1)
        adapter = graft.attach(model, graft.LoRAFA(rank=4, projected=projected))
        args = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **settings)
        trainer = graft.GraftTrainer(model, args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found.append(adapter)
    for site, delta in found[1].items():
        plain = found[0].at(site.path)
        assert torch.equal(delta.A, plain.A) and plain.B.any()
        close(delta.B, plain.B @ torch.linalg.inv(delta.A @ delta.A.T) / delta.scale**2)


# ---------------------------------------------------------------------------------------------------------------- files


def test_count_of_llama_7b() -> None:
    adapter = graft.attach(meta("Llama-2-7B"), graft.LoRAFA(rank=64, targets="all-linear"))
    assert (adapter.trainable, adapter.saved) == (87_031_808, 159_907_840)
    assert adapter.trainable == 64 * 32 * (5 * 4096 + 2 * 11008)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_folder_is_plain_lora(arch: str, tmp_path: Path) -> None:
    """With our card A stays frozen; as a bare peft folder it is LoRA, and peft reads it."""
    import peft

    model, data = adapted(arch, graft.LoRAFA(rank=4, projected=True)), data_of(arch)
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    close(peft.PeftModel.from_pretrained(lively(arch), folder).eval()(**data).logits, model(**data).logits)
    again = lively(arch)
    adapter = graft.load(again, folder, trainable=True)
    assert adapter.method == model.adapters["a"].method and adapter.saved == model.adapters["a"].saved
    assert adapter.trainable == model.adapters["a"].trainable < adapter.saved
    assert torch.equal(again(**data).logits, model(**data).logits)
    (folder / "graft.json").unlink()
    bare = graft.load(lively(arch), folder, trainable=True)
    assert type(bare.method) is graft.LoRA and bare.trainable == bare.saved
    whole = dict(bare.items())
    for site, delta in model.adapters["a"].items():
        found = next(each for s, each in whole.items() if s.path == site.path)
        if isinstance(delta, LoRADelta):
            close(found.weight_delta(), delta.weight_delta())


def test_mixes_with_lora_in_stacked_products() -> None:
    model, data = lively("llama"), data_of("llama", rows=4)
    for i in range(3):
        nn.init.normal_(graft.attach(model, graft.LoRAFA(rank=2 + i), f"a{i}").at("model.layers.0.self_attn.q_proj").B)
    rows = ["a0", "a1", "a2", None]
    with graft.route(model, rows):
        mixed = model(**data).logits
    for i, entry in enumerate(rows):
        graft.use(model, entry)
        close(mixed[i], model(**data).logits[i])


def test_errors() -> None:
    for settings, message in (
        ({"b_ratio": 4.0}, "A does not train"),
        ({"init": "pissa"}, "LoRAFA: init"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(graft.ConfigError, match=message):
            graft.LoRAFA(**settings)
    with pytest.raises(graft.SiteError, match="frozen zero never acts"):
        graft.attach(tiny("llama"), graft.LoRAFA(targets=("embedding",)))
    with pytest.raises(graft.SiteError, match="cannot be projected"):
        graft.attach(tiny("llama"), graft.LoRAFA(rank=33, projected=True))
    assert graft.attach(tiny("llama"), graft.LoRAFA(rank=33)).trainable == 2 * 33 * (32 + 16)
    method = graft.LoRAFA(rank=3, projected=True, targets="all-linear")
    assert from_dict(method.to_dict()) == method


def test_start() -> None:
    """A as LoRA's, and a different one for each site; B zero."""
    adapter = graft.attach(tiny("llama"), graft.LoRAFA(rank=64, targets=("ffn.down",)))
    A, other = (delta.A for _, delta in adapter.items())
    assert 0.98 / math.sqrt(48) < A.abs().max() <= 1 / math.sqrt(48) and not torch.equal(A, other)
    assert all(isinstance(delta, LoRAFADelta) and not delta.B.any() for _, delta in adapter.items())
