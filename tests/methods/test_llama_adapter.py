"""LLaMA-Adapter against its formula in dense algebra, against peft, and where its graph begins."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_counts import meta, trainable
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from examples import perturb
from graft.method import from_dict
from tiny import EOS, PAD, checkpointed, tiny

P = 3
PEFT = {"gate": "per_layer", "tanh": False}


def projected(module: Any, prompt_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (H, P, d) of a prompt, by each architecture's own weights."""
    if hasattr(module, "c_attn"):
        _, key, value = (prompt_PD @ module.c_attn.weight + module.c_attn.bias).split(prompt_PD.shape[1], -1)
        return tuple(rows.view(P, 4, 8).transpose(0, 1) for rows in (key, value))  # type: ignore[return-value]
    if hasattr(module, "query_key_value"):
        fused = prompt_PD @ module.query_key_value.weight.T + module.query_key_value.bias
        _, key, value = fused.view(P, 4, 24).transpose(0, 1).split(8, -1)
        return key, value
    if hasattr(module, "qkv_proj"):
        pair = (prompt_PD @ module.qkv_proj.weight.T).split((32, 16, 16), -1)[1:]
        return tuple(rows.view(P, 2, 8).repeat_interleave(2, 1).transpose(0, 1) for rows in pair)  # type: ignore
    key_name, value_name = ("k", "v") if hasattr(module, "k") else ("k_proj", "v_proj")
    out = []
    for name in (key_name, value_name):
        linear = getattr(module, name)
        rows = prompt_PD @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        size = 16 if hasattr(module, "k_norm") else 8
        rows = rows.view(P, -1, size)
        if name == key_name and hasattr(module, "k_norm"):
            rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.weight
        out.append(rows.repeat_interleave(4 // rows.shape[1], 1).transpose(0, 1))
    return out[0], out[1]


def by_hand(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """base + g softmax(q k_p^T scale) v_p, head by head; the two softmaxes are never joined."""
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)
    if hasattr(module, "test_prompt"):
        key_HPd, value_HPd, gate_H = module.test_prompt
        for head in range(q.shape[1]):
            share = (q[:, head] @ key_HPd[head].T * options["scaling"]).softmax(-1)
            out = out.clone()
            out[:, :, head] += gate_H[head] * (share @ value_HPd[head])
    return out, None


def hand_model(arch: str, adapter: Any, source: Any = None) -> Any:
    """A model without Graft that computes the formula; prompts are projected by `source`'s weights, or its own."""
    AttentionInterface.register("test_by_hand", by_hand)
    AttentionMaskInterface.register("test_by_hand", sdpa_mask)
    hand = lively(arch, attn_implementation="test_by_hand")
    for path in adapter.sites:
        delta = adapter.at(path)
        gate = (delta.gate.tanh() if adapter.method.tanh else delta.gate).expand(4)
        module = (source or hand).get_submodule(path)
        hand.get_submodule(path).test_prompt = *projected(module, delta.prompt), gate
    return hand


FORMULA = ["llama", "gpt2", "qwen2", "qwen3", "phi3", "gpt_neox", "opt", "t5", "bart"]


@pytest.mark.parametrize("gate", [{}, PEFT], ids=["per_head-tanh", "per_layer-linear"])
@pytest.mark.parametrize("arch", FORMULA)
def test_formula(arch: str, gate: dict[str, Any]) -> None:
    model, data = adapted(arch, graft.LlamaAdapter(length=P, layers=1, **gate)), data_of(arch)
    adapter = model.adapters["a"]
    assert [site.layer for site in adapter.sites.values()] == [1] and all(
        "encoder." not in path for path in adapter.sites
    )
    if arch in ("qwen2", "opt", "bart", "gpt_neox"):  # biases that are zero would not be seen
        for site in adapter.sites.values():
            for linear in site.module.children():
                if getattr(linear, "bias", None) is not None:
                    torch.nn.init.normal_(linear.bias)
    hand = hand_model(arch, adapter, model)
    hand.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("adapters.")})
    actual, expected = model(**data).logits, hand(**data).logits
    graft.use(model, None)
    far(actual, model(**data).logits)
    close(actual, expected)


