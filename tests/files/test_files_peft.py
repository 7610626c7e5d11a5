"""peft writes, we load; we write, peft loads: the logits are the same."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "qwen3": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS"}
TASKS |= {
    "distilbert": "SEQ_CLS",
    "llama_cls": "SEQ_CLS",
    "mt5": "SEQ_2_SEQ_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
MAIN = ("llama", "gpt2", "bert", "mt5", "bart")


def whole_batch(name: str) -> dict[str, Tensor]:
    """Two rows without padding, so that peft's place for virtual tokens is ours."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 99, (2, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if TASKS[name] == "SEQ_2_SEQ_LM":
        batch["labels"] = torch.randint(5, 99, (2, 4), generator=generator)
    return batch


@torch.no_grad()
def shaken(model: nn.Module, which: Any) -> None:
    """Trained-looking values: none at its start, where a mistake would not show."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if which(name, parameter):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def peft_logits(model: nn.Module, name: str) -> Tensor:
    """In fp64: in fp32 mT5's are 3e-4 from these, peft's as ours, because its sums are hundreds that cancel."""
    return copy.deepcopy(model).eval().double()(**whole_batch(name)).logits


@torch.no_grad()
def graft_logits(model: nn.Module, name: str) -> Tensor:
    model = copy.deepcopy(model).double()
    return model(**graft.prepare(model, whole_batch(name))).logits


def written_by_peft(name: str, config: Any, folder: Path, **options: Any) -> Tensor:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    model = peft.get_peft_model(tiny(name, **options), config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    shaken(model, lambda n, p: n in trained)
    model.save_pretrained(folder)
    return peft_logits(model, name)


def read_by_peft(name: str, folder: Path, **options: Any) -> Tensor:
    peft = pytest.importorskip("peft")
    return peft_logits(peft.PeftModel.from_pretrained(tiny(name, **options), folder), name)


def round_trip(name: str, config: Any, folder: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """peft -> us -> peft -> us; gives the model with the adapter, and the config that we wrote."""
    want = written_by_peft(name, config, folder / "theirs", **options)
    base = graft_logits_of_base(name, **options)
    assert want.shape != base.shape or (want - base).abs().max() > 1e-3, "the adapter must show"
    model = tiny(name, **options)
    adapter = graft.load(model, folder / "theirs", "a")
    assert adapter.peft_compat
    torch.testing.assert_close(graft_logits(model, name), want, atol=1e-5, rtol=1e-5)
    graft.save(model, "a", folder / "ours", form="peft")
    torch.testing.assert_close(read_by_peft(name, folder / "ours", **options), want, atol=1e-5, rtol=1e-5)
    for drop in (False, True):  # with our card, and as a bare peft folder
        if drop:
            (folder / "ours" / "graft.json").unlink()
        again = tiny(name, **options)
        graft.load(again, folder / "ours", "b")
        assert torch.equal(graft_logits(again, name), graft_logits(model, name))
    return model, json.loads((folder / "ours" / "adapter_config.json").read_text())


@torch.no_grad()
def graft_logits_of_base(name: str, **options: Any) -> Tensor:
    return tiny(name, **options)(**whole_batch(name)).logits


def lora(name: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    names = {"target_modules": ["q_lin", "v_lin"]} if name == "distilbert" else {}
    return peft.LoraConfig(task_type=TASKS[name], **{"r": 4, "lora_alpha": 6, **names, **options})


@pytest.mark.parametrize("name", [*MAIN, "qwen3", "llama_cls", "roberta", "distilbert"])
def test_lora(name: str, tmp_path: Path) -> None:
    round_trip(name, lora(name), tmp_path)


@pytest.mark.parametrize("name", MAIN)
def test_rslora_on_all_linears(name: str, tmp_path: Path) -> None:
    model, config = round_trip(name, lora(name, use_rslora=True, target_modules="all-linear"), tmp_path)
    assert config["use_rslora"] is True
    assert model.adapters["a"].method.rslora


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": r".*\.(q|o)_proj", "exclude_modules": ["layers.0.self_attn.o_proj"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*q_proj"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 0}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
        (
            "llama",
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3}},
        ),
        ("gpt2", {"rank_pattern": {r"h\.0\..*c_attn": 2}, "alpha_pattern": {"c_attn": 11}, "use_rslora": True}),
        ("gpt2", {"bias": "all"}),
        ("bert", {"bias": "all"}),
        ("bert", {"bias": "lora_only"}),
        ("bart", {"bias": "lora_only", "lora_bias": True}),
        ("llama", {"lora_bias": True}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["layers.1.mlp.down_proj", "norm"]}),
        ("bert", {"modules_to_save": ["pooler"]}),
        ("bart", {"modules_to_save": ["embed_positions"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
        ("bart", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        ("llama", {"init_lora_weights": "gaussian"}),
        ("bert", {"target_modules": ["dense"]}),
    ],
    ids=str,
)
def test_lora_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    round_trip(name, lora(name, **options), tmp_path)


def test_head_without_task_type_stays_untrained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, config = round_trip(
        "bert", peft.LoraConfig(target_modules=["query", "dense"], r=16, lora_alpha=64), tmp_path
    )
    assert not model.adapters["a"].method.head
    assert config["task_type"] is None and config["modules_to_save"] is None


@pytest.mark.parametrize("name", [*MAIN, "t5"])
def test_ia3(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    round_trip(name, peft.IA3Config(task_type=TASKS[name]), tmp_path)


@pytest.mark.parametrize("name", [*MAIN, "qwen3", "llama_cls"])
def test_prompt(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    round_trip(name, peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=3), tmp_path)


@pytest.mark.parametrize("name", [*MAIN, "qwen3", "llama_cls"])
@pytest.mark.parametrize("projection", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_prefix(name: str, projection: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"prefix_projection": projection, "encoder_hidden_size": 16, "num_virtual_tokens": 3}
    round_trip(name, peft.PrefixTuningConfig(task_type=TASKS[name], **options), tmp_path)


@pytest.mark.parametrize(("name", "field"), [("mt5", "num_decoder_layers"), ("bart", "decoder_layers")])
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_aliased_prefix_is_read(name: str, field: str, layers: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    depth = {field: layers, "num_layers" if name == "mt5" else "encoder_layers": layers}
    config = peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=3)
    round_trip(name, config, tmp_path, **depth)


def our_adapter(name: str, method: graft.LoRA, peft_compat: bool = False, **options: Any) -> nn.Module:
    model = tiny(name, **options)
    graft.attach(model, method, "a", peft_compat=peft_compat)
    shaken(model.adapters, lambda n, p: True)
    return model.eval()


def test_prefix_of_odd_depth_is_permuted_for_peft(tmp_path: Path) -> None:
    depth = {"num_decoder_layers": 3, "num_layers": 3}
    model = our_adapter("mt5", graft.PrefixTuning(length=3), **depth)
    graft.save(model, "a", tmp_path / "a", form="peft")
    got = read_by_peft("mt5", tmp_path / "a", **depth)
    torch.testing.assert_close(got, graft_logits(model, "mt5"), atol=1e-5, rtol=1e-5)


def test_prefix_of_even_depth_is_not_approximated(tmp_path: Path) -> None:
    model = our_adapter("bart", graft.PrefixTuning(length=3))
    with pytest.raises(graft.AdapterFileError, match=r"4l mod 2L.*peft_compat=True"):
        graft.save(model, "a", tmp_path / "a", form="peft")
    assert not (tmp_path / "a").exists()
    graft.save(model, "a", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "GRAFT_PREFIX_TUNING"
    with pytest.raises(Exception, match="GRAFT_PREFIX_TUNING"):
        read_by_peft("bart", tmp_path / "a")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"targets": ("attention.query", "attention.value")},
        {"targets": ("attention.value", "attention.output"), "lora_bias": True, "bias": "lora_only"},
        {"targets": ("attention.query",), "rank_pattern": {"c_attn": 3}},
        {"targets": ("attention.query", "attention.value"), "layers": 1},
    ],
    ids=str,
)
def test_parts_of_a_fused_linear(options: dict[str, Any], rslora: bool, tmp_path: Path) -> None:
    model = our_adapter("gpt2", graft.LoRA(rank=2, alpha=5, rslora=rslora, **options))
    graft.save(model, "a", tmp_path / "a", form="peft")
    want = graft_logits(model, "gpt2")
    torch.testing.assert_close(read_by_peft("gpt2", tmp_path / "a"), want, atol=1e-5, rtol=1e-5)
    again = tiny("gpt2")
    adapter = graft.load(again, tmp_path / "a")
    assert adapter.method == model.adapters["a"].method and not adapter.peft_compat
    assert torch.equal(graft_logits(again, "gpt2"), want)
    site = model.adapters["a"].at("transformer.h.1.attn.c_attn")
    assert torch.equal(adapter.at("transformer.h.1.attn.c_attn").B, site.B)


def test_ia3_on_parts_of_a_fused_linear(tmp_path: Path) -> None:
    model = our_adapter("gpt2", graft.IA3())
    graft.save(model, "a", tmp_path / "a", form="peft")
    want = graft_logits(model, "gpt2")
    torch.testing.assert_close(read_by_peft("gpt2", tmp_path / "a"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_what_peft_reads_of_our_defaults(name: str, tmp_path: Path) -> None:
    """Without peft_compat too, wherever the form is the same."""
    for method in (graft.LoRA(rank=2), graft.IA3(), graft.PrefixTuning(length=2), graft.PromptTuning(length=2)):
        model = our_adapter(name, method)
        folder = graft.save(model, "a", tmp_path / method.name)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["peft_type"].startswith("GRAFT_"):
            assert (name, method.name) in {
                ("bert", "prompt_tuning"),
                ("mt5", "prefix_tuning"),
                ("bart", "prefix_tuning"),
            }
            continue
        got = read_by_peft(name, folder)
        torch.testing.assert_close(got, graft_logits(model, name), atol=1e-5, rtol=1e-5)


def test_adapter_in_a_sub_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    model = peft.get_peft_model(tiny("llama"), lora("llama", init_lora_weights=False), adapter_name="legal")
    model.save_pretrained(tmp_path / "out")
    ours = tiny("llama")
    assert graft.load(ours, tmp_path / "out").name == "legal"
    torch.testing.assert_close(graft_logits(ours, "llama"), peft_logits(model, "llama"), atol=1e-5, rtol=1e-5)
    shutil.copytree(tmp_path / "out" / "legal", tmp_path / "out" / "polite")
    with pytest.raises(graft.AdapterFileError, match="legal, polite"):
        graft.load(ours, tmp_path / "out")


def test_minimal_folder_with_an_unknown_empty_field(tmp_path: Path) -> None:
    """The hand-written folder that peft reads too."""
    want = written_by_peft("llama", lora("llama", target_modules=["q_proj"]), tmp_path / "a")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config |= {"inference_mode": True, "some_future_field": None, "another": {}, "third": [], "fourth": False}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    model = tiny("llama")
    graft.load(model, tmp_path / "a")
    torch.testing.assert_close(graft_logits(model, "llama"), want, atol=1e-5, rtol=1e-5)


def test_prompt_with_one_stack_in_an_encoder_decoder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"num_virtual_tokens": 3, "num_transformer_submodules": 1}
    want = written_by_peft("mt5", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", **options), tmp_path / "a")
    model = tiny("mt5")
    graft.load(model, tmp_path / "a")
    torch.testing.assert_close(graft_logits(model, "mt5"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_attach_takes_peft_configs(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = {"num_virtual_tokens": 3}
    configs = [
        lora(name),
        peft.IA3Config(task_type=TASKS[name]),
        peft.PromptTuningConfig(task_type=TASKS[name], **rows),
        peft.PrefixTuningConfig(task_type=TASKS[name], **rows),
    ]
    for config in configs:
        model = tiny(name)
        adapter = graft.attach(model, config)
        assert adapter.peft_compat
        theirs = peft.get_peft_model(tiny(name), config)
        assert adapter.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
