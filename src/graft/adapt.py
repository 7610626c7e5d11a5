"""The verbs on a model: attach, detach, use, route, prepare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graft import freeze, interface, roles, slots, vocabulary
from graft.adapter import Adapter, key_of
from graft.bank import Bank, bank_of, known
from graft.errors import ConfigError, RouteError, SiteError
from graft.method import Build, CopyDelta, Method, SelectMethod
from graft.roles import Site
from graft.routes import Entry, Route, entry_of
from graft.weights import is_embedding, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("graft")

FOREIGN: list[Callable[[Any, PreTrainedModel], Method | None]] = []
"""Readers of other libraries' config objects for a model; `graft.files` adds peft's."""


def use(model: PreTrainedModel, entry: Any) -> None:
    """Give every row the same entry until changed.

    Args:
        entry: None (the base), a name, a tuple of names, or a dict of name to weight.

    Raises:
        RouteError: a name is not attached, or the model is merged.
    """
    bank = bank_of(model)
    chosen = known(bank, entry_of(entry))
    if bank.originals is not None:
        raise RouteError("the model is merged; call graft.unmerge before using adapters")
    freeze.select(model, bank, chosen)
    bank.used = chosen
    bank.refresh()


class route:
    """Route the rows of a batch, or runs of flattened tokens, inside a `with` block.

    Args:
        model: a model with adapters.
        rows: one entry per row. A list shorter than the batch that divides it repeats each entry consecutively
            (beams); any other length is an error in the forward.
        segments: (entry, length) for each run of tokens of a packed batch, instead of rows.

    Raises:
        RouteError: an unknown name, a merged model, or an adapter that cannot be routed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Any] | None = None,
        *,
        segments: Sequence[tuple[Any, int]] | None = None,
    ) -> None:
        self.bank = bank_of(model)
        if (rows is None) == (segments is None):
            raise RouteError("give either rows or segments")
        self.route = Route.of_rows(rows) if rows is not None else Route.of_segments(segments or [])
        self._check()

    def _check(self) -> None:
        if self.bank.originals is not None:
            raise RouteError("the model is merged; call graft.unmerge before routing")
        for entry in set(self.route.entries):
            known(self.bank, entry)
        for adapter in self.bank:
            if adapter.selected:
                raise RouteError(
                    f"adapter {adapter.name!r} ({adapter.method.name}) trains the base itself and cannot be routed "
                    "beside others; detach it, or use it for every row with graft.use"
                )

    def __enter__(self) -> Route:
        self._check()  # again: adapters may have gone, or been merged, since the route was made
        self.bank.enter(self.route)
        return self.route

    def __exit__(self, *_: object) -> None:
        self.bank.leave(self.route)


def attach(
    model: PreTrainedModel, method: Any, name: str = "default", *, peft_compat: bool = False, trainable: bool = True
) -> Adapter:
    """Put a new adapter on the model; the first attach freezes the base.

    Args:
        model: a transformers model. It keeps its class, its modules and its parameter names.
        method: a Graft method, or a `peft` config (which implies `peft_compat`).
        name: what routes and folders call the adapter.
        peft_compat: peft's form wherever it differs from the method.
        trainable: whether its parameters require gradients.

    Returns:
        The adapter. It is in use if it is the only one; other adapters stay as they are.

    Raises:
        ConfigError: a bad or taken name, or a method that contradicts what is attached.
        SiteError: the model lacks a place that the method needs.
    """
    if isinstance(method, type):
        raise ConfigError(f"method: give an instance, {method.__name__}(...), not the class")
    if not isinstance(method, Method):
        read = next((found for reader in FOREIGN if (found := reader(method, model)) is not None), None)
        if read is None:
            raise ConfigError(f"method: expected a Graft method or a peft config, not {type(method).__name__}")
        method, peft_compat = read, True
    bank = getattr(model, "adapters", None)
    if bank is not None and not isinstance(bank, Bank):
        raise ConfigError(f"model.adapters is taken by a {type(bank).__name__}; Graft needs that name")
    _check(bank, method, name)
    with vocabulary.unchanged():
        return _attached(model, bank, method, name, peft_compat, trainable)


def _attached(
    model: PreTrainedModel, bank: Bank | None, method: Method, name: str, peft_compat: bool, trainable: bool
) -> Adapter:
    adapter = _made(model, method, name, peft_compat)
    adapter.train(model.training)
    if bank is None:
        bank = Bank().train(model.training)
        freeze.freeze(model, bank)
        model.adapters = bank
    bank.held[key_of(name)] = adapter
    try:
        if len(bank) == 1:
            bank.watch(model)
        bank.place(model, adapter)
        if isinstance(method, SelectMethod):
            freeze.claim(model, bank, adapter, trainable)
        else:
            adapter.requires_grad_(trainable)
        freeze.ignore_on_save(model, bank, adapter)
    except BaseException:
        _take_off(model, bank, name)
        raise
    bank.unchecked.add(name)
    if len(bank) == 1:
        use(model, name)
    return adapter


