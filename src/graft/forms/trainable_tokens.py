"""peft's TRAINABLE_TOKENS: `trainable_tokens_delta` (N, D), whole rows, beside the input embedding.

peft writes the same rows once more for every module that is tied to the embedding, and warns if they are missing.

Shape legend: N named tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import ROOT, Config, Form, Slot, Unheld, plain
from graft.forms.targets import value_of
from graft.method import Method
from graft.methods.trainable_tokens import HeadRowsDelta, TokenRows, TrainableTokens
from graft.weights import is_embedding

KEY = "trainable_tokens_delta"
NAMES = {"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"}
"""What input embeddings are called, for a config object that names one before there is a model."""


class TrainableTokensForm(Form):
    """peft's TRAINABLE_TOKENS."""

    kind = "TRAINABLE_TOKENS"
    fields = {"token_indices", "target_modules", "init_weights"}
    methods = (TrainableTokens,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        ids = value_of(config, "token_indices", [], list)
        named: Any = config.get("target_modules")
        if model is None:
            if not value_of(config, "init_weights", True, bool):
                raise AdapterFileError("init_weights = false (random rows) is not supported; leave it true")
            names = [named] if isinstance(named, str) else named or []
            wrong = next((name for name in names if name.rpartition(".")[2] not in NAMES), None)
        else:
            wrong = next((path for path in sorted(_targeted(model, named)) if path not in tied(model)), None)
        if wrong is not None:
            raise AdapterFileError(f"target_modules: {wrong} is not the input embedding, whose rows alone train")
        return TrainableTokens(tokens=tuple(ids), head=False)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, TrainableTokens)
        heads = [delta for _, delta in adapter.items() if isinstance(delta, HeadRowsDelta)]
        if any(getattr(delta.head[0], "bias", None) is not None and not delta.drops_bias for delta in heads):
            raise Unheld("peft computes a tied head without its bias (peft_compat=True does so too)")
        return {"target_modules": tied(model)[0], "token_indices": method.ids(), "init_weights": True}

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        rows = adapter.shared
        assert isinstance(rows, TokenRows)
        first, *others = tied(model)
        modules = targets.modules(model)
        slots = {f"{ROOT}{path}.{KEY}": _same(rows, optional=not is_embedding(modules[path])) for path in others}
        return {f"{ROOT}{first}.{KEY}": plain(rows.rows), **slots}


def tied(model: nn.Module) -> list[str]:
    """The path of the input embedding, and then those of the modules that have the very same weight."""
    source: Any = model.get_input_embeddings()  # type: ignore[operator]
    every = targets.modules(model)
    first = [path for path, module in every.items() if module is source]
    alike = [path for path, module in every.items() if getattr(module, "weight", None) is source.weight]
    return [*first, *(path for path in alike if path not in first)]


def _targeted(model: nn.Module, named: Any) -> set[str]:
    return targets.targeted(model, {"target_modules": named}) if named is not None else set()


def _same(rows: TokenRows, *, optional: bool) -> Slot:
    """The rows of a tied module, which must be the embedding's.

    Those of an embedding are needed: without them peft's rows stand where a model such as BART never reads them.
    """

    def check(new: Tensor) -> None:
        if not rows.rows.is_meta and not torch.equal(new.to(rows.rows), rows.rows):
            raise AdapterFileError("a tied module has other rows than the embedding; Graft keeps one table for all")

    return Slot(tuple(rows.rows.shape), lambda: rows.rows.detach(), check, optional=optional, expected=True)