def test_prompts_do_not_pass_through_other_adapters() -> None:
    """Beside a LoRA on keys and values, the text's change and the prompt's are those of the base."""
    model, data = adapted("llama", graft.LlamaAdapter(length=P, layers=2)), data_of("llama")
    lora = graft.LoRA(rank=2, targets=("attention.key", "attention.value"))
    perturb(graft.attach(model, lora, "lora"), 2, 0.3)
    hand = hand_model("llama", model.adapters["a"], lively("llama"))
    graft.attach(hand, lora, "lora").load_state_dict(model.adapters["lora"].state_dict())
    graft.merge(hand, "lora")
    with graft.route(model, [("lora", "a")] * 3):
        actual = model(**data).logits
    close(actual, hand(**data).logits)


def test_the_gate_learns_first() -> None:
    """At the start g is zero: the prompts have no gradient, and every head's gate has one."""
    model, data = tiny("llama"), data_of("llama", labels=True)
    adapter = graft.attach(model, graft.LlamaAdapter(length=P, layers=2))
    model(**data).loss.backward()
    for _, delta in adapter.items():
        assert delta.gate.shape == (4,) and bool(delta.gate.grad.all()) and not delta.prompt.grad.any()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "mt5", "bart"])
def test_generate_equals_teacher_forcing(arch: str) -> None:
    model, data = adapted(arch, graft.LlamaAdapter(length=P, layers=2)), data_of(arch, rows=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    for cache in (True, False):
        out = model.generate(**inputs, **options, use_cache=cache)
        both = arch in ("mt5", "bart")
        logits = model(**(inputs | {"decoder_input_ids": out[:, :-1]} if both else {"input_ids": out[:, :-1]})).logits
        logits[..., EOS] = -torch.inf
        assert out[0, -6:].tolist() == logits[0, -6:].argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------- the graph


class Seen:
    """Remembers whether what came out of a module required gradients."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.flags: list[bool] = []
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.flags.append((args[0] if args else kwargs["hidden_states"]).requires_grad)


class Watched:
    """Collects the gradients of a module's output, where it requires any."""

    def __init__(self, reached: list[Tensor]) -> None:
        self.reached = reached

    def __call__(self, module: torch.nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(self.reached.append)


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("spoilt", ["plain", "inputs", "checkpointing"])
def test_no_graph_below_the_first_adapted_layer(arch: str, spoilt: str) -> None:
    """The embeddings' gradient, where they have one, ends at the block below which nothing acts."""
    model = tiny(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 4}).train()
    adapter = perturb(graft.attach(model, graft.LlamaAdapter(length=P, layers=2)))
    if spoilt == "checkpointing":
        checkpointed(model)
    if spoilt != "plain":
        model.enable_input_require_grads()
    reached: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(Watched(reached))
    inside = [Seen(layer.self_attn if arch != "gpt2" else layer.attn) for layer in layers_of(model)]
    model(**data_of(arch, labels=True)).loss.backward()
    assert not reached and all(p.grad is not None for p in adapter.parameters())
    assert not inside[2].flags[0] and inside[3].flags[0]
    model.eval()  # whoever asks for the gradient of the inputs in eval mode gets it
    if spoilt == "inputs":
        model(**data_of(arch, labels=True)).loss.backward()
        assert len(reached) == 1 and reached[0].any()


def test_the_graph_is_not_cut_where_another_adapter_acts_lower() -> None:
    """Gradients of a LoRA in all layers, and of a prompt adapter one layer lower, are as without the barrier."""
    grads = []
    for needed in (False, True):
        model, data = tiny("llama", num_hidden_layers=4).train(), data_of("llama", labels=True)
        perturb(graft.attach(model, graft.LlamaAdapter(length=P, layers=1), "top"), 1, 0.3)
        perturb(graft.attach(model, graft.LlamaAdapter(length=P, layers=3), "more"), 2, 0.3)
        perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 3, 0.3)
        if needed:
            model.enable_input_require_grads()
        for rows in (["top", "lora", None], ["top", "more", "top"], [("top", "lora")] * 3):
            with graft.route(model, rows):
                model(**data).loss.backward()
        grads.append({name: p.grad for name, p in model.adapters.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.any()
        close(grads[1][name], grad)
    graft.detach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------- bad input


def test_refusals() -> None:
    for settings in ({"length": 0}, {"gate": "per_token"}):
        with pytest.raises(graft.ConfigError, match="LlamaAdapter: "):
            graft.LlamaAdapter(**settings)  # type: ignore[arg-type]
    for arch, layers, message in (
        ("llama", 30, "layers=30, but LlamaForCausalLM has 2 layers; give 1 to 2"),
        ("bart", 3, "layers=3, but BartForConditionalGeneration has 2 layers"),
        ("llama", 0, "layers=0"),
        ("llama", (0, 2), "no layer 2 in LlamaForCausalLM, it has 0 to 1"),
        ("bert", 1, "BertForSequenceClassification is an encoder"),
        ("bloom", 1, "does not call transformers' attention interface"),
    ):
        model = tiny(arch)
        with pytest.raises(graft.SiteError, match=message):
            graft.attach(model, graft.LlamaAdapter(layers=layers))
        assert not hasattr(model, "adapters")
    model = tiny("llama")
    adapter = graft.attach(model, graft.LlamaAdapter(layers=1), "a")
    with pytest.raises(graft.RouteError, match="can only have weight 1"):
        graft.use(model, {"a": 0.5})
    with pytest.raises(graft.RouteError, match="no dial"):
        adapter.scale = 0.5
    with pytest.raises(graft.MergeError, match="llama_adapter"):
        graft.merge(model, "a")
    method = graft.LlamaAdapter(length=4, layers=(0, 1), gate="per_layer", tanh=False)
    assert from_dict(method.to_dict(full=True)) == method


# ------------------------------------------------------------------------------------------------- counts and peft


def test_counts() -> None:
    """The paper's 1.2M on LLaMA-7B: 30 * 10 * 4096 and the gates; Llama 3 has the same width and heads."""
    for name in ("Llama-2-7B", "Llama-3-8B"):
        model = meta(name)
        assert trainable(model, graft.LlamaAdapter(gate="per_layer"), False) == 1_228_830 == 30 * (10 * 4096 + 1)
        assert trainable(model, graft.LlamaAdapter(), False) == 1_229_760 == 30 * (10 * 4096 + 32)


def peft_of(arch: str, adapter: Any, layers: int) -> Any:
    """peft's model with the same values; its linear gate gets tanh(g)."""
    import peft

    other = peft_twin(arch, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=layers))
    for path in adapter.sites:
        delta, module = adapter.at(path), inner(other, path)
        copy_into(module.adaption_prompt, delta.prompt[None])
        copy_into(module.adaption_gate, delta.gate.tanh() if delta.tanh else delta.gate)
    return other


@pytest.mark.parametrize(("arch", "layers"), [("llama", 2), ("llama", 1), ("mistral", 2), ("gpt2", 2)])
@pytest.mark.parametrize("tanh", [False, True])
def test_equals_peft(arch: str, layers: int, tanh: bool) -> None:
    method = graft.LlamaAdapter(length=P, layers=layers, gate="per_layer", tanh=tanh)
    model, data = adapted(arch, method, peft_compat=True), data_of(arch)
    other = peft_of(arch, model.adapters["a"], layers)
    actual, seen = model(**data).logits, data["attention_mask"].bool()
    close(actual[seen], other(**data).logits[seen])
    graft.use(model, None)
    far(actual, model(**data).logits)


def test_gpt2_is_projected_unless_peft_is_asked_for() -> None:
    ours = adapted("gpt2", graft.LlamaAdapter(length=P, layers=2, **PEFT))
    theirs = adapted("gpt2", graft.LlamaAdapter(length=P, layers=2, **PEFT), peft_compat=True)
    assert all(torch.equal(p, q) for p, q in zip(ours.adapters.parameters(), theirs.adapters.parameters(), strict=True))
    data = data_of("gpt2")
    far(ours(**data).logits, theirs(**data).logits)
    graft.use(theirs, {"a": 0.0})
    close(theirs(**data).logits, lively("gpt2")(**data).logits)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("arch", "layers"), [("llama", 1), ("mistral", 2), ("gpt2", 2)])
