"""A combined adapter is the weighted sum of the others, or peft's mixture of them: against dense algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from examples import perturb
from tiny import batch, tiny

WEIGHTS = {"a": 0.3, "b": -1.5}
BOTH = ("attention.query", "attention.value", "ffn.down")


def pair(arch: str = "llama", **settings: Any) -> Any:
    """A tiny model with two adapters of one rank and another alpha, "a" on all targets and "b" on two of three."""
    model = tiny(arch)
    perturb(graft.attach(model, graft.LoRA(rank=3, alpha=6, targets=BOTH, head=False, **settings), "a"), 1, 0.3)
    perturb(graft.attach(model, graft.LoRA(rank=3, alpha=4, targets=BOTH[1:], head=False, rslora=True), "b"), 2, 0.3)
    return model


def changes(model: Any, path: str) -> list[tuple[float, Tensor]]:
    """Weight and dense change of each source at a path."""
    found = [(WEIGHTS[n], model.adapters[n]) for n in WEIGHTS if path in model.adapters[n].sites]
    return [(weight, adapter.at(path).weight_delta()) for weight, adapter in found]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.allclose(actual, expected, atol=tolerance * max(1.0, expected.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_cat_equals_the_weighted_route(arch: str) -> None:
    model, data = tiny(arch), batch(arch)
    perturb(graft.attach(model, graft.LoRA(rank=2, targets=("attention.query",)), "a"), 1)
    perturb(graft.attach(model, graft.LoRA(rank=3, targets=("attention.query", "embedding"), rslora=True), "b"), 2)
    with graft.route(model, [WEIGHTS]):
        expected = model(**data).logits
    adapter = graft.combine(model, WEIGHTS, "sum")
    for site, delta in adapter.items():
        close(delta.weight_delta(), sum(weight * change for weight, change in changes(model, site.path)))
    with graft.route(model, ["sum"]):
        assert torch.allclose(model(**data).logits, expected, atol=1e-4)
    with graft.route(model, [None]):
        assert not torch.allclose(model(**data).logits, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True}, {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 1}}]
)
def test_one_source_is_given_back(how: str, settings: dict[str, Any]) -> None:
    """Whatever its scale is: rank-stabilised, by pattern, or turned by the dial."""
    model, data = tiny("llama"), batch("llama")
    source = perturb(graft.attach(model, graft.LoRA(rank=3, alpha=7, **settings), "a"), 1, 0.3)
    source.scale = 0.5
    adapter = graft.combine(model, "a", "same", how)
    assert {site.path: len(delta.A) for site, delta in adapter.items()} == {
        site.path: delta.rank for site, delta in source.items()
    }
    for site, delta in adapter.items():
        close(delta.weight_delta(), 0.5 * source.at(site.path).weight_delta())
    with graft.route(model, ["a", "same"] * 2):
        one, two = model(**{key: value[:1].expand(4, -1) for key, value in data.items()}).logits[:2]
    close(one, two)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("rank", [None, 2, 100])
def test_svd_is_the_best_of_its_rank(arch: str, rank: int | None) -> None:
    """The error is what the singular values left out say; a rank beyond that of the sum is exact."""
    model = pair(arch)
    adapter = graft.combine(model, WEIGHTS, "cut", "svd", rank=rank)
    highest = max(len(delta.factors()[0]) for name in WEIGHTS for _, delta in model.adapters[name].items())
    for site, delta in adapter.items():
        total = sum(weight * change for weight, change in changes(model, site.path))
        values = torch.linalg.svdvals(total)
        kept = highest if rank is None else rank
        assert len(delta.A) <= min(kept, *total.shape)
        error = (total - delta.weight_delta()).norm()
        close(error, values[kept:].norm() if kept < len(values) else torch.tensor(0.0), 1e-4)
        close(delta.A @ delta.A.T, torch.eye(len(delta.A)))


@torch.no_grad()
def test_starts_are_combined_as_what_they_changed() -> None:
    """PiSSA's pair is that of its change, so its start is not added a second time."""
    model = pair(init="pissa")
    for how in ("cat", "svd", "ties_svd"):
        more = {"density": 1.0} if how == "ties_svd" else {}
        adapter = graft.combine(model, {"a": 1.0}, how, how, **more)
        for site, delta in adapter.items():
            close(delta.weight_delta(), model.adapters["a"].at(site.path).weight_delta(), 1e-4)


def trimmed(values: Tensor, density: float) -> Tensor:
    """The values of largest magnitude, the rest zero."""
    count = int(density * values.numel())
    border = values.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(values.abs() >= border, values, 0.0)


