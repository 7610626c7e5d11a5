"""VeRA against its product added to the weights by hand, and against peft, both ways, with and without the pair."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from test_counts import SHAPES, meta
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, copy_into, data_of, far, inner, lively, peft_twin

import graft
from examples import perturb
from graft.method import from_dict
from graft.methods.vera import VeRADelta
from tiny import tiny

peft_warns = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
PEFT = ("llama", "gpt2", "bert", "t5", "mt5", "bart")
TASKS = {"bert": "SEQ_CLS"} | dict.fromkeys(("t5", "mt5", "bart"), "SEQ_2_SEQ_LM")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
def test_adds_a_scaled_slice_of_one_pair_to_each_weight(arch: str) -> None:
    """W += diag(b) B[:O] diag(d) A[:, :I]."""
    method = graft.VeRA(rank=4, targets="all-linear", head=False)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    adapter = model.adapters["a"]
    A, B = adapter.shared.A, adapter.shared.B
    for path in adapter.sites:
        delta, module = adapter.at(path), hand.get_submodule(path)
        with torch.no_grad():
            out, into = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            change = torch.diag(delta.lambda_b) @ B[:out] @ torch.diag(delta.lambda_d) @ A[:, :into]
            module.weight += change.T if isinstance(module, Conv1D) else change
    assert A.shape[1] == max(site.in_features for site in adapter.sites.values()) > 32
    assert B.shape[0] == max(site.out_features for site in adapter.sites.values()) > 32
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_start() -> None:
    """lambda_b zero, lambda_d at d_initial, and one pair, which the seed alone decides."""
    adapter = graft.attach(tiny("llama"), graft.VeRA(rank=64, d_initial=0.3, targets=("attention.query", "ffn.down")))
    for _, delta in adapter.items():
        assert not delta.lambda_b.any() and torch.equal(delta.lambda_d, torch.full((64,), 0.3))
    assert adapter.shared.A.shape == (64, 48) and adapter.shared.B.shape == (32, 64)
    for matrix in (adapter.shared.A, adapter.shared.B):
        bound = (6 / matrix.shape[1]) ** 0.5
        assert 0.98 * bound < matrix.abs().max() <= bound
    torch.manual_seed(5)
    targets = ("attention.query", "ffn.down")
    same = graft.attach(tiny("llama"), graft.VeRA(rank=64, targets=targets))
    other = graft.attach(tiny("llama"), graft.VeRA(rank=64, targets=targets, seed=1))
    assert torch.equal(same.shared.A, adapter.shared.A) and not torch.equal(other.shared.A, adapter.shared.A)
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"lambda_b", "lambda_d"}
    assert adapter.trainable == 2 * (32 + 64 + 32 + 64) and adapter.saved == adapter.trainable + 64 * 48 + 32 * 64


def test_parts_of_a_fused_linear() -> None:
    """lambda_b has the rows of the asked parts, and B's rows are those that the whole would take."""
    model, data, hand = (
        adapted("gpt2", graft.VeRA(rank=4, targets=("attention.value",))),
        data_of("gpt2"),
        lively("gpt2"),
    )
    A, B = model.adapters["a"].shared.A, model.adapters["a"].shared.B
    assert B.shape == (96, 4)
    for i, block in enumerate(hand.transformer.h):
        delta = model.adapters["a"].at(f"transformer.h.{i}.attn.c_attn")
        assert delta.lambda_b.shape == (32,)
        with torch.no_grad():
            block.attn.c_attn.weight[:, 64:] += (torch.diag(delta.lambda_b) @ B[64:] @ torch.diag(delta.lambda_d) @ A).T
    far(model(**data).logits, lively("gpt2")(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_dropout_acts_in_training_on_its_own_branch_only() -> None:
    model = adapted("llama", graft.VeRA(rank=4, dropout=0.5))
    adapter = model.adapters["a"]
    delta, A, B = adapter.at("model.layers.0.self_attn.q_proj"), adapter.shared.A, adapter.shared.B
    x_BTI, y_BTO = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    model.train()
    torch.manual_seed(7)
    dropped = delta.after(x_BTI, y_BTO)
    torch.manual_seed(7)
    close(dropped, y_BTO + F.dropout(x_BTI, 0.5) @ A.T @ torch.diag(delta.lambda_d) @ B.T @ torch.diag(delta.lambda_b))


def test_combines_with_lora() -> None:
    model, data = adapted("gpt2", graft.VeRA(rank=4, targets=("attention.value", "ffn.up"))), data_of("gpt2")
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 3, 0.3)
    graft.use(model, {"a": 0.5, "lora": 2.0})
    expected = model(**data).logits
    graft.combine(model, {"a": 0.5, "lora": 2.0}, "sum")
    graft.use(model, "sum")
    close(model(**data).logits, expected)


def test_errors() -> None:
    for settings, message in (
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.0}, "rank: input should be"),
        ({"dropout": 1.0}, "dropout"),
        ({"d_initial": 0}, "never train"),
        ({"d_initial": float("nan")}, "finite"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": "3"}, "seed: input should be"),
    ):
        with pytest.raises(graft.ConfigError, match=message):
            graft.VeRA(**settings)  # type: ignore[arg-type]
    for targets in (("embedding",), ("norm",)):
        with pytest.raises(graft.SiteError, match="VeRA acts on linears"):
            graft.attach(tiny("llama"), graft.VeRA(targets=targets))
    method = graft.VeRA(rank=3, seed=4, targets="all-linear")
    assert from_dict(method.to_dict()) == method


