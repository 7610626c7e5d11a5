"""Who trains: freezing the base, selection methods, and what a checkpoint or a save of the base must not see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft import roles
from graft.adapter import key_of
from graft.errors import ConfigError
from graft.hooks import BarrierHook, Replayed
from graft.method import Build, SelectMethod

if TYPE_CHECKING:
    from graft.adapter import Adapter
    from graft.bank import Bank
    from graft.routes import Entry

EMBEDDED = ("embedding", "position", "token_type", "norm.embedding")
CUT = ":cut"
"""The name of the hooks in front of the stacks."""
ABOVE = ("head", "norm.final", "pooler")
"""Roles outside of all blocks that stand above them."""
LAYERDROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
Stacks = dict[str, list[tuple[str, nn.Module]]]
ASKS_GRADIENT = "has_relative_attention_bias"
"""What T5's attention has. It checkpoints nothing, but where it is told of checkpointing it asks a gradient of its own
zero bias, for the reentrant kind; so a graph would begin in blocks that are frozen."""


class StartHook(BarrierHook):
    """Detaches what enters a block while training, if every adapter in the route starts there or further up.

    It does not where somebody wants a gradient from further down: of inputs that were given, or of a weight below.
    """

    def __init__(self, bank: Bank, layer: int, below: list[nn.Parameter]) -> None:
        self.bank = bank
        self.layer = layer
        self.below = below

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Only while training: in eval mode somebody may want the gradient of the inputs.
        if self.bank.asleep or not module.training or self.bank.given:
            return None
        if any(parameter.requires_grad for parameter in self.below):
            return None
        names = [name for entry in self.bank.current.entries for name, _ in self.bank.leaves(entry)]
        starts = [self.bank[name].starts for name in names]
        if not starts or any(start is None or start < self.layer for start in starts):
            return None
        return super().before(module, args, kwargs)


def freeze(model: nn.Module, bank: Bank) -> None:
    """Freeze every parameter of the base and remember which were trainable."""
    bank.flags = {name: p.requires_grad for name, p in model.named_parameters()}
    bank.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    model.requires_grad_(False)


def thaw(model: nn.Module, bank: Bank) -> None:
    """Give the base's flags and functions back as they were before the first attach."""
    for name, parameter in model.named_parameters():
        if name in bank.flags:
            parameter.requires_grad_(bank.flags[name])
    checkpoints: Any = any(module.gradient_checkpointing for module in bank.checkpointed)
    for module in model.modules():
        inner = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(inner, Replayed):
            module._gradient_checkpointing_func = inner.inner  # type: ignore[assignment]
            if hasattr(module, ASKS_GRADIENT):
                module.gradient_checkpointing = checkpoints


def replay_checkpoints(bank: Bank) -> None:
    """Make each checkpointing function remember its route; they may have been set since the last forward."""
    for module in bank.checkpointed:
        inner = module.__dict__.get("_gradient_checkpointing_func")
        if inner is None or isinstance(inner, Replayed) or not module.gradient_checkpointing:
            continue
        if getattr(inner, "keywords", {}).get("use_reentrant", False):
            raise ConfigError(
                "gradient checkpointing with use_reentrant=True loses the gradients of adapters in frozen models; "
                'enable it with {"use_reentrant": False}'
            )
        module._gradient_checkpointing_func = Replayed(bank, inner)  # type: ignore[assignment]
        if hasattr(module, ASKS_GRADIENT):
            module.gradient_checkpointing = False  # type: ignore[assignment]


def ignore_on_save(model: nn.Module, bank: Bank, adapter: Adapter) -> None:
    """Keep the adapters' keys out of the base's own files, which are matched by exact name.

    Args:
        adapter: the one that came, went or changed; the keys of the others stay as they are.
    """
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    name = adapter.name.partition("/")[0]
    prefix = f"adapters.held.{key_of(name)}."
    stays = name in bank
    whole = bank[name] if stays else adapter
    kept = set(ignored or ()) - whole.ignored - {"adapters."}
    whole.ignored = {f"{prefix}{key}" for key in whole.state_dict()} if stays else set()
    kept |= whole.ignored
    # One key more than there are: a Trainer that loads such a checkpoint then warns that the adapters are not in it.
    new: Any = kept | ({"adapters."} if any(key.startswith("adapters.") for key in kept) else set())
    if new or ignored is not None:
        model._keys_to_ignore_on_save = new


