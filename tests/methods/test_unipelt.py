"""UniPELT's three gates against models rewritten by hand, and what they make of padding, packing and caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bottleneck import Then, mlp, rewritten
from test_counts import meta
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import from_dict
from tiny import checkpointed, tiny

P = 3
ENDS = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense", "t5": ".DenseReluDense.wo"}


def alone(part: str, **settings: Any) -> graft.UniPELT:
    return graft.UniPELT(submodules=(part,), length=P, rank=4, size=5, hidden=None, head=False, **settings)


def gate(delta: Any, x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1, G): the mean of sigmoid(w x_t + b) over the tokens that the mask shows."""
    each = torch.sigmoid(x @ delta.gate.weight.T + delta.gate.bias)
    return torch.stack([row[seen.bool()].mean(0) for row, seen in zip(each, mask, strict=True)])[:, None]


def decoded(data: dict[str, Tensor]) -> Tensor:
    """The mask of a decoder that reads the labels, moved by one."""
    return (data["labels"] != -100).long()


def mask_at(path: str, data: dict[str, Tensor]) -> Tensor:
    """The mask of what enters a linear: in T5's cross-attention values come from the encoder."""
    encoded = "labels" not in data or path.startswith("encoder") or path.endswith("EncDecAttention.v")
    return data["attention_mask"] if encoded else decoded(data)


