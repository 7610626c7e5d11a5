"""peft's TRAINABLE_TOKENS: `trainable_tokens_delta` (N, D), whole rows, beside the input embedding.

peft writes the same rows once more for every module that is tied to the embedding, and warns if they are missing. Its
LORA may have such rows too, in `token_adapter`: here that is a composition of the two methods.

Shape legend: N named tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.bank import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import ROOT, Config, Form, Slot, Unheld, plain
from graft.forms.targets import value_of
from graft.method import Method
from graft.methods.compose import Compose
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
            if (odd := unreached(model)) is not None:
                raise AdapterFileError(f"{odd}, so that this adapter computes something else there than its method")
        if wrong is not None:
            raise AdapterFileError(f"target_modules: {wrong} is not the input embedding, whose rows alone train")
        return TrainableTokens(tokens=tuple(ids), head=False)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, TrainableTokens)
        _check(model, adapter)
        return {"target_modules": tied(model)[0], "token_indices": method.ids(), "init_weights": True}

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        rows = adapter.shared
        assert isinstance(rows, TokenRows)
        first, *others = tied(model)
        modules = targets.modules(model)
        slots = {f"{ROOT}{path}.{KEY}": _same(rows, optional=not is_embedding(modules[path])) for path in others}
        return {f"{ROOT}{first}.{KEY}": plain(rows.rows), **slots}


def beside(method: Method, config: Config, model: nn.Module | None) -> Method:
    """What a LORA config means: the method, composed with `trainable_token_indices` where it has some."""
    asked: Any = config.get("trainable_token_indices")
    if targets.empty(asked):
        return method
    if isinstance(asked, dict):
        name, asked = next(iter(asked.items())) if len(asked) == 1 else ("several modules", ())
        if name.rpartition(".")[2] not in NAMES:
            raise AdapterFileError(f"trainable_token_indices: {name} is not the input embedding")
    if model is not None:
        _check_beside(config, model)
    return Compose(method, TrainableTokens(tokens=tuple(asked)), head=method.head)


def _check_beside(config: Config, model: nn.Module) -> None:
    if (odd := unreached(model)) is not None:
        raise AdapterFileError(f"trainable_token_indices: {odd}, so that they compute something else there")
    taken = targets.targeted(model, config) | targets.saved_whole(model, config)
    if (twice := next((path for path in tied(model) if path in taken), None)) is not None:
        raise AdapterFileError(
            f"trainable_token_indices beside {twice} in target_modules or modules_to_save is not supported: it has the "
            "weight whose rows train"
        )


def split(model: nn.Module, method: Method, adapter: Adapter) -> tuple[Method, Config]:
    """`beside` undone: the method of a LORA folder, and its field for tokens."""
    if not isinstance(method, Compose):
        return method, {}
    first, *others = method.parts
    if len(others) != 1 or not isinstance(others[0], TrainableTokens):
        raise Unheld(f"peft has no {method.name} as Graft computes it, but for trainable tokens beside LoRA")
    _check(model, adapter)
    return first, {"trainable_token_indices": others[0].ids()}


def beside_slots(model: nn.Module, adapter: Adapter) -> dict[str, Slot]:
    """The rows of tokens in a LORA folder, where they stand once."""
    rows = next((leaf.shared for leaf in adapter.leaves if isinstance(leaf.shared, TokenRows)), None)
    return {} if rows is None else {f"{ROOT}{tied(model)[0]}.token_adapter.{KEY}": plain(rows.rows)}


def tied(model: nn.Module) -> list[str]:
    """The path of the input embedding, and then those of the modules that have the very same weight."""
    source: Any = model.get_input_embeddings()  # type: ignore[operator]
    every = targets.modules(model)
    first = [path for path, module in every.items() if module is source]
    alike = [path for path, module in every.items() if getattr(module, "weight", None) is source.weight]
    return [*first, *(path for path in alike if path not in first)]


def unreached(model: nn.Module) -> str | None:
    """What peft leaves as it is of a table's rows: it follows the ties that the model's class declares, and no others.

    So the tables of a BART or T5 classifier have rows at `shared` alone, which never runs.
    """
    first, *others = tied(model)
    names: dict[str, str] = {}
    if isinstance(_declared(model), dict) and getattr(model.config, "tie_word_embeddings", False):
        for path, module in roles.modules_of_base(model).items():
            dot = f"{path}." if path else ""
            own = _declared(module)
            names |= {f"{dot}{key}": f"{dot}{source}" for key, source in own.items()} if isinstance(own, dict) else {}
    weights = {f"{path}.weight" for path in (first, *others)}
    reached = {name for name, source in names.items() if source in weights}
    missing = next((path for path in others if f"{path}.weight" not in reached), None)
    return None if missing is None else f"peft trains rows at {first}, and leaves {missing}, which has the same weight"


def _declared(module: nn.Module) -> Any:
    return getattr(module, "_tied_weights_keys", None)


def _check(model: nn.Module, adapter: Adapter) -> None:
    if (odd := unreached(model)) is not None:
        raise Unheld(odd)
    heads = [delta for _, delta in adapter.items() if isinstance(delta, HeadRowsDelta)]
    if any(getattr(delta.head[0], "bias", None) is not None and not delta.drops_bias for delta in heads):
        raise Unheld("peft computes a tied head without its bias (peft_compat=True does so too)")


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
