"""Starts of LoRA from the base's weights: against the decompositions, against an edited base, and against peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import adapted, close, data_of, far, inner, lively, peft_twin

import graft
from examples import perturb
from graft.methods import lora_init
from graft.methods.lora_data import leading
from graft.weights import set_weight_OI, weight_OI
from tiny import batch, checkpointed, tiny

ALL = ("pissa", "pissa_niter_4", "olora", "orthogonal")
TAKEN_OFF = ("pissa", "pissa_niter_4", "olora")
MAIN = ("llama", "gpt2", "bert", "mt5", "bart")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def lora(init: str, **settings: Any) -> graft.LoRA:
    return graft.LoRA(**{"rank": 4, "alpha": 6, "init": init, "head": False, **settings})


# -------------------------------------------------------------------------------------------------- the mathematics


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
def test_pissa_is_the_best_approximation(rows: int, columns: int) -> None:
    """The error is that of the eigenvalues left out, and each factor has half of the singular values."""
    weight = random_matrix(rows, columns)
    A, B = lora_init.pissa(weight, 5, 1.5)
    assert A.shape == (5, columns) and B.shape == (rows, 5)
    values = torch.linalg.eigvalsh(weight.double() @ weight.double().T).flip(0)[: min(rows, columns)]
    close((weight - 1.5 * B @ A).square().sum(), values[5:].sum().float())
    close(B.T @ B, torch.diag(values[:5].sqrt().float() / 1.5))
    close(A @ A.T, torch.diag(values[:5].sqrt().float() / 1.5))


def test_randomised_pissa_comes_close() -> None:
    weight = random_matrix(60, 40) @ torch.diag(0.7 ** torch.arange(40.0))
    best = weight - 2 * torch.mm(*reversed(lora_init.pissa(weight, 6, 2.0)))
    near = weight - 2 * torch.mm(*reversed(lora_init.pissa(weight, 6, 2.0, 8)))
    assert best.norm() <= near.norm() * 1.0001 <= best.norm() * 1.01


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
def test_olora_takes_the_first_columns_of_q(rows: int, columns: int) -> None:
    """B's columns are an orthonormal basis of the weight's first columns, which the product gives exactly."""
    weight = random_matrix(rows, columns)
    A, B = lora_init.olora(weight, 5)
    close(B.T @ B, torch.eye(5))
    close((B @ A)[:, :5], weight[:, :5])
    close(B.T @ weight, A)


def test_orthogonal_cancels() -> None:
    torch.manual_seed(3)
    A, B = lora_init.orthogonal(torch.empty(12, 20), 6)
    assert A.shape == (6, 20) and B.shape == (12, 6)
    assert A.abs().max() > 0.05 and B.abs().max() > 0.05 and (B @ A).abs().max() < 1e-7


def test_leading_vectors_of_a_large_matrix() -> None:
    """Beyond the exact size they are randomised, from a seed of their own, and draw no random number."""
    matrix = random_matrix(600, 520) @ torch.diag(0.5 ** torch.arange(520.0))
    torch.manual_seed(5)
    U, S, Vh = leading(matrix, 4)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == drawn and torch.equal(leading(matrix, 4)[0], U)
    exact = torch.linalg.svd(matrix)
    close(S, exact.S[:4])
    close((Vh @ exact.Vh[:4].T).abs(), torch.eye(4), 1e-4)
    close((U.T @ exact.U[:, :4]).abs(), torch.eye(4), 1e-4)


# ----------------------------------------------------------------------------------------------------------- a model


@torch.no_grad()
@pytest.mark.parametrize("arch", [*MAIN, "phi3", "falcon"])
@pytest.mark.parametrize("init", ALL)
def test_starts_as_the_base_which_stays_as_it_is(arch: str, init: str) -> None:
    """Exactly, for what is taken off again is never added: both halves of the pair have a factor of zero."""
    model, data = lively(arch), data_of(arch)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(**data).logits
    adapter = graft.attach(model, lora(init, targets=("attention.query", "attention.value", "ffn.down")), "a")
    if init == "orthogonal":
        close(model(**data).logits, before)
    else:
        assert torch.equal(model(**data).logits, before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert all(delta.A.any() and delta.B.any() for _, delta in adapter.items())
    perturb(adapter, size=0.3)
    far(model(**data).logits, before)


def edited_twin(model: Any, arch: str) -> Any:
    """The papers' own form: the base without s B0 A0, and a plain LoRA that starts at A0 and B0."""
    twin = lively(arch)
    for site, delta in model.adapters["a"].items():
        module = twin.get_submodule(site.path)
        full_B0 = torch.zeros(site.out_features, delta.A.shape[0])
        blocks = delta.rows or [torch.arange(site.out_features)]
        for i, rows in enumerate(blocks):
            part = slice(i * delta.rank, (i + 1) * delta.rank)
            full_B0[rows, part] = delta.B0[sum(map(len, blocks[:i])) : sum(map(len, blocks[: i + 1]))]
        set_weight_OI(module, weight_OI(module) - delta.scale * full_B0 @ delta.A0)
    method = model.adapters["a"].method
    graft.attach(twin, lora("kaiming", targets=method.targets, rslora=method.rslora, dropout=method.dropout), "a")
    for site, delta in twin.adapters["a"].items():
        delta.A.data.copy_(model.adapters["a"].at(site.path).A)
        delta.B.data.copy_(model.adapters["a"].at(site.path).B)
    return twin


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("settings", [{}, {"rslora": True, "dropout": 0.4}], ids=["plain", "rslora-dropout"])
def test_trains_as_on_an_edited_base(arch: str, init: str, settings: dict[str, Any]) -> None:
    """Ten steps of SGD; GPT-2's fused linear has a pair for queries and one for values, each from its own rows."""
    model = lively(arch)
    graft.attach(model, lora(init, **settings), "a")
    twin = edited_twin(model, arch)
    losses = [train(each, arch, drops=bool(settings)) for each in (model, twin)]
    close(torch.tensor(losses[0]), torch.tensor(losses[1]), 3e-5)
    data = data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, twin(**data).logits, 3e-5)


