"""Runs that keep the frozen trunk's states: the same losses and adapter, with fewer forwards; and when they do not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train_run import lines

from graft.errors import ConfigError
from graft.methods.lora import LoRA
from graft.train.config import Run
from graft.train.run import train

Settings = Callable[..., Run]
TOP = LoRA(rank=4, layers=1, targets="all-linear")


def told(run: Run) -> tuple[Any, str]:
    out = io.StringIO()
    return train(run, console=Console(file=out, width=200)), out.getvalue()


def pair(settings: Settings, tmp_path: Path, **more: Any) -> tuple[Any, Any, str]:
    train_settings = {"epochs": 2.0, "max_steps": None, **more.pop("train", {})}
    plain, silent = told(
        settings(**more, train={**train_settings, "trunk_cache": False}, output=str(tmp_path / "plain"))
    )
    kept, text = told(settings(**more, train=train_settings, output=str(tmp_path / "kept")))
    assert "frozen blocks" not in silent
    return plain, kept, text


@pytest.mark.parametrize(
    "more",
    [{}, {"data": {"packing": True, "max_length": 64}}, {"train": {"gradient_checkpointing": True}}],
    ids=["rows", "packs", "checkpointing"],
)
def test_the_same_run_with_and_without(more: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    plain, kept, text = pair(settings, tmp_path, method=TOP, **more)
    assert "1 of 2 blocks are frozen below the adapter" in text and "were skipped for" in text
    for a, b in zip(lines(plain.folder), lines(kept.folder), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
    tensors = load_file(kept.adapter / "adapter_model.safetensors")
    for key, value in load_file(plain.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-3, atol=1e-4)
    assert not (kept.folder / "trunk").exists()


def test_one_pass_over_the_data_keeps_nothing(settings: Settings) -> None:
    _, text = told(settings(method=TOP, train={"epochs": 1.0, "max_steps": None}, data={"eval": None}))
    assert "frozen" not in text


def test_an_adapter_in_every_block_has_no_trunk(settings: Settings) -> None:
    _, text = told(settings(train={"epochs": 2.0, "max_steps": None}))
    assert "frozen" not in text


def test_it_is_refused_where_it_is_wanted_and_cannot_be(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.trunk_cache: an adapter acts in the first block"):
        told(settings(train={"trunk_cache": True}))
    assert not (tmp_path / "run").exists()


def test_dropout_is_left_alone_unless_it_is_asked_for(settings: Settings, tmp_path: Path) -> None:
    more = {"epochs": 2.0, "max_steps": None}
    _, text = told(settings(base="gpt2", method=TOP, train=more))
    assert "frozen" not in text
    _, text = told(settings(base="gpt2", method=TOP, train={**more, "trunk_cache": True}, output=str(tmp_path / "on")))
    assert "were skipped for" in text
