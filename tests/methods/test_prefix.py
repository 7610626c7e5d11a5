"""Prefix tuning against the gated form of its formula, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from twins import adapted, close, copy_into, data_of, far, lively, peft_twin

import graft
from graft.method import from_dict
from tiny import EOS, PAD, tiny

P = 3


def gated(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """(1 - m) Attn(q, K, V) + m Attn(q, PK, PV), m the softmax mass on the prefix; two attentions, never one."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    prefix_k, prefix_v = (rows.transpose(0, 1).repeat_interleave(groups, 0) for rows in module.test_prefix)
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if mask is None else scores + mask
    front = q @ prefix_k.transpose(-1, -2) * scale
    mass = torch.sigmoid(front.logsumexp(-1) - scores.logsumexp(-1))[..., None]
    out = (1 - mass) * (scores.softmax(-1) @ v) + mass * (front.softmax(-1) @ prefix_v)
    return out.transpose(1, 2), None


@pytest.mark.parametrize(("arch", "heads"), [("llama", 2), ("gpt2", 4), ("bert", 4)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gated_form(arch: str, heads: int, attention: str) -> None:
    method = graft.PrefixTuning(length=P, head=False)
    model, data = adapted(arch, method, attn_implementation=attention), data_of(arch)
    table = model.adapters["a"].shared.table.view(P, 4, heads, 8)
    AttentionInterface.register("test_gated", gated)
    AttentionMaskInterface.register("test_gated", eager_mask)
    hand = lively(arch, attn_implementation="test_gated")
    for site, layer in ((site, site.layer) for site in model.adapters["a"].sites.values()):
        hand.get_submodule(site.path).test_prefix = table[:, 2 * layer], table[:, 2 * layer + 1]
    positions = torch.arange(P, P + data["input_ids"].shape[1])[None]
    expected = hand(**data, position_ids=positions).logits
    actual = model(**data).logits
    if expected.dim() == 3:
        seen = data["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    else:
        far(actual, lively(arch)(**data).logits)
    close(actual, expected)


def test_zero_rows_are_not_the_base() -> None:
    """Zero keys still take softmax mass."""
    model, data = adapted("llama", graft.PrefixTuning(length=P)), data_of("llama")
    torch.nn.init.zeros_(model.adapters["a"].shared.table)
    far(model(**data).logits, lively("llama")(**data).logits)
    assert not graft.PrefixTuning.starts_equal


def test_the_mlp_is_dropped_when_training_is_over() -> None:
    """While training: P' (P, D) and Linear(D, k), tanh, Linear(k, 2 L K d); afterwards the (P, 2 L K d) result."""
    method = graft.PrefixTuning(length=P, hidden=6)
    model, data = adapted("llama", method), data_of("llama")
    adapter = model.adapters["a"]
    assert adapter.trainable == P * 32 + (32 * 6 + 6) + (6 * 64 + 64) and adapter.saved == P * 64
    shared = adapter.shared
    by_hand = torch.tanh(shared.embedding.weight @ shared.inner.weight.T + shared.inner.bias)
    by_hand = by_hand @ shared.outer.weight.T + shared.outer.bias
    close(shared.expanded(), by_hand)
    before = model(**data).logits
    method.finish(adapter.shared)
    close(model(**data).logits, before)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(P, 64)] and adapter.trainable == adapter.saved
    plain = adapted("llama", graft.PrefixTuning(length=P))
    plain.adapters["a"].shared.table.data.copy_(by_hand)
    close(plain(**data).logits, before)


def test_where() -> None:
    """The decoder's self-attention alone, or any of the three places of an encoder-decoder."""
    for where, words in (
        (None, {"decoder"}),
        ("encoder", {"encoder"}),
        (("encoder", "decoder", "cross"), {"encoder", "decoder", "cross"}),
    ):
        adapter = graft.attach(tiny("bart"), graft.PrefixTuning(length=P, where=where))
        found = {"cross" if "encoder_attn" in path else path.split(".")[1] for path in adapter.sites}
        assert found == words and adapter.trainable == len(words) * 2 * 2 * P * 32
    with pytest.raises(graft.SiteError, match="encoder-decoders"):
        graft.attach(tiny("llama"), graft.PrefixTuning(where="encoder"))
    with pytest.raises(graft.SiteError, match="attention interface"):
        graft.attach(tiny("bloom"), graft.PrefixTuning())


def test_layers_and_errors() -> None:
    adapter = graft.attach(tiny("llama"), graft.PrefixTuning(length=P, layers=1))
    assert [site.layer for site in adapter.sites.values()] == [1] and adapter.trainable == P * 2 * 16
    for settings in ({"length": 0}, {"hidden": 0}, {"where": "middle"}):
        with pytest.raises(graft.ConfigError, match="PrefixTuning"):
            graft.PrefixTuning(**settings)  # type: ignore[arg-type]
    method = graft.PrefixTuning(length=3, hidden=4, where=("cross",))
    assert from_dict(method.to_dict()) == method


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mt5", "bart"])
def test_generate_equals_teacher_forcing(arch: str) -> None:
    """Each generated token is the argmax of one forward over the whole text, with a cache and without."""
    model, data = adapted(arch, graft.PrefixTuning(length=P)), data_of(arch, rows=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    for cache in (True, False):
        out = model.generate(**inputs, **options, use_cache=cache)
        if arch in ("mt5", "bart"):
            logits = model(**inputs, decoder_input_ids=out[:, :-1]).logits
        else:
            logits = model(input_ids=out[:, :-1]).logits
        logits[..., EOS] = -torch.inf
        assert out[0, -6:].tolist() == logits[0, -6:].argmax(-1).tolist()


def test_left_padding_changes_nothing() -> None:
    model, data = adapted("llama", graft.PrefixTuning(length=P)), data_of("llama", rows=1)
    plain = model(**data).logits
    ids = torch.cat([torch.full((1, 2), PAD), data["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), data["attention_mask"]], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    close(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 2:], plain)


# ------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize(
    ("arch", "task", "options"),
    [
        ("llama", "CAUSAL_LM", {}),
        ("gpt2", "CAUSAL_LM", {}),
        ("bert", "SEQ_CLS", {}),
        ("bart", "SEQ_2_SEQ_LM", {}),
        ("bart", "SEQ_2_SEQ_LM", {"encoder_layers": 3, "decoder_layers": 3}),
        ("mt5", "SEQ_2_SEQ_LM", {}),
        ("mt5", "SEQ_2_SEQ_LM", {"num_layers": 4, "num_decoder_layers": 4}),
    ],
)
def test_equals_peft(arch: str, task: str, options: dict[str, Any]) -> None:
    """Encoder-decoders with peft's aliasing: decoder layer l reads slots (4l mod 2L, 4l+1 mod 2L)."""
    import peft

    method = graft.PrefixTuning(length=P, head=False)
    model, data = adapted(arch, method, peft_compat=True, **options), data_of(arch)
    other = peft_twin(arch, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P), **options)
    copy_into(other.prompt_encoder["default"].embedding.weight, model.adapters["a"].shared.table)
    actual, expected = model(**data).logits, other(**data).logits
    far(actual, lively(arch, **options)(**data).logits)
    if arch in ("llama", "gpt2"):
        seen = data["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    close(actual, expected)


def test_without_compat_each_layer_has_rows_of_its_own() -> None:
    for compat, dead in ((False, []), (True, [1])):
        model, data = adapted("bart", graft.PrefixTuning(length=P), peft_compat=compat), data_of("bart")
        model(**data).loss.backward()
        grad_PLK = model.adapters["a"].shared.table.grad.view(P, 2, 64)
        assert [layer for layer in range(2) if not grad_PLK[:, layer].any()] == dead