def train(model: Any, arch: str, drops: bool = False) -> list[float]:
    """The losses of ten steps of SGD on ten batches; `drops`: the adapter's dropout acts, with the same numbers."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    if drops:
        model.adapters.train()
    for step in range(10):
        torch.manual_seed(step)
        loss = model(**batch(arch, 4, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(
    ("arch", "init"), [*((arch, "pissa") for arch in MAIN), *((arch, "olora") for arch in MAIN if arch != "gpt2")]
)
def test_trains_as_in_peft(arch: str, init: str) -> None:
    peft = pytest.importorskip("peft")
    model = lively(arch)
    graft.attach(model, lora(init), "a", peft_compat=True)
    other = peft_twin(arch, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init))
    close(torch.tensor(train(model, arch)), torch.tensor(train(other, arch)))
    for site, delta in model.adapters["a"].items():
        close(delta.A, inner(other, site.path).lora_A["default"].weight)
        close(delta.B, inner(other, site.path).lora_B["default"].weight)
    data = data_of(arch)
    close(model(**data).logits, other(**data).logits)
    far(model(**data).logits, lively(arch)(**data).logits)


def test_several_share_one_base() -> None:
    """Two starts and a plain adapter in one batch, in stacked products too, as each of them alone; merged and back."""
    model, data = lively("llama"), data_of("llama", rows=5)
    for i, init in enumerate(("pissa", "olora", "kaiming", "orthogonal")):
        perturb(graft.attach(model, lora(init, rank=2 + 2 * (i % 2)), init), i, 0.3)
    rows: list[Any] = ["pissa", {"olora": 0.5}, ("kaiming", "pissa"), None, "orthogonal"]
    with graft.route(model, rows):
        mixed = model(**data).logits
    for i, entry in enumerate(rows):
        graft.use(model, entry)
        expected = model(**data).logits
        close(mixed[i], expected[i])
        if entry is not None:
            graft.merge(model, entry)
            close(model(**data).logits, expected)
            graft.unmerge(model)


def test_gradients_under_checkpointing() -> None:
    grads = []
    for on in (False, True):
        model = adapted("gpt2", lora("pissa")).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if on:
            checkpointed(model)
        model(**batch("gpt2")).loss.backward()
        grads.append([p.grad for p in model.adapters.parameters()])
    assert all(one.any() for one in grads[0])
    for one, two in zip(*grads, strict=True):
        close(one, two)


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_on_a_quantized_base(init: str) -> None:
    """The codes stay as they are; peft refuses PiSSA there, and quantizes what is left by OLoRA once more."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    site = graft.roles.Site("x", "other", None, linear, 64, 64)
    delta: Any = lora(init).on_linear(site, 4, 1.5, [])
    y_BTO, x_BTI = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    assert torch.equal(delta.after(x_BTI, y_BTO), y_BTO)
    weight = weight_OI(linear).float()
    U, S, Vh = torch.linalg.svd(weight)
    if init == "pissa":
        close(1.5 * delta.B0 @ delta.A0, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], 1e-4)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("arch", MAIN)
