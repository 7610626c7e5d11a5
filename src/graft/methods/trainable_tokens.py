"""Trainable tokens: only some rows of the token embedding train (no paper; peft's TRAINABLE_TOKENS).

    E'[t] = R[i] for the i-th token t that is named, E[t] for every other;   E (V, D), R (N, D) starts at E's own rows

Where the language model's head has the very same weight (tied embeddings), its outputs for these tokens are R h too; a
head with a weight of its own stays as it is. R is whole rows, not differences: new tokens start at random in every base
that is resized for them, and an adapter must not depend on that. A file holds R alone.

Shape legend: B rows, T tokens, V vocabulary, D width, N named tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.method import REPLACE, Build, Delta, Method
from graft.methods.lora import embed_scale
from graft.roles import Site
from graft.weights import is_embedding, is_linear


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Some rows of the token embedding train (no paper); (N, D) values, also where the head is tied to it.

    Args:
        tokens: ids, or tokens as strings, which `tokenizer` turns into ids.
        tokenizer: the model's tokenizer; it is not part of a file, the ids are.

    Raises:
        ConfigError: no tokens, one twice, a negative id, or a string that is no token.
        SiteError: the embedding has too few rows, or the model has none.
    """

    tokens: tuple[int | str, ...] = ()
    tokenizer: Any = field(default=None, compare=False, repr=False, metadata={"json": False})

    name: ClassVar[str] = "trainable_tokens"
    place: ClassVar[str] = "module"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    paper: ClassVar[str] = "no paper"
    trains: ClassVar[str] = "N D for N tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            raise ConfigError("TrainableTokens: layers has no meaning, the embedding stands outside of them")
        if isinstance(self.tokens, str | int) or not self.tokens:
            raise ConfigError("TrainableTokens: tokens is a list of ids or tokens with at least one")
        if self.tokenizer is not None:
            object.__setattr__(self, "tokens", tuple(self._id(token) for token in self.tokens))
        for token in self.tokens:
            if isinstance(token, bool) or not isinstance(token, int | str) or (isinstance(token, int) and token < 0):
                raise ConfigError(f"TrainableTokens: tokens are ids from 0, or tokens as strings, not {token!r}")
        double = next((token for token in self.tokens if self.tokens.count(token) > 1), None)
        if double is not None:
            raise ConfigError(f"TrainableTokens: tokens names {double!r} twice")

    def _id(self, token: int | str) -> int:
        """The id of a token.

        Raises:
            ConfigError: the tokenizer does not have it as one token.
        """
        if not isinstance(token, str):
            return token
        known = self.tokenizer.get_vocab()
        if token not in known:
            raise ConfigError(
                f"TrainableTokens: {token!r} is no token of the tokenizer; call tokenizer.add_tokens([{token!r}]) and "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
        return int(known[token])

    def ids(self) -> list[int]:
        """The tokens' ids.

        Raises:
            ConfigError: there are strings and no tokenizer.
        """
        text = next((token for token in self.tokens if isinstance(token, str)), None)
        if text is not None:
            raise ConfigError(f"TrainableTokens: the token {text!r} needs tokenizer=..., the model's tokenizer")
        return [int(token) for token in self.tokens]

    def sites(self, build: Build) -> list[Site]:
        model: Any = build.model
        ids, where = self.ids(), type(model).__name__
        source: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        every = [site for site in roles.sites(model) if site.role in ("embedding", "head") and is_embedding(source)]
        found = [site for site in every if getattr(site.module, "weight", None) is source.weight]
        found = [site for site in found if is_embedding(site.module) or is_linear(site.module)]
        if not any(is_embedding(site.module) for site in found):
            raise SiteError(f"TrainableTokens: {where} has no token embedding")
        rows = found[0].in_features
        if max(ids) >= rows:
            raise SiteError(
                f"TrainableTokens: token {max(ids)} has no row, the embedding of {where} ends at {rows - 1}; "
                f"call model.resize_token_embeddings({max(ids) + 1}), or the tokenizer's length, first"
            )
        return found

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        return TokenRows(sites[0].module.weight, self.ids())  # type: ignore[arg-type]

    def delta(self, site: Site, build: Build) -> Delta:
        if is_embedding(site.module):
            return EmbeddingRowsDelta(embed_scale(site.module))
        return HeadRowsDelta(site.module, drops_bias=build.peft_compat)


class TokenRows(nn.Module):
    """The rows (N, D) of all named tokens, and where each token's row is.

    Attributes:
        tokens: the ids; a probe reads them too, or it would not see the rows.
    """

    index: Tensor
    place: Tensor

    def __init__(self, weight_VD: Tensor, ids: list[int]) -> None:
        super().__init__()
        self.tokens = ids
        index_N = torch.tensor(ids, device=weight_VD.device)
        place_V = torch.full(weight_VD.shape[:1], -1, device=weight_VD.device)
        place_V[index_N] = torch.arange(len(ids), device=weight_VD.device)
        self.register_buffer("index", index_N, persistent=False)
        self.register_buffer("place", place_V, persistent=False)
        self.rows = nn.Parameter(weight_VD.detach()[index_N].float().clone())


class EmbeddingRowsDelta(Delta):
    """At the embedding: named tokens give their trained rows."""

    order = REPLACE
    everywhere = True
    shared: TokenRows

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        place_BT = self.shared.place[x_BTI]
        rows_BTD = F.embedding(place_BT.clamp(min=0), self.shared.rows) * self.scale
        return torch.where((place_BT >= 0).unsqueeze(-1), rows_BTD.to(y_BTO.dtype), y_BTO)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.shared.rows.to(weight_OI.dtype)
        return weight_OI.index_copy(1, self.shared.index, rows.T), bias_O


class HeadRowsDelta(Delta):
    """At a tied head: the outputs for named tokens come from their trained rows.

    peft computes a tied head without its bias: `drops_bias`.
    """

    order = REPLACE
    everywhere = True
    shared: TokenRows

    def __init__(self, module: nn.Module, *, drops_bias: bool) -> None:
        super().__init__()
        self.head = [module]  # in a list: the base owns it
        self.drops_bias = drops_bias

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        index = self.shared.index
        new = F.linear(x_BTI, self.shared.rows.to(x_BTI.dtype)).to(y_BTO.dtype)
        bias_O: Any = getattr(self.head[0], "bias", None)
        if bias_O is not None and self.drops_bias:
            y_BTO = y_BTO - bias_O.to(y_BTO.dtype)
        elif bias_O is not None:
            new = new + bias_O[index].to(new.dtype)
        return y_BTO.index_copy(-1, index, new)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.shared.rows.to(weight_OI.dtype)
        bias_O = torch.zeros_like(bias_O) if bias_O is not None and self.drops_bias else bias_O
        return weight_OI.index_copy(0, self.shared.index, rows), bias_O
