"""What GraftTrainer asks of a method while it trains: rates, steps, a start from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import arguments, features, quiet, same, started, values

from graft import ConfigError, GraftTrainer, TrainingError, prepare
from graft.bank import bank_of
from graft.methods.lora import LoRA
from tiny import batch


@pytest.fixture
def fast_B(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "rate", lambda self, name, parameter: 16.0 if name.endswith(".B") else 1.0)


@pytest.mark.usefixtures("fast_B")
def test_rates_equal_a_plain_loop_with_two_groups(tmp_path: Path) -> None:
    model = started("llama")
    args = arguments(tmp_path, max_steps=3, train_sampling_strategy="sequential", lr_scheduler_type="linear")
    trainer = GraftTrainer(model, args, train_dataset=features("llama"))
    quiet(trainer)
    twin = started("llama").train()
    named = dict(bank_of(twin)["default"].named_parameters())
    for step in range(3):
        tensors = {key: value[2 * step : 2 * step + 2] for key, value in batch("llama", rows=8).items()}
        twin(**prepare(twin, tensors)).loss.backward()
        rate = 0.1 * (1 - step / 3)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter -= rate * (16 if name.endswith(".B") else 1) * parameter.grad
                parameter.grad = None
    assert same(values(model), values(twin), 1e-5)


@pytest.mark.usefixtures("fast_B")
def test_an_optimizer_of_the_user_is_refused_where_a_method_has_rates(tmp_path: Path) -> None:
    model = started("llama")
    own = torch.optim.SGD(bank_of(model)["default"].parameters(), lr=0.1)
    trainer = GraftTrainer(
        model,
        arguments(tmp_path),
        train_dataset=features("llama"),
        optimizers=(own, None),  # type: ignore[arg-type]
    )
    with pytest.raises(TrainingError, match="rates of its own"):
        quiet(trainer)


def test_steps_see_gradients_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(LoRA, "begin", lambda self, adapter, steps: seen.append(("begin", steps)))

    def note(what: str) -> Any:
        def call(self: Any, adapter: Any, step: int, steps: int) -> None:
            parameter = next(adapter.parameters())
            seen.append((what, step, steps, parameter.grad is not None, parameter.detach().clone()))

        return call

    monkeypatch.setattr(LoRA, "before_step", note("before"))
    monkeypatch.setattr(LoRA, "after_step", note("after"))
    model = started("llama", LoRA(init="random"))
    quiet(
        GraftTrainer(
            model, arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2), train_dataset=features("llama")
        )
    )
    assert [call[:4] for call in seen] == [
        ("begin", 2),
        ("before", 0, 2, True),
        ("after", 0, 2, True),
        ("before", 1, 2, True),
        ("after", 1, 2, True),
    ]
    assert not torch.equal(seen[1][4], seen[2][4]) and torch.equal(seen[2][4], seen[3][4])


def test_start_sees_the_first_batches_and_changes_no_random_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def begin_from(self: Any, model: Any, adapter: Any, batches: Any) -> None:
        torch.rand(7)
        seen.extend(batches)
        model(**batches[0])

    found = []
    for wanted in (0, 2):
        monkeypatch.setattr(LoRA, "wants_batches", lambda self, wanted=wanted: wanted)
        monkeypatch.setattr(LoRA, "start", begin_from)
        model = started("llama")
        rows = [{**row, "adapter": "default", "id": 7} for row in features("llama")]
        quiet(GraftTrainer(model, arguments(tmp_path), train_dataset=rows))
        found.append(values(model))
    assert len(seen) == 2 and not {"adapter", "id"} & seen[0].keys(), "a column that no forward takes is dropped"
    assert torch.equal(seen[1]["input_ids"], batch("llama", rows=8)["input_ids"][2:4])
    assert same(*found, 0.0)


def test_a_start_from_rows_of_two_adapters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "wants_batches", lambda self: 1)
    rows = [{**row, "adapter": name} for row, name in zip(features("llama"), ["default", "b"] * 4, strict=True)]
    with pytest.raises(ConfigError, match="rows of other adapters"):
        quiet(GraftTrainer(started("llama"), arguments(tmp_path), train_dataset=rows))
