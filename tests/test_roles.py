"""Roles of every architecture we name, what `select` makes of a request, and where the parts of fused linears are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import graft
from graft.errors import SiteError
from graft.roles import (
    Site,
    blocks,
    is_decoder,
    is_encoder_decoder,
    norm_order,
    part_rows,
    parts_asked,
    select,
    sites,
    task_heads,
    uses_attention_interface,
)
from role_tables import COUNTS, FUSED, LAYERS, MORE, OUTSIDE, SMALL
from tiny import MODELS, batch, tiny

QUERY_VALUE = ("attention.query", "attention.value")


def paths(found: list[Site]) -> list[str]:
    return [site.path for site in found]


# --- naming


@pytest.mark.parametrize("name, prefix", [(name, prefix) for name, layers in LAYERS.items() for prefix in layers])
def test_the_roles_of_one_layer(name: str, prefix: str) -> None:
    found = {site.path: site.role for site in sites(tiny(name)) if site.path.startswith(prefix)}
    assert found == {prefix + path: role for path, role in LAYERS[name][prefix].items()}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_roles_outside_of_layers(name: str) -> None:
    assert {site.path: site.role for site in sites(tiny(name)) if site.layer is None} == OUTSIDE[name]


def test_every_tiny_model_is_in_the_tables() -> None:
    assert set(LAYERS) == set(OUTSIDE) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_layers_order_and_sizes(name: str) -> None:
    model = tiny(name)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    found = sites(model)
    assert [order[site.path] for site in found] == sorted(order[site.path] for site in found)
    for site in found:
        assert site.module is model.get_submodule(site.path)
        if isinstance(site.module, nn.Linear):
            assert (site.out_features, site.in_features) == tuple(site.module.weight.shape)
    queries = [site.layer for site in found if site.role in ("attention.query", "attention.qkv")]
    assert queries == [0, 1] * COUNTS[name][0]
    assert len([site for site in found if site.role.startswith("cross_attention.")]) == COUNTS[name][1]


def test_meta_device_gives_the_same_sites() -> None:
    for name in ("llama", "mixtral", "t5", "bert"):
        model_class, _, _ = MODELS[name]
        real = tiny(name)
        with torch.device("meta"):
            meta = getattr(transformers, model_class)(real.config)
        described = [(s.path, s.role, s.layer, s.in_features, s.out_features) for s in sites(real)]
        assert described == [(s.path, s.role, s.layer, s.in_features, s.out_features) for s in sites(meta)]


def test_the_bank_is_skipped() -> None:
    model = tiny("llama")
    before = paths(sites(model, unnamed=True))
    model.adapters = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    assert paths(sites(model, unnamed=True)) == before


def test_every_site_is_visited_by_a_forward() -> None:
    """A named site that never runs could not be acted upon: T5's `shared` is such a module and has no role."""
    for name in MODELS:
        model = tiny(name)
        seen: set[str] = set()
        for site in sites(model):
            site.module.register_forward_hook(lambda *_, seen=seen, path=site.path: seen.add(path))
        with torch.no_grad():
            model(**batch(name))
        assert set(paths(sites(model))) == seen, name


# --- properties of models


def test_norm_order() -> None:
    post = {name for name in MODELS if norm_order(tiny(name)) == "post"}
    assert post == {"bert", "bert_base", "roberta", "distilbert", "bart"}
    assert norm_order(tiny("opt", do_layer_norm_before=False)) == "post"


def test_stacks_and_blocks() -> None:
    for name in MODELS:
        model = tiny(name)
        both, causal = name in ("t5", "mt5", "bart"), name not in ("bert", "bert_base", "roberta", "distilbert", "vit")
        assert is_encoder_decoder(model) == both
        assert is_decoder(model) == (causal and not both)
        stacks = blocks(model)
        assert list(stacks) == (["encoder", "decoder"] if both else ["decoder" if causal else "encoder"])
        for stack, modules in stacks.items():
            assert len(modules) == 2
            assert all(model.get_submodule(path) is module for path, module in modules)
            assert not both or all(stack in path for path, _ in modules)


