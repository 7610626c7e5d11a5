"""loralib's checkpoints against its own layers in dense algebra: Linear, the grouped MergedLinear, Embedding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from folders import attached, logits, logits_of_plain
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import graft
from graft.foreign.loralib import labels_of, read_loralib, write_loralib
from tiny import tiny

ALPHA = 12.0


def pair(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def dense(A: Tensor, B: Tensor, enabled: list[bool], out: int) -> Tensor:
    """The (O, I) change of loralib's MergedLinear, as its `train(False)` merges it."""
    groups = sum(enabled)
    low = F.conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=groups).squeeze(0)
    full = torch.zeros(out, A.shape[1])
    index = torch.zeros(len(enabled), out // len(enabled), dtype=torch.bool)
    index[torch.tensor(enabled)] = True
    full[index.flatten()] = low
    return full * ALPHA / B.shape[1]


def add(model: nn.Module, path: str, delta_OI: Tensor) -> None:
    module: Any = model.get_submodule(path)
    module.weight.data += delta_OI.T if isinstance(module, Conv1D | nn.Embedding) else delta_OI


def grouped(
    layers: range = range(2), enabled: tuple[bool, ...] = (True, False, True), rank: int = 2
) -> dict[str, Tensor]:
    """The checkpoint of loralib's GPT-2 example."""
    torch.manual_seed(3)
    count = sum(enabled)
    keys = [f"transformer.h.{layer}.attn.c_attn" for layer in layers]
    return {
        f"{key}.lora_{half}": tensor
        for key in keys
        for half, tensor in (("A", pair(rank * count, 32)), ("B", pair(32 * count, rank)))
    }


def check(file: Path, arch: str, expected: Any, **options: Any) -> Any:
    model = tiny(arch)
    adapter = read_loralib(model, file, "a", alpha=ALPHA, **options)
    found, want = logits(model, arch), logits_of_plain(expected, arch)
    assert (want - logits_of_plain(tiny(arch), arch)).abs().max() > 1e-3
    assert torch.allclose(found, want, rtol=1e-4, atol=2e-6)
    return adapter


ENABLED = [
    ((True, False, True), range(2), ("attention.query", "attention.value")),
    ((False, True, False), range(2), ("attention.key",)),
    ((True, True, True), range(2), None),
    ((True, False, True), range(1), None),
]


@pytest.mark.parametrize(("enabled", "layers", "words"), ENABLED)
def test_merged_linear(tmp_path: Path, enabled: tuple[bool, ...], layers: range, words: Any) -> None:
    """In all layers the blocks stay blocks; elsewhere, and where all three are enabled, they are one pair."""
    tensors = grouped(layers, enabled)
    torch.save({"model_state_dict": {f"module.{key}": value for key, value in tensors.items()}}, tmp_path / "x.pt")
    expected = tiny("gpt2")
    for layer in layers:
        path = f"transformer.h.{layer}.attn.c_attn"
        add(expected, path, dense(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], list(enabled), 96))
    parts = tuple(part for part, on in zip(("query", "key", "value"), enabled, strict=True) if on)
    adapter = check(tmp_path / "x.pt", "gpt2", expected, parts=() if all(enabled) else parts)
    assert len(adapter.sites) == len(layers)
    assert words is None or set(adapter.method.targets) == set(words)