# --------------------------------------------------------------------------------------------------------------- counts

# The column of peft's defaults, task heads included.
COUNTS = {
    "bert-base": 26_114,
    "bert-large": 63_490,
    "roberta-base": 616_706,
    "gpt2": 30_720,
    "gpt2-medium": 79_872,
    "gpt2-large": 147_456,
    "Llama-2-7B": 278_528,
    "Llama-3-8B": 180_224,
    "Qwen2.5-0.5B": 36_864,
    "Qwen2.5-7B": 129_024,
    "t5-base": 73_728,
    "bart-large": 92_160,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_of_public_shapes(name: str) -> None:
    assert graft.attach(meta(name), graft.VeRA(), peft_compat=True).trainable == COUNTS[name]


def test_counts_of_the_paper() -> None:
    """0.043M for RoBERTa-base at rank 1024, 0.061M for large at 256; our own GPT-2 has no values for the keys."""
    assert graft.attach(meta("roberta-base"), graft.VeRA(rank=1024, head=False)).trainable == 43_008
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        large = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**{**SHAPES["roberta-base"][2], **sizes})
        )
    assert graft.attach(large, graft.VeRA(rank=256, head=False)).trainable == 61_440
    adapter = graft.attach(meta("gpt2"), graft.VeRA())
    assert adapter.trainable == 12 * (256 + 2 * 768)
    assert adapter.saved == adapter.trainable + 256 * 768 + 2304 * 256


# ----------------------------------------------------------------------------------------------------------------- peft


