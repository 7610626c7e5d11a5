"""The fingerprint of the base and the probe of the adapter: what they see, and that they disturb nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import attached, logits, logits_of_plain
from torch import nn

import graft
from graft import files, probe
from tiny import batch, tiny

EVERY = (
    "llama",
    "llama_cls",
    "gpt2",
    "gpt2_cls",
    "gemma2",
    "mixtral",
    "bert",
    "bert_base",
    "roberta",
    "distilbert",
    "mt5",
    "bart",
)


@pytest.mark.parametrize("name", EVERY)
def test_probe_is_the_models_own_output(name: str) -> None:
    method = graft.LoRA(rank=2, targets=("attention.query",), init="random")
    model = attached(name, method)
    found = probe.probe(model, "a")
    assert found is not None and len(found["logits"]) <= probe.LOGITS
    ids = torch.tensor([found["ids"]])
    inputs = {"input_ids": ids}
    if name in ("mt5", "bart"):
        start = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *found["ids"][:2]]])
    with torch.no_grad():
        out = model(**inputs)
    want = out.last_hidden_state if name == "bert_base" else out.logits
    want = (want[:, -2:] if want.dim() == 3 else want).flatten()
    at = [i * (len(want) - 1) // (len(found["logits"]) - 1) for i in range(len(found["logits"]))]
    torch.testing.assert_close(torch.tensor(found["logits"]), want[at], atol=1e-6, rtol=1e-5)
    assert probe.check_probe(model, json.loads(json.dumps(found)), "a") == 0.0


def test_vision_and_meta_have_no_probe() -> None:
    assert probe.probe(attached("vit", graft.LoRA(rank=2)), "a") is None
    with torch.device("meta"):
        model = tiny("llama")
    graft.attach(model, graft.LoRA(rank=2), "a")
    assert probe.probe(model, "a") is None
    assert probe.check_base(model, probe.fingerprint(tiny("llama"))) is None, "on meta, shapes alone"


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
@pytest.mark.parametrize(
    "method", [graft.LoRA(rank=2, dropout=0.5), graft.PromptTuning(length=2)], ids=lambda m: m.name
)
def test_saving_disturbs_nothing(name: str, method: Any, tmp_path: Path) -> None:
    model = attached(name, method)
    graft.attach(model, graft.LoRA(rank=3), "b")
    graft.use(model, "b")
    model.adapters["a"].scale = 1.0 if "prompt" in method.name else 0.5
    model.train()
    first = next(model.modules())
    some = model.adapters["b"]
    some.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    torch.manual_seed(4)
    want, state = torch.rand(2), model.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    torch.manual_seed(4)
    with graft.route(model, [None, "b"]):
        current = model.adapters.current
        graft.save(model, "a", tmp_path / "a")
        assert model.adapters.current is current
    assert torch.equal(torch.rand(2), want)
    assert {path: module.training for path, module in model.named_modules()} == modes and first.training
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.adapters.used == (("b", 1.0),)
    assert model.adapters["a"].scale == (1.0 if "prompt" in method.name else 0.5)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_gradients_go_on_through_a_save(tmp_path: Path) -> None:
    model = attached("llama", graft.LoRA(rank=2))
    inputs = batch("llama")
    model(**inputs).loss.backward()
    want = [p.grad.clone() for p in model.adapters.parameters()]
    model.zero_grad()
    loss = model(**inputs).loss
    graft.save(model, "a", tmp_path / "a")
    loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.adapters.parameters(), want, strict=True))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_check_on_request_and_after_a_merge(name: str, tmp_path: Path) -> None:
    folder = graft.save(attached(name, graft.LoRA(rank=2)), "a", tmp_path / "a")
    model = tiny(name)
    graft.load(model, folder, "a")
    graft.attach(model, graft.LoRA(rank=2, init="random"), "b")
    graft.use(model, "b")
    assert files.check_saved(model, "a") == 0.0
    assert files.check_saved(model, "b") is None
    expected = files.read_card(folder)["probe"]
    graft.merge(model, "a")
    assert 0.0 <= probe.check_probe(model, expected, None) < 1e-3  # type: ignore[operator]
    graft.unmerge(model)
    with torch.no_grad():
        model.adapters["a"].scale = 0.3  # the dial is not what was trained, so it does not count here
        assert files.check_saved(model, "a") == 0.0
        for parameter in model.adapters["a"].parameters():
            parameter.mul_(1.5)
    with pytest.raises(graft.AdapterFileError, match="logits of the probe"):
        files.check_saved(model, "a")


def test_fingerprint_of_another_precision_passes_with_a_note(tmp_path: Path) -> None:
    folder = graft.save(attached("llama", graft.LoRA(rank=2)), "a", tmp_path / "a")
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        model = tiny("llama").to(dtype)
        note = graft.load(model, folder, "a").note
        assert note and "fp32" in note and word in note
        assert files.check_saved(model, "a") is not None
    assert graft.load(tiny("llama"), folder, "a").note is None
    other = tiny("llama", initializer_range=0.03).to(torch.bfloat16)
    with pytest.raises(graft.AdapterFileError, match="values of"):
        graft.load(other, folder, "a")


@pytest.mark.parametrize("change", [2e-4, 1.0])
def test_one_changed_tensor_is_seen(change: float) -> None:
    expected = probe.fingerprint(tiny("bert"), ("classifier",))
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(1 + change)
    with pytest.raises(graft.AdapterFileError, match=r"layer.1.output.dense.weight"):
        probe.check_base(model, expected)


def test_a_fresh_head_is_the_same_base(tmp_path: Path) -> None:
    """Task heads start at random each time a base is loaded; the adapter brings its own."""
    for number, method in enumerate((graft.LoRA(rank=2), graft.Head(), graft.TopLayers(count=1))):
        first = attached("bert", method)
        folder = graft.save(first, "a", tmp_path / str(number))
        model = tiny("bert")
        with torch.no_grad():
            nn.init.normal_(model.classifier.weight)
        graft.load(model, folder, "a")
        assert torch.equal(logits(model, "bert"), logits(first, "bert"))


def test_fingerprint_is_of_the_base_under_adapters() -> None:
    want = probe.fingerprint(tiny("llama"))
    for method in (graft.LoRA(rank=2, init="random"), graft.FullFineTuning(), graft.PrefixTuning(length=2)):
        assert probe.fingerprint(attached("llama", method)) == want
    assert probe.fingerprint(tiny("llama", initializer_range=0.03)) != want
    assert probe.fingerprint(tiny("gpt2"))["tensors"].keys() == dict(tiny("gpt2").named_parameters()).keys()


class Coarse(nn.Linear):
    """Stands for a quantized linear: its weight is a code, and the numbers behind it are a little off."""


def test_quantized_base_passes_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = probe.fingerprint(tiny("llama"))

    def coarse(seed_of: nn.Module) -> nn.Module:
        for path, module in list(seed_of.named_modules()):
            if path.endswith("_proj"):
                module.__class__ = Coarse
                with torch.no_grad():
                    step = module.weight.abs().amax(1, keepdim=True) / 7
                    module.weight.copy_((module.weight / step).round() * step)
        return seed_of

    monkeypatch.setattr(probe, "quantized", lambda module: isinstance(module, Coarse))
    note = probe.check_base(coarse(tiny("llama")), expected)
    assert note is not None and "quantized" in note
    with torch.no_grad():
        other = tiny("llama")
        for parameter in other.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
    with pytest.raises(graft.AdapterFileError, match="values of its weights"):
        probe.check_base(coarse(other), expected)


def test_a_model_that_refuses_tokens_is_saved_without_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = attached("llama", graft.LoRA(rank=2))

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no plain tokens")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", refuses)
        graft.save(model, "a", tmp_path / "a")
    assert files.read_card(tmp_path / "a")["probe"] is None and "no plain tokens" in caplog.text
    again = tiny("llama")
    graft.load(again, tmp_path / "a")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert not torch.equal(logits_of_plain(again, "llama"), logits_of_plain(tiny("llama"), "llama"))
