"""Starts of LoRA from data: gradients against autograd, components against dense algebra, both against peft."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import close, data_of, far, inner, lively, peft_twin

import graft
from examples import perturb
from graft.methods import lora_init
from graft.methods.lora_data import Components, gradients, share_out
from graft.roles import sites as sites_of
from tiny import batch, checkpointed, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def batches(arch: str, count: int = 3) -> list[dict[str, Tensor]]:
    return [dict(batch(arch, 4, seed)) for seed in range(count)]


def lora(init: str, **settings: Any) -> graft.LoRA:
    return graft.LoRA(**{"rank": 4, "alpha": 6, "init": init, "head": False, **settings})


def started(arch: str, method: graft.LoRA, count: int = 3, **options: Any) -> Any:
    model = lively(arch)
    adapter = graft.attach(model, method, "a", **options)
    method.start(model, adapter, batches(arch, count))
    return model


def autograd_means(arch: str, paths: Any) -> dict[str, Tensor]:
    """The mean gradient of each weight as (O, I), by autograd on weights that may train."""
    model = lively(arch)
    for each in batches(arch):
        model(**each).loss.backward()
    conv = arch == "gpt2"
    grads = {path: model.get_submodule(path).weight.grad / 3 for path in paths}
    return {path: grad.T if conv else grad for path, grad in grads.items()}


# ----------------------------------------------------------------------------------------------------------- LoRA-GA


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_weights(arch: str, checkpointing: bool) -> None:
    """The weights stay frozen and get no gradient; modes, hooks and random numbers are as before."""
    model = lively(arch)
    graft.attach(model, graft.LoRA(targets="all-linear", head=False), "a")
    modules = {site.path: site.module for site, _ in model.adapters["a"].items()}
    model.train()
    model.lm_head.eval() if hasattr(model, "lm_head") else model.classifier.eval()
    if checkpointing:
        checkpointed(model)
    modes = [module.training for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    found = gradients(model, modules, batches(arch))
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    expected = autograd_means(arch, modules)
    for path in modules:
        close(found[path] / expected[path].abs().max(), expected[path] / expected[path].abs().max())
    assert all(p.grad is None for p in model.parameters())
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


def test_lora_ga_takes_the_gradients_directions() -> None:
    """A spans the first r right singular directions, B the next r left ones, both scaled as in the paper."""
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    A, B = lora_init.lora_ga(gradient, 3, 4.0)
    U, S, Vh = torch.linalg.svd(gradient)
    factor = 24**0.25 / 2
    close(A.T @ A, factor**2 * Vh[:3].T @ Vh[:3])
    close(B @ B.T, factor**2 * U[:, 3:6] @ U[:, 3:6].T)
    A, B = lora_init.lora_ga(gradient, 3, 4.0, as_peft=True)
    close(A.T @ A, Vh[:3].T @ Vh[:3])
    close(B @ B.T, factor**2 * U[:, 3:6] @ torch.diag(S[3:6] ** 2) @ U[:, 3:6].T)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_lora_ga_starts_as_the_base(arch: str) -> None:
    """The first step of the sum goes along the gradient of the weight; GPT-2's parts have a pair each."""
    before = lively(arch)(**data_of(arch)).logits
    model = lively(arch)
    adapter = graft.attach(model, lora("lora_ga"), "a")
    assert all(not delta.B.any() and delta.A0 is None for _, delta in adapter.items())
    assert adapter.method.wants_batches() == 8
    with pytest.raises(graft.ConfigError, match=r"lora_ga.*method\.start"):
        adapter.method.begin(adapter, 10)
    adapter.method.start(model, adapter, batches(arch))
    adapter.method.begin(adapter, 10)
    assert torch.equal(model(**data_of(arch)).logits, before)
    expected = autograd_means(arch, adapter.sites)
    for site, delta in adapter.items():
        for i, rows in enumerate(delta.rows or [torch.arange(site.out_features)]):
            values = torch.linalg.svd(expected[site.path][rows]).Vh
            A = delta.A[4 * i : 4 * i + 4] / (len(rows) ** 0.25 / 4)
            close((A @ values[:4].T).abs(), torch.eye(4), 1e-3)
    perturb(adapter, size=0.1)
    kept = [p.clone() for p in adapter.parameters()]
    adapter.method.start(model, adapter, batches(arch, 1))  # a second time: nothing is lost
    assert all(torch.equal(p, old) for p, old in zip(adapter.parameters(), kept, strict=True))
    far(model(**data_of(arch)).logits, before)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_lora_ga_trains_as_in_peft(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `peft_compat`, where peft's randomised SVD is made exact: the signs of its vectors are arbitrary."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    model = started(arch, lora("lora_ga"), peft_compat=True)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    base = lively(arch)

    def step() -> None:
        base.eval()  # peft turns dropout on
        for each in batches(arch):
            base(**each).loss.backward()

    peft.tuners.lora.preprocess_loraga(base, config, step)
    other = peft.get_peft_model(base, config).eval()
    rates = []
    for each in (model, other):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5)
        for data in batches(arch, 10):
            optimizer.zero_grad()
            each(**data).loss.backward()
            optimizer.step()
        rates.append(each(**data_of(arch)).logits)
    for site, delta in model.adapters["a"].items():
        theirs = inner(other, site.path)
        close(delta.B @ delta.A, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight)
    close(*rates)
    far(rates[0], lively(arch)(**data_of(arch)).logits)


