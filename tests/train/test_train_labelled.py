"""GraftTrainer with the loss at labelled rows, and with that of whole logits: the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import arguments, quiet, started, undropped, values

from graft import AdaLoRA, LoRA, PromptTuning, attach
from graft.methods.full import FullFineTuning
from graft.train import routed
from graft.train.trainer import GraftTrainer
from tiny import batch, checkpointed

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", None, {}),
    "checkpointing": ("llama", None, {"checkpoint": True, "gradient_accumulation_steps": 2}),
    "smoothing": ("llama", None, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
    "gemma2": ("gemma2", None, {}),
    "t5": ("t5", None, {"gradient_accumulation_steps": 2}),
    "bart smoothing": ("bart", None, {"label_smoothing_factor": 0.1}),
    "prompts": ("gpt2", PromptTuning(length=3), {}),
    "full": ("llama_tied", FullFineTuning(), {}),
    "penalties": ("llama", AdaLoRA(rank=4, target_rank=2, targets=["attention.query", "head"]), {}),
    "autocast": ("llama", None, {"autocast": torch.bfloat16}),
}


def trained(kind: str, method: Any, folder: Path, on: bool, **more: Any) -> tuple[dict[str, Tensor], list[float], Any]:
    """The values, losses and evaluation of 10 steps."""
    model = started(kind, method)
    if more.pop("checkpoint", False):
        checkpointed(model, use_reentrant=False)
    else:
        undropped(model)
    if kind in ("t5", "bart"):
        inputs = batch(kind, rows=8)
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    else:
        inputs = batch(kind, rows=8)
        inputs["labels"][2] = -100
    rows = [{key: value[i].tolist() for key, value in inputs.items()} for i in range(8)]
    autocast = more.pop("autocast", None)
    settings = {"max_steps": 10, "learning_rate": 0.02, "per_device_eval_batch_size": 8, **more}
    trainer = GraftTrainer(
        model, arguments(folder, **settings), train_dataset=rows, eval_dataset=rows, autocast=autocast
    )
    trainer._labelled_rows = on
    quiet(trainer)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return values(model) or model.adapters["default"].selected, losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, more = CASES[case]
    made: list[Any] = []
    fast = routed.fast_loss
    monkeypatch.setattr(routed, "fast_loss", lambda *args, **given: made.append(fast(*args, **given)) or made[-1])
    found, losses, evaluated = trained(kind, method, tmp_path, True, **more)
    steps = 10 * more.get("gradient_accumulation_steps", 1)
    assert len(made) == steps + 1 and all(loss is not None for loss in made)
    expected, plain_losses, plain_evaluated = trained(kind, method, tmp_path, False, **more)
    assert len(made) == steps + 1
    close = 0.02 if "autocast" in more else 1e-4
    assert losses == pytest.approx(plain_losses, rel=close, abs=1e-6) and len(losses) == 10
    assert evaluated == pytest.approx(plain_evaluated, rel=close)
    assert found.keys() == expected.keys() and found
    for key, value in expected.items():
        assert (found[key] - value).norm() <= close * value.norm() + 1e-6, key


def test_packed_segments(tmp_path: Path) -> None:
    ids = batch("llama")["input_ids"][:, :3].reshape(1, -1)
    inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(3).repeat(4)[None]}
    inputs["labels"][:, ::3] = -100
    inputs["segments"] = [("default", 3), (None, 3), ("b", 6)]
    inputs["position_ids"][:, 6:] = torch.arange(6)
    model = started("llama", LoRA(rank=4, targets=["attention.query", "head"]))
    attach(model, LoRA(rank=2), "b")
    torch.manual_seed(3)
    for parameter in model.adapters.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trainer = GraftTrainer(model, arguments(tmp_path))
    found = []
    for on in (True, False):
        trainer._labelled_rows = on
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(5))
        loss.backward()
        gradients = [p.grad.clone() for p in model.adapters.parameters()]
        found.append((float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm() > 0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_steps_without_a_label_leave_the_adapter(kind: str, tmp_path: Path) -> None:
    model = undropped(started(kind))
    inputs = batch(kind, rows=2)
    inputs["labels"][:] = -100
    rows = [{key: value[i].tolist() for key, value in inputs.items()} for i in range(2)]
    before = values(model)
    trainer = GraftTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows)
    quiet(trainer)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0.0, 0.0]


def test_whoever_asks_for_outputs_gets_logits(tmp_path: Path) -> None:
    model = started("llama")
    trainer = GraftTrainer(model, arguments(tmp_path))
    loss, outputs = trainer.compute_loss(model, batch("llama"), return_outputs=True)
    assert outputs.logits.shape[:2] == batch("llama")["input_ids"].shape
    assert float(trainer.compute_loss(model, batch("llama")).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
