"""LoRA against s B A added to the weights by hand, and against peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from examples import perturb
from graft.method import Build, CopyDelta, from_dict
from graft.methods.lora import BiasDelta, EmbeddingLoRADelta, LoRADelta
from tiny import tiny


@torch.no_grad()
def add_by_hand(model: Any, path: str, s: float, A: Tensor, B: Tensor) -> None:
    """W += s B A, in the module's own layout."""
    module = model.get_submodule(path)
    stored_as_IO = isinstance(module, Conv1D | nn.Embedding)
    module.weight += s * (A.T @ B.T if stored_as_IO else B @ A)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart", "falcon"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adds_a_scaled_product_to_each_weight(arch: str, rslora: bool) -> None:
    method = graft.LoRA(rank=4, alpha=6, targets="all-linear", rslora=rslora, head=False)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    adapter = model.adapters["a"]
    linears = [path for path, module in hand.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert set(adapter.sites) == set(linears) - {"lm_head", "classifier"}
    for path in adapter.sites:
        add_by_hand(hand, path, 6 / math.sqrt(4) if rslora else 6 / 4, adapter.at(path).A, adapter.at(path).B)
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_start() -> None:
    """A from U(-1/sqrt(I), 1/sqrt(I)) or N(0, 1/r), B zero; an embedding has it the other way round."""
    torch.manual_seed(0)
    build = Build(tiny("llama"))
    site = graft.LoRA(targets=("ffn.down",)).sites(build)[0]
    for init, rank in (("kaiming", 64), ("gaussian", 64)):
        delta: Any = graft.LoRA(rank=rank, init=init).delta(site, build)
        assert delta.A.shape == (rank, 48) and delta.B.shape == (32, rank) and not delta.B.any()
        if init == "kaiming":
            assert 0.98 / math.sqrt(48) < delta.A.abs().max() <= 1 / math.sqrt(48)
        else:
            assert abs(delta.A.std().item() * rank - 1) < 0.05
    assert graft.LoRA(init="random").delta(site, build).B.any()  # type: ignore[union-attr, operator]
    site = graft.LoRA(targets=("embedding",)).sites(build)[0]
    delta = graft.LoRA(rank=64).delta(site, build)
    assert delta.A.shape == (64, 99) and not delta.A.any() and abs(delta.B.std().item() - 1) < 0.05


@pytest.mark.parametrize(
    ("targets", "columns"),
    [
        (("attention.query", "attention.value"), (0, 2)),
        (("attention.key",), (1,)),
        (("attention.qkv",), (0, 1, 2)),
        (("attention.query", "attention.key", "attention.value"), (0, 1, 2)),
    ],
)
def test_parts_of_a_fused_linear(targets: tuple[str, ...], columns: tuple[int, ...]) -> None:
    """One pair per part that writes to its own block alone; the whole is one pair for all three."""
    model, data, hand = adapted("gpt2", graft.LoRA(rank=4, targets=targets)), data_of("gpt2"), lively("gpt2")
    for i, block in enumerate(hand.transformer.h):
        delta = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn")
        full = torch.zeros(96, 32)
        if len(columns) == 3:
            assert delta.A.shape == (4, 32)
            full = delta.B @ delta.A
        else:
            assert delta.A.shape == (4 * len(columns), 32) and delta.B.shape == (32 * len(columns), 4)
            for k, part in enumerate(columns):
                full[32 * part : 32 * part + 32] = delta.B[32 * k : 32 * k + 32] @ delta.A[4 * k : 4 * k + 4]
        close(delta.weight_delta(), 4 * full)
        with torch.no_grad():
            block.attn.c_attn.weight += 4 * full.T
    far(model(**data).logits, lively("gpt2")(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@pytest.mark.parametrize(("arch", "options"), [("gpt2", {}), ("gemma3", {}), ("bart", {"scale_embedding": True})])
def test_embeddings(arch: str, options: dict[str, Any]) -> None:
    """The lookup alone changes: a tied head keeps the base's weight. The factor of a scaled embedding applies."""
    model, data = adapted(arch, graft.LoRA(rank=4, targets=("embedding",)), **options), data_of(arch)
    hand = lively(arch, **options)
    assert all(isinstance(delta, EmbeddingLoRADelta) for _, delta in model.adapters["a"].items())
    for path in model.adapters["a"].sites:
        delta, module = model.adapters["a"].at(path), hand.get_submodule(path)
        module.weight = nn.Parameter(module.weight.detach().clone())
        add_by_hand(hand, path, 4.0, delta.A, delta.B)
    far(model(**data).logits, lively(arch, **options)(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_dropout_acts_in_training_on_its_own_branch_only() -> None:
    model = adapted("llama", graft.LoRA(rank=4, alpha=8, dropout=0.5))
    delta = model.adapters["a"].at("model.layers.0.self_attn.q_proj")
    x_BTI, y_BTO = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    close(delta.after(x_BTI, y_BTO), y_BTO + 2 * x_BTI @ delta.A.T @ delta.B.T)
    model.train()
    torch.manual_seed(7)
    dropped = delta.after(x_BTI, y_BTO)
    torch.manual_seed(7)
    close(dropped, y_BTO + 2 * F.dropout(x_BTI, 0.5) @ delta.A.T @ delta.B.T)
    data = data_of("llama")
    for _, each in model.adapters["a"].items():
        nn.init.zeros_(each.B)
    assert torch.equal(model(**data).logits, lively("llama").train()(**data).logits)


def test_rank_and_alpha_patterns() -> None:
    """Keys are regexes on the end of the path; the first that matches counts."""
    method = graft.LoRA(
        rank=4,
        alpha=8,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 6},
        alpha_pattern={"v_proj": 3, r"layers\.1\..*": 100},
    )
    adapter = graft.attach(tiny("llama"), method)
    found = {site.path.removeprefix("model.layers."): (delta.rank, delta.scale) for site, delta in adapter.items()}
    assert found == {
        "0.self_attn.q_proj": (6, 8 / 6),
        "0.self_attn.v_proj": (4, 3 / 4),
        "1.self_attn.q_proj": (2, 100 / 2),
        "1.self_attn.v_proj": (4, 3 / 4),
    }


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_biases_train_as_copies(bias: str, arch: str) -> None:
    """The base's own biases never move, so the base is there again without any undoing (peft's is not)."""
    model = adapted(arch, graft.LoRA(rank=4, bias=bias))
    data, adapter = data_of(arch), model.adapters["a"]
    hand = lively(arch)
    named = {path: m for path, m in hand.named_modules() if getattr(m, "bias", None) is not None}
    targets = {path for path, delta in ((s.path, d) for s, d in adapter.items()) if isinstance(delta, LoRADelta)}
    wanted = {"none": set(), "lora_only": targets, "all": set(named) - {"classifier"}}[bias]
    trained = {
        site.path
        for site, delta in adapter.items()
        if isinstance(delta, BiasDelta) or getattr(delta, "bias", None) is not None
    }
    assert trained == wanted
    with torch.no_grad():
        for site, delta in adapter.items():
            if isinstance(delta, CopyDelta):
                hand.get_submodule(site.path).load_state_dict(delta.copy.state_dict())
            elif site.path in wanted:
                named[site.path].bias.copy_(delta.bias)
    for path in targets:
        delta = adapter.at(path)
        if arch == "bert":
            add_by_hand(hand, path, 4.0, delta.A, delta.B)
        else:
            add_by_hand(hand, path, 4.0, delta.A, delta.full_B())
    close(model(**data).logits, hand(**data).logits)
    graft.use(model, None)
    assert torch.equal(model(**data).logits, lively(arch)(**data).logits)


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}])
def test_biases_merge(arch: str, settings: dict[str, Any]) -> None:
    """Two adapters at once too: each adds the difference to the base's bias."""
    model, data = adapted(arch, graft.LoRA(rank=4, **settings)), data_of(arch)
    perturb(graft.attach(model, graft.LoRA(rank=3, **settings), "b"), 5, 0.3)
    for entry in ("a", ("a", "b"), {"a": 0.5, "b": 1.0}):
        graft.use(model, entry)
        expected = model(**data).logits
        graft.merge(model, entry)
        close(model(**data).logits, expected)
        graft.unmerge(model)
    graft.use(model, None)
    assert torch.equal(model(**data).logits, lively(arch)(**data).logits)


def test_lora_bias() -> None:
    model = adapted("gpt2", graft.LoRA(rank=4, alpha=8, lora_bias=True, targets=("attention.value", "ffn.up")))
    data, hand = data_of("gpt2"), lively("gpt2")
    with torch.no_grad():
        for i, block in enumerate(hand.transformer.h):
            fused = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn")
            block.attn.c_attn.weight[:, 64:] += 2 * (fused.B @ fused.A).T
            block.attn.c_attn.bias[64:] += 2 * fused.B_bias
            up = model.adapters["a"].at(f"transformer.h.{i}.mlp.c_fc")
            block.mlp.c_fc.weight += 2 * (up.B @ up.A).T
            block.mlp.c_fc.bias += 2 * up.B_bias
    close(model(**data).logits, hand(**data).logits)
    with pytest.raises(graft.ConfigError, match="lora_bias"):
        graft.attach(tiny("gpt2"), graft.LoRA(lora_bias=True, targets=("embedding",)))


def test_stacked_groups_equal_the_loop() -> None:
    """Four adapters of different ranks and weights in one batch, which takes the stacked products."""
    model = lively("llama")
    data = data_of("llama", rows=5)
    for i, rank in enumerate((2, 3, 4, 1)):
        perturb(graft.attach(model, graft.LoRA(rank=rank, alpha=i + 1), f"r{rank}"), i, 0.3)
    rows: list[Any] = ["r2", {"r3": 0.5}, "r4", None, "r1"]
    with graft.route(model, rows):
        mixed = model(**data).logits
    for i, entry in enumerate(rows):
        graft.use(model, entry)
        close(mixed[i], model(**data).logits[i])


def test_errors() -> None:
    for settings in ({"rank": 0}, {"dropout": 1.0}, {"bias": "some"}, {"init": "svd"}):
        with pytest.raises(graft.ConfigError, match="LoRA"):
            graft.LoRA(**settings)  # type: ignore[arg-type]
    with pytest.raises(graft.ConfigError, match="at least 1, not -1"):
        graft.LoRA(rank_pattern={"x": -1})
    for alphas in ({"alpha": math.nan}, {"alpha": math.inf}, {"alpha_pattern": {"x": math.nan}}):
        with pytest.raises(graft.ConfigError, match="alpha must be a finite number"):
            graft.LoRA(**alphas)
    with pytest.raises(graft.SiteError, match="did you mean 'q_proj'"):
        graft.attach(tiny("llama"), graft.LoRA(targets=("q_prj",)))
    with pytest.raises(graft.SiteError, match="LoRA"):
        graft.attach(tiny("llama"), graft.LoRA(targets=("norm",)))
    method = graft.LoRA(rank=3, rank_pattern={"q_proj": 2}, layers=range(1), targets="all-linear")
    assert from_dict(method.to_dict()) == method


# ------------------------------------------------------------------------------------------------------------- peft

PEFT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"rslora": True}, {"use_rslora": True}),
    ("llama", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}}, {}),
    ("llama", {"targets": ("lm_head", "q_proj")}, {"target_modules": ["lm_head", "q_proj"]}),
    ("gpt2", {}, {}),
    ("gpt2", {"targets": ("wte", "c_attn")}, {"target_modules": ["wte", "c_attn"]}),
    ("gemma3", {"targets": ("embed_tokens",)}, {"target_modules": ["embed_tokens"]}),
    ("bert", {"lora_bias": True}, {"lora_bias": True}),
    ("bert", {"bias": "lora_only"}, {"bias": "lora_only"}),
    ("bert", {"bias": "all"}, {"bias": "all"}),
    ("bert", {"targets": r".*layer\.1.*\.(query|dense)"}, {"target_modules": r".*layer\.1.*\.(query|dense)"}),
    ("mt5", {}, {}),
    ("bart", {"layers": [1]}, {"layers_to_transform": [1], "layers_pattern": "layers"}),
]