@pytest.mark.parametrize("tanh", [False, True])
def test_folders_of_ours_and_of_peft(arch: str, layers: int, tanh: bool, tmp_path: Path) -> None:
    import peft

    method = graft.LlamaAdapter(length=P, layers=layers, gate="per_layer", tanh=tanh)
    model, data = adapted(arch, method, peft_compat=True), data_of(arch)
    seen = data["attention_mask"].bool()
    expected = model(**data).logits[seen]
    graft.save(model, "a", tmp_path / "ours", form="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own use of what transformers deprecates
        other = peft.PeftModel.from_pretrained(lively(arch), tmp_path / "ours").eval()
        close(other(**data).logits[seen], expected)
        peft_of(arch, model.adapters["a"], layers).save_pretrained(tmp_path / "theirs")
    for folder, kind in (("ours", method), ("theirs", graft.LlamaAdapter(length=P, layers=layers, head=False, **PEFT))):
        again = lively(arch)
        assert graft.load(again, tmp_path / folder, "a").method == kind
        close(again(**data).logits[seen], expected)


def test_what_pefts_form_cannot_hold_has_our_own(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], bool, str]] = [
        ("llama", {"layers": 2}, False, "gates differ by head"),
        ("llama", {"layers": (0,), **PEFT}, False, "in the top layers, these in others"),
        ("gpt2", {"layers": 2, **PEFT}, False, "only peft_compat=True has that form"),
        ("llama_cls", {"layers": 2, **PEFT}, False, "trains no module whole, such as score"),
        ("qwen3", {"layers": 2, **PEFT}, False, "peft has no adaption prompts for Qwen3ForCausalLM"),
    ]
    for i, (arch, settings, compat, reason) in enumerate(cases):
        model, data = adapted(arch, graft.LlamaAdapter(length=P, **settings), peft_compat=compat), data_of(arch)
        with pytest.raises(graft.AdapterFileError, match=reason):
            graft.save(model, "a", tmp_path / f"{i}", form="peft")
        folder = graft.save(model, "a", tmp_path / f"{i}")
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "GRAFT_ADAPTION_PROMPT"
        again = lively(arch)
        graft.load(again, folder, "a")
        close(again(**data).logits, model(**data).logits)
    # Gates that agree over the heads have a place, for example all zeros before training.
    model = lively("llama")
    graft.attach(model, graft.LlamaAdapter(length=P, layers=2), "a")
    folder = graft.save(model, "a", tmp_path / "start", form="peft")
    assert graft.load(lively("llama"), folder, "a").at("model.layers.0.self_attn").gate.shape == (4,)


