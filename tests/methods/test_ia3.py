"""(IA)^3 against the same scales written into the weights by hand, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from graft import vocabulary
from graft.method import Build, from_dict
from tiny import tiny

# arch -> (keys, values, feed-forward) by the end of their paths: scaled rows, scaled rows, scaled columns.
PLAIN = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "bert": ("self.key", "self.value", ".output.dense"),
    "t5": (".k", ".v", ".wo"),
    "mt5": (".k", ".v", ".wo"),
    "bart": ("k_proj", "v_proj", "fc2"),
}


@torch.no_grad()
def scaled_by_hand(arch: str, adapter: Any) -> nn.Module:
    """The tiny model with every vector of the adapter multiplied into its weights."""
    model = lively(arch)
    keys, values, inside = PLAIN[arch]
    seen = 0
    for path, module in model.named_modules():
        if path.endswith((keys, values)):
            module.weight *= adapter.at(path).scale[:, None]
            if module.bias is not None:
                module.bias *= adapter.at(path).scale
            seen += 1
        elif path.endswith(inside) and "attention.output" not in path:
            module.weight *= adapter.at(path).scale
            seen += 1
    assert seen == len(adapter.sites) - len([path for path in adapter.sites if path == "classifier"])
    return model


@pytest.mark.parametrize("arch", sorted(PLAIN))
def test_scales_rows_and_columns(arch: str) -> None:
    model, data = adapted(arch, graft.IA3(head=False)), data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, scaled_by_hand(arch, model.adapters["a"])(**data).logits)


def test_fused_queries_stay_as_they_are() -> None:
    model, data = adapted("gpt2", graft.IA3()), data_of("gpt2")
    hand = lively("gpt2")
    with torch.no_grad():
        for i, block in enumerate(hand.transformer.h):
            kv = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn").scale
            assert kv.shape == (64,)
            block.attn.c_attn.weight[:, 32:] *= kv
            block.attn.c_attn.bias[32:] *= kv
            block.mlp.c_proj.weight *= model.adapters["a"].at(f"transformer.h.{i}.mlp.c_proj").scale[:, None]
    close(model(**data).logits, hand(**data).logits)


def test_merged_scales_rows_bias_and_columns() -> None:
    weight_OI, bias_O = torch.randn(6, 4), torch.randn(6)
    model = adapted("llama", graft.IA3())
    adapter = model.adapters["a"]
    down = adapter.at("model.layers.0.mlp.down_proj")
    down.scale.data = torch.tensor([1.0, 2.0, 0.0, -1.0])
    new_OI, new_O = down.merged(weight_OI, bias_O)
    assert torch.equal(new_OI, weight_OI @ torch.diag(down.scale.data)) and torch.equal(new_O, bias_O)
    key = adapter.at("model.layers.0.self_attn.k_proj")
    key.scale.data = torch.arange(6.0)
    new_OI, new_O = key.merged(weight_OI, bias_O)
    assert torch.equal(new_OI, torch.diag(key.scale.data) @ weight_OI) and torch.equal(new_O, bias_O * key.scale)
    assert key.merged(weight_OI, None)[1] is None


def test_targets_may_be_module_names() -> None:
    names = graft.IA3(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",))
    model, other = adapted("llama", names), adapted("llama", graft.IA3())
    data = data_of("llama")
    assert torch.equal(model(**data).logits, other(**data).logits)
    regex = graft.IA3(targets=r".*\.(k_proj|v_proj|down_proj)", feedforward=r".*down_proj")
    assert torch.equal(adapted("llama", regex)(**data).logits, other(**data).logits)
    outputs = graft.attach(tiny("llama"), graft.IA3(targets=("up_proj",), feedforward=()))
    assert {delta.scale.shape for _, delta in outputs.items()} == {(48,)}


def test_scaling_up_or_the_input_of_down_is_one_thing() -> None:
    """The product act(gate) * up is elementwise, so wi_1's output and wo's input take the same numbers."""
    data = data_of("llama")
    inside = adapted("llama", graft.IA3(targets=("ffn.down",)))
    outside = lively("llama")
    adapter = graft.attach(outside, graft.IA3(targets=("ffn.up",)))
    for i in range(2):
        adapter.at(f"model.layers.{i}.mlp.up_proj").scale.data.copy_(
            inside.adapters["a"].at(f"model.layers.{i}.mlp.down_proj").scale
        )
    close(outside(**data).logits, inside(**data).logits)


def test_errors() -> None:
    with pytest.raises(graft.SiteError, match="IA3 scales linears"):
        graft.attach(tiny("llama"), graft.IA3(targets=("norm",)))
    with pytest.raises(graft.SiteError, match="cannot be scaled for up alone"):
        graft.attach(tiny("phi3"), graft.IA3(targets=("ffn.up",), feedforward=("ffn.up",)))
    with pytest.raises(graft.SiteError, match="experts are fused"):
        graft.attach(tiny("mixtral"), graft.IA3())
    with pytest.raises(graft.ConfigError, match="did you mean 'targets'"):
        from_dict({"method": "ia3", "target": ["attention.key"]})


def test_json() -> None:
    method = graft.IA3(targets=("k_proj",), feedforward=())
    assert from_dict(method.to_dict()) == method and from_dict({"method": "ia3"}) == graft.IA3()


# ------------------------------------------------------------------------------------------------------------- peft

PEFT = ("bart", "bert", "falcon", "gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "mt5", "opt")
PEFT += ("qwen2", "qwen3", "roberta", "t5", "bloom")


def sides(peft_model: Any) -> dict[str, tuple[int, ...]]:
    """Path to the vector's shape: (O, 1) scales the output, (1, I) the input."""
    end = ".ia3_l.default"
    return {
        name.removeprefix("base_model.model.").removesuffix(end): tuple(p.shape)
        for name, p in peft_model.named_parameters()
        if name.endswith(end)
    }


