"""AdapterHub's folders: names, shapes and settings as the library writes them, and its own forward in dense algebra.

`adapterhub.json` is what adapters 1.3.0 (on transformers 4.57.6) wrote for the tiny models.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from folders import attached, logits, logits_of_plain
from torch import Tensor, nn
from torch.nn import functional as F

import graft
from examples import perturb
from graft.foreign.adapter_hub import _factor, _size, labels_of, read_adapter_hub, write_adapter_hub
from tiny import tiny

THEIRS = json.loads((Path(__file__).parent / "adapterhub.json").read_text())
KINDS = {"double": "houlsby", "double_cross": "houlsby", "seq": "pfeiffer", "par": "parallel"}
CASES = [(arch, kind) for arch, kinds in THEIRS["places"].items() for kind in kinds]
PRE = ("gpt2", "llama", "llama_cls", "mistral", "t5", "mt5")
CLASS_HEADS = {"bert": "classifier", "roberta": "classifier", "distilbert": "pre_classifier", "llama_cls": "score"}


def tensors_of(arch: str, kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    places, shapes = THEIRS["places"][arch][kind], THEIRS["shapes"][kind]
    return {f"{place}.task.{key}": 0.3 * torch.randn(shape) for place in places for key, shape in shapes.items()}


def folder_of(tmp_path: Path, arch: str, kind: str, **fields: Any) -> Path:
    """A folder as the library writes it, without a head."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(tensors_of(arch, kind), folder / "pytorch_adapter.bin")
    config = tiny(arch).config
    told = THEIRS["folder"] | {"model_type": config.model_type, "hidden_size": config.hidden_size}
    told |= {"config": THEIRS["configs"][kind] | fields}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def theirs(model: Any, arch: str, kind: str, tensors: dict[str, Tensor]) -> None:
    """Patch a model to compute what the library does: `pre_forward`, `forward` and `post_forward` of its adapters."""
    config = THEIRS["configs"][kind]
    act = {"relu": F.relu, "swish": F.silu}[config["non_linearity"]]

    def mlp(place: str, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            tensors[f"{place}.task.{key}"]
            for key in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
        )
        return config["scaling"] * F.linear(act(F.linear(x, down, down_bias)), up, up_bias)

    def post_norm(module: nn.Module, place: str) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(hidden: Tensor, stream: Tensor) -> Tensor:
            u = module.dense(hidden)  # type: ignore[operator]
            norm: Any = module.LayerNorm
            if config["is_parallel"]:
                return norm(u + mlp(place, stream) + stream)
            read = norm(u + stream) if config["original_ln_before"] else u
            return norm(mlp(place, read) + u + stream)

        return forward

    def pre_norm(end: nn.Module, norm: nn.Module, place: str) -> None:
        stream: list[Tensor] = []
        norm.register_forward_pre_hook(lambda _, args: stream.append(args[0]))

        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            x = stream.pop()
            return out + mlp(place, out + x if config["original_ln_before"] else out)

        end.register_forward_hook(hook)

    for place in THEIRS["places"][arch][kind]:
        parts = place.split(".")
        if arch in ("bert", "roberta"):
            module = model.get_submodule(place.removesuffix(".adapters"))
            module.forward = post_norm(module, place)
        elif arch in ("gpt2", "llama"):
            block = model.get_submodule(".".join(parts[:-2]))
            attention = parts[-2] == "attention_adapters"
            if arch == "gpt2":
                ends, norms = (block.attn.c_proj, block.ln_1), (block.mlp, block.ln_2)
            else:
                ends, norms = (
                    (block.self_attn.o_proj, block.input_layernorm),
                    (
                        block.mlp,
                        block.post_attention_layernorm,
                    ),
                )
            pre_norm(*(ends if attention else norms), place)
        else:
            layer = model.get_submodule(place.removesuffix(".adapters"))
            end = next(
                getattr(layer, n) for n in ("SelfAttention", "EncDecAttention", "DenseReluDense") if hasattr(layer, n)
            )
            pre_norm(end.wo if hasattr(end, "wo") else end.o, layer.layer_norm, place)


ALIKE = [(arch, kind) for arch, kind in CASES if kind != "par" or arch not in PRE]


