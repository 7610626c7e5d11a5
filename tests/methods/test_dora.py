"""DoRA against m V / ||V|| in dense algebra, and against peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_counts import meta, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import Build
from graft.methods import dora
from graft.methods.dora import DoRADelta, EmbeddingDoRADelta
from tiny import tiny


def length(weight_OI: Tensor) -> Tensor:
    """The length of each row."""
    return weight_OI.square().sum(1).sqrt()


@torch.no_grad()
def scale_by_hand(module: Any, s: float, A: Tensor, B: Tensor, m: Tensor, rows: Any = slice(None)) -> None:
    """W = m V / ||V|| with V = W + s B A in some rows, in the module's own layout."""
    weight_OI = module.weight.T if isinstance(module, Conv1D | nn.Embedding) else module.weight
    V = weight_OI[rows] + s * B @ A
    weight_OI[rows] = (m / length(V))[:, None] * V


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
def test_scales_the_rows_of_a_low_rank_sum(arch: str) -> None:
    """The base's bias is not scaled; a trained one takes its place."""
    bias = "lora_only" if arch in ("bert", "gpt2") else "none"
    method = graft.DoRA(rank=4, alpha=6, targets="all-linear", bias=bias, head=False)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    for site, delta in model.adapters["a"].items():
        assert isinstance(delta, DoRADelta) and delta.A.shape == (4, site.in_features)
        module = hand.get_submodule(site.path)
        scale_by_hand(module, 6 / 4, delta.A, delta.B, delta.magnitude)
        if delta.bias is not None:
            module.bias.data.copy_(delta.bias)
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits, 1e-7)


def test_gradient_takes_the_norm_as_a_constant() -> None:
    delta, x_BI = delta_of("llama"), torch.randn(5, 32)
    weight: Any = delta.site.module.weight
    A, B, m = (value.detach().clone().requires_grad_() for value in (delta.A, delta.B, delta.magnitude))
    V = weight + 4.0 * B @ A
    (x_BI @ ((m / length(V).detach())[:, None] * V).T).square().sum().backward()
    delta.after(x_BI, x_BI @ weight.T).square().sum().backward()
    for own, expected in ((delta.A, A), (delta.B, B), (delta.magnitude, m)):
        assert own.grad is not None and expected.grad is not None
        close(own.grad, expected.grad)
    with_norm = m.detach().clone().requires_grad_()
    A.grad = None
    (x_BI @ ((with_norm / length(weight + 4.0 * B @ A))[:, None] * (weight + 4.0 * B @ A)).T).square().sum().backward()
    assert A.grad is not None and delta.A.grad is not None
    far(delta.A.grad, A.grad)


def delta_of(arch: str, path: str = "model.layers.0.self_attn.q_proj", **settings: Any) -> Any:
    return adapted(arch, graft.DoRA(rank=4, alpha=16, **settings)).adapters["a"].at(path)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
def test_starts_with_the_length_of_each_row(init: str) -> None:
    build = Build(lively("gpt2"))
    for role, wide in (("ffn.up", 128), ("embedding", 32), ("attention.value", 32)):
        method = graft.DoRA(rank=4, targets=(role,), init=init)
        site = method.sites(build)[0]
        delta: Any = method.delta(site, build)
        weight_OI = site.module.weight.T[64:] if role == "attention.value" else site.module.weight.T
        close(delta.magnitude, length(weight_OI + 4 * delta.B @ delta.A))
        assert delta.magnitude.shape == (wide,) and delta.magnitude.dtype == torch.float32
        assert torch.equal(delta.gain(delta.base_norm()), torch.ones(wide))  # not a rounding away from the base