def test_linear_embedding_ranks_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "roberta.encoder.layer.0.attention.self.query.lora_A": pair(4, 32),
        "roberta.encoder.layer.0.attention.self.query.lora_B": pair(32, 4),
        "roberta.encoder.layer.0.attention.self.query.bias": pair(32),
        "roberta.encoder.layer.1.output.dense.lora_A": pair(2, 48),
        "roberta.encoder.layer.1.output.dense.lora_B": pair(32, 2),
        "roberta.encoder.layer.1.output.dense.bias": pair(32),
        "roberta.embeddings.word_embeddings.lora_A": pair(2, 99),
        "roberta.embeddings.word_embeddings.lora_B": pair(32, 2),
        "classifier.dense.weight": pair(32, 32),
        "classifier.dense.bias": pair(32),
        "classifier.out_proj.weight": pair(3, 32),
        "classifier.out_proj.bias": pair(3),
    }
    torch.save(tensors, tmp_path / "x.bin")
    assert labels_of(tmp_path / "x.bin") == 3
    expected = tiny("roberta")
    for key in tensors:
        path, _, leaf = key.rpartition(".")
        if leaf == "lora_A":
            B = tensors[f"{path}.lora_B"]
            add(expected, path, ALPHA / B.shape[1] * B @ tensors[key])
        elif leaf != "lora_B":
            expected.get_parameter(key).data.copy_(tensors[key])
    adapter = check(tmp_path / "x.bin", "roberta", expected)
    assert (adapter.method.bias, adapter.method.head, adapter.method.rank) == ("lora_only", True, 2)
    assert write_loralib(tiny_with(adapter, tmp_path), "a", tmp_path / "y.bin") == (f"lora_alpha={ALPHA:g}",)
    again = torch.load(tmp_path / "y.bin", weights_only=True)
    assert set(again) == set(tensors) and all(torch.equal(again[key], tensors[key]) for key in tensors)


