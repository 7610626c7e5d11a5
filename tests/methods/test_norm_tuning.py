"""Norm tuning against norms written into the base by hand, and peft's LN_TUNING both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_counts import meta
from torch import Tensor, nn
from twins import adapted, close, data_of, far, lively, peft_twin

import graft
from graft import vocabulary
from graft.method import from_dict
from graft.methods.norm_tuning import NormDelta
from tiny import MODELS, tiny

ARCHS = ("llama", "gpt2", "bert", "t5", "mt5", "bart", "qwen3", "gemma2", "opt")
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@torch.no_grad()
def by_hand(arch: str, adapter: Any) -> nn.Module:
    """The tiny model with every trained copy's values in its norm."""
    model = lively(arch)
    for site, delta in adapter.items():
        assert isinstance(delta, NormDelta)
        model.get_submodule(site.path).load_state_dict(delta.copy.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_equals_norms_written_into_the_base(arch: str) -> None:
    model, data = adapted(arch, graft.NormTuning(head=False)), data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, by_hand(arch, model.adapters["a"])(**data).logits)


@pytest.mark.parametrize("arch", sorted(set(MODELS) - {"vit"}))
def test_takes_every_norm(arch: str) -> None:
    model = tiny(arch)
    norms = {path for path, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    adapter = graft.attach(model, graft.NormTuning(head=False))
    assert set(adapter.sites) == norms and len(norms) > 2


def test_formulas_of_both_kinds() -> None:
    x_BTD = torch.randn(2, 3, 32)
    rms = adapted("llama", graft.NormTuning()).adapters["a"].at("model.norm")
    mean_square = x_BTD.square().mean(-1, keepdim=True)
    expected = rms.copy.weight * x_BTD / (mean_square + rms.copy.variance_epsilon).sqrt()
    close(rms.after(x_BTD, torch.zeros_like(x_BTD)), expected)
    layer = adapted("gpt2", graft.NormTuning()).adapters["a"].at("transformer.ln_f")
    centred = x_BTD - x_BTD.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + layer.copy.eps).sqrt()
    close(layer.after(x_BTD, torch.zeros_like(x_BTD)), layer.copy.weight * normed + layer.copy.bias)


def test_roles_names_and_layers_choose() -> None:
    final = graft.attach(tiny("llama"), graft.NormTuning(targets=("norm.final",)))
    assert list(final.sites) == ["model.norm"]
    named = graft.attach(
        tiny("bert"), graft.NormTuning(targets=("LayerNorm",), exclude=("norm.embedding",), head=False)
    )
    assert len(named.sites) == 4
    top = graft.attach(tiny("llama"), graft.NormTuning(layers=1))
    assert {site.layer for site, _ in top.items()} == {1}
    head = graft.attach(tiny("bert"), graft.NormTuning())
    assert "classifier" in head.sites and not isinstance(head.at("classifier"), NormDelta)


def test_a_half_precision_base_has_copies_in_fp32() -> None:
    model = tiny("llama").to(torch.bfloat16)
    adapter = graft.attach(model, graft.NormTuning())
    before = tiny("llama").to(torch.bfloat16)(**data_of("llama")).logits
    logits: Tensor = model(**data_of("llama")).logits
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}
    close(logits.float(), before.float(), 0.02)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bert-base", 38_400),
        ("bert-large", 100_352),
        ("roberta-base", 38_400),
        ("gpt2", 38_400),
        ("gpt2-medium", 100_352),
        ("gpt2-large", 186_880),
        ("Llama-2-7B", 266_240),
        ("Llama-3-8B", 266_240),
        ("t5-base", 47_616),
        ("bart-large", 122_880),
        ("Qwen2.5-0.5B", 21_504),
        ("Qwen2.5-7B", 100_352),
    ],
)
def test_counts_of_peft(name: str, count: int) -> None:
    """The table's: peft's default norms, and for BERT and RoBERTa, which peft has none for, every LayerNorm."""
    bert = "bert" in name
    adapter = graft.attach(meta(name), graft.NormTuning(head=False), peft_compat=not bert)
    assert adapter.trainable == adapter.saved == count


def test_counts_of_every_norm() -> None:
    """Qwen2 has three kinds of norms, not one; BART's embeddings have one each, which peft leaves out."""
    assert graft.attach(meta("Qwen2.5-0.5B"), graft.NormTuning()).trainable == (2 * 24 + 1) * 896
    assert graft.attach(meta("bart-large"), graft.NormTuning()).trainable == 122_880 + 2 * 2 * 1024