def ties(values: list[Tensor], weights: list[float], density: float, method: str) -> Tensor:
    """Trim, elect a sign at each place, and take the mean of those that have it, place by place."""
    kept = [trimmed(each, density) for each in values]
    out = torch.zeros_like(values[0])
    for at in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        here = [float(each[tuple(at)]) for each in kept]
        votes = sum(here) if method == "total" else sum((x > 0) - (x < 0) for x in here)
        same = [w * x for w, x in zip(weights, here, strict=True) if x and (x > 0) == (votes >= 0)]
        out[tuple(at)] = sum(same) / max(len(same), 1)
    return out


@torch.no_grad()
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_of_the_changes(method: str) -> None:
    model = pair()
    graft.combine(model, WEIGHTS, "t", "ties_svd", rank=32, density=0.4, majority_sign_method=method)
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"):
        found = changes(model, path)
        expected = ties([change for _, change in found], [weight for weight, _ in found], 0.4, method)
        close(model.adapters["t"].at(path).weight_delta(), expected)
        assert 0 < (expected == 0).float().mean() < 1


@torch.no_grad()
def test_pruned_by_magnitude_and_at_random() -> None:
    model = pair()
    graft.combine(model, WEIGHTS, "m", "magnitude_prune_svd", rank=48, density=0.25)
    path = "model.layers.0.mlp.down_proj"
    expected = sum(weight * trimmed(change, 0.25) for weight, change in changes(model, path))
    close(model.adapters["m"].at(path).weight_delta(), expected)
    settings: dict[str, Any] = {"how": "dare_linear_svd", "rank": 48, "density": 0.25}
    for seed, name in ((0, "d"), (0, "e"), (1, "f")):
        graft.combine(model, {"a": 2.0}, name, seed=seed, **settings)
    one, again, other = (model.adapters[name].at(path).weight_delta() for name in ("d", "e", "f"))
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=1e-3)
    whole = 2.0 * model.adapters["a"].at(path).weight_delta()
    kept = one.abs() > 1e-4 * one.abs().max()
    close(one[kept], 4 * whole[kept], 1e-4)
    assert 0.2 < kept.float().mean() < 0.3


@torch.no_grad()
def test_is_saved_and_loaded(tmp_path: Path) -> None:
    model = pair("gpt2")
    graft.use(model, WEIGHTS)
    expected = model(**batch("gpt2")).logits
    graft.combine(model, WEIGHTS, "sum")
    again = tiny("gpt2")
    graft.load(again, graft.save(model, "sum", tmp_path / "sum", form="peft"), "sum")
    close(again(**batch("gpt2")).logits, expected)


def test_what_is_not_low_rank_is_refused() -> None:
    model = tiny("bert")
    graft.attach(model, graft.LoRA(), "headed")
    graft.attach(model, graft.PrefixTuning(length=2), "prefix")
    graft.attach(model, graft.DoRA(head=False), "dora")
    graft.attach(model, graft.LoRA(head=False, bias="lora_only"), "biased")
    for name in ("headed", "prefix", "dora", "biased"):
        for how in ("cat", "svd", "linear"):
            with pytest.raises(graft.ConfigError, match=rf"{name}.*cannot be summed"):
                graft.combine(model, {name: 1.0}, "sum", how=how)
    assert "sum" not in model.adapters


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": "tie"}, "how is one of cat, svd, linear.*did you mean 'ties'"),
        ({"how": "linear_svd"}, "how is one of"),
        ({"how": "cat", "rank": 3}, "rank: 3 does not fit how='cat'"),
        ({"how": "ties", "rank": 3, "density": 0.5}, "rank: 3 does not fit"),
        ({"how": "svd", "rank": 0}, "rank: 0 does not fit"),
        ({"how": "svd", "rank": 2.5}, "rank: 2.5 does not fit"),
        ({"how": "ties_svd", "density": 1e-9}, "of 1024 values is none"),
        ({"how": "ties"}, "density: how='ties' needs"),
        ({"how": "dare_ties_svd", "density": 1.5}, r"in \(0, 1\], not 1.5"),
        ({"how": "dare_linear", "density": 0}, "not 0"),
        ({"how": "svd", "density": 0.5}, "prunes nothing"),
        ({"how": "ties", "density": 0.5, "majority_sign_method": "most"}, "total, frequency, not 'most'"),
        ({"how": "linear"}, r"q_proj: how='linear' mixes factors of one rank, and they have 'a' 3, 'c' 2"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    model = pair()
    graft.attach(model, graft.LoRA(rank=2), "c")
    with pytest.raises(graft.ConfigError, match=match) as caught:
        graft.combine(model, ("a", "c"), "sum", **options)
    assert "\n" not in str(caught.value) and "sum" not in model.adapters
    with pytest.raises(graft.ConfigError, match="at least one"):
        graft.combine(model, (), "sum")
    with pytest.raises(graft.RouteError, match="'x'"):
        graft.combine(model, {"x": 1.0}, "sum")
