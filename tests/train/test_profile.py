"""`graft train --profile`: the parts sum to the time, each part notices its own work, the shares are counts by hand."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from graft import base, cli
from graft.adapt import attach
from graft.bank import bank_of
from graft.data.collate import Collator
from graft.errors import ConfigError
from graft.fast import low_rank
from graft.methods.lora import LoRA
from graft.train import clock as clocks
from graft.train import profile as profiling
from graft.train import run as running
from graft.train.clock import PARTS, Clock, measuring
from graft.train.config import Run
from graft.train.profile import Profile, advice, page, profile
from graft.train.run import train
from graft.train.setup import open_model, read_data, schedule_of
from graft.train.trainer import GraftTrainer
from tiny import batch, tiny

Settings = Callable[..., Run]
SLEEP = 0.02


def quiet(run: Run) -> Profile:
    return profile(run, console=Console(quiet=True))


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLEEP)
        return function(*args, **kwargs)

    return run


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "WARMUP", 1)
        patch.setattr(profiling, "STEPS", 2)
        yield


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama", {"method": {"method": "lora", "dropout": 0.1}}),
        ("llama", {"method": "prefix_tuning", "train": {"gradient_checkpointing": True}}),
        ("gpt2", {"method": "full", "train": {"accumulate": 2}}),
        ("t5", {"method": "ia3"}),
        ("t5", {"method": {"method": "lora", "targets": "all-linear"}, "train": {"gradient_checkpointing": True}}),
    ],
    ids=["lora", "prefix-checkpointed", "full", "t5", "t5-checkpointed"],
)
def test_the_parts_are_the_time(name: str, parts: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    """Every part that this run has took time, and together they are the time that a clock outside measured."""
    found = quiet(settings(name, **parts))
    assert found.steps == 2 and set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=0.02)
    none = {clocks.ADAPTERS} if parts["method"] == "full" else set()
    assert {part for part, seconds in found.parts.items() if seconds <= 0} == none
    text = (tmp_path / "run" / "profile.md").read_text()
    assert text == page(found) and all(f"| {part} |" in text for part in PARTS)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"profile.md"}


def test_a_profile_changes_no_run(settings: Settings, tmp_path: Path) -> None:
    """A run may start after it, and be profiled when it is finished; its files stay what they are."""
    run = settings(train={"max_steps": 2})
    other = settings(train={"max_steps": 2}, output=str(tmp_path / "other"))
    quiet(run)
    first, second = (train(each, console=Console(quiet=True)) for each in (run, other))
    adapters = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (first, second)]
    assert adapters[0] == adapters[1]
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    quiet(run)
    assert {p for p, old in before.items() if p.read_bytes() != old} <= {first.folder / "profile.md"}


def test_a_profile_that_fails_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tpu"):
        quiet(settings(device="tpu"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="leave --fresh out"):
        profile(settings(), True)


def test_shares_are_counts_by_hand(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batches that the steps trained on, kept on their way; padded, without padding, and of two sides."""
    seen: list[dict[str, Any]] = []
    real = Collator.__call__

    def kept(self: Collator, examples: Any) -> dict[str, Any]:
        seen.append(real(self, examples))
        return seen[-1]

    monkeypatch.setattr(Collator, "__call__", kept)
    for name, data in (("llama", {"padding_free": False, "group": False}), ("llama", {}), ("t5", {"group": False})):
        seen.clear()
        found = quiet(settings(name, data=data))
        # The first is the dry run's; one warm-up step, then the two that are measured; the loader reads one ahead.
        batches = seen[2:4]
        places = padding = trained = 0
        for one in batches:
            for row in range(len(one["input_ids"])):
                mask = (
                    one["attention_mask"][row].tolist() if "attention_mask" in one else [1] * one["input_ids"].numel()
                )
                labels = one["labels"][row].tolist()
                places += len(mask) + (len(labels) if name == "t5" else 0)
                padding += mask.count(0) + (labels.count(-100) if name == "t5" else 0)
                trained += len(labels) - labels.count(-100)
        assert (found.places, found.padding, found.labelled) == (places, padding, trained)
        assert found.padding_share == padding / places and found.labelled_share == trained / (places - padding)
        assert (padding > 0) == (data != {})
        assert f"{found.padding_share:.1%} of the positions" in page(found)


def test_a_classifier_has_no_labelled_share(settings: Settings, sources: dict[str, str]) -> None:
    found = quiet(
        settings("bert", data={"train": sources["labels"], "eval": None, "template": {"mode": "classification"}})
    )
    assert found.labelled_share is None and "one for each row" in page(found)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=0.02)


def opened(run: Run) -> GraftTrainer:
    tokenizer = base.load_tokenizer(run.base)
    data = read_data(run, tokenizer, base.load_config(run.base))
    model = open_model(run, data, tokenizer)
    return running._trainer(run, Path(run.output), model, tokenizer, data, schedule_of(run, data), None, ())