def tiny_with(adapter: Any, tmp_path: Path) -> Any:
    """The same adapter once more on a fresh model, by way of the file."""
    model = tiny("roberta")
    read_loralib(model, tmp_path / "x.bin", adapter.name, alpha=ALPHA)
    return model


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("arch", "method", "parts"),
    [
        ("gpt2", graft.LoRA(rank=2, alpha=ALPHA, dropout=0.1), ("query", "value")),
        ("llama", graft.LoRA(rank=2, alpha=ALPHA, targets="all-linear"), ()),
        ("roberta", graft.LoRA(rank=3, alpha=ALPHA, bias="all"), ()),
        ("llama", graft.LoRA(rank=4, alpha=ALPHA / 2, rslora=True), ()),
        ("llama", graft.LoRA(rank=2, alpha=ALPHA, init="pissa"), ()),
        ("llama", graft.MultiLoRA(rank=2, count=3, targets="all-linear"), ()),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_out_and_in(tmp_path: Path, arch: str, method: Any, parts: tuple[str, ...], suffix: str) -> None:
    model = attached(arch, method)
    lost = write_loralib(model, "a", tmp_path / f"x{suffix}")
    told = float(lost[0].removeprefix("lora_alpha="))
    assert told == (6.0 if method.name == "multi_lora" else 2 * ALPHA if method.to_dict().get("init") else ALPHA)
    assert any("enable_lora=[True, False, True]" in each and "1 more" in each for each in lost) == bool(parts)
    assert ("lora_dropout=0.1" in lost) == bool(parts)
    again = tiny(arch)
    read_loralib(again, tmp_path / f"x{suffix}", "a", alpha=told, parts=parts)
    assert torch.allclose(logits(again, arch), logits(model, arch), rtol=1e-4, atol=2e-6)


def refused(file: Path, match: str, error: Any = graft.AdapterFileError, arch: str = "gpt2", **options: Any) -> None:
    model = tiny(arch)
    with pytest.raises(error, match=match) as caught:
        read_loralib(model, file, **({"alpha": ALPHA} | options))
    assert "\n" not in str(caught.value) and not hasattr(model, "adapters")


def test_what_the_file_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(grouped(), file)
    error = graft.ConfigError
    refused(file, "alpha: .* does not hold it", error, alpha=None)
    refused(file, "parts: .* has 2 of query, key, value", error)
    refused(file, "parts: query are not 2 of", error, parts=("query",))
    refused(file, "parts: query, gate are not", error, parts=("query", "gate"))
    refused(file, "alpha", error, alpha=0.0, parts=("query", "value"))
    torch.save(
        {"model.layers.0.mlp.up_proj.lora_A": pair(2, 32), "model.layers.0.mlp.up_proj.lora_B": pair(48, 2)}, file
    )
    refused(file, "parts: no pair", error, "llama", parts=("query",))


def test_bad_files(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    file, good = tmp_path / "x.pt", grouped()
    key = "transformer.h.0.attn.c_attn.lora_A"
    refused(file, "no such file")
    for bad, match in (
        ({k: v for k, v in good.items() if k != key}, f"{key} is missing"),
        (good | {key: pair(4, 31)}, "do not fit its weight, 96 by 32"),
        (good | {key: pair(5, 32)}, "do not fit its weight"),
        (good | {key: pair(128)}, "no pair of matrices"),
        (good | {"transformer.wpe.weight": pair(1)}, "wpe.weight .* has no place"),
        (
            good
            | {"transformer.h.9.attn.c_attn.lora_A": pair(4, 32), "transformer.h.9.attn.c_attn.lora_B": pair(64, 2)},
            "h.9.attn.c_attn is no linear or embedding",
        ),
        ({"transformer.wte.weight": pair(1)}, "no lora_A and lora_B"),
        ({key.replace("lora_A", "lora_A.weight"): pair(4, 32)}, "peft's"),
        ({"model_state_dict": good, "step": torch.tensor(3)}, "model_state_dict is a"),
        ([good], "it holds a list"),
        ({key: Trap()}, "more than plain tensors"),
    ):
        torch.save(bad, file)
        refused(file, match, parts=("query", "value"))
    assert not (tmp_path / "opened").exists()


def test_a_fused_linear_that_loralib_cuts_elsewhere(tmp_path: Path) -> None:
    """GPT-NeoX has query, key and value in turns for each head; loralib's blocks are thirds."""
    path = "gpt_neox.layers.0.attention.query_key_value"
    torch.save({f"{path}.lora_A": pair(4, 32), f"{path}.lora_B": pair(64, 2)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "3 blocks in a row", arch="gpt_neox", parts=("query", "value"))
    with pytest.raises(graft.AdapterFileError, match="not 3 equal blocks in a row"):
        write_loralib(attached("gpt_neox", graft.LoRA(rank=2)), "a", tmp_path / "y.pt")
    with pytest.raises(graft.AdapterFileError, match="not 3 equal blocks in a row"):
        write_loralib(attached("phi3", graft.LoRA(rank=2)), "a", tmp_path / "y.pt")


WRITES = [
    (graft.DoRA(rank=2), "low-rank pairs; dora has none at model.layers.0"),
    (graft.Bottleneck(size=2), "norm|low-rank pairs; bottleneck has none"),
    (graft.LoRA(rank=2, lora_bias=True), "lora_bias"),
    (graft.LoRA(rank=2, modules_to_save=("norm",)), "trains all of model.norm"),
    (
        graft.LoRA(rank=2, alpha_pattern={"layers.1.self_attn.v_proj": 3}),
        "lora_alpha would be 16 .* and 3 in .*layers.1",
    ),
]


@pytest.mark.parametrize(("method", "match"), WRITES, ids=lambda value: getattr(value, "name", None))
def test_what_the_form_cannot_hold(tmp_path: Path, method: Any, match: str) -> None:
    with pytest.raises(graft.AdapterFileError, match=match):
        write_loralib(attached("llama", method), "a", tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_where_it_is_written(tmp_path: Path) -> None:
    model = attached("llama", graft.LoRA(rank=2))
    with pytest.raises(graft.AdapterFileError, match="end its name in one of"):
        write_loralib(model, "a", tmp_path / "x")
    write_loralib(model, "a", tmp_path / "new" / "x.safetensors")
    assert len(safetensors.torch.load_file(tmp_path / "new" / "x.safetensors")) == 8
    with pytest.raises(graft.AdapterFileError, match="exists"):
        write_loralib(model, "a", tmp_path / "new" / "x.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.safetensors"]
