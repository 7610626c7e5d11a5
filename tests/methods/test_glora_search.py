"""The search over a GLoRA supernet: brute force on a small space, a planted best, its limits; extraction; resuming."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.methods.glora import FORMS, GLoRADelta
from graft.methods.glora_search import set_genes
from graft.train.trainer import GraftTrainer
from tiny import batch

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SMALL = {"a": ("lora", "constant", "none"), "b": ("lora", "none")}
"""On Llama, without biases, two sites have 36 paths."""


def supernet(arch: str = "llama", **fields: Any) -> Any:
    return adapted(arch, graft.GLoRA(supernet=True, **{"rank": 2, "targets": (Q, V), **fields}))


@torch.no_grad()
def loss_of(model: Any) -> float:
    return float(model(**batch("llama")).loss)


def all_paths(model: Any) -> list[dict[str, tuple[str, ...]]]:
    sites = list(model.adapters["a"].items())
    each = [list(itertools.product(*delta.choices)) for _, delta in sites]
    return [dict(zip([site.path for site, _ in sites], genes, strict=True)) for genes in itertools.product(*each)]


def cost_of(genes: dict[str, tuple[str, ...]], rank: int = 2) -> int:
    """By the closed forms, for q (32, 32) and v (16, 32) without biases."""
    total = 0
    for path, forms in genes.items():
        outputs = 32 if path.endswith("q_proj") else 16
        total += sum({"lora": rank * (outputs + 32), "vector": outputs, "constant": 1, "none": 0}[f] for f in forms[:2])
        assert forms[2:] == ("none",) * 3
    return total


@pytest.mark.parametrize("limit", [None, 150, 2])
def test_finds_what_brute_force_finds(limit: int | None) -> None:
    model = supernet(choices=SMALL)
    adapter = model.adapters["a"]
    scores = {}
    for genes in all_paths(model):
        set_genes(adapter, genes)
        if 0 < cost_of(genes) <= (limit or 10**9):
            scores[tuple(genes.values())] = -loss_of(model)
    assert len(scores) == {None: 35, 150: 15, 2: 3}[limit]
    found = graft.search_glora(
        model, "a", lambda: -loss_of(model), limit=limit, population=12, keep=4, generations=12, seed=1
    )
    top = max(scores, key=lambda genes: scores[genes])
    assert tuple(found.best.genes.values()) == top and found.best.score == pytest.approx(scores[top], abs=1e-6)
    assert found.best.cost == cost_of(found.best.genes)
    ranked = sorted(scores.values(), reverse=True)
    assert [each.score for each in found.survivors] == pytest.approx(ranked[: len(found.survivors)], abs=1e-6)
    # The path that was found is the one that now acts, and is what a folder keeps.
    assert -loss_of(model) == pytest.approx(found.best.score, abs=1e-6)
    assert adapter.method.genes == found.best.genes


def test_a_planted_best_is_found_in_a_large_space() -> None:
    """432^4 paths of BERT; the score counts the right genes."""
    model = adapted("bert", graft.GLoRA(supernet=True, rank=2, head=False))
    adapter = model.adapters["a"]
    planted = {site.path: ("vector", "lora", "none", "constant", "vector") for site, _ in adapter.items()}
    calls = []

    def score() -> float:
        genes = [delta.genes for _, delta in adapter.items()]
        calls.append(tuple(genes))
        right = zip(genes, planted.values(), strict=True)
        return sum(mine == theirs for pair in right for mine, theirs in zip(*pair, strict=True))

    found = graft.search_glora(model, "a", score)
    assert found.best.score == 20 and found.best.genes == planted
    assert len(set(calls)) == len(calls) == sum(len(scored) for scored in found.history)
    assert len(found.history) <= 20 and all(1 <= len(scored) <= 50 for scored in found.history)
    assert len(found.survivors) == 10
    again = graft.search_glora(model, "a", score)
    assert again == found and graft.search_glora(model, "a", score, seed=1).history != found.history


def test_the_limit_holds_and_scores_come_once() -> None:
    """Limits far below what a random path costs; among equal scores the cheapest wins."""
    model = supernet(targets="all-linear", choices={"a": FORMS["a"], "b": FORMS["b"]})
    least = sum(min(c for c in costs.values()) for _, d in model.adapters["a"].items() for costs in d.costs())
    assert least == 0
    for limit in (1, 40, 300):
        calls: list[Any] = []
        found = graft.search_glora(
            model,
            "a",
            lambda calls=calls: calls.append(1) or 0.0,  # type: ignore[misc]
            limit=limit,
            population=10,
            keep=3,
            generations=3,
        )
        scored = [each for generation in found.history for each in generation]
        assert scored and len(calls) == len(scored) and all(1 <= each.cost <= limit for each in scored)
        assert len({tuple(each.genes.values()) for each in scored}) == len(scored)
        assert found.best.cost == min(each.cost for each in scored)


def test_leaves_the_model_as_it_was() -> None:
    model = supernet()
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"))
    graft.use(model, {"lora": 0.5})
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    seen = []

    def score() -> float:
        seen.append((model.adapters.used, model.training, model.lm_head.training, torch.is_grad_enabled()))
        return 0.0

    graft.search_glora(model, "a", score, population=2, generations=1, keep=1)
    assert set(seen) == {((("a", 1.0),), False, False, False)}
    assert model.adapters.used == (("lora", 0.5),) and model.training and model.lm_head.training
    assert not model.model.layers[0].training and torch.equal(torch.get_rng_state(), state)
    genes = model.adapters["a"].method.genes

    def fails() -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        graft.search_glora(model, "a", fails)
    with pytest.raises(graft.ConfigError, match="score is nan for the genes"):
        graft.search_glora(model, "a", lambda: float("nan"))
    assert model.adapters["a"].method.genes == genes and model.training
    assert [delta.genes for _, delta in model.adapters["a"].items()] == list(genes.values())


def test_refuses() -> None:
    model = supernet(choices=SMALL)
    graft.attach(model, graft.GLoRA(), "plain")
    with pytest.raises(graft.ConfigError, match="'plain' is no GLoRA supernet"):
        graft.search_glora(model, "plain", lambda: 0.0)
    with pytest.raises(graft.RouteError, match="no adapter is named 'b'"):
        graft.search_glora(model, "b", lambda: 0.0)
    for bad in ({"population": 0}, {"generations": 1.5}, {"keep": True}, {"mutate": 0}, {"mutate": 1.1}, {"limit": 0}):
        with pytest.raises(graft.ConfigError, match=next(iter(bad))):
            graft.search_glora(model, "a", lambda: 0.0, **bad)  # type: ignore[arg-type]
    with graft.route(model, ["a"]), pytest.raises(graft.RouteError, match="a route has not ended"):
        graft.search_glora(model, "a", lambda: 0.0)
    composed = graft.attach(model, graft.Compose(graft.GLoRA(supernet=True), graft.LoRA(targets=("ffn.up",))), "c")
    with pytest.raises(graft.ConfigError, match="'c/glora' is a part of a composed adapter"):
        graft.search_glora(model, "c/glora", lambda: 0.0)
    graft.use(model, "c")
    model.train()(**data_of("llama"))  # there too it draws in training
    assert composed.leaves[0].shared.drawn is not None  # type: ignore[union-attr]
    graft.use(model, None)
    graft.detach(model.eval(), "c")
    graft.merge(model, "plain")
    with pytest.raises(graft.RouteError, match="merged"):
        graft.search_glora(model, "a", lambda: 0.0)
    graft.unmerge(model)
    with pytest.raises(graft.ConfigError, match="'plain' is attached already"):
        graft.extract_glora(model, "a", "plain")
    with pytest.raises(graft.ConfigError, match="'x' is no site of 'a'"):
        graft.extract_glora(model, "a", "b", {"x": ("lora", *("none",) * 4)})
    with pytest.raises(graft.SiteError, match="b cannot be 'vector'"):
        graft.extract_glora(model, "a", "b", {Q: ("lora", "vector", "none", "none", "none")})
    with pytest.raises(graft.SiteError, match="no part would act"):
        graft.extract_glora(model, "a", "b", dict.fromkeys((Q, V), ("none",) * 5))
    assert model.adapters.names == ("a", "plain")


# ------------------------------------------------------------------------------------------------- the winner, alone


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_the_extracted_path_equals_the_supernet_and_merges(arch: str, tmp_path: Path) -> None:
    choices: dict[str, tuple[str, ...]] = {"a": ("lora", "lora_1", "vector", "constant", "none")}
    if arch in ("gpt2", "bert"):  # the others have no biases
        choices["c"] = ("lora_1", "vector", "none")
    model = supernet(arch, targets=("attention.query", "attention.value"), choices=choices)
    data, adapter = data_of(arch), model.adapters["a"]
    torch.manual_seed(2)
    for n in range(5):
        adapter.shared.draw()
        genes = adapter.shared.drawn
        set_genes(adapter, genes)
        graft.use(model, "a")
        expected = model(**data).logits
        found = graft.extract_glora(model, "a", "b", genes if n else None)
        deltas = [delta for _, delta in found.items() if isinstance(delta, GLoRADelta)]
        own = [delta for _, delta in adapter.items() if isinstance(delta, GLoRADelta)]
        costs = [cost[form] for delta in own for cost, form in zip(delta.costs(), delta.genes, strict=True)]
        assert sum(p.numel() for delta in deltas for p in delta.parameters()) == sum(costs)
        assert not found.method.supernet and found.trainable == found.saved
        graft.use(model, "b")
        close(model(**data).logits, expected, 1e-6)
        graft.save(model, "b", tmp_path / f"b{n}")
        merged = graft.merge(model, "b")(**data).logits
        close(merged, expected)
        graft.unmerge(model)
        graft.detach(model, "b")
        again = lively(arch)
        graft.load(again, tmp_path / f"b{n}", "b")
        close(again(**data).logits, expected, 1e-6)
        far(expected, lively(arch)(**data).logits)


@torch.no_grad()
def test_one_path_for_all_layers_has_pefts_form(tmp_path: Path) -> None:
    model = supernet("bert", targets=("attention.query", "attention.value"))
    genes = ("vector", "vector", "lora", "constant", "constant")
    paths = [site.path for site, delta in model.adapters["a"].items() if isinstance(delta, GLoRADelta)]
    found = graft.extract_glora(model, "a", "b", dict.fromkeys(paths, genes))
    assert found.method == graft.GLoRA(rank=2, a="vector", b="vector", d="constant", e="constant")
    graft.save(model, "b", tmp_path / "b", form="peft")


def test_a_saved_supernet_keeps_its_path_and_goes_on(tmp_path: Path) -> None:
    model, data = supernet(), data_of("llama")
    set_genes(model.adapters["a"], {Q: ("vector", "none", "none", "none", "none")})
    folder = graft.save(model, "a", tmp_path / "a")
    with pytest.raises(graft.AdapterFileError, match="no supernet"):
        graft.save(model, "a", tmp_path / "peft", form="peft")
    again = lively("llama")
    adapter = graft.load(again, folder, "a", trainable=True)
    assert adapter.method == model.adapters["a"].method and adapter.saved == model.adapters["a"].saved
    with torch.no_grad():
        close(again(**data).logits, model(**data).logits, 1e-6)
    again.train()(**data)
    assert set(adapter.shared.drawn) == {Q, V}


def test_training_resumes_with_the_paths_that_would_have_come(tmp_path: Path) -> None:
    rows = batch("llama", rows=8)
    examples = [{key: value[i].tolist() for key, value in rows.items()} for i in range(8)]
    always = {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}

    def started() -> Any:
        torch.manual_seed(1)
        return supernet()

    def trainer(model: Any, **more: Any) -> Any:
        args = transformers.TrainingArguments(str(tmp_path), max_steps=6, dataloader_pin_memory=False, **always, **more)
        made = GraftTrainer(model, args, train_dataset=examples)
        made.remove_callback(transformers.PrinterCallback)
        return made

    whole, model = started(), started()
    trainer(whole, save_strategy="steps", save_steps=3).train()
    trainer(model, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    left, right, start = (dict(m.adapters["a"].named_parameters()) for m in (model, whole, started()))
    assert all(torch.equal(left[key], right[key]) for key in right)
    assert model.adapters["a"].shared.drawn == whole.adapters["a"].shared.drawn
    assert not any(torch.equal(start[key], right[key]) for key in right)


def test_the_search_sees_what_training_found() -> None:
    """A supernet trained on one batch: its best small path is better than the base."""
    model = lively("llama")
    adapter = graft.attach(model, graft.GLoRA(supernet=True, rank=2, targets="all-linear"), "a")
    base = loss_of(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(30):
        model.train()(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = graft.search_glora(
        model, "a", lambda: -loss_of(model), limit=adapter.trainable // 2, population=8, generations=4, keep=4
    )
    best = [max(each.score for each in scored) for scored in found.history]
    assert found.best.score == max(best) > -base + 0.05, (found.best.score, base)
