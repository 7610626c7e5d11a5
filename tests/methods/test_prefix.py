"""Prefix tuning against the gated form of its formula, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
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


@pytest.mark.parametrize(("arch", "options"), [("llama", {}), ("mistral", {"sliding_window": 4})])
def test_left_padding_changes_nothing(arch: str, options: dict[str, Any]) -> None:
    model, data = adapted(arch, graft.PrefixTuning(length=P), **options), data_of(arch, rows=1)
    plain = model(**data).logits
    ids = torch.cat([torch.full((1, 2), PAD), data["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), data["attention_mask"]], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    close(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 2:], plain)


# ------------------------------------------------------------------------------------------------ words and dropout

WORDS = [7, 8, 10, 11]


class Words:
    """A tokenizer of one text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": {"four words": WORDS, "": []}[text]}


def of_words(**settings: Any) -> graft.PrefixTuning:
    return graft.PrefixTuning(init="text", text="four words", tokenizer=Words(), **settings)


WORDED = ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "opt", "mt5", "bart"]


@pytest.mark.parametrize(("arch", "options"), [*((arch, {}) for arch in WORDED), ("mistral", {"sliding_window": 3})])
def test_rows_of_words_are_the_words_in_the_cache(arch: str, options: dict[str, Any]) -> None:
    """The start computes what the base computes with these words in front: their keys and values, read once."""
    model, hand, data = lively(arch, **options), lively(arch, **options), data_of(arch, rows=1)
    both, ids = arch in ("mt5", "bart"), data["input_ids"]
    graft.attach(model, of_words(length=4, head=False), "a")
    words = torch.tensor([WORDS])
    if both:
        # The decoder has read the words beside an encoder that read them too; then it goes on beside the batch's.
        start, read = data["labels"].clamp(min=0), hand(input_ids=words, decoder_input_ids=words).past_key_values
        cache = EncoderDecoderCache(read.self_attention_cache, DynamicCache())
        expected = hand(input_ids=ids, decoder_input_ids=start, past_key_values=cache).logits
        actual = model(input_ids=ids, decoder_input_ids=start).logits
    else:
        expected, actual = hand(torch.cat([words, ids], 1)).logits[:, 4:], model(ids).logits
    close(actual, expected)
    far(actual, hand(input_ids=ids, **({"decoder_input_ids": start} if both else {})).logits)


def test_rows_of_words_in_encoders() -> None:
    """BERT's keys and values of the words by its own linears; BART's encoder and cross-attention have theirs."""
    model, hand = lively("bert"), lively("bert")
    shared = graft.attach(model, of_words(length=4), "a").shared
    hidden = hand.bert(torch.tensor([WORDS]), output_hidden_states=True).hidden_states
    for layer, block in enumerate(hand.bert.encoder.layer):
        own = block.attention.self
        rows = torch.cat([own.key(hidden[layer][0]), own.value(hidden[layer][0])], -1)
        close(shared.rows(f"bert.encoder.layer.{layer}.attention.self"), rows)
    bart = lively("bart")
    found = graft.attach(bart, of_words(length=4, where=("encoder", "cross")), "a").shared
    states = lively("bart").model(torch.tensor([WORDS]), decoder_input_ids=torch.tensor([WORDS]))
    cross = bart.model.decoder.layers[1].encoder_attn
    rows = torch.cat(
        [cross.k_proj(states.encoder_last_hidden_state[0]), cross.v_proj(states.encoder_last_hidden_state[0])], -1
    )
    close(found.rows("model.decoder.layers.1.encoder_attn"), rows)


def test_words_are_repeated_or_cut_and_read_by_the_base_alone() -> None:
    model = adapted("llama", graft.LoRA(rank=2))  # acts, and must not in what is read
    graft.attach(model, graft.PrefixTuning(length=2), "p")
    graft.use(model, ("a", "p"))
    model.train()
    kind = model.config._attn_implementation
    for length, words in ((3, WORDS[:3]), (6, [*WORDS, *WORDS[:2]])):
        table = graft.attach(model, of_words(length=length), f"w{length}").shared.table
        cache = lively("llama")(torch.tensor([words])).past_key_values
        for layer in range(2):
            pair = (cache.layers[layer].keys, cache.layers[layer].values)
            close(table.split(32, -1)[layer], torch.cat([x[0].transpose(0, 1).flatten(1) for x in pair], -1))
    assert model.training and not model.adapters.asleep
    assert model.config._attn_implementation == kind


def test_dropout_is_drawn_for_each_row_in_training_alone() -> None:
    method = graft.PrefixTuning(length=P, dropout=0.5)
    model, data = adapted("llama", method), data_of("llama", rows=1)
    same = {key: value.repeat(4, 1) for key, value in data.items()}
    plain = adapted("llama", graft.PrefixTuning(length=P))
    close(model(**data).logits, plain(**data).logits)
    model.adapters.train()
    logits = model(**same).logits
    assert len(logits[:, -1].unique(dim=0)) == 4
    model.adapters["a"].shared.table.data.zero_()  # what is dropped is only ever scaled or zero
    close(model(**same).logits[0], model(**same).logits[1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"init": "words"}, "init is one of random, text"),
        ({"init": "text"}, "go together"),
        ({"text": "four words"}, "go together"),
        ({"init": "text", "text": "four words", "hidden": 4}, "leave hidden out"),
        ({"init": "text", "text": "four words"}, "needs tokenizer"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_starts(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(graft.ConfigError, match=match):
        graft.attach(tiny("llama"), graft.PrefixTuning(**settings))


def test_words_have_no_aliased_form() -> None:
    with pytest.raises(graft.SiteError, match="rows of its own"):
        graft.attach(tiny("bart"), of_words(), peft_compat=True)
    method = of_words(length=3)
    assert method.to_dict() == {"method": "prefix_tuning", "length": 3, "init": "text", "text": "four words"}


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


@pytest.mark.parametrize(
    ("arch", "attention"), [("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa")]
)
@pytest.mark.parametrize("window", [2, 4, 10])
@torch.no_grad()
def test_a_window_reaches_the_rows_as_in_peft(arch: str, window: int, attention: str) -> None:
    """As words in front of the 9 tokens: in one forward, token by token behind a cache, and in a packed row."""
    import peft

    options = {"sliding_window": window, "attn_implementation": attention}
    model, ids = adapted(arch, graft.PrefixTuning(length=P), **options), data_of(arch, rows=1)["input_ids"]
    other = peft_twin(arch, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P), **options)
    copy_into(other.prompt_encoder["default"].embedding.weight, model.adapters["a"].shared.table)
    expected = other(input_ids=ids).logits
    close(model(input_ids=ids).logits, expected)
    far(adapted(arch, graft.PrefixTuning(length=P), attn_implementation=attention)(input_ids=ids).logits, expected)
    out = model(input_ids=ids[:, :3], use_cache=True)
    steps = [out.logits]
    for token in ids[:, 3:].split(1, 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    close(torch.cat(steps, 1), expected)
    ends = torch.cat([torch.arange(9), torch.arange(9)])[None]
    packed = model(input_ids=ids.repeat(1, 2), position_ids=ends, use_cache=False).logits
    close(packed, expected.repeat(1, 2, 1))


def test_without_compat_each_layer_has_rows_of_its_own() -> None:
    for compat, dead in ((False, []), (True, [1])):
        model, data = adapted("bart", graft.PrefixTuning(length=P), peft_compat=compat), data_of("bart")
        model(**data).loss.backward()
        grad_PLK = model.adapters["a"].shared.table.grad.view(P, 2, 64)
        assert [layer for layer in range(2) if not grad_PLK[:, layer].any()] == dead
