"""The bank: every adapter of a model, the hooks at its sites, and what is current.

One child, `model.adapters`, is added to the user's model; nothing in the base is replaced, its keys stay as they are,
and `detach` gives back the very same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graft import freeze, interface, positions, roles, slots, texts
from graft.adapter import Adapter as Adapter
from graft.adapter import key_of as key_of
from graft.errors import RouteError
from graft.fast import mixed, segments
from graft.hooks import BarrierHook, ContiguousHook, RootHook, SiteHook, Tap
from graft.method import AttentionDelta, Delta, Drawn, InputDelta
from graft.roles import Site
from graft.routes import BASE, Entry, Route
from graft.slot_hooks import PoolHook, SlotHook, pooled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Where a forward's batch size is read, in this order."""


class Bank(nn.Module):
    """All adapters of one model. It lives in the model's tree as `model.adapters`; its own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleDict()
        self.used: Entry = BASE
        self.routes: list[Route] = []
        self.current = self.last = Route.everywhere(BASE)
        self.asleep = False
        self.slots = slots.Slots()
        self.batch = 0
        self.past: Any = 0
        self.prompted = False
        self.shifted = False
        self.averages = False
        self.masks: dict[str, Any] = {}
        self.hooks: dict[str, SiteHook] = {}
        self.handles: dict[str, list[RemovableHandle]] = {}
        self.originals: list[Any] | None = None
        self.flags: dict[str, bool] = {}
        self.checkpointed: list[nn.Module] = []
        self.attention: list[tuple[Any, str]] = []
        self.by_text: bool | None = None
        """Whether attention can run text by text in packed rows; None until such a row comes."""
        self.unchecked: set[str] = set()
        self.visited: set[str] | None = None
        self.given = False
        self.tables: list[Any] = []

    def __getitem__(self, name: str) -> Adapter:
        whole, _, part = name.partition("/")
        adapter: Any = self.held[key_of(whole)]
        return adapter.parts[part] if part else adapter

    def __contains__(self, name: object) -> bool:
        whole, _, part = str(name).partition("/")
        return key_of(whole) in self.held and (not part or part in self[whole].parts)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.held.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.held)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, oldest first."""
        return tuple(adapter.name for adapter in self)

    # What the hooks ask.

    def visit(self, path: str) -> None:
        if self.visited is not None:
            self.visited.add(path)

    @property
    def continues(self) -> bool:
        """Whether this forward goes on from a cache, whose first part had the slots."""
        return not isinstance(self.past, int) or self.past > 0

    def leaves(self, entry: Entry) -> Entry:
        """The entry with composed adapters resolved into their parts."""
        return tuple(leaf for name, weight in entry for leaf in self[name].resolved(weight))

    def prompts(self, entry: Entry) -> list[InputDelta]:
        """The soft prompts of an entry, in order."""
        found = [self[name] for name, _ in self.leaves(entry)]
        return [adapter.at(path) for adapter in found for path in adapter.inputs]  # type: ignore[misc]

    def pools(self, entry: Entry) -> int:
        """1 if a pooler shall read the token behind the slots of this entry."""
        return int(all(delta.pools_after_slots for delta in self.prompts(entry)))

    def row_entries(self, size: int) -> list[Entry]:
        """The entry of each of `size` rows under the current route."""
        return [self.current.entries[i] for i in self.current.owner(size)]

    def texts_at(self, side: str, x_NI: Tensor) -> texts.Texts:
        """The texts of a module's input, whose padding the mask `side` says."""
        return texts.texts_of(self.current, texts.mask_at(self.masks, side), self.batch, x_NI)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, root: bool, module: nn.Module) -> None:
        """Note what a forward brings; a batch that does not fit the route is refused here."""
        first = (*args[:1], *(kwargs.get(key) for key in INPUTS))
        found = next((value for value in first if isinstance(value, Tensor)), None)
        if found is not None:
            self.batch = found.shape[0]
            if not self.asleep:
                self.current.check(found)
        cache: Any = kwargs.get("past_key_values")
        self.past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        self.prompted, self.shifted = self._asks()
        self.slots.active = None
        if self.averages:
            self.masks = self.masks | texts.masks_of(module, args, kwargs)
        if self.prompted and not self.asleep and kwargs.get("inputs_embeds") is not None:
            raise RouteError(
                "a row has a soft prompt but the model got inputs_embeds; pass the input_ids that graft.prepare returns"
            )
        if self.prompted and not (self.asleep or self.continues or torch.compiler.is_compiling()):
            slots.refuse_marked(found)
        if not torch.compiler.is_compiling():
            self.current.tables.begin(self.continues and not self.training)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.last.tables.clear()  # whoever trains now may write where no version is counted
        freeze.replay_checkpoints(self)
        for drawer in self._drawers():
            if drawer.training and (root or drawer.drawn is None):
                drawer.draw()
        if root:
            self._look(module, kwargs)
            interface.keep(self, module)
            self.current.check_packed(module, kwargs)
            quiet = self.asleep or torch.compiler.is_compiling() or kwargs.get("encoder_outputs") is not None
            self.visited = set() if self.unchecked and not quiet else None
        interface.begin(self, module, kwargs, root=root)

    def _asks(self) -> tuple[bool, bool]:
        """Whether the route has soft prompts, and whether it moves positions."""
        entries = set(self.current.entries)
        prompted = any(bool(self.prompts(entry)) for entry in entries)
        names = {name for entry in entries for name, _ in entry}
        return prompted, any(self[name].shift or self[name].stretch != 1.0 for name in names)

    def _look(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """What may have happened to the model since the last forward, and how it is trained."""
        self.given = any(isinstance(value, Tensor) and value.requires_grad for value in kwargs.values())
        if self.asleep:
            return
        if any(here is not now for here, now in zip(self.tables, tables(module), strict=True)):
            raise RouteError(
                "the embeddings or the head were replaced after the first attach (resize_token_embeddings?), and "
                "adapters there would not act; save them, resize, attach again"
            )
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for adapter in self:
                adapter.warn_unguided()

    def end(self, module: nn.Module) -> None:
        """After the first forward: every site of a new adapter must have run, or it is there in name only."""
        self.current.tables.goes_on = False
        self.masks = self.masks | {texts.LABELS: None}  # not those of a next forward, of a part that takes none
        segments.end()
        visited, self.visited = self.visited, None
        if visited is None or freeze.drops_layers(module):
            return
        for name in sorted(self.unchecked):
            missed = [path for path in self[name].sites if path not in visited]
            if missed:
                raise RouteError(
                    f"adapter {name!r}: {len(missed)} of its sites did not run in this forward, the first is "
                    f"{missed[0]}; the model bypasses them, so the adapter cannot act there"
                )
        self.unchecked.clear()

    def enter(self, route: Route) -> None:
        """Make a route the inner one; it takes over what the sites keep if the last one was the same."""
        if route == self.last:
            route.take_over(self.last)
        elif self.last not in self.routes:
            self.last.tables.clear()
        self.last = route
        self.routes.append(route)
        self.refresh()

    def leave(self, route: Route) -> None:
        """End this very route, even if another one was begun after it; what is in use holds outside of all."""
        self.routes = [other for other in self.routes if other is not route]
        self.refresh()

    def refresh(self) -> None:
        """Let the innermost route hold, or what is in use."""
        self.current = self.routes[-1] if self.routes else Route.everywhere(self.used)

    def snapshot(self) -> tuple[Any, ...]:
        """What a recomputed part of a forward has to find again."""
        drawn = [(drawer, drawer.drawn) for drawer in self._drawers()]
        state = self.current, self.past, self.batch, self.prompted, self.shifted, self.asleep, self.masks
        return *state, drawn

    def restore(self, state: tuple[Any, ...]) -> None:
        """Put a snapshot back."""
        *now, self.masks, drawn = state
        self.current, self.past, self.batch, self.prompted, self.shifted, self.asleep = now
        for drawer, value in drawn:
            drawer.drawn = value

    def _drawers(self) -> list[Drawn]:
        return [leaf.shared for adapter in self for leaf in adapter.leaves if isinstance(leaf.shared, Drawn)]

    # Hooks at sites.

    def hook(self, path: str, handle: RemovableHandle) -> None:
        """Own a hook's handle, to remove it when the last adapter at this place goes."""
        self.handles.setdefault(path, []).append(handle)

    def place(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Install the hooks that an adapter's deltas need."""
        self.changed()
        for name, site, delta in adapter.owned():
            self.averages = self.averages or delta.reads_texts
            if isinstance(delta, AttentionDelta):
                interface.seat(model, self, site, name, delta)
            elif not isinstance(delta, positions.PositionDelta):
                self._place_site(model, site, name, delta)
        if adapter.shift or adapter.stretch != 1.0:
            positions.place(model, self)
        freeze.start(model, self, adapter)

    def _place_site(self, model: nn.Module, site: Site, name: str, delta: Delta) -> None:
        hook = self.hooks.get(site.path)
        if hook is None:
            hook = self.hooks[site.path] = SiteHook(self, site.path)
            self.hook(site.path, site.module.register_forward_hook(hook.after, with_kwargs=True))
        if type(delta).before is not Delta.before and f"{site.path}:before" not in self.handles:
            self.hook(f"{site.path}:before", site.module.register_forward_pre_hook(hook.before))
        hook.deltas[name] = delta
        if delta.reads_texts:
            hook.side = texts.side(model, site)
        if delta.tap is not None and delta.tap not in hook.taps:
            tap = hook.taps[delta.tap] = Tap(self)
            source = model.get_submodule(delta.tap)
            self.hook(site.path, source.register_forward_pre_hook(tap.before))
        if isinstance(delta, InputDelta) and f"{site.path}:slots" not in self.handles:
            slot_hook = SlotHook(self, site.path)
            self.hook(f"{site.path}:slots", site.module.register_forward_hook(slot_hook.after))
        if isinstance(delta, InputDelta):
            self._place_poolers(model)

    def _place_poolers(self, model: nn.Module) -> None:
        if ":pool" in self.handles:
            return
        hook = PoolHook(self)
        for kind, module in pooled(model):
            if kind == "input":
                self.hook(":pool", module.register_forward_pre_hook(hook.before))
            else:
                self.hook(":pool", module.register_forward_hook(hook.after))

    def remove(self, model: nn.Module, adapter: Adapter) -> None:
        """Take an adapter's deltas away, and every hook that serves nobody any more."""
        for name, site, delta in adapter.owned():
            if isinstance(delta, AttentionDelta):
                interface.unseat(model, self, site, name)
                continue
            self._displace(name, site.path)
        if not any(other.shift or other.stretch != 1.0 for other in self if other is not adapter):
            self._unhook(positions.HOOKS)
        if not any(self.prompts(((other.name, 1.0),)) for other in self if other is not adapter):
            self._unhook(":pool")
        self._unhook(f":barrier:{adapter.name}")

    def drop(self, adapter: Adapter, path: str) -> None:
        """Take one site off an adapter for good: the base answers there."""
        self._displace(adapter.name, path)
        adapter.drop(path)

    def changed(self) -> None:
        """Forget what sites keep for a route: an adapter came or went."""
        mixed.changed()
        self.last.tables.clear()

    def _displace(self, name: str, path: str) -> None:
        self.changed()
        hook = self.hooks.get(path)
        if hook is None:
            return
        hook.deltas.pop(name, None)
        if not any(delta.reads_texts for delta in hook.deltas.values()):
            hook.side = None
        if not hook.deltas:
            del self.hooks[path]
            self._unhook(path, f"{path}:before", f"{path}:slots")

    def _unhook(self, *paths: str) -> None:
        for path in paths:
            for handle in self.handles.pop(path, []):
                handle.remove()

    def unhook_all(self) -> None:
        """Remove whatever hook is left."""
        self._unhook(*list(self.handles))

    def watch(self, model: PreTrainedModel) -> None:
        """Install the hooks that every model with a bank has."""
        self.tables = tables(model)
        watched: list[nn.Module] = [model]
        base = getattr(model, "base_model", model)
        if base is not model:
            watched.append(base)
        if roles.is_encoder_decoder(model):
            with contextlib.suppress(AttributeError):  # a stack alone, whose config speaks of two
                watched.append(model.get_encoder())
        for module in watched:
            hook = RootHook(self, check=module is model)
            self.hook(":root", module.register_forward_pre_hook(hook.before, with_kwargs=True))
            if module is model:
                self.hook(":root", module.register_forward_hook(hook.after))
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if isinstance(head, nn.Linear):
            self.hook(":root", head.register_forward_pre_hook(ContiguousHook().before))

    def bar(self, module: nn.Module, name: str) -> None:
        """Detach what enters `module` for as long as the adapter is there."""
        self.hook(f":barrier:{name}", module.register_forward_pre_hook(BarrierHook().before, with_kwargs=True))


def bank_of(model: nn.Module) -> Bank:
    """The model's bank.

    Raises:
        RouteError: the model has no adapters.
    """
    bank = getattr(model, "adapters", None)
    if not isinstance(bank, Bank):
        raise RouteError("the model has no adapters; call graft.attach or graft.load first")
    return bank


def tables(model: Any) -> list[Any]:
    """The model's token embedding and output head; None for what it has not."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found = []
    for getter in getters:
        try:
            found.append(getter() if getter is not None else None)
        except (NotImplementedError, AttributeError):
            found.append(None)
    return found


def known(bank: Bank, entry: Entry) -> Entry:
    """The entry itself, if every adapter that it names is attached and may have the weight that it gives."""
    for name, weight in entry:
        if name not in bank:
            raise RouteError(f"no adapter is named {name!r}; attached: {', '.join(bank.names) or 'none'}")
        adapter = bank[name]
        if weight != 1.0 and adapter.unweighted:
            raise RouteError(f"adapter {name!r} ({adapter.method.name}) can only have weight 1, not {weight}")
        if adapter.selected and len(entry) > 1:
            raise RouteError(f"adapter {name!r} ({adapter.method.name}) trains the base itself; it acts alone")
    names = {name for name, _ in entry}
    twice = next((name for name in sorted(names) if "/" in name and name.partition("/")[0] in names), None)
    if twice is not None:
        raise RouteError(f"the entry has {twice!r} and {twice.partition('/')[0]!r}, whose part it is; name one of them")
    positions.divisor(bank, entry)
    return entry
