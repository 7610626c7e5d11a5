"""GraftTrainer against plain loops, dense algebra and separate runs; a stock Trainer on an attached model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from graft import attach, bank, base, files, prepare, route
from graft.data.encode import Example
from graft.data.rows import Row
from graft.errors import RouteError, TrainingError
from graft.methods.full import FullFineTuning
from graft.methods.ia3 import IA3
from graft.methods.lora import LoRA, LoRADelta
from graft.methods.prefix import PrefixTuning
from graft.methods.prompt import PromptTuning
from graft.train import state
from graft.train.schedule import Schedule
from graft.train.trainer import GraftTrainer
from tiny import PAD, batch, tiny


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**settings, **more})


def features(kind: str, rows: int = 8) -> list[dict[str, Any]]:
    """One dict of lists for each row, padded, as a data set has them."""
    tensors = batch(kind, rows=rows)
    return [{key: value[i].tolist() for key, value in tensors.items()} for i in range(rows)]


def quiet(trainer: Trainer) -> Any:
    trainer.remove_callback(PrinterCallback)
    return trainer.train()


def values(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in bank.bank_of(model)[name].named_parameters()}


def started(kind: str, method: Any = None, name: str = "default") -> Any:
    model = tiny(kind)
    torch.manual_seed(1)
    attach(model, method or LoRA(rank=4), name)
    return model


def undropped(model: Any) -> Any:
    """The model, deaf to `train()`: no dropout, which would differ where rows are split otherwise."""
    model.train = lambda mode=True: nn.Module.train(model, False)
    return model


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    assert left.keys() == right.keys() and left
    return all(torch.allclose(left[key], right[key], atol=tolerance, rtol=1e-4) for key in left)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_equals_a_plain_loop(kind: str, tmp_path: Path) -> None:
    model, data = undropped(started(kind)), features(kind)
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("adapters.")}
    start = values(model)
    quiet(GraftTrainer(model, arguments(tmp_path, train_sampling_strategy="sequential"), train_dataset=data))
    assert not same(values(model), start)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    plain = started(kind).eval()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        rows = data[2 * step : 2 * step + 2]
        plain(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(values(model), values(plain))


@pytest.mark.parametrize("kind", ["llama", "t5", "bart", "bert", "llama_cls"])
def test_accumulation_equals_a_larger_batch(kind: str, tmp_path: Path) -> None:
    found = []
    for rows, times in ((4, 1), (2, 2)):
        model = undropped(started(kind))
        args = arguments(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=times,
            max_steps=2,
            train_sampling_strategy="sequential",
        )
        model.config.use_cache = True
        quiet(GraftTrainer(model, args, train_dataset=features(kind)))
        found.append(values(model))
        assert model.config.use_cache is True, "Trainer's change of the config must be undone"
    assert same(*found)


def test_stock_trainer_trains_what_is_in_use(tmp_path: Path) -> None:
    ours, stock = started("llama"), started("llama")
    for model, cls in ((ours, GraftTrainer), (stock, Trainer)):
        args = arguments(tmp_path, train_sampling_strategy="sequential", remove_unused_columns=False)
        quiet(cls(model, args, train_dataset=features("llama")))
    assert same(values(ours), values(stock))


def test_without_adapters() -> None:
    with pytest.raises(RouteError, match="attach"):
        GraftTrainer(tiny("llama"))


def test_adapter_column_trains_each_rows_own(tmp_path: Path) -> None:
    """Two adapters in one batch equal two trainings; every row has as many targets, so each has half of the loss."""
    data = [{**row, "input_ids": row["input_ids"][:4], "labels": row["input_ids"][:4]} for row in features("llama")]
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in data if PAD not in row["input_ids"]][:3] * 4
    one, other = data[0::2], data[1::2]
    mixed = started("llama", name="a")
    torch.manual_seed(2)
    attach(mixed, LoRA(rank=4, targets="all-linear"), "b")
    rows = [row for a, b in zip(one, other, strict=True) for row in ({**a, "adapter": "a"}, {**b, "adapter": "b"})]
    args = arguments(tmp_path, learning_rate=0.2, train_sampling_strategy="sequential")
    quiet(GraftTrainer(mixed, args, train_dataset=rows))
    for name, part in (("a", one), ("b", other)):
        alone = started("llama", name="a")
        if name == "b":
            alone = tiny("llama")
            torch.manual_seed(2)
            attach(alone, LoRA(rank=4, targets="all-linear"), "b")
        args = arguments(tmp_path, per_device_train_batch_size=1, train_sampling_strategy="sequential")
        quiet(GraftTrainer(alone, args, train_dataset=part))
        assert same(values(mixed, name), values(alone, name), 1e-5)


def test_rows_that_train_nothing_are_an_error(tmp_path: Path) -> None:
    model = started("llama")
    rows = [{**row, "adapter": "a"} for row in features("llama")]
    attach(model, LoRA(rank=2), "a", trainable=False)
    with pytest.raises(TrainingError, match="nothing that trains"):
        quiet(GraftTrainer(model, arguments(tmp_path), train_dataset=rows))


def test_segments_equal_rows() -> None:
    model = started("llama", PrefixTuning(length=3))
    trainer = GraftTrainer(model, arguments(Path("unused")), train_dataset=features("llama"))
    model.eval()
    parts = [torch.tensor([[7, 8, 9, 11]]), torch.tensor([[12, 13, 6]])]
    alone = [trainer.compute_loss(model, {"input_ids": ids, "labels": ids}) for ids in parts]
    packed = {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "labels": torch.cat([torch.tensor([[-100, 8, 9, 11]]), torch.tensor([[-100, 13, 6]])], 1),
        "segments": [(None, 4), (None, 3)],
    }
    loss = trainer.compute_loss(model, packed)
    assert torch.allclose(loss * 5, alone[0] * 3 + alone[1] * 2, atol=1e-5)


def test_soft_prompts_get_their_slots(tmp_path: Path) -> None:
    model, data = started("llama", PromptTuning(length=3)), features("llama", 2)
    tensors = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    trainer = GraftTrainer(model, arguments(tmp_path), train_dataset=data)
    (slotted,), items = trainer.get_batch_samples(iter([tensors]), 1, torch.device("cpu"))
    assert slotted["input_ids"].shape[1] == tensors["input_ids"].shape[1] + 3
    assert int(items) == int((tensors["labels"] != -100).sum()), "the first token is predicted from the last slot"
    loss = trainer.compute_loss(model, slotted, num_items_in_batch=items)
    with route(model, ["default", "default"]):
        assert torch.allclose(loss, model(**prepare(model, tensors)).loss, atol=1e-6)


def test_penalty_counts_once_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss of zero gradient (labels all the same for both) the difference is the penalty's own gradient."""
    found = {}
    for kind in ("without", "with"):
        if kind == "with":
            monkeypatch.setattr(LoRADelta, "penalty", lambda self: 0.05 * sum(p.square().sum() for p in self.parameters()))
        model = started("llama")
        args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, train_sampling_strategy="sequential")
        quiet(GraftTrainer(model, args, train_dataset=features("llama")))
        found[kind] = values(model)
    start = values(started("llama"))
    for key, value in start.items():
        assert torch.allclose(found["with"][key], found["without"][key] - 0.1 * 0.1 * value, atol=1e-6)