@pytest.mark.parametrize("init", ALL)
def test_is_saved_as_plain_lora(arch: str, init: str, tmp_path: Path) -> None:
    """Rank 2 r at the same factor; peft and we load the same logits, and nothing of the start is needed for it."""
    peft = pytest.importorskip("peft")
    alphas = {} if arch == "gpt2" else {"q_proj|query|q": 10}
    model, data = adapted(arch, lora(init, rslora=arch == "bert", alpha_pattern=alphas)), data_of(arch)
    expected = model(**data).logits
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    parts = 2 if arch == "gpt2" else 1
    assert config["r"] == 4 * parts * (1 if init == "orthogonal" else 2)
    other = peft.PeftModel.from_pretrained(lively(arch), folder).eval()
    close(other(**data).logits, expected)
    again = lively(arch)
    loaded = graft.load(again, folder, "b")
    assert loaded.method.init == "kaiming" and loaded.method.rank == 4 * (1 if init == "orthogonal" else 2)
    assert loaded.saved == model.adapters["a"].saved
    close(again(**data).logits, expected)
    far(expected, lively(arch)(**data).logits)


def test_patterns_and_biases_are_saved_along(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}, "bias": "lora_only", "lora_bias": True}
    model, data = adapted("bert", lora("pissa", **settings)), data_of("bert")
    folder = graft.save(model, "a", tmp_path / "a")
    method = graft.load(again := lively("bert"), folder, "a").method
    assert method.rank_pattern == {"query": 4} and method.alpha_pattern == {"value": 6} and method.alpha == 12
    close(again(**data).logits, model(**data).logits)
    kept = model.adapters["a"].at("bert.encoder.layer.0.attention.self.query").kept()
    assert {key: tuple(value.shape) for key, value in kept.items()} == {
        "A": (4, 32),
        "B": (32, 4),
        "B_bias": (32,),
        "bias": (32,),
    }


@pytest.mark.parametrize("arch", MAIN)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_own_folder_is_read(arch: str, init: str, tmp_path: Path) -> None:
    """It holds the trained pair alone; what stood at its place is computed from the base again, as peft does it."""
    peft = pytest.importorskip("peft")
    if (arch, init) == ("gpt2", "olora"):
        pytest.skip("peft fails on it")
    other = peft_twin(arch, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_rslora=arch == "bert"))
    train(other, arch)
    other.save_pretrained(tmp_path / "theirs")
    data, model = data_of(arch), lively(arch)
    expected = other(**data).logits
    adapter = graft.load(model, tmp_path / "theirs", "a")
    assert adapter.method.init == init
    close(model(**data).logits, expected)
    far(model(**data).logits, lively(arch)(**data).logits)
    graft.save(model, "a", tmp_path / "ours", form="peft")  # as plain LoRA
    close(peft.PeftModel.from_pretrained(lively(arch), tmp_path / "ours").eval()(**data).logits, expected)


