"""What peft's prompt-like forms share: the fields that say how many rows there are, and the rows of a prompt.

Shape legend: P virtual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graft import roles
from graft.errors import AdapterFileError
from graft.forms.base import Config, Form, Slot, Unheld
from graft.forms.targets import HEADS, value_of

FIELDS = {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads"}


class VirtualForm(Form):
    """A form whose rows are one tensor, `prompt_embeddings`; heads have one `base_model.` only."""

    root = "base_model."


def length_of(config: Config, model: nn.Module | None) -> int:
    """How many virtual tokens a config has.

    Raises:
        AdapterFileError: `num_transformer_submodules` or `task_type` does not fit the model.
    """
    length = value_of(config, "num_virtual_tokens", None, int)
    stacks = config.get("num_transformer_submodules")
    if model is None:
        return length
    both = roles.is_encoder_decoder(model)
    if both and config.get("task_type") == "CAUSAL_LM":
        raise AdapterFileError(f"task_type = 'CAUSAL_LM' does not fit {type(model).__name__}, peft's is SEQ_2_SEQ_LM")
    if stacks is None:
        return length
    if stacks != 1 and not (both and stacks == 2):
        raise AdapterFileError(f"num_transformer_submodules = {stacks!r} does not fit {type(model).__name__}")
    return length


def virtual(
    model: nn.Module, config: Config, length: int, width: int, layers: int | None = None, heads: int | None = None
) -> Config:
    """The fields of a prompt or prefix; layers and heads are the model's own unless given.

    Raises:
        Unheld: peft would add or lack a trained module.
    """
    task = config["task_type"]
    if task is None:
        raise Unheld("peft's prompts and prefixes need a task with a trained head, or a language model")
    if config["modules_to_save"] and task not in HEADS:
        raise Unheld("peft's prompts and prefixes train no further modules beside a task head")
    whole: Any = model.config
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    return {
        "num_virtual_tokens": length,
        "num_transformer_submodules": 2 if roles.is_encoder_decoder(model) else 1,
        "num_layers": int(getattr(text, "num_hidden_layers", 0)) if layers is None else layers,
        "num_attention_heads": int(getattr(text, "num_attention_heads", 0)) if heads is None else heads,
        "token_dim": width,
    }


def prompt_slot(model: nn.Module, config: Config, length: int, read: Callable[[], Tensor], table: Any) -> Slot:
    """peft's (P * stacks, D) rows, of which the first P act; where we hold P alone, the others are zero.

    Args:
        length: P.
        read: gives the rows, (P, D) or (2P, D).
        table: the parameter that takes them, of the same shape; None while an encoder makes them.
    """
    stacks = config.get("num_transformer_submodules") or (2 if roles.is_encoder_decoder(model) else 1)
    shape = (length * stacks, read().shape[1])

    def padded() -> Tensor:
        rows = read()
        full = rows.new_zeros(shape)
        full[: len(rows)] = rows[: len(full)]
        return full

    def fill(new: Tensor) -> None:
        table.data.zero_()
        table.data[: len(new)].copy_(new[: len(table)])

    return Slot(shape, padded, fill)
