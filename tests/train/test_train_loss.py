"""The loss of a 16-bit model, against the cross entropy of its logits in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trainers import arguments, quiet, undropped, values

from graft import LoRA, attach
from graft.train.trainer import GraftTrainer
from tiny import batch, tiny

KINDS = ("t5", "bart", "bert", "distilbert", "roberta", "llama_cls", "llama")
CAUSAL = ("llama",)


def started(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = undropped(tiny(kind).to(dtype))
    for parameter in model.parameters():
        parameter.data *= 3  # so that logits are large enough to be rounded visibly
    torch.manual_seed(1)
    attach(model, LoRA(rank=4))
    return model


def given(model: Any, kind: str, rows: int = 4) -> dict[str, Tensor]:
    """A batch; with the decoder's input beside the labels, for a smoothed loss takes the labels away from the model."""
    inputs = batch(kind, rows=rows)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    return inputs


def trainer_of(model: Any, kind: str, folder: Path, autocast: torch.dtype | None = None, **more: Any) -> GraftTrainer:
    inputs = given(model, kind)
    rows = [{key: value[i].tolist() for key, value in inputs.items()} for i in range(4)]
    arguments_ = arguments(folder, **{"per_device_eval_batch_size": 4, **more})
    return GraftTrainer(model, arguments_, train_dataset=rows, eval_dataset=rows, autocast=autocast)


def expected(model: Any, kind: str, inputs: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """The summed cross entropy of the logits in fp32, and how many labels there are: (2,)."""
    labels = inputs["labels"]
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.float()
    if kind in CAUSAL:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    loss = F.cross_entropy(logits[kept], labels[kept], reduction="sum", label_smoothing=smoothing)
    return torch.stack([loss, kept.sum().float()])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_16_bit_model_is_fp32(kind: str, smoothing: float, tmp_path: Path) -> None:
    model = started(kind)
    inputs = given(model, kind)
    with torch.no_grad():
        total, count = expected(model, kind, inputs, smoothing)
    trainer = trainer_of(model, kind, tmp_path, label_smoothing_factor=smoothing)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total / count), abs=1e-5)
    assert model(**inputs).logits.dtype == torch.bfloat16  # outside of the loss the model is as it was


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_under_autocast(kind: str, tmp_path: Path) -> None:
    model = started(kind, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total, count = expected(model, kind, given(model, kind))
    trainer = trainer_of(model, kind, tmp_path, autocast=torch.bfloat16)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total / count), abs=1e-5)


def test_a_causal_loss_upcasts_by_itself(tmp_path: Path) -> None:
    model = started("llama")
    _, outputs = trainer_of(model, "llama", tmp_path).compute_loss(model, given(model, "llama"), return_outputs=True)
    assert outputs.logits.dtype == torch.bfloat16  # no second copy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["t5", "bert", "llama"])
def test_gradients_of_accumulated_batches(kind: str, smoothing: float, tmp_path: Path) -> None:
    """Each label of a step counts the same, whichever batch it stands in."""
    model = started(kind)
    before = values(model)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(model, kind, tmp_path, label_smoothing_factor=smoothing, **settings)
    quiet(trainer)
    found = {key: (before[key] - value) / 0.1 for key, value in values(model).items()}

    model = started(kind)
    inputs = given(model, kind)
    parts = [expected(model, kind, {k: v[rows] for k, v in inputs.items()}, smoothing) for rows in ([0, 1], [2, 3])]
    total, count = torch.stack(parts).sum(0)
    (total / count).backward()
    for key, parameter in model.adapters["default"].named_parameters():
        if parameter.grad.any():
            assert (found[key] - parameter.grad).norm() < 0.02 * parameter.grad.norm(), key
