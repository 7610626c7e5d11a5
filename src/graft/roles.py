"""Roles of a model's modules, and how methods ask for them.

A role says what a module does, whatever the architecture calls it: `attention.query`, `ffn.down`, `norm.final`. Methods
name roles and never module names; a user may give both. The names live in `vocabulary.py`, as data.

A fused linear (`attention.qkv`, `ffn.gate_up`) answers for each of its parts: it is one site, `parts_asked` says which
parts are meant and `part_rows` which rows of its output they are.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from graft import vocabulary
from graft.errors import SiteError
from graft.vocabulary import children_of, container_of, kind_of, layer_of
from graft.weights import features, is_embedding, is_linear

BANK = "adapters"
OTHER = "other"
ALL_LINEAR = "all-linear"
PARTS = {"attention.qkv": ("query", "key", "value"), "ffn.gate_up": ("gate", "up")}
_ATTENTION = ("attention", *(f"attention.{part}" for part in ("query", "key", "value", "output", "qkv")))
_NORMS = ("attention", "attention_post", "cross_attention", "ffn", "ffn_post", "query", "key", "embedding", "final")
ROLES = (
    *_ATTENTION,
    *(f"cross_{role}" for role in _ATTENTION),
    *("ffn", "ffn.up", "ffn.gate", "ffn.gate_up", "ffn.down"),
    *(f"norm.{part}" for part in _NORMS),
    *("embedding", "position", "token_type", "pooler", "head"),
)
# What a target may say beside a role: only self-attention, or every norm.
_ENTRIES = frozenset({*ROLES, *(f"self_{role}" for role in _ATTENTION), "norm"})

Targets = str | Sequence[str]
Layers = int | Sequence[int] | None


@dataclass(frozen=True)
class Site:
    """A named place in the user's model.

    `layer` is the index in its list of blocks, None outside. Sizes are of the weight for linears, embeddings and norms,
    the hidden width (0 where unknown) for whole sub-modules.
    """

    path: str
    role: str
    layer: int | None
    module: nn.Module
    in_features: int
    out_features: int

    @property
    def stack(self) -> Literal["encoder", "decoder"]:
        """The stack by the path; it means something only where a model has both."""
        return "encoder" if "encoder" in self.path.split(".") else "decoder"


@vocabulary.once
def sites(model: nn.Module, *, unnamed: bool = False) -> list[Site]:
    """Every module that has a role, in the order of `named_modules`; works on the meta device.

    Args:
        model: any transformers model; the bank inside it is skipped.
        unnamed: also give the linears and embeddings that have no role, as role "other".
    """
    modules = modules_of_base(model)
    output, source = _embeddings(model, "get_output_embeddings"), _embeddings(model, "get_input_embeddings")
    roles = vocabulary.name_roles(modules, _model_type(model), output, source)
    hidden = _hidden(model)
    found = []
    for path, module in modules.items():
        role = roles.get(path)
        if role is None and unnamed:
            known = is_linear(module) or (is_embedding(module) and not path.endswith(vocabulary.UNBATCHED))
            known = known or (kind_of(module) == "norm" and vocabulary.HEAD_INSIDE.match(path) is not None)
            role = OTHER if known else None
        if role is not None:
            found.append(Site(path, role, layer_of(path, modules), module, *_sizes(module, hidden)))
    return found


def select(model: nn.Module, targets: Targets, *, exclude: Targets = (), layers: Layers = None) -> list[Site]:
    """The sites that `targets` name, in model order, each once.

    Args:
        model: any transformers model.
        targets: roles and module names, mixed (a module's name ends with the entry, as in peft; inside a task head it
            is the whole path). `attention.query` means cross-attention too, `self_attention.query` does not; `norm` is
            every norm. A single string is "all-linear", a role, or a regex for the whole path of a leaf module.
        exclude: the same forms; what it names is left out.
        layers: None for all, n for the top n of each stack, or indices; sites outside of layers are then dropped.

    Raises:
        SiteError: an entry names nothing or routed experts, part of a fused linear is excluded, a layer does not exist,
            nothing is left.
    """
    everything = sites(model, unnamed=True)
    wanted = _matching(model, everything, targets, "targets")
    unwanted = _matching(model, everything, exclude, "exclude") if exclude else set()
    for site in everything:
        if site.path in wanted and site.path in unwanted:
            cut = parts_asked(site, exclude)
            asked = parts_asked(site, targets) or PARTS.get(_plain(site.role), ())
            if cut and set(cut) & set(asked):
                raise SiteError(
                    f"exclude names {', '.join(cut)} inside the fused {site.path}: name the parts you want in targets"
                )
            if not cut:
                wanted.discard(site.path)
    chosen = _in_layers(model, [site for site in everything if site.path in wanted], layers)
    vocabulary.refuse_routed(site.path for site in chosen)
    if not chosen:
        raise SiteError(f"targets {_show(targets)} leave no site after exclude={_show(exclude)} and layers={layers}")
    return chosen


def parts_asked(site: Site, targets: Targets) -> tuple[str, ...]:
    """Which parts of a fused site `targets` mean, in their fixed order; () when the whole is meant.

    The whole is meant by a module name, by the fused role itself, by a regex, and by asking for every part.
    """
    parts = PARTS.get(_plain(site.role))
    if parts is None or (isinstance(targets, str) and targets not in _ENTRIES):
        return ()
    asked: set[str] = set()
    for entry in _entries(targets):
        if entry not in _ENTRIES:
            if _name_fits(site.path, entry):
                return ()
        elif _role_fits(site.role, entry):
            part = entry.rpartition(".")[2]
            if part not in parts:
                return ()
            asked.add(part)
    return tuple(part for part in parts if part in asked) if len(asked) < len(parts) else ()


def fits(site: Site, targets: Targets) -> bool:
    """Whether one site answers for `targets`: roles and module names, or one regex for the whole path."""
    if isinstance(targets, str) and targets not in _ENTRIES:
        return re.fullmatch(targets, site.path) is not None
    return any((e in _ENTRIES and _role_fits(site.role, e)) or _name_fits(site.path, e) for e in _entries(targets))


def peft_scaled(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What peft's (IA)^3 scales by default: the targets, and those of them whose input is scaled."""
    return vocabulary.PEFT_SCALED.get(_model_type(model), vocabulary.SCALED)


