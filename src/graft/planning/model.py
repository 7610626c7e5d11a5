"""The model that a run would load, and the batch that would need most memory there, as shapes."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from graft import base, interface, vocabulary
from graft.adapt import attach
from graft.data.collate import Collator
from graft.data.encode import Example
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError
from graft.train.config import Run
from graft.train.schedule import heaviest
from graft.train.setup import Data, padding_free, schedule_of, sides
from graft.weights import features


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a plan is made from, beside the settings."""

    config: PretrainedConfig
    tokenizer: Any
    """None: the base is a config alone, and the rows are made up."""
    data: Data


QUANTIZED = ("int8", "nf4")
BLOCK, OUTER = 64, 256
"""Values that share a scale in nf4, and scales that share one of their own, as bitsandbytes has it by default."""
CODEBOOKS = 4 * (16 + 256 + 1)
"""Bytes of the tables that each nf4 weight has beside its codes: of the values, of the scales, and their offset."""


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


def own_head(path: str) -> bool:
    """Whether a base's file says that its head is not the embedding, which newer classes' configs may not repeat."""
    if path in base.EMBEDDED:
        return False
    try:
        return PretrainedConfig.get_config_dict(str(Path(path).expanduser()))[0].get("tie_word_embeddings") is False
    except (OSError, ValueError):
        return False


def shapes_of(run: Run, given: Given, dtype: torch.dtype) -> Any:
    """The base with its fresh adapters, on the meta device."""
    mode, labels = given.data.template.mode, len(given.data.template.label_names) or 2
    model = base.skeleton(given.config, labels if mode == "classification" else None).to(dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and own_head(run.base):
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    if run.precision in QUANTIZED:
        quantize(model, base._class_name(given.config, labels if mode == "classification" else None)[0])
    method = run.method if given.tokenizer is None else run.method.with_tokenizer(given.tokenizer)
    for name in given.data.names:
        attach(model, method, name, peft_compat=run.peft_compat)
    return model


def quantize(model: Any, auto: str) -> None:
    """Put codes in the place of the linears that bitsandbytes would: transformers' own rule, without that package.

    Args:
        auto: the class that loads it; of some the task head stays whole, as in `base.load_base`.
    """
    whole = list(vocabulary.TASK_HEADS) if auto.endswith(base.TRAINED) else None
    skipped = HfQuantizer.get_modules_to_not_convert(model, whole, model._keep_in_fp32_modules)
    for path, module in list(model.named_modules()):
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skipped):
            weight, sizes = module.weight, features(module)
            codes = Dequantized(*sizes, bias=module.bias is not None, device=weight.device, dtype=weight.dtype)
            model.set_submodule(path, codes)


def quantized_away(model: nn.Module, precision: str) -> int:
    """Bytes that the codes of a quantized base take less than its weights."""
    linears = [module for module in model.modules() if type(module) is Dequantized]
    return sum(m.weight.nbytes - code_bytes(m.out_features, m.in_features, precision) for m in linears)


def code_bytes(out: int, inner: int, precision: str) -> int:
    """Bytes of a quantized weight of `out` times `inner` values: codes, and the scales of its blocks or rows."""
    if precision == "int8":
        return out * inner + 4 * out
    blocks = -(-out * inner // BLOCK)
    return -(-out * inner // 2) + blocks + 4 * -(-blocks // OUTER) + CODEBOOKS


class Dequantized(nn.Linear):
    """A linear whose weight is made from codes at every use, and thrown away again."""

    stands_for_codes = True

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
    """A batch of rows that are all of one length, every token with a label; one of evaluation too if the run has it."""
    ids = [1] * length
    labels = [0] if mode == "classification" else ids
    rows = [
        Example(input_ids=ids, labels=labels, row=Row(form="text", index=number, source="made up"))
        for number in range(1, run.train.batch_size + 1)
    ]
    nothing: Any = None  # made-up rows have nothing to report
    evaluation = rows[:1] * (run.train.eval_batch_size or run.train.batch_size) if run.data.eval is not None else None
    return Data(rows, evaluation, Template(kind="plain", mode=mode), nothing, {}, (run.name,), length)


def batches(run: Run, data: Data, model: Any, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The batches of training and of evaluation that need most memory, as training makes them; None: none is made."""
    mode, flat = data.template.mode, needs_no_padding(run, data, model)
    collate = Collator(tokenizer, packed=run.data.packing or flat, mode=mode)
    training = collate([data.train[i] for i in schedule_of(run, data).longest(flat=collate.packed)])
    if not data.evaluation:
        return training, None
    size = run.train.eval_batch_size or run.train.batch_size
    rows = range(len(data.evaluation))
    found = [list(rows[start : start + size]) for start in rows[::size]]
    longest = heaviest(found, [sides(example, mode) for example in data.evaluation], flat=flat)
    return training, Collator(tokenizer, packed=flat, mode=mode)([data.evaluation[i] for i in longest])


def needs_no_padding(run: Run, data: Data, model: Any) -> bool:
    """Whether training would put the examples of a batch end to end.

    Raises:
        ConfigError: `data.padding_free` is true, and this model or method cannot.
    """
    if run.data.packing:
        return padding_free(run, data, model)
    if data.template.mode != "causal" or run.data.padding_free is False:
        return False
    try:
        tried = small(model.config, run)
    except Exception:  # a class, or a method, that is not to be had small: what its attention says must do
        return interface.makes_no_mask(model)
    return padding_free(run, data, model, tried)


def small(config: PretrainedConfig, run: Run) -> Any:
    """A model of the same class with two narrow layers of random numbers, and the run's adapter asleep in it.

    Whether packed examples see each other depends on the class and its settings, not on sizes.
    """
    narrow = copy.deepcopy(config)
    heads = narrow.num_attention_heads
    sizes = {"num_hidden_layers": 2, "hidden_size": 8 * heads, "intermediate_size": 16 * heads, "head_dim": 8}
    for key, value in (sizes | {"vocab_size": 64, "pad_token_id": 0}).items():
        if getattr(narrow, key, None) is not None:
            with contextlib.suppress(AttributeError):  # what a class reckons from its other sizes
                setattr(narrow, key, value)
    if getattr(narrow, "layer_types", None):
        narrow.layer_types = narrow.layer_types[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = base.skeleton(narrow).to_empty(device="cpu")
        model.init_weights()
        attach(model, run.method, run.name)
    return model.eval()
