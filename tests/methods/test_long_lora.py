"""LongLoRA: segments against their mask in dense algebra and the paper's code, no leak, trained copies, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_counts import meta, trainable
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from twins import close, far, lively

import graft
from examples import perturb
from graft import attend
from graft.method import CopyDelta, from_dict
from tiny import PAD, tiny

G = 4
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SEGMENTS = graft.LongLoRA(rank=2, group=G, embedding=False, norms=False)


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def training(arch: str, method: Any, **overrides: Any) -> Any:
    """A tiny model in training mode with one adapter "a" that has moved."""
    overrides |= QUIET if arch == "gpt2" else {}
    model = lively(arch, **overrides).train()
    perturb(graft.attach(model, method, "a"), 1, 0.3)
    return model


def by_mask(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, None]:
    """j <= i and floor((i + o) / G) == floor((j + o) / G), one (T, T) mask for each head; a prefix is seen by all."""
    heads, tokens = q.shape[1], q.shape[2]
    rows_KPD = getattr(module, "test_prefix", (k[0, :, :0], v[0, :, :0]))
    front = rows_KPD[0].shape[1]
    k, v = (torch.cat([rows.expand(len(x), -1, -1, -1), x], 2) for rows, x in zip(rows_KPD, (k, v), strict=True))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    start_BT = module.test_start if module.test_start is not None else torch.zeros(1, tokens, dtype=torch.long)
    place_BT = torch.arange(tokens) - start_BT
    scores = q @ k.transpose(-1, -2) * options["scaling"] + nn.functional.pad(mask[..., :tokens], (front, 0))
    for head in range(heads):
        segment_BT = (place_BT + (0 if head < heads // 2 else G // 2)) // G
        apart_BTT = segment_BT[:, :, None] != segment_BT[:, None]
        apart_BTT = nn.functional.pad(apart_BTT & ~torch.eye(tokens, dtype=torch.bool), (front, 0))
        scores[:, head] = scores[:, head].masked_fill(apart_BTT, -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def mask_model(arch: str, adapter: Any, start_BT: Tensor | None = None, **overrides: Any) -> Any:
    """The model without segments, whose attention is the mask form; the same LoRA stands on it."""
    AttentionInterface.register("test_by_mask", by_mask)
    AttentionMaskInterface.register("test_by_mask", eager_mask)
    overrides |= QUIET if arch == "gpt2" else {}
    hand = lively(arch, attn_implementation="test_by_mask", **overrides).train()
    for module in hand.modules():
        module.test_start = start_BT
    lora = graft.LoRA(rank=2, targets=SEGMENTS.targets)
    taken = {key: value for key, value in adapter.state_dict().items() if key.endswith((".A", ".B"))}
    graft.attach(hand, lora, "a").load_state_dict(taken)
    return hand


GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "odd heads": ("llama", {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "fused": ("gpt2", {}),
    "normed keys": ("qwen3", {}),
    "fused by heads": ("gpt_neox", {}),
    "windows": ("mistral", {"sliding_window": 3}),
}


@pytest.mark.parametrize("kind", sorted(GROUPED))
@pytest.mark.parametrize("tokens", [16, 13, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_mask_form(kind: str, tokens: int, attention: str) -> None:
    """Logits and gradients; 13 tokens leave a shorter last segment, 3 are less than one."""
    arch, overrides = GROUPED[kind]
    model = training(arch, SEGMENTS, attn_implementation=attention, **overrides)
    hand = mask_model(arch, model.adapters["a"], **overrides)
    ids_BT = ids_of(2, tokens)
    outs = [each(ids_BT).logits for each in (model, hand)]
    close(*outs)
    sum(out.square().mean() for out in outs).backward()
    other = dict(hand.adapters["a"].named_parameters())
    for name, parameter in model.adapters["a"].named_parameters():
        close(parameter.grad, other[name].grad)
    if tokens > G:
        far(outs[0], model.eval()(ids_BT).logits)


def test_segments_are_no_mask_over_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding the model's attention runs on G tokens at most, causal by itself, and covers each head once."""
    model, calls = training("llama", SEGMENTS), []
    run = attend._run

    def noted(inner: Any, call: attend.AttentionCall) -> Any:
        rows, heads, tokens, _ = call.query_BHTD.shape
        calls.append((rows * heads * tokens, tokens, call.key_BKSD.shape[2], call.mask))
        return run(inner, call)

    monkeypatch.setattr(attend, "_run", noted)
    model(ids_of(2, 13))
    assert all(tokens == keys <= G and mask is None for _, tokens, keys, mask in calls)
    assert sum(work for work, *_ in calls) == 2 * (2 * 4 * 13)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_equal_rows_alone(side: str, attention: str) -> None:
    """Segments count from the start of each text, whatever stands in front of it."""
    model = training("llama", SEGMENTS, attn_implementation=attention)
    rows = [ids_of(1, length, length)[0] for length in (13, 9, 4)]
    ids_BT, mask_BT = torch.full((3, 13), PAD), torch.zeros(3, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(13 - len(row), 13) if side == "left" else slice(0, len(row))
        ids_BT[i, at], mask_BT[i, at] = row, 1
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    assert bool(torch.isfinite(out).all())
    out.square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.adapters.parameters())
    for i, row in enumerate(rows):
        close(out[i][mask_BT[i].bool()], model(row[None]).logits[0])
    hand = mask_model("llama", model.adapters["a"], 13 - mask_BT.sum(-1, keepdim=True) if side == "left" else None)
    close(out[mask_BT.bool()], hand(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits[mask_BT.bool()])


@pytest.mark.parametrize("entries", [("a", "a", "a"), ("a", None, "a"), ("b", "a", "b")])
def test_packed_texts_equal_texts_alone(entries: tuple[Any, ...]) -> None:
    model = training("llama", SEGMENTS)
    perturb(graft.attach(model, graft.LongLoRA(rank=2, group=6), "b"), 2, 0.3)
    rows = [ids_of(1, length, length)[0] for length in (7, 5, 9)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with graft.route(model, segments=[(entry, len(row)) for entry, row in zip(entries, rows, strict=True)]):
        packed = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    for entry, row, piece in zip(entries, rows, packed.split([len(row) for row in rows]), strict=True):
        with graft.route(model, [entry]):
            close(piece, model(row[None]).logits[0])


def test_prefix_rows_stay_visible_in_every_segment() -> None:
    """Whatever the order of names, and beside an adapter of another kind in the attention."""
    model, ids_BT = training("llama", SEGMENTS), ids_of(2, 13)
    prefix = perturb(graft.attach(model, graft.PrefixTuning(length=3), "prefix"), 2, 0.3)
    hand = mask_model("llama", model.adapters["a"])
    for i, layer in enumerate(hand.model.layers):
        table_PSKD = prefix.shared.table.view(3, 4, 2, 8)
        layer.self_attn.test_prefix = [table_PSKD[:, 2 * i + part].transpose(0, 1) for part in range(2)]
    expected = hand(ids_BT, position_ids=torch.arange(3, 16)[None]).logits
    for entry in (("prefix", "a"), ("a", "prefix")):
        with graft.route(model, [entry] * 2):
            close(model(ids_BT).logits, expected)
    perturb(graft.attach(model, graft.LlamaAdapter(length=3, layers=2), "prompt"), 3, 0.3)
    outs = []
    for entry in (("prompt", "a"), ("a", "prompt"), ("a",)):
        with graft.route(model, [entry] * 2):
            outs.append(model(ids_BT).logits)
    close(outs[0], outs[1])
    far(outs[0], outs[2])


# ------------------------------------------------------------------------------------------------- leaks


def moved_by(model: Any, ids_BT: Tensor, j: int) -> list[bool]:
    """Which positions change when token j does."""
    other = ids_BT.clone()
    other[:, j] = (other[:, j] - 5 + 40) % 94 + 5
    change = (model(ids_BT).logits - model(other).logits).abs().amax((0, 2))
    return [bool(value > 1e-6) for value in change]


@pytest.mark.parametrize("tokens", [16, 13])
def test_no_token_sees_a_later_one(tokens: int) -> None:
    model, ids_BT = training("llama", SEGMENTS), ids_of(2, tokens)
    for j in range(tokens):
        moved = moved_by(model, ids_BT, j)
        assert moved[j] and not any(moved[:j])


def test_the_rolled_form_leaks_and_equals_the_papers_code() -> None:
    """Roll half of the heads by -G/2, fold groups into rows, attend, unfold, roll back."""

    def papers(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, None]:
        rows, heads, tokens, size = q.shape
        parts = [x.repeat_interleave(heads // x.shape[1], 1).transpose(1, 2).clone() for x in (q, k, v)]
        for x in parts:
            x[:, :, heads // 2 :] = x[:, :, heads // 2 :].roll(-G // 2, 1)
        q, k, v = (x.reshape(rows * tokens // G, G, heads, size).transpose(1, 2) for x in parts)
        scores = q @ k.transpose(-1, -2) * options["scaling"] + torch.full((G, G), -torch.inf).triu(1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, tokens, heads, size)
        out[:, :, heads // 2 :] = out[:, :, heads // 2 :].roll(G // 2, 1)
        return out, None

    rolled = graft.LongLoRA(rank=2, group=G, embedding=False, norms=False, rolled=True)
    model, ids_BT = training("llama", rolled, num_hidden_layers=1), ids_of(2, 16)
    assert [i for i, moved in enumerate(moved_by(model, ids_BT, 15)) if moved] == [*range(G // 2), 15]
    AttentionInterface.register("test_papers", papers)
    AttentionMaskInterface.register("test_papers", eager_mask)
    hand = mask_model("llama", model.adapters["a"], num_hidden_layers=1)
    hand.config._attn_implementation = "test_papers"
    close(model(ids_BT).logits, hand(ids_BT).logits)
    for bad in ({"input_ids": ids_BT[:, :13]}, {"input_ids": ids_BT, "attention_mask": (ids_BT > 20).long()}):
        with pytest.raises(graft.RouteError, match="rolled=True takes whole segments of 4 tokens"):
            model(**bad)


def test_segments_act_in_training_alone() -> None:
    """In eval mode, without gradients and in generate the model is the one with the LoRA alone."""
    model, ids_BT = training("llama", SEGMENTS), ids_of(2, 13)
    plain = lively("llama")
    taken = {key: value for key, value in model.adapters["a"].state_dict().items() if key.endswith((".A", ".B"))}
    graft.attach(plain, graft.LoRA(rank=2, targets=SEGMENTS.targets), "a").load_state_dict(taken)
    expected = plain(ids_BT).logits
    far(model(ids_BT).logits, expected)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            close(model(ids_BT).logits, expected)
        assert model.generate(ids_BT, **options).tolist() == plain.generate(ids_BT, **options).tolist()
    close(model(ids_BT).logits, expected)


@pytest.mark.parametrize("part", ["a", "a/long_lora"])
def test_a_frozen_one_cuts_nothing(part: str) -> None:
    """While another trains it is LoRA; two of one row may then stand together."""
    method = SEGMENTS if part == "a" else graft.Compose(SEGMENTS, graft.IA3())
    model, ids_BT = training("llama", method), ids_of(2, 13)
    graft.attach(model, graft.LoRA(rank=2, targets=("ffn.up",)), "b")
    perturb(graft.attach(model, SEGMENTS, "c"), 2, 0.3)
    with graft.route(model, [("a", "b")] * 2):
        cut = model(ids_BT).logits
        whole = model.eval()(ids_BT).logits
        far(cut, whole)
        model.train().adapters[part].requires_grad_(False)
        out = model(ids_BT).logits
        close(out, whole)
        out.square().mean().backward()
        assert any(bool(p.grad.any()) for p in model.adapters["b"].parameters() if p.grad is not None)
    with graft.route(model, [("c", "b")] * 2):
        far(model(ids_BT).logits, model.eval()(ids_BT).logits)
    model.train()
    logits = []
    for entry in (("a", "c"), ("c", "a")):
        with graft.route(model, [entry] * 2):
            logits.append(model(ids_BT).logits)
    close(logits[0], logits[1])
    with graft.route(model, [("a", "c")] * 2):
        far(logits[0], model.eval()(ids_BT).logits)


def test_divided_positions_hold_for_a_frozen_one_too() -> None:
    method = graft.LongLoRA(rank=2, group=G, embedding=False, norms=False, rope_factor=2.0)
    model, ids_BT = training("llama", method), ids_of(2, 13)
    model.adapters["a"].requires_grad_(False)
    close(model(ids_BT).logits, model.eval()(ids_BT).logits)
    with graft.route(model, [None] * 2):
        far(model(ids_BT).logits, model(ids_BT, position_ids=torch.arange(13)[None] / 2).logits)


def test_a_ratio_is_of_the_batchs_width() -> None:
    """A quarter of 16 tokens is 4; of 13 it is 3.25, and the next even number again 4."""
    one = training("llama", SEGMENTS)
    other = training("llama", graft.LongLoRA(rank=2, embedding=False, norms=False))
    other.adapters["a"].load_state_dict(one.adapters["a"].state_dict())
    for tokens in (16, 13):
        close(one(ids_of(2, tokens)).logits, other(ids_of(2, tokens)).logits)
    far(one(ids_of(2, 24)).logits, other(ids_of(2, 24)).logits)


# ------------------------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_what_trains(arch: str) -> None:
    """LoRA on q, k, v and o, the input embedding and every norm; neither the head nor position embeddings."""
    model = tiny(arch)
    adapter = graft.attach(model, graft.LongLoRA())
    copies = {site.path for site, delta in adapter.items() if isinstance(delta, CopyDelta)}
    norms = {path for path, module in tiny(arch).named_modules() if "norm" in type(module).__name__.lower()}
    assert copies == norms | {"transformer.wte" if arch == "gpt2" else "model.embed_tokens"}
    linears = {site.role for site, delta in adapter.items() if hasattr(delta, "A")}
    qkv = {"attention.qkv"} if arch == "gpt2" else {"attention.query", "attention.key", "attention.value"}
    assert linears == qkv | {"attention.output"}


def test_a_tied_head_stays_the_bases() -> None:
    """The copy acts at the embedding; merging it would change the head too, so it is refused."""
    base = lively("llama_tied")
    model = training("llama_tied", graft.LongLoRA(norms=False)).eval()
    embedded, hidden = model.get_input_embeddings()(ids_of(1, 5)), torch.randn(1, 5, 32)
    far(embedded, base.get_input_embeddings()(ids_of(1, 5)))
    assert torch.equal(model.lm_head(hidden), base.lm_head(hidden))
    assert not any(site.role == "head" for site in model.adapters["a"].sites.values())
    with pytest.raises(graft.MergeError, match="shares its weight"):
        graft.merge(model, "a")


def test_counts() -> None:
    """Llama-2-7B: 32 * 4 * 8 * 8192 for the LoRA, 32,000 * 4096 for the embedding, 65 * 4096 for the norms."""
    model = meta("Llama-2-7B")
    parts = {"embedding": False, "norms": False}
    assert trainable(model, graft.LongLoRA(**parts), False) == 8_388_608  # type: ignore[arg-type]
    assert trainable(model, graft.LongLoRA(), False) == 8_388_608 + 131_072_000 + 266_240


def test_refusals() -> None:
    for settings in (
        {"group": 3},
        {"group": 0},
        {"ratio": 0.0},
        {"rope_factor": 0.5},
        {"rope_factor": 2.0, "context": 4096},
        {"context": 0},
        {"layers": 2},
    ):
        with pytest.raises(graft.ConfigError, match="LongLoRA: "):
            graft.LongLoRA(**settings)  # type: ignore[arg-type]
    for arch, settings, message in (
        ("bert", {}, "BertForSequenceClassification is no decoder alone"),
        ("t5", {}, "T5ForConditionalGeneration is no decoder alone"),
        ("bloom", {}, "does not call transformers' attention interface"),
        ("gpt2", {"rope_factor": 2.0}, "GPT2LMHeadModel has no rotary positions"),
        ("opt", {"context": 4096}, "OPTForCausalLM has no rotary positions"),
    ):
        model = tiny(arch)
        with pytest.raises(graft.SiteError, match=message):
            graft.attach(model, graft.LongLoRA(**settings))  # type: ignore[arg-type]
        assert not hasattr(model, "adapters")
    method = graft.LongLoRA(group=8, context=4096, rolled=True)
    assert from_dict(method.to_dict(full=True)) == method
    model, ids_BT = training("llama", SEGMENTS), ids_of(1, 8)
    perturb(graft.attach(model, SEGMENTS, "b"), 2)
    with graft.route(model, [("a", "b")]), pytest.raises(graft.RouteError, match="two adapters of one row"):
        model(ids_BT)
    with torch.no_grad():
        cache = model(ids_BT, use_cache=True).past_key_values
    with pytest.raises(graft.RouteError, match="training cannot go on from a cache"):
        model(ids_BT, past_key_values=cache)
