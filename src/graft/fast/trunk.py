"""The frozen trunk: hidden states below the first block that an adapter touches, computed once and kept.

What a text looks like there depends on its tokens alone, however often it is trained on and whoever stands beside it in
the batch. So each text's states are kept by its tokens, and a later forward starts at that block. Of an encoder-decoder
the trunk is the encoder: what is kept is its output, and frozen blocks of the decoder run at every step.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from graft import roles
from graft.adapt import route
from graft.adapter import Adapter
from graft.bank import bank_of
from graft.errors import SiteError
from graft.fast.devices import autocast_of
from graft.fast.store import Store
from graft.freeze import ABOVE, LAYERDROPS, first_block

WANTED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""What a trunk may read of a batch."""
REFUSED = (
    *("inputs_embeds", "encoder_outputs", "past_key_values", "global_attention_mask"),
    *("output_hidden_states", "output_attentions", "output_router_logits"),
)
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
        encoder: which is the trunk, of an encoder-decoder; None of others.
        served, computed: tokens that were found, and that were computed.
        seconds: what it took to compute them.

    Raises:
        SiteError: this model, or an adapter of it, has no trunk; the message says why.
    """

    def __init__(self, model: Any, store: Store | None = None, *, dropout: bool = False) -> None:
        self.model = model
        self.encoder: nn.Module | None = model.get_encoder() if len(roles.blocks(model)) > 1 else None
        self.depth, self.below = _trunk(model) if self.encoder is None else _encoder(model, self.encoder)
        self.blocks = len(_stack(model))
        self.store = Store() if store is None else store
        self.served = self.computed = 0
        self.seconds = 0.0
        self.forms: dict[nn.Module, Callable[[Tensor], Any]] = {}
        self.causal = roles.is_decoder(model)
        self.firsts: dict[Adapter, int] = {}
        self.modules = _modules_below(model, self.depth) if self.encoder is None else list(self.encoder.modules())
        drops = next((module for module in self.modules if _drops(module)), None)
        if drops is not None and not dropout:
            raise SiteError(f"the frozen blocks drop out ({type(drops).__name__}), and kept states cannot")
        if any(hasattr(module, "expert_capacity") for module in self.modules):
            raise SiteError("experts have a capacity, so what a text looks like depends on its batch")
        self._check()

    @property
    def saved(self) -> float:
        """Seconds that the served tokens would have taken, by what the others took."""
        return self.seconds * self.served / self.computed if self.computed else 0.0

    @property
    def key(self) -> str:
        """What kept states depend on besides a text: the trunk's weights, its config, the versions, the device."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in ("_name_or_path", "use_cache")}
        about = [type(self.model).__name__, self.depth, self.model.device.type, self.model.config._attn_implementation]
        told = json.dumps([about, config, torch.__version__, transformers.__version__], sort_keys=True, default=str)
        found = hashlib.sha256(told.encode())
        for module in self.modules:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    @contextlib.contextmanager
    def serving(self, batch: dict[str, Any], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, a forward of the model on this batch (and under this route) starts at the first block that trains.

        A batch that cannot is run whole. Texts that are not kept are computed first, without a graph.

        Args:
            batch: what the model will be called with.
            lengths: tokens of each text of a packed batch; None: as the route says.
        """
        packed = lengths or bank_of(self.model).current.lengths
        takes = self._takes(batch) and (self.encoder is None or packed is None)
        texts = _texts(batch, packed, self.causal) if takes else []
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
        # A new adapter's first forward meets all its sites, or is refused: so one that reaches below waits for it.
        return all(self._acts_above(bank[name]) for name in {*bank.current.names, *bank.unchecked})

    def _acts_above(self, adapter: Adapter) -> bool:
        if adapter not in self.firsts:
            self.firsts[adapter] = lowest(self.model, adapter)
        return self.firsts[adapter] >= self.depth

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
        reader: Any = self.model.base_model if self.encoder is None else self.encoder
        if self.encoder is not None:
            part.pop("use_cache", None)
        seen: list[Tensor] = []
        hook = self.below[-1].register_forward_hook(lambda module, args, output: seen.append(_hidden(output)))
        modes = [(module, module.training) for module in self.modules]
        begun = time.perf_counter()
        try:
            for module, _ in modes:
                module.training = False
            above = _stack(self.model)[self.depth :] if self.encoder is None else []
            lengths = [text.size for text in missing] if packed else None
            with torch.no_grad(), self._as_base(len(missing), lengths), self._skipping(above, None):
                reader(**part)
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
        before = [block.__dict__.get("forward") for block in blocks]  # a compiled one, while training steps run
        for block in blocks:
            block.__dict__["forward"] = _Skip(state, self.forms.get(block, _plain))
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                del block.__dict__["forward"]
                block.__dict__ |= {} if forward is None else {"forward": forward}

    def _check(self) -> None:
        """Try it on two short texts.

        Raises:
            SiteError: the model does not give the same from kept states (blocks hand on more than hidden states).
        """
        model, size = self.model, self.model.get_input_embeddings().num_embeddings
        ids_BT = torch.tensor([[5, 7, 11, 13], [17, 19, 23, 29]], device=model.device) % size
        kept, self.store = self.store, Store()
        modes = {module: module.training for module in model.modules()}
        batch = {"input_ids": ids_BT} | ({"use_cache": False} if self.causal else {})
        batch |= {} if self.encoder is None else {"decoder_input_ids": ids_BT[:, :2]}
        hooks = [block.register_forward_hook(self._note) for block in {*_stack(model), *self.below}]
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

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Remember in what form a module hands its hidden states on."""
        if isinstance(output, ModelOutput):
            if len(output) > 1:
                raise SiteError(f"{type(module).__name__} hands on {', '.join(output)}")
            self.forms[module] = functools.partial(_as, type(output))
        elif isinstance(output, tuple):
            self.forms[module] = _tuple


class _Text:
    """One text of a batch: its row and place there, and the key of its tokens."""

    def __init__(self, row: int, place: slice, ids: Tensor, more: bytes) -> None:
        dtype = autocast_of(ids.device)
        more += b"" if dtype is None else str(dtype).encode()
        self.row, self.place, self.size = row, place, len(ids)
        self.key = hashlib.sha256(ids.cpu().numpy().tobytes() + b"|" + more).digest()


def lowest(model: nn.Module, adapter: Adapter) -> int:
    """The first block whose outputs an adapter changes; moved positions change all."""
    return 0 if adapter.shift or adapter.stretch != 1.0 else first_block(model, adapter)


def _stack(model: nn.Module) -> list[nn.Module]:
    return [block for stack in roles.blocks(model).values() for _, block in stack]


def _trunk(model: Any) -> tuple[int, list[nn.Module]]:
    stacks = roles.blocks(model)
    config = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if len(stacks) != 1 or len(next(iter(stacks.values()))) != depth:
        raise SiteError(f"{type(model).__name__} is not one stack of blocks")
    stack = _stack(model)
    first = min((lowest(model, adapter) for adapter in bank_of(model)), default=0)
    if first <= 0:
        raise SiteError("an adapter acts in the first block or below it")
    trained = [i for i, block in enumerate(stack) if any(p.requires_grad for p in block.parameters())]
    first = min([first, *trained])
    heads = [site.module for site in roles.sites(model) if site.role not in ABOVE and site.layer is None]
    if first == 0 or any(p.requires_grad for module in heads for p in module.parameters()):
        raise SiteError("the base trains in the first block or below it")
    _check_config(config)
    if any(getattr(config, name, 0) for name in LAYERDROPS):
        raise SiteError("whole blocks are left out at random (layerdrop)")
    if any("forward" in block.__dict__ for block in stack[:first]):
        raise SiteError("the forward of a block was replaced")
    return first, stack[:first]


def _check_config(config: Any) -> None:
    if getattr(config, "output_router_logits", False):
        raise SiteError("the loss reads the routers of all blocks")
    if getattr(config, "attention_type", None) == "block_sparse":
        raise SiteError("what block-sparse attention makes of a text depends on the longest of its batch")


def _encoder(model: Any, encoder: nn.Module) -> tuple[int, list[nn.Module]]:
    depth = len(roles.blocks(model)["encoder"])
    first = min((lowest(model, adapter) for adapter in bank_of(model)), default=0)
    if first <= 0:
        raise SiteError("an adapter acts in the first block or below it")
    if first < depth:
        raise SiteError("an adapter acts in the encoder")
    if model.main_input_name != "input_ids":
        raise SiteError(f"the encoder reads {model.main_input_name}, not tokens")
    _check_config(model.config)
    if any(p.requires_grad for p in encoder.parameters()):
        raise SiteError("the encoder trains")
    if "forward" in encoder.__dict__:
        raise SiteError("the forward of the encoder was replaced")
    return depth, [encoder]


def _modules_below(model: Any, depth: int) -> list[nn.Module]:
    """Every module that may run before the block at `depth`."""
    tops = [*_stack(model)[depth:], *(site.module for site in roles.sites(model) if site.role in ABOVE)]
    above = {module for top in tops for module in top.modules()}
    return [module for module in roles.modules_of_base(model.base_model).values() if module not in above]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops out while it trains: by a Dropout, or by a number of its own (OPT, BART, Falcon)."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any(
        ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


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
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _plain(state: Tensor) -> Tensor:
    return state


def _tuple(state: Tensor) -> tuple[Tensor]:
    return (state,)


def _as(kind: type, state: Tensor) -> Any:
    return kind(last_hidden_state=state)


class _Skip:
    """A module's forward that hands on its input, or the state that it was given."""

    def __init__(self, state: Tensor | None, form: Callable[[Tensor], Any]) -> None:
        self.state, self.form = state, form

    def __call__(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.form(hidden_states if self.state is None else self.state)