def part_rows(site: Site, part: str, model_config: Any) -> Tensor:
    """Row indices (a LongTensor, ascending) of one part in the output of a fused site.

    Args:
        site: an `attention.qkv` or `ffn.gate_up` site.
        part: "query", "key", "value", or "gate", "up".
        model_config: the model's config: head counts and `model_type`.

    Raises:
        SiteError: the site has no such part, or nobody has checked this architecture's layout.
    """
    parts = PARTS.get(_plain(site.role), ())
    if part not in parts:
        raise SiteError(f"{site.path} ({site.role}) has no part {part!r}: choose from {', '.join(parts) or 'none'}")
    groups, counts = _layout(site, model_config)
    heads, rest = divmod(site.out_features, groups * sum(counts))
    if rest:
        raise SiteError(f"{site.path} has {site.out_features} rows, which do not divide into heads: target it whole")
    start = sum(counts[: parts.index(part)])
    rows_GHD = torch.arange(site.out_features).view(groups, sum(counts), heads)
    return rows_GHD[:, start : start + counts[parts.index(part)]].flatten()


def norm_order(model: nn.Module) -> Literal["pre", "post"]:
    """Whether norms stand before their sub-layer or behind the residual sum; only pre-norm stacks need a final norm."""
    before = getattr(getattr(model, "config", None), "do_layer_norm_before", None)
    if before is None:
        before = any(site.role == "norm.final" for site in sites(model))
    return "pre" if before else "post"


@vocabulary.once
def modules_of_base(model: nn.Module) -> dict[str, nn.Module]:
    """The base's modules by path, the model itself as ""; the bank is not walked, however many adapters it has."""
    return dict(model.named_modules({model._modules.get(BANK)}))  # type: ignore[arg-type]


