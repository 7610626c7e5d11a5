"""peft's configs in our terms: folders' and objects', without importing peft.

Every field is honoured, at its empty value, or refused by name. Which modules peft would adapt is worked out by its own
rules; where our words for them would choose others, the method names the modules one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from graft import roles
from graft.adapt import FOREIGN
from graft.errors import AdapterFileError, ConfigError, SiteError
from graft.method import Method
from graft.methods.ia3 import IA3
from graft.methods.lora import LoRA
from graft.methods.prefix import PrefixTuning
from graft.methods.prompt import PromptTuning
from graft.weights import is_embedding, is_linear

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The heads that peft adds to `modules_to_save` by itself, whether or not the model has them."""
COMMON = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
COMMON |= {"peft_version"}
_LINEAR = {"target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out"}
_LORA = {"r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_rslora", "init_lora_weights"}
_LORA |= {"layers_to_transform", "rank_pattern", "alpha_pattern", "ensure_weight_tying", "layers_pattern"}
_VIRTUAL = {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads"}
_PROMPT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
KNOWN = {
    "LORA": _LINEAR | _LORA,
    "IA3": _LINEAR | {"feedforward_modules", "init_ia3_weights"},
    "PROMPT_TUNING": _VIRTUAL | _PROMPT | {"modules_to_save"},
    "PREFIX_TUNING": _VIRTUAL | {"encoder_hidden_size", "prefix_projection", "init_weights", "modules_to_save"},
}
INERT = {"megatron_core", "qalora_group_size"}
"""LoRA fields with a default that only count beside a field that is refused."""
INITS = {True: "kaiming", False: "random", "gaussian": "gaussian"}
TRAINED_INITS = ("eva", "orthogonal")
"""Inits that leave the base alone, so that a trained adapter with them is an ordinary one."""
Config = dict[str, Any]


# ------------------------------------------------------------------------------------------------- reading a config


def method_of(config: Config, model: nn.Module | None, where: str) -> Method:
    """The method that a peft config describes; it is attached with `peft_compat=True`.

    Args:
        config: the JSON form.
        model: the model of the folder's adapter; None for a config object whose adapter is yet to be trained.
        where: what error messages name.

    Raises:
        AdapterFileError: a field that we do not honour, or a value out of range.
    """
    kind = config.get("peft_type")
    if kind not in READERS:
        raise AdapterFileError(f"{where}: peft_type {kind!r} is not one that Graft reads: {', '.join(READERS)}")
    check_fields(config, where)
    try:
        return READERS[kind](config, model)
    except (ConfigError, SiteError, AdapterFileError, TypeError, AttributeError, re.error) as error:
        raise AdapterFileError(f"{where}: {error}") from error


def check_fields(config: Config, where: str) -> None:
    """Refuse by name every field that we do not know and that is not at its empty value."""
    known = COMMON | KNOWN[config["peft_type"]] | (INERT if config["peft_type"] == "LORA" else set())
    for field, value in config.items():
        if field not in known and not empty(value):
            raise AdapterFileError(
                f"{where}: field {field!r} = {value!r} is not supported and may change what the adapter computes; "
                "an adapter without it can be loaded"
            )


def empty(value: Any) -> bool:
    """Whether a config value says "not used": null, false, {} or []."""
    return value is None or value is False or (isinstance(value, dict | list | tuple | set) and not value)


def read_object(config: Any) -> Method | None:
    """A peft config object as a method, or None if it is none; `graft.attach` asks this."""
    kind = getattr(config, "peft_type", None)
    if kind is None or not callable(getattr(config, "to_dict", None)):
        return None
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    data |= {"peft_type": str(getattr(kind, "value", kind)), "task_type": _text(data.get("task_type"))}
    try:
        return method_of(data, None, type(config).__name__)
    except AdapterFileError as error:
        raise ConfigError(str(error)) from error


def _read_lora(config: Config, model: nn.Module | None) -> LoRA:
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or (init not in INITS and (model is None or init not in TRAINED_INITS)):
        raise AdapterFileError(
            f"init_lora_weights = {init!r} changes the base, needs data or is not known; convert it with peft "
            "(path_initial_model_for_weight_conversion) to plain LoRA"
        )
    if config.get("layers_pattern"):
        raise AdapterFileError(f"layers_pattern = {config['layers_pattern']!r} is not supported; leave it empty")
    if config.get("ensure_weight_tying") and (model is None or _touches_embeddings(model, config)):
        raise AdapterFileError("ensure_weight_tying ties the adapters of embedding and head, which Graft keeps apart")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in _value(config, field, {}, dict):
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterFileError(f"{field}: {pattern!r} is no regex: {error}") from error
    return LoRA(
        rank=_value(config, "r", 8, int),
        alpha=_value(config, "lora_alpha", 8, int, float),
        dropout=_value(config, "lora_dropout", 0.0, int, float),
        bias=_value(config, "bias", "none", str),
        lora_bias=_value(config, "lora_bias", False, bool),
        rslora=_value(config, "use_rslora", False, bool),
        rank_pattern=_value(config, "rank_pattern", {}, dict),
        alpha_pattern=_value(config, "alpha_pattern", {}, dict),
        init=INITS.get(init, "kaiming"),
        **_places(config, model),
    )


def _read_ia3(config: Config, model: nn.Module | None) -> IA3:
    if model is None and not _value(config, "init_ia3_weights", True, bool):
        raise AdapterFileError("init_ia3_weights = false (random scales) is not supported; leave it true")
    places = _places(config, model)
    names = config.get("feedforward_modules")
    if model is None:
        if "targets" in places:
            places["feedforward"] = _names(names)
        return IA3(**places)
    scaled = sorted(path for path in targeted(model, config) if _feeds(path, names))
    return IA3(**places, feedforward=tuple(scaled))


def _read_prompt(config: Config, model: nn.Module | None) -> PromptTuning:
    length, kept = _virtual(config, model), _kept(config, model)
    init = _text(config.get("prompt_tuning_init", "RANDOM"))
    if init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
        raise AdapterFileError(f"prompt_tuning_init = {init!r} is not known; it is RANDOM, SAMPLE_VOCAB or TEXT")
    if model is not None or init == "RANDOM":
        return PromptTuning(length=length, **kept)
    if init == "SAMPLE_VOCAB":
        return PromptTuning(length=length, init="vocab", **kept)
    if config.get("tokenizer_kwargs"):
        raise AdapterFileError("tokenizer_kwargs is not supported; give PromptTuning the tokenizer itself")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config["tokenizer_name_or_path"])
    text = config["prompt_tuning_init_text"]
    return PromptTuning(length=length, init="text", text=text, tokenizer=tokenizer, **kept)


