"""Small trainers and their data, for the tests of GraftTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from graft import attach, bank
from graft.methods.lora import LoRA
from tiny import batch, tiny


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