def blocks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The transformer blocks of each stack, in order: {"decoder": [(path, module), ...]}, and "encoder" where it is."""
    both = is_encoder_decoder(model)
    only = "decoder" if is_decoder(model) else "encoder"
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    seen = set()
    for site in sites(model):
        # A Mamba block among attention blocks is a block too, so the list decides and not its members.
        if site.layer is None or _plain(site.role).split(".")[0] not in ("attention", "ffn"):
            continue
        container = container_of(site.path)
        if container not in seen:
            seen.add(container)
            children = model.get_submodule(container).named_children()
            stacks.setdefault(site.stack if both else only, []).extend((f"{container}.{i}", m) for i, m in children)
    return stacks


def task_heads(model: nn.Module) -> list[Site]:
    """The heads of a task (`score`, `classifier`, `qa_outputs`, ...), not the language model's."""
    return [site for site in sites(model) if site.role == "head" and site.path in vocabulary.TASK_HEADS]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two stacks, joined by cross-attention."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_decoder(model: nn.Module) -> bool:
    """Whether the model is one causal stack, with whatever head."""
    if is_encoder_decoder(model):
        return False
    attentions = [site.module for site in sites(model) if site.role == "attention"]
    if any(getattr(attention, "is_causal", False) for attention in attentions):
        return True
    # Some classes carry no flag, or never set it; what can only be a causal model is one.
    name = _model_type(model)
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and name not in vocabulary.CAUSAL_BY_CONFIG


