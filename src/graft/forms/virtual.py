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
from graft.methods.prompt import input_embedding

FIELDS = {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads"}

STACK = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
"""peft's fields that say which model a prompt is for, and what the model's own config calls them."""


class VirtualForm(Form):
    """A form whose rows are one tensor, `prompt_embeddings`; heads have one `base_model.` only."""

    root = "base_model."

    def fitted(self, config: Config, model: nn.Module) -> Config:
        """A config object on this model, with the fields that peft would fill in."""
        both, task = roles.is_encoder_decoder(model), config["task_type"]
        stacks, wanted = config.get("num_transformer_submodules"), 2 if both else 1
        if stacks is None and (2 if task == "SEQ_2_SEQ_LM" else 1) != wanted:
            fits = "it is SEQ_2_SEQ_LM" if both else "that is for encoder-decoders"
            raise AdapterFileError(f"task_type = {task!r} does not fit {type(model).__name__}; {fits}")
        own = self.sizes(model) | {"num_transformer_submodules": (wanted,)}
        for field, values in own.items():
            if config.get(field) not in (None, *values):
                name = type(model).__name__
                raise AdapterFileError(f"{field} = {config[field]!r} does not fit {name}, it is {values[0]} there")
        filled = {field: values[0] for field, values in own.items()}
        if "encoder_hidden_size" in self.fields and config.get("encoder_hidden_size") is None:
            filled["encoder_hidden_size"] = filled["token_dim"]
        return config | filled

    def sizes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The model's `token_dim`, `num_layers` and `num_attention_heads`; others that peft takes stand behind."""
        width = input_embedding(model).module.weight.shape[1]  # type: ignore[index]
        return {"token_dim": (int(width),), **{field: (value,) for field, value in stack_of(model).items() if value}}


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
    own = stack_of(model)
    return {
        "num_virtual_tokens": length,
        "num_transformer_submodules": 2 if roles.is_encoder_decoder(model) else 1,
        "num_layers": own["num_layers"] if layers is None else layers,
        "num_attention_heads": own["num_attention_heads"] if heads is None else heads,
        "token_dim": width,
    }


def stack_of(model: nn.Module) -> dict[str, int]:
    """`num_layers` and `num_attention_heads` as the model's config has them; 0 where it has none."""
    whole: Any = model.config
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    return {field: int(getattr(text, own, 0)) for field, own in STACK.items()}


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