def detach(model: PreTrainedModel, name: str | None = None) -> None:
    """Take one adapter, or all, off the model; after the last one it is the very same model as before.

    Where several are in use as one entry, the others stay in use with their weights, as in peft, and the log says so.
    Where it was alone in use, the base is.

    Raises:
        RouteError: no such adapter, the model is merged, or a route that has not ended names it.
    """
    bank = bank_of(model)
    if bank.originals is not None:
        raise RouteError("the model is merged; call graft.unmerge before detaching")
    if name is not None and "/" in name and name in bank:
        raise RouteError(f"{name!r} is a part of a composed adapter; detach {name.partition('/')[0]!r}")
    for each in bank.names if name is None else (name,):
        known(bank, ((each, 1.0),))
        if any(each in {used.partition("/")[0] for used in route.names} for route in bank.routes):
            raise RouteError(f"adapter {each!r} is in a route that has not ended; detach it after the block")
        rest = {used: weight for used, weight in bank.used if used.partition("/")[0] != each}
        if len(rest) < len(bank.used):
            use(model, rest or None)
            if rest and name is not None:
                log.warning("adapter %r was in use with others; now %s act without it", each, " and ".join(rest))
        _take_off(model, bank, each)


def _take_off(model: PreTrainedModel, bank: Bank, name: str) -> None:
    """Remove an adapter and its hooks; with the last one everything that the first attach did."""
    adapter = bank[name]
    bank.remove(model, adapter)
    freeze.unclaim(model, adapter)
    del bank.held[key_of(name)]
    bank.unchecked.discard(name)
    freeze.ignore_on_save(model, bank, adapter)
    if not len(bank):
        interface.uninstall(bank)
        bank.unhook_all()
        freeze.thaw(model, bank)
        del model.adapters


def prepare(
    model: PreTrainedModel,
    batch: dict[str, Any],
    rows: Sequence[Any] | None = None,
    *,
    segments: Sequence[tuple[Any, int]] | None = None,
) -> dict[str, Any]:
    """Put the slots of soft prompts into a batch.

    They stand where a row has the id `graft.SLOT`, which must be there once for each; in front of a row without it.
    Rows of the base lose their pseudo-tokens.

    Args:
        batch: `input_ids` (B, T) and what goes with them: `attention_mask`, `labels`, `token_type_ids`.
        rows: one entry per row; None for what is in use. Pass the same rows to `route`.
        segments: (entry, length) for each run of tokens of a packed batch, instead of rows. The new batch then has a
            `segments` entry with the new lengths: take it out and pass it to `route`.

    Returns:
        A new batch with ids, mask, labels (-100 at slots) and positions; the batch itself if no row has a soft prompt.
        It pads right when there are labels, else left for decoders. Encoder-decoders get slots in the encoder only.

    Raises:
        RouteError: no `input_ids`, rows that do not fit the batch, a row with another number of pseudo-tokens than its
            prompt has, or one behind a decoder's last label, which cannot see it.
    """
    bank = bank_of(model)
    if "input_ids" not in batch:
        raise RouteError("prepare needs input_ids: soft prompts are slot tokens in the data, not inputs_embeds")
    if not isinstance(batch["input_ids"], Tensor):
        raise RouteError("prepare needs input_ids as a (B, T) tensor; pad the rows first")
    if bank.slots.find(batch["input_ids"]) is not None:
        return batch  # it has its slots already
    if segments is not None:
        return _prepare_packed(model, bank, batch, segments)
    size = batch["input_ids"].shape[0]
    entries = [known(bank, entry) for entry in slots.entries_of(rows, bank.current, size)]
    counts = [_count(bank, entry) for entry in entries]
    if not any(counts) and not slots.marked(batch):
        return batch
    config = model.config
    causal = roles.is_decoder(model)
    new, mask_BT = slots.add_slots(
        batch,
        counts,
        slot_id=slots.slot_token(config, batch["input_ids"]),
        pad_id=max(pad, 0) if isinstance(pad := getattr(config, "pad_token_id", None), int) else 0,
        side="left" if causal and "labels" not in batch else "right",
        positions=causal and slots.accepts(model, "position_ids"),
        keep_labels=roles.is_encoder_decoder(model),
    )
    if causal:
        slots.refuse_unseen(new, mask_BT)
    bank.slots.note(new["input_ids"], mask_BT)
    return new


