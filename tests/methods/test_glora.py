"""GLoRA against its formula in dense algebra, for every form of every part, and against peft."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from test_counts import meta
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import from_dict
from graft.methods.glora import FORMS, GLoRADelta, Paths
from graft.methods.glora_search import set_genes
from graft.roles import Site
from tiny import checkpointed, tiny

EVERY = list(itertools.product(*FORMS.values()))
RANK, INPUTS, OUTPUTS = 3, 5, 4


def single(module: nn.Module, **fields: Any) -> GLoRADelta:
    """The delta of one linear, without a model around it, at random values."""
    site = Site("linear", "attention.query", 0, module, INPUTS, OUTPUTS)
    method = graft.GLoRA(**{"rank": RANK, **fields})
    delta = GLoRADelta(site, method, method.genes_at(site), None, False)
    delta.bind(method.shared([site], None) if method.supernet else None)  # type: ignore[arg-type]
    for p in delta.parameters():
        nn.init.normal_(p)
    return delta


def dense(delta: GLoRADelta, weight_OI: Tensor, bias_O: Tensor, genes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The paper's weight and bias, from the parameters by their names: slices of the widest, where it is a supernet."""
    own = dict(delta.named_parameters())
    outputs, inputs = weight_OI.shape

    def matrix(part: str, rows: int, columns: int) -> Tensor:
        form = genes["ABC".index(part)]
        if form == "none":
            return torch.zeros(rows, columns)
        down, up = own.get(f"glora_{part}.Xd"), own.get(f"glora_{part}.Xu")
        if form.startswith("lora"):
            assert down is not None and up is not None
            rank = int(form[5:] or 10**6)
            return sum(torch.outer(down[:, k], up[k]) for k in range(min(rank, len(up))))  # type: ignore[return-value]
        first = own[f"glora_{part}.X"] if down is None else down
        return (first[:, 0] if form == "vector" else first.flatten()[0].repeat(rows))[:, None].repeat(1, columns)

    def vector(part: str) -> Tensor:
        form = genes["ABCDE".index(part)]
        if form == "none":
            return torch.zeros(outputs)
        return own[f"glora_{part}.X"] if form == "vector" else own[f"glora_{part}.X"][0].repeat(outputs)

    A, B, C = matrix("A", outputs, inputs), matrix("B", outputs, inputs), matrix("C", inputs, 1)
    return weight_OI + weight_OI * A + B, bias_O + bias_O * vector("D") + vector("E") + (weight_OI @ C)[:, 0]


@torch.no_grad()
def biased(model: Any) -> Any:
    """The model with biases that are not zero, as they are at the start."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model


def closed_cost(genes: tuple[str, ...], rank: int, inputs: int, outputs: int) -> int:
    total = 0
    for part, form in zip("ABCDE", genes, strict=True):
        rows, columns = {"A": (outputs, inputs), "B": (outputs, inputs), "C": (inputs, 1)}.get(part, (outputs, 0))
        if form.startswith("lora"):
            total += (int(form[5:]) if form[4:] else rank) * (rows + columns)
        else:
            total += {"vector": rows, "constant": 1, "none": 0}[form]
    return total


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_all_432_forms_of_a_layer(kind: str) -> None:
    """Unmerged, merged, as a path of a supernet, and their counts."""
    assert len(EVERY) == 432
    torch.manual_seed(0)
    module = nn.Linear(INPUTS, OUTPUTS) if kind == "linear" else Conv1D(OUTPUTS, INPUTS)
    nn.init.normal_(module.bias)  # type: ignore[arg-type]
    weight_OI, bias_O = module.weight if kind == "linear" else module.weight.T, module.bias
    x_BTI = torch.randn(2, 3, INPUTS)
    y_BTO = module(x_BTI)
    supernet = single(module, supernet=True).eval()
    for genes in EVERY:
        plain = single(module, **dict(zip(FORMS, genes, strict=True)))
        assert sum(p.numel() for p in plain.parameters()) == closed_cost(genes, RANK, INPUTS, OUTPUTS), genes
        supernet.genes = genes
        for delta in (plain, supernet):
            new_OI, new_O = dense(delta, weight_OI, bias_O, genes)
            close(delta.after(x_BTI, y_BTO), x_BTI @ new_OI.T + new_O)
            merged = delta.merged(weight_OI, bias_O)
            close(merged[0], new_OI, 1e-6)
            close(merged[1], new_O, 1e-6)
    costs = supernet.costs()
    assert all(
        sum(cost[form] for cost, form in zip(costs, genes, strict=True)) == closed_cost(genes, RANK, INPUTS, OUTPUTS)
        for genes in EVERY
    )


@pytest.mark.parametrize("form", ["lora_1", "lora_2", "lora_3"])
def test_ranks_below_the_full_one_are_slices(form: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(2, INPUTS)
    words = ("lora", "lora_1", "lora_2")
    supernet = single(module, supernet=True, choices=dict.fromkeys("abc", words)).eval()
    genes = tuple(form.replace("lora_3", "lora") for _ in range(3)) + ("vector", "constant")
    supernet.genes = genes
    new_OI, new_O = dense(supernet, module.weight, module.bias, genes)
    close(supernet.after(x, module(x)), x @ new_OI.T + new_O)
    plain = single(module, a=form, b=form, c=form, e="constant")
    assert plain.get_parameter("glora_A.Xd").shape == (OUTPUTS, int(form[-1]))
    assert sum(p.numel() for p in plain.parameters()) == closed_cost(genes, RANK, INPUTS, OUTPUTS)


@torch.no_grad()
def test_fused_parts_leave_the_other_rows() -> None:
    """GPT-2's queries and values in c_attn; the keys between them stay."""
    model, data, hand = biased(adapted("gpt2", graft.GLoRA(rank=2))), data_of("gpt2"), biased(lively("gpt2"))
    rows = torch.tensor([*range(32), *range(64, 96)])
    for site, delta in model.adapters["a"].items():
        module: Any = hand.get_submodule(site.path)
        assert dict(delta.named_parameters())["glora_A.Xd"].shape == (64, 2)
        new_OI, new_O = dense(delta, module.weight.T[rows], module.bias[rows], ("lora",) * 3 + ("vector",) * 2)
        module.weight.T[rows], module.bias[rows] = new_OI, new_O
    far(hand(**data).logits, biased(lively("gpt2"))(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "bert", "bart"])