def uses_attention_interface(attention_module: nn.Module) -> bool:
    """Whether the module's class calls transformers' attention interface; Bloom and Falcon go around it."""
    forward = inspect.unwrap(type(attention_module).forward)
    # Falcon's flash classes inherit; the names that the compiled forward uses need no source file.
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _sizes(module: nn.Module, hidden: int) -> tuple[int, int]:
    if is_linear(module) or is_embedding(module):
        return features(module)
    weight = getattr(module, "weight", None)
    width = weight.shape[-1] if kind_of(module) == "norm" and weight is not None else hidden
    return width, width


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _hidden(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", 0) or 0)


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # a bare module, or a model without tokens
        return None


def _plain(role: str) -> str:
    return role.removeprefix("cross_")


def _entries(targets: Targets) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def _show(targets: Targets) -> str:
    return targets if isinstance(targets, str) else f"[{', '.join(targets)}]"


def _name_fits(path: str, entry: str) -> bool:
    return path == entry or (path.endswith(f".{entry}") and not _in_kept_head(path))


def _in_kept_head(path: str) -> bool:
    """A head that is trained whole: only its full path reaches it, never "dense", a regex or "all-linear"."""
    return path.split(".")[0] in vocabulary.KEPT_HEADS


def _role_fits(role: str, entry: str) -> bool:
    """Whether a site of `role` answers for the role `entry`, itself or by one of its parts."""
    if entry == "norm":
        return role.startswith("norm.")
    if entry.startswith("attention"):
        role = _plain(role)
    entry = entry.removeprefix("self_")
    if role == entry:
        return True
    owner, _, part = entry.rpartition(".")
    return part in PARTS.get(_plain(role), ()) and role.rpartition(".")[0] == owner


def _matching(model: nn.Module, everything: list[Site], targets: Targets, field: str) -> set[str]:
    """Paths of the sites that fit; every entry must fit at least one."""
    if isinstance(targets, str) and targets not in _ENTRIES:
        found = _all_linear(everything) if targets.lower() == ALL_LINEAR else _by_regex(everything, targets)
        if not found and any(_name_fits(site.path, targets) for site in everything):
            raise SiteError(f"{field}: a string is a regex for a whole path; to name modules write a list, [{targets}]")
        if not found:
            raise _nothing(model, everything, targets, field)
        return found
    if not targets:
        raise SiteError(f"{field} is empty: name at least one role or module, for example 'attention.query'")
    chosen: set[str] = set()
    for entry in _entries(targets):
        found = {site.path for site in everything if entry in _ENTRIES and _role_fits(site.role, entry)}
        found = found or {site.path for site in everything if _name_fits(site.path, entry)}
        if not found and entry.lower() == ALL_LINEAR:
            found = _all_linear(everything)
        if not found:
            raise _nothing(model, everything, entry, field)
        chosen |= found
    return chosen


def _all_linear(everything: list[Site]) -> set[str]:
    """peft's selection: every linear but the output embedding and the heads that are trained whole."""
    linear = [site for site in everything if is_linear(site.module)]
    lm_head = {site.path for site in linear if site.role == "head" and site.path not in vocabulary.TASK_HEADS}
    return {site.path for site in linear if not _in_kept_head(site.path)} - lm_head


def _by_regex(everything: list[Site], pattern: str) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SiteError(f"targets {pattern!r} is not a valid regex ({error}): give a list to name modules") from None
    # A regex is written for linears; one that also covers the attention around them does not ask for it.
    leaves = [site for site in everything if not children_of(site.module) and not _in_kept_head(site.path)]
    return {site.path for site in leaves if compiled.fullmatch(site.path)}


def _nothing(model: nn.Module, everything: list[Site], entry: str, field: str) -> SiteError:
    """The one-line error for an entry that names nothing here."""
    where = type(model).__name__
    experts = any(vocabulary.EXPERTS.search(path) for path, _ in model.named_modules())
    if experts and entry.startswith("ffn."):
        return SiteError(
            f"{field}: no site {entry!r} in {where}, whose experts are fused and routed: take attention roles only"
        )
    roles = [role for role in ROLES if any(_role_fits(site.role, role) for site in everything)]
    leaves = sorted({site.path.rpartition(".")[2] for site in everything} - {""})
    near = difflib.get_close_matches(entry, [*roles, *leaves], n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return SiteError(
        f"{field}: no site {entry!r} in {where}{hint} Roles: {', '.join(roles)}. Modules: {', '.join(leaves)}"
    )


def _in_layers(model: nn.Module, chosen: list[Site], layers: Layers) -> list[Site]:
    if layers is None:
        return chosen
    numbered = [(site, site.layer, container_of(site.path)) for site in chosen if site.layer is not None]
    depth = {name: len(children_of(model.get_submodule(name))) for _, _, name in numbered}
    if isinstance(layers, int):
        most = max(depth.values(), default=layers)
        if not 1 <= layers <= most:
            raise SiteError(f"layers={layers}: give a count from 1 to {most}, or a list of indices")
        return [site for site, layer, name in numbered if layer >= depth[name] - layers]
    deepest = max(depth.values(), default=0)
    missing = [index for index in layers if not 0 <= index < deepest]
    if missing and numbered:
        raise SiteError(f"layers: no layer {missing[0]} in {type(model).__name__}, it has 0 to {deepest - 1}")
    return [site for site, layer, _ in numbered if layer in layers]


def _layout(site: Site, config: Any) -> tuple[int, tuple[int, ...]]:
    """How a fused output is cut: the number of groups, and the heads of each part in one group."""
    model_type = str(getattr(config, "model_type", ""))
    if _plain(site.role) == "ffn.gate_up" and model_type in vocabulary.GATE_FIRST:
        return 1, (1, 1)
    layout = vocabulary.FUSED_LAYOUTS.get(model_type)
    if layout is None or _plain(site.role) == "ffn.gate_up":
        raise SiteError(f"{site.path}: the order of its parts in {model_type!r} is not known: target {site.role} whole")
    heads = config.num_attention_heads
    if layout == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads, (heads // config.num_kv_heads, 1, 1)
        layout = "one_key" if config.multi_query else "heads"
    if layout == "bigcode":
        layout = "one_key" if config.multi_query else "heads"
    if layout == "one_key":
        return 1, (heads, 1, 1)
    if layout == "heads":
        return heads, (1, 1, 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 1, (heads, shared, shared)