def exact_svd(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :q], S[:q], Vh[:q].T


def test_lora_ga_is_saved_as_plain_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, data = started("gpt2", lora("lora_ga", rslora=True)), data_of("gpt2")
    perturb(model.adapters["a"], size=0.2)
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    other = peft.PeftModel.from_pretrained(lively("gpt2"), folder).eval()
    close(other(**data).logits, model(**data).logits)
    graft.load(again := lively("gpt2"), folder, "a")
    close(again(**data).logits, model(**data).logits)


# --------------------------------------------------------------------------------------------------------------- EVA


def test_components_of_rows_in_pieces() -> None:
    """All that there are: exactly those of all rows at once. The first few: those of peft's incremental PCA."""
    rows = torch.randn(60, 10, generator=torch.Generator().manual_seed(1)) @ torch.diag(0.6 ** torch.arange(10.0)) + 3
    for pieces in ([60], [3, 1, 40, 0, 16]):
        found = Components(10)
        for piece in rows.split(pieces):
            found.add(piece)
        _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        close(found.values_K, S, 1e-4)
        close((found.vectors_KI @ Vh.T).abs(), torch.eye(10), 1e-3)
        close(found.ratios_K, S**2 / (S**2).sum(), 1e-5)
    incremental = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA(n_components=4)
    found = Components(4)
    for piece in rows.split(20):
        found.add(piece)
        incremental.partial_fit(piece)
        close(found.vectors_KI, incremental.components_.float())
        close(found.ratios_K, incremental.explained_variance_ratio_.float())


def test_ranks_are_shared_out_by_variance() -> None:
    ratios = {"a": torch.tensor([0.5, 0.1, 0.01]), "b": torch.tensor([0.5, 0.2]), "c": torch.tensor([0.009])}
    assert share_out(ratios, 4) == {"a": 2, "b": 2, "c": 0}
    assert share_out(ratios, 1) == {"a": 1, "b": 0, "c": 0}
    assert share_out(ratios, 9) == {"a": 3, "b": 2, "c": 1}


def inputs_of(arch: str, path: str, count: int) -> Tensor:
    """The inputs of a module at the tokens that have a label, all batches after each other."""
    model, found = lively(arch), []
    for each in batches(arch, count):
        with torch.no_grad():
            module = model.get_submodule(path)
            handle = module.register_forward_hook(lambda module, args, output: found.append(args[0]))
            model(**each)
            handle.remove()
    rows = []
    for x, each in zip(found, batches(arch, count), strict=True):
        labels, mask = each["labels"], each["attention_mask"]
        counted = (labels if labels.dim() == 2 else mask - 1) >= 0
        if arch == "t5" and (path.startswith("encoder") or path.endswith(("EncDecAttention.k", "EncDecAttention.v"))):
            counted = mask == 1
        rows.append(x[counted])
    return torch.cat(rows)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_eva_takes_the_inputs_directions(arch: str) -> None:
    """At rho 1 each site keeps its rank, and A spans the first components of its inputs at labelled positions."""
    method = lora("eva", rank=8, init_options={"rho": 1, "tau": 1})
    model = lively(arch)
    adapter = graft.attach(model, method, "a")
    method.start(model, adapter, batches(arch, 1))
    close(model(**data_of(arch)).logits, lively(arch)(**data_of(arch)).logits)
    for site, delta in adapter.items():
        x_NI = inputs_of(arch, site.path, 1)
        Vh = torch.linalg.svd(x_NI - x_NI.mean(0)).Vh
        for A in delta.A.split(8):
            close(A.T @ A, Vh[:8].T @ Vh[:8], 1e-4)
        assert not delta.B.any() and delta.scale == 6 / 8


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_eva_equals_peft(arch: str, rslora: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks, directions and factors, where peft's SVD is made exact and signs do not count; then both read the file."""
    peft = pytest.importorskip("peft")
    pca = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA
    monkeypatch.setattr(pca, "_svd_fn_lowrank", pca._svd_fn_full)
    cosine = torch.nn.functional.cosine_similarity
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda *vectors: cosine(*vectors).abs())
    names = ["q_proj", "v_proj", "down_proj"] if arch == "llama" else ["c_attn", "c_proj", "c_fc"]
    settings = {"rho": 2.0, "tau": 0.0}  # two batches: the second one settles it
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="eva", eva_config=peft.EvaConfig(**settings))
    config.target_modules, config.use_rslora = names, rslora
    other = peft_twin(arch, config)
    peft.initialize_lora_eva_weights(other, batches(arch), show_progress_bar=False)
    method = lora("eva", rank=3, targets=tuple(names), rslora=rslora, init_options=settings)
    model = started(arch, method, peft_compat=True)
    adapter = model.adapters["a"]
    ranks = {site.path: delta.rank for site, delta in adapter.items()}
    assert sum(ranks.values()) == 3 * (len(ranks) + len(adapter.dropped))
    assert len({*ranks.values()}) > 1
    for path, rank in ranks.items():
        theirs = inner(other, path)
        assert theirs.r["default"] == rank and abs(theirs.scaling["default"] - adapter.at(path).scale) < 1e-6
        close(adapter.at(path).A, theirs.lora_A["default"].weight, 1e-4)
    perturb(adapter, size=0.3)
    data = data_of(arch)
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    close(peft.PeftModel.from_pretrained(lively(arch), folder).eval()(**data).logits, model(**data).logits)
    again = lively(arch)
    assert graft.load(again, folder, "a").method.init == "kaiming"
    close(again(**data).logits, model(**data).logits)


