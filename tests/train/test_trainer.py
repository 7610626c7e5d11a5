"""GraftTrainer against plain loops, dense algebra and separate runs; a stock Trainer on an attached model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import arguments, features, quiet, same, started, undropped, values
from transformers import PrinterCallback, Trainer

from graft import attach, bank, files, prepare, route
from graft.errors import ConfigError, RouteError, TrainingError
from graft.methods.full import FullFineTuning
from graft.methods.ia3 import IA3
from graft.methods.lora import LoRA, LoRADelta
from graft.methods.prefix import PrefixTuning
from graft.methods.prompt import PromptTuning
from graft.train import state
from graft.train.trainer import GraftTrainer
from tiny import PAD, tiny


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


def test_segments_equal_rows(tmp_path: Path) -> None:
    model = started("llama", PrefixTuning(length=3))
    trainer = GraftTrainer(model, arguments(tmp_path), train_dataset=features("llama"))
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


def test_packed_soft_prompts_equal_rows(tmp_path: Path) -> None:
    model = started("llama", PromptTuning(length=3))
    trainer = GraftTrainer(model, arguments(tmp_path), train_dataset=features("llama"))
    model.eval()
    parts = [torch.tensor([[7, 8, 9, 11]]), torch.tensor([[12, 13, 6]])]
    labels = [torch.tensor([[-100, 8, 9, 11]]), torch.tensor([[-100, 13, 6]])]
    rows = [{"input_ids": i, "labels": n} for i, n in zip(parts, labels, strict=True)]
    alone = [trainer.compute_loss(model, trainer.with_slots(row)) for row in rows]
    packed = {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "labels": torch.cat(labels, 1),
        "segments": [(None, 4), (None, 3)],
    }
    slotted = trainer.with_slots(packed)
    assert slotted["segments"] == [({"default": 1.0}, 7), ({"default": 1.0}, 6)]
    assert torch.allclose(trainer.compute_loss(model, slotted) * 5, alone[0] * 3 + alone[1] * 2, atol=1e-5)


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
            monkeypatch.setattr(
                LoRADelta, "penalty", lambda self: 0.05 * sum(p.square().sum() for p in self.parameters())
            )
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
    with torch.no_grad():
        logits = model.eval()(**tensors).logits[:, :-1].flatten(0, 1)
    wanted = nn.functional.cross_entropy(logits, tensors["labels"][:, 1:].flatten(), ignore_index=-100)
    assert found == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), PrefixTuning(length=3, hidden=4), FullFineTuning()], ids=lambda m: m.name
)
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
    left, right = (
        dict(bank.bank_of(m)["default"].named_parameters()) or dict(m.named_parameters()) for m in (model, whole)
    )
    assert all(torch.equal(left[key], right[key]) for key in right)
    fresh = tiny("llama")
    files.load(fresh, tmp_path / "whole" / "checkpoint-6", "default")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.allclose(fresh.eval()(ids).logits, whole.eval()(ids).logits, atol=1e-5)


def test_going_back_to_an_older_checkpoint_writes_the_newer_one_again(tmp_path: Path) -> None:
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = started("llama")
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
        trainer = GraftTrainer(model, args, train_dataset=features("llama"))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        assert [path.name for path in state.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
        assert not list(tmp_path.glob("*.partial"))
        found.append(values(model))
    assert same(*found, 0.0)


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


def test_nothing_is_saved_where_nothing_shall_be(tmp_path: Path) -> None:
    """Though each evaluation tells which one is the best."""
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    data = features("llama")
    trainer = GraftTrainer(started("llama"), args, train_dataset=data, eval_dataset=data)
    quiet(trainer)
    assert trainer.state.best_metric is not None and not state.checkpoints(tmp_path)


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_is_evaluated_as_a_list_is(tmp_path: Path) -> None:
    found, rows = [], features("llama", 5)
    for data in (rows, _Stream(rows)):
        args = arguments(tmp_path, per_device_eval_batch_size=2)
        trainer = GraftTrainer(started("llama"), args, eval_dataset=data)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        loop = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
        found.append((loop.metrics, loop.num_samples, trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1] and found[0][1] == 5


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"bf16_full_eval": True}, "bf16_full_eval: Trainer would round the adapter"),
        ({"fp16_full_eval": True}, "fp16_full_eval: Trainer would round the adapter"),
        ({"push_to_hub": True, "save_strategy": "steps"}, "push_to_hub: checkpoints are not pushed"),
    ],
)
def test_what_adapters_do_not_get_is_refused(more: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{error}"):
        GraftTrainer(started("llama"), arguments(tmp_path, **more))


@pytest.mark.parametrize("more", [{"save_strategy": "steps", "hub_strategy": "end"}, {"save_strategy": "no"}], ids=str)
def test_what_is_pushed_at_the_end_alone_is_taken(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraftTrainer, "init_hf_repo", lambda self: None)
    assert GraftTrainer(started("llama"), arguments(tmp_path, push_to_hub=True, **more)).args.push_to_hub
