"""Which modules peft would adapt or keep whole, by its own rules, and the names that say so.

Where our words for them would choose other modules, the method names the modules one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from graft import roles, vocabulary
from graft.errors import AdapterFileError, SiteError
from graft.weights import is_embedding, is_linear

Config = dict[str, Any]
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The heads that peft adds to `modules_to_save` by itself, whether or not the model has them."""


def empty(value: Any) -> bool:
    """Whether a config value says "not used": null, false, {} or []."""
    return value is None or value is False or (isinstance(value, dict | list | tuple | set) and not value)


def value_of(config: Config, field: str, default: Any, *kinds: type) -> Any:
    """A field of one of these kinds; the default where it is absent or null.

    Raises:
        AdapterFileError: it is of another kind.
    """
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise AdapterFileError(f"{field} = {value!r} is not of the kind {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise AdapterFileError(f"{field} = {value!r} is not a finite number")
    return value


def text_of(value: Any) -> str:
    """A field that may be an enum member."""
    return str(getattr(value, "value", value))


def names_of(value: Any) -> tuple[str, ...] | str:
    """Module names: one string is a regex."""
    return value if isinstance(value, str) else tuple(sorted(value or ()))


def _modules_of(names: Any) -> tuple[str, ...] | str:
    """As `names_of`, but a list with a word that is a role here, such as "norm", is a regex for modules so named."""
    found = names_of(names)
    if isinstance(found, str) or not {"norm", *roles.ROLES} & set(found):
        return found
    return rf"(.*\.)?({'|'.join(map(re.escape, found))})"


# ------------------------------------------------------------------------------------------------- reading


def places(
    config: Config, model: nn.Module | None, among: Callable[[nn.Module, Config], set[str]] | None = None
) -> dict[str, Any]:
    """`targets`, `exclude`, `layers`, `head` and `modules_to_save` of a method: peft's own choice, exactly.

    `among` gives the paths that peft adapts; `targeted` by default.
    """
    names: Any = config.get("target_modules")
    layers: Any = config.get("layers_to_transform")
    if config.get("layers_pattern"):
        raise AdapterFileError(f"layers_pattern = {config['layers_pattern']!r} is not supported; leave it empty")
    out = kept(config, model)
    if not empty(layers):
        out["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    if not empty(config.get("exclude_modules")):
        out["exclude"] = names_of(config["exclude_modules"])
    if model is None:
        return out if names is None else out | {"targets": _modules_of(names)}
    wanted = (among or targeted)(model, config)
    found: set[str] = set()
    try:
        chosen = roles.select(model, names_of(names), exclude=out.get("exclude", ()), layers=out.get("layers"))
        found = {site.path for site in chosen if not _inside(site.path, out.get("modules_to_save", ()))}
    except SiteError:
        pass  # our words differ from peft's here, so the modules are named one by one
    if found != wanted:
        return {key: out[key] for key in ("head", "modules_to_save") if key in out} | {"targets": tuple(sorted(wanted))}
    return out | {"targets": names_of(names)}


def kept(config: Config, model: nn.Module | None) -> dict[str, Any]:
    """`head` and `modules_to_save` of a method."""
    automatic = HEADS.get(text_of(config.get("task_type")), ())
    names = value_of(config, "modules_to_save", [], list)
    if model is None:
        return {"head": bool(automatic), "modules_to_save": tuple(n for n in names if n not in automatic)}
    missing = [n for n in names if n not in automatic and not any(p.endswith(n) for p in modules(model))]
    if missing:
        raise AdapterFileError(f"modules_to_save: the model has no module {missing[0]!r}")
    whole = saved_whole(model, config)
    heads = {site.path for site in roles.task_heads(model)}
    with_heads = heads <= whole
    return {"head": with_heads, "modules_to_save": tuple(sorted(whole - heads if with_heads else whole))}


def targeted(model: nn.Module, config: Config) -> set[str]:
    """The paths that peft adapts: the whole path or its end for a list, a full match for a string.

    Raises:
        AdapterFileError: a name that fits no module (peft would ignore it), or one of a module that is no linear.
    """
    found = matched(model, config)
    here = modules(model)
    wrong = [path for path in sorted(found) if not (is_linear(here[path]) or is_embedding(here[path]))]
    if wrong:
        what = f"{wrong[0]} is a {type(here[wrong[0]]).__name__}"
        raise AdapterFileError(f"target_modules: {what}; targets are linears and embeddings")
    return found


def matched(model: nn.Module, config: Config) -> set[str]:
    """As `targeted`, whatever the modules are.

    Raises:
        AdapterFileError: a name that fits no module, or no module is left.
    """
    names: Any = config.get("target_modules")
    here = modules(model)
    if empty(names):
        raise AdapterFileError("target_modules is empty; the config must name the adapted modules")
    if isinstance(names, str) and names.lower() == roles.ALL_LINEAR:
        getter: Any = getattr(model, "get_output_embeddings", None)
        out = getter() if getter is not None else None
        found = {path for path, module in here.items() if is_linear(module) and module is not out}
        heads = HEADS["SEQ_CLS"] if config.get("task_type") == "SEQ_CLS" else ()
        found -= set(heads)
    else:
        for name in () if isinstance(names, str) else names:
            if not any(_fits(path, [name]) for path in here):
                raise AdapterFileError(f"target_modules: the model has no module {name!r}")
        found = {path for path in here if _fits(path, names)}
    excluded, whole = config.get("exclude_modules") or [], value_of(config, "modules_to_save", [], list)
    whole = [*whole, *HEADS.get(text_of(config.get("task_type")), ())]
    found = {path for path in found if not _fits(path, excluded) and not _inside(path, whole)}
    layers: Any = config.get("layers_to_transform")
    if not empty(layers) and not isinstance(names, str):  # a whole path stays, wherever it lies
        layers = [layers] if isinstance(layers, int) else layers
        found = {path for path in found if path in names or _layer(path) in layers}
    if not found:
        raise AdapterFileError("target_modules: no module is left; targets are linears and embeddings")
    return found


def uncut(model: nn.Module, config: Config) -> Config:
    """The config of an object with its targets one by one, where `layers_to_transform` does not cut all of them."""
    names, here = config.get("target_modules"), modules(model)
    if empty(config.get("layers_to_transform")) or isinstance(names, str) or not any(n in here for n in names or ()):
        return config
    paths = sorted(matched(model, config))
    return config | {"target_modules": paths, "layers_to_transform": None, "exclude_modules": None}


def in_experts(model: nn.Module, names: Any) -> str | None:
    """Why these targets of a LORA may be fused experts in peft: it goes by their last parts and lists no regex."""
    experts = vocabulary.peft_experts(getattr(model, "config", None))
    listed = [names] if isinstance(names, str) else names or ()
    taken = next((n for n in listed if isinstance(names, str) or n.rpartition(".")[2] in experts), None)
    if not experts or taken is None:
        return None
    what = f"the fused experts of a {type(model).__name__}"
    return f"peft may take {taken} for {what}, Graft takes the modules so called; list modules with other names"


def saved_whole(model: nn.Module, config: Config) -> set[str]:
    """The paths of the modules that peft trains and saves whole; it looks at the end of the path, dot or not."""
    names = [*(config.get("modules_to_save") or []), *HEADS.get(text_of(config.get("task_type")), ())]
    found = {path for path in modules(model) if any(path.endswith(name) for name in names)}
    return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}


# ------------------------------------------------------------------------------------------------- writing


def named(model: nn.Module, config: Config, paths: Iterable[str], fed: set[str] | None = None) -> list[str] | None:
    """Module names that peft resolves to exactly these paths: the last parts where they do, else whole paths.

    Args:
        fed: the paths among them whose input is meant ((IA)^3's `feedforward_modules`).

    Returns:
        The names, or None if peft's rules cannot name exactly these modules.
    """
    paths = set(paths)
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        try:
            found = matched(model, {**config, "target_modules": names})
        except AdapterFileError:
            continue
        ends = tuple(feeding(names, fed or set()))
        if found == paths and {path for path in paths if path.endswith(ends)} == (fed or set()):
            return names
    return None


def feeding(names: list[str], fed: set[str]) -> list[str]:
    """Those of the names that end a path whose input is meant."""
    return [name for name in names if any(path == name or path.endswith(f".{name}") for path in fed)]


# ------------------------------------------------------------------------------------------------- the model


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path."""
    return {path: module for path, module in roles.modules_of_base(model).items() if path}


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings by path."""
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    wanted = [getter() for getter in getters if getter is not None]
    return {path: m for path, m in modules(model).items() if any(m is w for w in wanted if w is not None)}


def resizing(model: nn.Module, given: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """What to do where a tensor differs in the number of tokens alone; "" elsewhere."""
    rows = {len(getattr(module, "weight", ())) for module in embeddings(model).values()}
    others = [(new, old) for new, old in zip(given, needed, strict=False) if new != old]
    if len(given) != len(needed) or len(others) != 1 or others[0][1] not in rows:
        return ""
    return f"; its base had another number of tokens: call model.resize_token_embeddings({others[0][0]}) first"


def touches_embeddings(model: nn.Module, config: Config) -> bool:
    """Whether the config adapts, or keeps whole, an input or output embedding."""
    return bool((targeted(model, config) | saved_whole(model, config)) & set(embeddings(model)))


def _layer(path: str) -> int | None:
    at = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(at[1]) if at else None


def _fits(path: str, names: Any) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _inside(path: str, names: Iterable[str]) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)