def test_errors() -> None:
    with pytest.raises(graft.SiteError, match="NormTuning trains norms, and Linear is none"):
        graft.attach(tiny("llama"), graft.NormTuning(targets=("q_proj",)))
    for arch in ("bert", "roberta", "opt"):
        with pytest.raises(graft.SiteError, match=r"peft names no norms for .*give target_modules"):
            graft.attach(tiny(arch), graft.NormTuning(), peft_compat=True)
    with pytest.raises(graft.ConfigError, match="targets is empty"):
        graft.attach(tiny("llama"), graft.NormTuning(targets=()))
    with pytest.raises(graft.SiteError, match="did you mean 'norm'"):
        graft.attach(tiny("llama"), graft.NormTuning(targets=("norms",)))
    with pytest.raises(graft.ConfigError, match="did you mean 'targets'"):
        from_dict({"method": "norm_tuning", "target": ["norm"]})


def test_json() -> None:
    method = graft.NormTuning(targets=("norm.ffn",), exclude=("ln_2",))
    assert from_dict(method.to_dict()) == method and from_dict({"method": "norm_tuning"}) == graft.NormTuning()


# ------------------------------------------------------------------------------------------------------------- peft

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gemma2": "CAUSAL_LM", "bert": "SEQ_CLS"}
TASKS |= dict.fromkeys(("t5", "mt5", "bart"), "SEQ_2_SEQ_LM")


def theirs(arch: str, **options: Any) -> Any:
    import peft

    names = {"target_modules": ["LayerNorm"]} if arch == "bert" else {}
    return peft.LNTuningConfig(task_type=TASKS[arch], **{**names, **options})


@torch.no_grad()
def moved(peft_model: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def test_the_table_is_pefts() -> None:
    from peft.utils import constants

    table = constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    many = {"llava", "blip-2"}  # models with an image side, where it names more than norms
    assert {kind: set(names) for kind, names in table.items() if kind not in many} == {
        kind: set(names) for kind, names in vocabulary.PEFT_NORMS.items()
    }


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen2", "t5", "mt5", "bart"])
def test_peft_compat_has_pefts_targets(arch: str) -> None:
    adapter = graft.attach(tiny(arch), theirs(arch))
    twin = peft_twin(arch, theirs(arch))
    end = ".ln_tuning_layers"
    paths = {n.removeprefix("base_model.model.").removesuffix(end) for n, _ in twin.named_modules() if n.endswith(end)}
    assert set(adapter.sites) == paths and adapter.peft_compat


@quiet
@pytest.mark.parametrize("arch", sorted(TASKS))
def test_peft_writes_we_load_and_back(arch: str, tmp_path: Path) -> None:
    import peft

    data = data_of(arch)
    twin = moved(peft_twin(arch, theirs(arch)))
    twin.save_pretrained(tmp_path / "theirs")
    want = twin(**data).logits
    model = lively(arch)
    far(want, model(**data).logits)
    graft.load(model, tmp_path / "theirs", "a")
    close(model(**data).logits, want)
    graft.save(model, "a", tmp_path / "ours", form="peft")
    close(peft.PeftModel.from_pretrained(lively(arch), tmp_path / "ours").eval()(**data).logits, want)
    for bare in (False, True):
        if bare:
            (tmp_path / "ours" / "graft.json").unlink()
        again = lively(arch)
        graft.load(again, tmp_path / "ours", "b")
        assert torch.equal(again(**data).logits, model(**data).logits)


@quiet
@pytest.mark.parametrize("arch", ["llama", "bert", "bart"])
def test_our_own_adapter_is_a_peft_folder(arch: str, tmp_path: Path) -> None:
    """All norms, those that peft leaves out by default too, and beside them a module that is kept whole."""
    import peft

    model, data = adapted(arch, graft.NormTuning()), data_of(arch)
    graft.save(model, "a", tmp_path / "a", form="peft")
    close(peft.PeftModel.from_pretrained(lively(arch), tmp_path / "a").eval()(**data).logits, model(**data).logits)


def test_a_folder_whose_target_is_no_norm_is_refused(tmp_path: Path) -> None:
    peft_twin("llama", theirs("llama", target_modules=["norm", "q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(graft.AdapterFileError, match=r"q_proj is a Linear and no norm.*modules_to_save"):
        graft.load(lively("llama"), tmp_path)
