"""What loading does once or not at all, and that nothing is missed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

import graft
from graft import roles, vocabulary
from graft.errors import AdapterFileError
from graft.files_disk import TENSORS, check_finite
from tiny import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with LoRA on all linears of the tiny Llama, of random values."""
    model = tiny("llama")
    graft.attach(model, graft.LoRA(rank=4, targets="all-linear", init="random"), "a")
    return graft.save(model, "a", tmp_path / "a")


def test_modules_are_found_once_inside_of_unchanged_and_anew_after_it() -> None:
    model = tiny("llama")
    with vocabulary.unchanged():
        first = roles.sites(model, unnamed=True)
        with vocabulary.unchanged():
            named = roles.sites(model)
        model.extra = nn.Linear(2, 2)
        again = roles.sites(model, unnamed=True)
        assert again == first and again is not first and len(named) <= len(first)
        again.clear()
        assert roles.sites(model, unnamed=True) == first
        assert roles.sites(tiny("gpt2"), unnamed=True) != first
    assert [site.path for site in roles.sites(model, unnamed=True)][-1] == "extra"


def test_an_error_ends_unchanged() -> None:
    model = tiny("llama")
    with pytest.raises(KeyError), vocabulary.unchanged():
        roles.sites(model, unnamed=True)
        raise KeyError
    model.extra = nn.Linear(2, 2)
    assert any(site.path == "extra" for site in roles.sites(model, unnamed=True))


def test_a_load_names_the_modules_of_its_base_twice(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, real = tiny("llama"), [0], vocabulary.name_roles

    def counted(*args: Any) -> dict[str, str]:
        calls[0] += 1
        return real(*args)

    monkeypatch.setattr(vocabulary, "name_roles", counted)
    for name in ("x", "y"):
        calls[0] = 0
        graft.load(model, saved, name)
        assert calls[0] == 2  # with and without the modules that have no role


def test_a_load_draws_nothing_and_has_the_values_of_the_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny("llama"), safetensors.torch.load_file(saved / TENSORS)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a value was drawn")

    with monkeypatch.context() as patch:
        patch.setattr(nn.init, "kaiming_uniform_", refuse)
        adapter = graft.load(model, saved, "x")
    for site, delta in adapter.items():
        for key in "AB":
            want = file[f"base_model.model.{site.path}.lora_{key}.weight"]
            assert torch.equal(getattr(delta, key), want)
    fresh = graft.attach(model, graft.LoRA(rank=4, targets="all-linear"), "y")
    assert all(bool(value.any()) for name, value in fresh.named_parameters() if name.endswith(".A"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_finite_may_have_a_sum_that_is_not(dtype: torch.dtype) -> None:
    largest = torch.full((2, 32), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(largest.sum())
    check_finite({"large": largest, "empty": largest[:0]}, "here")
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(AdapterFileError, match="here: odd has values"):
            odd = torch.ones(3, 32, dtype=dtype)
            odd[1, 7] = bad
            check_finite({"large": largest, "odd": odd}, "here")
    both = torch.tensor([float("inf"), -float("inf"), 0.0], dtype=dtype)
    with pytest.raises(AdapterFileError):
        check_finite({"both": both}, "here")


def keys(model: PreTrainedModel, *names: str) -> set[str]:
    held = [(name, key) for name in names for key in model.adapters[name].state_dict()]
    return {f"adapters.held.:{name}.{key}" for name, key in held} | {"adapters."}


def test_the_keys_that_a_save_of_the_base_leaves_out_are_those_of_who_is_there(saved: Path) -> None:
    model = tiny("llama")
    before = getattr(model, "_keys_to_ignore_on_save", None)
    for name in ("x", "y"):
        graft.load(model, saved, name)
    assert model._keys_to_ignore_on_save == keys(model, "x", "y") | set(before or ())
    graft.detach(model, "x")
    assert model._keys_to_ignore_on_save == keys(model, "y") | set(before or ())
    graft.attach(model, graft.LoRA(rank=2), "x")
    assert model._keys_to_ignore_on_save == keys(model, "x", "y") | set(before or ())
    graft.detach(model)
    assert not (model._keys_to_ignore_on_save or set()) - set(before or ())
