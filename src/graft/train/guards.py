"""What Trainer must be told or kept from, around a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainingArguments

from graft.errors import ConfigError, TrainingError
from graft.train import state as states


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what Trainer offers and adapters do not get.

    Raises:
        ConfigError: what to say instead.
    """
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ConfigError(
                f"{name}: Trainer would round the adapter with the base, for good; load the base in 16 bits, or give "
                "GraftTrainer autocast=torch.bfloat16"
            )
    if args.push_to_hub and args.save_strategy != "no" and args.hub_strategy != "end":
        raise ConfigError(
            'push_to_hub: checkpoints are not pushed; say hub_strategy="end", and save_model() or push_to_hub() push '
            "the adapters"
        )


@contextlib.contextmanager
def trains_quantized(model: Any) -> Iterator[None]:
    """Trainer takes a quantized base only with peft's mark on it; it has it while Trainer looks, and no longer."""
    mark = "_hf_peft_config_loaded"
    marked = getattr(model, "is_quantized", False) and not getattr(model, mark, False) and states.trained(model)
    if not marked:
        yield
        return
    before = model.__dict__.get(mark)
    setattr(model, mark, True)
    try:
        yield
    finally:
        if before is None:
            delattr(model, mark)
        else:
            setattr(model, mark, before)


@contextlib.contextmanager
def enough_memory(args: TrainingArguments, rows: int) -> Iterator[None]:
    """Turn a lack of memory into advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(word in text for word in words):
            raise
        raise TrainingError(
            f"out of memory on {args.device} with a batch of {rows} rows; lower train.batch_size and raise "
            "train.accumulate instead, set train.gradient_checkpointing: true, lower data.max_length, or take a "
            "smaller precision (bf16, nf4)"
        ) from error


@contextlib.contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing while the block runs."""
    # transformers before 5.23 has only the older name
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant ones need them, and they keep the graph below top layers
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{kind}_checkpointing_disable")()
        model.eval()