def test_equals_the_changed_weights(arch: str) -> None:
    """With biases all five parts act, without (Llama) only A and B."""
    method = graft.GLoRA(rank=2, head=False) if arch == "llama" else graft.GLoRA(rank=2, d="constant", head=False)
    model, data, hand = biased(adapted(arch, method)), data_of(arch), biased(lively(arch))
    for site, delta in model.adapters["a"].items():
        module: Any = hand.get_submodule(site.path)
        genes = ("lora", "lora", "lora", "constant", "vector") if module.bias is not None else ("lora",) * 2
        assert [name for name, part in delta.named_children() if list(part.parameters())] == [
            f"glora_{letter}" for letter in "ABCDE"[: len(genes)]
        ]
        bias = module.bias if module.bias is not None else torch.zeros(len(module.weight))
        module.weight.data, new_O = dense(delta, module.weight, bias, (*genes, *("none",) * (5 - len(genes))))
        if module.bias is not None:
            module.bias.data = new_O
    far(hand(**data).logits, biased(lively(arch))(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@torch.no_grad()
def test_add_bias_acts_unmerged_and_does_not_merge() -> None:
    path = "model.layers.1.self_attn.v_proj"
    model = adapted("llama", graft.GLoRA(add_bias=True, targets=(path,)))
    delta = model.adapters["a"].at(path)
    assert {name.partition(".")[0] for name, _ in delta.named_parameters()} == {f"glora_{each}" for each in "ABCE"}
    hand, data = lively("llama"), data_of("llama")
    module: Any = hand.get_submodule(path)
    genes = ("lora", "lora", "lora", "none", "vector")
    module.weight.data, new_O = dense(delta, module.weight, torch.zeros(16), genes)
    module.bias = nn.Parameter(new_O)
    close(model(**data).logits, hand(**data).logits)
    with pytest.raises(graft.MergeError, match=rf"{path} has no bias"):
        graft.merge(model, "a")
    graft.merge(adapted("llama", graft.GLoRA(add_bias=True, c="none", e="none", targets=(path,))), "a")


@torch.no_grad()
def test_beside_others_it_reads_the_base() -> None:
    """Two GLoRAs and a LoRA: the sum of their changes of W0, merged or not, in any order."""
    model, data = biased(adapted("bert", graft.GLoRA(head=False))), data_of("bert")
    perturb(graft.attach(model, graft.GLoRA(a="vector", b="none", d="constant", head=False), "b"), 2, 0.3)
    perturb(graft.attach(model, graft.LoRA(head=False), "lora"), 3, 0.3)
    path = "bert.encoder.layer.0.attention.self.query"
    module, x = model.get_submodule(path), torch.randn(2, 3, 32)
    graft.use(model, None)
    base = module(x)
    changes = []
    for name in ("a", "b", "lora"):
        graft.use(model, name)
        changes.append(module(x) - base)
    for entry in (("a", "b", "lora"), ("lora", "b", "a")):
        graft.use(model, entry)
        close(module(x), base + sum(changes))
        unmerged = model(**data).logits
        graft.merge(model, entry)
        close(model(**data).logits, unmerged)
        graft.unmerge(model)


@pytest.mark.filterwarnings("ignore")
def test_on_a_quantized_linear() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    source = nn.Linear(64, 32)
    module = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    module.load_state_dict(source.state_dict())
    module = module.to("cpu")
    site = Site("linear", "attention.query", 0, module, 64, 32)
    method, x = graft.GLoRA(rank=2), torch.randn(3, 64)
    delta = GLoRADelta(site, method, method.genes_at(site), None, False)
    perturb(delta, 1, 0.1)  # type: ignore[arg-type]
    weight_OI = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    new_OI, new_O = dense(delta, weight_OI, module.bias, delta.genes)
    close(delta.after(x, x @ weight_OI.T + module.bias), x @ new_OI.T + new_O)


def test_half_precision_base_keeps_its_dtype() -> None:
    model = tiny("bert").to(torch.bfloat16)
    perturb(graft.attach(model, graft.GLoRA(), "a"))
    logits: Tensor = model(**data_of("bert")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in model.adapters.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- the supernet


def supernet(arch: str = "llama", **fields: Any) -> Any:
    """A tiny model in training mode, without dropout, with a supernet "a" of random values."""
    model = adapted(arch, graft.GLoRA(supernet=True, **fields))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def drawn(model: Any) -> dict[str, tuple[str, ...]]:
    return dict(model.adapters["a"].shared.drawn)


def test_draws_each_form_of_each_layer_uniformly() -> None:
    torch.manual_seed(0)
    choices = (("lora", "vector", "constant", "none"), ("lora", "none"), ("none",), ("x", "y", "z"), ("none",))
    paths, times = Paths({"p": choices, "q": choices}), 3000
    seen = []
    for _ in range(times):
        paths.draw()
        assert paths.drawn is not None
        seen.append((*paths.drawn["p"], *paths.drawn["q"]))
    for i, words in enumerate(choices * 2):
        counts = [sum(genes[i] == word for genes in seen) for word in words]
        expected = times / len(words)
        # chi-square with at most 3 degrees of freedom: above 16.3 once in a thousand
        assert sum((count - expected) ** 2 / expected for count in counts) < 16.3, (words, counts)
    assert 0.46 < sum((g[0] == "lora") == (g[5] == "lora") for g in seen) / times - 0.125 < 0.54  # layers: independent


def test_a_training_forward_has_one_path_for_all_rows_and_only_its_slices_train() -> None:
    model, data = biased(supernet("bert", head=False)), data_of("bert")
    perturb(graft.attach(model, graft.LoRA(rank=2, head=False), "lora"))
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        model.train().zero_grad()
        with graft.route(model, ["a", None, ("lora", "a")]):
            logits = model(**data).logits
        path = drawn(model)
        seen.add(tuple(path.values()))
        logits.square().sum().backward()
        for site, delta in model.adapters["a"].items():
            for part, form in zip(delta.parts, path[site.path], strict=True):
                used = {t.data_ptr(): t.numel() for t in part.factors(form)}
                for p in part.parameters():
                    touched = 0 if p.grad is None else int((p.grad != 0).sum())
                    assert touched == used.get(p.data_ptr(), 0), (site.path, form)
        model.eval()
        set_genes(model.adapters["a"], path)
        with graft.route(model, ["a", None, ("lora", "a")]):
            close(logits, model(**data).logits)
    assert len(seen) == 4


@pytest.mark.parametrize("on", [False, True])
def test_checkpointing_replays_the_paths_of_two_forwards(on: bool) -> None:
    """Both losses go backward after both forwards: what is recomputed first was drawn first."""
    data, grads = data_of("llama"), []
    for checkpoint in (False, on):
        model = supernet("llama").double()
        if checkpoint:
            checkpointed(model)
        torch.manual_seed(5)
        losses, paths = [], []
        for _ in range(2):
            losses.append(model(**data).logits.square().sum())
            paths.append(drawn(model))
        assert paths[0] != paths[1]
        sum(losses).backward()  # type: ignore[union-attr]
        grads.append({name: p.grad for name, p in model.adapters.named_parameters()})
        assert drawn(model) == paths[1]
    for name, expected in grads[0].items():
        assert (expected is None) == (grads[1][name] is None), name
        if expected is not None:
            close(grads[1][name], expected, 1e-9)


def test_outside_of_training_the_set_path_acts() -> None:
    data = data_of("llama")
    genes = {"model.layers.0.self_attn.q_proj": ("vector", "none", "none", "none", "none")}
    model = supernet(genes=genes)
    model.eval()
    expected = model(**data).logits
    assert torch.equal(model(**data).logits, expected)
    widest = supernet()
    far(widest.eval()(**data).logits, expected)
    assert {delta.genes[:2] for _, delta in widest.adapters["a"].items()} == {("lora", "lora")}
    # Nor does a supernet draw that only stands in a model whose other adapters train.
    model.adapters["a"].requires_grad_(False)
    model.train()
    close(model(**data).logits, expected)
    model.adapters["a"].requires_grad_(True)
    far(model(**data).logits, expected)


# ------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rank": 0}, "rank must be"),
        ({"a": "matrix"}, "a is one of lora, vector, constant, none"),
        ({"b": "lora_9"}, "lora_k with k up to the rank 4"),
        ({"c": "constant"}, "c is one of lora, vector, none"),
        ({"d": "lora"}, "d is one of vector, constant, none"),
        ({"genes": {"q": ("lora", "lora")}}, "q needs the forms of A, B, C, D and E"),
        ({"genes": {"q": "lora"}}, "genes: "),
        ({"choices": {"a": ("none",)}}, "set supernet=True"),
        ({"supernet": True, "choices": {"f": ("none",)}}, "'f'"),
        ({"supernet": True, "choices": {"a": ()}}, "at least one form"),
        ({"supernet": True, "choices": {"a": ("many",)}}, "choices: a is one of"),
        ({"supernet": True, "a": "none"}, "in choices"),
    ],
)
def test_refuses_bad_values(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(graft.ConfigError, match=match) as caught:
        graft.GLoRA(**fields)
    assert "\n" not in str(caught.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"targets": ("embedding",)}, "embed_tokens: GLoRA acts on linears, not Embedding"),
        ({"a": "none", "b": "none"}, "no part would act at any target"),
        ({"genes": {"q_proj": ("lora",) * 3 + ("none",) * 2}}, "'q_proj' is none of the 4 targets"),
        ({"genes": {Q: ("lora",) * 3 + ("none",) * 2}}, "c cannot be 'lora' there.*add_bias=True"),
        ({"genes": {Q: ("lora", "lora", "none", "vector", "none")}, "add_bias": True}, "d cannot be .*no bias"),
        (
            {"supernet": True, "choices": {"a": ("vector",)}, "genes": {Q: ("lora", *("none",) * 4)}},
            "a cannot be 'lora' there, only vector",
        ),
    ],
)
def test_refuses_bad_places(fields: dict[str, Any], match: str) -> None:
    model = tiny("llama")
    with pytest.raises(graft.SiteError, match=match):
        graft.attach(model, graft.GLoRA(**fields))
    assert not hasattr(model, "adapters")


