"""The frozen trunk: hidden states below the first block that an adapter touches, computed once and kept.

What a text looks like there depends on its tokens alone, however often it is trained on and whoever stands beside it in
the batch. So each text's states are kept by its tokens, and a later forward starts at that block.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.adapt import route
from graft.adapter import Adapter
from graft.bank import bank_of
from graft.errors import SiteError
from graft.fast.store import Store
from graft.freeze import ABOVE

WANTED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""What a trunk may read of a batch."""
REFUSED = ("inputs_embeds", "past_key_values", "output_hidden_states", "output_attentions", "output_router_logits")
"""Of a batch that has one of these, no forward can start above."""


class Trunk:
    """The kept states of one model's frozen lower blocks.

    Args:
        model: with every adapter attached whose rows will come.
        store: where states are kept; None: in memory, without a bound.
        dropout: switch the trunk's own dropout off; otherwise a trunk that has some is refused.

    Attributes:
        depth: how many blocks the trunk has.
        blocks: how many the model has.
        served, computed: tokens that were found, and that were computed.
        seconds: what it took to compute them.

    Raises:
        SiteError: this model, or an adapter of it, has no trunk; the message says why.
    """

    def __init__(self, model: Any, store: Store | None = None, *, dropout: bool = False) -> None:
        self.model = model
        self.depth, self.below = _trunk(model)
        self.blocks = len(_stack(model))
        self.store = Store() if store is None else store
        self.served = self.computed = 0
        self.seconds = 0.0
        self.tuples: set[nn.Module] = set()
        self.causal = roles.is_decoder(model)
        self.firsts: dict[Adapter, int] = {}
        self.modules = _modules_below(model, self.depth)
        drops = next((module for module in self.modules if _drops(module)), None)
        if drops is not None and not dropout:
            raise SiteError(f"the frozen blocks drop out ({type(drops).__name__}), and kept states cannot")
        self._check()

    @property
    def saved(self) -> float:
        """Seconds that the served tokens would have taken, by what the others took."""
        return self.seconds * self.served / self.computed if self.computed else 0.0

    @contextlib.contextmanager
    def serving(self, batch: dict[str, Any], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, a forward of the model on this batch (and under this route) starts at the first block that trains.

        A batch that cannot is run whole. Texts that are not kept are computed first, without a graph.

        Args:
            batch: what the model will be called with.
            lengths: tokens of each text of a packed batch; None: as the route says.
        """
        packed = lengths or bank_of(self.model).current.lengths
        texts = _texts(batch, packed, self.causal) if self._takes(batch) else []
        if not texts:
            yield
            return
        state = self._states(batch, texts, packed is not None)
        with self._skipping(self.below[:-1], None), self._skipping(self.below[-1:], state):
            yield

    def _takes(self, batch: dict[str, Any]) -> bool:
        """Whether everything in this batch that acts, acts above the trunk."""
        bank = bank_of(self.model)
        if any(batch.get(key) is not None and batch.get(key) is not False for key in REFUSED):
            return False
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None or (mask is not None and mask.dim() != 2) or bank.asleep:
            return False
        for adapter in [bank[name] for name in bank.current.names]:
            if adapter not in self.firsts:
                self.firsts[adapter] = first_block(self.model, adapter)
        return all(self.firsts[bank[name]] >= self.depth for name in bank.current.names)

    def _states(self, batch: dict[str, Any], texts: list[_Text], packed: bool) -> Tensor:
        """(B, T, D): what comes out of the trunk for the texts of a batch, zero where there is padding."""
        found = {text.key: self.store.get(text.key) for text in texts}
        missing = list({text.key: text for text in texts if found[text.key] is None}.values())
        if missing:
            found |= self._compute(batch, missing, packed)
        self.served += sum(text.size for text in texts) - sum(text.size for text in missing)
        first = next(state for state in found.values() if state is not None)
        ids_BT = batch["input_ids"]
        out_BTD = torch.zeros(*ids_BT.shape, first.shape[-1], dtype=first.dtype, device=ids_BT.device)
        for text in texts:
            state_TD = found[text.key]
            assert state_TD is not None
            out_BTD[text.row, text.place] = state_TD.to(ids_BT.device)
        return out_BTD

    def _compute(self, batch: dict[str, Any], missing: list[_Text], packed: bool) -> dict[bytes, Tensor]:
        """The states of some texts of a batch, by one forward of the trunk alone; they are kept too."""
        part = _part(batch, missing, packed)
        seen: list[Tensor] = []
        hook = self.below[-1].register_forward_hook(lambda module, args, output: seen.append(_hidden(output)))
        modes = [(module, module.training) for module in self.modules]
        begun = time.perf_counter()
        try:
            for module, _ in modes:
                module.training = False
            above = _stack(self.model)[self.depth :]
            lengths = [text.size for text in missing] if packed else None
            with torch.no_grad(), self._as_base(len(missing), lengths), self._skipping(above, None):
                self.model.base_model(**part)
        finally:
            hook.remove()
            for module, mode in modes:
                module.training = mode
        self.seconds += time.perf_counter() - begun
        news = {}
        for text, (row, place) in zip(missing, _places(missing, packed), strict=True):
            news[text.key] = state_TD = seen[0][row, place].detach().clone()
            self.store.put(text.key, state_TD)
            self.computed += text.size
        return news

    def _as_base(self, rows: int, lengths: Sequence[int] | None) -> contextlib.AbstractContextManager[Any]:
        """The route of a batch in which no adapter acts."""
        if any(adapter.selected for adapter in bank_of(self.model)):
            return contextlib.nullcontext()  # what trains the base itself cannot be routed; it acts above all the same
        if lengths is not None:
            return route(self.model, segments=[(None, length) for length in lengths])
        return route(self.model, [None] * rows)

    @contextlib.contextmanager
    def _skipping(self, blocks: list[nn.Module], state: Tensor | None) -> Iterator[None]:
        """Inside, these blocks hand their input on, or the state."""
        for block in blocks:
            block.__dict__["forward"] = _Skip(state, block in self.tuples)
        try:
            yield
        finally:
            for block in blocks:
                del block.__dict__["forward"]

    def _check(self) -> None:
        """Try it on two short texts.

        Raises:
            SiteError: the model does not give the same from kept states (blocks hand on more than hidden states).
        """
        model, size = self.model, self.model.get_input_embeddings().num_embeddings
        ids_BT = torch.tensor([[5, 7, 11, 13], [17, 19, 23, 29]], device=model.device) % size
        kept, self.store = self.store, Store()
        modes = {module: module.training for module in model.modules()}
        batch = {"input_ids": ids_BT} | ({"use_cache": False} if roles.is_decoder(model) else {})
        hooks = [block.register_forward_hook(self._note) for block in _stack(model)]
        try:
            model.eval()
            with torch.no_grad(), self._as_base(2, None):
                whole = model.base_model(**batch)[0]
                with self.serving(batch):
                    served = model.base_model(**batch)[0]
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
            self.store, self.served, self.computed, self.seconds = kept, 0, 0, 0.0
        if not torch.allclose(whole, served, rtol=1e-5, atol=1e-5 * float(whole.abs().max())):
            raise SiteError(f"{type(model).__name__} hands more from block to block than hidden states")

    def _note(self, block: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self.tuples.add(block)


class _Text:
    """One text of a batch: its row and place there, and the key of its tokens."""

    def __init__(self, row: int, place: slice, ids: Tensor, more: bytes) -> None:
        self.row, self.place, self.size = row, place, len(ids)
        self.key = hashlib.sha256(ids.cpu().numpy().tobytes() + b"|" + more).digest()


def first_block(model: nn.Module, adapter: Adapter) -> int:
    """The first block that an adapter acts in: 0 also where it acts below all blocks, their number where above."""
    if adapter.shift or adapter.stretch != 1.0:
        return 0
    stack = [path for site_stack in roles.blocks(model).values() for path, _ in site_stack]
    firsts = [len(stack)]
    for site in adapter.sites.values():
        if site.role not in ABOVE:
            firsts.append(site.layer or 0)
    above = {f"{site.path}." for site in roles.sites(model) if site.role in ABOVE}
    for name in adapter.selected:
        inside = [i for i, path in enumerate(stack) if name.startswith(f"{path}.")]
        if not any(name.startswith(path) for path in above):
            firsts.append(inside[0] if inside else 0)
    return min(firsts)


def _stack(model: nn.Module) -> list[nn.Module]:
    return [block for stack in roles.blocks(model).values() for _, block in stack]


def _trunk(model: Any) -> tuple[int, list[nn.Module]]:
    stacks = roles.blocks(model)
    config = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if len(stacks) != 1 or len(next(iter(stacks.values()))) != depth:
        raise SiteError(f"{type(model).__name__} is not one stack of blocks")
    stack = _stack(model)
    first = min((first_block(model, adapter) for adapter in bank_of(model)), default=0)
    if first == 0:
        raise SiteError("an adapter acts in the first block or below it")
    trained = [i for i, block in enumerate(stack) if any(p.requires_grad for p in block.parameters())]
    first = min([first, *trained])
    heads = [site.module for site in roles.sites(model) if site.role not in ABOVE and site.layer is None]
    if first == 0 or any(p.requires_grad for module in heads for p in module.parameters()):
        raise SiteError("the base trains in the first block or below it")
    if getattr(config, "output_router_logits", False):
        raise SiteError("the loss reads the routers of all blocks")
    if any("forward" in block.__dict__ for block in stack[:first]):
        raise SiteError("the forward of a block was replaced")
    return first, stack[:first]


def _modules_below(model: Any, depth: int) -> list[nn.Module]:
    """Every module that may run before the block at `depth`."""
    tops = [*_stack(model)[depth:], *(site.module for site in roles.sites(model) if site.role in ABOVE)]
    above = {module for top in tops for module in top.modules()}
    return [module for module in model.base_model.modules() if module not in above]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops out while it trains: by a Dropout, or by a number that it hands to its attention."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(float(getattr(module, name, 0.0) or 0.0) > 0 for name in ("attention_dropout", "dropout_p"))


def _texts(batch: dict[str, Any], lengths: Sequence[int] | None, causal: bool) -> list[_Text]:
    ids_BT, mask_BT = batch["input_ids"], batch.get("attention_mask")
    places: list[tuple[int, slice]] = []
    if lengths is not None:
        at = 0
        for length in lengths:
            row, start = divmod(at, ids_BT.shape[1])
            places.append((row, slice(start, start + length)))
            at += length
        return [_Text(row, place, ids_BT[row, place], b"") for row, place in places]
    for row in range(len(ids_BT)):
        real = torch.arange(ids_BT.shape[1]) if mask_BT is None else mask_BT[row].nonzero()
        if len(real):
            # What an encoder has at index 0 is pooled, whether it is padding or not.
            places.append((row, slice(int(real[0]) if causal else 0, int(real[-1]) + 1)))
    return [_Text(row, place, ids_BT[row, place], _besides(batch, row, place)) for row, place in places]


def _besides(batch: dict[str, Any], row: int, place: slice) -> bytes:
    """What else tells a text from others with its tokens; nothing where it is alone, from position 0 on."""
    found = {key: batch[key] for key in WANTED[1:] if batch.get(key) is not None}
    parts = {key: value[row if len(value) > 1 else 0, place].cpu() for key, value in found.items()}
    if (mask := parts.pop("attention_mask", None)) is not None and not bool(mask.all()):
        parts["attention_mask"] = mask
    positions = parts.pop("position_ids", None)
    if positions is None and place.start:
        positions = torch.arange(place.start, place.stop)
    if positions is not None and not torch.equal(positions, torch.arange(len(positions))):
        parts["position_ids"] = positions
    return b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(parts.items()))


def _part(batch: dict[str, Any], texts: list[_Text], packed: bool) -> dict[str, Any]:
    """What the trunk reads of these texts alone."""
    wanted = {key: batch[key] for key in WANTED if batch.get(key) is not None}
    more = {"use_cache": False} if "use_cache" in batch else {}
    if packed:
        return {key: torch.cat([value[t.row, t.place] for t in texts])[None] for key, value in wanted.items()} | more
    rows = torch.tensor([text.row for text in texts], device=wanted["input_ids"].device)
    return {key: value if len(value) == 1 else value[rows] for key, value in wanted.items()} | more


def _places(texts: list[_Text], packed: bool) -> list[tuple[int, slice]]:
    """Where each text stands in what `_part` made."""
    if not packed:
        return [(i, text.place) for i, text in enumerate(texts)]
    ends = torch.tensor([text.size for text in texts]).cumsum(0).tolist()
    return [(0, slice(end - text.size, end)) for end, text in zip(ends, texts, strict=True)]


def _hidden(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


class _Skip:
    """A block's forward that hands on its input, or the state that it was given."""

    def __init__(self, state: Tensor | None, as_tuple: bool) -> None:
        self.state, self.as_tuple = state, as_tuple

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = hidden_states if self.state is None else self.state
        return (out,) if self.as_tuple else out