def _prepare_packed(
    model: PreTrainedModel, bank: Bank, batch: dict[str, Any], segments: Sequence[tuple[Any, int]]
) -> dict[str, Any]:
    entries = [known(bank, entry_of(entry)) for entry, _ in segments]
    counts = [_count(bank, entry) for entry in entries]
    if not any(counts) and not slots.marked(batch):
        return {**batch, "segments": list(segments)}
    slot_id = slots.slot_token(model.config, batch["input_ids"])
    new, mask_BT = slots.add_segment_slots(batch, segments, counts, slot_id=slot_id)
    slots.refuse_unseen(new, mask_BT)
    bank.slots.note(new["input_ids"], mask_BT)
    return new


def _count(bank: Bank, entry: Entry) -> int | None:
    """How many slots the soft prompts of an entry need; None for the base."""
    return sum(delta.length for delta in bank.prompts(entry)) if entry else None


def _check(bank: Bank | None, method: Method, name: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"name: {name!r} cannot name an adapter; use letters, digits, '-', '_' or '.'")
    if bank is None:
        return
    if name in bank:
        raise ConfigError(f"name: an adapter named {name!r} is attached already; detach it or take another name")
    if bank.originals is not None:
        raise ConfigError("the model is merged; call graft.unmerge before attaching")
    taken = next((adapter for adapter in bank if adapter.selected), None)
    if taken is not None or (isinstance(method, SelectMethod) and len(bank)):
        which = f"{taken.name!r} ({taken.method.name})" if taken is not None else method.name
        raise ConfigError(f"{which} trains the base itself and cannot stand beside other adapters; detach them first")


def _made(model: PreTrainedModel, method: Method, name: str, peft_compat: bool) -> Adapter:
    """The adapter with all its deltas; the model is not touched."""
    build = Build(model, peft_compat)
    adapter = Adapter(name, method, peft_compat=peft_compat)
    for key, part in method.parts_of(build).items():
        adapter.join(key, _made(model, part, f"{name}/{key}", peft_compat))
    if adapter.parts:
        return adapter
    if isinstance(method, SelectMethod):
        parameters = dict(model.named_parameters())
        adapter.selected = {each: parameters[each] for each in method.chosen(build)}
        return adapter
    heads = roles.task_heads(model) if method.head else []
    # What stands inside a head is trained whole, with the head's copy.
    sites = [site for site in method.sites(build) if not any(site.path.startswith(f"{h.path}.") for h in heads)]
    adapter.shared = method.shared(sites, build)
    for site in sites:
        delta = method.delta(site, build)
        if delta is not None:
            adapter.add(site, delta)
    for site, delta in method.extras(build):
        adapter.add(site, delta)
    whole = {site.path: site for each in method.modules_to_save for site in _named(model, each)}
    _refuse_overlap(method, [*adapter.sites, *whole], list(whole))
    _refuse_bypassed(model, [*adapter.sites.values(), *whole.values()])
    for site in {**{head.path: head for head in heads}, **whole}.values():
        if site.path not in adapter.sites:
            adapter.add(site, CopyDelta(site.module))
    return adapter


def _refuse_overlap(method: Method, paths: list[str], whole: list[str]) -> None:
    """A module that is trained whole answers for all inside it: nothing else may sit there."""
    for path in whole:
        inside = [each for each in paths if each == path or each.startswith(f"{path}.")]
        if len(inside) > 1:
            raise SiteError(
                f"modules_to_save: {path} is trained whole, so {method.name} cannot act at {inside[-1]} too; "
                "name one of the two"
            )


def _refuse_bypassed(model: PreTrainedModel, chosen: list[Site]) -> None:
    """T5's and BART's `shared` owns the weight of its stacks' embeddings and never runs, so nothing can act there."""
    tables = [site for site in chosen if site.role == roles.OTHER and is_embedding(site.module)]
    if not tables:
        return
    read = [site for site in roles.sites(model) if site.role == "embedding"]
    for site in tables:
        readers = [each.path for each in read if each.module.weight is site.module.weight and each.path != site.path]
        if readers:
            raise SiteError(
                f"{site.path} does not run: {type(model).__name__} reads {' and '.join(readers)} instead, so no "
                "adapter can act there; name those"
            )


def _named(model: PreTrainedModel, name: str) -> list[Site]:
    """The modules of that name outside the bank, whatever their class."""
    found = [
        Site(path, "other", None, module, 0, 0)
        for path, module in model.named_modules()
        if (path == name or path.endswith(f".{name}")) and not path.startswith("adapters.")
    ]
    if not found:
        raise SiteError(f"modules_to_save: no module is named {name!r}")
    vocabulary.refuse_routed(site.path for site in found)
    packed = next((site.path for site in found if any(quantized(part) for part in site.module.modules())), None)
    if packed is not None:
        raise SiteError(f"modules_to_save: {packed} is quantized and cannot be trained whole; put an adapter there")
    return found