def _read_prefix(config: Config, model: nn.Module | None) -> PrefixTuning:
    length, kept = _virtual(config, model), _kept(config, model)
    if model is not None:  # a folder holds the expanded result, whatever made it
        return PrefixTuning(length=length, **kept)
    if config.get("init_weights"):
        raise AdapterFileError(f"init_weights = {config['init_weights']!r} is not supported; leave it empty")
    if not config.get("prefix_projection"):
        return PrefixTuning(length=length, **kept)
    return PrefixTuning(length=length, hidden=_value(config, "encoder_hidden_size", None, int), **kept)


READERS: dict[str, Callable[[Config, nn.Module | None], Method]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PROMPT_TUNING": _read_prompt,
    "PREFIX_TUNING": _read_prefix,
}


def _places(config: Config, model: nn.Module | None) -> dict[str, Any]:
    """`targets`, `exclude`, `layers`, `head` and `modules_to_save`: peft's own choice of modules, exactly."""
    names: Any = config.get("target_modules")
    layers: Any = config.get("layers_to_transform")
    out = _kept(config, model)
    if not empty(layers):
        out["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    if not empty(config.get("exclude_modules")):
        out["exclude"] = _names(config["exclude_modules"])
    if model is None:
        return out if names is None else out | {"targets": _names(names)}
    wanted = targeted(model, config)
    found: set[str] = set()
    try:
        chosen = roles.select(model, _names(names), exclude=out.get("exclude", ()), layers=out.get("layers"))
        found = {site.path for site in chosen if not _inside(site.path, out.get("modules_to_save", ()))}
    except SiteError:
        pass  # our words differ from peft's here, so the modules are named one by one
    if found != wanted:
        return {key: out[key] for key in ("head", "modules_to_save") if key in out} | {"targets": tuple(sorted(wanted))}
    return out | {"targets": _names(names)}


def _kept(config: Config, model: nn.Module | None) -> dict[str, Any]:
    """`head` and `modules_to_save` of the method."""
    automatic = HEADS.get(_text(config.get("task_type")), ())
    names = _value(config, "modules_to_save", [], list)
    if model is None:
        return {"head": bool(automatic), "modules_to_save": tuple(n for n in names if n not in automatic)}
    missing = [n for n in names if n not in automatic and not any(p.endswith(n) for p in _modules(model))]
    if missing:
        raise AdapterFileError(f"modules_to_save: the model has no module {missing[0]!r}")
    kept = saved_whole(model, config)
    heads = {site.path for site in roles.task_heads(model)}
    with_heads = heads <= kept
    return {"head": with_heads, "modules_to_save": tuple(sorted(kept - heads if with_heads else kept))}


def _virtual(config: Config, model: nn.Module | None) -> int:
    length = _value(config, "num_virtual_tokens", None, int)
    stacks = config.get("num_transformer_submodules")
    if model is None or stacks is None:
        return length
    both = roles.is_encoder_decoder(model)
    if stacks != 1 and not (both and stacks == 2):
        raise AdapterFileError(f"num_transformer_submodules = {stacks!r} does not fit {type(model).__name__}")
    if both and stacks == 1 and config["peft_type"] == "PREFIX_TUNING":
        raise AdapterFileError(
            "num_transformer_submodules = 1: peft's prefix then also catches the keys of the cross-attention in an "
            "encoder-decoder, which no other tool can follow; train it again with 2"
        )
    return length


def _value(config: Config, field: str, default: Any, *kinds: type) -> Any:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise AdapterFileError(f"{field} = {value!r} is not of the kind {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _names(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(sorted(value or ()))


# ------------------------------------------------------------------------------------------------- peft's choice


def targeted(model: nn.Module, config: Config) -> set[str]:
    """The paths that peft adapts: the whole path or its end for a list, a full match for a string.

    Raises:
        AdapterFileError: a name that fits no module (peft would ignore it), or one of a module that is no linear.
    """
    names: Any = config.get("target_modules")
    modules = _modules(model)
    if empty(names):
        raise AdapterFileError("target_modules is empty; the config must name the adapted modules")
    if isinstance(names, str) and names.lower() == roles.ALL_LINEAR:
        getter: Any = getattr(model, "get_output_embeddings", None)
        out = getter() if getter is not None else None
        found = {path for path, module in modules.items() if is_linear(module) and module is not out}
        heads = HEADS["SEQ_CLS"] if config.get("task_type") == "SEQ_CLS" else ()
        found -= set(heads)
    else:
        for name in () if isinstance(names, str) else names:
            if not any(_fits(path, [name]) for path in modules):
                raise AdapterFileError(f"target_modules: the model has no module {name!r}")
        found = {path for path in modules if _fits(path, names)}
    excluded, kept = config.get("exclude_modules") or [], _value(config, "modules_to_save", [], list)
    kept = [*kept, *HEADS.get(_text(config.get("task_type")), ())]
    found = {path for path in found if not _fits(path, excluded) and not _inside(path, kept)}
    layers: Any = config.get("layers_to_transform")
    if not empty(layers) and not isinstance(names, str):
        layers = [layers] if isinstance(layers, int) else layers
        found = {path for path in found if (at := re.match(r".*?\.[^.]*\.(\d+)\.", path)) and int(at[1]) in layers}
    wrong = [path for path in sorted(found) if not (is_linear(modules[path]) or is_embedding(modules[path]))]
    if wrong or not found:
        what = f"{wrong[0]} is a {type(modules[wrong[0]]).__name__}" if wrong else "no module is left"
        raise AdapterFileError(f"target_modules: {what}; targets are linears and embeddings")
    return found


def saved_whole(model: nn.Module, config: Config) -> set[str]:
    """The paths of the modules that peft trains and saves whole; it looks at the end of the path, dot or not."""
    names = [*(config.get("modules_to_save") or []), *HEADS.get(_text(config.get("task_type")), ())]
    found = {path for path in _modules(model) if any(path.endswith(name) for name in names)}
    return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    found = model.named_modules()
    return {path: module for path, module in found if path and path.split(".")[0] != roles.BANK}


def _fits(path: str, names: Any) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _feeds(path: str, names: Any) -> bool:
    """peft's (IA)^3 looks at the end of the path, dot or not."""
    return bool(re.fullmatch(names, path)) if isinstance(names, str) else any(path.endswith(n) for n in names or ())


def _inside(path: str, names: Iterable[str]) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings by path."""
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    wanted = [getter() for getter in getters if getter is not None]
    return {path: m for path, m in _modules(model).items() if any(m is w for w in wanted if w is not None)}


def _touches_embeddings(model: nn.Module, config: Config) -> bool:
    return bool((targeted(model, config) | saved_whole(model, config)) & set(embeddings(model)))


FOREIGN.append(read_object)
