"""Positions divided by an adapter's factor: against transformers' linear scaling, row by row, in and out of files."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graft
from examples import perturb
from graft.evaluate.batches import context_of
from tiny import EOS, MODELS, PAD, tiny

ROTARY = ("llama", "mistral", "qwen3", "gpt_neox", "gemma3", "mixtral")


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(0))


def scaled(arch: str, factor: float | None, **overrides: Any) -> Any:
    """A tiny model of larger weights whose own config divides positions."""
    config = getattr(transformers, MODELS[arch][1])(**{**MODELS[arch][2], **overrides})
    rope = copy.deepcopy(config.rope_parameters)
    for each in [rope] if "rope_type" in rope else list(rope.values()):
        each.update({} if factor is None else {"rope_type": "linear", "factor": factor})
    return tiny(arch, initializer_range=0.3, rope_parameters=rope, **overrides)


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def far(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ROTARY)
def test_equals_linear_scaling(arch: str) -> None:
    ids_BT = ids_of(2, 60)
    model = scaled(arch, None)
    plain = model(ids_BT).logits
    graft.attach(model, graft.LongLoRA(rope_factor=4.0), "long")
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            actual = model(ids_BT).logits
        close(actual, scaled(arch, 4.0)(ids_BT).logits)
        far(actual, plain)
    graft.detach(model)
    assert torch.equal(model.eval()(ids_BT).logits, plain)


def test_a_base_that_scales_itself_is_scaled_further() -> None:
    model = scaled("llama", 2.0)
    graft.attach(model, graft.LongLoRA(rope_factor=2.0), "long")
    close(model(ids_of(2, 60)).logits, scaled("llama", 4.0)(ids_of(2, 60)).logits)


def test_behind_a_prefix_positions_are_divided_as_transformers_would() -> None:
    """(position + P) / f, whatever the order of names."""
    model, own = scaled("llama", None), scaled("llama", 4.0)
    graft.attach(model, graft.LongLoRA(rope_factor=4.0), "long")
    for each in (model, own):
        torch.manual_seed(0)
        graft.attach(each, graft.PrefixTuning(length=5), "prefix")
    graft.use(own, "prefix")
    for entry in (("prefix", "long"), ("long", "prefix")):
        graft.use(model, entry)
        close(model(ids_of(2, 40)).logits, own(ids_of(2, 40)).logits)


def mixed_model() -> tuple[Any, list[Any]]:
    model = scaled("llama", None)
    perturb(graft.attach(model, graft.LongLoRA(rank=2, rope_factor=4.0), "four"), 1, 0.1)
    perturb(graft.attach(model, graft.LongLoRA(rank=2, rope_factor=1.5), "more"), 2, 0.1)
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 3, 0.1)
    perturb(graft.attach(model, graft.PrefixTuning(length=3), "prefix"), 4, 0.1)
    return model, ["four", None, "more", ("prefix", "four"), "lora", "prefix"]


def test_rows_of_a_mixed_batch_equal_separate_runs() -> None:
    model, rows = mixed_model()
    ids_BT = ids_of(len(rows), 30)
    with graft.route(model, rows):
        mixed = model(ids_BT).logits
    for i, entry in enumerate(rows):
        with graft.route(model, [entry]):
            close(mixed[i], model(ids_BT[i : i + 1]).logits[0])
    with graft.route(model, [None]):
        far(mixed[0], model(ids_BT[:1]).logits[0])


def test_generate_of_a_mixed_batch_equals_separate_runs() -> None:
    model, rows = mixed_model()
    ids_BT = ids_of(len(rows), 20)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    for extra in ({}, {"num_beams": 2}):
        with graft.route(model, rows):
            mixed = model.generate(ids_BT, **options, **extra)
        for i, entry in enumerate(rows):
            with graft.route(model, [entry]):
                assert mixed[i].tolist() == model.generate(ids_BT[i : i + 1], **options, **extra)[0].tolist()


def test_packed_equals_unpacked() -> None:
    model, rows = mixed_model()
    texts = [ids_of(1, length)[0] for length in range(9, 9 + len(rows))]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with graft.route(model, segments=[(entry, len(text)) for entry, text in zip(rows, texts, strict=True)]):
        packed = model(input_ids=torch.cat(texts)[None], position_ids=positions, use_cache=False).logits[0]
    for entry, text, piece in zip(rows, texts, packed.split([len(text) for text in texts]), strict=True):
        with graft.route(model, [entry]):
            close(piece, model(text[None]).logits[0])


def test_context_becomes_a_factor_that_is_stored(tmp_path: Path) -> None:
    """400 tokens on a base of 128: ceil(400 / 128) = 4; on one that scales by 2 already, ceil(400 / 256) = 2."""
    for own, context, factor in ((None, 400, 4.0), (2.0, 400, 2.0), (None, 100, 1.0)):
        model = scaled("llama", own)
        adapter = perturb(graft.attach(model, graft.LongLoRA(rank=2, context=context), "a"), 1, 0.1)
        assert adapter.stretch == factor and ("model.rotary_emb" in adapter.sites) == (factor != 1.0)
        ids_BT = ids_of(2, 40)
        expected = model(ids_BT).logits
        folder = graft.save(model, "a", tmp_path / f"{own}-{context}")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LONG_LORA"
        assert (config["method"]["rope_factor"], config["method"]["context"]) == (factor, None)
        other = scaled("llama", own)
        again = graft.load(other, folder, "a")
        assert again.stretch == factor and again.method.rope_factor == factor  # type: ignore[attr-defined]
        close(other(ids_BT).logits, expected)
        assert graft.files.check_saved(other, "a") is not None


def test_evaluation_takes_texts_of_the_longer_context() -> None:
    """128 of the base; four times as many with a factor of 4, as long as no other adapter could be meant."""
    model = tiny("llama")
    tokenizer = types.SimpleNamespace(model_max_length=10**30)
    graft.attach(model, graft.LongLoRA(rope_factor=4.0), "long")
    assert context_of(model, tokenizer) == 512
    graft.attach(model, graft.LoRA(), "lora")
    assert context_of(model, tokenizer) == 128
    assert graft.LongLoRA(context=500).stretch(model.config) == 4.0 and graft.LoRA().stretch(model.config) == 1.0


def test_refusals() -> None:
    model, ids_BT = scaled("llama", None), ids_of(1, 8)
    adapter = graft.attach(model, graft.LongLoRA(rope_factor=4.0), "four")
    graft.attach(model, graft.LongLoRA(rope_factor=2.0), "two")
    with pytest.raises(graft.RouteError, match="'four' divides positions by 4 and 'two' by 2"):
        graft.use(model, ("four", "two"))
    with pytest.raises(graft.RouteError, match="divides positions"):
        graft.route(model, [("two", "four")])
    with pytest.raises(graft.RouteError, match="can only have weight 1"):
        graft.use(model, {"four": 0.5})
    with pytest.raises(graft.RouteError, match="no dial"):
        adapter.scale = 0.5
    with pytest.raises(graft.MergeError, match=r"long_lora\) cannot be merged: see model.rotary_emb"):
        graft.merge(model, "four")
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(graft.SiteError, match="scales by 'dynamic', which changes with the length"):
        graft.attach(dynamic, graft.LongLoRA(rope_factor=2.0))
    assert not hasattr(dynamic, "adapters")
    graft.attach(dynamic, graft.LongLoRA())
    graft.detach(model, "two")
    graft.use(model, None)
    assert torch.equal(model(ids_BT).logits, scaled("llama", None)(ids_BT).logits)
    graft.detach(model, "four")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
