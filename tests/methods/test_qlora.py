"""QLoRA: codes against the paper's codebook and bitsandbytes, adapters on quantized bases against dequantized ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from transformers import AutoModelForCausalLM
from twins import close, far, lively

import graft
from examples import perturb
from graft import base
from graft.weights import dense, quantized, stored_bytes, weight_OI

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
METHODS: list[Any] = [
    graft.LoRA(rank=4, targets="all-linear"),
    graft.LoRA(rank=4, init="pissa"),
    graft.DoRA(rank=4),
    graft.IA3(),
    graft.VeRA(rank=8),
    graft.LoRAFA(rank=4),
    graft.MultiLoRA(rank=2),
    graft.TiedLoRA(rank=4),
    graft.AdaLoRA(rank=4, target_rank=2),
    graft.GLoRA(rank=2),
    graft.Bottleneck(size=4),
    graft.PrefixTuning(length=3),
    graft.LlamaAdapter(length=3, layers=2),
    graft.NormTuning(),
]


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {kind: base.load_base("embedded", precision=kind, device="cpu") for kind in ("nf4", "int8")}


def codebook() -> Tensor:
    """NF4's sixteen values (Dettmers et al. 2023): quantiles of the normal distribution, and an exact zero."""
    offset = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    positive = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    values = torch.tensor([*negative, 0.0, *positive]).sort().values
    return (values / values.max()).float()


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte with the first in the high half, and each block's largest value."""
    blocks = weight.float().flatten().view(-1, 64)
    largest = blocks.abs().amax(1)
    code = codebook()
    index = torch.bucketize(blocks / largest[:, None], (code[1:] + code[:-1]) / 2)
    pairs = index.flatten().view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).to(torch.uint8), largest


def test_codes_are_bit_for_bit_those_of_the_paper() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384)
    theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, largest = packed(weight)
    assert torch.equal(theirs.flatten(), codes) and torch.equal(state.absmax, largest)
    assert (state.code - codebook()).abs().max() < 5e-7


def test_four_point_one_two_seven_bits_for_each_value() -> None:
    """4 + 8 / 64 + 32 / (64 * 256), and the two tables of 16 and 256 values."""
    module = bnb.nn.Linear4bit(4096, 2048, bias=False, quant_type="nf4", compress_statistics=True)
    module.weight = bnb.nn.Params4bit(torch.randn(2048, 4096), requires_grad=False, quant_type="nf4").to("cpu")
    tables = 4 * (16 + 256 + 1)
    bits = 8 * (stored_bytes(module) - tables) / (2048 * 4096)
    assert abs(bits - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-9
    assert round(8 * stored_bytes(module) / (2048 * 4096), 3) == 4.128
    assert stored_bytes(torch.nn.Linear(8, 4, bias=False)) == 4 * 8 * 4


def test_head_and_embeddings_stay_plain(bases: dict[str, Any]) -> None:
    for model in bases.values():
        assert not quantized(model.lm_head) and not quantized(model.model.embed_tokens)
        assert all(quantized(module) for name, module in model.named_modules() if name.endswith("_proj"))


def plain_twin(model: Any) -> Any:
    """The model with every quantized linear as the matrix that it stands for."""
    twin = base.load_base("embedded", precision="bf16", device="cpu").float()
    for name, module in model.named_modules():
        if quantized(module):
            twin.set_submodule(name, dense(module, torch.float32))
    return twin


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'init', '')}")
def test_every_method_on_nf4_equals_the_dequantized_base(method: Any, bases: dict[str, Any]) -> None:
    model = torch.nn.Module.float(copy.deepcopy(bases["nf4"]))
    for module in model.modules():
        if quantized(module):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    twin = plain_twin(model)
    here, there = graft.attach(model, method, "a"), graft.attach(twin, method, "a")
    perturb(here, 1)
    there.load_state_dict(here.state_dict())
    logits, expected = model(IDS).logits, twin(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    logits.square().mean().backward()
    expected.square().mean().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-3 * q.grad.abs().max() + 1e-6, name
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("adapters."))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", [graft.LoRA(rank=4, targets="all-linear"), graft.DoRA(rank=4), graft.IA3()])
def test_merges_into_plain_weights_on_request_only(
    kind: str, method: Any, bases: dict[str, Any], tmp_path: Path
) -> None:
    model = copy.deepcopy(bases[kind])
    graft.attach(model, method, "a")
    perturb(model.adapters["a"], 1)
    with torch.no_grad():
        before = model(IDS).logits.float()
        with pytest.raises(graft.MergeError, match=r"is quantized .* into='bf16'"):
            graft.merge(model, "a")
        graft.merge(model, "a", into="fp32")
        assert not any(quantized(module) for module in model.modules())
        merged = model.float()(IDS).logits
        assert (merged - before).abs().max() < 0.1 * before.abs().max()
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        close(again(IDS).logits, merged)


def test_unmerge_gives_the_codes_back(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["nf4"])
    graft.attach(model, graft.LoRA(rank=4), "a")
    perturb(model.adapters["a"], 1)
    modules = {name: module for name, module in model.named_modules() if quantized(module)}
    with torch.no_grad():
        before = model(IDS).logits
        graft.merge(model, "a", into="bf16")
        graft.unmerge(model)
        assert torch.equal(model(IDS).logits, before)
    assert {name: module for name, module in model.named_modules() if quantized(module)} == modules
    assert model.is_quantized and model.config.quantization_config is not None


def test_named_qlora_has_the_papers_settings(bases: dict[str, Any], tmp_path: Path) -> None:
    method = graft.QLoRA()
    assert (method.rank, method.alpha, method.dropout, method.targets) == (64, 16, 0.1, "all-linear")
    model = copy.deepcopy(bases["nf4"])
    adapter = perturb(graft.attach(model, graft.QLoRA(rank=4), "a"), 1)
    graft.save(model, "a", tmp_path / "a")
    again = copy.deepcopy(bases["nf4"])
    plain = graft.load(again, tmp_path / "a", "b").method
    assert type(plain) is graft.LoRA and (plain.rank, plain.alpha, plain.targets) == (4, 16, "all-linear")
    assert adapter.method == graft.QLoRA(rank=4)
    graft.load(base.load_base("embedded", precision="bf16", device="cpu"), tmp_path / "a", "c")
    close(again(IDS).logits.float(), model(IDS).logits.float())
    far(again(IDS).logits.float(), bases["nf4"](IDS).logits.float())


def test_refusals(bases: dict[str, Any]) -> None:
    with pytest.raises(graft.ConfigError, match="the base is not quantized; load it in precision nf4 or int8"):
        graft.attach(lively("llama"), graft.QLoRA())
    model = copy.deepcopy(bases["nf4"])
    with pytest.raises(graft.SiteError, match="is quantized and cannot be trained whole"):
        graft.attach(model, graft.LoRA(rank=2, targets=("ffn.up",), modules_to_save=("o_proj",)))
    graft.attach(model, graft.LoRA(rank=2), "a")
    with pytest.raises(graft.MergeError, match="into: 'int4' is not one of bf16, fp16, fp32"):
        graft.merge(model, "a", into="int4")
    plain = lively("llama")
    graft.attach(plain, graft.LoRA(rank=2), "a")
    with pytest.raises(graft.MergeError, match="is for a quantized base"):
        graft.merge(plain, "a", into="bf16")


def test_weight_of_a_quantized_linear_is_a_matrix(bases: dict[str, Any]) -> None:
    module = bases["nf4"].model.layers[0].mlp.up_proj
    assert weight_OI(module).shape == (module.out_features, module.in_features)