def test_json() -> None:
    method = graft.GLoRA(rank=2, a="lora_2", genes={Q: ["lora_1", "none", "none", "none", "none"]})  # type: ignore[dict-item]
    assert method.a == "lora" and method.genes[Q] == ("lora_1", *("none",) * 4)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    supernet = graft.GLoRA(supernet=True, choices={"a": ["lora_2", "none"]})  # type: ignore[dict-item]
    assert from_dict(json.loads(json.dumps(supernet.to_dict(full=True)))) == supernet


def test_counts_on_public_shapes() -> None:
    """LLaMA-7B has no biases: 2 r (in + out) each; BERT-base has all five parts."""
    llama = graft.attach(meta("Llama-2-7B"), graft.GLoRA(rank=4, targets="all-linear"))
    assert llama.trainable == llama.saved == 32 * 2 * 4 * (4 * 8192 + 3 * (4096 + 11008))
    bert = meta("bert-base")
    assert graft.attach(bert, graft.GLoRA(rank=4, head=False)).trainable == 24 * (2 * 4 * 1536 + 4 * 769 + 2 * 768)
    graft.detach(bert)
    assert graft.attach(bert, graft.GLoRA(supernet=True, head=False)).trainable == 24 * (2 * 4 * 1536 + 4 * 769 + 1536)
    graft.detach(bert)
    small = graft.GLoRA(a="constant", b="vector", c="vector", d="none", e="constant", head=False)
    assert graft.attach(bert, small).trainable == 24 * (1 + 768 + 768 + 0 + 1)
