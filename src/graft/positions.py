"""Positions as an adapter wants them: moved up by prefix rows in front, or divided by a factor.

Both happen where positions are consumed, at position embeddings and rotary modules, row by row (token by token in a
packed batch), never in the `position_ids` of a batch.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.errors import RouteError
from graft.method import Delta

if TYPE_CHECKING:
    from graft.bank import Bank
    from graft.routes import Entry

HOOKS = ":position"


class PositionDelta(Delta):
    """Rotary positions divided by `divisor`, for the rows of its adapter; it sits at the rotary module."""

    weighted = False

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor


class PositionHook:
    """Moves positions up by the prefix rows in front of them (peft does the same), then divides them."""

    def __init__(self, bank: Bank, path: str, stack: str) -> None:
        self.bank = bank
        self.path = path
        self.stack = stack

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.bank.visit(self.path)
        moved, divisor = offset(self.bank, self.stack), stretch(self.bank)
        if moved is None and divisor is None:
            return None
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if "past_key_values_length" in names:
            return ((), self._learned(given, moved, names)) if moved is not None else None
        key = "position_ids" if "position_ids" in names else names[0]
        if moved is not None:
            given[key] = given[key] + moved
        if divisor is not None:
            given[key] = given[key] / divisor
        first = [given.pop(names[0])] if names[0] in given else []  # as an argument: deltas at the module read it
        return tuple(first), given

    def _learned(self, given: dict[str, Any], offset: Any, names: list[str]) -> dict[str, Any]:
        past = given.get("past_key_values_length", 0)
        ids = given.get("position_ids")
        if names[0] == "attention_mask":
            if ids is None:
                mask = given["attention_mask"]
                ids = (mask.cumsum(1) * mask - 1).long()[:, past:]
            given["position_ids"] = ids + offset
        elif ids is not None:
            given["position_ids"] = ids + offset
        elif not isinstance(offset, int) and "position_ids" not in names:
            raise RouteError("this model's positions cannot differ by row; give rows with one prefix length a batch")
        elif isinstance(offset, int):
            given["past_key_values_length"] = past + offset
        else:
            size = given[names[0]].shape[1]
            given["position_ids"] = torch.arange(size, device=offset.device) + past + offset
        return given

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """BART-like modules add a dimension in front of position ids that they are given: take it away again."""
        return output.squeeze(0) if isinstance(output, Tensor) and output.dim() == 4 else None


def offset(bank: Bank, stack: str) -> int | Tensor | None:
    """How far positions move in a stack: one number, a (B, 1) or (1, T) tensor, or None."""
    shifts = [sum(bank[name].shift.get(stack, 0) for name, _ in entry) for entry in bank.current.entries]
    return _spread(bank, shifts, 0)


def stretch(bank: Bank) -> float | Tensor | None:
    """What positions are divided by: one number, a (B, 1) or (1, T) tensor, or None."""
    return _spread(bank, [divisor(bank, entry) for entry in bank.current.entries], 1.0)


def divisor(bank: Bank, entry: Entry) -> float:
    """What the positions of one entry's rows are divided by.

    Raises:
        RouteError: its adapters disagree.
    """
    wanted = {bank[name].stretch: name for name, _ in bank.leaves(entry) if bank[name].stretch != 1.0}
    if len(wanted) > 1:
        (one, first), (other, second) = list(wanted.items())[:2]
        raise RouteError(
            f"adapter {first!r} divides positions by {one:g} and {second!r} by {other:g}; they cannot act on one row"
        )
    return next(iter(wanted), 1.0)


def place(model: nn.Module, bank: Bank) -> None:
    """Hook every position module of the model, once."""
    if HOOKS in bank.handles:
        return
    for site in roles.sites(model):
        if site.role == "position":
            # With one stack, names mean nothing: an encoder's embeddings stand outside of its `encoder`.
            hook = PositionHook(bank, site.path, site.stack if roles.is_encoder_decoder(model) else "")
            bank.hook(HOOKS, site.module.register_forward_pre_hook(hook.before, with_kwargs=True))
            bank.hook(HOOKS, site.module.register_forward_hook(hook.after))


def _spread(bank: Bank, values: list[Any], neutral: Any) -> Any:
    """One value for each entry of the route as one number, as a tensor over rows or tokens, or None if none counts."""
    route = bank.current
    if bank.asleep or not bank.shifted or all(value == neutral for value in values):
        return None
    if route.uniform is not None:
        return values[0]
    device = next(iter(bank.parameters())).device
    spread = torch.tensor([values[i] for i in route.owner(route.tokens if route.by_token else bank.batch)])
    return (spread[None] if route.by_token else spread[:, None]).to(device)
