"""The hooks of soft prompts: they fill the slots of a batch, and lead poolers past them.

Shape legend: B rows, T tokens, D width, P virtual tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft import roles
from graft.errors import RouteError
from graft.routes import Entry

if TYPE_CHECKING:
    from graft.bank import Bank


class SlotHook:
    """Overwrites the slots of soft prompts in the embedding's output with the rows' own prompts."""

    def __init__(self, bank: Bank, path: str) -> None:
        self.bank = bank
        self.path = path

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        bank = self.bank
        if bank.asleep:
            return None
        bank.visit(self.path)
        compiling = torch.compiler.is_compiling()
        if compiling and not bank.prompted:
            return None
        slots_BT = bank.slots.find(args[0])
        if slots_BT is not None and not compiling:
            self._check(slots_BT)
        if slots_BT is None and (bank.continues or not bank.prompted):
            return None
        if slots_BT is None:
            raise RouteError(
                "a row has a soft prompt but the batch has no slots for it; "
                "call graft.prepare(model, batch) first and pass what it returns"
            )
        if bank.current.uniform is not None and not bank.current.by_token:
            return self.fill(bank.current.uniform, slots_BT, output)
        flat = bank.current.by_token
        emb = output.flatten(0, 1) if flat else output
        slots = slots_BT.flatten() if flat else slots_BT
        news, indices = [], []
        for group in bank.current.groups(emb.shape[0], emb.device):
            part, mask = emb.index_select(0, group.index), slots.index_select(0, group.index)
            news.append(self.fill(group.entry, mask, part))
            indices.append(group.index)
        return emb.index_copy(0, torch.cat(indices), torch.cat(news)).view_as(output)

    def _check(self, slots_BT: Tensor) -> None:
        """Each row, or each run of tokens, must have as many slots as its prompts have rows."""
        route = self.bank.current
        if route.by_token:
            found = [int(run.sum()) for run in slots_BT.flatten().split(list(route.lengths or ()))]
            entries = list(route.entries)
        else:
            found, entries = slots_BT.sum(-1).tolist(), self.bank.row_entries(slots_BT.shape[0])
        if found != [sum(delta.length for delta in self.bank.prompts(entry)) for entry in entries]:
            raise RouteError(
                "the batch was prepared for other rows than the route has; give this route a batch prepared for it "
                "(for the base: the one that was not prepared)"
            )

    def fill(self, entry: Entry, slots: Tensor, emb: Tensor) -> Tensor:
        """Put the prompts of one entry where the mask says; each row (or run of tokens) starts at the first slot."""
        prompts = [delta.rows_PD() for delta in self.bank.prompts(entry)]
        if not prompts:
            return emb
        rows_PD = torch.cat(prompts).to(emb.dtype)
        count = rows_PD.shape[0]
        which = ((slots.long().cumsum(-1) - 1) % count).masked_fill(~slots, count)
        # a table with a padding row: the gradient of `rows_PD[which]` is summed by several threads in any order, and
        # over all tokens
        put = F.embedding(which, F.pad(rows_PD, (0, 0, 0, 1)), padding_idx=count)
        return torch.where(slots.unsqueeze(-1), put, emb)


class PoolHook:
    """Lets a pooler that reads index 0 read the first real token behind the slots."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        moved = self.rolled(args[0])
        return None if moved is None else (moved, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        moved = self.rolled(output[0])
        if moved is None:
            return None
        if isinstance(output, tuple):
            return (moved, *output[1:])
        output.last_hidden_state = moved
        return output

    def rolled(self, hidden_BTD: Tensor) -> Tensor | None:
        """Each row moved left by its leading slots, or None if no row needs it."""
        bank = self.bank
        if bank.asleep or not bank.prompted or bank.slots.active is None or hidden_BTD.dim() != 3:
            return None
        slots_BT = bank.slots.active
        lead_B = (~slots_BT).long().argmax(-1) * slots_BT[:, 0].long()
        keep = torch.tensor([bank.pools(entry) for entry in bank.row_entries(slots_BT.shape[0])], device=lead_B.device)
        offset = (lead_B * keep)[:, None] + torch.arange(hidden_BTD.shape[1], device=lead_B.device)
        index = (offset % hidden_BTD.shape[1])[..., None].expand_as(hidden_BTD)
        return hidden_BTD.gather(1, index)


def pooled(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose "input" a pooler reads at index 0, or whose "output" a sequence classifier so reads."""
    mean = getattr(getattr(model, "config", None), "classifier_pooling", None) == "mean"
    if mean or roles.is_decoder(model) or roles.is_encoder_decoder(model):
        return []
    # The role is the linear's; what picks index 0 is the module around it.
    paths = [site.path.rpartition(".")[0] for site in roles.sites(model) if site.role == "pooler"]
    poolers = [("input", model.get_submodule(path)) for path in paths]
    if poolers or not type(model).__name__.endswith("ForSequenceClassification"):
        return poolers
    return [("output", model.base_model)]  # type: ignore[list-item]