def config(arch: str, **options: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of save_projection=False
        return peft.VeraConfig(task_type=TASKS.get(arch, "CAUSAL_LM"), **{"r": 4, "d_initial": 0.5, **options})


@pytest.mark.parametrize("arch", PEFT)
def test_equals_peft_with_its_own_draw_of_the_pair(arch: str) -> None:
    """The pair is not copied: our seed gives peft's."""
    theirs = config(arch, projection_prng_key=3)
    model, other = lively(arch), peft_twin(arch, theirs)
    adapter = perturb(graft.attach(model, theirs, "a"), 1, 0.3)
    assert adapter.peft_compat and adapter.method.seed == 3
    wrapped = {name for name, m in other.base_model.model.named_modules() if hasattr(m, "vera_lambda_d")}
    assert {s.path for s, delta in adapter.items() if isinstance(delta, VeRADelta)} == wrapped
    for site, delta in adapter.items():
        if isinstance(delta, VeRADelta):
            copy_into(inner(other, site.path).vera_lambda_b["default"], delta.lambda_b)
            copy_into(inner(other, site.path).vera_lambda_d["default"], delta.lambda_d)
        else:
            inner(other, site.path).modules_to_save["default"].load_state_dict(delta.copy.state_dict())
    data = data_of(arch)
    far(model(**data).logits, lively(arch)(**data).logits)
    close(model(**data).logits, other(**data).logits)


@torch.no_grad()
def written_by_peft(arch: str, theirs: Any, folder: Path) -> Tensor:
    model = peft_twin(arch, theirs)
    generator = torch.Generator().manual_seed(11)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model(**data_of(arch)).logits


@torch.no_grad()
def read_by_peft(arch: str, folder: Path) -> Tensor:
    import peft

    return peft.PeftModel.from_pretrained(lively(arch), folder).eval()(**data_of(arch)).logits


def check_round_trip(arch: str, theirs: Any, tmp_path: Path) -> dict[str, Any]:
    """peft -> us -> peft -> us, with our card and as a bare folder of peft."""
    want, model = written_by_peft(arch, theirs, tmp_path / "theirs"), lively(arch)
    far(want, model(**data_of(arch)).logits)
    graft.load(model, tmp_path / "theirs", "a")
    close(model(**data_of(arch)).logits, want)
    folder = graft.save(model, "a", tmp_path / "ours", form="peft")
    close(read_by_peft(arch, folder), want)
    for card in (True, False):
        again = lively(arch)
        if not card:
            (folder / "graft.json").unlink()
        graft.load(again, folder)
        assert torch.equal(again(**data_of(arch)).logits, model(**data_of(arch)).logits)
    return json.loads((folder / "adapter_config.json").read_text())


@peft_warns
@pytest.mark.parametrize("arch", PEFT)
def test_files_of_peft_and_for_peft(arch: str, tmp_path: Path) -> None:
    written = check_round_trip(arch, config(arch), tmp_path)
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert written["save_projection"] is True and written["fan_in_fan_out"] == theirs["fan_in_fan_out"]
    tensors = [
        safetensors.torch.load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")
    ]
    assert {key: value.shape for key, value in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}


@peft_warns
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"save_projection": False, "projection_prng_key": 7}),
        ("gpt2", {"save_projection": False, "target_modules": "all-linear"}),
        ("bart", {"save_projection": False, "target_modules": ["q_proj", "fc1", "fc2"], "r": 8}),
        ("llama", {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1], "vera_dropout": 0.1}),
        ("bert", {"target_modules": r".*layer\.1.*\.(query|dense)", "modules_to_save": ["pooler"]}),
    ],
)
def test_files_of_other_settings(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    written = check_round_trip(arch, config(arch, **options), tmp_path)
    assert written["save_projection"] is True
    assert written["projection_prng_key"] == options.get("projection_prng_key", 0)


@peft_warns
def test_parts_of_a_fused_linear_are_whole_in_the_file(tmp_path: Path) -> None:
    model, data = adapted("gpt2", graft.VeRA(rank=4)), data_of("gpt2")
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "base_model.model.transformer.h.0.attn.c_attn.vera_lambda_b"
    assert not tensors[key][32:64].any() and tensors[key][:32].all()
    close(read_by_peft("gpt2", folder), model(**data).logits)
    again = lively("gpt2")
    graft.load(again, folder)
    assert torch.equal(again(**data).logits, model(**data).logits)
    card = json.loads((folder / "graft.json").read_text())
    tensors[key][40] = 1.0
    safetensors.torch.save_file(tensors, file)
    (folder / "graft.json").write_text(json.dumps({**card, "tensors_sha256": None, "probe": None}))
    with pytest.raises(graft.AdapterFileError, match="parts of a fused linear"):
        graft.load(lively("gpt2"), folder, "b")


@peft_warns
def test_bad_files(tmp_path: Path) -> None:
    written_by_peft("llama", config("llama", save_projection=False), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    model = lively("llama")
    drawn = graft.load(model, tmp_path / "a").shared
    graft.detach(model)
    tensors |= {"base_model.vera_A": drawn.A, "base_model.vera_B": drawn.B}
    safetensors.torch.save_file(tensors, file)
    graft.load(model, tmp_path / "a")
    graft.detach(model)
    safetensors.torch.save_file({**tensors, "base_model.vera_A": drawn.A + 1}, file)
    with pytest.raises(graft.AdapterFileError, match="another pair than projection_prng_key"):
        graft.load(model, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    del tensors["base_model.vera_A"]
    safetensors.torch.save_file(tensors, file)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**settings, "save_projection": True}))
    with pytest.raises(graft.AdapterFileError, match=r"missing, the first is base_model.vera_A"):
        graft.load(model, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**settings, "bias": "vera_only"}))
    with pytest.raises(graft.AdapterFileError, match="bias = 'vera_only'"):
        graft.load(model, tmp_path / "a")
    with pytest.raises(graft.ConfigError, match="init_weights"):
        graft.attach(model, config("llama", init_weights=False))
    assert not hasattr(model, "adapters")


def test_the_stored_pair_counts_and_not_the_seed(tmp_path: Path) -> None:
    model, data = adapted("llama", graft.VeRA(rank=4)), data_of("llama")
    model.adapters["a"].shared.A.mul_(2)
    folder = graft.save(model, "a", tmp_path / "a")
    again = lively("llama")
    assert torch.equal(graft.load(again, folder).shared.A, model.adapters["a"].shared.A)
    assert torch.equal(again(**data).logits, model(**data).logits)
