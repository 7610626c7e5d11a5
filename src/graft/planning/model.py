"""The model that a run would load, and the batch that would need most memory there, as shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from graft import base, roles
from graft.adapt import attach
from graft.data.collate import Collator
from graft.data.encode import Example
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError
from graft.train.config import Run
from graft.train.setup import Data, padding_free, schedule_of
from graft.weights import is_linear

BITS = {"nf4": 4.127, "int8": 8.0}
"""Of a quantized weight, with the scales of its blocks."""


def config_of(path: str) -> PretrainedConfig:
    """The config of a base: a folder, a hub name, or the `config.json` alone.

    Raises:
        ConfigError: as `base.load_config`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        return base.load_config(path)
    try:
        return AutoConfig.from_pretrained(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base {path}: no config of a model ({' '.join(str(error).split())[:120]})") from None


def shapes_of(run: Run, config: PretrainedConfig, dtype: torch.dtype, mode: str, tokenizer: Any, labels: int) -> Any:
    """The base with its fresh adapter, on the meta device."""
    model = base.skeleton(config, labels if mode == "classification" else None).to(dtype)
    if run.precision in BITS:
        head = model.get_output_embeddings()
        tops = [site.module for site in roles.task_heads(model)] + [head]
        for module in model.modules():
            if is_linear(module) and type(module) is nn.Linear and not any(module is top for top in tops):
                module.__class__ = Dequantized
    method = run.method if tokenizer is None else run.method.with_tokenizer(tokenizer)
    attach(model, method, run.name, peft_compat=run.peft_compat)
    return model


def quantized_away(model: nn.Module, precision: str) -> int:
    """Bytes that the weights of a quantized base take less than the stand-ins here."""
    linears = [module for module in model.modules() if type(module) is Dequantized]
    return sum(int(m.weight.numel() * (m.weight.element_size() - BITS[precision] / 8)) for m in linears)


class Dequantized(nn.Linear):
    """A linear whose weight is made from codes at every use, and thrown away again."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Dequantized.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return x @ torch.empty_like(weight_OI).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight_OI,) = ctx.saved_tensors
        return gradients[0] @ torch.empty_like(weight_OI), None


def made_up(run: Run, mode: Any, length: int) -> Data:
    """One batch of rows that are all of one length, every token with a label."""
    ids = [1] * length
    labels = [0] if mode == "classification" else ids
    rows = [
        Example(input_ids=ids, labels=labels, row=Row(form="text", index=number, source="made up"))
        for number in range(1, run.train.batch_size + 1)
    ]
    nothing: Any = None  # made-up rows have nothing to report
    return Data(rows, None, Template(kind="plain", mode=mode), nothing, {}, (run.name,), length)


def heaviest(run: Run, data: Data, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The batch that needs most memory, as training would make it."""
    flat = padding_free(run, data, model)
    collate = Collator(tokenizer, packed=run.data.packing or flat, mode=data.template.mode)
    return collate([data.train[i] for i in schedule_of(run, data).longest(flat=collate.packed)])
