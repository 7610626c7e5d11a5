"""Our own folders: every method comes back bit for bit, and a write that fails leaves everything as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from folders import attached, logits, logits_of_plain
from torch import nn

import graft
import graft.methods
from examples import instances
from graft import files_disk
from graft.method import REGISTRY, Method, from_dict
from tiny import tiny

MORE: list[Method] = [
    graft.LoRA(rank=2, targets=("ffn.down", "embedding"), layers=None, head=False),
    graft.LoRA(rank=2, targets="all-linear", exclude=("ffn.down",), bias="all", rslora=True, dropout=0.1),
    graft.LoRA(
        rank=2, rank_pattern={"v.*": 3, "q.*": 1}, alpha_pattern={"v.*": 3.5}, layers=range(1, 2), init="gaussian"
    ),
    graft.PrefixTuning(length=2, hidden=5),
    graft.PromptTuning(length=2, init="vocab"),
    graft.Bottleneck(size=2, kind="parallel", layers=1),
    graft.LoRA(rank=2, modules_to_save=("norm", "dense")),
]
WIDE = [pytest.param(name, marks=pytest.mark.wide) for name in ("gpt2", "gemma2", "t5", "llama_cls")]
NAMES = ["llama", "bert", "bart", *WIDE]


def check_round_trip(model: nn.Module, name: str, folder: Path) -> Path:
    graft.save(model, "a", folder)
    again = tiny(name)
    adapter, first = graft.load(again, folder, "b"), model.adapters["a"]
    assert adapter.method == first.method.saved_as(first) and adapter.peft_compat == first.peft_compat
    assert adapter.saved == first.saved and not adapter.trainable
    first.requires_grad_(False)  # a frozen DoRA folds its gain into B, which rounds otherwise
    assert torch.equal(logits(again, name), logits(model, name))
    if not adapter.selected:
        graft.detach(again)
        assert torch.equal(logits_of_plain(again, name), logits_of_plain(tiny(name), name))
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_every_method_comes_back(method: str, name: str, tmp_path: Path) -> None:
    check_round_trip(attached(name, instances(method, name)[0]), name, tmp_path / "a")


@pytest.mark.parametrize("name", ["bart", *(pytest.param(name, marks=pytest.mark.wide) for name in ("gpt2", "bert"))])
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_peft_compat_comes_back(method: str, name: str, tmp_path: Path) -> None:
    check_round_trip(attached(name, instances(method, name)[0], peft_compat=True), name, tmp_path / "a")


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.wide)])
@pytest.mark.parametrize("method", MORE[:-1], ids=lambda m: f"{m.name}{len(m.to_dict())}")
def test_settings_come_back(method: Method, name: str, tmp_path: Path) -> None:
    check_round_trip(attached(name, method), name, tmp_path / "a")


@pytest.mark.parametrize("where", ["encoder", "cross", ("encoder", "decoder", "cross")])
def test_prefix_elsewhere_comes_back(where: Any, tmp_path: Path) -> None:
    check_round_trip(attached("bart", graft.PrefixTuning(length=2, where=where)), "bart", tmp_path / "a")


def test_text_prompt_needs_no_tokenizer_to_come_back(tmp_path: Path) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) + 5 for word in text.split()]}

    method = graft.PromptTuning(length=3, init="text", text="one three fifteen", tokenizer=tokenizer)
    check_round_trip(attached("llama", method), "llama", tmp_path / "a")


def test_loaded_adapter_trains_if_asked_and_leaves_randomness_alone(tmp_path: Path) -> None:
    graft.save(attached("llama", graft.LoRA(rank=2)), "a", tmp_path / "a")
    model = tiny("llama")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    adapter = graft.load(model, tmp_path / "a", trainable=True)
    assert torch.equal(torch.rand(3), want)
    assert adapter.name == "a" and adapter.trainable == adapter.saved
    graft.load(model, tmp_path / "a", "second")
    assert model.adapters.used == (("a", 1.0),), "what is in use stays in use"


def test_own_form_says_so_and_needs_no_card(tmp_path: Path) -> None:
    model = attached("bert", graft.Bottleneck(size=3))
    folder = graft.save(model, "a", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK" and config["format_version"] == 1
    (folder / "graft.json").unlink()
    again = tiny("bert")
    graft.load(again, folder)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_folder_is_small_and_holds_the_template(tmp_path: Path) -> None:
    model = attached("llama", graft.LoRA(rank=2))
    folder = graft.save(model, "a", tmp_path / "deep" / "er" / "a", template={"name": "plain"})
    assert sorted(item.name for item in folder.iterdir()) == sorted(
        [files_disk.CONFIG, files_disk.TENSORS, files_disk.CARD]
    )
    held = safetensors.torch.load_file(folder / files_disk.TENSORS)
    assert sum(tensor.numel() for tensor in held.values()) == model.adapters["a"].saved
    again = tiny("llama")
    graft.load(again, folder, "b")
    graft.save(again, "b", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "graft.json").read_text())["template"] == {"name": "plain"}
    assert (tmp_path / "b" / files_disk.TENSORS).read_bytes() == (folder / files_disk.TENSORS).read_bytes()


def test_select_method_is_saved_with_its_values_even_out_of_use(tmp_path: Path) -> None:
    model = attached("llama", graft.TopLayers(count=1))
    want = logits(model, "llama")
    graft.use(model, None)
    before = copy.deepcopy(model.state_dict())
    graft.save(model, "a", tmp_path / "a")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = tiny("llama")
    graft.load(again, tmp_path / "a")
    assert torch.equal(logits(again, "llama"), want)
    graft.detach(again)
    assert torch.equal(logits_of_plain(again, "llama"), logits_of_plain(tiny("llama"), "llama"))


def test_base_alone_is_saved_after_a_prefix_with_mlp_was_loaded(tmp_path: Path) -> None:
    graft.save(attached("llama", graft.PrefixTuning(length=2, hidden=4)), "a", tmp_path / "a")
    model = tiny("llama")
    graft.load(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "base")
    keys = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert set(keys) == set(tiny("llama").state_dict())


# ------------------------------------------------------------------------------------------------- nothing half-written


@pytest.mark.parametrize("at", ["write_json", "checksum", "rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
@pytest.mark.parametrize("over", [False, True])
def test_a_write_that_fails_leaves_everything(
    at: str, error: BaseException, over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached("llama", graft.LoRA(rank=2))
    folder = tmp_path / "deep" / "a"
    if over:
        graft.save(model, "a", folder)
        (folder / "notes.txt").write_text("mine")
    before = {item: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()}
    with torch.no_grad():
        next(model.adapters["a"].parameters()).add_(1.0)

    def fails(*_: object, **__: object) -> None:
        raise error

    rename = Path.rename

    def fails_late(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise error
        return rename(path, target)

    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr(Path, "rename", fails_late)
        else:
            patch.setattr(files_disk, at, fails)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else graft.AdapterFileError
        with pytest.raises(expected):
            graft.save(model, "a", folder, overwrite=over)
    assert {item: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()} == before
    assert over or not list(tmp_path.iterdir())
    graft.save(model, "a", folder, overwrite=over)


def test_overwriting_keeps_other_files(tmp_path: Path) -> None:
    model = attached("llama", graft.LoRA(rank=2))
    folder = graft.save(model, "a", tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "x").write_text("y")
    first = (folder / files_disk.TENSORS).read_bytes()
    with torch.no_grad():
        next(model.adapters["a"].parameters()).add_(1.0)
    with pytest.raises(graft.AdapterFileError, match="overwrite=True"):
        graft.save(model, "a", folder)
    assert (folder / files_disk.TENSORS).read_bytes() == first
    graft.save(model, "a", folder, overwrite=True)
    assert (folder / files_disk.TENSORS).read_bytes() != first
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "more" / "x").read_text() == "y"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(graft.AdapterFileError, match="something else"):
        graft.save(attached("llama", graft.LoRA(rank=2)), "a", tmp_path, overwrite=True)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


def test_method_of_json_is_the_method() -> None:
    for method in MORE:
        assert from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_whoever_may_read_the_config_may_read_the_tensors(tmp_path: Path) -> None:
    folder = graft.save(attached("llama", graft.LoRA()), "a", tmp_path / "a")
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1