def test_no_decay_on_vectors(tmp_path: Path) -> None:
    model = started("llama", IA3())
    trainer = GraftTrainer(model, arguments(tmp_path, weight_decay=0.5), train_dataset=features("llama"))
    decay, plain = trainer.create_optimizer().param_groups
    assert not decay["params"] and plain["weight_decay"] == 0.0 and len(plain["params"]) == len(values(model))
    model = started("llama")
    decay, plain = GraftTrainer(model, arguments(tmp_path, weight_decay=0.5)).create_optimizer().param_groups
    assert decay["weight_decay"] == 0.5 and len(decay["params"]) == len(values(model)) and not plain["params"]


def test_evaluation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model, data = started("llama"), features("llama", 5)
    trainer = GraftTrainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    found = trainer.evaluate()["eval_loss"]
    tensors = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    logits = model.eval()(**tensors).logits[:, :-1]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"][:, 1:].flatten(), ignore_index=-100)
    assert found == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("method", [LoRA(rank=4), PrefixTuning(length=3, hidden=4), FullFineTuning()], ids=lambda m: m.name)
def test_checkpoints_hold_the_adapter_alone_and_go_on_exactly(method: Any, tmp_path: Path) -> None:
    def trained(folder: str, steps: int) -> Any:
        model = started("llama", method)
        args = arguments(
            tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2, optim="adamw_torch"
        )
        trainer = GraftTrainer(model, args, train_dataset=features("llama"))
        if steps < 6:
            trainer.add_callback(_StopAt(steps))
        quiet(trainer)
        return model

    whole = trained("whole", 6)
    trained("cut", 4)
    folder = tmp_path / "cut" / "checkpoint-4"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_state.safetensors",
    ]
    assert [path.name for path in state.checkpoints(tmp_path / "whole")] == ["checkpoint-4", "checkpoint-6"]
    model = started("llama", method)
    args = arguments(tmp_path / "cut", max_steps=6, save_strategy="no", optim="adamw_torch")
    trainer = GraftTrainer(model, args, train_dataset=features("llama"))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder))
    left, right = (dict(bank.bank_of(m)["default"].named_parameters()) or dict(m.named_parameters()) for m in (model, whole))
    assert all(torch.equal(left[key], right[key]) for key in right)
    fresh = tiny("llama")
    files.load(fresh, tmp_path / "whole" / "checkpoint-6", "default")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.allclose(fresh.eval()(ids).logits, whole.eval()(ids).logits, atol=1e-5)


class _StopAt(PrinterCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def test_best_model_is_read_back(tmp_path: Path) -> None:
    """A learning rate that makes things worse: the best is the first evaluation."""
    model = started("llama")
    args = arguments(
        tmp_path, max_steps=4, learning_rate=20.0, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer = GraftTrainer(model, args, train_dataset=features("llama"), eval_dataset=features("llama"))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert trainer.state.best_global_step == best < 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


# ------------------------------------------------------------------------------------------------- what must not happen


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


def test_parameters_that_blew_up_go_back_to_the_start(tmp_path: Path) -> None:
    model = started("llama")
    start = values(model)
    with pytest.raises(TrainingError, match="as it was at the start"):
        scheduled(model, tmp_path, learning_rate=1e30).train()
    now = values(model)
    assert all(torch.equal(now[key], start[key]) for key in now)
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
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_too_little_memory_gives_advice(error: Exception, tmp_path: Path) -> None:
    model = started("llama")
    trainer = scheduled(model, tmp_path)

    def fail(*args: Any) -> None:
        raise error

    model.register_forward_pre_hook(fail)
    for act in (trainer.dry_run, trainer.train):
        with pytest.raises(TrainingError, match=r"out of memory on cpu with a batch of 2 rows; lower train\.batch_size"):
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
