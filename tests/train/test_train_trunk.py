"""Runs that keep the frozen trunk's states: the same losses and adapter, with fewer forwards; and when they do not."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_train_run import lines

import graft
from graft.base import load_base
from graft.errors import ConfigError
from graft.fast.store import Store
from graft.methods.lora import LoRA
from graft.train.config import Run
from graft.train.run import train
from graft.train.schedule import Schedule
from graft.train.trunk import open_trunk, spare

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


@pytest.fixture
def base(bases: Path, tmp_path: Path) -> str:
    """A tiny T5 without dropout."""
    shutil.copytree(bases / "t5", tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}), encoding="utf-8")
    return str(tmp_path / "t5")


DECODER = LoRA(rank=4, targets=r"decoder\..*\.(q|v)")


def test_a_decoder_is_trained_and_its_encoder_runs_once_for_each_text(
    base: str, settings: Settings, tmp_path: Path
) -> None:
    plain, kept, text = pair(settings, tmp_path, base=base, method=DECODER)
    assert "the encoder (2 of 4 blocks) is frozen" in text and "were skipped for" in text
    for a, b in zip(lines(plain.folder), lines(kept.folder), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
    _, text = told(settings(base=base, train={"epochs": 2.0, "max_steps": None}, output=str(tmp_path / "both")))
    assert "frozen" not in text


def passes(folder: str, jobs: list[Any]) -> list[list[int]]:
    """Runs over bases, precisions and batches that share a folder: the tokens that each computed and found."""
    found = []
    for base, precision, batches in jobs:
        model = load_base(base, precision=precision)
        graft.attach(model, LoRA(layers=1), "a")
        with open_trunk(model, None, Schedule([4], batch_size=1), (), 0, Path("unused"), Path(folder)) as trunk:
            assert trunk is not None
            for ids in map(torch.tensor, batches):
                with trunk.serving({"input_ids": ids}):
                    model(input_ids=ids)
            found.append([trunk.computed, trunk.served])
    return found


ELSEWHERE = "import json, sys; from test_train_trunk import passes; print(json.dumps(passes(*json.loads(sys.argv[1]))))"


def test_runs_in_other_processes_find_the_states_of_the_same_base_and_data(bases: Path, tmp_path: Path) -> None:
    rows = [[[5, 6, 7, 8], [9, 10, 11, 12]], [[13, 14, 15, 16], [17, 18, 19, 20]]]
    base, other = str(bases / "llama"), tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    folder = str(tmp_path / "kept")
    assert passes(folder, [(base, "fp32", rows)]) == [[16, 0]]
    more = [rows[0], [[21, 22, 23, 24]]]
    again = [(base, "fp32", rows), (base, "fp32", more), (str(other), "fp32", rows), (base, "bf16", rows)]
    command = [sys.executable, "-c", ELSEWHERE, json.dumps([folder, [*again, (base, "fp32", rows)]])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert json.loads(out) == [[0, 16], [4, 8], [16, 0], [16, 0], [0, 16]]


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


def test_memory_that_is_spare_is_what_the_container_has_left_beside_the_largest_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, resident = torch.device("cpu"), psutil.Process().memory_info().rss
    monkeypatch.setattr("graft.train.trunk.available", lambda: 10 << 30)
    monkeypatch.setattr("graft.train.trunk.peak_bytes", lambda device: 0)
    assert spare(cpu) == 10 << 30
    monkeypatch.setattr("graft.train.trunk.peak_bytes", lambda device: resident + (6 << 30))
    assert spare(cpu) == pytest.approx(4 << 30, rel=0.05)
    monkeypatch.setattr("graft.train.trunk.peak_bytes", lambda device: resident + (60 << 30))
    assert spare(cpu) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    assert spare(torch.device("cuda")) == 800


def test_what_the_longest_batch_needs_is_not_kept_for_states(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([4_000_000, 4])  # before the trial of the longest batch, and behind it
    monkeypatch.setattr("graft.train.trunk.spare", lambda device: next(found))
    sizes: list[tuple[Any, ...]] = []

    class Watched(Store):
        def close(self, **how: Any) -> None:
            sizes.append((self.memory, len(self.kept), len(self)))
            super().close(**how)

    monkeypatch.setattr("graft.train.trunk.Store", Watched)
    _, text = told(settings(train={"epochs": 2.0, "max_steps": None}, method=TOP))
    ((memory, kept, texts),) = sizes
    assert memory == 1 and kept <= 4 < texts, "the four rows of the trial, and all others on disk"
    assert "were skipped for" in text