def seconds_of(trainer: Any, steps: int = 1) -> dict[str, float]:
    """The parts of one training step, without the loop around it."""
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(4)]) for _ in range(steps)]
    with measuring(trainer) as clock:
        clock.start()
        (given,), items = trainer.get_batch_samples(iter(batches), 1, torch.device("cpu"))
        trainer.model.train()
        trainer.training_step(trainer.model, given, items)
        clock.stop()
    return clock.seconds


def test_each_part_notices_its_own_work(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made slow appears in its own part and in no other."""
    trainer: Any = opened(settings())
    model = trainer.model
    (adapter,) = bank_of(model)
    _, delta = next(iter(adapter.items()))
    seconds_of(trainer)

    def slows(part: str, owner: Any, name: str) -> None:
        real = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow(real))
            found = seconds_of(trainer)
        assert found[part] >= SLEEP, (part, found)
        assert sum(found.values()) - found[part] - found[clocks.REST] < found[part] + SLEEP or part == clocks.DATA

    slows(clocks.DATA, trainer, "_get_num_items_in_batch")
    slows(clocks.ADAPTERS, delta, "into")
    slows(clocks.ADAPTERS, low_rank._Sum, "backward")
    slows(clocks.LINEARS, low_rank, "through_base")
    slows(clocks.LINEARS, model.model.layers[0].mlp.down_proj, "forward")
    slows(clocks.ATTENTION, model.model.layers[0].self_attn, "forward")
    slows(clocks.LAYERS, model.model.norm, "forward")
    slows(clocks.LOSS, trainer, "_with_penalties")


def test_measuring_leaves_no_trace() -> None:
    """Hooks and replaced functions are gone, and gradients are what they are without them."""
    model = tiny("llama")
    attach(model, LoRA(rank=2), "a")
    trainer: Any = GraftTrainer(model)
    real, hooks = low_rank.through_base, sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    inputs = batch("llama")
    inputs = {**inputs, "labels": inputs["input_ids"]}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        trainer.compute_loss(model, dict(inputs)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with measuring(trainer) as clock:
        clock.start()
        measured = gradients()
        clock.stop()
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert low_rank.through_base is real and "compute_loss" not in vars(trainer)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    _, delta = next(iter(bank_of(model)["a"].items()))
    assert not set(clocks.DELTA) & set(vars(delta))


def test_a_clock_that_stands_still_counts_nothing() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.inside(clocks.LOSS):
        time.sleep(0.01)
    assert not any(clock.seconds.values())
    clock.start()
    with clock.inside(clocks.LOSS), clock.inside(clocks.DATA):
        time.sleep(0.01)
    clock.stop()
    assert clock.seconds[clocks.DATA] >= 0.01 and max(clock.seconds, key=clock.seconds.__getitem__) == clocks.DATA


@pytest.mark.parametrize(
    ("data", "changes", "match"),
    [
        (
            {"padding_free": False},
            {"padding": 4800},
            "48% of the positions are padding: leave data.padding_f",
        ),
        ({"group": False}, {"padding": 4800}, "data.group puts examples of like length"),
        ({}, {"padding": 4800, "why_padded": "it does not pack"}, "it does not pack, so they cannot"),
        (
            {},
            {"parts": {clocks.LOSS: 0.3}, "vocabulary": 32000},
            "the loss takes 30%: each labelled token meets the 32,000",
        ),
        ({"template": {"kind": "plain", "train_on": "all"}}, {"parts": {clocks.LOSS: 0.3}}, "train_on is all"),
        ({}, {"parts": {clocks.ADAPTERS: 0.3}}, "the method takes 30%"),
        ({}, {"parts": {clocks.ATTENTION: 0.5}}, "attention takes 50%"),
        ({}, {"parts": {clocks.OPTIMIZER: 0.2}}, "the optimizer takes 20%"),
        ({}, {"parts": {clocks.DATA: 0.2}}, "waits for data 20%"),
        ({}, {"places": 50}, "a step has 50 tokens"),
        ({}, {"frozen": "2 of 4 blocks are frozen"}, "From the second epoch on .* 2 of 4 blocks"),
    ],
)
def test_advice(data: dict[str, Any], changes: dict[str, Any], match: str, settings: Settings) -> None:
    run = settings(data=data, precision="bf16")
    parts = dict.fromkeys(PARTS, 0.0) | changes.pop("parts", {})
    plain = Profile(run, steps=1, seconds=1.0, parts=dict.fromkeys(PARTS, 0.0), places=10_000)
    found = Profile(run, **{"steps": 1, "seconds": 1.0, "parts": parts, "places": 10_000, **changes})
    only = [text for text in advice(found) if text not in advice(plain)]
    assert len(only) == 1 and re.search(match, only[0]), advice(found)


def test_the_command(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, bool]] = []
    monkeypatch.setattr(profiling, "profile", lambda run, fresh: asked.append((run, fresh)))
    run = settings()
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    done = CliRunner().invoke(cli.app, ["train", str(file), "--profile"])
    assert done.exit_code == 0 and asked == [(run, False)], done.output