@pytest.mark.parametrize(("arch", "kind"), [c for c in ALIKE if c[0] in ("bert", "roberta", "gpt2", "llama", "t5")])
def test_equals_the_librarys_forward(tmp_path: Path, arch: str, kind: str) -> None:
    expected = tiny(arch)
    theirs(expected, arch, kind, tensors_of(arch, kind))
    model = tiny(arch)
    adapter = read_adapter_hub(model, folder_of(tmp_path, arch, kind), "a")
    assert isinstance(adapter.method, graft.Bottleneck) and adapter.method.kind == KINDS[kind]
    found, want = logits(model, arch), logits_of_plain(expected, arch)
    assert (want - logits_of_plain(tiny(arch), arch)).abs().max() > 1e-3
    assert torch.allclose(found, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_there_and_back(tmp_path: Path, arch: str, kind: str) -> None:
    """Each name, shape and setting is the library's, and what was read is written again bit by bit."""
    source = folder_of(tmp_path, arch, kind)
    model = tiny(arch)
    if (arch, kind) not in ALIKE:
        with pytest.raises(graft.AdapterFileError, match="reads the normed stream"):
            read_adapter_hub(model, source)
        assert not hasattr(model, "adapters")
        return
    read_adapter_hub(model, source, "task")
    lost = write_adapter_hub(model, "task", tmp_path / "ours")
    assert len(lost) == 1 and "dropout" in lost[0]
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    tensors = safetensors.torch.load_file(tmp_path / "ours" / "adapter.safetensors")
    expected = tensors_of(arch, kind)
    assert set(tensors) == set(expected) and all(torch.equal(tensors[key], expected[key]) for key in expected)
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    told = json.loads((source / "adapter_config.json").read_text())
    size = THEIRS["shapes"][kind]["adapter_up.bias"][0] // told["config"].pop("reduction_factor")
    assert size == THEIRS["shapes"][kind]["adapter_up.bias"][0] // ours["config"].pop("reduction_factor")
    config = ours.pop("config")
    assert {**told["config"], **config} == told["config"] and set(ours) | {"config"} == set(told)
    assert (ours["name"], ours["model_type"], ours["hidden_size"]) == ("task", told["model_type"], 32)


@pytest.mark.parametrize("arch", CLASS_HEADS)
def test_the_task_head_goes_along(tmp_path: Path, arch: str) -> None:
    model = attached(arch, graft.Bottleneck(size=3, kind="pfeiffer"))
    write_adapter_hub(model, "a", tmp_path / "out")
    assert labels_of(tmp_path / "out") == 3
    head = safetensors.torch.load_file(tmp_path / "out" / "model_head.safetensors")
    assert any(key.startswith(CLASS_HEADS[arch]) for key in head)
    again = tiny(arch)
    with torch.no_grad():
        for parameter in (p for key, p in again.named_parameters() if key in head):
            parameter.zero_()
    read_adapter_hub(again, tmp_path / "out", "b")
    assert torch.allclose(logits(again, arch), logits(model, arch), atol=1e-6)


def test_layers_sizes_and_old_names(tmp_path: Path) -> None:
    model = attached("llama", graft.Bottleneck(size=7, kind="pfeiffer", layers=(1,), scale=2.5, activation="tanh"))
    write_adapter_hub(model, "a", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]
    assert config["leave_out"] == [0] and config["scaling"] == 2.5 and int(32 // config["reduction_factor"]) == 7
    file = tmp_path / "out" / "adapter.safetensors"
    old = {
        key.removeprefix("model.").replace(".adapters.", ".layer_text_task_adapters."): value
        for key, value in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(old, file)
    again = tiny("llama")
    method = read_adapter_hub(again, tmp_path / "out", "b").method
    assert isinstance(method, graft.Bottleneck) and method.layers == (1,) and method.size == 7
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_every_size_has_a_factor() -> None:
    for width in (96, 100, 768, 4096):
        assert all(_size(_factor(size, width), width) == size for size in range(1, width + 1))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_gating": True}, "use_gating = True is not supported"),
    ({"dropout": 0.1}, "dropout = 0.1 is not supported"),
    ({"phm_layer": True}, "phm_layer"),
    ({"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
    ({"ln_after": True}, "ln_after"),
    ({"newer_field": 3}, "newer_field = 3"),
    ({"architecture": "lora"}, "'lora' is no bottleneck"),
    ({"original_ln_after": False}, "original_ln_after"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add'.*none of the forms"),
    ({"mh_adapter": True}, "mh_adapter = True"),
    ({"scaling": "learned"}, "scaling = 'learned' is trained"),
    ({"reduction_factor": {"0": 2, "default": 4}}, "differs by layer"),
    ({"reduction_factor": 0}, "no positive number"),
    ({"non_linearity": "leakyrelu"}, "non_linearity = 'leakyrelu'"),
    ({"leave_out": [0, 1]}, "leave|layers"),
]


@pytest.mark.parametrize(("fields", "match"), FIELDS)
def test_a_field_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    refused(folder_of(tmp_path, "bert", "seq", **fields), match)


def refused(folder: Path, match: str, arch: str = "bert") -> None:
    model = tiny(arch)
    keys = set(model.state_dict())
    with pytest.raises(graft.AdapterFileError, match=match) as caught:
        read_adapter_hub(model, folder)
    assert "\n" not in str(caught.value)
    assert set(model.state_dict()) == keys and not hasattr(model, "adapters")


def test_another_base_or_kind_of_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert", "seq")
    refused(folder, "made for a base with model_type 'bert', this one has 'roberta'", "roberta")
    refused(folder, "not for qwen2", "qwen2")
    (folder / "adapter_interface.json").write_text("{}")
    refused(folder, "interface")
    (folder / "adapter_interface.json").unlink()
    (folder / "head_config.json").write_text(json.dumps({"config": {"head_type": "classification"}}))
    refused(folder, "a 'classification' head of the library's own")
    (folder / "head_config.json").write_text(json.dumps({"config": None}))
    refused(folder, "neither model_head.safetensors nor pytorch_model_head.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"config": "pfeiffer", "name": "task"}))
    refused(folder, "no settings under config")
    ours = graft.save(attached("bert", graft.LoRA(rank=2)), "a", tmp_path / "lora")
    refused(ours, "not of AdapterHub")


def test_gelu_of_old_files_is_another_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert", "seq", non_linearity="gelu")
    assert read_adapter_hub(tiny("bert"), folder).method.activation == "gelu"  # type: ignore[attr-defined]
    told = json.loads((folder / "adapter_config.json").read_text())
    del told["version"]
    (folder / "adapter_config.json").write_text(json.dumps(told))
    refused(folder, "'gelu_new' is none of")


def test_bad_tensors(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "opened",)

    folder = folder_of(tmp_path, "bert", "seq")
    file = folder / "pytorch_adapter.bin"
    good = tensors_of("bert", "seq")
    key = next(iter(good))
    for bad, match in (
        (good | {"bert.extra": torch.zeros(1)}, r"extra \(1,\) has no place"),
        ({k: v for k, v in good.items() if k != key}, "1 tensors are missing"),
        (good | {key: torch.zeros(6, 31)}, r"has shape \(6, 31\), this model needs \(6, 32\)"),
        (good | {key: torch.full((6, 32), torch.nan)}, "not finite"),
        (good | {key: torch.zeros(6, 32, dtype=torch.int8)}, "a tensor of torch.int8"),
        (good | {key: 3}, "is a int"),
    ):
        torch.save(bad, file)
        refused(folder, match)
    file.write_bytes(pickle.dumps({key: Trap()}))
    refused(folder, "more than plain tensors")
    torch.save({key: Trap()}, file)
    refused(folder, "more than plain tensors")
    assert not (tmp_path / "opened").exists()
    file.write_bytes(b"cut")
    refused(folder, "damaged")
    file.unlink()
    refused(folder, "neither adapter.safetensors nor pytorch_adapter.bin")


def test_a_language_models_head_must_be_the_bases(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", "seq")
    (folder / "head_config.json").write_text(json.dumps({"config": None}))
    weight = tiny("llama").lm_head.weight.detach()
    torch.save({"lm_head.weight": weight.clone()}, folder / "pytorch_model_head.bin")
    assert not read_adapter_hub(tiny("llama"), folder).method.head
    torch.save({"lm_head.weight": weight + 1}, folder / "pytorch_model_head.bin")
    refused(folder, "another lm_head.weight", "llama")


WRITES = [
    ("llama", graft.LoRA(rank=2), "for bottleneck adapters, not lora"),
    ("llama", graft.Bottleneck(size=4), "trains the base's norms"),
    ("llama", graft.Bottleneck(size=4, kind="parallel"), "reads the normed stream"),
    ("t5", graft.Bottleneck(size=4, kind="pfeiffer", layers=1), "one row for both stacks"),
    ("gemma2", graft.Bottleneck(size=4, kind="pfeiffer"), "not for gemma2"),
    ("bert", graft.Bottleneck(size=4, kind="pfeiffer", modules_to_save=("pooler",)), "all of bert.pooler"),
    ("llama", graft.Compose(graft.Bottleneck(size=4), graft.PromptTuning(length=2)), "is composed"),
]


@pytest.mark.parametrize(("arch", "method", "match"), WRITES, ids=lambda v: getattr(v, "name", v))
def test_what_the_form_cannot_hold(tmp_path: Path, arch: str, method: Any, match: str) -> None:
    with pytest.raises(graft.AdapterFileError, match=match):
        write_adapter_hub(attached(arch, method), "a", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    model = attached("llama", graft.Bottleneck(size=4, train_norms=False))
    write_adapter_hub(model, "a", tmp_path / "out")
    with pytest.raises(graft.AdapterFileError, match="exists"):
        write_adapter_hub(model, "a", tmp_path / "out")
    perturb(model.adapters["a"], size=float("inf"))
    with pytest.raises(graft.AdapterFileError, match="not finite"):
        write_adapter_hub(model, "a", tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