def real(logits: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The logits that are of no padding."""
    if logits.dim() == 2:
        return logits
    return logits[(decoded(data) if "labels" in data else data["attention_mask"]).bool()]


def holds(model: Any, hand: Any, data: dict[str, Tensor]) -> None:
    close(real(model(**data).logits, data), real(hand(**data).logits, data))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_lora_has_a_gate_for_each_linear(arch: str) -> None:
    """W x + G (alpha / r) B A x; in GPT-2's fused qkv a gate for the queries and one for the values."""
    model, data, hand = adapted(arch, alone("lora", alpha=6)), data_of(arch), lively(arch)
    for site, delta in model.adapters["a"].items():
        pair, mask = delta.inner, mask_at(site.path, data)

        def gated(x: Tensor, y: Tensor, delta: Any = delta, pair: Any = pair, mask: Tensor = mask) -> Tensor:
            if not pair.rows:
                return y + gate(delta, x, mask) * 1.5 * (x @ pair.A.T @ pair.B.T)
            one, two = (
                gate(delta, x, mask)[..., i : i + 1] * 1.5 * (x @ A.T @ B.T)
                for i, (A, B) in enumerate(zip(pair.A.split(4), pair.B.split(32), strict=True))
            )
            return y + torch.cat([one, torch.zeros_like(one), two], -1)

        rewritten(hand, site.path, gated)
        assert delta.gate.weight.shape == ((2 if arch == "gpt2" else 1), 32)
    far(model(**data).logits, lively(arch)(**data).logits)
    holds(model, hand, data)


@pytest.mark.parametrize("arch", sorted(ENDS))
def test_bottleneck_gates_what_its_own_input_says(arch: str) -> None:
    """h2 = v + G Up relu(Down z): z = v = h1 + u in pre-norm models, z = LN2(v) in BERT."""
    model, data, hand = adapted(arch, alone("bottleneck")), data_of(arch), lively(arch)
    for site, delta in model.adapters["a"].items():
        mask = mask_at(site.path, data)

        def of(z: Tensor, delta: Any = delta, mask: Tensor = mask) -> Tensor:
            return gate(delta, z, mask) * mlp(delta.inner, z, F.relu)

        if arch == "bert":
            path = site.path.replace("dense", "LayerNorm")
            norm = hand.get_submodule(path)
            rewritten(hand, path, lambda v, z, of=of, norm=norm: norm(v + of(z)))
        else:
            block = site.path.removesuffix(ENDS[arch]).rstrip(".")
            rewritten(hand, block, lambda x, v, of=of: v + of(v))
    far(model(**data).logits, lively(arch)(**data).logits)
    holds(model, hand, data)


def prefixed(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """softmax(q [G PK; K]^T / sqrt(d) + mask) [G PV; V], the gate from what the module was called with."""
    groups, scale = q.shape[1] // k.shape[1], options.get("scaling", q.shape[-1] ** -0.5)
    g = gate(module.test_delta, module.test_input, module.test_mask)[..., None]
    pk, pv = (g * rows.transpose(0, 1) for rows in module.test_rows)
    k, v = (torch.cat(pair, 2).repeat_interleave(groups, 1) for pair in ((pk, k), (pv, v)))
    scores = q @ k.transpose(-1, -2) * scale
    scores[..., P:] += 0 if mask is None else mask
    return (scores.softmax(-1) @ v).transpose(1, 2), None


class Noted(Then):
    """Keeps what a module is called with."""

    def __init__(self, module: Any, target: Any) -> None:
        super().__init__(module, None)
        self.target = [target]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.target[0].test_input = args[0] if args else kwargs["hidden_states"]
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(("arch", "heads"), [("llama", 2), ("gpt2", 4), ("bert", 4)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_has_gated_keys_and_values(arch: str, heads: int, attention: str) -> None:
    model, data = adapted(arch, alone("prefix_tuning"), attn_implementation=attention), data_of(arch)
    table = model.adapters["a"].shared.table.view(P, 4, heads, 8)
    AttentionInterface.register("test_prefixed", prefixed)
    AttentionMaskInterface.register("test_prefixed", eager_mask)
    hand = lively(arch, attn_implementation="test_prefixed")
    for site, delta in model.adapters["a"].items():
        module = hand.get_submodule(site.path)
        module.__dict__["test_delta"], module.test_mask = delta, data["attention_mask"]
        module.test_rows = table[:, 2 * site.layer], table[:, 2 * site.layer + 1]
        parent, _, name = site.path.rpartition(".")
        setattr(hand.get_submodule(parent), name, Noted(module, module))
    positions = torch.arange(P, P + data["input_ids"].shape[1])[None]
    far(real(model(**data).logits, data), real(lively(arch)(**data).logits, data))
    close(real(model(**data).logits, data), real(hand(**data, position_ids=positions).logits, data))


@pytest.mark.parametrize(("arch", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right")])
@pytest.mark.parametrize("pad", [0, 7])
def test_padding_does_not_count(arch: str, side: str, pad: int) -> None:
    model, data = adapted(arch, graft.UniPELT(length=P, rank=4, size=5, hidden=None, head=False)), data_of(arch)
    row = {key: value[:1, :6] for key, value in data.items()}
    padding = (4, 0) if side == "left" else (0, 4)
    wide = {key: F.pad(value, padding, value=pad if key == "input_ids" else 0) for key, value in row.items()}
    if arch == "llama":
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    close(real(model(**wide).logits, wide), real(model(**row).logits, row))


def test_without_a_mask_every_token_counts() -> None:
    model, data = adapted("llama", alone("bottleneck")), data_of("llama")
    full = model(input_ids=data["input_ids"]).logits
    close(full, model(data["input_ids"], torch.ones_like(data["attention_mask"])).logits)
    far(full[2, :7], model(**data).logits[2, :7])


def test_labels_say_what_the_decoder_pads() -> None:
    model, data = adapted("t5", graft.UniPELT(length=P, rank=4, size=5, hidden=None)), data_of("t5")
    data["labels"][0, 4:] = -100
    expected = model(**data).logits[0, :4]
    short = {"input_ids": data["input_ids"][:1], "labels": data["labels"][:1, :4]}
    close(model(**short, attention_mask=data["attention_mask"][:1]).logits[0], expected)
    asked = model._shift_right(data["labels"])  # a decoder's input says nothing of padding
    plain = {key: value for key, value in data.items() if key != "labels"}
    far(model(**plain, decoder_input_ids=asked).logits[0, :4], expected)
    mask = (data["labels"] != -100).long()
    close(model(**plain, decoder_input_ids=asked, decoder_attention_mask=mask).logits[0, :4], expected)


def test_a_part_of_the_model_alone_has_its_own_masks() -> None:
    """BART without its head takes no labels: those of the forward before are not its."""
    model, data = adapted("bart", alone("bottleneck")), data_of("bart")
    data["labels"][0, 4:] = -100
    asked = model.prepare_decoder_input_ids_from_labels(data["labels"])
    plain = {key: value for key, value in data.items() if key != "labels"} | {"decoder_input_ids": asked}
    expected = model.model(**plain)[0]
    with_labels = model(**data, output_hidden_states=True).decoder_hidden_states[-1]
    far(with_labels[0, :4], expected[0, :4])
    close(model.model(**plain)[0], expected)
    mask = (data["labels"] != -100).long()
    close(model.model(**plain, decoder_attention_mask=mask)[0][mask.bool()], with_labels[mask.bool()])


def test_a_mask_of_another_kind_is_refused() -> None:
    model, data = adapted("llama", alone("lora")), data_of("llama")
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(graft.RouteError, match=r"mask of padding as \(rows, tokens\), not one of \(3, 1, 9, 9\)"):
        model(data["input_ids"], attention_mask=mask)
    graft.attach(model, graft.LoRA(rank=2), "b")
    graft.use(model, "b")
    model(data["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_texts_of_one_adapter_have_gates_of_their_own(attention: str) -> None:
    """Both as the only entry of the batch and beside others."""
    method = graft.UniPELT(length=P, rank=4, size=5, hidden=None)
    model = adapted("llama", method, attn_implementation=attention)
    perturb(graft.attach(model, graft.PrefixTuning(length=2), "p"), 2)
    ids = data_of("llama")["input_ids"]
    perturb(graft.attach(model, graft.LoRA(rank=2), "l"), 3)
    for entries in (["a"] * 3, ["a", None, "a"], ["a", ("p", "a"), ("p", "a")], [("l", "a"), "a", ("l", "a")]):
        texts = [ids[0, :9], ids[1, :5], ids[2, :3]]
        positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
        with graft.route(model, segments=[(e, len(text)) for e, text in zip(entries, texts, strict=True)]):
            packed = model(torch.cat(texts)[None], position_ids=positions, use_cache=False).logits[0]
        for entry, text, found in zip(entries, texts, packed.split([9, 5, 3]), strict=True):
            with graft.route(model, [entry]):
                close(found, model(text[None]).logits[0])


def test_a_step_from_a_cache_gates_by_its_own_token() -> None:
    """Each step has the mean over the tokens that it brings; a row without a mask, and one padded on the left."""
    model, hand = adapted("llama", alone("lora")), lively("llama")
    ids = data_of("llama")["input_ids"][:1]
    for site, delta in model.adapters["a"].items():

        def gated(x: Tensor, y: Tensor, delta: Any = delta) -> Tensor:
            return y + gate(delta, x, torch.ones(x.shape[:2])) * 0.5 * (x @ delta.inner.A.T @ delta.inner.B.T)

        rewritten(hand, site.path, gated)
    steps = []
    for each in (model, hand):
        cache = each(ids[:, :6], use_cache=True).past_key_values
        steps.append(each(ids[:, 6:7], past_key_values=cache).logits[0, 0])
    close(*steps)
    far(steps[0], model(ids[:, :7]).logits[0, 6])
    wide, mask = F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))
    options = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, :8], "use_cache": True}
    cache = model(wide[:, :8], attention_mask=mask[:, :8], **options).past_key_values
    options = {"position_ids": torch.tensor([[6]]), "past_key_values": cache}
    close(model(wide[:, 8:9], attention_mask=mask[:, :9], **options).logits[0, 0], steps[0])


def test_checkpointing_finds_the_mask_again() -> None:
    """The backward of one batch may run after the forward of another."""
    grads = []
    for on in (False, True):
        model, data = adapted("llama", graft.UniPELT(length=P, rank=4, size=5, hidden=None)), data_of("llama")
        model.train()
        if on:
            checkpointed(model)
        loss = real(model(**data).logits, data).square().sum()
        model(input_ids=data["input_ids"], attention_mask=torch.ones_like(data["attention_mask"]))
        loss.backward()
        grads.append([p.grad for p in model.adapters.parameters()])
    for one, two in zip(*grads, strict=True):
        close(one, two)


def test_gradients_of_gates_are_those_of_each_row_alone() -> None:
    """In fp64: a gate's gradient is a sum of large terms that cancels."""
    model = adapted("mt5", graft.UniPELT(length=P, rank=4, size=5, hidden=6)).double()
    data = data_of("mt5")
    model(**data).logits.square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.adapters.named_parameters()}
    model.zero_grad()
    for i in range(3):
        model(**{key: value[i : i + 1] for key, value in data.items()}).logits.square().sum().backward()
    for name, p in model.adapters.named_parameters():
        close(together[name], p.grad, 1e-12)


def test_counts() -> None:
    """BERT base, 12 layers: pairs on q and v, 10 prefix rows, a bottleneck of 768 / 16, and four gates of 768 + 1."""
    bert = meta("bert-base")
    adapter = graft.attach(bert, graft.UniPELT(head=False))
    lora, prefix, bottleneck = 12 * 2 * 8 * 2 * 768, 12 * 10 * 2 * 768, 12 * (2 * 48 * 768 + 768 + 48)
    assert adapter.saved == lora + prefix + bottleneck + 12 * 4 * 769 == 1_410_672
    mlp_values = 10 * 768 + (768 * 512 + 512) + (512 * 24 * 768 + 24 * 768)
    assert adapter.trainable == adapter.saved - prefix + mlp_values
    assert [leaf.name.rpartition("/")[2] for leaf in adapter.leaves] == ["lora", "prefix_tuning", "bottleneck"]
    t5 = meta("t5-base")
    pair = graft.attach(t5, graft.UniPELT(submodules=("bottleneck", "prefix_tuning"), hidden=None))
    assert pair.saved == 24 * (2 * 48 * 768 + 768 + 48 + 769) + 36 * (10 * 2 * 768 + 769)


def test_start() -> None:
    """Gates from N(0, 0.02), half open; LoRA alone starts at the base."""
    torch.manual_seed(0)
    model = tiny("llama", hidden_size=256)
    graft.attach(model, graft.UniPELT(hidden=8), "a")
    gates = torch.cat([p.flatten() for name, p in model.adapters.named_parameters() if name.endswith("gate.weight")])
    assert abs(gates.std().item() - 0.02) < 1e-3 and abs(gates.mean().item()) < 1e-3
    assert all(not p.any() for name, p in model.adapters.named_parameters() if name.endswith("gate.bias"))
    assert alone("lora").starts_equal and not graft.UniPELT().starts_equal


def test_settings_are_refused() -> None:
    for settings, match in (
        ({"layers": 2}, "not for a recipe"),
        ({"modules_to_save": ("norm",)}, "not for a recipe"),
        ({"reduction": 0}, "at least 1, not 0"),
        ({"size": 0}, "at least 1, not 16, 0"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"length": 0}, "length and hidden must be at least 1"),
        ({"submodules": ("lora", "adapter")}, "submodules names 'adapter'"),
        ({"submodules": ("lora", "lora")}, "once, and at least one"),
        ({"submodules": ()}, "once, and at least one"),
    ):
        with pytest.raises(graft.ConfigError, match=match):
            graft.UniPELT(**settings)


def test_merge_and_dial_are_refused() -> None:
    model = adapted("llama", graft.UniPELT(length=P, rank=4, size=5, hidden=None))
    for name in ("a", "a/lora"):
        with pytest.raises(graft.MergeError, match="unipelt"):
            graft.merge(model, name)
    with pytest.raises(graft.RouteError, match="has no dial"):
        model.adapters["a"].scale = 0.5


def test_json_form() -> None:
    method = graft.UniPELT(rank=4, submodules="lora")
    assert method.submodules == ("lora",)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert from_dict({"method": "unipelt"}) == graft.UniPELT()


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_a_folder_holds_each_sub_module(arch: str, tmp_path: Path) -> None:
    method = graft.UniPELT(length=P, rank=4, hidden=6)
    model = adapted(arch, method)
    graft.save(model, "a", tmp_path / "a")
    back = lively(arch)
    loaded = graft.load(back, tmp_path / "a", "b")
    assert loaded.method == method and loaded.saved == model.adapters["a"].saved
    graft.use(back, "b")
    data = data_of(arch)
    close(model(**data).logits, back(**data).logits)
    graft.use(model, "a/lora")
    single = lively(arch)
    graft.load(single, tmp_path / "a" / "lora", "c")
    graft.use(single, "c")
    close(single(**data).logits, model(**data).logits)
    config = json.loads((tmp_path / "a" / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "UNIPELT"  # which peft does not have: it refuses what it would compute otherwise


def test_nothing_is_left_after_detach() -> None:
    model, data = lively("gpt2"), data_of("gpt2")
    before = model(**data).logits
    graft.attach(model, graft.PrefixTuning(length=2), "p")
    graft.attach(model, graft.UniPELT(hidden=None), "a")
    graft.use(model, "a")
    model(**data)
    graft.detach(model, "a")
    assert not any(key.endswith(":input") for key in model.adapters.handles)
    graft.detach(model)
    assert torch.equal(model(**data).logits, before)