def drops_layers(model: nn.Module) -> bool:
    """Whether a training forward may skip whole layers at random."""
    config = getattr(model, "config", None)
    return model.training and any(getattr(config, name, 0) for name in LAYERDROPS)


def claim(model: nn.Module, bank: Bank, adapter: Adapter, trainable: bool) -> None:
    """Hand base parameters to a selection method: keep their originals, let them train, cut the graph below."""
    adapter.other = {name: p.detach().clone() for name, p in adapter.selected.items()}
    for parameter in adapter.selected.values():
        parameter.requires_grad_(trainable)
    method = adapter.method
    assert isinstance(method, SelectMethod)
    for path in method.barriers(Build(model, adapter.peft_compat)):
        bank.bar(model.get_submodule(path), adapter.name)
    adapter.acting, adapter.trains = True, trainable


def unclaim(model: nn.Module, adapter: Adapter) -> None:
    """Give base parameters back, bit for bit."""
    if adapter.acting:
        swap(adapter)
    for parameter in adapter.selected.values():
        parameter.requires_grad_(False)


def start(model: nn.Module, bank: Bank, adapter: Adapter) -> None:
    """Note the first block that an adapter acts in, and let no graph be kept below it while training.

    A model whose embeddings give gradients (`enable_input_require_grads`, which checkpointing turns on) would keep one
    through all frozen blocks: so it is cut in front of the first block of each stack, and once more where the adapter
    starts, for what goes past the blocks.
    """
    stacks = roles.blocks(model)
    found = list(stacks.values())
    if not all(found) or not found:
        return
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    first = first_block(model, adapter, stacks)
    if len(found) != 1 or len(found[0]) != depth:
        first = min(first, 0)  # two stacks meet in every layer, and a block that runs many times has nothing below it
    for each in (adapter, *adapter.leaves):
        each.starts = first
    if CUT in bank.handles and not 0 < first < depth:
        return
    embedded = [p for site in roles.sites(model) if site.role in EMBEDDED for p in site.module.parameters()]
    if CUT not in bank.handles:
        for blocks in found:
            _cut(bank, CUT, blocks[0][1], 0, embedded)
    if 0 < first < depth:
        below = embedded + [p for _, block in found[0][:first] for p in block.parameters()]
        _cut(bank, f":barrier:{adapter.name}", found[0][first][1], first, below)


def first_block(model: nn.Module, adapter: Adapter, stacks: Stacks | None = None) -> int:
    """The first block that an adapter acts in, counted through the stacks, an encoder's blocks before a decoder's.

    Args:
        stacks: the model's `roles.blocks`, where they are at hand.

    Returns:
        Its index; -1 where the adapter acts below all blocks, their number where above.
    """
    stacks = roles.blocks(model) if stacks is None else stacks
    paths = [f"{path}." for stack in stacks.values() for path, _ in stack]
    names = [f"{name}." for name in (*(site.path for site in adapter.sites.values()), *adapter.selected)]
    inside = [next((i for i, path in enumerate(paths) if name.startswith(path)), None) for name in names]
    found = [i for i in inside if i is not None]
    outside = [name for name, i in zip(names, inside, strict=True) if i is None]
    above = [site for site in roles.sites(model) if site.role in ABOVE] if outside else []
    for name in outside:
        site = next((site for site in above if name.startswith(f"{site.path}.")), None)
        if site is None:
            found.append(-1)
        elif len(stacks) > 1 and site.stack == "encoder":
            found.append(len(stacks["encoder"]) - 1)  # the encoder's last norm is below the decoder's blocks
    return min(found, default=len(paths))


def _cut(bank: Bank, name: str, block: nn.Module, layer: int, below: list[nn.Parameter]) -> None:
    hook = StartHook(bank, layer, below)
    bank.hook(name, block.register_forward_pre_hook(hook.before, with_kwargs=True))


def select(model: nn.Module, bank: Bank, entry: Entry) -> None:
    """Let the base have the trained values of a selection method exactly when it is in use."""
    names = {name for name, _ in entry}
    for adapter in bank:
        if adapter.selected and adapter.acting != (adapter.name in names):
            swap(adapter)


def swap(adapter: Adapter) -> None:
    """Exchange the base's values and the other ones that are kept; only the adapter's own may train."""
    for name, parameter in adapter.selected.items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(adapter.other[name])  # not .data: autograd shall see a graph that has become stale
        adapter.other[name] = kept
        parameter.requires_grad_(adapter.trains and not adapter.acting)
    adapter.acting = not adapter.acting
