"""Loading a base: precision, class, device; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft import base
from graft.base import computes_bf16, context_length, identity, load_base, load_config, load_tokenizer
from graft.errors import ConfigError
from graft.weights import quantized
from tiny import batch, tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_embedded() -> None:
    model, tokenizer = load_base("embedded", precision="fp32"), load_tokenizer("embedded")
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training and model.dtype == torch.float32
    ids = tokenizer("Once upon a time, there was a little girl named", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:]).strip() == "Lily"
    assert context_length(model.config, tokenizer) == 512
    assert load_config("quickstart").to_dict() == load_config("embedded").to_dict()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision(precision: str, dtype: torch.dtype, saved: Path) -> None:
    model = load_base(saved, precision=precision, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(next(model.parameters()), next(tiny("llama").parameters()).to(dtype))


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_only_where_the_device_has_it(fast: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "computes_bf16", lambda device: fast)
    assert load_base(saved, device="cpu").dtype == (torch.bfloat16 if fast else torch.float32)


def test_cpu_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, answer in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert computes_bf16("cpu") is answer
    assert computes_bf16("meta") is False


@pytest.mark.parametrize(
    ("kind", "num_labels", "name"),
    [
        ("llama", None, "LlamaForCausalLM"),
        ("llama", 5, "LlamaForSequenceClassification"),
        ("t5", None, "T5ForConditionalGeneration"),
        ("bart", None, "BartForConditionalGeneration"),
        ("bert", None, "BertForSequenceClassification"),
        ("bert", 5, "BertForSequenceClassification"),
    ],
)
def test_class_follows_the_config(kind: str, num_labels: int | None, name: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path / kind)
    model = load_base(tmp_path / kind, precision="fp32", num_labels=num_labels)
    assert type(model).__name__ == name
    if num_labels is not None:
        assert model(batch(kind)["input_ids"]).logits.shape[-1] == num_labels
    else:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(kind).parameters(), strict=True))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized(precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_base("embedded", precision=precision, device="cpu")
    assert quantized(model.model.layers[0].mlp.up_proj)
    logits, plain = (
        m(torch.tensor([[5, 6, 7, 8]])).logits.float() for m in (model, load_base("embedded", precision="fp32"))
    )
    assert torch.nn.functional.cosine_similarity(logits, plain, dim=-1).min() > 0.9


def test_quantized_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^precision nf4: bitsandbytes is not installed; pip install"):
        load_base("embedded", precision="nf4", device="cpu")


def test_context_length() -> None:
    assert context_length(tiny("gpt2").config) == 128 and context_length(tiny("t5").config) is None


def one_line(path: str | Path, message: str, **more: object) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_base(path, **more)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_settings_refused(tmp_path: Path) -> None:
    one_line("embedded", "did you mean 'fp32'", precision="fp23")
    one_line("embedded", "unknown device 'gpu'", device="gpu")
    one_line("embedded", "num_labels: at least 1", num_labels=0)
    one_line(tmp_path / "none", "no such folder")
    one_line(tmp_path, "no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    one_line(tmp_path, "it is an adapter, give its base")


def test_pickles_are_refused(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    one_line(saved, r"only pickled weights \(pytorch_model\.bin\)")
    (saved / "pytorch_model.bin").unlink()
    one_line(saved, r"no \*\.safetensors")


def test_broken_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    one_line(saved, "base .*llama: ")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    one_line(saved, "lacks 1 tensors of LlamaForCausalLM, the first is model.layers.1.mlp.up_proj.weight")
    one_line(saved, "lacks 1 tensors of LlamaForSequenceClassification", num_labels=2)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost[:3]}, file, metadata={"format": "pt"})
    one_line(saved, "lacks 1 tensors")


def test_code_of_a_checkpoint_is_never_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "mine.py").write_text("raise SystemExit('ran')")
    one_line(saved, "needs code from its own repository, which is never run")
    (saved / "config.json").write_text("{")
    one_line(saved, "base ")


def test_no_tokenizer(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(saved)
    shutil.rmtree(saved)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(saved)


def test_identity_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = identity(str(tmp_path / "a"))
    assert identity(str(tmp_path / "b")) == first != identity("embedded")
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert identity(str(tmp_path / "b")) != first


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_identity_is_of_the_tokenizer_and_the_way_it_answers_too(tmp_path: Path, name: str) -> None:
    """A README says nothing of the base."""
    tiny("llama").save_pretrained(tmp_path)
    load_tokenizer("embedded").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "README.md").write_text("of yesterday")
    first = identity(str(tmp_path))
    (tmp_path / "README.md").write_text("of today")
    assert identity(str(tmp_path)) == first
    (tmp_path / name).write_text((tmp_path / name).read_text() + " ")
    assert identity(str(tmp_path)) != first