@pytest.mark.parametrize("arch", PEFT)
def test_peft_compat_has_pefts_targets(arch: str) -> None:
    import peft

    adapter = graft.attach(tiny(arch), graft.IA3(head=False), peft_compat=True)
    ours = {
        site.path: (1, len(delta.scale)) if type(delta).__name__ == "InputScaleDelta" else (len(delta.scale), 1)
        for site, delta in adapter.items()
    }
    assert ours == sides(peft_twin(arch, peft.IA3Config()))


def test_the_table_covers_pefts() -> None:
    """Each entry of ours is an architecture of peft's, and names the parts that peft's names stand for."""
    from peft.utils import constants

    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    part = {"q": "query", "k": "key", "v": "value", "query": "query", "key": "key", "value": "value"}
    for kind, names in targets.items():
        ours, feedforward = vocabulary.PEFT_SCALED.get(kind, vocabulary.SCALED)
        asked = {part.get(name.removesuffix("_proj")) for name in names} - {None}
        if asked:
            assert {f"attention.{name}" for name in asked} == set(ours) & {f"attention.{p}" for p in part.values()}, (
                kind
            )
        inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        assert bool(feedforward) == bool(set(inputs) - {"w2"}), kind
    assert set(vocabulary.PEFT_SCALED) <= set(targets)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "mt5", "bart"])
def test_equals_peft(arch: str) -> None:
    import peft

    model, data = adapted(arch, graft.IA3(head=False), peft_compat=True), data_of(arch)
    other = peft_twin(arch, peft.IA3Config())
    for site, delta in model.adapters["a"].items():
        vector = inner(other, site.path).ia3_l["default"]
        copy_into(vector, delta.scale.view_as(vector))
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, other(**data).logits)


def test_counts_follow_grouped_heads() -> None:
    adapter = graft.attach(tiny("llama"), graft.IA3())
    assert adapter.trainable == adapter.saved == 2 * (16 + 16 + 48)
    assert graft.attach(tiny("gpt2"), graft.IA3()).trainable == 2 * (2 * 32 + 128)
    assert graft.attach(tiny("gpt2"), graft.IA3(), peft_compat=True).trainable == 2 * (3 * 32 + 128)
    method = graft.IA3(layers=1)
    assert [site.layer for site in method.sites(Build(tiny("llama")))] == [1, 1, 1]


def test_half_precision_base_keeps_its_dtype() -> None:
    model = tiny("llama").to(torch.bfloat16)
    adapter = graft.attach(model, graft.IA3())
    logits: Tensor = model(**data_of("llama")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}