def test_task_heads() -> None:
    heads = {name: paths(task_heads(tiny(name))) for name in MODELS}
    assert {name: found for name, found in heads.items() if found} == {
        "llama_cls": ["score"],
        "gpt2_cls": ["score"],
        "bert": ["classifier"],
        "roberta": ["classifier"],
        "distilbert": ["pre_classifier", "classifier"],
        "vit": ["classifier"],
    }


def test_which_attentions_go_through_the_interface() -> None:
    for name in MODELS:
        model = tiny(name)
        used = {
            uses_attention_interface(site.module)
            for site in sites(model)
            if site.role.endswith("attention") and not site.role.startswith("norm")
        }
        assert used == {name not in ("bloom", "falcon", "falcon_new")}, name


# --- select


def test_roles_cover_cross_attention_unless_restricted() -> None:
    model = tiny("t5")
    assert len(select(model, ["attention.query"])) == 6
    assert len(select(model, ["self_attention.query"])) == 4
    assert paths(select(model, ("cross_attention.query",))) == [
        f"decoder.block.{layer}.layer.1.EncDecAttention.q" for layer in (0, 1)
    ]
    assert {site.role for site in select(model, ["attention"])} == {"attention", "cross_attention"}
    assert {site.role for site in select(model, ["self_attention"])} == {"attention"}


def test_module_names_roles_and_families_mix() -> None:
    model = tiny("bert")
    both = select(model, ["attention.query", "output.dense"])  # the name fits the attention's output too, as in peft
    assert {site.role for site in both} == {"attention.query", "attention.output", "ffn.down"}
    assert {site.role for site in select(model, ["norm"])} == {"norm.embedding", "norm.attention", "norm.ffn"}
    assert paths(select(tiny("roberta"), ["classifier.out_proj"])) == ["classifier.out_proj"]
    assert select(tiny("roberta"), ["classifier.out_proj"])[0].role == "other"


def test_one_string_is_a_regex_or_a_role() -> None:
    model = tiny("llama")
    assert len(select(model, r".*\.self_attn\..*")) == 8  # the attention module itself does not fit a dot behind it
    assert len(select(model, r".*self_attn.*")) == 8  # nor is a whole sub-layer ever meant by a regex
    assert paths(select(model, r".*\.1\..*v_proj")) == ["model.layers.1.self_attn.v_proj"]
    assert select(model, "attention.query") == select(model, ["attention.query"])
    with pytest.raises(SiteError, match="not a valid regex"):
        select(model, "(q_proj")


def test_exclude() -> None:
    model = tiny("llama")
    assert {site.role for site in select(model, "all-linear", exclude=["attention"])} > {"ffn.up"}
    left = select(model, "all-linear", exclude=["ffn.gate", "q_proj"])
    assert {site.role for site in left} == {
        "attention.key",
        "attention.value",
        "attention.output",
        "ffn.up",
        "ffn.down",
    }
    with pytest.raises(SiteError, match=r"exclude: no site 'ffn.dwon'.*did you mean 'ffn.down'"):
        select(model, "all-linear", exclude=["ffn.dwon"])
    with pytest.raises(SiteError, match="leave no site"):
        select(model, ["q_proj"], exclude=["attention.query"])


def test_layers() -> None:
    model = tiny("t5")
    assert {site.layer for site in select(model, QUERY_VALUE, layers=1)} == {1}
    assert {site.stack for site in select(model, QUERY_VALUE, layers=1)} == {"encoder", "decoder"}
    assert select(model, QUERY_VALUE, layers=2) == select(model, QUERY_VALUE)
    for layers in ([0], (0,), range(1)):
        assert {site.layer for site in select(model, QUERY_VALUE, layers=layers)} == {0}
    assert "lm_head" not in paths(select(model, [*QUERY_VALUE, "lm_head"], layers=2))
    with pytest.raises(SiteError, match=r"no layer 2 .*it has 0 to 1"):
        select(model, QUERY_VALUE, layers=[0, 2])
    with pytest.raises(SiteError, match="a count from 1 to 2"):
        select(model, QUERY_VALUE, layers=0)
    with pytest.raises(SiteError, match="a count from 1 to 2"):
        select(model, QUERY_VALUE, layers=30)
    with pytest.raises(SiteError, match="leave no site"):
        select(model, ["lm_head"], layers=1)


