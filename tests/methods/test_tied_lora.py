"""Tied-LoRA against its product added to the weights by hand, and the paper's table of counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_counts import meta
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from twins import adapted, close, data_of, far, lively

import graft
from examples import perturb
from graft.method import CopyDelta, from_dict
from graft.methods.tied_lora import TiedLoRADelta
from tiny import tiny

# A, B, and u, v: what may train (nothing at all may not).
TABLE = [(A, B, uv) for A in (True, False) for B in (True, False) for uv in (True, False) if A or B or uv]
SWITCHES = ("train_A", "train_B", "train_uv")


def tensors_of(adapter: Any) -> dict[str, torch.Tensor]:
    return {key.replace("/", "."): value for key, value in adapter.shared.state_dict().items()}


def change_at(adapter: Any, path: str, share: bool) -> torch.Tensor:
    """diag(v) B diag(u) A of a linear, with the tensors looked up by the names that they must have."""
    shared = tensors_of(adapter)
    first = next(part for part in path.split(".") if part.isdigit())
    pattern = path.replace(f".{first}.", ".", 1)
    joint = share and path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v")
    joint = joint and "EncDecAttention" not in path and "encoder_attn" not in path
    A = shared[f"A.{pattern.rpartition('.')[0] if joint else pattern}"]
    B = shared[f"B.{pattern}"]
    u = shared.get(f"u.{path.rpartition('.')[0] if joint else path}", torch.ones(len(A), dtype=A.dtype))
    v = adapter.at(path).tied_v
    return torch.diag(torch.ones(len(B), dtype=B.dtype) if v is None else v) @ B @ torch.diag(u) @ A


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"share_A": False}, {"train_uv": False}, {"train_A": False, "targets": "all-linear"}],
    ids=["shared", "apart", "matrices", "all-linear"],
)
def test_adds_the_tied_product_to_each_weight(arch: str, settings: dict[str, Any]) -> None:
    method = graft.TiedLoRA(rank=4, head=False, **settings)
    model, data, hand = adapted(arch, method).double(), data_of(arch), lively(arch).double()
    adapter = model.adapters["a"]
    for path in adapter.sites:
        if not any(part.isdigit() for part in path.split(".")):
            continue  # BERT's pooler stands alone
        module, change = hand.get_submodule(path), change_at(adapter, path, method.share_A)
        with torch.no_grad():
            module.weight += change.T if isinstance(module, Conv1D) else change
    if arch == "bert" and "targets" in settings:
        with torch.no_grad():
            hand.bert.pooler.dense.weight += adapter.at("bert.pooler.dense").weight_delta()
    far(model(**data).logits, lively(arch).double()(**data).logits)
    close(model(**data).logits, hand(**data).logits)


@pytest.mark.parametrize("switches", TABLE, ids=str)
def test_every_start_is_the_base_and_can_be_left(switches: tuple[bool, bool, bool]) -> None:
    """What is said to train is what trains, and after three steps each of it has moved."""
    model, data = lively("llama"), data_of("llama", labels=True)
    before = model(**data).logits
    torch.manual_seed(0)
    method = graft.TiedLoRA(rank=4, **dict(zip(SWITCHES, switches, strict=True)))
    adapter = graft.attach(model, method)
    assert torch.equal(model(**data).logits, before)
    names = {name: p for name, p in adapter.named_parameters()}
    kinds = {name.split(".")[1] if name.startswith("shared.") else name.rpartition(".")[2] for name in names}
    A, B, uv = switches
    assert kinds == {*(["A"] if A else []), *(["B"] if B else []), *(["u", "tied_v"] if uv else [])}
    start = {name: p.detach().clone() for name, p in names.items()}
    frozen = {name: b.clone() for name, b in adapter.named_buffers()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in names.items())
    assert all(torch.equal(b, frozen[name]) for name, b in adapter.named_buffers())


def test_layers_share_matrices_and_have_vectors_of_their_own() -> None:
    adapter = graft.attach(tiny("llama"), graft.TiedLoRA(rank=4))
    assert set(tensors_of(adapter)) == {
        "A.model.layers.self_attn",
        *(f"B.model.layers.self_attn.{name}_proj" for name in "qkv"),
        *(f"u.model.layers.{i}.self_attn" for i in range(2)),
    }
    assert len({id(p) for p in adapter.parameters()}) == len(list(adapter.parameters())) == 4 + 2 + 6
    apart = graft.attach(tiny("llama"), graft.TiedLoRA(rank=4, share_A=False))
    assert len([key for key in tensors_of(apart) if key.startswith("A.")]) == 3
    t5 = tensors_of(graft.attach(tiny("t5"), graft.TiedLoRA(rank=4, targets=("attention.query", "attention.key"))))
    assert {key for key in t5 if key.startswith("A.")} == {
        "A.encoder.block.layer.0.SelfAttention",
        "A.decoder.block.layer.0.SelfAttention",
        "A.decoder.block.layer.1.EncDecAttention.q",  # it reads another input than the key
        "A.decoder.block.layer.1.EncDecAttention.k",
    }


def test_fused_qkv_is_one_and_its_parts_have_their_rows() -> None:
    whole = graft.attach(tiny("gpt2"), graft.TiedLoRA(rank=4))
    assert {key: tuple(t.shape) for key, t in tensors_of(whole).items() if key[0] in "AB"} == {
        "A.transformer.h.attn.c_attn": (4, 32),
        "B.transformer.h.attn.c_attn": (96, 4),
    }
    assert whole.trainable == 4 * 32 * 4 + 2 * (4 + 3 * 32)
    model, data, hand = (
        adapted("gpt2", graft.TiedLoRA(rank=4, targets=("attention.value",))),
        data_of("gpt2"),
        lively("gpt2"),
    )
    for i, block in enumerate(hand.transformer.h):
        with torch.no_grad():
            change = change_at(model.adapters["a"], f"transformer.h.{i}.attn.c_attn", True)
            block.attn.c_attn.weight[:, 64:] += change.T
    far(model(**data).logits, lively("gpt2")(**data).logits)
    close(model(**data).logits, hand(**data).logits)


def test_dropout_acts_in_training_on_its_own_branch_only() -> None:
    model = adapted("llama", graft.TiedLoRA(rank=4, dropout=0.5))
    path = "model.layers.1.self_attn.q_proj"
    x_BTI, y_BTO = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    model.train()
    torch.manual_seed(7)
    dropped = model.adapters["a"].at(path).after(x_BTI, y_BTO)
    torch.manual_seed(7)
    close(dropped, y_BTO + F.dropout(x_BTI, 0.5) @ change_at(model.adapters["a"], path, True).T)


def test_combines_to_one_lora() -> None:
    model, data = adapted("gpt2", graft.TiedLoRA(rank=4, targets=("attention.value", "ffn.up"))), data_of("gpt2")
    perturb(graft.attach(model, graft.LoRA(rank=2), "lora"), 3, 0.3)
    graft.use(model, {"a": 0.5, "lora": 2.0})
    expected = model(**data).logits
    graft.combine(model, {"a": 0.5, "lora": 2.0}, "sum")
    graft.use(model, "sum")
    close(model(**data).logits, expected)


# --------------------------------------------------------------------------------------------------------------- counts

D, R, L = 4096, 8, 32
COUNTS = {
    (True, True, False): 131_072,
    (True, True, True): 524_544,
    (False, False, True): 393_472,
    (False, True, False): 98_304,
    (True, False, False): 32_768,
    (False, True, True): 98_304 + 393_472,
    (True, False, True): 32_768 + 393_472,
}


@pytest.mark.parametrize("switches", sorted(COUNTS), ids=str)
def test_counts_of_the_paper_on_llama_7b(switches: tuple[bool, bool, bool]) -> None:
    """4 d r of LoRA on a fused qkv in 32 layers is 4,194,304; A and B are saved once, whether they train or not."""
    A, B, uv = switches
    adapter = graft.attach(meta("Llama-2-7B"), graft.TiedLoRA(rank=R, train_A=A, train_B=B, train_uv=uv))
    assert adapter.trainable == COUNTS[switches] == D * R * A + 3 * D * R * B + L * (R + 3 * D) * uv
    assert adapter.saved == 4 * D * R + L * (R + 3 * D) * uv


def test_counts_without_sharing_and_with_grouped_heads() -> None:
    adapter = graft.attach(meta("Llama-2-7B"), graft.TiedLoRA(rank=R, share_A=False))
    assert adapter.trainable == 6 * D * R + L * (3 * R + 3 * D)
    adapter = graft.attach(meta("Llama-3-8B"), graft.TiedLoRA(rank=R))
    assert adapter.trainable == R * (D + D + 2 * 1024) + L * (R + D + 2 * 1024)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("switches", [(True, True, True), (False, False, True), (True, True, False)], ids=str)
def test_folder_holds_the_matrices_once(arch: str, switches: tuple[bool, bool, bool], tmp_path: Path) -> None:
    method = graft.TiedLoRA(rank=4, **dict(zip(SWITCHES, switches, strict=True)))
    model, data = adapted(arch, method), data_of(arch)
    folder = graft.save(model, "a", tmp_path / "a")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == model.adapters["a"].saved
    again = lively(arch)
    adapter = graft.load(again, folder, trainable=True)
    assert torch.equal(again(**data).logits, model(**data).logits)
    assert adapter.trainable == model.adapters["a"].trainable
    vectors = {key for key in tensors if key.endswith(".tied_v")}
    own = [site for site, delta in adapter.items() if not isinstance(delta, CopyDelta)]
    assert len(vectors) == (len(own) if switches[2] else 0)


def test_errors() -> None:
    for settings, message in (
        ({"rank": 0}, "rank must be"),
        ({"dropout": 1.0}, "dropout"),
        (dict.fromkeys(SWITCHES, False), "nothing would train"),
    ):
        with pytest.raises(graft.ConfigError, match=message):
            graft.TiedLoRA(**settings)  # type: ignore[arg-type]
    with pytest.raises(graft.SiteError, match="TiedLoRA acts on linears"):
        graft.attach(tiny("llama"), graft.TiedLoRA(targets=("embedding",)))
    method = graft.TiedLoRA(rank=3, train_A=False, share_A=False)
    assert from_dict(method.to_dict()) == method


@pytest.mark.parametrize(("into", "out"), [(32, 24), (24, 32)])
def test_layers_of_unequal_shapes_are_refused(into: int, out: int) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj = nn.Linear(into, out, bias=False)
    with pytest.raises(graft.SiteError, match=r"layers\.1\.self_attn\.q_proj cannot share .*layers\.0\.self_attn") as e:
        graft.attach(model, graft.TiedLoRA(rank=4))
    assert "\n" not in str(e.value) and not hasattr(model, "adapters")
    adapter = graft.attach(model, graft.TiedLoRA(rank=4, layers=(1,), share_A=False))
    assert all(isinstance(delta, TiedLoRADelta) for _, delta in adapter.items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_saves_as_plain_lora_on_request(arch: str, tmp_path: Path) -> None:
    """peft and we read the same logits; the adapter itself stays what it is."""
    import peft

    model, data = adapted(arch, graft.TiedLoRA(rank=4)), data_of(arch)
    random = torch.get_rng_state()
    folder = graft.save(model, "a", tmp_path / "a", form="peft")
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model.adapters["a"].method) is graft.TiedLoRA
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    close(peft.PeftModel.from_pretrained(lively(arch), folder).eval()(**data).logits, model(**data).logits)
    again = lively(arch)
    assert type(graft.load(again, folder).method) is graft.LoRA
    close(again(**data).logits, model(**data).logits)