@pytest.mark.parametrize(("arch", "ours", "theirs"), PEFT)
def test_equals_peft(arch: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    import peft

    model = adapted(arch, graft.LoRA(rank=4, alpha=6, head=False, **ours), peft_compat=True)
    patterns = {key: ours[key] for key in ("rank_pattern", "alpha_pattern") if key in ours}
    config = {"r": 4, "lora_alpha": 6, **patterns, **theirs}
    if "target_modules" not in config and "layers_to_transform" in config:
        config["target_modules"] = ["q_proj", "v_proj"]
    other = peft_twin(arch, peft.LoraConfig(**config))
    wrapped = {name for name, m in other.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    paths = {s.path for s, delta in model.adapters["a"].items() if not isinstance(delta, BiasDelta)}
    assert paths == wrapped
    for site, delta in model.adapters["a"].items():
        copy_over(inner(other, site.path), delta)
    data = data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, other(**data).logits)


def copy_over(module: Any, delta: Any) -> None:
    if isinstance(delta, EmbeddingLoRADelta):
        copy_into(module.lora_embedding_A["default"], delta.A)
        copy_into(module.lora_embedding_B["default"], delta.B)
    elif isinstance(delta, LoRADelta):
        copy_into(module.lora_A["default"].weight, delta.A)
        copy_into(module.lora_B["default"].weight, delta.B)
        if delta.B_bias is not None:
            copy_into(module.lora_B["default"].bias, delta.B_bias)
    if getattr(delta, "bias", None) is not None:
        copy_into(getattr(module, "base_layer", module).bias, delta.bias)