def test_a_config_of_peft_can_be_attached() -> None:
    import peft

    model = tiny("llama")
    adapter = graft.attach(model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=1))
    assert adapter.method == graft.LlamaAdapter(length=P, layers=1, head=False, **PEFT) and adapter.peft_compat
    for bad in ({"adapter_len": P}, {"adapter_len": P, "adapter_layers": 0}):
        with pytest.raises(graft.ConfigError, match="adapter_layers"):
            graft.attach(model, peft.AdaptionPromptConfig(**bad), "b")


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = adapted("llama", graft.LlamaAdapter(length=P, layers=1, **PEFT))
    graft.save(model, "a", tmp_path / "a", form="peft")
    (tmp_path / "a" / "graft.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"target_modules": "mlp"}, "target_modules = 'mlp', and it can only be 'self_attn'"),
        ({"adapter_layers": 3}, "layers=3, but LlamaForCausalLM has 2"),
        ({"adapter_layers": 2}, "tensors are missing, the first is base_model.model.model.layers.0"),
        ({"adapter_len": 4}, r"has shape \(1, 3, 32\), this model and config need \(1, 4, 32\)"),
        ({"adapter_heads": 4}, "field 'adapter_heads' = 4 is not supported"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(graft.AdapterFileError, match=message):
            graft.load(tiny("llama"), tmp_path / "a", "b")
    path.write_text(json.dumps(good))
    with pytest.raises(graft.AdapterFileError, match="peft has no adaption prompts for BertForSequenceClassification"):
        graft.load(tiny("bert"), tmp_path / "a", "b")