@pytest.mark.parametrize(
    "name, targets, text",
    [
        ("llama", ["attention.qurey"], "did you mean 'attention.query'"),
        ("llama", ["attention.query", "v_porj"], "no site 'v_porj' in LlamaForCausalLM, did you mean 'v_proj'"),
        ("llama", ["cross_attention.query"], "no site 'cross_attention.query'"),
        ("bert", ["ffn"], "no site 'ffn'.*Roles: .*ffn.up.*Modules: .*word_embeddings"),
        ("gpt2", ["q_proj"], "Roles: .*attention.query.*attention.qkv"),
        ("mixtral", ["ffn.up"], "fused and routed: take attention roles only"),
        ("llama", [], "targets is empty"),
        ("llama", r".*nowhere", "no site '.*nowhere'"),
    ],
)
def test_an_entry_that_names_nothing(name: str, targets: Any, text: str) -> None:
    with pytest.raises(SiteError, match=text) as caught:
        select(tiny(name), targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SwitchTransformers", "NllbMoe"])
def test_experts_that_are_linears_cannot_be_named(name: str) -> None:
    """Each sees the tokens that the router sends it, so rows could not be told apart there."""
    sizes = {"vocab_size": 99, "d_model": 32, "num_heads": 4, "num_experts": 2, "decoder_start_token_id": 0}
    switch = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    nllb = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    more = {**switch, "pad_token_id": 0} if name == "SwitchTransformers" else {**nllb, "encoder_sparse_step": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    expert = next(
        path for path, module in model.named_modules() if "experts." in path and isinstance(module, nn.Linear)
    )
    for targets in ([expert], [expert.rpartition(".")[2]], r".*\.expert_1\..*", "all-linear"):
        with pytest.raises(SiteError, match=r"targets: \S*\.experts\.\S* is one of the routed experts") as caught:
            graft.attach(model, graft.LoRA(targets=targets))
        assert "\n" not in str(caught.value)
    found = paths(select(model, "all-linear", exclude=r".*\.experts\..*"))
    assert any(path.endswith("router.classifier") for path in found) and not any("experts." in path for path in found)
    assert select(model, QUERY_VALUE)


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mt5", "bart", "distilbert", "roberta", "gpt2_cls"])
@pytest.mark.parametrize("kind", ["all-linear", "names", "regex"])
def test_the_selection_is_pefts(name: str, kind: str) -> None:
    model = tiny(name)
    leaf = select(model, QUERY_VALUE)[0].path.rpartition(".")[2]
    targets = {"all-linear": "all-linear", "names": [leaf, "dense"], "regex": rf".*\.1\..*{leaf}"}[kind]
    if (name, kind) == ("distilbert", "all-linear"):
        pytest.skip("peft 0.21.2 puts LoRA on pre_classifier and then cannot keep it whole: it raises")
    if kind == "names" and not any(path.endswith("dense") for path, _ in model.named_modules()):
        targets = [leaf]
    task = "SEQ_CLS" if task_heads(model) else None
    ours = set(paths(select(model, targets)))
    theirs = get_peft_model(model, LoraConfig(target_modules=targets, task_type=task)).targeted_module_names
    assert ours == set(theirs)
    if kind == "all-linear":
        assert ("bert.pooler.dense" in ours) == (name == "bert")


# --- fused linears


def test_parts_asked() -> None:
    qkv = select(tiny("gpt2"), ["attention.qkv"])[0]
    assert select(tiny("gpt2"), QUERY_VALUE)[0].path == qkv.path
    assert len(select(tiny("gpt2"), ["attention.query", "attention.key", "c_attn"])) == 2
    assert parts_asked(qkv, QUERY_VALUE) == ("query", "value")
    assert parts_asked(qkv, ["attention.value", "attention.output", "self_attention.query"]) == ("query", "value")
    assert parts_asked(qkv, "attention.key") == ("key",)
    for whole in (
        ["c_attn"],
        ["attention.qkv"],
        "all-linear",
        [*QUERY_VALUE, "attention.key"],
        ["attention.query", "attn.c_attn"],
        r".*c_attn",
    ):
        assert parts_asked(qkv, whole) == ()
    fused = select(tiny("phi3"), ["ffn.up"])[0]
    assert (fused.role, parts_asked(fused, ["ffn.up"])) == ("ffn.gate_up", ("up",))
    plain = select(tiny("llama"), QUERY_VALUE)[0]
    assert parts_asked(plain, QUERY_VALUE) == ()


def test_a_part_of_a_fused_linear_cannot_be_excluded() -> None:
    model = tiny("gpt2")
    with pytest.raises(SiteError, match="exclude names key inside the fused"):
        select(model, ["attention.qkv"], exclude=["attention.key"])
    assert len(select(model, QUERY_VALUE, exclude=["attention.key"])) == 2


def fused_model(name: str) -> nn.Module:
    if name in FUSED:
        base, overrides = FUSED[name]
        return tiny(base, attn_implementation="eager", **overrides)
    model_class, config_class, fields = MORE[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SMALL, **fields)
    config._attn_implementation = "eager"
    return getattr(transformers, model_class)(config).eval()


def contexts(model: nn.Module, site: Site, rows: Tensor, scale_T: Tensor) -> Tensor:
    """What the first attention mixes, (T, H d_h), when `rows` of its fused output are multiplied by `scale_T`."""
    output = next(s for s in sites(model) if s.role == "attention.output" and s.layer == site.layer)
    kept: list[Tensor] = []

    def change(module: nn.Module, args: tuple[Any, ...], y_BTO: Tensor) -> Tensor:
        y_BTO = y_BTO.clone()
        y_BTO[..., rows] *= scale_T[:, None]
        return y_BTO

    hooks = [
        site.module.register_forward_hook(change),
        output.module.register_forward_pre_hook(lambda module, args: kept.append(args[0])),
    ]
    with torch.no_grad():
        model(torch.arange(5, 12)[None])
    for hook in hooks:
        hook.remove()
    return kept[0][0]


@pytest.mark.parametrize("name", [*FUSED, *MORE])
def test_part_rows_are_what_the_model_splits(name: str) -> None:
    """Value rows carry the content; key rows at position 1 reach every later position, query rows only their own."""
    model = fused_model(name)
    site = select(model, ["attention.qkv"], layers=[0])[0]
    with torch.no_grad():
        site.module.weight.mul_(30)  # at the initial size all scores are alike, so keys and queries would not matter
    rows = {part: part_rows(site, part, model.config) for part in ("query", "key", "value")}
    joined = torch.cat(list(rows.values()))
    assert joined.dtype == torch.long
    assert joined.sort().values.tolist() == list(range(site.out_features))
    base = contexts(model, site, rows["value"], torch.ones(7))
    assert torch.equal(contexts(model, site, rows["value"], torch.zeros(7)), torch.zeros_like(base))
    once = torch.ones(7)
    once[1] = -2.0
    causal = name != "modernbert"
    query = (contexts(model, site, rows["query"], once) - base).abs().amax(-1) > 1e-6
    key = (contexts(model, site, rows["key"], once) - base).abs().amax(-1) > 1e-6
    assert query.tolist() == [False, True, False, False, False, False, False]
    assert key.tolist() == [not causal, True, True, True, True, True, True]


def test_part_rows_of_a_fused_gate() -> None:
    model = tiny("phi3")
    site = select(model, ["ffn.gate_up"])[0]
    gate, up = (part_rows(site, part, model.config) for part in ("gate", "up"))
    assert gate.tolist() == list(range(48)) and up.tolist() == list(range(48, 96))
    mlp = model.get_submodule("model.layers.0.mlp")
    x_TD = torch.randn(3, 32)
    with torch.no_grad():
        y_TF = mlp.activation_fn(x_TD @ site.module.weight[gate].T) * (x_TD @ site.module.weight[up].T)
        torch.testing.assert_close(mlp.down_proj(y_TF), mlp(x_TD))


def test_part_rows_refuses_what_it_does_not_know() -> None:
    model = tiny("gpt2")
    site = select(model, ["attention.qkv"])[0]
    with pytest.raises(SiteError, match="has no part 'gate'"):
        part_rows(site, "gate", model.config)
    model.config.model_type = "unheard-of"
    with pytest.raises(
        SiteError, match=r"order of its parts in 'unheard-of' is not known: target attention\.qkv whole"
    ):
        part_rows(site, "query", model.config)