@pytest.mark.parametrize("exclude", [(), r".*layers\.1\.mlp.*"])
def test_sites_without_a_share_are_left_out(exclude: Any, tmp_path: Path) -> None:
    """The adapter, its hooks and its folder have them no longer; a second run from the same data is the same."""
    method = lora("eva", rank=1, targets="all-linear", exclude=exclude, init_options={"rho": 8})
    model, twin = started("llama", method), started("llama", method)
    adapter = model.adapters["a"]
    assert adapter.dropped and not {*adapter.dropped} & {*adapter.sites}
    assert all(not model.get_submodule(path)._forward_hooks for path in adapter.dropped)
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), twin.adapters["a"].parameters(), strict=True))
    perturb(adapter, size=0.3)
    data = data_of("llama")
    expected = model(**data).logits
    folder = graft.save(model, "a", tmp_path / "a")
    loaded = graft.load(again := lively("llama"), folder, "b")
    assert [*loaded.sites] == [*adapter.sites]
    close(again(**data).logits, expected)
    (folder / "graft.json").unlink()
    graft.load(again, folder, "c")
    graft.use(again, "c")
    close(again(**data).logits, expected)
    graft.merge(model, "a")
    close(model(**data).logits, expected)
    graft.unmerge(model)
    graft.detach(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_eva_says_what_has_not_settled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graft"):
        started("llama", lora("eva", init_options={"tau": 0.0}))
        assert not caplog.records
        started("llama", lora("eva", init_options={"tau": 1.0}))
    assert "3 batches" in caplog.text


# ------------------------------------------------------------------------------------------------- training, bad input


@pytest.mark.parametrize("init", ["lora_ga", "eva"])
def test_in_a_trainer(init: str, tmp_path: Path) -> None:
    """GraftTrainer gives the first batches; a resumed run ends where the first one does."""
    from transformers import TrainingArguments

    from graft.train.trainer import GraftTrainer

    rows = [{key: value[0] for key, value in batch("llama", 1, seed).items()} for seed in range(8)]

    def run(folder: str, resume: str | None = None) -> Any:
        torch.manual_seed(0)
        model = lively("llama")
        graft.attach(model, lora(init, targets=("attention.query", "ffn.down")), "a")
        args = TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        GraftTrainer(model, args, train_dataset=rows).train(resume)
        return model

    first = run("a")
    again = run("b", str(tmp_path / "a" / "checkpoint-2"))
    assert any(delta.B.any() for _, delta in first.adapters["a"].items())
    for site, delta in first.adapters["a"].items():
        close(again.adapters["a"].at(site.path).weight_delta(), delta.weight_delta(), 1e-6)
    config = json.loads((tmp_path / "a" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (8 if init == "lora_ga" else 4)


def test_refusals() -> None:
    for init in ("lora_ga", "eva"):
        adapter = graft.attach(model := tiny("llama"), lora(init), "a")
        with pytest.raises(graft.ConfigError, match="got no batches"):
            adapter.method.start(model, adapter, [])
        with pytest.raises(graft.ConfigError, match="has seen none"):
            adapter.method.begin(adapter, 1)
    adapter = graft.attach(model := tiny("llama"), lora("lora_ga"), "a")
    data = [{key: value for key, value in each.items() if key != "labels"} for each in batches("llama")]
    with pytest.raises(graft.ConfigError, match="with labels"):
        adapter.method.start(model, adapter, data)
    empty = [{**each, "labels": torch.full_like(each["labels"], -100)} for each in batches("llama")]
    with pytest.raises(graft.SiteError, match=r"q_proj: (no gradient|its gradient)"):
        adapter.method.start(model, adapter, empty)
    adapter = graft.attach(model := tiny("llama"), lora("lora_ga", rank=12), "a")
    with pytest.raises(graft.SiteError, match=r"v_proj: a \(16, 32\) matrix has 16 singular directions, 24 are needed"):
        adapter.method.start(model, adapter, batches("llama"))
    model = tiny("bert_base")
    path = next(site.path for site in sites_of(model) if "pooler" in site.path)
    adapter = graft.attach(model, lora("eva", targets=(path,)), "a")
    model(**batches("bert_base", 1)[0])
    model.pooler = None
    with pytest.raises(graft.SiteError, match="no input reaches it"):
        adapter.method.start(model, adapter, batches("bert_base"))