def test_pefts_folders_that_cannot_be_computed_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    twin = peft_twin("llama", peft.LoraConfig(r=2, init_lora_weights="pissa_niter_2"))
    twin.save_pretrained(tmp_path / "a")
    with pytest.raises(graft.AdapterFileError, match=r"pissa_niter_2.*path_initial_model_for_weight_conversion"):
        graft.load(lively("llama"), tmp_path / "a")
    names = {"target_modules": [f"h.{i}.attn.c_proj" for i in range(2)]}  # square, so that peft does not notice
    peft_twin("gpt2", peft.LoraConfig(r=2, init_lora_weights="olora", **names)).save_pretrained(tmp_path / "b")
    with pytest.raises(graft.AdapterFileError, match="olora"):
        graft.load(lively("gpt2"), tmp_path / "b")
    peft_twin("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(graft.ConfigError, match=r"embedding model\.embed_tokens"):
        graft.load(lively("llama"), tmp_path / "c")


def test_pefts_config_objects() -> None:
    peft = pytest.importorskip("peft")
    for init in (*ALL, "eva", "lora_ga"):
        more = {"eva_config": peft.EvaConfig(rho=1.5, tau=0.9)} if init == "eva" else {}
        if init == "lora_ga":
            more = {"lora_ga_config": peft.LoraGAConfig(stable_gamma=9)}
        adapter = graft.attach(tiny("llama"), peft.LoraConfig(r=4, init_lora_weights=init, **more))
        assert adapter.method.init == init and adapter.peft_compat
        options = {"eva": {"rho": 1.5, "tau": 0.9}, "lora_ga": {"gamma": 9}}.get(init, {})
        assert adapter.method.init_options == options
    for init, more in (
        ("lora_ga", {"lora_ga_config": peft.LoraGAConfig(direction="ArBr")}),
        ("eva", {"eva_config": peft.EvaConfig(whiten=True)}),
        ("loftq", {"loftq_config": {"loftq_bits": 4}}),
        ("corda", {}),
    ):
        with pytest.raises(graft.ConfigError, match=f"{init}_config|{init}"):
            graft.attach(tiny("llama"), peft.LoraConfig(r=4, init_lora_weights=init, **more))


# -------------------------------------------------------------------------------------------------------- bad input


def test_refusals() -> None:
    for settings, match in (
        ({"init": "pisa"}, "init is one of.*pissa_niter_<k>"),
        ({"init": "pissa_niter_x"}, "init is one of"),
        ({"init": "olora_niter_2"}, "init is one of"),
        ({"init": "pissa", "alpha": -1}, "alpha must be positive"),
        ({"init": "pissa", "alpha_pattern": {"q": -1}}, "alpha must be positive"),
        ({"init": "orthogonal", "rank_pattern": {"q": 3}}, "even ranks, not 3"),
        ({"init": "pissa", "init_options": {"rho": 2}}, "rho.*has none"),
        ({"init": "eva", "init_options": {"roh": 2}}, "did you mean 'rho'"),
        ({"init": "eva", "init_options": {"rho": 0.5}}, "rho = 0.5 is out of range"),
        ({"init": "eva", "init_options": {"tau": 1.5}}, "tau = 1.5 is out of range"),
        ({"init": "lora_ga", "init_options": {"batches": 0}}, "batches = 0 is out of range"),
        ({"init": "lora_ga", "init_options": {"gamma": 0}}, "gamma = 0 is out of range"),
        ({"init": "lora_ga", "init_options": {"batches": 2.5}}, "batches = 2.5 is out of range"),
        ({"init": "eva", "init_options": {"tau": float("nan")}}, "tau = nan is out of range"),
    ):
        with pytest.raises(graft.ConfigError, match=match) as caught:
            graft.LoRA(**settings)
        assert "\n" not in str(caught.value)
    for init in ("pissa", "olora"):
        with pytest.raises(graft.SiteError, match=r"v_proj: a \(16, 32\) matrix has 16 .*, 20 are needed"):
            graft.attach(model := tiny("llama"), lora(init, rank=20))
        assert not hasattr(model, "adapters")
    for init in (*ALL, "lora_ga", "eva"):
        with pytest.raises(graft.ConfigError, match=r"embedding model\.embed_tokens; exclude it"):
            graft.attach(tiny("llama"), lora(init, targets=("embedding",)))