@pytest.mark.parametrize(
    ("targets", "parts"), [(("attention.query", "attention.value"), (0, 2)), (("attention.key",), (1,))]
)
def test_parts_of_a_fused_linear(targets: tuple[str, ...], parts: tuple[int, ...]) -> None:
    method = graft.DoRA(rank=4, alpha=4, targets=targets)
    model, data, hand = adapted("gpt2", method), data_of("gpt2"), lively("gpt2")
    for i, block in enumerate(hand.transformer.h):
        delta = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn")
        assert delta.magnitude.shape == (32 * len(parts),)
        triples = zip(delta.A.split(4), delta.B.split(32), delta.magnitude.split(32), strict=True)
        for part, (A, B, m) in zip(parts, triples, strict=True):
            scale_by_hand(block.attn.c_attn, 1.0, A, B, m, slice(32 * part, 32 * part + 32))
        close(delta.weight_delta(), block.attn.c_attn.weight.T - lively("gpt2").transformer.h[i].attn.c_attn.weight.T)
    far(model(**data).logits, lively("gpt2")(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@pytest.mark.parametrize(("arch", "options"), [("gpt2", {}), ("gemma3", {}), ("bart", {"scale_embedding": True})])
def test_embeddings(arch: str, options: dict[str, Any]) -> None:
    """The length is over the vocabulary; a tied head keeps the base's weight."""
    model, data = adapted(arch, graft.DoRA(rank=4, alpha=4, targets=("embedding",)), **options), data_of(arch)
    hand = lively(arch, **options)
    for path in model.adapters["a"].sites:
        delta, module = model.adapters["a"].at(path), hand.get_submodule(path)
        assert isinstance(delta, EmbeddingDoRADelta) and delta.magnitude.shape == (32,)
        module.weight = nn.Parameter(module.weight.detach().clone())
        scale_by_hand(module, 1.0, delta.A, delta.B, delta.magnitude)
    far(model(**data).logits, lively(arch, **options)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_dropout_acts_on_the_pair_and_on_the_scaled_base() -> None:
    """y + (g - 1) W d + g s B A d, d the dropped input; the base's own y stays whole."""
    path = "bert.encoder.layer.0.attention.self.query"
    delta = adapted("bert", graft.DoRA(rank=4, alpha=8, dropout=0.5)).adapters["a"].at(path)
    module: Any = delta.site.module
    x_BTI = torch.randn(2, 3, 32)
    y_BTO = F.linear(x_BTI, module.weight, module.bias)
    gain = delta.magnitude / length(module.weight + 2 * delta.B @ delta.A)
    for training in (False, True):
        delta.train(training)
        torch.manual_seed(7)
        dropped = F.dropout(x_BTI, 0.5, training)
        torch.manual_seed(7)
        low = 2 * dropped @ delta.A.T @ delta.B.T
        close(delta.after(x_BTI, y_BTO), y_BTO + (gain - 1) * (dropped @ module.weight.T) + gain * low)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a value": lambda delta: delta.B.detach().mul_(2),
    "the base's weight": lambda delta: delta.site.module.weight.detach().add_(1),
    "other memory": lambda delta: setattr(delta.A, "data", delta.A.data * 2),
    "a state": lambda delta: delta.load_state_dict({k: v + 1 for k, v in delta.state_dict().items()}),
    "an optimizer": lambda delta: stepped(delta, fused=False),
    "a fused optimizer": lambda delta: stepped(delta, fused=True),
    "training": lambda delta: (delta.train().base_norm(), delta.A.data.mul_(2), delta.eval()),
    "precision": lambda delta: delta.double(),
}


def stepped(delta: Any, fused: bool) -> None:
    x_BI = torch.randn(3, 32)
    delta.requires_grad_(True)
    with torch.enable_grad():
        delta.after(x_BI, x_BI).square().sum().backward()
    torch.optim.AdamW(delta.parameters(), lr=1.0, fused=fused).step()
    delta.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_kept_norm_follows_every_change(change: str) -> None:
    path = "model.layers.0.self_attn.q_proj"
    model = adapted("llama", graft.DoRA(rank=4))
    delta: Any = model.adapters["a"].requires_grad_(False).at(path)
    before = delta.base_norm()
    assert delta.base_norm() is before
    CHANGES[change](delta)
    fresh = length(delta.site.module.weight + delta.scale * delta.B @ delta.A)
    close(delta.base_norm(), fresh)
    assert change == "precision" or (fresh - before).abs().max() > 1e-3
    assert delta.cached is not None
    assert copy.deepcopy(model).adapters["a"].at(path).cached is None  # in a copy, versions start anew


def test_norm_is_taken_at_every_step_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: (calls.append(1), own(*args))[1])
    model, data = adapted("llama", graft.DoRA(rank=4)), data_of("llama")
    counts = []
    steps = ((True, True, True), (True, True, True), (True, False, True), (True, False, False), (False, False, False))
    for trains, training, gradients in (*steps, (False, False, False)):
        model.train(training)
        model.adapters["a"].requires_grad_(trains)
        calls.clear()
        with torch.set_grad_enabled(gradients):
            model(**data)
        counts.append(len(calls))
    assert counts == [4, 4, 4, 4, 4, 0]


@torch.no_grad()
def test_values_written_past_torchs_count_are_seen_while_the_adapter_trains() -> None:
    """Averaged weights are swapped in through `.data`, in eval mode and without gradients."""
    model, data = adapted("llama", graft.DoRA(rank=4)), data_of("llama")
    model(**data)
    for parameter in model.adapters["a"].parameters():
        parameter.data.mul_(1.5)
    close(model(**data).logits, copy.deepcopy(model)(**data).logits)


def test_a_norm_kept_under_inference_mode_meets_a_backward() -> None:
    model, data = adapted("llama", graft.DoRA(rank=4)), data_of("llama", labels=True)
    with torch.inference_mode():
        model(**data)
    model(**data).loss.backward()
    assert all(p.grad is not None for p in model.adapters.parameters())
    with torch.inference_mode():  # a base made here has no versions to count
        made = tiny("llama")
        graft.attach(made, graft.DoRA(rank=4))
        close(made(**data).logits, tiny("llama")(**data).logits)


def test_norm_of_rows_that_nearly_cancel_or_are_zero() -> None:
    delta = delta_of("llama")
    weight: Any = delta.site.module.weight
    weight.data[3] = 0.0
    delta.B.data[3] = 0.0
    weight.data[5] = -delta.scale * (delta.B[5] @ delta.A) + 1e-4 * torch.randn(32)
    exact = length(weight.double() + delta.scale * delta.B.double() @ delta.A.double())
    assert exact[3] == 0 and 0 < exact[5] < 1e-2 * length(weight)[5]
    torch.testing.assert_close(delta.base_norm().double(), exact, rtol=1e-3, atol=0.0)
    x_BI = torch.randn(2, 32)
    y = delta.after(x_BI, x_BI @ weight.T)
    y.sum().backward()
    assert y.isfinite().all() and not y[:, 3].any()
    assert all(p.grad.isfinite().all() for p in delta.parameters())


@pytest.mark.parametrize("piece", [1, 100, 700])
@pytest.mark.parametrize("transposed", [False, True])
def test_norm_in_pieces_and_under_autocast(piece: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "PIECE", piece)
    W = torch.randn(48, 32).T if transposed else torch.randn(32, 48)
    B, A = torch.randn(32, 4), torch.randn(4, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(dora.row_norms(W, B, A, 0.5), length(W + 0.5 * torch.einsum("or,ri->oi", B.double(), A.double())).float())


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_beside_another_adapter_each_changes_the_base_alone(order: tuple[str, str]) -> None:
    """Changes add up, whatever the order; merged too."""
    model, data = adapted("gpt2", graft.DoRA(rank=4)), data_of("gpt2")
    perturb(graft.attach(model, graft.LoRA(rank=3, alpha=3), "b"), 5, 0.3)
    hand = lively("gpt2")
    with torch.no_grad():
        for path in model.adapters["a"].sites:
            for name in order:
                hand.get_submodule(path).weight += model.adapters[name].at(path).weight_delta().T
    graft.use(model, order)
    expected = model(**data).logits
    close(expected, hand(**data).logits)
    graft.merge(model, order)
    close(model(**data).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base(kind: str) -> None:
    """The norm is that of the weight that the base computes with."""
    bnb = pytest.importorskip("bitsandbytes")
    model = lively("llama")
    options = {"quant_type": "nf4", "compute_dtype": torch.float32} if kind == "nf4" else {"has_fp16_weights": False}
    layer = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    for block in model.model.layers:
        source = block.self_attn.q_proj
        block.self_attn.q_proj = layer(32, 32, bias=False, **options)
        block.self_attn.q_proj.load_state_dict(source.state_dict())
    model, data = model.to("cpu"), data_of("llama")
    before = model(**data).logits
    adapter = graft.attach(model, graft.DoRA(rank=4, targets=("attention.query",)), "a")
    close(model(**data).logits, before)
    perturb(adapter, 1, 0.3)
    delta: Any = adapter.at("model.layers.0.self_attn.q_proj")
    weight = graft.weights.weight_OI(delta.site.module).float()
    close(delta.base_norm(), length(weight + delta.scale * delta.B @ delta.A))
    x_BI = torch.randn(3, 32)
    expected = x_BI @ (weight + delta.weight_delta()).T
    close(delta.after(x_BI, x_BI @ weight.T), expected, 1e-4)
    model.train()
    model(**data).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    with pytest.raises(graft.MergeError, match="quantized"):
        graft.merge(model, "a")


def test_errors() -> None:
    with pytest.raises(graft.ConfigError, match="DoRA: lora_bias"):
        graft.DoRA(lora_bias=True)
    with pytest.raises(graft.ConfigError, match="DoRA: init is one of kaiming, gaussian, random, not 'pissa'"):
        graft.DoRA(init="pissa")
    with pytest.raises(graft.ConfigError, match="rank must be at least 1"):
        graft.DoRA(rank=0)
    with pytest.raises(graft.SiteError, match="norm"):
        graft.attach(tiny("llama"), graft.DoRA(targets=("norm",)))
    model = adapted("llama", graft.DoRA(rank=4))
    with pytest.raises(graft.ConfigError, match="cannot be summed"):
        graft.combine(model, {"a": 1.0}, "b")


# LoRA of rank 8 on queries and values, and a magnitude for each of their outputs.
TABLE = {
    "bert-base": 314_882,
    "bert-large": 837_634,
    "roberta-base": 905_474,
    "gpt2": 322_560,
    "gpt2-medium": 860_160,
    "gpt2-large": 1_612_800,
    "Llama-2-7B": 4_456_448,
    "Llama-3-8B": 3_571_712,
    "Qwen2.5-0.5B": 565_248,
    "Qwen2.5-7B": 2_637_824,
    "t5-base": 940_032,
    "bart-large": 1_253_376,
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_counts_on_public_shapes(name: str) -> None:
    model = meta(name)
    assert trainable(model, graft.DoRA(rank=8)) == TABLE[name]
    if name == "Llama-2-7B":  # the paper's 0.84 %: LoRA and a magnitude for each output
        roles = ("attention.query", "attention.key", "attention.value", "ffn.up", "ffn.down")
        assert trainable(model, graft.DoRA(rank=32, targets=roles)) == 56_098_816 + 876_544
