"""Each way of combining gives what peft's `add_weighted_adapter` gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from examples import perturb
from tiny import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
CHANGES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
NAMES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "wte"], "bert": ["query", "dense"]}


def both(arch: str, folder: Path) -> tuple[Any, Any]:
    """The same two adapters attached here and under peft: of one rank, with alphas of their own."""
    peft = pytest.importorskip("peft")
    model = tiny(arch)
    for i, name in enumerate("ab"):
        targets = tuple(NAMES[arch][: 2 + i])
        method = graft.LoRA(rank=4, alpha=3 + 2 * i, targets=targets, head=False, rslora=False)
        perturb(graft.attach(model, method, name, peft_compat=True), i, 0.3)
        graft.save(model, name, folder / name, form="peft")
    other = peft.PeftModel.from_pretrained(tiny(arch), folder / "a", "a")
    other.load_adapter(folder / "b", "b")
    return model, other


def drawn_from_seed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let peft draw what it drops from a generator of its own, and not after the random start of the new adapter."""
    generator = torch.Generator().manual_seed(seed)

    def pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        kept = tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return kept / density if rescale else kept

    pytest.importorskip("peft.utils.merge_utils")
    monkeypatch.setattr(sys.modules["peft.utils.merge_utils"], "random_pruning", pruning)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("how", ["cat", *FACTORS, *CHANGES])
def test_equals_peft(arch: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if arch == "gpt2" and how.startswith("dare") and how.endswith("svd"):
        pytest.skip("peft draws in the layout of the stored weight, which is transposed")
    model, other = both(arch, tmp_path)
    weights = {"a": 0.7, "b": -1.3}
    settings: dict[str, Any] = {}
    if how not in ("cat", "svd", "linear"):
        settings["density"] = 0.6
    if "ties" in how:
        settings["majority_sign_method"] = "frequency" if arch == "bert" else "total"
    ours = graft.combine(model, weights, "c", how, seed=5, rank=6 if how.endswith("svd") else None, **settings)
    drawn_from_seed(monkeypatch, 5)
    ranks = {"svd_rank": 6} if how.endswith("svd") else {}
    other.add_weighted_adapter([*weights], [*weights.values()], "c", how, **ranks, **settings)
    other.set_adapter("c")
    for site, delta in ours.items():
        theirs = other.base_model.model.get_submodule(site.path).get_delta_weight("c")
        expected = theirs if theirs.shape == delta.weight_delta().shape else theirs.T
        expected = theirs.T if arch == "gpt2" else expected
        assert torch.allclose(delta.weight_delta(), expected, atol=1e-5 * max(1, expected.abs().max().item())), (
            site.path
        )
    graft.use(model, "c")
    data = dict(batch(arch))
    found, wanted = model(**data).logits, other.eval()(**data).logits
    assert torch.allclose(found, wanted, atol=1e-5 * max(1, wanted.abs().max().item()))
    graft.use(model, None)
    assert (model(**data).logits - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_where_peft_is_off(tmp_path: Path) -> None:
    """One rank-stabilised adapter at weight 1 is the adapter itself; peft keeps `use_rslora` and scales it again."""
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    perturb(graft.attach(model, graft.LoRA(rank=4, rslora=True), "a"), 1, 0.3)
    other = peft.PeftModel.from_pretrained(tiny("llama"), graft.save(model, "a", tmp_path / "a", form="peft"), "a")
    other.add_weighted_adapter(["a"], [1.0], "c", "cat")
    path = "model.layers.0.self_attn.q_proj"
    module = other.base_model.model.get_submodule(path)
    assert torch.allclose(module.get_delta_weight("c"), 2 * module.get_delta_weight("a"), atol=1e-5)
    ours = graft.combine(model, {"a": 1.0}, "c")
    assert torch.allclose(ours.at(path).weight_delta(), module.get_delta_weight("a"), atol=1e-6)
