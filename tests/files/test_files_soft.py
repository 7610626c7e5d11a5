"""Folders of P-tuning, P-tuning v2 and prefixes of words: peft's in both directions, and what only ours can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_files_peft import MAIN, TASKS, graft_logits, our_adapter, read_by_peft, round_trip, written_by_peft

import graft
from tiny import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Words:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [7, 8, 10]}


def encoder(name: str, kind: str = "MLP", **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"num_virtual_tokens": 3, "encoder_hidden_size": 6, "encoder_reparameterization_type": kind, **options}
    return peft.PromptEncoderConfig(task_type=TASKS[name], **settings)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("name", [*MAIN, "llama_cls"])
def test_p_tuning(name: str, kind: str, tmp_path: Path) -> None:
    model, config = round_trip(name, encoder(name, kind), tmp_path)
    assert config["encoder_reparameterization_type"] == kind and config["encoder_hidden_size"] == 6
    assert model.adapters["a"].shared.embedding is None  # a plain prompt
    assert set(config) >= set(config_of(tmp_path / "theirs")) - {"auto_mapping", "peft_version", "revision"}


@pytest.mark.parametrize("name", ["mt5", "bart"])
def test_p_tuning_with_one_stack_in_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    want = written_by_peft(name, encoder(name, num_transformer_submodules=1), tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 32)
    model = tiny(name)
    graft.load(model, tmp_path / "a")
    torch.testing.assert_close(graft_logits(model, name), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mt5"])
def test_our_p_tuning_is_peft_s(name: str, tmp_path: Path) -> None:
    """The file has what the LSTM makes without its dropout; in encoder-decoders zeros where peft has rows that rest."""
    model = our_adapter(name, graft.PTuning(length=3, encoder="lstm", dropout=0.5))
    want = graft_logits(model, name)
    model.train()
    graft.save(model, "a", tmp_path / "a", form="peft")
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    assert rows.shape == ((6, 32) if name == "mt5" else (3, 32)) and not rows[3:].any()
    torch.testing.assert_close(read_by_peft(name, tmp_path / "a"), want, atol=1e-5, rtol=1e-5)
    again = tiny(name)
    adapter = graft.load(again, tmp_path / "a")
    assert adapter.method == model.adapters["a"].method and adapter.shared.lstm is None
    torch.testing.assert_close(graft_logits(again, name), want, atol=1e-5, rtol=1e-5)


def test_p_tuning_in_our_own_form(tmp_path: Path) -> None:
    """A pooler that reads behind the pseudo-tokens is none of peft's."""
    model = our_adapter("bert", graft.PTuning(length=3))
    with pytest.raises(graft.AdapterFileError, match="peft pools at the first"):
        graft.save(model, "a", tmp_path / "a", form="peft")
    graft.save(model, "a", tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "GRAFT_P_TUNING"
    again = tiny("bert")
    graft.load(again, tmp_path / "a", "b")
    torch.testing.assert_close(graft_logits(again, "bert"), graft_logits(model, "bert"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", [graft.PTuning(length=3), graft.PromptTuning(length=3)])
def test_a_template_that_places_pseudo_tokens_is_not_peft_s(method: Any, tmp_path: Path) -> None:
    """peft puts them in front, which computes something else."""
    model = our_adapter("llama", method)
    template = {"kind": "plain", "templates": ["{slots:1} {text} {slots:2}"]}
    with pytest.raises(graft.AdapterFileError, match="peft puts them all in front"):
        graft.save(model, "a", tmp_path / "a", template=template, form="peft")
    graft.save(model, "a", tmp_path / "a", template=template)
    assert config_of(tmp_path / "a")["peft_type"].startswith("GRAFT_")
    again = tiny("llama")
    adapter = graft.load(again, tmp_path / "a", "b")
    assert adapter.card["template"] == template and adapter.method == method
    torch.testing.assert_close(graft_logits(again, "llama"), graft_logits(model, "llama"), atol=1e-6, rtol=1e-6)
    graft.save(again, "b", tmp_path / "b")  # it keeps its template, and so its form
    assert config_of(tmp_path / "b")["peft_type"].startswith("GRAFT_")
    graft.save(again, "b", tmp_path / "c", template={"kind": "plain"}, form="peft")


def test_training_on_goes_without_the_encoder_and_says_so(tmp_path: Path) -> None:
    methods = {"p": graft.PTuning(length=3), "mlp": graft.PrefixTuning(length=3, hidden=4)}
    for key, method in methods.items() | {"rows": graft.PrefixTuning(length=3)}.items():
        graft.save(our_adapter("llama", method), "a", tmp_path / key)
        for trainable in (False, True):
            adapter = graft.load(tiny("llama"), tmp_path / key, trainable=trainable)
            told = adapter.note is not None and "not the encoder" in adapter.note
            assert told == (trainable and key in methods)
            assert adapter.trainable == (adapter.saved if trainable else 0)


def test_p_tuning_v2_is_a_prefix_of_peft_s(tmp_path: Path) -> None:
    model = our_adapter("bert", graft.PTuningV2(length=3))
    want = graft_logits(model, "bert")
    graft.save(model, "a", tmp_path / "a", form="peft")
    assert config_of(tmp_path / "a")["peft_type"] == "PREFIX_TUNING"
    torch.testing.assert_close(read_by_peft("bert", tmp_path / "a"), want, atol=1e-5, rtol=1e-5)
    for method in (graft.PTuningV2(length=3), graft.PrefixTuning(length=3)):
        again = tiny("bert")
        assert graft.load(again, tmp_path / "a", "b").method == method
        torch.testing.assert_close(graft_logits(again, "bert"), want, atol=1e-6, rtol=1e-6)
        (tmp_path / "a" / "graft.json").unlink(missing_ok=True)  # the second time as a bare peft folder


def test_a_prefix_of_words_loads_without_a_tokenizer(tmp_path: Path) -> None:
    method = graft.PrefixTuning(length=3, init="text", text="so it goes", tokenizer=Words())
    model = our_adapter("llama", method)
    graft.save(model, "a", tmp_path / "a", form="peft")
    again = tiny("llama")
    assert graft.load(again, tmp_path / "a", "b").method == method
    torch.testing.assert_close(graft_logits(again, "llama"), graft_logits(model, "llama"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("encoder_reparameterization_type", "GRU", "encoder_reparameterization_type = 'GRU' is not known"),
        ("encoder_hidden_size", "6", "encoder_hidden_size = '6' is not of the kind int"),
        ("num_transformer_submodules", 2, "does not fit LlamaForCausalLM"),
        ("prompt_template", "x", "field 'prompt_template'"),
        ("num_virtual_tokens", 4, "prompt_embeddings has shape"),
    ],
)
def test_bad_fields(field: str, value: Any, match: str, tmp_path: Path) -> None:
    written_by_peft("llama", encoder("llama"), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config_of(tmp_path / "a") | {field: value}))
    model = tiny("llama")
    with pytest.raises(graft.AdapterFileError, match=match):
        graft.load(model, tmp_path / "a")
    assert not hasattr(model, "adapters")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_peft_pools_a_decoder_s_padded_rows_at_a_pad(kind: str, tmp_path: Path) -> None:
    """We pool at the last token: where a row has no padding both agree, alone or in a batch."""
    peft = pytest.importorskip("peft")
    task = TASKS["llama_cls"]
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3) if kind == "prompt" else encoder("llama_cls")
    twin = peft.get_peft_model(tiny("llama_cls"), config).eval()
    twin.save_pretrained(tmp_path / "a")
    model = tiny("llama_cls")
    graft.load(model, tmp_path / "a", "a")
    data = {key: value for key, value in batch("llama_cls").items() if key != "labels"}
    ours, theirs = model(**graft.prepare(model, data)).logits, twin(**data).logits
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert ((ours - theirs).abs().amax(-1)[1:] > 1e-4).all()
    for row, length in enumerate(data["attention_mask"].sum(-1).tolist()):
        alone = {key: value[row : row + 1, :length] for key, value in data.items()}
        torch.testing.assert_close(twin(**alone).logits[0], ours[row], atol=1e-5, rtol=1e-5)
