"""What must not happen: bad losses and gradients, too little memory, broken checkpoints, marks left on a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainers import arguments, features, quiet, same, started, values
from transformers import PrinterCallback, Trainer, TrainerCallback

from graft import attach, bank, base
from graft.data.encode import Example
from graft.data.rows import Row
from graft.errors import TrainingError
from graft.methods.full import FullFineTuning
from graft.methods.lora import LoRA
from graft.train import state
from graft.train.schedule import Schedule
from graft.train.trainer import GraftTrainer
from tiny import batch


def examples(rows: int = 8) -> list[Example]:
    tensors = batch("llama", rows=rows)
    made = []
    for i, (ids, labels) in enumerate(zip(tensors["input_ids"].tolist(), tensors["labels"].tolist(), strict=True)):
        row = Row(form="text", index=i + 1, source="rows.jsonl", text="x")
        made.append(Example(input_ids=ids, labels=labels, row=row))
    return made


def collate(rows: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([row.input_ids for row in rows]),
        "labels": torch.tensor([row.labels for row in rows]),
    }


def scheduled(model: Any, folder: Path, **more: Any) -> GraftTrainer:
    data = examples()
    schedule = Schedule([9] * 8, batch_size=2, accumulate=2, max_steps=6, group=False)
    args = arguments(folder, max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=10, **more)
    trainer = GraftTrainer(model, args, train_dataset=data, data_collator=collate, schedule=schedule)
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_schedule_decides_the_batches(tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)
    seen: list[list[int]] = []
    inner = trainer.data_collator.inner
    trainer.data_collator.inner = lambda rows: (seen.append([row.row.index - 1 for row in rows]), inner(rows))[1]
    trainer.train()
    assert seen == trainer.schedule.batches and len(seen) == 12


def test_loss_not_finite_names_the_rows_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)
    bad = trainer.schedule.at(3)[1]
    kept: list[dict[str, Tensor]] = []

    def poisoned(rows: Sequence[Example]) -> dict[str, Tensor]:
        made = collate(rows)
        if trainer.state.global_step == 3 and [row.row.index - 1 for row in rows] == bad:
            made["labels"] = made["labels"].clone().fill_(-100)  # no target: the loss is 0 / 0
        return made

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        kept.append(values(model))
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=-100)

    trainer.compute_loss_func, trainer.data_collator = loss_of, poisoned
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 4: the loss is nan on the batch of rows.jsonl rows ") and "\n" not in message
    named = [int(n) for n in message.split(" rows ")[1].split(";")[0].split(", ")]
    assert named == [i + 1 for i in bad]
    now = values(model)
    assert all(torch.equal(now[key], kept[-1][key]) for key in now)
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())
    assert [path.name for path in state.checkpoints(tmp_path)] == ["checkpoint-3"]
    again = started("llama")
    state.read(again, tmp_path / "checkpoint-3" / state.STATE)
    assert all(torch.equal(values(again)[key], now[key]) for key in now)


def test_gradient_not_finite(tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 1 else grad)
    with pytest.raises(TrainingError, match=r"step 2: the gradient is not finite on the batch of rows\.jsonl rows"):
        trainer.train()
    assert state.finite(model)


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(rank=4, targets="all-linear", head=False)], ids=str)
def test_parameters_that_blew_up_go_back_to_the_start(method: Any, tmp_path: Path) -> None:
    """After one step with such a rate the parameters are finite, and no batch has a finite loss any more."""
    model = started("gpt2", method)
    start = {key: value.clone() for key, value in state.tensors(model).items()}
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan .* the adapter is as it was at the start"):
        scheduled(model, tmp_path, learning_rate=1e37).train()
    now = state.tensors(model)
    assert start and all(torch.equal(now[key], start[key]) for key in start)
    assert not state.checkpoints(tmp_path)


def test_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    model = started("llama", LoRA(rank=4, dropout=0.5)).eval()
    trainer = scheduled(model, tmp_path)
    for parameter in bank.bank_of(model)["default"].parameters():
        parameter.grad = torch.ones_like(parameter)
    ran: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: ran.append(1))
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    trainer.dry_run()
    found = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert found == (torch.rand(1), random.random(), np.random.rand())
    assert ran and not model.training
    assert all((p.grad == 1).all() for p in bank.bank_of(model)["default"].parameters())
    handle.remove()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_too_little_memory_gives_advice(error: Exception, tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)

    def fail(*args: Any) -> None:
        raise error

    model.register_forward_pre_hook(fail)
    for act in (trainer.dry_run, trainer.train):
        with pytest.raises(
            TrainingError, match=r"out of memory on cpu with a batch of 2 rows; lower train\.batch_size"
        ):
            act()


def test_other_runtime_errors_stay_what_they_are(tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)
    model.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.dry_run()


def test_broken_checkpoint(tmp_path: Path) -> None:
    model = started("llama")
    (tmp_path / "x.safetensors").write_bytes(b"not a file")
    with pytest.raises(TrainingError, match="cannot be read"):
        state.read(model, tmp_path / "x.safetensors")
    state.write(started("llama", LoRA(rank=2)), tmp_path / "y.safetensors")
    with pytest.raises(TrainingError, match="another adapter"):
        state.read(model, tmp_path / "y.safetensors")


def test_quantized_base_is_marked_only_while_trainer_looks(tmp_path: Path) -> None:
    """Trap 5: Trainer refuses a 4-bit base unless it sees peft's mark."""
    pytest.importorskip("bitsandbytes")
    model = base.load_base("embedded", precision="nf4", device="cpu")
    attach(model, LoRA(rank=2))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path))
    before = dict(vars(model))
    trainer = GraftTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=features("llama"))
    assert not getattr(model, "_hf_peft_config_loaded", False) and vars(model).keys() == before.keys()
    start = values(model)
    quiet(trainer)
    assert not same(values(model), start)


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["the adapter", "its optimizer"])
def test_a_full_disk_is_told_in_one_line_and_nothing_half_written_stays(room: float, tmp_path: Path) -> None:
    """No file may be longer than `room` times the adapter's from the third step on."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                size = (tmp_path / "checkpoint-2" / "adapter_model.safetensors").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * size), before[1]))

    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    trainer = GraftTrainer(started("llama"), args, train_dataset=features("llama"), callbacks=[Full()])
    try:
        with pytest.raises(TrainingError, match=r"checkpoint-4: cannot be written .* on from .*checkpoint-2$") as error:
            quiet(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
