"""Bad folders: each a one-line error that says what and where, and the model as it was."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from folders import attached, logits, logits_of_plain
from torch import Tensor

import graft
from examples import perturb
from tiny import tiny

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "graft.json"
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def refused(
    folder: Path, match: str, name: str = "llama", error: type[Exception] = graft.AdapterFileError, **kw: Any
) -> None:
    """Loading fails with one line, and nothing of the model has changed."""
    model = tiny(name)
    keys, want = set(model.state_dict()), logits_of_plain(model, name)
    with pytest.raises(error, match=match) as caught:
        graft.load(model, folder, "a", **kw)
    assert "\n" not in str(caught.value)
    assert set(model.state_dict()) == keys and not hasattr(model, "adapters")
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits_of_plain(model, name), want)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return graft.save(attached("llama", graft.LoRA(rank=2)), "a", tmp_path / "ours")


@pytest.fixture
def theirs(ours: Path) -> Path:
    """A bare peft folder: no card, so nothing but the two files speaks."""
    (ours / CARD).unlink()
    return ours


def edit(folder: Path, file: str = CONFIG, **fields: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / TENSORS)


def test_missing(theirs: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no adapter_config.json here")
    (theirs / TENSORS).unlink()
    refused(theirs, "no adapter_model.safetensors here")


def test_a_pickle_is_never_opened(theirs: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "opened",)

    (theirs / TENSORS).unlink()
    (theirs / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(theirs, "is a pickle, .*save_pretrained")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"r": 8}', '{"peft_type": 3}'])
def test_broken_config(theirs: Path, text: str) -> None:
    (theirs / CONFIG).write_text(text)
    refused(theirs, "adapter_config.json: ")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated(theirs: Path, size: int) -> None:
    whole = (theirs / TENSORS).read_bytes()
    (theirs / TENSORS).write_bytes(whole[:size])
    refused(theirs, "damaged or cut short")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 0.999])
def test_bit_flip(ours: Path, share: float) -> None:
    data = bytearray((ours / TENSORS).read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    (ours / TENSORS).write_bytes(bytes(data))
    refused(ours, "is not what graft.json says was written")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(theirs: Path, value: float, tmp_path: Path) -> None:
    edit_tensors(theirs, lambda tensors: tensors[KEY].view(-1)[3].fill_(value))
    refused(theirs, rf"{re.escape(KEY)} has values that are not finite")
    model = attached("llama", graft.LoRA(rank=2))
    with torch.no_grad():
        model.adapters["a"].at("model.layers.1.self_attn.q_proj").B[0, 0] = value  # type: ignore[index]
    with pytest.raises(graft.AdapterFileError, match=rf"{re.escape(KEY)} has values that are not finite"):
        graft.save(model, "a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(KEY), "1 tensors are missing, the first is .*layers.1.self_attn.q_proj.lora_B"),
        (
            lambda t: t.update({KEY.replace("q_proj", "o_proj"): t[KEY].clone()}),
            r"o_proj.lora_B.weight \(32, 2\) has no place",
        ),
        (lambda t: t.update({KEY: t[KEY][:, :1].clone()}), r"has shape \(32, 1\).*need \(32, 2\)"),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), r"has shape \(2, 32\).*need \(32, 2\)"),
        (lambda t: t.update({KEY: t[KEY].long()}), "is of torch.int64"),
        (lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)], "x.base_model.* has no place"),
    ],
)
def test_every_tensor_exactly_once(theirs: Path, change: Callable[[dict[str, Tensor]], None], match: str) -> None:
    edit_tensors(theirs, change)
    refused(theirs, match)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [3, 4]),
        ("arrow_config", {"top_k": 1}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["experts.down"]),
        ("megatron_config", {"x": 1}),
        ("layers_pattern", "h"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("loftq_config", {"loftq_bits": 4}),
        ("kasa_config", {"a": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("a_field_of_the_future", 0),
        ("another", ""),
        ("modules_to_save", ["not_there"]),
        ("target_modules", ["q_proj", "v_proj", "q_porj"]),
        ("target_modules", ["input_layernorm"]),
        ("target_modules", []),
        ("r", "2"),
        ("r", 0),
        ("r", True),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("bias", "some"),
        ("peft_type", "XLORA"),
        ("rank_pattern", {"(": 3}),
    ],
)
def test_every_field_is_honoured_or_refused_by_name(theirs: Path, field: str, value: Any) -> None:
    edit(theirs, **{field: value})
    if (field, value) == ("lora_alpha", None):
        graft.load(tiny("llama"), theirs)  # null is peft's default
        return
    refused(theirs, "rank must" if (field, value) == ("r", 0) else field)


def test_embedding_tied_by_peft_is_refused(tmp_path: Path) -> None:
    model = attached("llama_tied", graft.LoRA(rank=2, targets=("q_proj", "embed_tokens")))
    folder = graft.save(model, "a", tmp_path / "a")
    (folder / CARD).unlink()
    edit(folder, ensure_weight_tying=True)
    refused(folder, "ensure_weight_tying", "llama_tied")
    edit(folder, target_modules=["q_proj"])
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "embedding" in key])
    graft.load(tiny("llama_tied"), folder)


@pytest.mark.parametrize("name", ["embed_tokens.base_layer", "lm_head.base_layer", "embed_tokens"])
def test_embedding_in_the_file_must_be_the_models_own(name: str, tmp_path: Path) -> None:
    targets = ("q_proj", "embed_tokens", "lm_head") if "base_layer" in name else ("q_proj",)
    model = attached("llama", graft.LoRA(rank=2, targets=targets))
    folder = graft.save(model, "a", tmp_path / "a")
    (folder / CARD).unlink()
    module = model.lm_head if "lm_head" in name else model.model.embed_tokens
    key = f"base_model.model.{'' if 'lm_head' in name else 'model.'}{name}.weight"
    weight = module.weight.detach()  # type: ignore[union-attr,operator]
    edit_tensors(folder, lambda t: t.update({key: weight.clone()}))
    again = tiny("llama")
    graft.load(again, folder)
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    edit_tensors(folder, lambda t: t.update({key: weight + 1}))
    refused(folder, "holds another .* than the model's")
    edit_tensors(folder, lambda t: t.update({key: torch.cat([weight, weight])}))
    refused(folder, r"has shape \(198, 32\)")


@pytest.mark.parametrize(
    ("file", "fields", "match"),
    [
        (CONFIG, {"lora_alpha": 99}, "'lora_alpha' = 99 is not what graft.json says"),
        (CONFIG, {"bias": "all"}, "'bias'"),
        (CONFIG, {"use_dora": True}, "'use_dora'"),
        (CONFIG, {"peft_type": "IA3"}, "'peft_type'"),
        (CARD, {"method": {"method": "lora", "rank": 4}}, "'r' = 2 is not what"),
        (CARD, {"method": {"method": "bottleneck"}}, "graft.json: does not belong"),
        (CARD, {"method": {"method": "lorra"}}, "did you mean 'lora'"),
        (CARD, {"method": {"method": "lora", "rnak": 4}}, "did you mean 'rank'"),
        (CARD, {"method": "lora"}, "names no method"),
        (CARD, {"format_version": 2}, "format_version 2"),
        (CARD, {"surprise": 1}, "'surprise' is not known"),
    ],
)
def test_config_and_card_must_agree(ours: Path, file: str, fields: dict[str, Any], match: str) -> None:
    edit(ours, file, **fields)
    refused(ours, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"format_version": 9}, "format_version 9"),
        ({"surprise": 1}, "'surprise'"),
        ({"method": {"method": "bottleneck", "size": 4}}, "has shape"),
        ({"peft_type": "HEAD"}, "'peft_type'"),
        ({"method": "bottleneck"}, "adapter_config.json: method: .*not 'bottleneck'"),
    ],
)
def test_own_config(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder = graft.save(attached("llama", graft.Bottleneck(size=3)), "a", tmp_path / "a")
    (folder / CARD).unlink()
    edit(folder, **fields)
    refused(folder, match)


def _without(part: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != field}


@pytest.mark.parametrize(
    ("field", "damage", "match"),
    [
        ("base", lambda base: _without(base, "tensors"), "base.tensors: missing"),
        ("base", lambda base: _without(base, "config"), "base.config: missing"),
        ("base", lambda base: base | {"precision": "fp23"}, "base.precision: .*'fp23'"),
        ("base", lambda base: base | {"tensors": ["model.norm.weight"]}, "base.tensors: .*valid dictionary"),
        ("base", lambda base: base | {"tensors": dict.fromkeys(base["tensors"], "99x32 O.1")}, "'99x32 O.1' is not"),
        ("base", lambda base: "LlamaForCausalLM", "base: .*'LlamaForCausalLM'"),
        ("probe", lambda probe: _without(probe, "logits"), "probe.logits: missing"),
        ("probe", lambda probe: probe | {"ids": 5}, "probe.ids: .*valid list"),
        ("probe", lambda probe: probe | {"logits": []}, "probe.logits: .*at least 1"),
        ("method", lambda method: method | {"layers": {"range": [0, 2, 0]}}, "method: "),
    ],
)
def test_a_damaged_card(ours: Path, field: str, damage: Callable[[Any], Any], match: str) -> None:
    edit(ours, CARD, **{field: damage(json.loads((ours / CARD).read_text())[field])})
    refused(ours, f"graft.json: .*{match}")


def test_a_config_of_our_own_that_lost_a_field(tmp_path: Path) -> None:
    folder = graft.save(attached("llama", graft.Bottleneck(size=3)), "a", tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(_without(config, "peft_compat")))
    refused(folder, "describe different methods")
    (folder / CONFIG).write_text(json.dumps(_without(config, "method")))
    refused(folder, "adapter_config.json: method: .*not None")


def test_prefix_heads_must_fit(tmp_path: Path) -> None:
    folder = graft.save(attached("llama", graft.PrefixTuning(length=2)), "a", tmp_path / "a")
    (folder / CARD).unlink()
    edit(folder, num_attention_heads=4, token_dim=16)  # the same number of values, cut otherwise
    refused(folder, "num_attention_heads = 4")


def test_prefix_with_one_stack_in_an_encoder_decoder(tmp_path: Path) -> None:
    model = attached("bart", graft.PrefixTuning(length=2), peft_compat=True)
    folder = graft.save(model, "a", tmp_path / "a")
    (folder / CARD).unlink()
    edit(folder, num_transformer_submodules=1)
    refused(folder, "cross-attention", "bart")


def test_blocks_of_a_fused_linear_are_exact(tmp_path: Path) -> None:
    folder = graft.save(attached("gpt2", graft.LoRA(rank=2)), "a", tmp_path / "a")
    edit(folder, CARD, tensors_sha256="")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    edit_tensors(folder, lambda t: t[key][40].fill_(0.5))  # a row of the keys, which queries and values leave alone
    refused(folder, "parts of a fused linear", "gpt2")


@pytest.mark.parametrize(
    ("other", "overrides", "match"),
    [
        ("llama", {"hidden_size": 64}, "hidden size 32, 2 layers.*hidden size 64"),
        ("llama", {"num_hidden_layers": 3}, "3 layers.*num_hidden_layers: 2 and 3"),
        ("mistral", {}, "LlamaForCausalLM.*MistralForCausalLM"),
        ("gpt2", {}, "LlamaForCausalLM.*GPT2LMHeadModel"),
        ("llama", {"vocab_size": 120}, "values of model.embed_tokens.weight"),
        ("llama", {"initializer_range": 0.03}, "they differ in the values of"),
    ],
)
def test_another_base(ours: Path, other: str, overrides: dict[str, Any], match: str) -> None:
    model = tiny(other, **overrides)
    if other == "mistral":  # the same weights of another class are the same base
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
    with pytest.raises(graft.AdapterFileError, match=match):
        graft.load(model, ours)
    assert not hasattr(model, "adapters")


def test_another_base_can_be_forced(ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama", initializer_range=0.03)
    note = graft.load(model, ours, "warned", check="warn").note
    assert "differ in the values" in str(note) and "differ in the values" in caplog.text
    assert graft.load(model, ours, "unseen", check="off").note is None
    with pytest.raises(graft.ConfigError, match="error, warn, off"):
        graft.load(model, ours, "x", check="maybe")


def test_peft_folder_of_another_base(theirs: Path) -> None:
    model = tiny("llama", hidden_size=64)
    with pytest.raises(graft.AdapterFileError, match="has shape"):
        graft.load(model, theirs)
    with pytest.raises(graft.AdapterFileError, match="no module 'q_proj'"):
        graft.load(tiny("gpt2"), theirs)


def test_a_taken_name_and_a_merged_model(ours: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    graft.load(model, ours, "a")
    with pytest.raises(graft.ConfigError, match="attached already"):
        graft.load(model, ours, "a")
    assert model.adapters.names == ("a",)
    graft.merge(model, "a")
    with pytest.raises(graft.AdapterFileError, match="merged"):
        graft.save(model, "a", tmp_path / "b")
    graft.unmerge(model)
    with pytest.raises(graft.RouteError, match="no adapter is named 'b'"):
        graft.save(model, "b", tmp_path / "b")


def test_meta_device_has_nothing_to_save(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny("llama")
    graft.attach(model, graft.LoRA(rank=2), "a")
    with pytest.raises(graft.AdapterFileError, match="meta device"):
        graft.save(model, "a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attach_refuses_peft_configs_by_name() -> None:
    peft = pytest.importorskip("peft")
    for options, field in (({"use_qalora": True}, "use_qalora"), ({"init_lora_weights": "corda"}, "corda_config")):
        with pytest.raises(graft.ConfigError, match=field):
            graft.attach(tiny("llama"), peft.LoraConfig(**options))
    with pytest.raises(graft.ConfigError, match="LOHA"):
        graft.attach(tiny("llama"), peft.LoHaConfig())
    with pytest.raises(graft.ConfigError, match="init_weights"):
        graft.attach(tiny("llama"), peft.PrefixTuningConfig(num_virtual_tokens=2, init_weights="zero"))


def test_untouched_adapters_survive_a_failed_load(ours: Path, theirs: Path) -> None:
    model = attached("llama", graft.LoRA(rank=3))
    perturb(model.adapters["a"])
    want = logits(model, "llama")
    edit_tensors(theirs, lambda t: t.pop(KEY))
    with pytest.raises(graft.AdapterFileError):
        graft.load(model, theirs, "b")
    assert model.adapters.names == ("a",) and torch.equal(logits(model, "llama"), want)
